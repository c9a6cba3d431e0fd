"""torch.ops.etap.mla_decode: opcheck, torch.compile, equality with the function."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import same_bits

import etap_py as etap

CASES = [
    Case("bf16", lens=(70, 3)),
    Case("tokens", lens=(70, 3), query_len=2, out_dtype="fp32"),
    Case("strided", lens=(70, 3), strided=True, row_gap=16, q_layout="fused"),
    Case("e4m3", lens=(70, 3), kv_format="e4m3", kv_scale_on_device=True, lse_base="2"),
    Case("ragged", lens=(70, 3), query_lens=(1, 2)),
    Case("drafts", lens=(70, 3), query_len=3, tree_mask="tree"),
    Case("no_rope", lens=(70, 3), d_rope=0, q_dtype="fp16"),
]


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    i = inputs
    positional = (i.q_nope, i.q_rope, i.kv_cache, i.block_table, i.cache_seqlens, i.softmax_scale)
    named: dict[str, Any] = {"cu_seqlens_q": i.cu_seqlens_q, "tree_mask": i.tree_mask, "kv_scale": i.kv_scale, "lse_base": i.case.lse_base}
    if i.case.out_dtype:
        named["out_dtype"] = {"fp32": torch.float32}[i.case.out_dtype]
    return positional, {key: value for key, value in named.items() if value is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_opcheck(case: Case, seed: int) -> None:
    """Schema, fake implementation and dispatch agree with what the operator does. test_utils also compares under AOT dispatch with
    dynamic shapes, which catches fake results of another shape, type or stride."""
    inputs = make_inputs(case, seed)
    if case.kv == "e4m3":  # opcheck itself multiplies tensors, which PyTorch can't do with FP8 on the CPU
        inputs = replace(inputs, kv_cache=inputs.kv_cache.view(torch.uint8))
    positional, named = arguments(inputs)
    torch.library.opcheck(torch.ops.etap.mla_decode.default, positional, named)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operator_is_the_function(case: Case, seed: int) -> None:
    inputs = make_inputs(case, seed)
    positional, named = arguments(inputs)
    out, lse = torch.ops.etap.mla_decode(*positional, **named)
    check(inputs, out, lse, reference(inputs))
    again, again_lse = etap.mla_decode(*positional[:5], softmax_scale=inputs.softmax_scale, **named)
    assert same_bits(out, again)
    assert same_bits(lse, again_lse)


def layer(q: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The operator between two operations that a compiler may fuse with others."""
    out, lse = torch.ops.etap.mla_decode(q * 2, *rest)
    return out + lse[..., None].exp().clamp(max=1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str, seed: int) -> None:
    """No graph break, and other batch sizes and lengths without a wrong result."""
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for case in (Case("first", lens=(70, 3)), Case("second", lens=(5, 130, 64))):
        positional, _ = arguments(make_inputs(case, seed))
        assert torch.equal(compiled(*positional), layer(*positional))


def test_inductor_keeps_strides(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a compiler that hands the operator other strides than the ones the fake implementation was shown."""
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Inductor needs Python's headers")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    positional, _ = arguments(make_inputs(Case("inductor", lens=(70, 3), q_layout="fused", strided=True, row_gap=16), seed))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(*positional), layer(*positional))


def test_fake_tensors(seed: int) -> None:
    """Shapes and types without memory: what compilers and planners of memory ask."""
    positional, named = arguments(make_inputs(CASES[1], seed))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in positional]
        out, lse = torch.ops.etap.mla_decode(*fake, **named)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((4, 16, 512), torch.float32, (4, 16), torch.float32)


def test_errors_pass_through(seed: int) -> None:
    positional, _ = arguments(make_inputs(CASES[0], seed))
    with pytest.raises(etap.EtapInvalidArgument, match="softmax_scale is nan"):
        torch.ops.etap.mla_decode(*positional[:5], float("nan"))
