"""Batches, pools and strides at their limits, on the CPU device."""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Case, check, make_inputs, reference
from harness import check_case, solve

MAP_NORESERVE = 0x4000  # Linux; the mmap module has no name for it before Python 3.13


def address_space(num_bytes: int) -> torch.Tensor:
    """Bytes that take no memory until they are touched."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.from_numpy(np.frombuffer(memory, np.uint8))


@pytest.mark.parametrize("batch", [1, 65535, 65536])
def test_batch(batch: int, seed: int) -> None:
    """Guards against grids and counters of 16 bits."""
    case = Case("batch", batch=batch, max_len=3, heads=1, d_latent=256, page_size=2, pool_pages=97)
    inputs = make_inputs(case, seed)
    out, lse = solve(inputs)
    check(inputs, out, lse, reference(inputs))


def test_long_sequence(seed: int) -> None:
    check_case(Case("long", lens=(65536 + 17,), heads=3, pool_pages=50), seed, "cpu")


def test_many_query_tokens(seed: int) -> None:
    """More query tokens than most of the sequences have tokens: an extend step that comes as decode."""
    check_case(Case("extend", lens=(40, 3, 200), query_lens=(40, 100, 64), heads=4), seed, "cpu")


@pytest.mark.parametrize(("kv_format", "page_size"), [("bf16", 64), ("e4m3", 1), ("e4m3_656", 16)])
def test_pages_beyond_4_gib(kv_format: str, page_size: int, seed: int) -> None:
    """Guards against 32-bit products of page number and page stride, the most repeated defect of MLA kernels in 2026. The pool is address
    space only: pages are far apart, and what lies between is never touched."""
    case = Case("far", lens=(200, 0, 131), kv_format=kv_format, page_size=page_size, heads=5)
    near = make_inputs(case, seed)
    element = near.kv_cache.element_size()
    page_stride = (9 * 2**30 // element // len(near.kv_cache)) // 64 * 64
    flat = address_space(len(near.kv_cache) * page_stride * element).view(near.kv_cache.dtype)
    far_cache = flat.as_strided(near.kv_cache.shape, (page_stride, near.kv_cache.shape[-1], 1))
    far_cache.view(torch.uint8).copy_(near.kv_cache.view(torch.uint8))
    far = replace(near, kv_cache=far_cache)
    assert int(near.block_table[near.block_table < len(near.kv_cache)].max()) * page_stride * element > 2**32
    out, lse = solve(far)
    check(near, out, lse, reference(near))


def test_page_number_beyond_2_pow_31_elements(seed: int) -> None:
    """A page number of many millions, as small pages in a large pool have: one page far out, all others unknown to the call."""
    row, page = 576, 3_900_000
    case = Case("far_number", lens=(1,), page_size=1, heads=4)
    inputs = make_inputs(case, seed)
    cache = address_space((page + 1) * row * 2).view(torch.bfloat16).view(page + 1, 1, row)
    cache[page] = inputs.kv_cache[int(inputs.block_table[0, 0])]
    inputs.block_table[0, 0] = page
    inputs = replace(inputs, kv_cache=cache)
    assert page * row > 2**31
    out, lse = solve(inputs)
    check(inputs, out, lse, reference(inputs))


def test_row_stride_beyond_32_bits(seed: int) -> None:
    """Two rows of one page more than 2^32 elements apart."""
    case = Case("far_row", lens=(2,), page_size=2, heads=4)
    inputs = make_inputs(case, seed)
    row_stride = 2**32 + 64
    flat = address_space((row_stride + 576) * 2).view(torch.bfloat16)
    cache = flat.as_strided((1, 2, 576), (576, row_stride, 1))
    cache[0] = inputs.kv_cache[int(inputs.block_table[0, 0])]
    table = inputs.block_table.clone()
    table[0, 0] = 0
    far = replace(inputs, kv_cache=cache, block_table=table)
    out, lse = solve(far)
    check(inputs, out, lse, reference(inputs))


def test_huge_table_stride(seed: int) -> None:
    """A table cut out of one for the longest context."""
    inputs = make_inputs(Case("table", lens=(300, 64, 1)), seed)
    wide = torch.full((3, 100_000), 2**31 - 1, dtype=torch.int32)
    wide[:, : inputs.block_table.shape[1]] = inputs.block_table
    cut = replace(inputs, block_table=wide)
    out, lse = solve(cut)
    check(inputs, out, lse, reference(inputs))
