"""Prefixes that sequences share: how much of them is found, what must not change, and what is refused. Against FP64 they are in the matrix
(tests/matrix.py); how groups are formed is compared with brute force in tests/static/test_shared_prefixes.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, check, make_inputs, reference
from harness import Session, check_case, problem_of, same_bits, solve
from matrix import MATRIX
from prefix_cases import drawn

import etap_py as etap


@pytest.mark.parametrize("number", range(40))
def test_against_fp64(number: int, seed: int) -> None:
    check_case(drawn(seed), seed, "cpu")


def shared(case: Case, seed: int) -> etap.Shared:
    session = Session(make_inputs(case, seed))
    session.update()
    return session.plan.shared()


def test_one_prompt(seed: int) -> None:
    """A batch with one prompt is read by as many sequences together as have rows for a tile."""
    case = Case("prompt", tables="common", heads=16, lens=(1473,) * 9, shared_prefixes=True)
    assert etap.query(problem_of(case, "cpu")).max_sharers == 4
    assert shared(case, seed) == etap.Shared(groups=2, sequences=8, tokens=6 * 1472)  # and one that is left
    assert shared(replace(case, heads=64), seed).groups == 0
    assert shared(replace(case, tables="own"), seed).groups == 0


@pytest.mark.parametrize("case", [case for case in MATRIX["prefix"] if case.tables in ("common", "twice")], ids=lambda case: case.name)
def test_the_matrix_shares(case: Case, seed: int) -> None:
    """Cases that are there for groups have some, but for those that can't."""
    assert (shared(case, seed).groups > 0) == (case.name not in ("heads_64", "batch_of_many"))


def test_what_does_not_pay_is_not_shared(seed: int) -> None:
    """A group must save more than the 17 blocks that it costs."""
    pair = Case("pair", heads=16, tables="common", shared_prefixes=True)
    assert shared(replace(pair, lens=(64 * 17 + 1,) * 2), seed).groups == 0
    assert shared(replace(pair, lens=(64 * 18 + 1,) * 2), seed) == etap.Shared(groups=1, sequences=2, tokens=64 * 18)


def test_queries_see_all_that_is_shared(seed: int) -> None:
    """Draft tokens are in the pages of both, but a causal one does not see those behind it."""
    twice = Case("twice", heads=4, tables="twice", query_len=4, lens=(64 * 20,) * 2, shared_prefixes=True)
    assert shared(replace(twice, causal=False), seed).tokens == 64 * 20
    assert shared(twice, seed).tokens == 64 * 19
    assert shared(replace(twice, lens=(64 * 20 + 3,) * 2), seed).tokens == 64 * 20
    assert shared(replace(twice, lens=(64 * 20 + 3,) * 2, tree_mask="tree"), seed).tokens == 64 * 19


def test_nothing_in_common_changes_no_bits(seed: int) -> None:
    """Sequences of no group are computed as without the flag."""
    inputs = make_inputs(Case("own", heads=16, lens=(1500, 3, 0, 700), shared_prefixes=True), seed)
    plain = replace(inputs, case=replace(inputs.case, shared_prefixes=False))
    assert all(same_bits(x, y) for x, y in zip(solve(inputs), solve(plain), strict=True))


def test_every_way_to_ask(seed: int) -> None:
    inputs = make_inputs(Case("ways", tables="common", heads=8, lens=(1500,) * 5, shared_prefixes=True), seed)
    tensors = (inputs.q_nope, inputs.q_rope, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    planned = solve(inputs)
    called = etap.mla_decode(*tensors, softmax_scale=inputs.softmax_scale, shared_prefixes=True)
    operator = torch.ops.etap.mla_decode(*tensors, inputs.softmax_scale, shared_prefixes=True)
    check(inputs, *planned, reference(inputs))
    for results in (called, operator):
        assert all(same_bits(x, y) for x, y in zip(planned, results, strict=True))


def test_workspace_never_shrinks() -> None:
    """Not where a batch is too large to be looked through either."""
    sizes = [etap.workspace_size(etap.Problem(num_heads=16, batch=b, shared_prefixes=True)) for b in (1, 2, 64, 511, 512, 513, 600, 5000)]
    assert sizes == sorted(sizes)


def test_refusals(seed: int) -> None:
    inputs = make_inputs(Case("refused", lens=(100, 64), shared_prefixes=True), seed)
    problem = problem_of(inputs.case, "cpu")
    with pytest.raises(etap.EtapInvalidArgument, match=r"flags is 21; allowed: no ETAP_BATCH_INVARIANT \(4\) with ETAP_SHARED_PREFIXES"):
        etap.query(replace(problem, batch_invariant=True))
    with pytest.raises(etap.EtapInvalidArgument, match="flags is 16; allowed: 0 or ETAP_BATCH_INVARIANT"):
        etap.query(replace(problem, topk=64))
    plan = etap.Plan(problem)
    with pytest.raises(ValueError, match="block_table is None and the problem's shared_prefixes is True"):
        plan.update(inputs.cache_seqlens)
    with pytest.raises(etap.EtapError, match="workspace .* holds no plan for this problem"):
        plan.shared()
    plain = etap.Plan(replace(problem, shared_prefixes=False))
    with pytest.raises(ValueError, match="block_table is given and the problem's shared_prefixes is False"):
        plain.update(inputs.cache_seqlens, block_table=inputs.block_table)
    with pytest.raises(etap.EtapInvalidArgument, match="flags is 1; allowed: what has ETAP_SHARED_PREFIXES"):
        plain.shared()


def test_a_page_that_does_not_exist(seed: int) -> None:
    """Sequences that share it are refused as those that have it alone, and a length beyond the table is."""
    inputs = make_inputs(Case("bad", tables="common", heads=8, lens=(1500,) * 4, shared_prefixes=True), seed)
    inputs.block_table[:, 3] = 10**6
    with pytest.raises(etap.EtapInvalidArgument, match=r"block_table\[0, 3\] is 1000000"):
        solve(inputs)
    inputs = make_inputs(Case("bad", tables="common", heads=8, lens=(1500,) * 4, shared_prefixes=True), seed)
    inputs.cache_seqlens[2] = 10**6
    with pytest.raises(etap.EtapInvalidArgument, match=r"cache_seqlens\[2\] is 1000000"):
        solve(inputs)
