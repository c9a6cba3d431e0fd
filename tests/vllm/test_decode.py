"""Steps of decode as vLLM describes them, against FP64 on the CPU device. Needs no vLLM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, check, make_inputs, reference
from etap_vllm import decode
from vllm_kit import attend, plan, planner, query_start_loc

import etap_py as etap

FORMATS = (
    Case("bf16"),
    Case("fp16", q_dtype="fp16"),
    Case("fp8", kv_format="e4m3", kv_scale_on_device=True),
    Case("fp8, scale 1 as a scalar tensor", kv_format="e4m3", kv_scale=1.0),
    Case("fp8_ds_mla", kv_format="e4m3_656", kv_scale=1.0),
    Case("no rope", d_rope=0),
    Case("latent of 256", d_latent=256),
    Case("queries as vLLM absorbs them", q_layout="transposed"),
    Case("a pool of all layers", row_gap=64, page_gap=4096),
    Case("a wide block table", strided=True),
    Case("blocks of 16", page_size=16, heads=8),
    Case("blocks of 256", page_size=256, heads=128),
    Case("batch-invariant", batch_invariant=True),
)
STEPS = (
    {"lens": (130, 64, 1, 77)},
    {"lens": (130, 64, 9, 77), "query_len": 3},  # drafts of two tokens are verified
    {"lens": (130, 64, 9, 77), "query_lens": (4, 1, 3, 2)},  # their number differs
    {"lens": (130, 64, 0, 0)},  # a CUDA graph's padding
    {"lens": (130, 64, 0, 0), "query_len": 4},
    {"lens": (130, 64, 0, 0), "query_lens": (4, 1, 0, 0), "spare_rows": 3},
)


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=lambda case: case.name)
def test_a_step(form: Case, step: dict[str, Any], seed: int) -> None:
    """Guards the translation of a step's metadata: uniform or not, padded or not, for every form of cache and queries."""
    case = replace(form, **step)
    inputs = make_inputs(case, seed)
    out, lse = attend(plan(planner(case), case, inputs.cache_seqlens), inputs)
    check(inputs, out, lse, reference(inputs))
    if case.spare_rows:
        assert not out[-case.spare_rows :].any()


@pytest.mark.parametrize("step", [{"lens": (1500,) * 5}, {"lens": (1500, 1400, 1500), "query_lens": (1, 3, 2)}], ids=str)
def test_shared_prefixes(step: dict[str, Any], seed: int) -> None:
    """Guards ETAP_VLLM_SHARED_PREFIXES: the plan gets the block table, uniform or not."""
    case = Case("prompt", tables="common", heads=8, shared_prefixes=True, **step)
    inputs = make_inputs(case, seed)
    planned = plan(planner(case), case, inputs.cache_seqlens, inputs.block_table)
    assert isinstance(planned, etap.Plan)
    assert planned.shared().groups == 1
    out, lse = attend(planned, inputs)
    check(inputs, out, lse, reference(inputs))


def test_queries_in_one_tensor(seed: int) -> None:
    """Guards decode context parallelism, which gathers the heads' queries with both parts in one tensor."""
    case = Case("fused", lens=(130, 64, 1, 77), heads=32)
    inputs = make_inputs(case, seed)
    step = plan(planner(case), case, inputs.cache_seqlens)
    out, lse = attend(step, inputs, q=torch.cat([inputs.q_nope, inputs.q_rope], dim=-1))
    check(inputs, out, lse, reference(inputs))


def test_lse_only_when_asked(seed: int) -> None:
    """Guards vLLM's contract: without context parallelism a layer returns no log-sum-exp."""
    case = Case("no lse", lens=(130, 64))
    inputs = make_inputs(case, seed)
    out, lse = attend(plan(planner(case), case, inputs.cache_seqlens), inputs, return_lse=False)
    assert lse is None
    check(inputs, out, None, reference(inputs))


@pytest.mark.parametrize("query_len", [1, 4])
def test_a_graph_and_its_replays(query_len: int, seed: int) -> None:
    """Guards full CUDA graphs. A graph keeps the launches of the plan that it was captured with, and vLLM makes metadata anew before
    each replay: the schedule must arrive in the captured plan's workspace, whatever was planned in between.
    """
    captured = Case("capture", lens=(query_len,) * 4, query_len=query_len)
    made_by = planner(captured)
    graph = plan(made_by, captured, torch.full((4,), query_len, dtype=torch.int32))
    for number, lens in enumerate([(130, 64, 9, 77), (400, 5, 0, 0), (0, 0, 0, 0), (8, 8, 8, 8)]):
        eager = Case("another shape", lens=(33, 200, 4), query_lens=(4, 2, 1))
        inputs = make_inputs(eager, seed + number)
        out, lse = attend(plan(made_by, eager, inputs.cache_seqlens), inputs)
        check(inputs, out, lse, reference(inputs))

        replay = replace(captured, name="replay", lens=lens)
        inputs = make_inputs(replay, seed + number)
        assert plan(made_by, replay, inputs.cache_seqlens).workspace is graph.workspace
        out, lse = attend(graph, inputs)
        check(inputs, out, lse, reference(inputs))


def test_a_draft_advances_in_its_graph(seed: int) -> None:
    """Guards drafts of several steps: lengths grow on the device, and the graph updates the plan that its metadata holds."""
    case = Case("draft", lens=(130, 64, 1, 77))
    inputs = make_inputs(case, seed)
    seq_lens = inputs.cache_seqlens - 3
    step = plan(planner(case), case, seq_lens)
    for _ in range(3):
        seq_lens += 1
        decode.update(step, seq_lens, query_start_loc(case))
    out, lse = attend(step, inputs)
    check(inputs, out, lse, reference(inputs))


@pytest.mark.parametrize("interleave", [1, 16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_decode_context_parallelism(ranks: int, interleave: int, seed: int) -> None:
    """Guards the log-sum-exp that vLLM joins the ranks' shares with: base e, [tokens, heads], -inf for a rank without tokens."""
    case = Case("dcp", lens=(200, 64, 3, 77), heads=32, page_size=16)
    inputs = make_inputs(case, seed)
    made_by = planner(case)
    parts = []
    for rank in range(ranks):
        # Rank r holds the tokens whose number, in units of `interleave`, leaves r; its pages are packed anew.
        mine = [[t for t in range(length) if t // interleave % ranks == rank] for length in case.lens]
        pages = -(-max(map(len, mine)) // case.page_size)
        cache = torch.full((case.num_seqs * max(1, pages), case.page_size, 576), float("nan"), dtype=torch.bfloat16)
        for b, tokens in enumerate(mine):
            for i, t in enumerate(tokens):
                page = int(inputs.block_table[b, t // case.page_size])
                cache[b * pages + i // case.page_size, i % case.page_size] = inputs.kv_cache[page, t % case.page_size]
        table = torch.arange(case.num_seqs * max(1, pages), dtype=torch.int32).view(case.num_seqs, -1)
        seq_lens = torch.tensor([len(tokens) for tokens in mine], dtype=torch.int32)
        parts.append(attend(plan(made_by, case, seq_lens), inputs, kv_cache=cache, block_table=table))
        assert torch.equal(parts[-1][1].isinf().all(-1), seq_lens == 0)
    out, lse = etap.merge(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]), "e")
    check(inputs, out, lse, reference(inputs))


@pytest.mark.parametrize("query_len", [1, 4])
def test_a_dummy_run(query_len: int, seed: int) -> None:
    """Guards vLLM's dummy runs, whose lengths are beyond the block table: they ended the process (SIGSEGV), or read another's pages."""
    case = Case("dummy", lens=(128,) * 4, query_len=query_len)
    inputs = make_inputs(case, seed)
    table = inputs.block_table[:, :2]  # what follows in a row is no page
    longer = torch.tensor([129, 4096, 2**31 - 1, 128], dtype=torch.int32)
    lens = decode.fit(longer, table, case.page_size, int(longer.max()))
    out, lse = attend(plan(planner(case), case, lens), inputs, block_table=table)
    check(inputs, out, lse, reference(inputs))


def test_lengths_of_requests_are_left() -> None:
    """Guards against lengths that are cut, or only copied, where vLLM's bound of them fits the block table."""
    seq_lens, table = torch.tensor([128, 1, 0, 77], dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32)
    assert decode.fit(seq_lens, table, 64, 128) is seq_lens


@pytest.mark.parametrize(("batch", "max_query_len"), [(0, 0), (0, 1), (4, 0), (4, 1)])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("fused", [False, True], ids=["two tensors", "one tensor"])
def test_a_step_without_query_tokens(batch: int, max_query_len: int, rows: int, fused: bool, seed: int) -> None:
    """Guards empty steps, which were refused with "max_query_len is 0" or "batch is 0": nothing is planned and nothing is read."""
    inputs = make_inputs(Case("empty", lens=(5, 5, 5)), seed)
    step = planner(inputs.case).plan(batch, 0, max_query_len)
    decode.update(step, torch.zeros(batch, dtype=torch.int32), torch.zeros(batch + 1, dtype=torch.int32))
    q = (inputs.q_nope[:rows], inputs.q_rope[:rows])
    table = torch.empty(batch, 0, dtype=torch.int32)
    out, lse = attend(step, inputs, q=torch.cat(q, -1) if fused else q, block_table=table)
    assert torch.equal(out, torch.zeros(rows, 16, 512, dtype=torch.bfloat16))
    assert torch.equal(lse, torch.full((rows, 16), -torch.inf))
    assert attend(step, inputs, q=q, block_table=table, return_lse=False)[1] is None


def test_more_than_was_announced() -> None:
    """Guards the workspace: a batch beyond what vLLM announced is refused before anything is computed."""
    case = Case("large", heads=128)
    made_by = planner(case)
    step = made_by.plan(4096, 4096, 1)
    with pytest.raises(etap.EtapError, match="workspace"):
        decode.update(step, torch.ones(4096, dtype=torch.int32), torch.arange(4097, dtype=torch.int32))
