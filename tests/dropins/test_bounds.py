"""A length beyond a sequence's pages, and steps with nothing to read, through the drop-in packages and a step of vLLM on the CPU device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import etap_flash_attn_3
import etap_flashinfer.mla
import etap_flashmla
import pytest
import torch
from cases import Case, Inputs, make_inputs
from dropins_kit import cache_parts, fused_queries, page_lists
from etap_vllm import decode

import etap_py as etap


def flash_attn_3(i: Inputs) -> Any:
    latent, rope = cache_parts(replace(i, kv_cache=i.kv_cache.unsqueeze(2)))
    assert i.q_rope is not None
    return etap_flash_attn_3.flash_attn_with_kvcache(
        i.q_rope[:, None], rope, latent, qv=i.q_nope[:, None], cache_seqlens=i.cache_seqlens, page_table=i.block_table, causal=True
    )


def flashmla(i: Inputs) -> Any:
    metadata, _ = etap_flashmla.get_mla_metadata()
    return etap_flashmla.flash_mla_with_kvcache(
        fused_queries(i), i.kv_cache.unsqueeze(2), i.block_table, i.cache_seqlens, 512, metadata, causal=True
    )[0]


def vllm_step(i: Inputs) -> Any:
    planner = decode.Planner(etap.Problem(num_heads=i.case.heads, batch=1, page_size=i.case.page_size), 4, 1)
    plan = planner.plan(i.case.num_seqs, i.case.num_seqs, 1)
    decode.update(plan, i.cache_seqlens, torch.arange(i.case.num_seqs + 1, dtype=torch.int32))
    assert i.q_rope is not None
    scale = torch.ones(1)
    return decode.attend(
        plan, (i.q_nope, i.q_rope), i.kv_cache, i.block_table, softmax_scale=i.softmax_scale, k_scale=scale, return_lse=False
    )[0]


@pytest.mark.parametrize("call", [flash_attn_3, flashmla, vllm_step])
def test_a_length_beyond_the_table(call: Callable[[Inputs], Any], seed: int) -> None:
    """Guards: tokens of another sequence, or memory past the table, in a step whose lengths the table does not hold (dummy runs)."""
    inputs = make_inputs(Case("long", lens=(128, 100), heads=8), seed)
    inputs = replace(inputs, block_table=inputs.block_table[:, :2])
    assert call(inputs).isfinite().all()
    with pytest.raises(
        etap.EtapInvalidArgument, match=r"cache_seqlens\[1\] is 140; allowed: at most 128, as the block table has 2 columns"
    ):
        call(replace(inputs, cache_seqlens=torch.tensor([128, 140], dtype=torch.int32)))


@pytest.mark.parametrize("call", [flash_attn_3, flashmla, vllm_step])
def test_nothing_to_read(call: Callable[[Inputs], Any], seed: int) -> None:
    """Guards: a pool of no pages, or a table of no columns, that is refused although all lengths are 0."""
    inputs = make_inputs(Case("nothing", lens=(0, 0), heads=8), seed)
    for empty in (
        replace(inputs, kv_cache=inputs.kv_cache[:0]),
        replace(inputs, block_table=inputs.block_table[:, :0]),
        replace(inputs, kv_cache=inputs.kv_cache[:0], block_table=inputs.block_table[:, :0]),
    ):
        assert not call(empty).any()


@pytest.mark.parametrize("graph", [False, True])
def test_flashinfer_lengths_beyond_a_sequences_pages(graph: bool, seed: int) -> None:
    """Guards: the next sequence's pages, or those of the plan before, behind a sequence's own ones."""
    inputs = make_inputs(Case("short of pages", lens=(64, 128, 100), heads=8), seed)
    i32, workspace = torch.int32, torch.empty(1, dtype=torch.uint8)
    sizes = {"qo_indptr": 4, "kv_indptr": 4, "kv_indices": 12, "kv_len_arr": 3}
    buffers = {name: torch.zeros(size, dtype=i32) for name, size in sizes.items()} if graph else {}
    wrapper = etap_flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace, use_cuda_graph=graph, **buffers)
    latent, rope = cache_parts(inputs)
    kv_indptr, kv_indices = page_lists(inputs)

    def solve(indptr: torch.Tensor, indices: torch.Tensor, lens: list[int]) -> torch.Tensor:
        types = (torch.bfloat16, torch.bfloat16)
        wrapper.plan(torch.arange(4, dtype=i32), indptr, indices, torch.tensor(lens, dtype=i32), 8, 512, 64, 64, True, 0.04, *types)
        found: torch.Tensor = wrapper.run(inputs.q_nope, inputs.q_rope, latent, rope)
        return found

    assert solve(kv_indptr, kv_indices, [64, 128, 100]).isfinite().all()
    with pytest.raises(etap.EtapInvalidArgument, match=r"block_table\[0, 1\] is -1, and cache_seqlens\[0\] of 65 tokens reaches it"):
        solve(kv_indptr, kv_indices, [65, 128, 100])
    with pytest.raises(etap.EtapInvalidArgument, match=r"block_table\[2, 1\] is -1|cache_seqlens\[2\] is 100; allowed: at most 64"):
        solve(torch.arange(4, dtype=i32), kv_indices[:3], [64, 64, 100])


@pytest.mark.parametrize("pages", [0, 3])
def test_flashinfer_nothing_to_read(pages: int) -> None:
    """Guards FlashInfer's own cases of kv_len = 0: no pages in the lists, and none in pools that are not views of one."""
    i32 = torch.int32
    wrapper = etap_flashinfer.mla.BatchMLAPagedAttentionWrapper(torch.empty(1, dtype=torch.uint8))
    types = (torch.bfloat16, torch.bfloat16)
    zeros = torch.zeros(3, dtype=i32)
    wrapper.plan(torch.arange(3, dtype=i32), zeros, torch.zeros(0, dtype=i32), zeros[:2], 8, 512, 64, 64, True, 0.04, *types)
    q = torch.randn(2, 8, 576).bfloat16()
    pool = torch.randn(pages, 64, 576).bfloat16()
    parts = (pool[..., :512], pool[..., 512:]) if pages else (torch.zeros(0, 64, 512).bfloat16(), torch.zeros(0, 64, 64).bfloat16())
    out, lse = wrapper.run(q[..., :512], q[..., 512:], *parts, return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()
