"""libetap's C interface through ctypes, in one file that needs nothing but libetap.so: copy it where you like.

    from ctypes import byref, c_size_t
    etap = load("libetap.so")
    problem = new(etap_problem, num_heads=16, d_latent=512, d_rope=64, page_size=64, batch=1, max_query_len=1, flags=ETAP_CAUSAL)
    size = c_size_t()
    check(etap, etap.etap_workspace_size(problem, byref(size)))

Names, fields and values are those of etap.h, which also says what they mean. Pointers are addresses: tensor.data_ptr(),
array.ctypes.data.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any, TypeVar

ETAP_ABI_VERSION = 1

(
    ETAP_OK,
    ETAP_INVALID_ARGUMENT,
    ETAP_UNSUPPORTED,
    ETAP_ABI_MISMATCH,
    ETAP_WORKSPACE_TOO_SMALL,
    ETAP_PLAN_MISMATCH,
    ETAP_NO_DEVICE,
    ETAP_OUT_OF_MEMORY,
    ETAP_CUDA_ERROR,
    ETAP_INTERNAL_ERROR,
) = range(10)
ETAP_DEVICE_CPU, ETAP_DEVICE_CUDA = 0, 1
ETAP_BF16, ETAP_FP16, ETAP_FP32 = 0, 1, 2
ETAP_KV_BF16, ETAP_KV_FP16, ETAP_KV_E4M3, ETAP_KV_E4M3_GROUP, ETAP_KV_E4M3_656, ETAP_KV_E4M3_528 = range(6)
ETAP_CAUSAL, ETAP_RAGGED, ETAP_BATCH_INVARIANT, ETAP_TREE_MASK, ETAP_SHARED_PREFIXES = 1, 2, 4, 8, 16
ETAP_LSE_BASE_E, ETAP_LSE_BASE_2 = 0, 1
ETAP_EMPTY_LSE_MINUS_INF, ETAP_EMPTY_LSE_PLUS_INF = 0, 1


class etap_device_info(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("usable", c_int32),
        ("num_sms", c_int32),
        ("compute_major", c_int32),
        ("compute_minor", c_int32),
        ("reserved", c_int32),
        ("l2_bytes", c_int64),
        ("name", c_char * 128),
        ("reason", c_char * 256),
    ]


class etap_problem(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("num_heads", c_int32),
        ("d_latent", c_int32),
        ("d_rope", c_int32),
        ("page_size", c_int32),
        ("q_dtype", c_int32),
        ("kv_format", c_int32),
        ("out_dtype", c_int32),
        ("batch", c_int32),
        ("max_query_len", c_int32),
        ("total_q", c_int32),
        ("flags", c_int32),
        ("num_sms", c_int32),
        ("force_tile", c_int32),
        ("force_cluster", c_int32),
        ("reserved", c_int32),
        ("topk", c_int32),
    ]


class etap_decision(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("tile_rows", c_int32),
        ("num_tiles", c_int32),
        ("cluster_size", c_int32),
        ("num_workers", c_int32),
        ("max_splits", c_int32),
        ("kernel", c_char * 64),
        ("reason", c_char * 256),
        ("max_sharers", c_int32),
    ]


class etap_plan_args(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("batch", c_int32),
        ("cache_seqlens", c_void_p),
        ("cu_seqlens_q", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("stream", c_void_p),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("block_table_columns", c_int64),
    ]


class etap_shared(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("groups", c_int32),
        ("sequences", c_int32),
        ("reserved", c_int32),
        ("tokens", c_int64),
    ]


class etap_run_args(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("batch", c_int32),
        ("q_nope", c_void_p),
        ("q_nope_row_stride", c_int64),
        ("q_nope_head_stride", c_int64),
        ("q_rope", c_void_p),
        ("q_rope_row_stride", c_int64),
        ("q_rope_head_stride", c_int64),
        ("kv_cache", c_void_p),
        ("kv_page_stride", c_int64),
        ("kv_row_stride", c_int64),
        ("num_pages", c_int64),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("softmax_scale", c_float),
        ("kv_scale", c_float),
        ("kv_scale_ptr", c_void_p),
        ("kv_group_scales", c_void_p),
        ("kv_group_scales_page_stride", c_int64),
        ("kv_group_scales_row_stride", c_int64),
        ("out", c_void_p),
        ("out_row_stride", c_int64),
        ("out_head_stride", c_int64),
        ("lse", c_void_p),
        ("lse_row_stride", c_int64),
        ("lse_head_stride", c_int64),
        ("lse_base", c_int32),
        ("empty_lse", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
        ("stream", c_void_p),
        ("block_table_columns", c_int64),
        ("slots", c_void_p),
        ("slots_stride", c_int64),
        ("tree_mask", c_void_p),
        ("tree_mask_stride", c_int64),
    ]


class etap_merge_args(ctypes.Structure):
    _fields_ = [
        ("size", c_uint32),
        ("device_type", c_int32),
        ("device_index", c_int32),
        ("num_parts", c_int32),
        ("rows", c_int32),
        ("num_heads", c_int32),
        ("d", c_int32),
        ("dtype", c_int32),
        ("lse_base", c_int32),
        ("reserved", c_int32),
        ("parts", c_void_p),
        ("parts_part_stride", c_int64),
        ("parts_row_stride", c_int64),
        ("parts_head_stride", c_int64),
        ("parts_lse", c_void_p),
        ("parts_lse_part_stride", c_int64),
        ("parts_lse_row_stride", c_int64),
        ("parts_lse_head_stride", c_int64),
        ("out", c_void_p),
        ("out_row_stride", c_int64),
        ("out_head_stride", c_int64),
        ("lse", c_void_p),
        ("lse_row_stride", c_int64),
        ("lse_head_stride", c_int64),
        ("stream", c_void_p),
    ]


# name: (result, arguments). A plan is an address; etap_plan_create writes it through byref(c_void_p()).
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "etap_status_name": (c_char_p, [c_int32]),
    "etap_status_message": (c_char_p, [c_int32]),
    "etap_last_message": (c_char_p, []),
    "etap_version": (c_int32, []),
    "etap_abi_version": (c_int32, []),
    "etap_device_count": (c_int32, [c_int32]),
    "etap_device_query": (c_int32, [c_int32, c_int32, POINTER(etap_device_info)]),
    "etap_query": (c_int32, [POINTER(etap_problem), POINTER(etap_decision)]),
    "etap_workspace_size": (c_int32, [POINTER(etap_problem), POINTER(c_size_t)]),
    "etap_plan_create": (c_int32, [POINTER(etap_problem), POINTER(c_void_p)]),
    "etap_plan_destroy": (None, [c_void_p]),
    "etap_plan_update": (c_int32, [c_void_p, POINTER(etap_plan_args)]),
    "etap_plan_shared": (c_int32, [c_void_p, c_void_p, c_size_t, c_void_p, POINTER(etap_shared)]),
    "etap_run": (c_int32, [c_void_p, POINTER(etap_run_args)]),
    "etap_merge": (c_int32, [POINTER(etap_merge_args)]),
}

Struct = TypeVar("Struct", bound=ctypes.Structure)


def new(struct: type[Struct], **fields: Any) -> Struct:
    """A struct with `size` filled in, the given fields set and all others 0."""
    return struct(size=ctypes.sizeof(struct), **fields)


def check(library: ctypes.CDLL, status: int) -> None:
    """Raises RuntimeError with the library's own message when `status` is not ETAP_OK."""
    if status != ETAP_OK:
        raise RuntimeError(f"{library.etap_last_message().decode()} ({library.etap_status_name(status).decode()})")


def load(path: str | os.PathLike[str] | None = None) -> ctypes.CDLL:
    """The library with its functions typed. `path`: default: what the environment variable ETAP_LIBRARY names, else the libetap.so beside
    this file, else the one that the system's loader finds. Raises ImportError for a library of another ABI version."""
    beside = Path(__file__).with_name("libetap.so")
    name = os.fspath(path or os.environ.get("ETAP_LIBRARY") or (beside if beside.is_file() else "libetap.so"))
    try:
        library = ctypes.CDLL(name)
        found = library.etap_abi_version()
    except (OSError, AttributeError) as failure:
        raise ImportError(f"{name} can't be loaded as libetap: {failure}") from failure
    if found != ETAP_ABI_VERSION:
        raise ImportError(f"{name} was built for version {found} of the etap interface, this file for version {ETAP_ABI_VERSION}")
    for function, (result, arguments) in FUNCTIONS.items():
        if not hasattr(library, function):
            raise ImportError(f"{name} can't be loaded as libetap: it has no function {function}")
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library
