"""ETAP: decode attention for MLA models, over libetap's C interface.

    out, lse = etap_py.mla_decode(q_nope, q_rope, kv_cache, block_table, cache_seqlens, softmax_scale=scale)

Importing loads the library and refuses one that was built for another version of the interface. It does not import PyTorch; in a process
that does, before or after, there is the operator torch.ops.etap.mla_decode.
"""

from __future__ import annotations

from pathlib import Path

from etap_py import after_torch
from etap_py import binding as _binding
from etap_py.decode import Plan, merge, mla_decode, query
from etap_py.errors import EtapError, EtapInvalidArgument, EtapUnsupported
from etap_py.problem import Decision, DeviceInfo, Problem, device_count, device_info, workspace_size

_number = _binding.lib.etap_version()
__version__ = f"{_number // 10000}.{_number // 100 % 100}.{_number % 100}"


def library_path() -> Path:
    """The libetap.so that is loaded."""
    return _binding.path


after_torch.run("etap_py.torch_ops")

__all__ = [
    "Decision",
    "DeviceInfo",
    "EtapError",
    "EtapInvalidArgument",
    "EtapUnsupported",
    "Plan",
    "Problem",
    "__version__",
    "device_count",
    "device_info",
    "library_path",
    "merge",
    "mla_decode",
    "query",
    "workspace_size",
]
