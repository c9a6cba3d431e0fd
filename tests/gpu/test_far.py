"""Storage beyond 2^31 elements and 4 GiB, with the data at the far end. 32-bit products of page numbers and strides are the most
repeated defect of published MLA kernels."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sparse_cases
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import Session
from torch import Tensor

Supported = Callable[[Case], None]

GIB = 2**30
FAR_BYTES = 10 * GIB  # more than 2^31 elements of two bytes, more than 4 GiB of one


@pytest.fixture(autouse=True)
def give_memory_back() -> Iterator[None]:
    if torch.cuda.mem_get_info()[0] < 30 * GIB:
        pytest.skip("needs 30 GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


def spread(tensor: Tensor, dim: int) -> Tensor:
    """The same values with dimension `dim` so far apart that its last entry lies beyond FAR_BYTES."""
    steps = max(1, tensor.shape[dim] - 1)
    stride = -(-FAR_BYTES // (steps * tensor.element_size())) // 512 * 512 + 512
    inner = [1]
    others = [d for d in range(tensor.ndim) if d != dim]
    for d in reversed(others[1:]):
        inner.insert(0, inner[0] * tensor.shape[d])
    strides = dict(zip(others, inner, strict=True))
    strides[dim] = stride
    storage = torch.empty(steps * stride + inner[0] * tensor.shape[others[0]], dtype=tensor.dtype, device=tensor.device)
    view = storage.as_strided(tensor.shape, [strides[d] for d in range(tensor.ndim)])
    view.view(torch.uint8).copy_(tensor.contiguous().view(torch.uint8))
    return view


def solve(inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    session = Session(inputs)
    session.update()
    session.run(out, lse)
    check(inputs, out, lse, reference(inputs))


@pytest.mark.parametrize("kv_format", ["bf16", "e4m3", "e4m3_group", "e4m3_656"])
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_far_pages(page_size: int, kv_format: str, seed: int, supported: Supported) -> None:
    """Pages far apart: page number x page stride passes 2^31 elements and 2^32 bytes."""
    case = Case(f"far_pages_{page_size}_{kv_format}", lens=(900, 0, 70, 301), page_size=page_size, kv_format=kv_format)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    solve(replace(inputs, kv_cache=spread(inputs.kv_cache, 0)), *inputs.outputs())


@pytest.mark.parametrize("page_size", [1, 64])
def test_large_page_numbers(page_size: int, seed: int, supported: Supported) -> None:
    """A contiguous pool of 10 GiB with the pages at its end: page number x page size x row passes 2^31 elements."""
    case = Case(f"far_end_{page_size}", lens=(900, 70, 301), page_size=page_size)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    used = len(inputs.kv_cache)
    first = FAR_BYTES // inputs.kv_cache[0].nbytes
    pool = torch.empty(first + used, *inputs.kv_cache.shape[1:], dtype=inputs.kv_cache.dtype, device="cuda")
    pool[first:] = inputs.kv_cache
    valid = (inputs.block_table >= 0) & (inputs.block_table < used)
    table = torch.where(valid, inputs.block_table + first, inputs.block_table)
    solve(replace(inputs, kv_cache=pool, block_table=table), *inputs.outputs())


@pytest.mark.parametrize("kv_format", ["bf16", "e4m3", "e4m3_656"])
@pytest.mark.parametrize("apart", [False, True], ids=["gapless", "apart"])
def test_far_slots(apart: bool, kv_format: str, seed: int, supported: Supported) -> None:
    """Lists of slots at the end of a contiguous pool of 10 GiB, and in pages far apart."""
    case = Case(f"far_slots_{kv_format}", lens=(900, 70, 301), kv_format=kv_format, causal=False)
    supported(case)
    inputs, there = make_inputs(case, seed), make_inputs(case, seed, "cuda")
    slots = sparse_cases.lists(random.Random(seed), inputs, 500)
    expected = sparse_cases.reference(inputs, slots, None)
    if apart:
        pool = spread(there.kv_cache, 0)
    else:
        used, first = len(there.kv_cache), FAR_BYTES // there.kv_cache[0].nbytes
        pool = torch.empty(first + used, *there.kv_cache.shape[1:], dtype=there.kv_cache.dtype, device="cuda")
        pool[first:] = there.kv_cache
        slots = torch.where(slots < 0, -1, slots + first * case.page_size)
    out, lse = sparse_cases.solve(replace(there, kv_cache=pool), slots.cuda(), None)
    check(inputs, out.cpu(), lse.cpu(), expected)


def test_far_rows_of_queries_and_outputs(seed: int, supported: Supported) -> None:
    """Row strides of q, out and lse, and the block table's, beyond 2^31 elements in all."""
    case = Case("far_rows", lens=(300, 5, 3000, 64, 0, 700))
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    out, lse = inputs.outputs()
    assert inputs.q_rope is not None
    solve(replace(inputs, q_nope=spread(inputs.q_nope, 0)), out, lse)
    torch.cuda.empty_cache()
    solve(replace(inputs, q_rope=spread(inputs.q_rope, 0)), out, lse)
    torch.cuda.empty_cache()
    solve(replace(inputs, block_table=spread(inputs.block_table, 0)), out, lse)
    torch.cuda.empty_cache()
    solve(inputs, spread(out, 0), spread(lse, 0))


def test_far_heads(seed: int, supported: Supported) -> None:
    """Head strides likewise: q and out with the heads outermost."""
    case = Case("far_heads", lens=(300, 5, 3000))
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    out, lse = inputs.outputs()
    solve(replace(inputs, q_nope=spread(inputs.q_nope, 1)), spread(out, 1), lse)
