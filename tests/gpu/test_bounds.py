"""Lengths and page numbers that lie, on the CUDA device: nothing outside of the block table and of the pool is read, the rows of such a
sequence become NaN, and every other row has the bits that it has without it. And NaN in tokens that the causal mask hides."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import INT_MAX, Case, Inputs, check, make_inputs, reference
from harness import Guarded, Session, capture, same_bits
from torch import Tensor

Supported = Callable[[Case], None]

FORMATS = ["bf16", "e4m3", "e4m3_group", "e4m3_656"]
MIXED = (17, 700, 0, 64, 1, 3000)  # the longest, which is the one that lies, is the last: past its row the table ends
LIAR = 5

# One case for each way that the kernels take: tiles of every kind, pages that are copied whole, gathered and converted.
SHAPES: dict[str, dict[str, Any]] = {
    "n16": {},
    "n8": {"heads": 3},
    "tiles": {"heads": 128},
    "tokens": {"heads": 16, "query_len": 3},
    "ragged": {"heads": 16, "query_lens": (1, 4, 2, 0, 3, 2), "spare_rows": 2},
    "drafts": {"heads": 4, "query_len": 4, "tree_mask": "random"},
    "more drafts": {"heads": 16, "query_len": 5, "tree_mask": "random"},
    "invariant": {"batch_invariant": True},
}


def case_of(kv_format: str, page_size: int, shape: str = "n16", lens: tuple[int, ...] = MIXED) -> Case:
    return Case(f"{kv_format}_{page_size}_{shape}", lens=lens, page_size=page_size, kv_format=kv_format, **SHAPES[shape])


def without(tensor: Tensor, rows: slice) -> Tensor:
    return torch.cat([tensor[: rows.start], tensor[rows.stop :]])


def run(session: Session, inputs: Inputs, **overrides: Any) -> tuple[Tensor, Tensor]:
    """A run into fresh poisoned outputs, whose surroundings must stay as they were."""
    out, lse = inputs.outputs()
    guards = Guarded(out), Guarded(lse)
    session.run(out, lse, **overrides)
    torch.cuda.synchronize()
    assert all(guard.untouched_outside() for guard in guards), f"{inputs.case.name}: wrote outside of its outputs"
    return out, lse


def liars_rows_are_nan(case: Case, sequence: int, honest: tuple[Tensor, Tensor], lying: tuple[Tensor, Tensor]) -> None:
    rows = case.rows_of(sequence)
    for name, before, after in zip(("out", "lse"), honest, lying, strict=True):
        assert after[rows].isnan().all(), f"{name} of {case.name}: the rows of sequence {sequence} are not NaN"
        assert same_bits(without(before, rows), without(after, rows)), f"{name} of {case.name}: other rows have other bits"


def narrowed(inputs: Inputs) -> Tensor:
    """The table without the longest sequence's last column, in storage of its own: behind a row the next one begins."""
    columns = -(-int(inputs.cache_seqlens.max()) // inputs.case.page_size)
    return inputs.block_table[:, : columns - 1].clone()


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_length_beyond_the_table(page_size: int, kv_format: str, seed: int, supported: Supported) -> None:
    """Guards: a row of the table that runs on into the next row's pages, or past the tensor."""
    case = case_of(kv_format, page_size)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    session.update()
    honest = run(session, inputs)
    check(inputs, *honest, reference(inputs))
    liars_rows_are_nan(case, LIAR, honest, run(session, inputs, block_table=narrowed(inputs)))
    again = run(session, inputs)  # and the lie leaves nothing behind
    assert same_bits(honest[0], again[0]) and same_bits(honest[1], again[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
def test_a_length_beyond_the_table_in_every_kernel(kv_format: str, shape: str, seed: int, supported: Supported) -> None:
    """Guards: one of the kernels, or one of a sequence's tiles or pieces, that computes on."""
    case = case_of(kv_format, 64, shape)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    session.update()
    honest = run(session, inputs)
    liars_rows_are_nan(case, LIAR, honest, run(session, inputs, block_table=narrowed(inputs)))


@pytest.mark.parametrize("excess", ["one token", "ten times", "the largest length"])
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(("kv_format", "shape"), [("bf16", "n16"), ("e4m3", "tiles")])
def test_lengths_far_beyond_the_table(kv_format: str, shape: str, page_size: int, excess: str, seed: int, supported: Supported) -> None:
    """Guards: products that overflow on the way to the comparison; with rows on M, an FP8 cache's first look into the table. Other
    lengths make another schedule, so that the other rows are compared with what they should be."""
    case = case_of(kv_format, page_size, shape)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    table = inputs.block_table[:, : -(-max(MIXED) // page_size)].clone()
    full = table.shape[1] * page_size
    lens = inputs.cache_seqlens.clone()
    lens[LIAR] = {"one token": full + 1, "ten times": 10 * full, "the largest length": INT_MAX}[excess]
    lying = replace(inputs, block_table=table, cache_seqlens=lens)
    session = Session(lying)
    session.update()
    out, lse = run(session, lying)
    rows = case.rows_of(LIAR)
    assert out[rows].isnan().all()
    assert lse[rows].isnan().all()
    honest = replace(inputs, cache_seqlens=inputs.cache_seqlens.clone())
    honest.cache_seqlens[LIAR] = 0
    out[rows], lse[rows] = 0, case.empty_lse
    check(honest, out, lse, reference(honest))


@pytest.mark.parametrize("page", [-1, -INT_MAX - 1, "num_pages", INT_MAX])
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_numbers_outside_of_the_pool(page_size: int, kv_format: str, page: Any, seed: int, supported: Supported) -> None:
    """Guards: an address made of such a number, in the first, a middle and the last column of a long sequence; and in a short one."""
    case = case_of(kv_format, page_size)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    session.update()
    honest = run(session, inputs)
    number = len(inputs.kv_cache) if page == "num_pages" else page
    last = -(-MIXED[LIAR] // page_size) - 1
    for sequence, column in ((LIAR, 0), (LIAR, last // 2), (LIAR, last), (0, 0)):
        table = inputs.block_table.clone()
        table[sequence, column] = number
        liars_rows_are_nan(case, sequence, honest, run(session, inputs, block_table=table))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
def test_page_numbers_in_every_kernel(kv_format: str, shape: str, seed: int, supported: Supported) -> None:
    """Guards: one of the kernels, or one of a sequence's tiles or pieces, that goes on. Every row sees page 0."""
    case = case_of(kv_format, 64, shape)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    session.update()
    honest = run(session, inputs)
    table = inputs.block_table.clone()
    table[LIAR, 0] = len(inputs.kv_cache)
    liars_rows_are_nan(case, LIAR, honest, run(session, inputs, block_table=table))


@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
def test_a_page_that_some_rows_see(kv_format: str, seed: int, supported: Supported) -> None:
    """The mask hides the last page from all but the last query token: that one's rows are NaN, the others NaN or what they were."""
    case = Case(f"{kv_format}_seen_by_some", lens=(65, 129, 300), query_len=2, kv_format=kv_format)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    session.update()
    honest = run(session, inputs)
    table = inputs.block_table.clone()
    table[1, 2] = -1  # token 128 of sequence 1
    lying = run(session, inputs, block_table=table)
    rows = case.rows_of(1)
    for before, after in zip(honest, lying, strict=True):
        assert after[rows.stop - 1].isnan().all()
        assert after[rows.start].isnan().all() or same_bits(after[rows.start], before[rows.start])
        assert same_bits(without(before, rows), without(after, rows))


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_unreached_columns_hold_anything(kv_format: str, page_size: int, seed: int, supported: Supported) -> None:
    """Guards: a check that looks past a sequence's end, where tables hold garbage: such rows are right, not NaN."""
    case = case_of(kv_format, page_size, lens=(17, 0, page_size, 2 * page_size + 1))
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    for sequence, length in enumerate(case.lens):
        inputs.block_table[sequence, -(-length // page_size) :] = (-1, INT_MAX, len(inputs.kv_cache), -INT_MAX - 1)[sequence]
    session = Session(inputs)
    session.update()
    check(inputs, *run(session, inputs), reference(inputs))


def test_a_sequence_that_nobody_asks_about(seed: int, supported: Supported) -> None:
    """Without query tokens any length and any page will do: there are no rows to become NaN, and nothing is read."""
    case = Case("nobody", lens=(70, 130, 5), query_lens=(1, 0, 2), spare_rows=1)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    expected = reference(inputs)
    inputs.block_table[1] = -1
    inputs.cache_seqlens[1] = INT_MAX
    session = Session(inputs)
    session.update()
    check(inputs, *run(session, inputs), expected)


@pytest.mark.parametrize("nothing", ["pages", "columns", "pages and columns"])
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("page_size", [1, 64])
def test_nothing_to_read(page_size: int, kv_format: str, nothing: str, seed: int, supported: Supported) -> None:
    """Guards: a pool of no pages or a table of no columns that is refused, or read. With a length other than 0: NaN, there alone."""
    case = case_of(kv_format, page_size, lens=(0, 0, 0))
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    if "pages" in nothing:
        scales = inputs.kv_group_scales
        inputs = replace(inputs, kv_cache=inputs.kv_cache[:0], kv_group_scales=None if scales is None else scales[:0])
    if "columns" in nothing:
        inputs = replace(inputs, block_table=inputs.block_table[:, :0])
    session = Session(inputs)
    session.update()
    out, lse = run(session, inputs)
    assert not out.any()
    assert (lse == -math.inf).all()
    inputs.cache_seqlens[1] = 1
    session.update()
    out, lse = run(session, inputs)
    rows = case.rows_of(1)
    assert out[rows].isnan().all() and lse[rows].isnan().all()
    assert not without(out, rows).any()
    assert (without(lse, rows) == -math.inf).all()


def test_lengths_that_change_under_a_graph(seed: int, supported: Supported) -> None:
    """A replay checks the lengths of its time, as the ones before did: a lie comes and goes with them."""
    case = Case("graph", lens=(128, 100, 64))
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    inputs = replace(inputs, block_table=inputs.block_table[:, :2].clone())
    session = Session(inputs)
    out, lse = inputs.outputs()
    session.step(out, lse)
    torch.cuda.synchronize()
    graph = capture(lambda: session.step(out, lse))
    honest = reference(inputs)
    for length in (128, 129, 128):
        inputs.cache_seqlens[0] = length
        graph.replay()
        torch.cuda.synchronize()
        if length == 128:
            check(inputs, out, lse, honest)
        else:
            assert out[0].isnan().all() and lse[0].isnan().all()
            assert out[1:].isfinite().all() and lse[1:].isfinite().all()


# ---- NaN behind the causal mask ----


def spoil(inputs: Inputs, sequence: int, token: int) -> Inputs:
    """The same inputs with one token's KV row full of NaN (E4M3 has it as 0x7F)."""
    cache = inputs.kv_cache.clone(memory_format=torch.preserve_format)
    page = int(inputs.block_table[sequence, token // inputs.case.page_size])
    row = cache[page, token % inputs.case.page_size]
    if cache.element_size() == 1:
        row.view(torch.uint8).fill_(0x7F)
    else:
        row.fill_(math.nan)
    return replace(inputs, kv_cache=cache)


@pytest.mark.parametrize("heads", [3, 16, 128])
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("page_size", [1, 64])
def test_rows_that_see_nothing_stay_empty(page_size: int, kv_format: str, heads: int, seed: int, supported: Supported) -> None:
    """Guards: 0 times NaN. More query tokens than KV tokens: the first rows see nothing, whatever is in the tokens that are hidden."""
    case = Case(
        f"{kv_format}_{page_size}_hidden_{heads}", lens=(2, 70, 1), query_len=4, heads=heads, page_size=page_size, kv_format=kv_format
    )
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    session.update()
    clean = run(session, inputs)
    check(inputs, *clean, reference(inputs))
    for token in (0, 1):
        spoiled = spoil(inputs, 0, token)
        out, lse = run(session, spoiled, kv_cache=spoiled.kv_cache)
        assert not out[:2].any(), f"{case.name}: rows that see nothing are not 0"
        assert (lse[:2] == -math.inf).all(), f"{case.name}: lse of rows that see nothing is not -inf"
        assert out[3].isnan().any(), f"{case.name}: the NaN is lost for the row that sees it"
        assert same_bits(out[4:], clean[0][4:]) and same_bits(lse[4:], clean[1][4:]), f"{case.name}: other sequences have other bits"


@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
def test_hidden_nan_in_long_sequences(kv_format: str, seed: int, supported: Supported) -> None:
    """Only rows of the same sequence may be touched by a NaN in its last token; the row that sees it is NaN."""
    case = Case(f"{kv_format}_hidden_long", lens=(300, 3000, 64), query_len=3, kv_format=kv_format)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    session.update()
    clean = run(session, inputs)
    spoiled = spoil(inputs, 1, 2999)
    out, lse = run(session, spoiled, kv_cache=spoiled.kv_cache)
    rows = case.rows_of(1)
    assert out[rows.stop - 1].isnan().any()
    assert lse[rows.stop - 1].isnan().all()
    for before, after in zip(clean, (out, lse), strict=True):
        assert same_bits(without(before, rows), without(after, rows))
