"""What must not change the bits of a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import Case, Inputs, make_inputs
from harness import same_bits, solve
from torch import Tensor

Supported = Callable[[Case], None]

LENS = (1500, 0, 64, 3000, 5, 129, 700, 2048)


def select(inputs: Inputs, sequences: list[int]) -> Inputs:
    """The same problem with these sequences only, in this order."""
    index = torch.tensor(sequences, device=inputs.device)
    n = inputs.case.query_len
    rows = (index[:, None] * n + torch.arange(n, device=inputs.device)).flatten()
    return replace(
        inputs,
        case=replace(inputs.case, lens=tuple(inputs.case.lens[i] for i in sequences)),
        q_nope=inputs.q_nope[rows],
        q_rope=None if inputs.q_rope is None else inputs.q_rope[rows],
        block_table=inputs.block_table[index],
        cache_seqlens=inputs.cache_seqlens[index],
    )


def rows_of(result: Tensor, sequence: int, query_len: int) -> Tensor:
    return result[sequence * query_len : (sequence + 1) * query_len]


@pytest.mark.parametrize("page_size", [1, 4, 16, 64, 256])
def test_physical_pages_do_not_matter(page_size: int, seed: int, supported: Supported) -> None:
    """The same content in other pages of the pool: equal bits."""
    case = Case(f"pages_{page_size}", lens=LENS, page_size=page_size)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    pages = len(inputs.kv_cache)
    moved_to = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).cuda()
    kv_cache = torch.empty_like(inputs.kv_cache)
    kv_cache[moved_to] = inputs.kv_cache
    valid = (inputs.block_table >= 0) & (inputs.block_table < pages)
    table = torch.where(valid, moved_to[inputs.block_table.clamp(0, pages - 1).long()].int(), inputs.block_table)
    out, lse = solve(inputs)
    moved_out, moved_lse = solve(replace(inputs, kv_cache=kv_cache, block_table=table))
    assert same_bits(out, moved_out) and same_bits(lse, moved_lse)


BATCH_INVARIANT = [
    Case("invariant", lens=LENS, batch_invariant=True),
    Case("invariant_heads_20", lens=LENS, heads=20, batch_invariant=True),
    Case("invariant_heads_128", lens=LENS, heads=128, batch_invariant=True),
    Case("invariant_tokens_3", lens=LENS, query_len=3, batch_invariant=True),
    Case("invariant_e4m3", lens=LENS, kv_format="e4m3", batch_invariant=True),
    Case("invariant_page_1", lens=LENS, page_size=1, batch_invariant=True),
]


@pytest.mark.parametrize("case", BATCH_INVARIANT, ids=lambda case: case.name)
def test_batch_invariant_mode(case: Case, seed: int, supported: Supported) -> None:
    """A sequence alone, in a permuted batch and with other neighbours: equal bits. Without it, the same prompt gets other tokens
    depending on what else the server happens to run."""
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    out, lse = solve(inputs)
    n = case.query_len

    order = torch.randperm(len(LENS), generator=torch.Generator().manual_seed(seed)).tolist()
    permuted_out, permuted_lse = solve(select(inputs, order))
    for position, sequence in enumerate(order):
        assert same_bits(rows_of(permuted_out, position, n), rows_of(out, sequence, n)), f"sequence {sequence} in a permuted batch"
        assert same_bits(rows_of(permuted_lse, position, n), rows_of(lse, sequence, n)), f"sequence {sequence} in a permuted batch"
    for sequence in range(len(LENS)):
        alone_out, alone_lse = solve(select(inputs, [sequence]))
        assert same_bits(alone_out, rows_of(out, sequence, n)), f"sequence {sequence} alone"
        assert same_bits(alone_lse, rows_of(lse, sequence, n)), f"sequence {sequence} alone"
    doubled_out, _ = solve(select(inputs, [*range(len(LENS))] * 5))
    assert same_bits(doubled_out[: len(out)], out) and same_bits(doubled_out[-len(out) :], out)


def test_rows_do_not_depend_on_their_neighbours(seed: int, supported: Supported) -> None:
    """Heads that are infinite or enormous must not disturb the other heads of their tile: rescaling is a column's own business."""
    case = Case("neighbours", lens=(700, 65, 3000), heads=12)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    out, lse = solve(inputs)
    disturbed = replace(inputs, q_nope=inputs.q_nope.clone())
    disturbed.q_nope[:, ::3] *= 1000
    other_out, other_lse = solve(disturbed)
    calm = [h for h in range(case.heads) if h % 3]
    assert same_bits(out[:, calm], other_out[:, calm]) and same_bits(lse[:, calm], other_lse[:, calm])
