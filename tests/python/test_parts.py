"""Queries and caches that arrive in one piece or in two, and plans that remember how a call's tensors were laid out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import problem_of, same_bits

import etap_py as etap


def planned(inputs: Inputs) -> etap.Plan:
    plan = etap.Plan(problem_of(inputs.case, "cpu"))
    plan.update(inputs.cache_seqlens)
    return plan


def run(plan: etap.Plan, i: Inputs, **overrides: Any) -> tuple[Any, Any]:
    given = {
        "q_nope": i.q_nope,
        "q_rope": i.q_rope,
        "kv_cache": i.kv_cache,
        "block_table": i.block_table,
        "softmax_scale": i.softmax_scale,
        "kv_scale": i.kv_scale,
    }
    return plan.run(**{**given, **overrides})


@pytest.mark.parametrize(("d_latent", "d_rope"), [(512, 64), (256, 64)])
def test_fused_queries(d_latent: int, d_rope: int, seed: int) -> None:
    """One q tensor with both parts gives the bits of two."""
    inputs = make_inputs(Case("fused", d_latent=d_latent, d_rope=d_rope, q_layout="fused", query_len=2, strided=True), seed)
    plan = planned(inputs)
    out, lse = run(plan, inputs)
    assert inputs.q_rope is not None
    fused = torch.cat([inputs.q_nope, inputs.q_rope], -1)
    for q in (fused, fused.unflatten(0, (-1, 2))):
        one, one_lse = run(plan, inputs, q_nope=q, q_rope=None)
        assert one.shape == (*q.shape[:-1], d_latent)
        assert same_bits(out, one.view(out.shape)) and same_bits(lse, one_lse.view(lse.shape))


@pytest.mark.parametrize("heads_dimension", [False, True])
@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
def test_pair_of_cache_parts(kv_format: str, heads_dimension: bool, seed: int) -> None:
    """Frameworks cut one pool into a latent and a rope view before they call: the pair is read as the pool's rows."""
    inputs = make_inputs(Case("pair", kv_format=kv_format, row_gap=64, page_gap=4096), seed)
    pair = inputs.kv_cache[..., :512], inputs.kv_cache[..., 512:]
    if heads_dimension:
        pair = pair[0].unsqueeze(2), pair[1].unsqueeze(2)
    out, lse = run(planned(inputs), inputs, kv_cache=pair)
    check(inputs, out, lse, reference(inputs))
    one_call, _ = etap.mla_decode(
        inputs.q_nope,
        inputs.q_rope,
        pair,
        inputs.block_table,
        inputs.cache_seqlens,
        softmax_scale=inputs.softmax_scale,
        kv_scale=inputs.kv_scale,
    )
    assert same_bits(out, one_call)


def test_parts_of_different_pools_are_refused(seed: int) -> None:
    """Two tensors of their own look like a pair, but a row must be one piece of memory."""
    inputs = make_inputs(Case("apart", lens=(70,)), seed)
    plan = planned(inputs)
    latent, rope = inputs.kv_cache[..., :512], inputs.kv_cache[..., 512:]
    for pair in ((latent, rope.contiguous()), (latent.contiguous(), rope.contiguous()), (rope, latent), (latent[:-1], rope[1:])):
        with pytest.raises(
            ValueError, match=r"kv_cache is a pair of .* allowed: the two parts of the same rows, pool\[..., :d_latent\] and"
        ):
            run(plan, inputs, kv_cache=pair)
    with pytest.raises(ValueError, match="kv_cache has shape .* allowed: "):
        run(plan, inputs, kv_cache=(latent, inputs.kv_cache[..., 512:544]))


def test_calls_of_every_layout_take_turns(seed: int) -> None:
    """Guards the memory of a plan for layouts: a call must not inherit strides, scales or outputs from one with another layout."""
    inputs = make_inputs(Case("turns", lens=(130, 7, 64), kv_format="e4m3", kv_scale=0.5), seed)
    plan = planned(inputs)
    want, want_lse = run(plan, inputs)
    one = torch.ones(1)
    at_one, _ = run(plan, inputs, kv_scale=None)
    assert not same_bits(want, at_one)
    wide = torch.full((3, 9), -1, dtype=torch.int32)
    wide[:, : inputs.block_table.shape[1]] = inputs.block_table
    spread = torch.zeros(3, 16, 640, dtype=torch.bfloat16)
    for _ in range(2):
        for overrides, expected in (
            ({}, want),
            ({"kv_scale": one}, at_one),
            ({"kv_scale": None}, at_one),
            ({"kv_scale": one / 2}, want),
            ({"kv_scale": 1.0}, at_one),
            ({"block_table": wide}, want),
            ({"out": spread[..., :512]}, want),
            ({"q_nope": inputs.q_nope.transpose(0, 1).contiguous().transpose(0, 1)}, want),
        ):
            out, lse = run(plan, inputs, **overrides)
            assert same_bits(out, expected), overrides
            if expected is want:
                assert same_bits(lse, want_lse), overrides
        lse = torch.full((3, 16), torch.nan)
        run(plan, inputs, lse=lse, return_lse=False)
        assert same_bits(lse, want_lse)
        out, lse = run(plan, inputs, return_lse=False)
        assert lse is None and same_bits(out, want)
        _, base_2 = run(plan, inputs, lse_base="2")
        assert torch.allclose(base_2 * torch.log(torch.tensor(2.0)), want_lse)
    with pytest.raises(ValueError, match="q_nope has shape"):
        run(plan, replace(inputs, q_nope=inputs.q_nope[:2]))
    assert same_bits(run(plan, inputs)[0], want)


def test_many_layouts(seed: int) -> None:
    """A block table that grows by a column each step must neither fill the memory nor end it."""
    inputs = make_inputs(Case("many", lens=(40, 3)), seed)
    plan = planned(inputs)
    want, _ = run(plan, inputs)
    for width in range(2, 200):
        table = torch.zeros(2, width, dtype=torch.int32)
        table[:, :1] = inputs.block_table[:, :1]
        out, _ = run(plan, inputs, block_table=table)
        assert same_bits(out, want)
    assert len(plan._calls) <= 64


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_lse_with_heads_first(library: str, query_len: int, seed: int) -> None:
    """FlashMLA and FlashAttention-3 return lse so: the same numbers, in a tensor that nobody had to transpose."""
    inputs = make_inputs(Case("heads_first", lens=(300, 0, 64), query_len=query_len, q_dtype="fp16"), seed)
    plan = planned(inputs)
    _, rows = run(plan, inputs)
    q = {"q_nope": inputs.q_nope, "q_rope": inputs.q_rope}
    for split in (False, True):
        given = {name: part.unflatten(0, (-1, query_len)) if split else part for name, part in q.items() if part is not None}
        tensors = {**given, "kv_cache": inputs.kv_cache, "block_table": inputs.block_table}
        if library == "numpy":
            tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
        out, lse = run(plan, inputs, **tensors, lse_heads_first=True)
        wanted = rows.unflatten(0, (-1, query_len)).mT if split else rows.mT
        assert type(lse) is type(out)
        assert lse.shape == wanted.shape
        assert torch.equal(torch.as_tensor(lse), wanted)
