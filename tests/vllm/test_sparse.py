"""Steps of sparse decode as vLLM describes them, against FP64 on both devices. Needs no vLLM."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, check, make_inputs
from etap_vllm import decode
from vllm_kit import attend_lists, choose, plan_lists, planner, query_start_loc, requests_of

import etap_py as etap

WIDTH = 576
TOPK = 48  # shorter than some sequences below, longer than others

FORMATS = (
    Case("bf16"),
    Case("fp16", q_dtype="fp16"),
    Case("fp8", kv_format="e4m3", kv_scale_on_device=True),
    Case("fp8_ds_mla", kv_format="e4m3_656"),
    Case("no rope", d_rope=0),
    Case("no rope, fp8_ds_mla", d_rope=0, kv_format="e4m3_528", row_gap=656 - 528),
    Case("latent of 256", d_latent=256),
    Case("queries as vLLM absorbs them", q_layout="transposed"),
    Case("a pool of all layers", page_gap=3 * 64 * WIDTH),
    Case("blocks a row apart", page_gap=WIDTH),
    Case("fp8_ds_mla, a pool of all layers", kv_format="e4m3_656", page_gap=5 * 656),
    Case("blocks of 16, 8 heads", page_size=16, heads=8),
    Case("blocks of 48", page_size=48, heads=20),
    Case("blocks of 256", page_size=256, heads=128),
)
STEPS = (
    {"lens": (130, 64, 1, 20)},
    {"lens": (130, 64, 9, 20), "query_len": 3},  # drafts of two tokens are verified
    {"lens": (130, 64, 9, 20), "query_lens": (4, 1, 9, 2)},  # their number differs, or a prompt is among them
    {"lens": (130, 64, 0, 0)},  # a CUDA graph's padding
    {"lens": (130, 64, 0, 0), "query_lens": (4, 1, 0, 0), "spare_rows": 3},
)


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=lambda case: case.name)
def test_a_step(form: Case, step: dict[str, Any], device: str, seed: int) -> None:
    """Guards a step's lists: for every form of cache and queries, longer and shorter than the sequences, padded or not, with tokens that
    are not there and some that are there twice. What no list names is poison."""
    case = replace(form, **step)
    for number, kind in enumerate(({}, {"fewer": True}, {"twice": True})):
        lists = choose(make_inputs(case, seed + number, device), TOPK, seed + number, **kind)
        out, lse = attend_lists(plan_lists(planner(case, device, TOPK), case, lists.inputs.cache_seqlens), lists)
        check(lists.inputs, out, lse, lists.expected())


@pytest.mark.parametrize("topk", [1, 2051])
def test_widths_of_lists(topk: int, device: str, seed: int) -> None:
    """Guards lists of any width: GLM-5.3-Flash's is no power of two."""
    case = Case("wide", lens=(2500, 300), heads=4, page_size=16)
    lists = choose(make_inputs(case, seed, device), topk, seed)
    out, lse = attend_lists(plan_lists(planner(case, device, topk), case, lists.inputs.cache_seqlens), lists)
    check(lists.inputs, out, lse, lists.expected())


def test_nothing_is_chosen(device: str, seed: int) -> None:
    """Guards rows of -1 alone, where the plan expects tokens: a rank of context parallelism may own none of them."""
    case = Case("none", lens=(130, 64))
    lists = choose(make_inputs(case, seed, device), TOPK, seed)
    step = plan_lists(planner(case, device, TOPK), case, lists.inputs.cache_seqlens)
    out, lse = attend_lists(step, lists, slots=torch.full_like(lists.slots, -1))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_lse_only_when_asked(seed: int) -> None:
    """Guards vLLM's contract: without context parallelism a layer returns no log-sum-exp."""
    case = Case("no lse", lens=(130, 64))
    lists = choose(make_inputs(case, seed), TOPK, seed)
    out, lse = attend_lists(plan_lists(planner(case, topk=TOPK), case, lists.inputs.cache_seqlens), lists, return_lse=False)
    assert lse is None
    check(lists.inputs, out, None, lists.expected())


@pytest.mark.parametrize("query_len", [1, 4])
def test_a_graph_and_its_replays(query_len: int, seed: int) -> None:
    """Guards full CUDA graphs. A graph keeps the launches of the plan that it was captured with, and vLLM makes metadata anew before
    each replay: the schedule must arrive in the captured plan's workspace, whatever was planned in between."""
    captured = Case("capture", lens=(query_len,) * 4, query_len=query_len)
    made_by = planner(captured, topk=TOPK)
    graph = plan_lists(made_by, captured, torch.full((4,), query_len, dtype=torch.int32))
    for number, lens in enumerate([(130, 64, 9, 77), (400, 5, 0, 0), (0, 0, 0, 0), (8, 8, 8, 8)]):
        eager = Case("another shape", lens=(33, 200, 4), query_lens=(9, 2, 1))
        lists = choose(make_inputs(eager, seed + number), TOPK, seed + number)
        out, lse = attend_lists(plan_lists(made_by, eager, lists.inputs.cache_seqlens), lists)
        check(lists.inputs, out, lse, lists.expected())

        replay = replace(captured, name="replay", lens=lens)
        lists = choose(make_inputs(replay, seed + number), TOPK, seed + number)
        assert plan_lists(made_by, replay, lists.inputs.cache_seqlens).workspace is graph.workspace
        out, lse = attend_lists(graph, lists)
        check(lists.inputs, out, lse, lists.expected())


@pytest.mark.parametrize("interleave", [1, 16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_decode_context_parallelism(ranks: int, interleave: int, device: str, seed: int) -> None:
    """Guards the log-sum-exp that vLLM joins the ranks' shares of the lists with, and queries that come in one tensor: each rank has the
    plan of the whole lists, and what it owns of them at their beginning."""
    case = Case("dcp", lens=(200, 64, 3, 77), query_lens=(1, 3, 2, 1), heads=32, page_size=16)
    lists = choose(make_inputs(case, seed, device), TOPK, seed)
    q = torch.cat([lists.inputs.q_nope, lists.inputs.q_rope], dim=-1)
    made_by = planner(case, device, TOPK)
    parts = []
    for rank in range(ranks):
        mine = torch.full_like(lists.slots, -1)
        for row, slots in zip(mine, lists.slots, strict=True):
            owned = slots[(slots >= 0) & (slots // interleave % ranks == rank)]
            row[: len(owned)] = owned
        parts.append(attend_lists(plan_lists(made_by, case, lists.inputs.cache_seqlens), lists, q=q, slots=mine))
        assert torch.equal(parts[-1][1].isinf().all(-1), (mine < 0).all(-1))
    out, lse = etap.merge(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]), "e")
    check(lists.inputs, out, lse, lists.expected())


def test_a_step_without_query_tokens(device: str, seed: int) -> None:
    """Guards ranks without requests: nothing is planned and nothing is read."""
    case = Case("empty", lens=(5, 5, 5))
    lists = choose(make_inputs(case, seed, device), TOPK, seed)
    step = planner(case, device, TOPK).plan(0, 0, 1)
    none = torch.zeros(0, dtype=torch.int32, device=device)
    decode.update(step, decode.list_lengths(none, torch.zeros(1, dtype=torch.int32, device=device), none, TOPK), none)
    out, lse = attend_lists(step, lists, q=(lists.inputs.q_nope[:0], lists.inputs.q_rope[:0]), slots=lists.slots[:0])
    assert out.shape == (0, 16, 512)
    assert lse.shape == (0, 16)
    with pytest.raises(ValueError, match="q_nope has 3 rows; allowed: 0"):
        attend_lists(step, lists)


def test_more_than_was_announced() -> None:
    """Guards the workspace: more query tokens than vLLM announced are refused before anything is computed."""
    step = planner(Case("large", heads=128), topk=TOPK).plan(65536, 65536, 1)
    with pytest.raises(etap.EtapError, match="workspace"):
        decode.update(step, torch.ones(65536, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


# ---- What a list can name --------------------------------------------------------------------------------------------


def lengths_by_hand(seq_lens: list[int], counts: list[int], tokens: int, topk: int) -> list[int]:
    told = [min(topk, max(0, length - count + i + 1)) for length, count in zip(seq_lens, counts, strict=True) for i in range(count)]
    return told + [0] * (tokens - len(told))


def test_lengths_of_lists(seed: int) -> None:
    """Guards the plan's bounds: a bound below what a list names loses tokens; one above 0 for padding computes what nobody reads. Query
    counts are the device's, which may be smaller than those for which rows were made."""
    rng = random.Random(seed)
    for _ in range(200):
        counts = [rng.randint(0, 5) for _ in range(rng.randint(1, 6))]
        seq_lens = [count + rng.choice([0, rng.randint(0, 90)]) if count else rng.choice([0, 7]) for count in counts]
        tokens, topk = sum(counts) + rng.choice([0, rng.randint(0, 4)]), rng.randint(1, 60)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        got = decode.list_lengths(torch.tensor(seq_lens, dtype=torch.int32), starts, requests_of(starts, tokens), topk)
        assert got.dtype == torch.int32
        assert got.tolist() == lengths_by_hand(seq_lens, counts, tokens, topk), f"{seq_lens} {counts} {tokens} {topk}"


def test_requests_of_padding_are_any() -> None:
    """Guards padding whose sequence vLLM gives as 0, or as one that has the length of a request."""
    starts, seq_lens = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([30, 40], dtype=torch.int32)
    for padding in (0, 1):
        requests = torch.tensor([0, 0, 1, 1, padding, padding], dtype=torch.int32)
        assert decode.list_lengths(seq_lens, starts, requests, 99).tolist() == [29, 30, 39, 40, 0, 0]


def test_sequences_of_padding_have_no_tokens() -> None:
    """Guards uniform CUDA graphs whose padding has query tokens, but sequences of length 0."""
    starts, seq_lens = torch.tensor([0, 2, 4, 6], dtype=torch.int32), torch.tensor([30, 0, 0], dtype=torch.int32)
    assert decode.list_lengths(seq_lens, starts, requests_of(starts, 6), 99).tolist() == [29, 30, 0, 0, 0, 0]


def test_a_draft_advances_in_its_graph(device: str, seed: int) -> None:
    """Guards drafts of several steps: lengths grow on the device, and the graph updates the plan that its metadata holds."""
    case = Case("draft", lens=(130, 64, 4, 20))
    lists = choose(make_inputs(case, seed, device), TOPK, seed)
    starts = query_start_loc(case)
    requests, starts = requests_of(starts, 4).to(device), starts.to(device)
    seq_lens = lists.inputs.cache_seqlens - 3
    step = plan_lists(planner(case, device, TOPK), case, seq_lens)
    for _ in range(3):
        seq_lens += 1
        decode.update(step, decode.list_lengths(seq_lens, starts, requests, TOPK), starts)
    out, lse = attend_lists(step, lists)
    check(lists.inputs, out, lse, lists.expected())
