"""One signature and one set of checks: `Plan.run`, `mla_decode` and the operator take and refuse the same."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import Guarded, Session, problem_of, same_bits

import etap_py as etap
from etap_py import tensors


def parameters(function: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "self"}


def test_one_signature() -> None:
    """Guards: an option of `Plan.run` that the one-call function or the operator lacks, or has with another default."""
    run, call, sparse = parameters(etap.Plan.run), parameters(etap.mla_decode), parameters(etap.mla_decode_sparse)
    assert {name: call.get(name, "missing") for name in run if name != "slots"} == {name: run[name] for name in run if name != "slots"}
    lists = {"slots": inspect.Parameter.empty, "slot_counts": None}  # in place of block_table and cache_seqlens
    dense = {"block_table", "cache_seqlens", "cu_seqlens_q", "max_query_len", "causal", "tree_mask", "shared_prefixes"}
    assert sparse == lists | {name: call[name] for name in call if name not in dense}
    # A plan of lists can do without lengths, and only one that shares prefixes needs the table.
    update = parameters(etap.Plan.update) | dict.fromkeys(("cache_seqlens", "block_table"), inspect.Parameter.empty)
    assert {name: call.get(name, "missing") for name in update} == update
    function_only = {"q_dtype", "out", "lse", "return_lse", "stream"}  # of arrays; results are allocated; torch's stream
    for operator, function in ((torch.ops.etap.mla_decode, call), (torch.ops.etap.mla_decode_sparse, sparse)):
        schema = {argument.name: argument for argument in operator.default._schema.arguments}
        assert set(schema) == set(function) - function_only
        for name, argument in schema.items():
            if argument.has_default_value() and name != "empty_lse":  # a schema has no way to write -inf
                assert argument.default_value == function[name], name


def call(i: Inputs, q_nope: Any, q_rope: Any, **more: Any) -> tuple[Any, Any]:
    return etap.mla_decode(q_nope, q_rope, i.kv_cache, i.block_table, i.cache_seqlens, softmax_scale=i.softmax_scale, **more)


@pytest.mark.parametrize("d_latent", [512, 256])
@pytest.mark.parametrize("tokens", [1, 2])
def test_fused_queries(d_latent: int, tokens: int, seed: int) -> None:
    """Guards: queries with both parts in one tensor, which `Plan.run` takes and the others refused as (576, 0)."""
    inputs = make_inputs(Case("fused", lens=(70, 3), query_len=tokens, d_latent=d_latent, q_layout="fused"), seed)
    assert inputs.q_rope is not None
    both = torch.cat([inputs.q_nope, inputs.q_rope], -1)
    out, lse = call(inputs, both, None)
    check(inputs, out, lse, reference(inputs))
    session = Session(inputs)
    session.update()
    planned = inputs.outputs()
    session.run(*planned, q_nope=both, q_rope=None)
    operator = torch.ops.etap.mla_decode(both, None, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, inputs.softmax_scale)
    for other in (planned[0], operator[0]):
        assert same_bits(out, other)
    four, _ = call(inputs, both.unflatten(0, (2, tokens)), None)
    assert four.shape == (2, tokens, 16, d_latent)
    assert same_bits(out, four.flatten(0, 1))
    if tokens == 1:
        arguments = (both, None, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens, inputs.softmax_scale)
        torch.library.opcheck(torch.ops.etap.mla_decode.default, arguments, {"lse_heads_first": True, "empty_lse": math.inf})


def test_options(seed: int) -> None:
    """Guards: options that are taken and then lost on the way."""
    inputs = make_inputs(Case("options", lens=(70, 0), query_len=2), seed)
    out, lse = call(inputs, inputs.q_nope, inputs.q_rope)
    positional = (inputs.q_nope, inputs.q_rope, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    options = {"lse_heads_first": True, "empty_lse": math.inf, "lse_base": "2"}
    theirs = torch.ops.etap.mla_decode(*positional, inputs.softmax_scale, **options)
    for other, other_lse in (call(inputs, inputs.q_nope, inputs.q_rope, **options), theirs):
        assert same_bits(out, other)
        assert other_lse.shape == (16, 4)
        assert other_lse.stride() == (1, 16)
        assert (other_lse[:, 2:] == math.inf).all()
        torch.testing.assert_close(other_lse[:, :2].T, lse[:2] / math.log(2))


SCALES = [
    0.25,
    np.float32(0.25),
    np.float64(0.25),
    np.float16(0.25),
    np.array(0.25, np.float32),
    np.array([[0.25]], np.float32),
    torch.tensor(0.25),
    torch.full((1, 1), 0.25),
    torch.full((1, 1, 1, 1), 0.25),
]


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: f"{type(scale).__name__}{list(getattr(scale, 'shape', ()))}")
def test_scales(scale: Any, seed: int) -> None:
    """Guards: one number in another form than the one that was tried: NumPy's scalars, tensors [1, 1] as servers keep them."""
    inputs = make_inputs(Case("scale", lens=(70, 3), kv_format="e4m3", kv_scale=0.25), seed)
    want, _ = call(inputs, inputs.q_nope, inputs.q_rope, kv_scale=0.25)
    out, _ = call(inputs, inputs.q_nope, inputs.q_rope, kv_scale=scale)
    assert same_bits(want, out)
    if isinstance(scale, torch.Tensor):
        tensors_of = (inputs.q_nope, inputs.q_rope, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
        out, _ = torch.ops.etap.mla_decode(*tensors_of, inputs.softmax_scale, kv_scale=scale)
        assert same_bits(want, out)


@pytest.mark.parametrize(
    ("scale", "sentence"),
    [
        (torch.ones(2), r"kv_scale has shape \[2\]; allowed: one element"),
        (torch.ones(1, 0), r"kv_scale has shape \[1, 0\]; allowed: one element"),
        (torch.ones(1).double(), "kv_scale has type float64; allowed: fp32"),
        (np.float32(0), "kv_scale is 0; allowed: other numbers"),
        ("1", "kv_scale is a str; allowed: torch tensors"),
        (math.nan, "kv_scale is nan; it must be finite"),
    ],
    ids=str,
)
def test_bad_scales(scale: Any, sentence: str, seed: int) -> None:
    inputs = make_inputs(Case("scale", lens=(70, 3), kv_format="e4m3"), seed)
    with pytest.raises((ValueError, TypeError), match=sentence):
        call(inputs, inputs.q_nope, inputs.q_rope, kv_scale=scale)


NUMPY_NUMBERS = [("softmax_scale", np.float32(0.05)), ("softmax_scale", np.float64(0.05)), ("num_sms", np.int64(1))]


@pytest.mark.parametrize(("name", "number"), NUMPY_NUMBERS, ids=str)
def test_numbers_of_numpy(name: str, number: Any, seed: int) -> None:
    inputs = make_inputs(Case("number", lens=(70, 3)), seed)
    given = {"softmax_scale": 0.05}
    i = inputs
    tensors_of = (i.q_nope, i.q_rope, i.kv_cache, i.block_table, i.cache_seqlens)
    want, _ = etap.mla_decode(*tensors_of, **{**given, name: number.item()})
    out, _ = etap.mla_decode(*tensors_of, **{**given, name: number})
    assert same_bits(want, out)


def unfinished(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(tensor)


@pytest.mark.parametrize("name", ["q_nope", "q_rope", "kv_cache", "kv_group_scales", "block_table", "out", "lse"])
def test_pending_negation(name: str, seed: int) -> None:
    """Guards: tensors whose memory holds the negated values, read (or written) without the sign, in every argument; the first call with a
    layout and the later ones, which skip the checks."""
    kv_format = "bf16" if name == "kv_cache" else "e4m3_group"  # PyTorch has no negation of E4M3
    inputs = make_inputs(Case("negated", lens=(70, 3), kv_format=kv_format), seed)
    session = Session(inputs)
    session.update()
    out, lse = inputs.outputs()
    given = {**vars(inputs), "out": out, "lse": lse}
    tensor = given[name]
    guards = [Guarded(out), Guarded(lse)]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} has a pending negation; allowed: values as they are in memory"):
            session.run(**{"out": out, "lse": lse, name: unfinished(tensor)})
        assert all(guard.untouched() for guard in guards)
        session.run(out, lse)
        check(inputs, out, lse, reference(inputs))
        out, lse = inputs.outputs()
        guards = [Guarded(out), Guarded(lse)]


def test_pending_negation_elsewhere(seed: int) -> None:
    """Through the function, in an update, in a merge; resolved it is right, and the operator's dispatcher resolves it itself."""
    i = make_inputs(Case("negated", lens=(70, 3)), seed)
    want, _ = call(i, -i.q_nope, i.q_rope)
    with pytest.raises(ValueError, match="q_nope has a pending negation"):
        call(i, unfinished(i.q_nope), i.q_rope)
    out, _ = call(i, unfinished(i.q_nope).resolve_neg(), i.q_rope)
    assert same_bits(want, out)
    operator = torch.ops.etap.mla_decode(unfinished(i.q_nope), i.q_rope, i.kv_cache, i.block_table, i.cache_seqlens, i.softmax_scale)
    assert same_bits(want, operator[0])
    with pytest.raises(ValueError, match="cache_seqlens has a pending negation"):
        etap.Plan(problem_of(i.case, "cpu")).update(unfinished(i.cache_seqlens))
    parts, lse = torch.randn(2, 3, 4, 64), torch.randn(2, 3, 4)
    for arguments, name in (((unfinished(parts), lse), "parts"), ((parts, unfinished(lse)), "parts_lse")):
        with pytest.raises(ValueError, match=f"{name} has a pending negation"):
            etap.merge(*arguments)
    imaginary = torch.randn(3, dtype=torch.complex64).conj().imag  # how such views come about
    with pytest.raises(ValueError, match="x has a pending negation"):
        tensors.view("x", imaginary)


def test_tensors_without_memory(seed: int) -> None:
    """Guards: an error of PyTorch's that names no argument."""
    i = make_inputs(Case("sparse", lens=(70, 3)), seed)
    with pytest.raises(ValueError, match=re.escape("q_nope has no memory of its own (") + ".*allowed: tensors of layout torch.strided"):
        call(i, i.q_nope.to_sparse(), i.q_rope)
    session = Session(i)
    session.update()
    with pytest.raises(ValueError, match="kv_cache has no memory of its own"):
        session.run(*i.outputs(), kv_cache=i.kv_cache.to_sparse())
    zeros = torch._efficientzerotensor(tuple(i.kv_cache.shape), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="kv_cache is NULL and num_pages is"):
        session.run(*i.outputs(), kv_cache=zeros)
    with pytest.raises(ValueError, match="q_nope is NULL"):
        session.run(*i.outputs(), q_nope=torch._efficientzerotensor(tuple(i.q_nope.shape), dtype=torch.bfloat16))


def test_views_of_kv_scale(seed: int) -> None:
    """A scale within a table of scales of all layers."""
    i = make_inputs(Case("scale", lens=(70, 3), kv_format="e4m3", kv_scale=0.25), seed)
    table = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    want, _ = call(i, i.q_nope, i.q_rope, kv_scale=0.25)
    out, _ = call(replace(i), i.q_nope, i.q_rope, kv_scale=table[:1, 1:])
    assert same_bits(want, out)
