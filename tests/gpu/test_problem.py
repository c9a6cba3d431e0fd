"""What the library answers about problems on the GPU: decisions and workspace sizes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import Case, check, make_inputs, reference
from harness import SEED, Session, problem_of, solve
from promises import skip
from test_decode import random_case

import etap_py as etap

Supported = Callable[[Case], None]


@pytest.mark.parametrize("index", range(100))
def test_decision(index: int) -> None:
    """Tiles cover the rows without a whole tile of padding, the launch stays within the SM budget, and the reason is a sentence."""
    case = random_case((SEED + 15_485_863 * index) % 2**31)
    problem = problem_of(case, "cuda")
    try:
        decision = etap.query(problem)
    except etap.EtapUnsupported as refusal:
        skip(refusal, case)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rows = problem.num_heads * problem.max_query_len
    assert decision.tile_rows * (decision.num_tiles - 1) < rows <= decision.tile_rows * decision.num_tiles
    assert 1 <= decision.num_workers * decision.cluster_size <= min(problem.num_sms or sms, sms)
    assert decision.max_splits >= 1
    assert decision.kernel.startswith("sm90_") and len(decision.reason.split()) > 5


@pytest.mark.parametrize("index", range(100))
def test_workspace_never_shrinks(index: int) -> None:
    """batch, total_q and num_sms are upper bounds: an engine allocates once, for its largest batch."""
    seed = (SEED + 32_452_843 * index) % 2**31
    r = random.Random(seed)
    case = random_case(seed)
    small = problem_of(case, "cuda")
    try:
        etap.query(small)
    except etap.EtapUnsupported as refusal:
        skip(refusal, case)
    large = replace(
        small,
        batch=small.batch + r.choice([0, 1, 7, 500]),
        total_q=small.total_q + r.choice([0, 1, 100]) if small.total_q else 0,
        num_sms=small.num_sms + r.choice([0, 1, 50]) if small.num_sms else 0,
    )
    assert etap.workspace_size(large) >= etap.workspace_size(small), f"{large} against {small}"
    all_sms = replace(large, num_sms=0)
    assert etap.workspace_size(all_sms) >= etap.workspace_size(large), f"{all_sms} against {large}"


def test_one_workspace_for_all(seed: int, supported: Supported) -> None:
    """A workspace sized for the largest shape, with what larger and smaller shapes left in it, serves each of them."""
    cases = [Case(f"shared_{len(lens)}", lens=lens) for lens in ((3000,) * 40, (5,), (2000, 1, 700), (64,) * 40, (9000,))]
    for case in cases:
        supported(case)
    workspace = torch.full((etap.workspace_size(problem_of(cases[0], "cuda")),), 0xFF, dtype=torch.uint8, device="cuda")
    for case in cases * 2:
        inputs = make_inputs(case, seed, "cuda")
        session = Session(inputs)
        session.workspace = workspace
        session.plan = etap.Plan(session.problem, workspace=workspace)
        check(inputs, *session.solve(), reference(inputs))


def test_layers_share_a_plan(seed: int, supported: Supported) -> None:
    """One update a step, one run a layer: each layer has its own queries and pool. Nothing of a layer may stay in the workspace."""
    case = Case("layers", lens=(5000, 3, 700, 0))
    supported(case)
    layers = [make_inputs(case, seed + i, "cuda") for i in range(3)]
    session = Session(layers[0])
    session.update()
    for inputs in layers * 2:
        session.inputs = inputs
        out, lse = inputs.outputs()
        session.run(out, lse)
        check(inputs, out, lse, reference(inputs))


def test_one_call(seed: int, supported: Supported) -> None:
    """mla_decode gives what a plan gives."""
    case = Case("one_call", lens=(700, 0, 64), query_len=2)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    out, lse = etap.mla_decode(
        inputs.q_nope,
        inputs.q_rope,
        inputs.kv_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        softmax_scale=inputs.softmax_scale,
    )
    want = solve(inputs)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
