"""Merge of partial results on the CPU device, against FP64, and of decoded shards against the whole."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import DTYPES, Case, check, make_inputs, reference
from harness import Guarded, same_bits, solve
from torch import Tensor

import etap_py as etap

TOLERANCE = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20}  # one rounding; FP32: what the weights' exp leaves


def merged(parts: Tensor, parts_lse: Tensor, base: str) -> tuple[Tensor, Tensor]:
    """FP64 (out, lse): parts with lse = -inf are empty, whatever their values."""
    ln = math.log(2) if base == "2" else 1.0
    lse = parts_lse.double() * ln
    total = lse.logsumexp(0)
    weight = torch.where(lse == -math.inf, 0.0, (lse - total).exp())
    values = torch.where(weight[..., None] == 0, 0.0, parts.double())
    return (weight[..., None] * values).sum(0), total / ln


def gapped(tensor: Tensor, gap: int) -> Tensor:
    """The same values in storage with `gap` NaNs after each innermost row."""
    *outer, inner = tensor.shape
    view = torch.full((*outer, inner + gap), math.nan, dtype=tensor.dtype)[..., :inner]
    return view.copy_(tensor)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("shape", [(1, 3, 5, 512), (2, 16, 16, 512), (7, 30, 3, 256), (33, 2, 128, 8), (3, 4, 2, 1024)])
def test_against_fp64(shape: tuple[int, int, int, int], dtype: str, base: str, seed: int) -> None:
    """Guards against the merge of an empty shard: exp(-inf - -inf) is NaN, and 0 times the NaN of an unwritten part is NaN."""
    rng = torch.Generator().manual_seed(seed)
    parts = torch.randn(shape, generator=rng).to(DTYPES[dtype])
    parts_lse = torch.randn(shape[:3], generator=rng) * 5
    empty = torch.rand(parts_lse.shape, generator=rng) < 0.3
    empty[:, 0, 0] = True  # no part sees anything
    parts_lse[empty] = -math.inf
    parts[empty] = math.nan
    out, lse = gapped(parts[0], 8), gapped(parts_lse[0], 5)
    guards = Guarded(out), Guarded(lse)
    etap.merge(gapped(parts, 16), gapped(parts_lse, 3), base, out=out, lse=lse)
    assert all(guard.untouched_outside() for guard in guards)
    want, want_lse = merged(parts, parts_lse, base)
    assert (out[0, 0] == 0).all()
    assert lse[0, 0] == -math.inf
    torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)
    again, again_lse = etap.merge(parts, parts_lse, base)
    assert same_bits(out, again)
    assert same_bits(lse, again_lse)


@pytest.mark.parametrize("base", ["e", "2"])
def test_large_lse(base: str, seed: int) -> None:
    """Logits of 1e5: the largest lse must be subtracted before exp."""
    parts = torch.randn(4, 9, 8, 512, generator=torch.Generator().manual_seed(seed))
    parts_lse = torch.tensor([1e5, 1e5 + 0.5, -1e5, 9.9e4])[:, None, None].expand(4, 9, 8).contiguous()
    out, lse = etap.merge(parts, parts_lse, base)
    want, want_lse = merged(parts, parts_lse, base)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-7, atol=0)


@pytest.mark.parametrize("base", ["e", "2"])
def test_shards_of_a_decode(base: str, seed: int) -> None:
    """Decode context parallelism: each sequence's pages in three shards, some of them empty, decoded apart and merged."""
    page = 64
    case = Case("shards", lens=(1000, 64, 65, 0, 3 * page, 5000), lse_base=base, page_size=page, out_dtype="fp32", causal=False)
    inputs = make_inputs(case, seed)
    results = []
    for first, last in ((0, 1), (1, 4), (4, 1000)):  # pages of each shard
        lens = (inputs.cache_seqlens - first * page).clamp(0, (last - first) * page)
        results.append(solve(replace(inputs, block_table=inputs.block_table[:, first:], cache_seqlens=lens)))
    parts, parts_lse = (torch.stack(tensors) for tensors in zip(*results, strict=True))
    out, lse = etap.merge(parts, parts_lse, base)
    check(inputs, out, lse, reference(inputs))


def test_numpy_bits(seed: int) -> None:
    """uint16 arrays need dtype, and give the bits that torch tensors give."""
    rng = torch.Generator().manual_seed(seed)
    parts, parts_lse = torch.randn(3, 4, 5, 64, generator=rng).bfloat16(), torch.randn(3, 4, 5, generator=rng)
    want, want_lse = etap.merge(parts, parts_lse)
    as_bits = parts.view(torch.uint16).numpy()
    out, lse = etap.merge(as_bits, parts_lse.numpy(), dtype="bf16")
    assert isinstance(out, np.ndarray)
    assert same_bits(torch.from_numpy(out), want.view(torch.uint16))
    assert same_bits(torch.from_numpy(lse), want_lse)
    with pytest.raises(ValueError, match="the type of parts is 'uint16'; allowed: 'bf16', 'fp16', 'fp32'"):
        etap.merge(as_bits, parts_lse.numpy())


@pytest.mark.parametrize(
    ("parts", "parts_lse", "sentence"),
    [
        ((2, 3, 4), (2, 3, 4), r"parts has shape \[2, 3, 4\]; allowed: \[any, any, any, any\]"),
        ((2, 3, 4, 8), (2, 4, 3), r"parts_lse has shape \[2, 4, 3\]; allowed: \[2, 3, 4\]"),
        ((2, 3, 4, 12), (2, 3, 4), "d is 12; allowed: a multiple of 8, 8 to 1024"),
        ((0, 3, 4, 8), (0, 3, 4), "num_parts is 0"),
    ],
)
def test_bad_calls(parts: tuple[int, ...], parts_lse: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        etap.merge(torch.zeros(parts), torch.zeros(parts_lse))
