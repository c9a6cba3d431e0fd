"""ETAP: decode attention for MLA models, over libetap's C interface.

    out, lse = etap_py.mla_decode(q_nope, q_rope, kv_cache, block_table, cache_seqlens, softmax_scale=scale)

The library is loaded by the first use of a name that needs it; one that can't be loaded, or that was built for another version of the
interface, raises ImportError there. Importing does not import PyTorch; in a process that does, before or after, there is the operator
torch.ops.etap.mla_decode.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etap_py import after_torch
from etap_py.errors import EtapError, EtapInvalidArgument, EtapUnsupported

if TYPE_CHECKING:
    from etap_py import torch_ops as torch_ops
    from etap_py.decode import Plan, merge, mla_decode, mla_decode_sparse, query
    from etap_py.problem import Decision, DeviceInfo, Problem, Shared, device_count, device_info, workspace_size

    __version__: str

# Loaded when they are asked for, so that `etap --version`, `etap doctor` and all that needs no library work without one.
_MODULES = {
    "etap_py.decode": ("Plan", "merge", "mla_decode", "mla_decode_sparse", "query"),
    "etap_py.problem": ("Decision", "DeviceInfo", "Problem", "Shared", "device_count", "device_info", "workspace_size"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from etap_py.header import version

        value: Any = version()
    elif name == "torch_ops":
        return importlib.import_module("etap_py.torch_ops")
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def library_path() -> Path:
    """The libetap.so that is loaded."""
    from etap_py import binding

    return binding.path


after_torch.run("etap_py.torch_ops")

__all__ = [
    "Decision",
    "DeviceInfo",
    "EtapError",
    "EtapInvalidArgument",
    "EtapUnsupported",
    "Plan",
    "Problem",
    "Shared",
    "__version__",
    "device_count",
    "device_info",
    "library_path",
    "merge",
    "mla_decode",
    "mla_decode_sparse",
    "query",
    "workspace_size",
]
