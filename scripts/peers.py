"""Other MLA decode kernels behind one interface, for bench_gpu.py. Each is used only where it can be imported.

`prepare(name, load)` returns call(pool) -> out: it enqueues one decode over a pool's block table on the current stream,
legal inside CUDA-graph capture. Planning and metadata are made here, outside the timing, as etap's plan is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from bench_gpu import Workload

Call = Callable[[int], torch.Tensor]
SGLANG_MAX_SPLITS = 8  # the default of its --triton-attention-num-kv-splits


class Skip(Exception):
    """Why a peer does not take part."""


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer built for another torch or GPU fails in many ways
        raise Skip(f"{name} can't be imported: {error}") from error


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise Skip(f"takes {what} only")


def _need_full_rows(load: Workload) -> None:
    _need(load.shape.kv_format in ("bf16", "fp16"), "16-bit KV")
    _need((load.shape.d_latent, load.shape.d_rope) == (512, 64), "512 + 64 dimensions")
    _need(load.shape.num_sms == 0, "the whole GPU")


def _flash_mla(load: Workload) -> Call:
    flash_mla = _module("flash_mla")
    _need_full_rows(load)
    shape = load.shape
    _need(shape.page_size == 64, "pages of 64 tokens")
    q = load.q.view(shape.batch, shape.query_len, shape.heads, 576)
    kv = load.kv.unsqueeze(2)
    schedule, splits = flash_mla.get_mla_metadata(load.lengths, shape.query_len * shape.heads, 1)
    # Entries past a sequence's end must be valid page numbers here.
    tables = load.tables.clamp(min=0)

    def call(pool: int) -> torch.Tensor:
        return flash_mla.flash_mla_with_kvcache(
            q, kv, tables[pool], load.lengths, 512, schedule, splits, softmax_scale=load.scale, causal=True
        )[0]

    call(0)  # newer versions make the schedule in the first call
    return call


def _flash_infer(backend: str) -> Callable[[Workload], Call]:
    def prepare(load: Workload) -> Call:
        mla = _module("flashinfer.mla")
        _need_full_rows(load)
        shape = load.shape
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
        pages = torch.tensor([-(-n // shape.page_size) for n in shape.lengths], dtype=torch.int32)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int32), pages.cumsum(0, dtype=torch.int32)]).cuda()
        queries = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * shape.query_len
        wrappers = []
        for table in load.tables:
            wrapper = mla.BatchMLAPagedAttentionWrapper(workspace, backend=backend)
            wrapper.plan(
                queries,
                indptr,
                table[table >= 0].contiguous(),
                load.lengths,
                shape.heads,
                512,
                64,
                shape.page_size,
                True,
                load.scale,
                load.q.dtype,
                load.kv.dtype,
            )
            wrappers.append(wrapper)
        latent, rope = load.kv[..., :512], load.kv[..., 512:]
        return lambda pool: wrappers[pool].run(load.q_nope, load.q_rope, latent, rope)

    return prepare


def _flash_attention_3(load: Workload) -> Call:
    try:
        interface = _module("flash_attn_interface")
    except Skip:
        interface = _module("sgl_kernel.flash_attn")
    _need_full_rows(load)
    shape = load.shape
    kv = load.kv.unsqueeze(2)
    latent, rope = kv[..., :512], kv[..., 512:]
    q_nope, q_rope = (q.view(shape.batch, shape.query_len, shape.heads, -1) for q in (load.q_nope, load.q_rope))
    tables = load.tables.clamp(min=0)

    def call(pool: int) -> torch.Tensor:
        out = interface.flash_attn_with_kvcache(
            q=q_rope,
            k_cache=rope,
            v_cache=latent,
            qv=q_nope,
            cache_seqlens=load.lengths,
            page_table=tables[pool],
            softmax_scale=load.scale,
            causal=True,
        )
        return out[0] if isinstance(out, tuple) else out

    return call


def _sglang_triton(load: Workload) -> Call:
    try:
        decode = _module("sglang.kernels.ops.attention.decode_attention")
        metadata = _module("sglang.kernels.ops.attention.metadata")
    except Skip:
        decode = _module("sglang.srt.layers.attention.triton_ops.decode_attention")
        metadata = _module("sglang.srt.layers.attention.triton_backend")
    _need_full_rows(load)
    shape = load.shape
    _need(shape.query_len == 1, "one query token")
    _need(shape.heads > 1, "several heads")
    indptr = torch.zeros(shape.batch + 1, dtype=torch.int32, device="cuda")
    indptr[1:] = load.lengths.cumsum(0)
    token = torch.arange(max(shape.lengths), device="cuda")
    within = token < load.lengths[:, None]
    indices = []
    for table in load.tables:
        tokens = table.long().repeat_interleave(shape.page_size, dim=1)[:, : len(token)] * shape.page_size
        indices.append((tokens + token % shape.page_size)[within])
    keys = load.arena.rows.view(-1, 1, 576)
    out = torch.empty(shape.batch, shape.heads, 512, dtype=load.q.dtype, device="cuda")
    partial = torch.empty(shape.batch, shape.heads, SGLANG_MAX_SPLITS, 512, device="cuda")
    partial_lse = torch.empty(shape.batch, shape.heads, SGLANG_MAX_SPLITS, device="cuda")
    splits = torch.empty(shape.batch, dtype=torch.int32, device="cuda")
    metadata.get_num_kv_splits_triton[(1,)](
        splits,
        load.lengths,
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
            load.q,
            keys,
            keys[..., :512],
            out,
            indptr,
            indices[pool],
            partial,
            partial_lse,
            splits,
            SGLANG_MAX_SPLITS,
            load.scale,
            1.0,
            1.0,
        )
        return out

    return call


_PREPARE: dict[str, Callable[[Workload], Call]] = {
    "flashmla": _flash_mla,
    "flashinfer-fa3": _flash_infer("fa3"),
    "flashinfer-fa2": _flash_infer("fa2"),
    "fa3": _flash_attention_3,
    "sglang-triton": _sglang_triton,
}
NAMES = tuple(_PREPARE)


def prepare(name: str, load: Workload) -> Call:
    """Raises Skip, with the reason, where the peer is not installed or does not take the shape."""
    try:
        return _PREPARE[name](load)
    except Skip:
        raise
    except Exception as error:
        raise Skip(f"{type(error).__name__}: {error}") from error
