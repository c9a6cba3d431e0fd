"""etap_flashinfer against FP64, over the points of FlashInfer's own MLA tests (tests/attention/test_deepseek_mla.py there)."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, Inputs, check, make_inputs, reference
from dropins_kit import OUTSIDE, affordable, cache_parts, check_outside, draws, page_lists, shared_pages, with_lens
from etap_flashinfer.mla import BatchMLAPagedAttentionWrapper
from harness import same_bits

import etap_py as etap

QUERY_LENS = (1, 3, 5, 7, 9, 11, 13, 15, 17)
VARLEN = {"batch": (1, 3, 5, 7), "kv_len_0": (0, 1, 3, 11), "kv_len_1": (17, 33, 79, 114), "kv_len_2": (514, 2743, 8736)}
VARLEN |= {"qo_len": QUERY_LENS, "causal": (False, True), "page_size": (1,), "graph": (False, True)}
PAGED = {"batch": (1, 3, 5, 7, 157), "kv_len": (0, 17, 33, 75, 96, 97, 114, 197, 514, 1024), "qo_len": QUERY_LENS, "causal": (False, True)}
PAGED |= {"graph": (False, True), "base_e": (False, True), "kpe": (64, 0), "ragged": (False, True)}
FP8 = {"batch": (1, 4, 16), "kv_len": (256, 1024, 4096), "qo_len": (1, 16), "page_size": (16, 64), "causal": (False, True)}


def wrapper_for(inputs: Inputs, graph: bool = False, backend: str = "auto") -> BatchMLAPagedAttentionWrapper:
    workspace = torch.empty(1024, dtype=torch.int8, device=inputs.device)
    if not graph:
        return BatchMLAPagedAttentionWrapper(workspace, backend=backend)
    batch = inputs.case.num_seqs
    sizes = {"qo_indptr": batch + 1, "kv_indptr": batch + 1, "kv_indices": batch * inputs.block_table.shape[1], "kv_len_arr": batch}
    buffers = {name: torch.full((size,), -7, dtype=torch.int32, device=inputs.device) for name, size in sizes.items()}
    return BatchMLAPagedAttentionWrapper(workspace, use_cuda_graph=True, backend=backend, **buffers)


def plan(wrapper: BatchMLAPagedAttentionWrapper, inputs: Inputs, **overrides: Any) -> None:
    case = inputs.case
    qo_indptr = inputs.cu_seqlens_q
    if qo_indptr is None:
        qo_indptr = torch.arange(case.num_seqs + 1, dtype=torch.int32, device=inputs.device) * case.query_len
    kv_indptr, kv_indices = page_lists(inputs)
    given = {
        "qo_indptr": qo_indptr,
        "kv_indptr": kv_indptr,
        "kv_indices": kv_indices,
        "kv_len_arr": inputs.cache_seqlens,
        "num_heads": case.heads,
        "head_dim_ckv": case.d_latent,
        "head_dim_kpe": case.d_rope,
        "page_size": case.page_size,
        "causal": case.causal,
        "sm_scale": inputs.softmax_scale,
        "q_data_type": DTYPES[case.q_dtype],
        "kv_data_type": DTYPES.get(case.kv, torch.float8_e4m3fn),
    }
    wrapper.plan(**{**given, **overrides})


def run(wrapper: BatchMLAPagedAttentionWrapper, inputs: Inputs, **overrides: Any) -> Any:
    ckv, kpe = cache_parts(inputs)
    given: dict[str, Any] = {"q_nope": inputs.q_nope, "ckv_cache": ckv, "kpe_cache": kpe, "return_lse": True}
    given["q_pe"] = inputs.q_nope[..., :0] if inputs.q_rope is None else inputs.q_rope
    given["return_lse_base_on_e"] = inputs.case.lse_base == "e"
    if inputs.case.kv == "e4m3":
        given |= {"ckv_scale": inputs.kv_scale, "kpe_scale": inputs.kv_scale}
    elif inputs.case.kv == "e4m3_group":
        given |= {"ckv_scale_arr": inputs.kv_group_scales, "kpe_scale": 1.0}
    return wrapper.run(**{**given, **overrides})


def check_case(case: Case, seed: int, device: str, graph: bool = False) -> None:
    inputs = make_inputs(case, seed, device)
    wrapper = wrapper_for(inputs, graph)
    plan(wrapper, inputs)
    out, lse = run(wrapper, inputs)
    check(inputs, out, lse, reference(inputs))
    again = torch.full_like(out, math.nan), torch.full_like(lse, math.nan)
    only = run(wrapper, inputs, out=again[0], lse=again[1], return_lse=False)
    assert only is again[0]
    assert same_bits(out, again[0]) and same_bits(lse, again[1])


@pytest.mark.parametrize("heads", [16, 64])
def test_varlen(heads: int, device: str, seed: int) -> None:
    for i, point in enumerate(draws(VARLEN, seed, device)):
        lens = affordable([point["kv_len_0"], point["kv_len_1"], point["kv_len_2"]] * point["batch"], point["qo_len"] * heads, device)
        case = Case(
            f"{point} {heads}",
            lens=lens,
            pool_pages=shared_pages(lens, point["page_size"]),
            heads=heads,
            query_len=point["qo_len"],
            causal=point["causal"],
            page_size=point["page_size"],
            q_dtype="fp16",
            lse_base="2",
        )
        check_case(case, seed + i, device, point["graph"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("page_size", [1, 16, 32, 128])
def test_paged(page_size: int, dtype: str, device: str, seed: int) -> None:
    """Poison fills what must not be read, as in FlashInfer's test of NaN past the end."""
    rng = random.Random(seed)
    for i, point in enumerate(draws(PAGED, seed, device)):
        lens = affordable([point["kv_len"]] * point["batch"], point["qo_len"] * 16, device)
        counts = tuple(rng.randint(0, point["qo_len"]) for _ in lens)
        case = Case(
            f"{point} {page_size} {dtype}",
            lens=lens,
            pool_pages=shared_pages(lens, page_size),
            query_len=point["qo_len"],
            query_lens=counts if point["ragged"] and any(counts) else (),
            causal=point["causal"],
            page_size=page_size,
            d_rope=point["kpe"],
            q_dtype=dtype,
            lse_base="e" if point["base_e"] else "2",
        )
        check_case(case, seed + i, device, point["graph"])


@pytest.mark.parametrize("kv_format", ["e4m3", "e4m3_group"])
@pytest.mark.parametrize("heads", [16, 128])
def test_fp8(heads: int, kv_format: str, device: str, seed: int) -> None:
    for i, point in enumerate(draws(FP8, seed, device)):
        lens = affordable([point["kv_len"]] * point["batch"], point["qo_len"] * heads, device)
        case = Case(
            f"{point} {heads} {kv_format}",
            lens=lens,
            pool_pages=shared_pages(lens, point["page_size"]),
            heads=heads,
            query_len=point["qo_len"],
            causal=point["causal"],
            page_size=point["page_size"],
            kv_format=kv_format,
            kv_scale=None if kv_format == "e4m3" else 1.0,
            lse_base="2",
        )
        check_case(case, seed + i, device)


def test_buffers_are_filled(device: str, seed: int) -> None:
    """With use_cuda_graph the arrays live in the buffers that were given; a plan may shrink and grow within them."""
    inputs = make_inputs(Case("buffers", lens=(100, 37, 0), page_size=16, lse_base="2"), seed, device)
    wrapper = wrapper_for(inputs, graph=True)
    for lens in ((0, 0, 0), (100, 37, 0), (16, 5, 0), (100, 37, 0)):
        step = with_lens(inputs, lens)
        plan(wrapper, step)
        check(step, *run(wrapper, step), reference(step))
    assert wrapper._arguments[-2].tolist() == [100, 37, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("kv_format", ["bf16", "e4m3_group"])
def test_captured(kv_format: str, cuda: str, seed: int) -> None:
    """`run` is captured on empty sequences, and replayed after plans outside of the graph."""
    case = Case("captured", lens=(3000, 130, 64), page_size=16, kv_format=kv_format, kv_scale=1.0, lse_base="2")
    inputs = make_inputs(case, seed, cuda)
    wrapper = wrapper_for(inputs, graph=True)
    plan(wrapper, replace(inputs, cache_seqlens=torch.zeros_like(inputs.cache_seqlens)))
    run(wrapper, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(wrapper, inputs)
    for lens in ((1, 0, 64), (2999, 7, 3), (3000, 130, 64)):
        step = with_lens(inputs, lens)
        plan(wrapper, step)
        graph.replay()
        check(step, out, lse, reference(step))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_prefix_sums_may_be_longer(batch: int, graph: bool, device: str, seed: int) -> None:
    """FlashInfer's varlen test passes 3 (batch + 1) prefix sums for 3 batch sequences: RuntimeError here, on CUDA a device assertion."""
    inputs = make_inputs(Case("longer", lens=(11, 33, 130) * batch, query_len=3, page_size=1, lse_base="2"), seed, device)
    counts = inputs.cache_seqlens[:3].tolist()
    starts = [sum(counts) * i + sum(counts[:j]) for i in range(batch + 1) for j in range(3)]
    assert len(starts) == 3 * (batch + 1)
    noise = torch.randint(-9, 99, (2,), dtype=torch.int32, device=device)
    qo_indptr = torch.arange(3 * batch + 1, dtype=torch.int32, device=device) * 3
    wrapper = wrapper_for(inputs, graph)
    plan(wrapper, inputs, kv_indptr=torch.tensor(starts, dtype=torch.int32), qo_indptr=torch.cat([qo_indptr, noise]))
    check(inputs, *run(wrapper, inputs), reference(inputs))


def test_kv_indices_may_be_longer(device: str, seed: int) -> None:
    """Longer than the buffer too: FlashInfer's pages are kv_indptr[batch] many, wherever kv_indptr begins."""
    inputs = make_inputs(Case("longer", lens=(100, 37, 0), page_size=16, lse_base="2"), seed, device)
    kv_indptr, kv_indices = page_lists(inputs)
    around = torch.full((3,), 7777, dtype=torch.int32, device=device)
    wrapper = wrapper_for(inputs)
    plan(wrapper, inputs, kv_indptr=kv_indptr + 3, kv_indices=torch.cat([around, kv_indices, around]))
    check(inputs, *run(wrapper, inputs), reference(inputs))
    wrapper = wrapper_for(inputs, graph=True)
    plan(wrapper, inputs, kv_indices=torch.cat([kv_indices, *[around] * 99]))
    check(inputs, *run(wrapper, inputs), reference(inputs))


@pytest.mark.parametrize("lens", [(0,), (0, 0, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("graph", [False, True])
def test_without_pages(graph: bool, lens: tuple[int, ...], device: str, seed: int) -> None:
    """kv_len = 0 with no pages, in caches that have none where all are 0: a ValueError about the parts of one pool, in 7 of FlashInfer's
    own cases."""
    inputs = make_inputs(Case("no pages", lens=lens, page_size=1, query_len=3, lse_base="2"), seed, device)
    wrapper = wrapper_for(inputs, graph)
    plan(wrapper, inputs)
    check(inputs, *run(wrapper, inputs), reference(inputs))
    if not any(lens):
        ckv, kpe = cache_parts(replace(inputs, kv_cache=inputs.kv_cache[:0].clone()))
        check(inputs, *run(wrapper, inputs, ckv_cache=ckv, kpe_cache=kpe), reference(inputs))
        check(inputs, *run(wrapper, inputs, ckv_cache=ckv.contiguous(), kpe_cache=kpe.contiguous()), reference(inputs))


@pytest.mark.parametrize("graph", [False, True])
def test_no_sequences(graph: bool, device: str, seed: int) -> None:
    """`max() arg is an empty sequence`, and with graph buffers of that size ZeroDivisionError."""
    inputs = make_inputs(Case("none", lens=(70, 3)), seed, device)
    empty, zero = torch.empty(0, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    arrays = {"qo_indptr": zero, "kv_indptr": zero, "kv_indices": empty, "kv_len_arr": empty}
    buffers = {name: array.clone() for name, array in arrays.items()} if graph else {}
    wrapper = BatchMLAPagedAttentionWrapper(inputs.q_nope, use_cuda_graph=graph, **buffers)
    plan(wrapper, inputs, **arrays)
    rows = {"q_nope": inputs.q_nope[:0], "q_pe": inputs.q_rope[:0]}
    out, lse = run(wrapper, inputs, **rows)
    assert (out.shape, out.dtype) == ((0, 16, 512), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((0, 16), torch.float32)
    assert run(wrapper, inputs, **rows, out=out, return_lse=False) is out
    with pytest.raises(ValueError, match=r"q_nope has shape \[2, 16, 512\]; allowed: \[0, ..\], as many rows as qo_indptr counted"):
        run(wrapper, inputs)
    if not graph:
        plan(wrapper, inputs)
        out, lse = run(wrapper, inputs, return_lse_base_on_e=True)
        check(inputs, out, lse, reference(inputs))


def test_no_query_tokens(device: str, seed: int) -> None:
    """`max_query_len is 0`, from a step in which no sequence asks for anything."""
    inputs = make_inputs(Case("none", lens=(70, 3), lse_base="2"), seed, device)
    nobody = torch.zeros(3, dtype=torch.int32, device=device)
    wrapper = wrapper_for(inputs)
    plan(wrapper, inputs, qo_indptr=nobody)
    out, lse = run(wrapper, inputs, q_nope=inputs.q_nope[:0], q_pe=inputs.q_rope[:0])
    assert (out.shape, lse.shape) == ((0, 16, 512), (0, 16))
    wrapper = wrapper_for(inputs, graph=True)
    with pytest.raises(ValueError, match="qo_indptr counts no query tokens; allowed with use_cuda_graph: as many in each plan, 1 or more"):
        plan(wrapper, inputs, qo_indptr=nobody)
    plan(wrapper, inputs)
    check(inputs, *run(wrapper, inputs), reference(inputs))


def test_arguments_without_effect(device: str, seed: int) -> None:
    """FlashInfer looks at them in its `cutlass` form only, and at profiler_buffer with use_profiler."""
    inputs = make_inputs(Case("effect", lens=(70, 3), lse_base="2"), seed, device)
    wrapper = wrapper_for(inputs)
    plan(wrapper, inputs)
    without_effect = {"profiler_buffer": inputs.q_nope, "kv_len": inputs.cache_seqlens, "page_table": inputs.block_table}
    check(inputs, *run(wrapper, inputs, **without_effect), reference(inputs))


def test_kpe_scale_of_no_values(seed: int) -> None:
    """Without rope values no kpe_scale differs from ckv_scale."""
    inputs = make_inputs(Case("nope", lens=(70, 3), kv_format="e4m3", kv_scale=0.5, d_rope=0, lse_base="2"), seed)
    wrapper = wrapper_for(inputs)
    plan(wrapper, inputs)
    check(inputs, *run(wrapper, inputs, kpe_scale=1.0), reference(inputs))


@pytest.mark.parametrize("what", OUTSIDE)
def test_outside_of_the_table(what: str, device: str, seed: int) -> None:
    """A length beyond a sequence's pages went on in the next sequence's, and past the last one's in whatever came there."""

    def solve(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        wrapper = wrapper_for(inputs)
        starts = torch.arange(4, dtype=torch.int32, device=device) * 2
        plan(wrapper, inputs, kv_indptr=starts, kv_indices=inputs.block_table.flatten())
        out, lse = run(wrapper, inputs)
        return out, lse

    check_outside(what, solve, "kv_len_arr" if what == "a length" else "kv_indices", device, seed)


@pytest.mark.parametrize("graph", [False, True])
def test_length_beyond_its_own_pages(graph: bool, device: str, seed: int) -> None:
    """The longest sequence of a batch makes the table wide enough for the others: they would read its neighbour's pages, or in a graph's
    table those of an earlier step."""
    inputs = make_inputs(Case("own", lens=(600, 130, 64), lse_base="2"), seed, device)
    wrapper = wrapper_for(inputs, graph)
    for lens in ((64, 64, 64), (600, 130, 64)):
        step = with_lens(inputs, lens)
        plan(wrapper, step)
        check(step, *run(wrapper, step), reference(step))
    kv_indptr, kv_indices = page_lists(inputs)
    long = torch.tensor([600, 193, 64], dtype=torch.int32)
    lists = {"kv_indptr": kv_indptr, "kv_indices": kv_indices}
    with pytest.raises(ValueError, match=r"kv_len_arr\[1\] is 193; allowed: up to 192, the tokens of the 3 pages that kv_indptr gives"):
        plan(wrapper, inputs, **lists, kv_len_arr=long)
    check(inputs, *run(wrapper, inputs), reference(inputs))
    if device == "cpu":
        return
    plan(wrapper, inputs, **lists, kv_len_arr=long.to(device))  # not known without waiting
    out, lse = run(wrapper, inputs)
    assert out[1].isnan().all() and lse[1].isnan().all()
    out[1], lse[1] = 0, -math.inf
    without = with_lens(inputs, (600, 0, 64))
    check(without, out, lse, reference(without))


def test_scales_are_keywords() -> None:
    """FlashInfer has them after the star: a script must not be able to pass them by position."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(BatchMLAPagedAttentionWrapper.run).parameters.items()}
    assert {kinds[name] for name in ("ckv_scale", "ckv_scale_arr", "kpe_scale")} == {inspect.Parameter.KEYWORD_ONLY}


# ---- Refusals --------------------------------------------------------------------------------------------------------

Change = Callable[[Inputs], dict[str, Any]]


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


PLAN_REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "use_profiler": (lambda i: {"use_profiler": True}, NotImplementedError, "use_profiler is True; allowed: False"),
    "kv_data_type": (
        lambda i: {"kv_data_type": torch.float8_e5m2},
        NotImplementedError,
        "kv_data_type is torch.float8_e5m2; allowed: torch.bfloat16, which is q_data_type, and torch.float8_e4m3fn",
    ),
    "q_data_type": (lambda i: {"q_data_type": torch.float32, "kv_data_type": torch.float32}, ValueError, "q_dtype is 'fp32'; allowed"),
    "num_heads": (lambda i: {"num_heads": 129}, etap.EtapInvalidArgument, "num_heads is 129; allowed: 1 to 128"),
    "head_dim_kpe": (lambda i: {"head_dim_kpe": 32}, etap.EtapInvalidArgument, r"is \(512, 32\); allowed: \(512, 64\)"),
    "page_size": (lambda i: {"page_size": 24}, etap.EtapInvalidArgument, "page_size is 24; allowed: a power of two"),
    "qo_indptr of 64 bits": (
        lambda i: {"qo_indptr": ints(0, 1, 2).long()},
        ValueError,
        r"qo_indptr is torch.int64 of shape \[3\]; allowed",
    ),
    "kv_indptr of 64 bits": (
        lambda i: {"kv_indptr": ints(0, 2, 3).long()},
        ValueError,
        r"kv_indptr is torch.int64 of shape \[3\]; allowed",
    ),
    "kv_indices of 64 bits": (
        lambda i: {"kv_indices": ints(0, 1, 2).long()},
        ValueError,
        "kv_indices is torch.int64 .*; allowed: torch.int32",
    ),
    "kv_len_arr of 64 bits": (lambda i: {"kv_len_arr": i.cache_seqlens.long()}, ValueError, r"kv_len_arr is torch.int64 of shape \[2\]"),
    "kv_len_arr of two dimensions": (lambda i: {"kv_len_arr": i.cache_seqlens[None]}, ValueError, r"of shape \[1, 2\]; .* one dimension"),
    "kv_len_arr as a list": (lambda i: {"kv_len_arr": [70, 3]}, TypeError, "kv_len_arr is a list; allowed: a tensor"),
    "qo_indptr too short": (lambda i: {"qo_indptr": ints(0, 1)}, ValueError, "qo_indptr has 2 entries; allowed: 3 or more, for the 2 seq"),
    "kv_indptr too short": (lambda i: {"kv_indptr": ints(0, 2)}, ValueError, "kv_indptr has 2 entries; allowed: 3 or more, for the 2 seq"),
    "kv_indices too short": (
        lambda i: {"kv_indices": ints(0, 1)},
        ValueError,
        r"kv_indices has 2 entries; allowed: 3 or more, kv_indptr\[2\]",
    ),
    "qo_indptr from 1": (lambda i: {"qo_indptr": ints(1, 2, 3)}, ValueError, r"qo_indptr\[0\] is 1; allowed: 0"),
    "kv_indptr from -1": (lambda i: {"kv_indptr": ints(-1, 2, 3)}, ValueError, r"kv_indptr\[0\] is -1; allowed: 0 or more"),
    "qo_indptr falls": (lambda i: {"qo_indptr": ints(0, 2, 1)}, ValueError, r"qo_indptr\[2\] is 1; allowed: 2 or more, qo_indptr\[1\]"),
    "kv_indptr falls": (lambda i: {"kv_indptr": ints(0, 2, 1)}, ValueError, r"kv_indptr\[2\] is 1; allowed: 2 or more, kv_indptr\[1\]"),
}
RUN_REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "o_scale": (lambda i: {"o_scale": 1.0}, NotImplementedError, "o_scale is 1.0; allowed: None"),
    "different scales": (lambda i: {"kpe_scale": 0.25}, NotImplementedError, "kpe_scale is 0.25 and ckv_scale 0.5; allowed: equal ones"),
    "no scale": (
        lambda i: {"ckv_scale": None},
        ValueError,
        "ckv_scale is None, ckv_scale_arr None, kpe_scale 0.5, the cache e4m3; allowed",
    ),
    "no kpe_scale": (lambda i: {"kpe_scale": None}, ValueError, "kpe_scale None, the cache e4m3; allowed: kpe_scale and one of the others"),
    "two scales": (lambda i: {"ckv_scale_arr": i.q_nope}, ValueError, "ckv_scale_arr a tensor, kpe_scale 0.5"),
    "tensors of their own": (
        lambda i: {"ckv_cache": cache_parts(i)[0].contiguous(), "kpe_cache": cache_parts(i)[1].contiguous()},
        ValueError,
        r"\(ckv_cache, kpe_cache\) is a pair of .*; allowed: .* rows, pool\[..., :d_latent\] and pool\[..., d_latent:\]",
    ),
    "out": (lambda i: {"out": i.q_nope.float()}, ValueError, "out has type fp32; allowed: bf16"),
    "rows": (lambda i: {"q_nope": i.q_nope[:1]}, ValueError, r"q_nope has shape \[1, 16, 512\]; allowed: \[2, 16, 512\]"),
    "no q_nope": (lambda i: {"q_nope": None}, TypeError, "q_nope is None; allowed: a tensor"),
    "no ckv_cache": (lambda i: {"ckv_cache": None}, TypeError, "ckv_cache is None; allowed: a tensor"),
    "type of q_pe": (lambda i: {"q_pe": i.q_rope.half()}, ValueError, "q_pe has type fp16; allowed: bf16"),
    "type of ckv_scale_arr": (
        lambda i: {"ckv_scale": None, "ckv_scale_arr": torch.ones(len(i.kv_cache), 64, 4, device=i.device).half(), "kpe_scale": 1},
        ValueError,
        "ckv_scale_arr has type fp16; allowed: fp32",
    ),
}


@pytest.mark.parametrize("what", PLAN_REFUSED)
def test_plan_refused(what: str, device: str, seed: int) -> None:
    make, kind, sentence = PLAN_REFUSED[what]
    inputs = make_inputs(Case("refused", lens=(70, 3)), seed, device)
    with pytest.raises(kind, match=sentence):
        plan(wrapper_for(inputs), inputs, **make(inputs))


@pytest.mark.parametrize("what", RUN_REFUSED)
def test_run_refused(what: str, device: str, seed: int) -> None:
    make, kind, sentence = RUN_REFUSED[what]
    inputs = make_inputs(Case("refused", lens=(70, 3), kv_format="e4m3", kv_scale=0.5), seed, device)
    wrapper = wrapper_for(inputs)
    plan(wrapper, inputs)
    with pytest.raises(kind, match=sentence):
        run(wrapper, inputs, **make(inputs))


def test_scales_of_16_bit_caches_are_refused(seed: int) -> None:
    inputs = make_inputs(Case("refused", lens=(70, 3)), seed)
    wrapper = wrapper_for(inputs)
    plan(wrapper, inputs)
    with pytest.raises(ValueError, match="ckv_scale is 1.0, .* the cache bf16; allowed: .* with torch.float8_e4m3fn, none otherwise"):
        run(wrapper, inputs, ckv_scale=1.0, kpe_scale=1.0)


def test_wrapper_refused(seed: int) -> None:
    inputs = make_inputs(Case("refused", lens=(70, 3)), seed)
    with pytest.raises(NotImplementedError, match="backend is 'cutlass'; allowed: 'auto', 'fa2', 'fa3'"):
        wrapper_for(inputs, backend="cutlass")
    with pytest.raises(ValueError, match="use_cuda_graph is True and a buffer is None; allowed: qo_indptr, kv_indptr, kv_indices and"):
        BatchMLAPagedAttentionWrapper(inputs.q_nope, use_cuda_graph=True)
    with pytest.raises(RuntimeError, match="run is called before plan"):
        run(wrapper_for(inputs), inputs)
    buffers = {"qo_indptr": ints(0, 0, 0), "kv_indptr": ints(0, 0, 0), "kv_indices": ints(0, 0), "kv_len_arr": ints(0, 0)}
    for name, buffer, sentence in (
        ("kv_len_arr", buffers["kv_len_arr"].long(), r"kv_len_arr is torch.int64 of shape \[2\]; allowed: torch.int32 of one dimension"),
        ("kv_indptr", ints(0, 0), "kv_indptr has 2 entries; allowed: 3 or more, for the 2 sequences of kv_len_arr"),
    ):
        with pytest.raises(ValueError, match=sentence):
            BatchMLAPagedAttentionWrapper(inputs.q_nope, use_cuda_graph=True, **{**buffers, name: buffer})


def test_what_a_graph_holds_is_fixed(seed: int) -> None:
    """A captured run has addresses and a kernel: a plan that would need others is refused before it changes anything."""
    inputs = make_inputs(Case("fixed", lens=(70, 3), page_size=16, lse_base="2"), seed)
    wrapper = wrapper_for(inputs, graph=True)
    plan(wrapper, inputs)
    columns = inputs.block_table.shape[1]
    long = ints(0, columns + 1, columns + 2)
    for overrides, sentence in (
        (
            {"kv_indptr": long, "kv_indices": torch.zeros(99, dtype=torch.int32)},
            f"a sequence has {columns + 1} pages; allowed: {columns}, the length of the kv_indices buffer",
        ),
        (
            {"qo_indptr": ints(0, 1, 2, 3), "kv_indptr": ints(0, 0, 0, 0), "kv_len_arr": ints(0, 0, 0)},
            "kv_len_arr is for 3 sequences; allowed: 2, the length of its buffer",
        ),
        (
            {"kv_indptr": ints(9999, 9999, 9999), "kv_indices": torch.zeros(9999, dtype=torch.int32), "kv_len_arr": ints(0, 0)},
            r"kv_indptr\[2\] is 9999; allowed: up to .*, the length of the kv_indices buffer",
        ),
        ({"causal": False}, "the step is Problem.*; allowed with use_cuda_graph: Problem.*, as in the first plan"),
    ):
        with pytest.raises(ValueError, match=sentence):
            plan(wrapper, inputs, **overrides)
        check(inputs, *run(wrapper, inputs), reference(inputs))
