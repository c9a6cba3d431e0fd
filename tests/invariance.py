"""What must not change the bits of a result, for the tests of both devices."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import Case, Inputs, make_inputs
from harness import same_bits, solve
from torch import Tensor

LENS = (1500, 0, 64, 3000, 5, 129, 700, 2048)


def select(inputs: Inputs, sequences: list[int]) -> Inputs:
    """The same problem with these sequences only, in this order."""
    case = inputs.case
    index = torch.tensor(sequences, device=inputs.device)
    every_row = torch.arange(case.rows, device=inputs.device)
    rows = torch.cat([every_row[case.rows_of(i)] for i in sequences])
    ragged = {}
    if case.query_lens:
        ragged = {"query_lens": tuple(case.query_lens[i] for i in sequences), "spare_rows": 0}
        counts = torch.tensor((0, *ragged["query_lens"]), device=inputs.device)
        inputs = replace(inputs, cu_seqlens_q=counts.cumsum(0).int())
    return replace(
        inputs,
        case=replace(case, lens=tuple(case.lens[i] for i in sequences), **ragged),
        q_nope=inputs.q_nope[rows],
        q_rope=None if inputs.q_rope is None else inputs.q_rope[rows],
        block_table=inputs.block_table[index],
        cache_seqlens=inputs.cache_seqlens[index],
        tree_mask=None if inputs.tree_mask is None else inputs.tree_mask[rows],
    )


def permutation(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def check_pages(case: Case, seed: int, device: str) -> None:
    """The same content in other pages of the pool: equal bits."""
    inputs = make_inputs(case, seed, device)
    pages = len(inputs.kv_cache)
    moved_to = permutation(pages, seed).to(device)
    kv_cache = torch.empty_like(inputs.kv_cache)
    kv_cache[moved_to] = inputs.kv_cache
    valid = (inputs.block_table >= 0) & (inputs.block_table < pages)
    table = torch.where(valid, moved_to[inputs.block_table.clamp(0, pages - 1).long()].int(), inputs.block_table)
    for result, moved in zip(solve(inputs), solve(replace(inputs, kv_cache=kv_cache, block_table=table)), strict=True):
        assert same_bits(result, moved)


def check_batch_invariance(case: Case, seed: int, device: str) -> None:
    """A sequence alone, in a permuted batch, with other neighbours, and on other numbers of SMs or threads: equal bits."""
    inputs = make_inputs(case, seed, device)
    whole = solve(inputs)

    def check(what: str, sequences: list[int], num_sms: int = 0) -> None:
        chosen = select(inputs, sequences)
        for result, expected in zip(solve(chosen, num_sms=num_sms, max_query_len=case.max_query_len), whole, strict=True):
            for position, sequence in enumerate(sequences):
                got, wanted = result[chosen.case.rows_of(position)], expected[case.rows_of(sequence)]
                assert same_bits(got, wanted), f"sequence {sequence} {what}"

    everyone = range(len(case.lens))
    # A batch without a query token is none.
    some = [sequence for sequence in everyone if case.query_counts[sequence]]
    check("in a permuted batch", permutation(len(case.lens), seed).tolist(), num_sms=2)
    for sequence in some:
        check("alone", [sequence], num_sms=case.num_sms)
    check("on one SM or thread", some[:3], num_sms=1)
    check("in a batch of five times as many", [*everyone] * 5)


def check_neighbours(case: Case, seed: int, device: str) -> None:
    """Heads that are infinite or enormous do not disturb the other heads of their tile."""
    inputs = make_inputs(case, seed, device)
    disturbed = replace(inputs, q_nope=inputs.q_nope.clone())
    disturbed.q_nope[:, ::3] *= 1000
    calm = [h for h in range(case.heads) if h % 3]
    for result, other in zip(solve(inputs), solve(disturbed), strict=True):
        assert same_bits(result[:, calm], other[:, calm])
