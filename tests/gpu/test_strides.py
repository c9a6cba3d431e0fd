"""Strides that are legal but not multiples of a vector load."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import Guarded, Session, same_bits
from torch import Tensor

Supported = Callable[[Case], None]

MIXED = (3000, 17, 0, 700, 64, 1)
CASES = [
    Case("odd", lens=MIXED, heads=5),
    Case("odd_fp32", lens=MIXED, heads=5, out_dtype="fp32"),
    Case("odd_tokens_e4m3", lens=MIXED, heads=20, query_len=2, kv_format="e4m3"),
    Case("odd_page_1", lens=MIXED, page_size=1),
]


def oddly_placed(tensor: Tensor, offset: int) -> Tensor:
    """The same values in NaN-filled storage from element `offset` on, one more element between inner rows, three between outer ones."""
    strides = [1]
    for n, gap in zip(reversed(tensor.shape[1:]), (1, 3), strict=False):
        strides.insert(0, strides[0] * n + gap)
    storage = torch.full((tensor.shape[0] * strides[0] + offset,), math.nan, dtype=tensor.dtype, device=tensor.device)
    view = storage.as_strided(tensor.shape, strides, offset)
    view.copy_(tensor)
    return view


def run_into_odd_outputs(inputs: Inputs) -> None:
    session = Session(inputs)
    out, lse = inputs.outputs()
    out, lse = oddly_placed(out, 1), oddly_placed(lse, 3)
    guards = Guarded(out), Guarded(lse)
    session.update()
    session.run(out, lse)
    assert all(guard.untouched_outside() for guard in guards)
    check(inputs, out, lse, reference(inputs))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs(case: Case, seed: int, supported: Supported) -> None:
    """out and lse need no alignment beyond their type's: vector stores must not assume more."""
    supported(case)
    run_into_odd_outputs(make_inputs(case, seed, "cuda"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_queries(case: Case, seed: int, supported: Supported) -> None:
    """Strides of q that are no multiple of 16 bytes are free, as etap.h says: right, and never a misaligned load, which would cost the
    process its CUDA context. All heads of an odd row, or one part of q only."""
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    assert inputs.q_rope is not None
    nope, rope = oddly_placed(inputs.q_nope, 0), oddly_placed(inputs.q_rope, 0)
    run_into_odd_outputs(replace(inputs, q_nope=nope, q_rope=rope))
    run_into_odd_outputs(replace(inputs, q_nope=nope))
    run_into_odd_outputs(replace(inputs, q_rope=rope))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_query_strides_do_not_change_bits(case: Case, seed: int, supported: Supported) -> None:
    """The slower way of reading queries reads the same ones."""
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    assert inputs.q_rope is not None
    session = Session(inputs)
    session.update()
    want, got = inputs.outputs(), inputs.outputs()
    session.run(*want)
    session.run(*got, q_nope=oddly_placed(inputs.q_nope, 0), q_rope=oddly_placed(inputs.q_rope, 0))
    assert same_bits(want[0], got[0])
    assert same_bits(want[1], got[1])
