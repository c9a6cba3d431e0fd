"""Sparse attention on the CUDA device: lists of slots against FP64."""

from __future__ import annotations

import random

import pytest
import torch
from cases import Case, check, make_inputs
from harness import same_bits
from sparse_cases import drawn, lists, reference, solve

FORMATS = ["bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656", "e4m3_528"]


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("heads", [1, 8, 16, 24, 32, 40, 64, 96, 128])
def test_lists_of_slots(heads: int, kv_format: str, seed: int) -> None:
    """Holes anywhere, duplicates, empty lists, counts, strides: against FP64, with equal bits from another workspace."""
    rng = random.Random(seed)
    for round_ in range(4):
        scaled = kv_format in ("e4m3_group", "e4m3_656", "e4m3_528")
        dims = {"d_latent": 512, "d_rope": 0 if kv_format == "e4m3_528" else 64} if scaled else {}
        case = drawn(rng, kv_format=kv_format, heads=heads)
        case = Case(**{**case.__dict__, **dims})
        inputs, there = make_inputs(case, seed + round_), make_inputs(case, seed + round_, "cuda")
        slots = lists(rng, inputs, rng.choice([1, 7, 64, 200, 700]))
        counts = None
        if rng.random() < 0.5:
            counts = torch.tensor([rng.randint(0, slots.shape[1]) for _ in slots], dtype=torch.int32)
        expected = reference(inputs, slots, counts)
        on_device = (slots.to("cuda"), None if counts is None else counts.to("cuda"))
        for invariant in (False, True):
            out, lse = solve(there, *on_device, batch_invariant=invariant)
            check(inputs, out.cpu(), lse.cpu(), expected, device="cuda")
            again = solve(there, *on_device, byte=0x3C, batch_invariant=invariant)
            assert same_bits(out, again[0]) and same_bits(lse, again[1])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_slots_outside(kv_format: str, seed: int) -> None:
    """A slot outside of the pool and a count that is not 0 to topk: that row becomes NaN, the others are as without it."""
    rng = random.Random(seed)
    q_dtype = "fp16" if kv_format == "fp16" else "bf16"
    case = Case(
        "outside",
        lens=(90, 90, 90, 90),
        heads=16,
        q_dtype=q_dtype,
        kv_format=kv_format,
        causal=False,
        d_rope=0 if kv_format == "e4m3_528" else 64,
    )
    inputs, there = make_inputs(case, seed), make_inputs(case, seed, "cuda")
    slots = lists(rng, inputs, 100)
    slots[:, 5] = 3
    counts = torch.full((4,), 100, dtype=torch.int32)
    expected = reference(inputs, slots, counts)
    wrong, wrong_counts = slots.clone(), counts.clone()
    wrong[0, 5] = inputs.kv_cache.shape[0] * case.page_size
    wrong[1, 5] = -2
    wrong_counts[2] = rng.choice([-1, 101])
    out, lse = solve(there, wrong.to("cuda"), wrong_counts.to("cuda"))
    assert out[:3].isnan().all() and lse[:3].isnan().all()
    want, want_lse = solve(there, slots.to("cuda"), counts.to("cuda"))
    assert same_bits(out[3], want[3]) and same_bits(lse[3], want_lse[3])
    check(inputs, want.cpu(), want_lse.cpu(), expected, device="cuda")


def test_captured(seed: int) -> None:
    """A replay sees the lists and counts of its own time."""
    import etap_py as etap

    rng = random.Random(seed)
    inputs = make_inputs(Case("captured", lens=(300, 300, 300), heads=16, causal=False), seed)
    there = make_inputs(inputs.case, seed, "cuda")
    slots = lists(rng, inputs, 200).to("cuda")
    counts = torch.full((3,), 200, dtype=torch.int32, device="cuda")
    call = lambda: etap.mla_decode_sparse(there.q_nope, there.q_rope, there.kv_cache, slots, counts, softmax_scale=there.softmax_scale)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for count in (0, 3, 64, 199):
        slots.copy_(lists(rng, inputs, 200))
        counts.fill_(count)
        graph.replay()
        check(inputs, out.cpu(), lse.cpu(), reference(inputs, slots.cpu(), counts.cpu()))
