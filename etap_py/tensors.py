"""Tensors as the library sees them: a pointer (0 where there are no elements), a shape, strides in elements, a type, a device. Nothing
is ever copied.

Taken are torch tensors, NumPy arrays and every object with `__dlpack__`. NumPy has no BF16 or FP8 of its own: arrays of ml_dtypes'
types are known by name, and uint16 (uint8) arrays stand for the bits of whatever 16-bit (8-bit) type the problem asks for.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# A torch.Tensor, a numpy.ndarray or an object with __dlpack__.
Tensor = Any

# Names that tensor libraries use, to those of the problem's fields.
_DTYPE_NAMES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float8_e4m3fn": "e4m3",
    "uint8": "uint8",
    "uint16": "uint16",
    "int32": "int32",
}
ITEM_BYTES = {"bf16": 2, "fp16": 2, "uint16": 2, "e4m3": 1, "uint8": 1}  # of the types of queries and caches
_BITS = {"bf16": "uint16", "fp16": "uint16", "e4m3": "uint8"}  # the integer type that may stand for a type's bits


class View(NamedTuple):
    """One tensor. `keep` is what keeps its memory alive."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: str  # "cpu", "cuda:0"
    keep: object


def dtype_name(dtype: object) -> str:
    """ "bf16" for "bf16", torch.bfloat16, ml_dtypes.bfloat16, numpy.dtype("bfloat16"); the library's own name for unknown ones."""
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).removeprefix("torch.")
    return _DTYPE_NAMES.get(name, name)


def view(name: str, tensor: Tensor) -> View:
    """The view of an argument called `name`, which may be one already."""
    if isinstance(tensor, View):
        return tensor
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        pointer, (shape, strides, dtype, device), keep = locate(name, tensor)
        return View(pointer, shape, strides, _dtype_of[dtype], _device_of[device], keep)
    if isinstance(tensor, np.ndarray):
        return _numpy_view(name, tensor)
    if hasattr(tensor, "__dlpack__"):
        return _dlpack_view(name, tensor)
    raise TypeError(f"{name} is a {type(tensor).__name__}; allowed: torch tensors, NumPy arrays and objects with __dlpack__")


def locate(name: str, tensor: Tensor) -> tuple[int, Any, object]:
    """Where the memory of an argument called `name` begins, everything else that a view of it says as a key to look up, and what keeps the
    memory alive. As `view`, but for torch tensors without its cost."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        if tensor.is_neg():
            raise ValueError(f"{name} has a pending negation; allowed: values as they are in memory, as {name}.resolve_neg() gives them")
        try:
            return tensor.data_ptr(), (tensor.shape, tensor.stride(), tensor.dtype, tensor.device), tensor
        except RuntimeError as failure:  # a sparse tensor, for one
            raise ValueError(f"{name} has no memory of its own ({failure}); allowed: tensors of layout torch.strided") from failure
    got = view(name, tensor)
    return got.pointer, got[1:5], got.keep


def check(name: str, got: View, shape: tuple[int | None, ...] | None, dtype: str | None, device: str | None) -> View:
    """Raises a sentence when the view is not as expected: None is anything, in a shape too. The innermost stride must be 1."""
    if shape is not None and got.shape != shape and not _matches(got.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(got.shape)}; allowed: [{wanted}]")
    if dtype is not None and got.dtype != dtype and got.dtype != _BITS.get(dtype):
        raise ValueError(f"{name} has type {got.dtype}; allowed: {dtype}")
    if device is not None and got.device != device:
        raise ValueError(f"{name} is on {got.device}; allowed: {device}, the device of the problem")
    if got.shape and got.strides[-1] != 1 and got.shape[-1] > 1 and 0 not in got.shape:
        raise ValueError(f"{name} has an innermost stride of {got.strides[-1]} elements; allowed: 1")
    return got


def _matches(shape: tuple[int, ...], pattern: tuple[int | None, ...]) -> bool:
    if len(shape) != len(pattern):
        return False
    for have, want in zip(shape, pattern, strict=True):  # noqa: SIM110 - all() with a generator takes three times as long
        if have != want and want is not None:
            return False
    return True


def empty(like: Tensor, device: str, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...] | None = None) -> Tensor:
    """A new tensor of the same library as `like`, which is on `device`. NumPy gets uint16 bits for BF16 unless `like` has ml_dtypes'
    type. For other libraries: NumPy on the CPU, torch on CUDA. Strides, where given, are those of a permutation of the shape."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        if strides is None:
            return like.new_empty(shape, dtype=_TORCH_DTYPES[dtype](torch))
        return like.new_empty_strided(shape, strides, dtype=_TORCH_DTYPES[dtype](torch))
    if device != "cpu":
        made = cuda_empty(shape, dtype, device)
        return made if strides is None else made.as_strided(shape, strides)
    if dtype == "bf16":
        own = like.dtype if isinstance(like, np.ndarray) else None
        array = np.empty(shape, own if own is not None and dtype_name(own) == "bf16" else np.uint16)
    else:
        array = np.empty(shape, {"fp16": np.float16, "fp32": np.float32, "uint8": np.uint8}[dtype])
    return array if strides is None else np.lib.stride_tricks.as_strided(array, shape, [array.itemsize * stride for stride in strides])


def address(made: Tensor) -> int:
    """Where a tensor that `empty` made begins."""
    pointer: int = made.ctypes.data if isinstance(made, np.ndarray) else made.data_ptr()
    return pointer


def cuda_empty(shape: tuple[int, ...], dtype: str, device: str) -> Tensor:
    """A new torch tensor on a CUDA device."""
    try:
        import torch
    except ImportError as failure:
        raise ImportError(f"memory on {device} is allocated with PyTorch, which is not installed: pass workspace, out and lse") from failure
    return torch.empty(shape, dtype=_TORCH_DTYPES[dtype](torch), device=device)


def cpu_workspace(num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Host memory aligned as the library wants it; NumPy aligns to 16 bytes only."""
    alignment = 256
    raw = np.empty(num_bytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + num_bytes]


_TORCH_DTYPES = {
    "bf16": lambda torch: torch.bfloat16,
    "fp16": lambda torch: torch.float16,
    "fp32": lambda torch: torch.float32,
    "uint8": lambda torch: torch.uint8,
}


class _Names(dict[Any, str]):
    """torch.dtype and torch.device objects to names, filled as they come: to make the name costs more than the rest of a view."""

    def __init__(self, make: Callable[[Any], str]) -> None:
        self.make = make

    def __missing__(self, key: Any) -> str:
        name = self[key] = self.make(key)
        return name


_dtype_of = _Names(dtype_name)
_device_of = _Names(str)


def _numpy_view(name: str, array: np.ndarray[Any, Any]) -> View:
    size = array.itemsize
    strides = tuple(s // size for s in array.strides)
    if any(s % size for s in array.strides):
        raise ValueError(f"{name} has strides of {list(array.strides)} bytes; allowed: multiples of its {size}-byte elements")
    return View(array.ctypes.data if array.size else 0, array.shape, strides, dtype_name(array.dtype), "cpu", array)


# ---- DLPack ----------------------------------------------------------------------------------------------------------
# The structs of dlpack.h, as far as they are read here.


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # NULL: contiguous
        ("byte_offset", ctypes.c_uint64),
    ]


_DL_CPU, _DL_CUDA, _DL_CUDA_HOST, _DL_CUDA_MANAGED = 1, 2, 3, 13
_DL_DTYPES = {  # (code, bits)
    (0, 32): "int32",
    (1, 8): "uint8",
    (1, 16): "uint16",
    (2, 16): "fp16",
    (2, 32): "fp32",
    (4, 16): "bf16",
    (10, 8): "e4m3",  # kDLFloat8_e4m3fn
}
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _dlpack_view(name: str, tensor: Any) -> View:
    """The capsule is read, not consumed: it frees the producer's struct when the view lets go of it."""
    device_type, device_id = tensor.__dlpack_device__()
    if device_type in (_DL_CPU, _DL_CUDA_HOST):
        capsule, device = tensor.__dlpack__(), "cpu"
    elif device_type in (_DL_CUDA, _DL_CUDA_MANAGED):
        device = f"cuda:{device_id}"
        stream = current_stream(device)
        capsule = tensor.__dlpack__(stream=stream or 1)  # 1: the legacy default stream
    else:
        raise ValueError(f"{name} is on a device of DLPack type {int(device_type)}; allowed: CPU ({_DL_CPU}) and CUDA ({_DL_CUDA})")
    dl = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(dl.shape[: dl.ndim])
    contiguous = (math.prod(shape[i + 1 :]) for i in range(dl.ndim))
    strides = tuple(dl.strides[: dl.ndim]) if dl.strides else tuple(contiguous)
    dtype = _DL_DTYPES.get((dl.code, dl.bits), f"DLPack type ({dl.code}, {dl.bits} bits)")
    pointer = 0 if 0 in shape else (dl.data or 0) + dl.byte_offset
    return View(pointer, shape, strides, dtype, device, capsule)


def current_stream(device: str) -> int:
    """torch's current stream on a CUDA device as a cudaStream_t; 0, the default stream, without torch and on the CPU."""
    torch = sys.modules.get("torch")
    if torch is None or device == "cpu":
        return 0
    stream: int = torch.cuda.current_stream(int(device.removeprefix("cuda:"))).cuda_stream
    return stream
