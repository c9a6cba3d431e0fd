"""torch.ops.etap: decode attention as operators that torch.compile and CUDA graphs understand.

    torch.ops.etap.mla_decode(q_nope, q_rope, kv_cache, block_table, cache_seqlens, softmax_scale) -> (out, lse)
    torch.ops.etap.mla_decode_sparse(q_nope, q_rope, kv_cache, slots, slot_counts, softmax_scale) -> (out, lse)

Arguments are those of `etap_py.mla_decode` and `etap_py.mla_decode_sparse`, but that kv_cache is one tensor, kv_scale a tensor (or
None), out_dtype a torch.dtype (or None), empty_lse a float (or None: -inf), results are allocated, and the stream is torch's current
one. No gradient: it is for inference.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from etap_py.decode import mla_decode, mla_decode_sparse, split_width

_NAME = "etap::mla_decode"

torch.library.define(
    _NAME,
    "(Tensor q_nope, Tensor? q_rope, Tensor kv_cache, Tensor block_table, Tensor cache_seqlens, float softmax_scale, *, "
    "bool causal=True, Tensor? cu_seqlens_q=None, int? max_query_len=None, Tensor? tree_mask=None, Tensor? kv_scale=None, "
    'Tensor? kv_group_scales=None, str? kv_format=None, ScalarType? out_dtype=None, str lse_base="e", bool lse_heads_first=False, '
    "float? empty_lse=None, bool batch_invariant=False, bool shared_prefixes=False, int num_sms=0) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),  # views of strided pools must arrive as they are
)


@torch.library.impl(_NAME, ("cpu", "cuda"))
def _mla_decode(
    q_nope: Tensor,
    q_rope: Tensor | None,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    *,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    max_query_len: int | None = None,
    tree_mask: Tensor | None = None,
    kv_scale: Tensor | None = None,
    kv_group_scales: Tensor | None = None,
    kv_format: str | None = None,
    out_dtype: torch.dtype | None = None,
    lse_base: str = "e",
    lse_heads_first: bool = False,
    empty_lse: float | None = None,
    batch_invariant: bool = False,
    shared_prefixes: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    out, lse = mla_decode(
        q_nope,
        q_rope,
        kv_cache,
        block_table,
        cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        cu_seqlens_q=cu_seqlens_q,
        max_query_len=max_query_len,
        tree_mask=tree_mask,
        kv_scale=kv_scale,
        kv_group_scales=kv_group_scales,
        kv_format=kv_format,
        out_dtype=out_dtype,
        lse_base=lse_base,
        lse_heads_first=lse_heads_first,
        empty_lse=-math.inf if empty_lse is None else empty_lse,
        batch_invariant=batch_invariant,
        shared_prefixes=shared_prefixes,
        num_sms=num_sms,
    )
    assert lse is not None  # return_lse is True
    return out, lse


@torch.library.register_fake(_NAME)  # type: ignore[untyped-decorator]
def _mla_decode_fake(
    q_nope: Tensor,
    q_rope: Tensor | None,
    kv_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    softmax_scale: float,
    *,
    out_dtype: torch.dtype | None = None,
    lse_heads_first: bool = False,
    **_: object,
) -> tuple[Tensor, Tensor]:
    d_latent = q_nope.shape[-1] if q_rope is not None else split_width(q_nope.shape[-1])[0]
    out = q_nope.new_empty((*q_nope.shape[:-1], d_latent), dtype=out_dtype or q_nope.dtype)
    lse = q_nope.new_empty(q_nope.shape[:-1], dtype=torch.float32)
    return out, lse.transpose(-1, -2) if lse_heads_first else lse


_SPARSE = "etap::mla_decode_sparse"

torch.library.define(
    _SPARSE,
    "(Tensor q_nope, Tensor? q_rope, Tensor kv_cache, Tensor slots, Tensor? slot_counts, float softmax_scale, *, "
    "Tensor? kv_scale=None, Tensor? kv_group_scales=None, str? kv_format=None, ScalarType? out_dtype=None, "
    'str lse_base="e", bool lse_heads_first=False, float? empty_lse=None, bool batch_invariant=False, int num_sms=0) -> (Tensor, Tensor)',
    tags=(torch.Tag.needs_fixed_stride_order,),
)


@torch.library.impl(_SPARSE, ("cpu", "cuda"))
def _mla_decode_sparse(
    q_nope: Tensor,
    q_rope: Tensor | None,
    kv_cache: Tensor,
    slots: Tensor,
    slot_counts: Tensor | None,
    softmax_scale: float,
    *,
    kv_scale: Tensor | None = None,
    kv_group_scales: Tensor | None = None,
    kv_format: str | None = None,
    out_dtype: torch.dtype | None = None,
    lse_base: str = "e",
    lse_heads_first: bool = False,
    empty_lse: float | None = None,
    batch_invariant: bool = False,
    num_sms: int = 0,
) -> tuple[Tensor, Tensor]:
    out, lse = mla_decode_sparse(
        q_nope,
        q_rope,
        kv_cache,
        slots,
        slot_counts,
        softmax_scale=softmax_scale,
        kv_scale=kv_scale,
        kv_group_scales=kv_group_scales,
        kv_format=kv_format,
        out_dtype=out_dtype,
        lse_base=lse_base,
        lse_heads_first=lse_heads_first,
        empty_lse=-math.inf if empty_lse is None else empty_lse,
        batch_invariant=batch_invariant,
        num_sms=num_sms,
    )
    assert lse is not None  # return_lse is True
    return out, lse


torch.library.register_fake(_SPARSE)(_mla_decode_fake)
