"""Tensors of every kind: NumPy arrays, ml_dtypes by name, DLPack objects, torch tensors; mixed in one call, and never copied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import same_bits

import etap_py as etap
from etap_py import tensors

BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same memory; types that NumPy lacks as their bits."""
    return tensor.view(BITS.get(tensor.dtype, tensor.dtype)).numpy()


def from_numpy(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(array).view(dtype)


class OnlyDLPack:
    """An array of a library that nobody has heard of."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, stream: Any = None) -> Any:
        return self.tensor.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def decode(inputs: Inputs, convert: Any, **more: Any) -> tuple[Any, Any]:
    i = inputs
    given = [None if t is None else convert(t) for t in (i.q_nope, i.q_rope, i.kv_cache, i.block_table, i.cache_seqlens)]
    for name in ("cu_seqlens_q", "kv_group_scales"):
        if getattr(i, name) is not None:
            more[name] = convert(getattr(i, name))
    more["kv_scale"] = convert(i.kv_scale) if isinstance(i.kv_scale, torch.Tensor) else i.kv_scale
    return etap.mla_decode(*given, softmax_scale=i.softmax_scale, **more)


CASES = [
    Case("bf16", strided=True, row_gap=16),
    Case("fp16", q_dtype="fp16", strided=True),
    Case("e4m3", kv_format="e4m3", kv_scale_on_device=True),
    Case("group", kv_format="e4m3_group", strided=True),
    Case("rows_of_656", kv_format="e4m3_656"),
    Case("ragged", query_lens=(1, 3, 2), lens=(80, 5, 300)),
    Case("no_rope", d_rope=0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numpy(case: Case, seed: int) -> None:
    """uint16 stands for BF16, uint8 for E4M3. Results are NumPy arrays, BF16 again as uint16."""
    inputs = make_inputs(case, seed)
    more = {"q_dtype": "bf16"} if case.q_dtype == "bf16" else {}
    out, lse = decode(inputs, to_numpy, **more)
    assert isinstance(out, np.ndarray)
    assert (out.dtype, lse.dtype) == (np.uint16 if case.out == "bf16" else np.float16, np.float32)
    check(inputs, from_numpy(out, inputs.q_nope.dtype), torch.from_numpy(lse), reference(inputs))


@pytest.mark.parametrize("case", [c for c in CASES if "e4m3" not in c.kv], ids=lambda case: case.name)
def test_dlpack(case: Case, seed: int) -> None:
    """Objects that offer nothing but __dlpack__; outputs are torch tensors of ours that we hand over likewise."""
    inputs = make_inputs(case, seed)
    out, lse = inputs.outputs()
    given = decode(inputs, OnlyDLPack, out=OnlyDLPack(out), lse=OnlyDLPack(lse))
    assert given[0].tensor is out
    check(inputs, out, lse, reference(inputs))


def test_dlpack_allocates_numpy(seed: int) -> None:
    inputs = make_inputs(Case("allocate", q_dtype="fp16"), seed)
    out, lse = decode(inputs, OnlyDLPack)
    assert isinstance(out, np.ndarray)
    check(inputs, torch.from_numpy(out), torch.from_numpy(lse), reference(inputs))


def test_kinds_mix(seed: int) -> None:
    """Queries of torch, a cache of NumPy, a table behind DLPack: what a call gets is memory, not a library."""
    inputs = make_inputs(Case("mixed", kv_format="e4m3"), seed)
    want, _ = decode(inputs, lambda t: t)
    out, _ = etap.mla_decode(
        inputs.q_nope,
        OnlyDLPack(inputs.q_rope),
        to_numpy(inputs.kv_cache),
        OnlyDLPack(inputs.block_table),
        to_numpy(inputs.cache_seqlens),
        softmax_scale=inputs.softmax_scale,
        kv_scale=inputs.kv_scale,
    )
    assert same_bits(want, out)


@pytest.mark.parametrize("kind", [lambda t: t, OnlyDLPack], ids=["torch", "dlpack"])
def test_view_of_torch(kind: Any) -> None:
    tensor = torch.zeros(4, 6, 8, dtype=torch.bfloat16)[1:, ::2, :5]
    view = tensors.view("x", kind(tensor))
    assert view[:5] == (tensor.data_ptr(), (3, 3, 5), (48, 16, 1), "bf16", "cpu")


def test_view_of_numpy() -> None:
    array = np.zeros((4, 6), np.float32)[1:, ::3]
    assert tensors.view("x", array)[:5] == (array.ctypes.data, (3, 2), (6, 3), "fp32", "cpu")
    record = np.zeros(3, dtype=[("a", np.float32), ("b", np.int16)])
    with pytest.raises(ValueError, match=r"x has strides of \[6\] bytes; allowed: multiples of its 4-byte elements"):
        tensors.view("x", record["a"])


def test_view_of_contiguous_dlpack() -> None:
    """DLPack allows strides to be left out; NumPy always gives them, so that the struct is made by hand here."""
    import ctypes

    data = np.arange(6, dtype=np.int32)
    shape = (ctypes.c_int64 * 2)(2, 3)
    struct = tensors._DLTensor(data=data.ctypes.data - 4, device_type=1, ndim=2, code=0, bits=32, lanes=1, shape=shape, byte_offset=4)
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

    class ByHand:
        def __dlpack__(self) -> Any:
            return new_capsule(ctypes.addressof(struct), b"dltensor", None)

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    assert tensors.view("x", ByHand())[:5] == (data.ctypes.data, (2, 3), (3, 1), "int32", "cpu")


def test_other_devices_are_refused() -> None:
    class OnTpu:
        def __dlpack__(self) -> Any:
            raise AssertionError("must not be asked for")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (17, 0)

    with pytest.raises(ValueError, match=r"x is on a device of DLPack type 17; allowed: CPU \(1\) and CUDA \(2\)"):
        tensors.view("x", OnTpu())


def test_names_of_types() -> None:
    class MlDtype:  # ml_dtypes is no requirement: its types are known by their names
        name = "float8_e4m3fn"

    assert tensors.dtype_name(MlDtype()) == "e4m3"
    names = [torch.bfloat16, torch.float16, np.float32, np.dtype("uint16"), "bf16", "e4m3_group", torch.float64]
    assert [tensors.dtype_name(t) for t in names] == ["bf16", "fp16", "fp32", "uint16", "bf16", "e4m3_group", "float64"]


def test_bits_without_a_type_are_refused(seed: int) -> None:
    """uint16 may be BF16 or FP16: a guess would give numbers, and wrong ones."""
    inputs = make_inputs(Case("bits"), seed)
    with pytest.raises(ValueError, match="q_nope has type uint16; say with q_dtype whether its bits are 'bf16' or 'fp16'"):
        decode(inputs, to_numpy)


def test_uint16_and_torch_give_equal_bits(seed: int) -> None:
    inputs = make_inputs(Case("equal", lens=(300, 64)), seed)
    want, want_lse = decode(inputs, lambda t: t)
    out, lse = decode(inputs, to_numpy, q_dtype="bf16")
    assert same_bits(want, from_numpy(out, torch.bfloat16))
    assert same_bits(want_lse, torch.from_numpy(lse))


def test_read_only_arrays_can_be_inputs(seed: int) -> None:
    """A memory-mapped cache is often read-only: inputs are only read."""
    inputs = make_inputs(Case("read_only", lens=(70,)), seed)

    def frozen(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
        array = to_numpy(tensor).view()
        array.flags.writeable = False
        return array

    out, lse = decode(inputs, frozen, q_dtype="bf16")
    check(inputs, from_numpy(out, torch.bfloat16), torch.from_numpy(lse), reference(replace(inputs)))
