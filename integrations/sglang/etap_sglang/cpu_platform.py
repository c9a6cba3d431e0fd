"""An SGLang platform for machines without a GPU, so that a whole server runs on PyTorch's CPU kernels and libetap.

SGLang's own CPU device needs `sgl-kernel`, for which no CPU build is published. This out-of-tree platform does without:
it launches no Triton kernel, captures no graphs and writes the KV cache with PyTorch. Any attention backend that works
on CPU tensors serves on it: `etap`, and `torch_native` to compare with.

It is active only where the environment asks for it, in every process that imports sglang:

    ETAP_SGLANG_CPU=1 python -m sglang.launch_server ... --device cpu --attention-backend etap
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

from . import CPU_VARIABLE, cpu_platform_is_asked_for

ENVIRONMENT_VARIABLE = CPU_VARIABLE


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the platform's class, or None when the environment doesn't ask for it."""
    if not cpu_platform_is_asked_for():
        return None
    _define_torchvision_schemas()
    return f"{__name__}:EtapCpuPlatform"


def admit_context_parallelism() -> None:
    """Decode context parallelism: SGLang refuses it on devices that it doesn't name, and that question is all it asks here.

    To be called before SGLang makes its groups of ranks, which is before `init_backend`.
    """
    from sglang.srt.distributed import parallel_state

    parallel_state.is_cuda = lambda: True


def admit_sparse_models() -> None:
    """SGLang chooses the kernels of a sparse model by the card's compute capability, which it asks of PyTorch on every device but a few.

    To be called before SGLang parses its arguments.
    """
    torch.cuda.get_device_capability = lambda *_: (0, 0)


class EtapCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """The CPU as an out-of-tree device. No capability is declared, so SGLang takes its PyTorch paths."""

    _enum = PlatformEnum.OOT

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        return False

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_kv_pool_cls(self, *, kind: str) -> type | None:
        from .cpu_kv_pool import CpuDSATokenToKVPool, CpuMLATokenToKVPool

        return {"mla": CpuMLATokenToKVPool, "dsa": CpuDSATokenToKVPool}.get(kind)

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ("EAGLE", "NEXTN", "STANDALONE")

    def get_speculative_cache_locs_fn(self) -> Callable[..., torch.Tensor]:
        return _extend_cache_locs

    def init_backend(self) -> None:
        """Called once in each worker, before the model is built."""
        _register_absorbed_mla()
        _register_collectives()
        _use_portable_tree_kernels()
        from . import cpu_indexer

        cpu_indexer.install()
        # A draft model waits for the device outright when it is given the target's embeddings.
        torch.cuda.synchronize = lambda *_: None


def _define_torchvision_schemas() -> None:
    """torchvision registers fake kernels for operators that its build for another PyTorch doesn't define.

    Its C++ library loads only beside the PyTorch it was built for, and importing it fails where the schemas are missing. Where it
    loads, it defines them itself, and PyTorch ends a process that defines one twice.
    """
    package = importlib.util.find_spec("torchvision")
    for folder in (package.submodule_search_locations or []) if package else []:
        for library in Path(folder).glob("_C*.so"):
            with suppress(OSError):
                torch.ops.load_library(library)
    for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                   "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):  # fmt: skip
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            torch.library.define(f"torchvision::{schema.partition('(')[0]}", schema[schema.index("(") :])


def _register_absorbed_mla() -> None:
    """torch_native has no entry among the MLA handlers; the default one would send its prefill down a CUDA-only path."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        _dispatch_mla_subtype,
    )

    AttentionBackendRegistry.register("torch_native", _dispatch_mla_subtype)


def _register_collectives() -> None:
    """Tensor parallelism: SGLang implements these two operators for accelerators only."""
    from sglang.srt.distributed import parallel_state

    for name, function in (
        ("reg_all_gather_into_tensor", parallel_state.reg_all_gather_into_tensor),
        ("reg_reduce_scatter_tensor", parallel_state.reg_reduce_scatter_tensor),
    ):
        torch.library.impl(f"sglang::{name}", "CPU", getattr(function, "__wrapped__", function))


def _extend_cache_locs(
    *,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    batch_size: int,
    draft_token_num: int,
    device: torch.device | str,
) -> torch.Tensor:
    """KV slots of the tokens start_offset[b] .. end_offset[b] of each request, as one int64 vector."""
    rows = req_to_token[req_pool_indices.long()]
    offsets = start_offset.long().unsqueeze(1) + torch.arange(draft_token_num, device=rows.device)
    return rows.gather(1, offsets).flatten().to(torch.int64)


def _use_portable_tree_kernels() -> None:
    """Speculative decoding: draft trees are built and checked by Triton kernels, which the interpreter runs (TRITON_INTERPRET=1).

    SGLang takes them on XPU and has no other seam for them.
    """
    from sglang.kernels.ops.speculative import spec_tree

    spec_tree._is_xpu = True
