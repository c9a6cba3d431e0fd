"""What must not change the bits of a result, on the CPU device."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from cases import Case, check, make_inputs, reference
from harness import Session, same_bits, solve
from invariance import LENS, check_batch_invariance, check_neighbours, check_pages, permutation, select


def test_a_hundred_equal_calls(seed: int) -> None:
    """Guards against results that depend on which thread comes first."""
    inputs = make_inputs(Case("hundred", lens=(3000, 17, 900)), seed)
    session = Session(inputs)
    out, lse = session.solve()
    for _ in range(99):
        session.update()
        again, again_lse = inputs.outputs()
        session.run(again, again_lse)
        assert same_bits(out, again)
        assert same_bits(lse, again_lse)


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_physical_pages_do_not_matter(page_size: int, seed: int) -> None:
    check_pages(Case("pages", lens=LENS, page_size=page_size), seed, "cpu")


def test_page_size_does_not_matter(seed: int) -> None:
    """The same rows as pages of 64 and of 16."""
    inputs = make_inputs(Case("repaged", lens=LENS), seed)
    table = (inputs.block_table.long()[..., None] * 4 + torch.arange(4)).flatten(1).int().contiguous()
    out, lse = solve(inputs)
    smaller = replace(
        inputs, case=replace(inputs.case, page_size=16), kv_cache=inputs.kv_cache.view(-1, 16, inputs.kv_cache.shape[-1]), block_table=table
    )
    other, other_lse = solve(smaller)
    assert same_bits(out, other)
    assert same_bits(lse, other_lse)


def test_permuted_batch(seed: int) -> None:
    """Right results for each sequence, wherever in the batch it stands."""
    inputs = make_inputs(Case("permuted", lens=LENS, query_len=2), seed)
    permuted = select(inputs, permutation(len(LENS), seed).tolist())
    out, lse = solve(permuted)
    check(permuted, out, lse, reference(permuted))


BATCH_INVARIANT = [
    Case("bf16", lens=LENS, batch_invariant=True),
    Case("heads_20_tokens_3", lens=LENS, heads=20, query_len=3, batch_invariant=True),
    Case("e4m3", lens=LENS, kv_format="e4m3", batch_invariant=True),
    Case("drafts", lens=LENS, query_len=4, tree_mask="random", batch_invariant=True),
    Case("page_1_one_worker", lens=LENS, page_size=1, num_sms=1, batch_invariant=True),
]


@pytest.mark.parametrize("case", BATCH_INVARIANT, ids=lambda case: case.name)
def test_batch_invariant_mode(case: Case, seed: int) -> None:
    """Without it, the same prompt gets other tokens depending on what else the server happens to run."""
    check_batch_invariance(case, seed, "cpu")


def test_heads_do_not_disturb_each_other(seed: int) -> None:
    """Heads with enormous logits share a tile with calm ones: rescaling is a row's own business."""
    check_neighbours(Case("neighbours", lens=(700, 65, 3000), heads=12), seed, "cpu")


def test_padded_rows_are_zero(seed: int) -> None:
    """Downstream quantisation takes the maximum over the whole output tensor: padded rows must be finite, and zero."""
    inputs = make_inputs(Case("padded", lens=(300, 0, 64, -1, 0)), seed)
    out, lse = solve(inputs)
    assert out.isfinite().all()
    assert (out[[1, 3, 4]] == 0).all()
    assert (lse[[1, 3, 4]] == float("-inf")).all()
    assert not lse.isnan().any()


def test_nan_stays_in_its_sequence(seed: int) -> None:
    """A sequence with NaN in its queries shows it; the others have the bits that they have without it."""
    inputs = make_inputs(Case("contagion", lens=(900, 64, 300)), seed)
    out, lse = solve(inputs)
    ill = replace(inputs, q_nope=inputs.q_nope.clone())
    ill.q_nope[1] = float("nan")
    ill_out, ill_lse = solve(ill)
    assert ill_out[1].isnan().all()
    assert ill_lse[1].isnan().all()
    assert same_bits(out[[0, 2]], ill_out[[0, 2]])
    assert same_bits(lse[[0, 2]], ill_lse[[0, 2]])


def test_two_threads(seed: int) -> None:
    """Distinct plans in two threads at once, 40 calls each: the bits of calls one after the other."""
    both = [make_inputs(Case(f"thread_{i}", lens=(2000, 100 + i, 64), heads=16 + i), seed + i) for i in range(2)]
    expected = [solve(inputs) for inputs in both]
    failures: list[str] = []

    def work(which: int) -> None:
        session = Session(both[which])
        for call in range(40):
            out, lse = session.solve()
            if not (same_bits(out, expected[which][0]) and same_bits(lse, expected[which][1])):
                failures.append(f"thread {which}, call {call}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
