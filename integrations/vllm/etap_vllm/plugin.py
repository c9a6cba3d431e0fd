"""Entry point of `vllm.general_plugins`: vLLM calls `register` in each of its processes, before it looks at its arguments."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import NAME, SPARSE_NAME

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

ENVIRONMENT_VARIABLE = "ETAP_VLLM_CPU"
"""Set to 1 on vLLM's CPU platform: CPU_MLA, the only MLA backend that this platform lets one choose, then computes with libetap."""

SHARED_PREFIXES_VARIABLE = "ETAP_VLLM_SHARED_PREFIXES"
"""Set to 1: sequences whose blocks begin alike read them together."""

_CLASSES = {NAME: "etap_vllm.backend.EtapMLABackend", SPARSE_NAME: "etap_vllm.sparse_backend.EtapMLASparseBackend"}


def register() -> None:
    """Make the backends' names known. Only the paths of their classes are given: vLLM imports the one that is chosen."""
    for name in _CLASSES:
        member(name)
    if cpu_is_asked_for():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CPU_MLA, "etap_vllm.cpu.EtapCPUMLABackend")


def cpu_is_asked_for() -> bool:
    return os.environ.get(ENVIRONMENT_VARIABLE, "0") not in ("", "0")


def prefixes_are_shared() -> bool:
    return os.environ.get(SHARED_PREFIXES_VARIABLE, "0") not in ("", "0")


def member(name: str) -> AttentionBackendEnum:
    """The member of vLLM's enumeration of backends, added to it when it isn't there yet."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if name not in AttentionBackendEnum.__members__:
        register_backend(name, _CLASSES[name])
        # An enumeration's members are pickled by value, and a spawned worker unpickles vLLM's configuration before it
        # loads plugins: there the value would not exist yet.
        AttentionBackendEnum[name].__reduce_ex__ = lambda _protocol: (member, (name,))
    return AttentionBackendEnum[name]
