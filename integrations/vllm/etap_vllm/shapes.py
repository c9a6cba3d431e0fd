"""What vLLM calls the shape of a model's decode attention, as libetap's problem; and, in sentences, what can't be served.

Nothing here imports vLLM.
"""

from __future__ import annotations

import etap_py as etap
import torch

from . import NAME, SPARSE_NAME

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Pages in tokens. vLLM cuts its blocks into the largest of these that divides them."""

KV_FORMATS = {
    "auto": "",  # that of the model
    "float16": "fp16",
    "bfloat16": "bf16",
    "fp8": "e4m3",
    "fp8_e4m3": "e4m3",
    "fp8_ds_mla": "e4m3_656",
}
"""vLLM's --kv-cache-dtype to libetap's kv_format."""

DTYPES = (torch.bfloat16, torch.float16)

HEAD_SIZES = {576: (512, 64), 512: (512, 0), 320: (256, 64)}
"""The width of a KV row to (latent, rope)."""

COMPUTE_CAPABILITY = (9, 0)

MAX_LISTS = 65536
"""Query tokens of a step at most, where each has a list of its own."""


class EtapRefusal(ValueError):
    """The backend can't serve this model here; the message says why and what is allowed."""


def refusal(
    *,
    head_size: int,
    dtype: torch.dtype,
    kv_cache_dtype: str | None,
    block_size: int | None,
    use_mla: bool,
    has_sink: bool,
    use_sparse: bool,
    capability: tuple[int, int],
    backend: str = NAME,
) -> str | None:
    """A sentence for each thing that rules the backend out, or None. None for kv_cache_dtype and block_size: not chosen yet."""
    told = []
    wanted = SPARSE_NAME if use_sparse else NAME
    if not use_mla:
        told.append("the model has no multi-head latent attention (MLA), and libetap computes nothing else")
    if head_size not in HEAD_SIZES:
        told.append(f"a KV row has {head_size} values; allowed: {', '.join(map(str, HEAD_SIZES))}")
    if dtype not in DTYPES:
        told.append(f"--dtype is {_name(dtype)}; allowed: {', '.join(map(_name, DTYPES))}")
    if kv_cache_dtype is not None and kv_cache_dtype not in KV_FORMATS:
        told.append(f"--kv-cache-dtype is {kv_cache_dtype}; allowed: {', '.join(KV_FORMATS)}")
    if block_size is not None and block_size % BLOCK_SIZES[0] != 0:
        told.append(f"--block-size is {block_size}; allowed: multiples of {BLOCK_SIZES[0]}")
    if has_sink:
        told.append("the model has attention sinks, which libetap does not compute")
    if backend != wanted:
        told.append(f"the model's attention is {'sparse' if use_sparse else 'not sparse'}; allowed: --attention-backend {wanted}")
    if capability != COMPUTE_CAPABILITY:
        told.append(f"the GPU has compute capability {capability[0]}.{capability[1]}; allowed: 9.0 (H20, H100, H200)")
    return f"{backend}: " + "; ".join(told) if told else None


def layer_refusal(*, alibi: bool, sliding_window: bool, logits_soft_cap: bool, attn_type: str, backend: str = NAME) -> str | None:
    """A sentence for what a layer asks for and libetap does not compute, or None."""
    told = [
        name
        for name, asked in (
            ("ALiBi slopes", alibi),
            ("a sliding window", sliding_window),
            ("capped logits", logits_soft_cap),
            (f"attention of type {attn_type} instead of decoder", attn_type != "decoder"),
        )
        if asked
    ]
    return f"{backend}: a layer has {', '.join(told)}, which libetap does not compute" if told else None


def sparse_refusal(*, hisparse: bool, max_tokens: int) -> str | None:
    """A sentence for each thing of vLLM's configuration that rules the sparse backend out, or None.

    max_tokens: --max-num-batched-tokens
    """
    told = []
    if hisparse:
        told.append("HiSparse keeps part of the cache in host memory, which the plugin does not serve")
    if max_tokens > MAX_LISTS:
        told.append(f"--max-num-batched-tokens is {max_tokens}; allowed: up to {MAX_LISTS}, each with a list of its own")
    return f"{SPARSE_NAME}: " + "; ".join(told) if told else None


def device_refusal(*, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, device: torch.device | str) -> str | None:
    """libetap's sentence where it has no sparse attention of such rows on this device, or None. Heads and lists are not known yet: those
    of a layer are asked for when it is made."""
    kv_lora_rank, qk_rope_head_dim = HEAD_SIZES[head_size]
    try:
        problem(
            num_heads=16,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype or "auto",
            device=device,
            topk=2048,
        )
    except EtapRefusal as refused:
        return str(refused)
    return None


def problem(
    *,
    num_heads: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    dtype: torch.dtype,
    kv_cache_dtype: str,
    device: torch.device | str,
    block_size: int = 64,
    batch_invariant: bool = False,
    topk: int = 0,
    shared_prefixes: bool = False,
) -> etap.Problem:
    """One sequence with one query token. Raises EtapRefusal with libetap's sentence when it is not supported on this device.

    num_heads: query heads that this GPU computes in a step of decode
    topk: tokens in a list of sparse attention; 0: dense
    shared_prefixes: sequences whose blocks begin alike read them together; never in batch-invariant mode
    """
    kv_format = KV_FORMATS[kv_cache_dtype]
    if topk:
        block_size = 1  # vLLM's lists count the rows of the cache
        if kv_format == "e4m3_656" and qk_rope_head_dim == 0:
            kv_format = "e4m3_528"  # vLLM stores zeros in place of the rope values, which are not read
    asked = etap.Problem(
        num_heads=num_heads,
        batch=1,
        page_size=block_size,
        d_latent=kv_lora_rank,
        d_rope=qk_rope_head_dim,
        q_dtype=dtype,
        kv_format=kv_format,
        batch_invariant=batch_invariant,
        device=str(device),
        topk=topk,
        shared_prefixes=shared_prefixes and not batch_invariant,
    )
    try:
        etap.query(asked)
    except etap.EtapError as error:
        raise EtapRefusal(f"{SPARSE_NAME if topk else NAME}: {error}") from error
    return asked


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
