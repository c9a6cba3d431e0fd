"""A length beyond a sequence's pages, and steps with nothing to read, through the drop-in packages and a step of vLLM on the CPU device.
FlashInfer's, whose wrapper builds its own table, are in test_flashinfer.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import etap_flash_attn_3
import etap_flashmla
import pytest
import torch
from cases import Case, Inputs, make_inputs
from dropins_kit import cache_parts, fused_queries
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
