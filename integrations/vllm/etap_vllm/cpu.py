"""vLLM's CPU platform with libetap's CPU device: for trying the backend without a GPU."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from .backend import DecodeImpl, EtapMLABackend


class EtapCPUMLABackend(EtapMLABackend):
    """What CPU_MLA means while `plugin.ENVIRONMENT_VARIABLE` is set."""

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return EtapCPUMLAImpl


class EtapCPUMLAImpl(DecodeImpl, CPUMLAImpl):
    """Writes the cache and computes prompts as vLLM's CPU implementation does."""
