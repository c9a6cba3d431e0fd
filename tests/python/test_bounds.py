"""What lies outside of the block table and of the pool is never read: through every binding, on the CPU device, which refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from backends import Ctypes
from cases import DTYPES, Case, Inputs, check, make_inputs, reference
from harness import Guarded, Session, poisoned_workspace, problem_of, same_bits
from test_tensors import OnlyDLPack, to_numpy

import etap_py as etap

Results = tuple[Any, Any]


def through_plan(i: Inputs) -> Results:
    session = Session(i)
    session.update()
    out, lse = i.outputs()
    guards = [Guarded(out), Guarded(lse)]
    try:
        session.run(out, lse)
    except Exception:
        assert all(guard.untouched() for guard in guards), "refused, but something was written"
        raise
    return out, lse


def through_function(i: Inputs, convert: Callable[[torch.Tensor], Any] = lambda tensor: tensor, **more: Any) -> Results:
    tensors = [None if t is None else convert(t) for t in (i.q_nope, i.q_rope, i.kv_cache, i.block_table, i.cache_seqlens)]
    scales = None if i.kv_group_scales is None else convert(i.kv_group_scales)
    more |= {"softmax_scale": i.softmax_scale, "kv_scale": i.kv_scale, "kv_group_scales": scales, "kv_format": i.case.kv}
    return etap.mla_decode(*tensors, **more)


def through_numpy(i: Inputs) -> Results:
    out, lse = through_function(i, to_numpy, q_dtype=i.case.q_dtype)
    return torch.from_numpy(out).view(DTYPES[i.case.out]), torch.from_numpy(lse)


def through_dlpack(i: Inputs) -> Results:
    out, lse = i.outputs()
    through_function(i, lambda t: OnlyDLPack(t) if t.dtype != torch.float8_e4m3fn else t, out=out, lse=lse)
    return out, lse


def through_operator(i: Inputs) -> Results:
    tensors = (i.q_nope, i.q_rope, i.kv_cache, i.block_table, i.cache_seqlens, i.softmax_scale)
    scale = torch.tensor(i.kv_scale) if isinstance(i.kv_scale, float) else i.kv_scale
    out, lse = torch.ops.etap.mla_decode(*tensors, kv_scale=scale, kv_group_scales=i.kv_group_scales, kv_format=i.case.kv)
    return out, lse


def through_ctypes(i: Inputs) -> Results:
    """As a user of the shim writes it: pointers from data_ptr(), sizes from shape."""
    lib, shim = Ctypes.lib, Ctypes.shim
    out, lse = i.outputs()
    memory = poisoned_workspace(problem_of(i.case, "cpu"))
    workspace = {"workspace": memory.data_ptr(), "workspace_bytes": len(memory)}
    p = problem_of(i.case, "cpu")
    fields = {name: getattr(p, name) for name in ("num_heads", "d_latent", "d_rope", "page_size", "batch", "max_query_len")}
    types = {"bf16": shim.ETAP_BF16, "fp16": shim.ETAP_FP16}
    kinds = ["bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656"]
    fields |= {
        "q_dtype": types[p.q_dtype],
        "out_dtype": types[p.out_dtype],
        "kv_format": kinds.index(p.kv_format),
        "flags": shim.ETAP_CAUSAL,
    }
    plan = Ctypes.plan_out()
    shim.check(lib, lib.etap_plan_create(shim.new(shim.etap_problem, **fields), plan))
    try:
        step = shim.new(shim.etap_plan_args, batch=p.batch, cache_seqlens=i.cache_seqlens.data_ptr(), **workspace)
        shim.check(lib, lib.etap_plan_update(plan, step))
        rope, scales = i.q_rope, i.kv_group_scales
        args = shim.new(
            shim.etap_run_args,
            batch=p.batch,
            q_nope=i.q_nope.data_ptr(),
            q_nope_row_stride=i.q_nope.stride(0),
            q_nope_head_stride=i.q_nope.stride(1),
            q_rope=rope.data_ptr() if rope is not None else None,
            q_rope_row_stride=rope.stride(0) if rope is not None else 0,
            q_rope_head_stride=rope.stride(1) if rope is not None else 0,
            kv_cache=i.kv_cache.data_ptr(),
            kv_page_stride=i.kv_cache.stride(0),
            kv_row_stride=i.kv_cache.stride(1),
            num_pages=len(i.kv_cache),
            block_table=i.block_table.data_ptr(),
            block_table_stride=i.block_table.stride(0),
            block_table_columns=i.block_table.shape[1],
            softmax_scale=i.softmax_scale,
            kv_scale=i.kv_scale or 0,
            kv_group_scales=scales.data_ptr() if scales is not None else None,
            kv_group_scales_page_stride=scales.stride(0) if scales is not None else 0,
            kv_group_scales_row_stride=scales.stride(1) if scales is not None else 0,
            out=out.data_ptr(),
            out_row_stride=out.stride(0),
            out_head_stride=out.stride(1),
            lse=lse.data_ptr(),
            lse_row_stride=lse.stride(0),
            lse_head_stride=lse.stride(1),
            **workspace,
        )
        shim.check(lib, lib.etap_run(plan, args))
    finally:
        lib.etap_plan_destroy(plan)
    return out, lse


WAYS = [through_plan, through_function, through_numpy, through_dlpack, through_operator, through_ctypes]
FORMATS = ["bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656"]


def case_of(kv_format: str, **fields: Any) -> Case:
    return Case(kv_format, kv_format=kv_format, q_dtype="fp16" if kv_format == "fp16" else "bf16", **fields)


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__.removeprefix("through_"))
def way(request: pytest.FixtureRequest) -> Callable[[Inputs], Results]:
    found: Callable[[Inputs], Results] = request.param
    return found


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_a_length_beyond_the_table(way: Callable[[Inputs], Results], page_size: int, kv_format: str, seed: int) -> None:
    """Guards: a row of the table that runs on into the next row's pages, so that a sequence sees another one's tokens, or past the end of
    the tensor. Exactly full tables are right; views of a wider table have the columns of the view."""
    lens = (2 * page_size, 2 * page_size - 1, 1)
    inputs = make_inputs(case_of(kv_format, lens=lens, page_size=page_size, heads=4), seed)
    full = replace(inputs, block_table=inputs.block_table[:, :2])
    out, lse = way(full)
    check(inputs, out, lse, reference(inputs))
    for sequence, excess in ((0, 1), (2, 2**31 - 1)):
        longer = full.cache_seqlens.clone()
        longer[sequence] = min(2 * page_size + excess, 2**31 - 1)
        sentence = (
            f"cache_seqlens[{sequence}] is {int(longer[sequence])}; allowed: at most {2 * page_size}, as the block table has 2 columns"
        )
        with pytest.raises(RuntimeError, match=re.escape(sentence)):
            way(replace(full, cache_seqlens=longer))


def test_the_reported_case() -> None:
    """Guards: row 0 changes when page 2, which is not its own, does (the report's shapes)."""
    q, kv = torch.randn(2, 8, 576).half(), torch.randn(4, 64, 576).half()
    table, lens = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.tensor([140, 100], dtype=torch.int32)
    with pytest.raises(
        etap.EtapInvalidArgument, match=r"cache_seqlens\[0\] is 140; allowed: at most 128, .* 2 columns for pages of 64 tokens"
    ):
        etap.mla_decode(q[..., :512], q[..., 512:], kv, table, lens, softmax_scale=0.04)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("page", [-1, "num_pages", 2**31 - 1])
def test_page_numbers_outside_of_the_pool(way: Callable[[Inputs], Results], page: Any, page_size: int, seed: int) -> None:
    """Guards: a page number that a length reaches and the pool has not. In columns that no length reaches everything is allowed."""
    inputs = make_inputs(Case("pages", lens=(3 * page_size, page_size), page_size=page_size, heads=4), seed)
    table = inputs.block_table.clone()
    number = len(inputs.kv_cache) if page == "num_pages" else page
    table[1, 1:] = number
    good = replace(inputs, block_table=table)
    out, lse = way(good)
    check(inputs, out, lse, reference(inputs))
    bad = good.block_table.clone()
    bad[0, 2] = number
    sentence = (
        f"block_table[0, 2] is {number}, and cache_seqlens[0] of {3 * page_size} tokens reaches it; allowed: page numbers from 0 to below"
    )
    with pytest.raises(RuntimeError, match=re.escape(f"{sentence} num_pages, which is {len(inputs.kv_cache)}")):
        way(replace(good, block_table=bad))


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("nothing", ["pages", "columns", "pages and columns"])
def test_nothing_to_read(way: Callable[[Inputs], Results], nothing: str, kv_format: str, seed: int) -> None:
    """Guards: "kv_cache is NULL" for a pool of no pages or a table of no columns when all lengths are 0; and both when one is not."""
    inputs = make_inputs(case_of(kv_format, lens=(0, 0, 0), heads=4), seed)
    if "pages" in nothing:
        scales = inputs.kv_group_scales
        inputs = replace(inputs, kv_cache=inputs.kv_cache[:0], kv_group_scales=None if scales is None else scales[:0])
    if "columns" in nothing:
        inputs = replace(inputs, block_table=inputs.block_table[:, :0])
    out, lse = way(inputs)
    assert not out.any()
    assert (lse == -torch.inf).all()
    one = torch.tensor([0, 1, 0], dtype=torch.int32)
    sentence = "block table has 0 columns" if "columns" in nothing else "num_pages, which is 0"
    with pytest.raises(RuntimeError, match=sentence):
        way(replace(inputs, cache_seqlens=one))


@pytest.mark.parametrize("apart", [False, True], ids=["views of one pool", "two pools"])
def test_an_empty_pair(apart: bool) -> None:
    """Guards: a complaint about views when the two parts of a cache have no pages, and so no addresses."""
    pool = torch.zeros(0, 64, 1, 576, dtype=torch.bfloat16)
    parts = (torch.zeros(0, 64, 1, 512).bfloat16(), torch.zeros(0, 64, 1, 64).bfloat16()) if apart else (pool[..., :512], pool[..., 512:])
    q, lens = torch.randn(2, 16, 576).bfloat16(), torch.zeros(2, dtype=torch.int32)
    out, lse = etap.mla_decode(q[..., :512], q[..., 512:], parts, torch.zeros(2, 0, dtype=torch.int32), lens, softmax_scale=1)
    assert not out.any()
    assert (lse == -torch.inf).all()
    with pytest.raises(ValueError, match="kv_cache is a pair of bf16"):
        etap.mla_decode(q[..., :512], q[..., 512:], (parts[0], parts[1][:, :32]), lens[:, None], lens, softmax_scale=1)


def test_views_of_nothing_point_nowhere() -> None:
    """Guards: an address for arrays of no elements, which the C interface takes for data."""
    from etap_py import tensors

    array = np.zeros((4, 8), np.int32)
    for empty in (array[:, :0], torch.from_numpy(array)[:, :0], OnlyDLPack(torch.from_numpy(array)[:, :0])):
        assert tensors.view("x", empty)[:2] == (0, (4, 0))


def test_one_plan_and_growing_tables(seed: int) -> None:
    """Guards: columns remembered from a call with another table, narrower or wider, of the same plan."""
    inputs = make_inputs(Case("growing", lens=(130, 64)), seed)
    session = Session(inputs)
    session.update()
    want = inputs.outputs()
    session.run(*want)
    for columns in (4, 3, 2, 4, 1, 3):
        out, lse = inputs.outputs()
        narrowed = inputs.block_table[:, :columns]
        if columns < 3:
            with pytest.raises(etap.EtapInvalidArgument, match=f"the block table has {columns} columns"):
                session.run(out, lse, block_table=narrowed)
        else:
            session.run(out, lse, block_table=narrowed)
            assert same_bits(out, want[0])


@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
def test_odd_query_strides(way: Callable[[Inputs], Results], kv_format: str, seed: int) -> None:
    """Guards: a promise of free query strides that a binding or the validation does not keep."""
    inputs = make_inputs(case_of(kv_format, lens=(70, 5, 64), heads=5), seed)

    def odd(tensor: torch.Tensor) -> torch.Tensor:
        rows, heads, d = tensor.shape
        strides = (heads * (d + 1) + 3, d + 1, 1)
        view = torch.full((rows * strides[0],), torch.nan, dtype=tensor.dtype).as_strided(tensor.shape, strides)
        return view.copy_(tensor)

    assert inputs.q_rope is not None
    out, lse = way(replace(inputs, q_nope=odd(inputs.q_nope), q_rope=odd(inputs.q_rope)))
    check(inputs, out, lse, reference(inputs))
