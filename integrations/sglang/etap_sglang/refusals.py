"""What the backend can't serve, said when the server starts instead of at its first request."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import etap_py as etap
import torch
from sglang.srt.runtime_context import get_parallel, get_spec

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

TREES = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
"""Algorithms whose draft trees SGLang describes by a mask in the layout that the backend asks for."""

KV_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "e4m3"}


class EtapRefusal(RuntimeError):
    """The etap attention backend can't serve this server; the message says why and what can be done."""


def check_runner(runner: ModelRunner) -> None:
    """Raise EtapRefusal unless SGLang's side of the problem fits. Dimensions and device are libetap's to judge."""
    if not runner.use_mla_backend:
        option = "--speculative-draft-attention-backend" if runner.is_draft_worker else "--attention-backend"
        raise EtapRefusal(
            "the etap attention backend serves models with multi-head latent attention (MLA) only, and "
            f"{_architecture(runner)} is not one; choose another {option}"
        )
    if runner.dtype not in (torch.bfloat16, torch.float16):
        raise EtapRefusal(f"the etap attention backend computes in bfloat16 or float16, and --dtype is {runner.dtype}")
    if runner.kv_cache_dtype not in KV_FORMATS:
        raise EtapRefusal(
            f"the etap attention backend can't read a KV cache of {runner.kv_cache_dtype}; allowed values of "
            "--kv-cache-dtype: auto, bfloat16, fp8_e4m3"
        )
    if get_parallel().attn_dcp_size > 1 and get_spec().speculative_algorithm is not None:
        raise EtapRefusal(
            "the etap attention backend does not verify drafts under decode context parallelism, and --dcp-size is "
            f"{get_parallel().attn_dcp_size}; the only value allowed with --speculative-algorithm is 1"
        )
    if getattr(runner.model_config.hf_config, "index_topk", None) is not None:
        from . import seams

        raise EtapRefusal(
            seams.missing_for_sparse()
            or "the etap attention backend computes sparse attention inside SGLang's dsa backend, which does not serve "
            f"{_architecture(runner)} (index_topk = {runner.model_config.hf_config.index_topk}); choose another --attention-backend"
        )
    _check_common(runner)


def check_sparse_runner(runner: ModelRunner) -> None:
    """The same for a model that SGLang serves with its `dsa` backend."""
    if runner.dtype != torch.bfloat16:
        raise EtapRefusal(f"the etap attention backend computes sparse attention in bfloat16, and --dtype is {runner.dtype}")
    _check_common(runner)


def _check_common(runner: ModelRunner) -> None:
    if runner.kv_index_translator.is_translating:
        raise EtapRefusal("the etap attention backend does not support --enable-unified-memory")
    if getattr(runner.model_config.hf_config, "llama_4_scaling", None) is not None:
        raise EtapRefusal(f"the etap attention backend does not scale queries by position, as {_architecture(runner)} asks")
    _check_layers(runner)


def check_trees(query: Callable[[], object]) -> None:
    """Raise EtapRefusal where trees of drafts can't be verified. `query` asks libetap, which says by an EtapError that it can't."""
    topk, algorithm = get_spec().speculative_eagle_topk, get_spec().speculative_algorithm
    if algorithm not in TREES:
        raise EtapRefusal(
            f"the etap attention backend verifies the trees of {', '.join(TREES)} only, and --speculative-algorithm is {algorithm} with "
            f"{topk} drafts beside each other"
        )
    try:
        query()
    except etap.EtapError as error:
        raise EtapRefusal(
            f"the etap attention backend verifies only chains of draft tokens here, and --speculative-eagle-topk is {topk}; the only value "
            f"allowed is 1: {error}"
        ) from error


def _check_layers(runner: ModelRunner) -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    for name, module in _modules(runner):
        if getattr(module, "learnable_sink_param", None) is not None:
            raise EtapRefusal(f"the etap attention backend does not support attention sinks, and layer {name} has them")
        if not isinstance(module, RadixAttention):
            continue
        if module.logit_cap:
            raise EtapRefusal(
                f"the etap attention backend does not support capped logits, and layer {name} caps them at {module.logit_cap}"
            )
        scale = module.k_scale_float if module.k_scale is not None else None
        if scale is not None and scale != 1.0:
            raise EtapRefusal(
                f"the etap attention backend reads an FP8 KV cache that was written with scale 1, and layer {name} has a k_scale of {scale}"
            )


def _modules(runner: ModelRunner) -> Any:
    model = getattr(runner, "model", None)
    return model.named_modules() if isinstance(model, torch.nn.Module) else ()


def _architecture(runner: ModelRunner) -> str:
    return (getattr(runner.model_config.hf_config, "architectures", None) or ["this model"])[0]
