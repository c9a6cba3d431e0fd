"""The public Python API: questions, plans, the one-call function, and the sentences that bad calls get."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import Guarded, Session, poisoned_workspace, problem_of, same_bits, solve

import etap_py as etap
from etap_py import decode


def one_call(inputs: Inputs, **overrides: Any) -> tuple[Any, Any]:
    i = inputs
    tensors = (i.q_nope, i.q_rope, i.kv_cache, i.block_table, i.cache_seqlens)
    return etap.mla_decode(
        *tensors,
        **{
            "softmax_scale": i.softmax_scale,
            "causal": i.case.causal,
            "cu_seqlens_q": i.cu_seqlens_q,
            "kv_scale": i.kv_scale,
            "kv_group_scales": i.kv_group_scales,
            "out_dtype": i.case.out,
            "lse_base": i.case.lse_base,
            "empty_lse": i.case.empty_lse,
            **overrides,
        },
    )


# ---- Questions ----


def test_device_info() -> None:
    cpu = etap.device_info("cpu")
    assert cpu.usable
    assert not cpu.reason
    assert cpu.num_sms >= 1
    assert cpu.name.startswith("cpu")
    assert etap.device_count("cpu") == 1
    with pytest.raises(ValueError, match="device_type is 'tpu'; allowed: 'cpu', 'cuda'"):
        etap.device_info("tpu")


def test_unusable_cuda_has_a_reason() -> None:
    cuda = etap.device_info("cuda")
    if cuda.usable:
        pytest.skip("the CUDA device is usable here")
    assert "CUDA" in cuda.reason
    with pytest.raises(etap.EtapError, match="CUDA") as refusal:
        etap.query(etap.Problem(num_heads=16, batch=1, device="cuda"))
    assert refusal.value.name == "ETAP_NO_DEVICE"


def test_problem_defaults() -> None:
    problem = etap.Problem(num_heads=16, batch=2, q_dtype="fp16")
    assert (problem.kv_format, problem.out_dtype, problem.rows, problem.kv_width) == ("fp16", "fp16", 2, 576)
    assert etap.Problem(num_heads=1, batch=1, q_dtype=torch.bfloat16, out_dtype=np.dtype("float32")).out_dtype == "fp32"
    assert etap.Problem(num_heads=1, batch=1, device=torch.device("cuda:3")).device == "cuda:3"
    assert etap.Problem(num_heads=1, batch=4, max_query_len=3, total_q=7).rows == 7


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("q_dtype", "fp64", "q_dtype is 'fp64'; allowed: 'bf16', 'fp16'"),
        ("q_dtype", "fp32", "q_dtype is 'fp32'; allowed: 'bf16', 'fp16'"),
        ("out_dtype", "int8", "out_dtype is 'int8'; allowed: 'bf16', 'fp16', 'fp32'"),
        ("kv_format", "int8", "kv_format is 'int8'; allowed: 'bf16', 'fp16', 'e4m3', 'e4m3_group', 'e4m3_656', 'e4m3_528'"),
        ("device", "tpu", "device is 'tpu'; allowed: 'cpu', 'cuda'"),
        ("device", "cuda:x", "device is 'cuda:x'; allowed: 'cpu', 'cuda', 'cuda:0'"),
    ],
)
def test_unknown_names(field: str, value: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        etap.Problem(**{"num_heads": 16, "batch": 1, field: value})


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("num_heads", 0, "num_heads is 0; allowed: 1 to 128"),
        ("num_heads", 129, "num_heads is 129; allowed: 1 to 128"),
        ("batch", 0, "batch is 0; allowed: 1 to 65536"),
        ("batch", 65537, "batch is 65537; allowed: 1 to 65536"),
        ("page_size", 0, "page_size is 0; allowed: a power of two from 1 to 256"),
        ("page_size", 3, "page_size is 3; allowed: a power of two from 1 to 256"),
        ("page_size", 512, "page_size is 512; allowed: a power of two from 1 to 256"),
        ("d_latent", 128, r"\(d_latent, d_rope\) is \(128, 64\); allowed: \(512, 64\), \(512, 0\), \(256, 64\)"),
        ("kv_format", "fp16", "q_dtype is 0 and kv_format is 1; a 16-bit KV cache must have the type of q"),
        ("max_query_len", 0, "max_query_len is 0"),
        ("num_sms", -1, "num_sms is -1"),
        ("force_tile", 12, "force_tile is 12; allowed: 0 or a multiple of 8"),
    ],
)
def test_refused_problems(field: str, value: Any, sentence: str) -> None:
    """query, workspace_size and Plan refuse alike, with the argument, its value and what is allowed."""
    problem = etap.Problem(**{"num_heads": 16, "batch": 1, field: value})
    for ask in (etap.query, etap.workspace_size, etap.Plan):
        with pytest.raises(etap.EtapInvalidArgument, match=sentence) as refusal:
            ask(problem)
        assert refusal.value.name == "ETAP_INVALID_ARGUMENT"
        assert isinstance(refusal.value, ValueError)


def test_workspace_never_shrinks(seed: int) -> None:
    """One workspace, sized for the largest batch of a captured graph, must serve all smaller ones."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        small = etap.Problem(
            num_heads=int(rng.integers(1, 129)),
            batch=int(rng.integers(1, 300)),
            max_query_len=int(rng.integers(1, 5)),
            num_sms=int(rng.integers(1, 3)),
            kv_format=str(rng.choice(["bf16", "e4m3"])),
        )
        for growth in ({"batch": small.batch + int(rng.integers(1, 100))}, {"num_sms": small.num_sms + 1}):
            assert etap.workspace_size(replace(small, **growth)) >= etap.workspace_size(small), (small, growth)


def test_errors_travel_between_processes() -> None:
    """Servers hand exceptions from worker to parent: one that can't be unpickled hides the sentence behind a TypeError."""
    with pytest.raises(etap.EtapInvalidArgument) as refusal:
        etap.query(etap.Problem(num_heads=0, batch=1))
    arrived = pickle.loads(pickle.dumps(refusal.value))
    assert type(arrived) is etap.EtapInvalidArgument
    assert (str(arrived), arrived.status, arrived.name) == (str(refusal.value), 1, "ETAP_INVALID_ARGUMENT")


# ---- Plan ----


def test_plan_serves_layers_and_steps(seed: int) -> None:
    """One update for all layers of a step, one plan for all steps: lengths change in place."""
    plan_inputs = make_inputs(Case("steps", lens=(130, 64, 7), heads=12), seed)
    session = Session(plan_inputs)
    for step in range(3):
        session.update()
        for layer in range(2):
            inputs = replace(
                plan_inputs, q_nope=torch.randn_like(plan_inputs.q_nope) * (layer + 1), cache_seqlens=plan_inputs.cache_seqlens
            )
            out, lse = inputs.outputs()
            session.run(out, lse, q_nope=inputs.q_nope)
            check(inputs, out, lse, reference(inputs))
        plan_inputs.cache_seqlens.sub_(torch.tensor([60, step, 3], dtype=torch.int32))


def test_results_are_allocated(seed: int) -> None:
    inputs = make_inputs(Case("allocated", lens=(70, 0), query_len=2, out_dtype="fp32"), seed)
    plan = etap.Plan(problem_of(inputs.case, "cpu"))
    plan.update(inputs.cache_seqlens)
    tensors = (inputs.q_nope, inputs.q_rope, inputs.kv_cache, inputs.block_table)
    out, lse = plan.run(*tensors, softmax_scale=inputs.softmax_scale)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    check(inputs, out, lse, reference(inputs))
    out_only, none = plan.run(*tensors, softmax_scale=inputs.softmax_scale, return_lse=False)
    assert none is None
    assert same_bits(out, out_only)


def test_four_dimensional_queries(seed: int) -> None:
    """[batch, query tokens, heads, d] and a KV cache with a head dimension, as servers have them."""
    inputs = make_inputs(Case("four", lens=(70, 3, 200), query_len=2), seed)
    expected = reference(inputs)
    four = replace(
        inputs,
        q_nope=inputs.q_nope.unflatten(0, (3, 2)),
        q_rope=inputs.q_rope.unflatten(0, (3, 2)),
        kv_cache=inputs.kv_cache.unsqueeze(2),
    )
    out, lse = one_call(four)
    assert (out.shape, lse.shape) == ((3, 2, 16, 512), (3, 2, 16))
    check(inputs, out.flatten(0, 1), lse.flatten(0, 1), expected)
    apart = torch.zeros(3, 5, 16, 512, dtype=torch.bfloat16)[:, :2]
    with pytest.raises(ValueError, match=r"q_nope has strides \[40960, 8192, 512, 1\]; allowed: a first one of 16384, 2 times the second"):
        one_call(replace(four, q_nope=apart))


def test_views_are_not_copied(seed: int) -> None:
    """A pool's view goes through as it is: writing into the pool changes the next result."""
    inputs = make_inputs(Case("views", lens=(64,), row_gap=64, page_gap=4096, strided=True), seed)
    before, _ = one_call(inputs)
    inputs.kv_cache[int(inputs.block_table[0, 0])].zero_()
    after, _ = one_call(inputs)
    assert (before != 0).any()
    assert (after == 0).all()


def test_one_call_equals_plan(seed: int) -> None:
    for case in (
        Case("uniform", query_len=2),
        Case("ragged", query_lens=(1, 3, 0), lens=(80, 5, 300)),
        Case("e4m3", kv_format="e4m3", lse_base="2", out_dtype="fp32"),
        Case("group", kv_format="e4m3_group"),
        Case("rows_of_656", kv_format="e4m3_656"),
        Case("fp16_no_rope", q_dtype="fp16", d_rope=0),
    ):
        inputs = make_inputs(case, seed)
        out, lse = one_call(inputs)
        planned_out, planned_lse = solve(inputs)
        assert same_bits(out, planned_out), case.name
        assert same_bits(lse, planned_lse), case.name


def test_plan_cache_is_bounded(seed: int) -> None:
    """A server that meets ever new shapes must not keep a plan of each."""
    inputs = make_inputs(Case("bounded", lens=(3,), page_size=1), seed)
    kept = decode._c_plan.cache_info().maxsize
    assert kept is not None
    for n in range(kept + 20):
        one_call(inputs, num_sms=n + 1)
    assert decode._c_plan.cache_info().currsize <= kept


def test_given_workspace(seed: int) -> None:
    """A larger workspace serves; a smaller or misaligned one gets the library's sentence, and outputs stay untouched."""
    inputs = make_inputs(Case("workspace"), seed)
    problem = problem_of(inputs.case, "cpu")
    larger = poisoned_workspace(replace(problem, batch=100, num_heads=128))
    assert len(larger) > etap.workspace_size(problem)
    plan = etap.Plan(problem, workspace=larger)
    plan.update(inputs.cache_seqlens)
    short = poisoned_workspace(problem)[:-1]
    with pytest.raises(etap.EtapError, match=rf"workspace_bytes is {len(short)}; allowed: at least {len(short) + 1}") as refusal:
        etap.Plan(problem, workspace=short).update(inputs.cache_seqlens)
    assert refusal.value.name == "ETAP_WORKSPACE_TOO_SMALL"
    with pytest.raises(ValueError, match="workspace is .*; it must be aligned to 256 bytes"):
        etap.Plan(problem, workspace=larger[8:]).update(inputs.cache_seqlens)


# ---- Bad calls: a sentence each, and untouched outputs ----


BAD_RUNS: dict[str, tuple[Callable[[Inputs], dict[str, Any]], str]] = {
    "no tensor": (lambda i: {"q_nope": [1, 2]}, "q_nope is a list; allowed: torch tensors, NumPy arrays and objects with __dlpack__"),
    "heads": (lambda i: {"q_nope": i.q_nope[:, :8]}, r"q_nope has shape \[3, 8, 512\]; allowed: \[3, 16, 512\]"),
    "rows": (lambda i: {"q_rope": i.q_rope[:2]}, r"q_rope has shape \[2, 16, 64\]; allowed: \[3, 16, 64\]"),
    "q type": (lambda i: {"q_nope": i.q_nope.half()}, "q_nope has type fp16; allowed: bf16"),
    "no rope": (lambda i: {"q_rope": None}, "q_rope is NULL"),
    "q innermost": (
        lambda i: {"q_nope": torch.zeros(3, 16, 1024, dtype=torch.bfloat16)[..., ::2]},
        "q_nope has an innermost stride of 2 elements; allowed: 1",
    ),
    "q alignment": (lambda i: {"q_nope": torch.zeros(3, 16, 520, dtype=torch.bfloat16)[..., 1:513]}, "q_nope is .*aligned to 16 bytes"),
    "kv width": (lambda i: {"kv_cache": i.kv_cache[..., :575]}, r"kv_cache has shape \[\d+, 64, 575\]; allowed: \[any, 64, 576\]"),
    "kv page size": (lambda i: {"kv_cache": i.kv_cache[:, :32]}, r"kv_cache has shape \[\d+, 32, 576\]; allowed: \[any, 64, 576\]"),
    "kv type": (lambda i: {"kv_cache": i.kv_cache.half()}, "kv_cache has type fp16; allowed: bf16"),
    "kv stride": (
        lambda i: {"kv_cache": torch.zeros(5, 64, 577, dtype=torch.bfloat16)[..., :576]},
        "kv_page_stride is 36928 elements of 2 bytes|kv_row_stride is 577 elements of 2 bytes; allowed: multiples of 16 bytes",
    ),
    "table type": (lambda i: {"block_table": i.block_table.long()}, "block_table has type int64; allowed: int32"),
    "table batch": (lambda i: {"block_table": i.block_table[:2]}, r"block_table has shape \[2, \d+\]; allowed: \[3, any\]"),
    "meta device": (lambda i: {"q_nope": i.q_nope.to("meta")}, "q_nope is on meta; allowed: cpu, the device of the problem"),
    "scale": (lambda i: {"softmax_scale": math.nan}, "softmax_scale is nan; it must be finite"),
    "scale inf": (lambda i: {"softmax_scale": math.inf}, "softmax_scale is inf; it must be finite"),
    "kv scale of bf16": (lambda i: {"kv_scale": 2.0}, "kv_scale is 2; allowed with a 16-bit KV cache: 0 or 1"),
    "kv scale zero": (lambda i: {"kv_scale": 0.0}, "kv_scale is 0; allowed: other numbers"),
    "kv scale shape": (lambda i: {"kv_scale": torch.ones(2)}, r"kv_scale has shape \[2\]; allowed: one element"),
    "group scales": (
        lambda i: {"kv_group_scales": torch.ones(len(i.kv_cache), 64, 4)},
        "kv_group_scales is .*; it must be NULL unless kv_format is ETAP_KV_E4M3_GROUP",
    ),
    "group scales shape": (
        lambda i: {"kv_group_scales": torch.ones(len(i.kv_cache), 64, 3)},
        r"kv_group_scales has shape \[\d+, 64, 3\]; allowed: \[\d+, 64, 4\]",
    ),
    "lse base": (lambda i: {"lse_base": "10"}, "lse_base is '10'; allowed: 'e', '2'"),
    "lse of empty rows": (lambda i: {"empty_lse": 0.0}, "empty_lse is 0.0; allowed: -inf, inf"),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_bad_run(name: str, seed: int) -> None:
    """Refused with a sentence that names the argument, its value and what is allowed; outputs and workspace stay as they were."""
    make, sentence = BAD_RUNS[name]
    inputs = make_inputs(Case("bad", lens=(100, 5, 0)), seed)
    session = Session(inputs)
    session.update()
    out, lse = inputs.outputs()
    guards = [Guarded(tensor) for tensor in (out, lse, session.plan.workspace)]
    with pytest.raises((ValueError, TypeError), match=sentence):
        session.run(out, lse, **make(inputs))
    assert all(guard.untouched() for guard in guards)


BAD_OUTPUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "out type": (lambda: {"out": torch.zeros(3, 16, 512)}, "out has type fp32; allowed: bf16"),
    "out shape": (lambda: {"out": torch.zeros(3, 16, 576, dtype=torch.bfloat16)}, r"out has shape \[3, 16, 576\]; allowed: \[3, 16, 512\]"),
    "out overlaps": (
        lambda: {"out": torch.zeros(512, dtype=torch.bfloat16).expand(3, 16, 512)},
        "out_row_stride is 0; allowed: at least 512",
    ),
    "lse type": (lambda: {"lse": torch.zeros(3, 16, dtype=torch.bfloat16)}, "lse has type bf16; allowed: fp32"),
    "lse shape": (lambda: {"lse": torch.zeros(16, 3)}, r"lse has shape \[16, 3\]; allowed: \[3, 16\]"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_outputs(name: str, seed: int) -> None:
    make, sentence = BAD_OUTPUTS[name]
    inputs = make_inputs(Case("bad", lens=(100, 5, 0)), seed)
    session = Session(inputs)
    session.update()
    out, lse = inputs.outputs()
    bad = make()
    with pytest.raises(ValueError, match=sentence):
        session.run(**{"out": out, "lse": lse, **bad})
    assert all((tensor == 0).all() for tensor in bad.values())


def test_bad_updates(seed: int) -> None:
    inputs = make_inputs(Case("bad", lens=(100, 5, 0)), seed)
    plan = etap.Plan(problem_of(inputs.case, "cpu"))
    for lens, sentence in (
        (inputs.cache_seqlens[:2], r"cache_seqlens has shape \[2\]; allowed: \[3\]"),
        (inputs.cache_seqlens.long(), "cache_seqlens has type int64; allowed: int32"),
        (torch.zeros(6, dtype=torch.int32)[::2], "cache_seqlens has an innermost stride of 2 elements; allowed: 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            plan.update(lens)
    with pytest.raises(ValueError, match="cu_seqlens_q is .*; it must be NULL without ETAP_RAGGED"):
        plan.update(inputs.cache_seqlens, torch.zeros(4, dtype=torch.int32))
    ragged = etap.Plan(etap.Problem(num_heads=16, batch=3, max_query_len=2, total_q=4))
    with pytest.raises(ValueError, match="cu_seqlens_q is NULL"):
        ragged.update(inputs.cache_seqlens)
    with pytest.raises(ValueError, match=r"cu_seqlens_q has shape \[3\]; allowed: \[4\]"):
        ragged.update(inputs.cache_seqlens, torch.zeros(3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"max_query_len": 2}, r"q_nope has 3 rows for 3 sequences; allowed: 2 times as many"),
        ({"kv_format": "e4m3"}, "kv_cache has type bf16; allowed: e4m3"),
        ({"out_dtype": "fp64"}, "out_dtype is 'fp64'; allowed: 'bf16', 'fp16', 'fp32'"),
    ],
)
def test_bad_one_call(overrides: dict[str, Any], sentence: str, seed: int) -> None:
    with pytest.raises(ValueError, match=sentence):
        one_call(make_inputs(Case("bad", lens=(100, 5, 0)), seed), **overrides)


def test_bad_one_call_shapes(seed: int) -> None:
    inputs = make_inputs(Case("bad", lens=(100, 5, 0)), seed)
    with pytest.raises(ValueError, match=r"q_nope has shape \[16, 512\]; allowed: \[rows, heads, d_latent\]"):
        one_call(replace(inputs, q_nope=inputs.q_nope[0]))
    with pytest.raises(ValueError, match=r"kv_cache has shape \[64, 576\]; allowed: \[num_pages, page_size"):
        one_call(replace(inputs, kv_cache=inputs.kv_cache[0]))
    with pytest.raises(ValueError, match="q_nope has 3 rows for 2 sequences; allowed: a multiple of it"):
        one_call(replace(inputs, cache_seqlens=inputs.cache_seqlens[:2], block_table=inputs.block_table[:2]))


def test_problem_is_frozen() -> None:
    """Plans are kept by problem: one that changed afterwards would get another's plan."""
    problem = etap.Problem(num_heads=16, batch=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.batch = 2
