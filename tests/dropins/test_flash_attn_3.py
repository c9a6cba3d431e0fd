"""etap_flash_attn_3 against FP64, over the points of FlashAttention-3's own tests (hopper/test_flash_attn.py there) that are MLA: 64 rope
values, `qv`, a paged cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, Inputs, check, make_inputs, reference
from dropins_kit import affordable, cache_parts, draws, shared_pages
from etap_flash_attn_3 import SchedulerMetadata, flash_attn_with_kvcache, get_scheduler_metadata
from harness import same_bits

import etap_py as etap

AXES = {
    "batch": (2, 9, 40),
    "seqlens": ((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000), (1, 131072), (128, 128)),
    "causal": (False, True),
    "varlen_q": (False, True),
    "dtype": ("bf16", "fp16"),
    "num_splits": (0, 1, 3),
    "metadata": (False, True),
}


def decode(inputs: Inputs, **overrides: Any) -> Any:
    case = inputs.case
    ckv, kpe = cache_parts(inputs)
    given: dict[str, Any] = {
        "q": inputs.q_rope if case.query_lens else inputs.q_rope.unflatten(0, (case.num_seqs, -1)),
        "qv": inputs.q_nope if case.query_lens else inputs.q_nope.unflatten(0, (case.num_seqs, -1)),
        "k_cache": kpe.unsqueeze(2),
        "v_cache": ckv.unsqueeze(2),
        "cache_seqlens": inputs.cache_seqlens,
        "page_table": inputs.block_table,
        "softmax_scale": inputs.softmax_scale,
        "causal": case.causal,
        "return_softmax_lse": True,
    }
    if case.query_lens:
        given |= {"cu_seqlens_q": inputs.cu_seqlens_q, "max_seqlen_q": case.max_query_len}
    if case.kv == "e4m3":
        scale = inputs.kv_scale.expand(case.num_seqs, 1)
        given |= {"k_descale": scale, "v_descale": scale}
    return flash_attn_with_kvcache(**{**given, **overrides})


def metadata(inputs: Inputs, **overrides: Any) -> SchedulerMetadata:
    case = inputs.case
    return get_scheduler_metadata(
        case.num_seqs,
        case.max_query_len,
        inputs.block_table.shape[1] * case.page_size,
        case.heads,
        1,
        case.d_rope,
        inputs.cache_seqlens,
        **{
            "qkv_dtype": DTYPES[case.q_dtype],
            "headdim_v": case.d_latent,
            "cu_seqlens_q": inputs.cu_seqlens_q,
            "page_size": case.page_size,
            "causal": case.causal,
            **overrides,
        },
    )


def check_result(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """[batch, tokens, heads, d_v] and [batch, heads, tokens], or [total, heads, d_v] and [heads, total]."""
    if not inputs.case.query_lens:
        out, lse = out.flatten(0, 1), lse.movedim(0, 1).flatten(1)
    check(inputs, out, lse.T, reference(inputs))


@pytest.mark.parametrize("heads", [1, 6, 16, 128])
@pytest.mark.parametrize("page_size", [1, 4, 64, 128])
def test_matrix(page_size: int, heads: int, device: str, seed: int) -> None:
    rng = random.Random(seed)
    for i, point in enumerate(draws(AXES, seed, device)):
        tokens, longest = point["seqlens"]
        longest = min(longest, 2048) if device == "cpu" else longest
        tokens = min(tokens, 512 // heads + 1) if device == "cpu" else tokens
        lens = affordable([rng.randint(1, longest) for _ in range(point["batch"])], tokens * heads, device)
        counts = tuple(rng.randint(0, tokens) for _ in lens)
        case = Case(
            f"{point} {page_size} {heads}",
            lens=lens,
            pool_pages=shared_pages(lens, page_size),
            heads=heads,
            query_len=tokens,
            query_lens=counts if point["varlen_q"] and any(counts) else (),
            causal=point["causal"],
            page_size=page_size,
            q_dtype=point["dtype"],
        )
        inputs = make_inputs(case, seed + i, device)
        options: dict[str, Any] = {"num_splits": point["num_splits"]}
        if point["metadata"]:
            options["scheduler_metadata"] = metadata(inputs, **options)
        out, lse = decode(inputs, **options)
        check_result(inputs, out, lse)
        again = decode(inputs, **options, return_softmax_lse=False)
        assert same_bits(out, again)


def test_e4m3(device: str, seed: int) -> None:
    inputs = make_inputs(Case("e4m3", kv_format="e4m3", kv_scale_on_device=True, lens=(130, 0, 64)), seed, device)
    check_result(inputs, *decode(inputs))
    check_result(inputs, *decode(inputs, k_descale=inputs.kv_scale, v_descale=inputs.kv_scale))


def test_defaults(device: str, seed: int) -> None:
    """softmax_scale, a number for cache_seqlens, what has no effect, and a window given as a list."""
    inputs = make_inputs(Case("defaults", lens=(70, 70)), seed, device)
    scaled = replace(inputs, softmax_scale=576**-0.5)
    without_effect = {"cu_seqlens_k_new": inputs.cache_seqlens, "rotary_interleaved": False, "pack_gqa": True, "window_size": [-1, -1]}
    check_result(scaled, *decode(inputs, softmax_scale=None, cache_seqlens=70, sm_margin=1, **without_effect))


def test_one_split_is_batch_invariant(device: str, seed: int) -> None:
    """Deterministic inference asks for num_splits=1: a sequence's bits must not depend on the batch."""
    inputs = make_inputs(Case("invariant", lens=(3000, 64, 700, 5)), seed, device)
    out, _ = decode(inputs, num_splits=1)
    alone = replace(inputs, case=replace(inputs.case, lens=(3000,)), q_nope=inputs.q_nope[:1], q_rope=inputs.q_rope[:1])
    alone = replace(alone, cache_seqlens=inputs.cache_seqlens[:1], block_table=inputs.block_table[:1])
    only, _ = decode(alone, num_splits=1)
    assert same_bits(out[:1], only)


def test_metadata_belongs_to_a_step(device: str, seed: int) -> None:
    inputs = make_inputs(Case("steps", lens=(130, 70, 64)), seed, device)
    longer = metadata(inputs)
    out, lse = decode(inputs, scheduler_metadata=longer)
    check_result(inputs, out, lse)
    shortened = replace(inputs, cache_seqlens=inputs.cache_seqlens - 60)
    check_result(shortened, *decode(shortened, scheduler_metadata=metadata(shortened)))
    check_result(shortened, *decode(shortened))
    assert same_bits(out, decode(inputs, scheduler_metadata=longer)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("with_metadata", [False, True])
def test_captured(with_metadata: bool, cuda: str, seed: int) -> None:
    """A step's metadata and layers within one graph: a replay sees the lengths of its own time."""
    inputs = make_inputs(Case("captured", lens=(3000, 130, 64)), seed, cuda)
    decode(inputs)  # loads kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(inputs, scheduler_metadata=metadata(inputs) if with_metadata else None)
    for lens in ((1, 0, 64), (2999, 7, 3), (3000, 130, 64)):
        inputs.cache_seqlens.copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        check_result(inputs, out, lse)


tensor = torch.zeros(2, 1)
Refused = tuple[Callable[[Inputs], dict[str, Any]], type[Exception], str]
REFUSED: dict[str, Refused] = {
    name: (lambda i, name=name: {name: tensor}, NotImplementedError, f"{name} is a tensor; allowed: None")
    for name in ("k", "v", "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad", "rotary_seqlens", "q_descale")
} | {
    "attention_chunk": (lambda i: {"attention_chunk": 128}, NotImplementedError, "attention_chunk is 128; allowed: 0"),
    "softcap": (lambda i: {"softcap": 15.0}, NotImplementedError, "softcap is 15.0; allowed: 0.0"),
    "window_size": (lambda i: {"window_size": (128, 0)}, NotImplementedError, r"window_size is \(128, 0\); allowed: \(-1, -1\)"),
    "qv": (lambda i: {"qv": None}, NotImplementedError, r"qv is None; allowed: a tensor \(ETAP computes the MLA form over a paged cache\)"),
    "page_table": (lambda i: {"page_table": None}, NotImplementedError, "page_table is None; allowed: a tensor"),
    "cache_seqlens": (lambda i: {"cache_seqlens": None}, NotImplementedError, "cache_seqlens is None; allowed: a tensor"),
    "one descale": (
        lambda i: {"k_descale": tensor},
        NotImplementedError,
        "k_descale and v_descale are different; allowed: the same memory",
    ),
    "descales by head": (
        lambda i: {"k_descale": tensor, "v_descale": tensor},
        NotImplementedError,
        r"k_descale has shape \[2, 1\] and strides \[1, 1\]; allowed: one element, or strides of 0",
    ),
    "metadata of tensors": (
        lambda i: {"scheduler_metadata": tensor},
        TypeError,
        "scheduler_metadata is a Tensor; allowed: what etap_flash",
    ),
    "max_seqlen_q": (
        lambda i: {"q": i.q_rope, "qv": i.q_nope, "cu_seqlens_q": torch.arange(3, dtype=torch.int32, device=i.device)},
        ValueError,
        "max_seqlen_q is None; allowed with cu_seqlens_q: the largest query count",
    ),
    "three dimensions": (
        lambda i: {"q": i.q_rope},
        ValueError,
        r"q has shape \[2, 16, 64\] and k_cache .*; allowed: \[batch, seqlen, nheads",
    ),
    "q of FP8": (lambda i: {"q": i.q_rope[:, None].to(torch.float8_e4m3fn)}, ValueError, "q_dtype is 'e4m3'; allowed: 'bf16', 'fp16'"),
    "KV heads": (
        lambda i: {
            "k_cache": cache_parts(i)[1].unsqueeze(2).expand(-1, -1, 2, -1),
            "v_cache": cache_parts(i)[0].unsqueeze(2).expand(-1, -1, 2, -1),
        },
        ValueError,
        r"kv_cache has shape \[.*, 64, 2, 576\]; allowed: \[any, 64, 576\]",
    ),
    "tensors of their own": (
        lambda i: {"k_cache": cache_parts(i)[1].unsqueeze(2).contiguous()},
        ValueError,
        r"kv_cache is a pair of .*; allowed: the two parts of the same rows, pool\[..., :d_latent\] and pool\[..., d_latent:\]",
    ),
    "head size": (lambda i: {"q": i.q_rope[:, None, :, :32]}, etap.EtapInvalidArgument, r"\(512, 32\); allowed: \(512, 64\)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, device: str, seed: int) -> None:
    """Each row of the table "refused" in docs/from-flash-attention-3.md, with a sentence; metadata that serves a step is no way around."""
    make, kind, sentence = REFUSED[what]
    inputs = make_inputs(Case("refused", lens=(70, 3)), seed, device)
    with pytest.raises(kind, match=sentence):
        decode(inputs, **make(inputs))
    step = metadata(inputs)
    decode(inputs, scheduler_metadata=step)
    if kind is NotImplementedError:
        with pytest.raises(kind, match=sentence):
            decode(inputs, scheduler_metadata=step, **make(inputs))


def test_metadata_of_other_options_is_refused(seed: int) -> None:
    inputs = make_inputs(Case("options", lens=(70, 3)), seed)
    step = metadata(inputs)
    decode(inputs, scheduler_metadata=step)
    with pytest.raises(ValueError, match=r"is \(True, 1, 0\); allowed: \(True, 0, 0\), as in the first call with this scheduler_metadata"):
        decode(inputs, scheduler_metadata=step, num_splits=1)
