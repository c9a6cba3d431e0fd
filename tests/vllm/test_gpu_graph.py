"""A CUDA graph of layers as vLLM captures and replays it. Needs an SM90 GPU, no vLLM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, check, make_inputs, reference
from vllm_kit import attend, attend_lists, choose, plan, plan_lists, planner

pytestmark = pytest.mark.gpu

LONGEST = 2000
LAYERS = 2


@pytest.mark.parametrize(
    "form",
    [
        Case("bf16"),
        Case("fp8", kv_format="e4m3", kv_scale_on_device=True),
        Case("fp8_ds_mla", kv_format="e4m3_656", kv_scale=1.0),
        Case("blocks of 16, 8 heads", page_size=16, heads=8),
    ],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("query_len", [1, 4])
def test_replays(form: Case, query_len: int, cuda: str, seed: int) -> None:
    """Guards full CUDA graphs: only the layers are in the graph, and the plan of each step is written before the replay, outside of it,
    into the workspace that the graph reads; other shapes are planned and run in between."""
    captured = replace(form, lens=(LONGEST,) * 4, query_len=query_len)
    inputs = make_inputs(captured, seed, cuda)
    made_by = planner(captured, cuda)
    inputs.cache_seqlens.fill_(query_len)
    step = plan(made_by, captured, inputs.cache_seqlens)
    attend(step, inputs)  # loads the kernels: not legal in a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [attend(step, inputs) for _ in range(LAYERS)]

    other = replace(form, lens=(33, 200, 4), query_lens=(4, 2, 1), query_len=1)
    others = make_inputs(other, seed + 1, cuda)
    for lens in [(LONGEST, 64, 9, 77), (400, 5, 0, 0), (0, 0, 0, 0), (LONGEST,) * 4]:
        out, lse = attend(plan(made_by, other, others.cache_seqlens), others)
        check(others, out, lse, reference(others))

        inputs.cache_seqlens.copy_(torch.tensor(lens, dtype=torch.int32))
        plan(made_by, captured, inputs.cache_seqlens)
        graph.replay()
        expected = reference(inputs)
        for out, lse in outputs:
            check(inputs, out, lse, expected)


TOPK = 256


@pytest.mark.parametrize(
    "form",
    [Case("bf16"), Case("fp8_ds_mla", kv_format="e4m3_656"), Case("blocks of 16, 8 heads", page_size=16, heads=8)],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("query_len", [1, 4])
def test_replays_of_lists(form: Case, query_len: int, cuda: str, seed: int) -> None:
    """Guards the same for sparse models: each replay has other lengths and other lists, in the buffers that the graph reads."""
    captured = replace(form, lens=(LONGEST,) * 4, query_len=query_len)
    inputs = make_inputs(captured, seed, cuda)
    made_by = planner(captured, cuda, TOPK)
    lists = choose(inputs, TOPK, seed)
    step = plan_lists(made_by, captured, inputs.cache_seqlens)
    attend_lists(step, lists)  # loads the kernels: not legal in a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [attend_lists(step, lists) for _ in range(LAYERS)]

    other = replace(form, lens=(33, 200, 4), query_lens=(4, 2, 1), query_len=1)
    others = choose(make_inputs(other, seed + 1, cuda), TOPK, seed)
    for number, lens in enumerate([(LONGEST, 64, 9, 77), (400, 5, 0, 0), (0, 0, 0, 0), (LONGEST,) * 4]):
        out, lse = attend_lists(plan_lists(made_by, other, others.inputs.cache_seqlens), others)
        check(others.inputs, out, lse, others.expected())

        inputs.cache_seqlens.copy_(torch.tensor(lens, dtype=torch.int32))
        chosen = choose(inputs, TOPK, seed + number, fewer=number == 0)
        lists.slots.copy_(chosen.slots)
        plan_lists(made_by, captured, inputs.cache_seqlens)
        graph.replay()
        expected = chosen.expected()
        for out, lse in outputs:
            check(inputs, out, lse, expected)
