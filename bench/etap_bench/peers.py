"""Other MLA decode kernels behind one interface. Each is used only where it can be imported.

`prepare(name, inputs)` returns call(pool) -> out: it enqueues one decode over a pool's block table on the current stream,
legal inside CUDA-graph capture. Planning and metadata are made here, outside the timing, as etap's plan is.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

from etap_bench.contenders import Skip
from etap_bench.inputs import Inputs
from etap_bench.measurement import PEERS
from etap_bench.shape import Shape
from etap_bench.timing import Call

SGLANG_MAX_SPLITS = 8  # the default of its --triton-attention-num-kv-splits


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer built for another torch or GPU fails in many ways
        raise Skip(f"{name} can't be imported: {error}") from error


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise Skip(f"takes {what} only")


def _need_16_bit(shape: Shape) -> None:
    _need(shape.kv_format in ("bf16", "fp16"), "16-bit KV")
    _need(shape.num_sms == 0, "the whole device")


def _need_full_rows(inputs: Inputs) -> None:
    _need(inputs.device != "cpu", "CUDA tensors")
    _need_16_bit(inputs.shape)
    _need((inputs.shape.d_latent, inputs.shape.d_rope) == (512, 64), "512 + 64 dimensions")


def _equal_query_len(shape: Shape) -> int:
    if not shape.equal_query_lens:
        raise Skip("takes equal query counts only")
    return shape.query_len


def _legacy(decode: Callable[..., Any]) -> dict[str, bool]:
    """Newer versions of FlashMLA keep dense decoding, and sparse decoding on this card, among their legacy kernels only."""
    return {"use_legacy": True} if "use_legacy" in inspect.signature(decode).parameters else {}


def _flash_mla_of_lists(inputs: Inputs) -> Call:
    """Heads are filled up to the 64 or 128 that it takes beforehand, and not in the time."""
    shape = inputs.shape
    _need(inputs.device != "cpu", "CUDA tensors")
    _need(shape.kv_format == "e4m3_656", "rows of 656 bytes with lists")
    _need(shape.num_sms == 0, "the whole device")
    flash_mla = _module("flash_mla")
    decode, (schedule, splits) = flash_mla.flash_mla_with_kvcache, flash_mla.get_mla_metadata()
    q = torch.nn.functional.pad(inputs.q, (0, 0, 0, -shape.heads % 64)).unsqueeze(1)
    kv = inputs.arena.pages(64).unsqueeze(2)
    given = {"softmax_scale": inputs.softmax_scale, "is_fp8_kvcache": True, "topk_length": inputs.cache_seqlens, **_legacy(decode)}

    def call(pool: int) -> torch.Tensor:
        lists = inputs.block_tables[pool].unsqueeze(1)
        out: torch.Tensor = decode(q, kv, None, None, 512, schedule, splits, indices=lists, **given)[0]
        return out[:, 0, : shape.heads]

    call(0)  # makes the schedule
    return call


def _flash_mla(inputs: Inputs) -> Call:
    if inputs.shape.sparse:
        return _flash_mla_of_lists(inputs)
    _need_full_rows(inputs)
    flash_mla = _module("flash_mla")
    shape, query_len = inputs.shape, _equal_query_len(inputs.shape)
    _need(shape.page_size == 64, "pages of 64 tokens")
    q = inputs.q.view(shape.batch, query_len, shape.heads, 576)
    kv = inputs.kv_cache.unsqueeze(2)
    decode = flash_mla.flash_mla_with_kvcache
    legacy = _legacy(decode)
    schedule, splits = flash_mla.get_mla_metadata(inputs.cache_seqlens, query_len * shape.heads, 1)
    # Entries past a sequence's end must be valid page numbers here.
    tables = inputs.block_tables.clamp(min=0)

    def call(pool: int) -> torch.Tensor:
        out: torch.Tensor = decode(
            q, kv, tables[pool], inputs.cache_seqlens, 512, schedule, splits, softmax_scale=inputs.softmax_scale, causal=True, **legacy
        )[0]
        return out

    call(0)  # newer versions make the schedule in the first call
    return call


def _flash_infer(backend: str) -> Callable[[Inputs], Call]:
    def prepare(inputs: Inputs) -> Call:
        _need_full_rows(inputs)
        mla = _module("flashinfer.mla")
        shape = inputs.shape
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        pages = torch.tensor([-(-n // shape.adjacent) for n in shape.lengths], dtype=torch.int32)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int32), pages.cumsum(0, dtype=torch.int32)]).cuda()
        wrappers = []
        for table in inputs.block_tables:
            wrapper = mla.BatchMLAPagedAttentionWrapper(workspace, backend=backend)
            wrapper.plan(
                inputs.cu_seqlens_q,
                indptr,
                table[table >= 0].contiguous(),
                inputs.cache_seqlens,
                shape.heads,
                512,
                64,
                shape.adjacent,
                True,
                inputs.softmax_scale,
                inputs.q.dtype,
                inputs.kv_cache.dtype,
            )
            wrappers.append(wrapper)
        latent, rope = inputs.kv_cache[..., :512], inputs.kv_cache[..., 512:]
        return lambda pool: wrappers[pool].run(inputs.q_nope, inputs.q_rope, latent, rope)

    return prepare


def _flash_attention_3(inputs: Inputs) -> Call:
    _need_full_rows(inputs)
    try:
        interface = _module("flash_attn_interface")
    except Skip:
        interface = _module("sgl_kernel.flash_attn")
    shape, query_len = inputs.shape, _equal_query_len(inputs.shape)
    kv = inputs.kv_cache.unsqueeze(2)
    latent, rope = kv[..., :512], kv[..., 512:]
    q_nope, q_rope = inputs.q.view(shape.batch, query_len, shape.heads, 576).split([512, 64], dim=-1)
    tables = inputs.block_tables.clamp(min=0)

    def call(pool: int) -> torch.Tensor:
        result: torch.Tensor | tuple[torch.Tensor, ...] = interface.flash_attn_with_kvcache(
            q=q_rope,
            k_cache=rope,
            v_cache=latent,
            qv=q_nope,
            cache_seqlens=inputs.cache_seqlens,
            page_table=tables[pool],
            softmax_scale=inputs.softmax_scale,
            causal=True,
        )
        return result[0] if isinstance(result, tuple) else result

    return call


def _sglang_triton(inputs: Inputs) -> Call:
    _need_full_rows(inputs)
    try:
        decode = _module("sglang.kernels.ops.attention.decode_attention")
        metadata = _module("sglang.kernels.ops.attention.metadata")
    except Skip:
        decode = _module("sglang.srt.layers.attention.triton_ops.decode_attention")
        metadata = _module("sglang.srt.layers.attention.triton_backend")
    shape = inputs.shape
    _need(max(shape.query_lens) == 1, "one query token")
    _need(shape.heads > 1, "several heads")
    indptr = torch.zeros(shape.batch + 1, dtype=torch.int32, device="cuda")
    indptr[1:] = inputs.cache_seqlens.cumsum(0)
    token = torch.arange(max(shape.lengths), device="cuda")
    within = token < inputs.cache_seqlens[:, None]
    indices = []
    for table in inputs.block_tables:
        tokens = table.long().repeat_interleave(shape.adjacent, dim=1)[:, : len(token)] * shape.adjacent
        indices.append((tokens + token % shape.adjacent)[within])
    keys = inputs.arena.rows.view(-1, 1, 576)
    out = torch.empty(shape.batch, shape.heads, 512, dtype=inputs.q.dtype, device="cuda")
    partial = torch.empty(shape.batch, shape.heads, SGLANG_MAX_SPLITS, 512, device="cuda")
    partial_lse = torch.empty(shape.batch, shape.heads, SGLANG_MAX_SPLITS, device="cuda")
    splits = torch.empty(shape.batch, dtype=torch.int32, device="cuda")
    metadata.get_num_kv_splits_triton[(1,)](
        splits,
        inputs.cache_seqlens,
        shape.batch,
        1,
        shape.heads,
        1,
        SGLANG_MAX_SPLITS,
        torch.cuda.get_device_properties(0).multi_processor_count,
        MAX_NUM_SEQ=max(256, 1 << (shape.batch - 1).bit_length()),
    )

    def call(pool: int) -> torch.Tensor:
        decode.decode_attention_fwd(
            inputs.q,
            keys,
            keys[..., :512],
            out,
            indptr,
            indices[pool],
            partial,
            partial_lse,
            splits,
            SGLANG_MAX_SPLITS,
            inputs.softmax_scale,
            1.0,
            1.0,
        )
        return out

    return call


def _pytorch(inputs: Inputs) -> Call:
    """What a model without a paged kernel does: gather each sequence's pages, pad to the longest, scaled_dot_product_attention."""
    shape = inputs.shape
    _need_16_bit(shape)
    most, longest = max(shape.query_lens), max(shape.lengths)
    lengths = inputs.cache_seqlens[:, None].long()
    counts = inputs.cu_seqlens_q.diff()[:, None].long()
    query = torch.arange(most, device=inputs.device)
    real = query < counts  # [batch, most]: the rest of q is padding
    q = inputs.q.new_zeros(shape.batch, most, shape.heads, inputs.q.shape[-1])
    q[real] = inputs.q
    q = q.flatten(1, 2).unsqueeze(1)  # [batch, 1, most * heads, d]
    last = torch.where(real, lengths - counts + query, lengths - 1)
    seen = torch.arange(longest, device=inputs.device) <= last[..., None]
    mask = seen.repeat_interleave(shape.heads, dim=1).unsqueeze(1)
    tables = inputs.block_tables.clamp(min=0).long()
    rows = real.flatten().nonzero().flatten()  # of q, without the padding

    def call(pool: int) -> torch.Tensor:
        kv = inputs.kv_cache[tables[pool]].flatten(1, 2)[:, None, :longest]
        out = torch.nn.functional.scaled_dot_product_attention(q, kv, kv[..., : shape.d_latent], attn_mask=mask, scale=inputs.softmax_scale)
        return out.view(shape.batch * most, shape.heads, -1)[rows]

    return call


_ADAPTERS = (_flash_mla, _flash_infer("fa3"), _flash_infer("fa2"), _flash_attention_3, _sglang_triton, _pytorch)
_PREPARE: dict[str, Callable[[Inputs], Call]] = dict(zip(PEERS, _ADAPTERS, strict=True))
NAMES = PEERS


def prepare(name: str, inputs: Inputs) -> Call:
    """Raises Skip, with the reason, where the peer is not installed or does not take the shape."""
    try:
        return _PREPARE[name](inputs)
    except Skip:
        raise
    except Exception as error:
        raise Skip(f"{type(error).__name__}: {error}") from error
