"""Merge of partial results on the GPU, against FP64, and of decoded shards against the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, Case, check, make_inputs, reference
from harness import Guarded, same_bits, solve
from torch import Tensor

import etap_py as etap

Supported = Callable[[Case], None]


def merged(parts: Tensor, parts_lse: Tensor, base: str) -> tuple[Tensor, Tensor]:
    """FP64 [rows, heads, d] and [rows, heads]: parts with lse = -inf are empty, whatever their values."""
    ln = math.log(2) if base == "2" else 1.0
    lse = parts_lse.double() * ln
    total = lse.logsumexp(0)
    weight = torch.where(lse == -math.inf, 0.0, (lse - total).exp())
    values = torch.where(weight[..., None] == 0, 0.0, parts.double())
    return (weight[..., None] * values).sum(0), total / ln


def strided_like(tensor: Tensor, gap: int) -> Tensor:
    """Uninitialised storage of the same shape with `gap` elements after each innermost row, full of NaN."""
    *outer, inner = tensor.shape
    return torch.full((*outer, inner + gap), math.nan, dtype=tensor.dtype, device=tensor.device)[..., :inner]


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("num_parts", "rows", "heads", "d"), [(1, 3, 5, 512), (2, 16, 16, 512), (7, 130, 3, 256), (33, 2, 128, 8), (3, 4, 2, 1024)]
)
def test_against_fp64(num_parts: int, rows: int, heads: int, d: int, dtype: str, base: str, seed: int) -> None:
    """Guards against the merge of an empty shard: exp(-inf - -inf) is NaN, and 0 times the NaN of an unwritten part is NaN."""
    rng = torch.Generator("cuda").manual_seed(seed)
    parts = torch.randn(num_parts, rows, heads, d, device="cuda", generator=rng).to(DTYPES[dtype])
    parts_lse = torch.randn(num_parts, rows, heads, device="cuda", generator=rng) * 5
    empty = torch.rand(parts_lse.shape, device="cuda", generator=rng) < 0.3
    empty[:, 0, 0] = True  # no part sees anything
    parts_lse[empty] = -math.inf
    parts[empty] = math.nan
    strided, strided_lse = strided_like(parts, 16), strided_like(parts_lse, 3)
    strided.copy_(parts)
    strided_lse.copy_(parts_lse)

    out, lse = strided_like(parts[0], 8), strided_like(parts_lse[0], 5)
    guards = Guarded(out), Guarded(lse)
    etap.merge(strided, strided_lse, lse_base=base, out=out, lse=lse)
    assert all(guard.untouched_outside() for guard in guards)
    want, want_lse = merged(parts, parts_lse, base)
    assert (out[0, 0] == 0).all() and lse[0, 0] == -math.inf
    # FP32 keeps what the weights' exp leaves; the others round once.
    tolerance = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance * 2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)

    again, again_lse = etap.merge(parts, parts_lse, lse_base=base)
    assert same_bits(out, again) and same_bits(lse, again_lse)


@pytest.mark.parametrize("base", ["e", "2"])
def test_large_lse(base: str, seed: int) -> None:
    """Logits of 1e5: the largest lse must be subtracted before exp."""
    rng = torch.Generator("cuda").manual_seed(seed)
    parts = torch.randn(4, 9, 8, 512, device="cuda", generator=rng)
    parts_lse = torch.tensor([1e5, 1e5 + 0.5, -1e5, 9.9e4], device="cuda")[:, None, None].expand(4, 9, 8).contiguous()
    out, lse = etap.merge(parts, parts_lse, lse_base=base)
    want, want_lse = merged(parts, parts_lse, base)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-7, atol=0)


@pytest.mark.parametrize("base", ["e", "2"])
def test_shards_of_a_decode(base: str, seed: int, supported: Supported) -> None:
    """Decode context parallelism: each sequence's pages in three shards, some of them empty, decoded apart and merged."""
    page = 64
    case = Case("shards", lens=(1000, 64, 65, 0, 3 * page, 5000), lse_base=base, page_size=page, out_dtype="fp32", causal=False)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    results = []
    for first, last in ((0, 1), (1, 4), (4, 1000)):  # pages of each shard
        lens = (inputs.cache_seqlens - first * page).clamp(0, (last - first) * page)
        table = inputs.block_table[:, first:] if first < inputs.block_table.shape[1] else inputs.block_table[:, :1]
        results.append(solve(replace(inputs, block_table=table, cache_seqlens=lens)))
    parts, parts_lse = (torch.stack(tensors) for tensors in zip(*results, strict=True))
    out, lse = etap.merge(parts, parts_lse, lse_base=base)
    check(inputs, out, lse, reference(inputs))


def test_maximum_over_padded_rows(seed: int, supported: Supported) -> None:
    """Downstream quantisation takes the maximum over the whole output tensor: padded rows must be finite, and zero."""
    case = Case("padded", lens=(300, 0, 64, -1, 0))
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    out, lse = solve(inputs)
    assert out.isfinite().all()
    assert (out[[1, 3, 4]] == 0).all() and (lse[[1, 3, 4]] == -math.inf).all()
    assert not lse.isnan().any()
