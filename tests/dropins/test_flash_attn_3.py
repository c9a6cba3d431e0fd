"""etap_flash_attn_3 against FP64, over the points of FlashAttention-3's own tests (hopper/test_flash_attn.py there) that are MLA: 64 rope
values, `qv`, a paged cache."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import DTYPES, Case, Inputs, check, make_inputs, reference
from dropins_kit import EMPTY, OUTSIDE, affordable, cache_parts, check_outside, draws, empty_inputs, shared_pages, with_lens
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
    """softmax_scale, and a number for cache_seqlens."""
    inputs = make_inputs(Case("defaults", lens=(70, 70)), seed, device)
    scaled = replace(inputs, softmax_scale=576**-0.5)
    check_result(scaled, *decode(inputs, softmax_scale=None, cache_seqlens=70, sm_margin=1))


def test_arguments_without_effect(device: str, seed: int) -> None:
    """FlashAttention-3's own test always passes rotary_seqlens, vLLM descales with every cache; without rotary_cos, k or FP8 they are not
    looked at. Nor do windows and chunks count that are as long as the block table, or a window to the right of the causal mask."""
    inputs = make_inputs(Case("effect", lens=(130, 5), query_len=3), seed, device)
    some = torch.rand(2, 3, device=device)
    held = inputs.block_table.shape[1] * 64
    unrelated = {
        "rotary_seqlens": inputs.cache_seqlens,
        "rotary_sin": some,
        "rotary_interleaved": False,
        "v": some,
        "k": inputs.q_rope[:0, None],
        "cu_seqlens_k_new": inputs.cache_seqlens,
        "q_descale": some,
        "k_descale": some,
        "v_descale": some.half(),
        "pack_gqa": True,
        "max_seqlen_q": 99,
        "softcap": -1.0,
    }
    step = metadata(inputs)
    for given in (
        unrelated,
        *({"window_size": window} for window in ([-1, -1], (-7, -9), (held - 1, -1), (-1, 0), torch.tensor([held, 1]))),
        {"attention_chunk": held},
        {"attention_chunk": -1},
    ):
        check_result(inputs, *decode(inputs, **given))
        check_result(inputs, *decode(inputs, **given, scheduler_metadata=step))
    all_seen = replace(inputs, case=replace(inputs.case, causal=False))
    check_result(all_seen, *decode(all_seen, window_size=(held - 1, 2)))
    one = make_inputs(Case("effect", lens=(130, 0), causal=False), seed, device)
    check_result(one, *decode(one, window_size=(-1, 0), attention_chunk=one.block_table.shape[1] * 64))


@pytest.mark.parametrize("what", OUTSIDE)
def test_outside_of_the_table(what: str, device: str, seed: int) -> None:
    """A length beyond the columns of page_table went on in the next sequence's row, and past the last one in whatever came there."""

    def solve(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = decode(inputs)
        return out.flatten(0, 1), lse.mT.flatten(0, 1)

    check_outside(what, solve, "cache_seqlens" if what == "a length" else "page_table", device, seed)


def test_number_beyond_the_table(device: str, seed: int) -> None:
    inputs = make_inputs(Case("number", lens=(64, 64)), seed, device)
    held = inputs.block_table.shape[1] * 64
    with pytest.raises(ValueError, match=f"cache_seqlens is {held + 1}; allowed: up to {held}, the tokens that the columns of page_table"):
        decode(inputs, cache_seqlens=held + 1)


@pytest.mark.parametrize("what", EMPTY)
def test_nothing_stored(what: str, device: str, seed: int) -> None:
    """A pool without pages and a page_table without columns are legal where all lengths are 0."""
    inputs = empty_inputs(what, device, seed)
    check_result(inputs, *decode(inputs))
    if what != "no columns":
        ckv, kpe = cache_parts(inputs)
        check_result(inputs, *decode(inputs, k_cache=kpe[:, :, None].contiguous(), v_cache=ckv[:, :, None].contiguous()))


def test_nothing_to_compute(device: str, seed: int) -> None:
    """No sequences, no query tokens, or rows of which no sequence has any: FlashAttention-3 returns results of that shape."""
    inputs = make_inputs(Case("none", lens=(70, 3)), seed, device)
    q, qv = inputs.q_rope[:, None], inputs.q_nope[:, None]
    none = {"cache_seqlens": inputs.cache_seqlens[:0], "page_table": inputs.block_table[:0]}
    sums = torch.zeros(3, dtype=torch.int32, device=device)
    for overrides, shape in (
        ({"q": q[:0], "qv": qv[:0], **none}, (0, 1)),
        ({"q": q[:, :0], "qv": qv[:, :0]}, (2, 0)),
        ({"q": q[0, :0], "qv": qv[0, :0], "cu_seqlens_q": sums, "max_seqlen_q": 0}, (0,)),
        ({"q": q[0, :0], "qv": qv[0, :0], "cu_seqlens_q": sums, "max_seqlen_q": 4}, (0,)),
        ({"q": inputs.q_rope, "qv": inputs.q_nope, "cu_seqlens_q": sums, "max_seqlen_q": 0}, (2,)),
        ({"q": inputs.q_rope, "qv": inputs.q_nope, "cu_seqlens_q": sums[:1], "max_seqlen_q": 1, **none}, (2,)),
    ):
        step = metadata(inputs)
        out, lse = decode(inputs, **overrides, scheduler_metadata=step)
        assert (out.shape, out.dtype) == ((*shape, 16, 512), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((*shape[:-1], 16, shape[-1]), torch.float32)
        assert not out.any() and (lse == -math.inf).all()
        check_result(inputs, *decode(inputs, scheduler_metadata=step))  # it still serves any step


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


def test_metadata_used_for_another_step(device: str, seed: int) -> None:
    """Metadata that is used again kept the lengths of its first call: other tensors, and these after they were written to, are noticed."""
    case = Case("again", lens=(130, 70, 64), query_lens=(3, 0, 2))
    inputs = make_inputs(case, seed, device)
    step = metadata(inputs)
    check_result(inputs, *decode(inputs, scheduler_metadata=step))
    for lens in ((3, 130, 64), (130, 2, 0), (9, 9, 9)):  # each in memory that may be the one before's
        inputs = with_lens(inputs, lens)
        check_result(inputs, *decode(inputs, scheduler_metadata=step))
    inputs.cache_seqlens.add_(50)
    check_result(inputs, *decode(inputs, scheduler_metadata=step))
    inputs.cu_seqlens_q.copy_(torch.tensor([0, 1, 4, 5], dtype=torch.int32))
    inputs = replace(inputs, case=replace(case, query_lens=(1, 3, 1)))
    check_result(inputs, *decode(inputs, scheduler_metadata=step))
    with torch.inference_mode():
        inputs = with_lens(inputs, (60, 0, 64))
    check_result(inputs, *decode(inputs, scheduler_metadata=step))
    inputs = with_lens(inputs, (64, 64, 64))
    check_result(inputs, *decode(inputs, scheduler_metadata=step, cache_seqlens=64))
    inputs = with_lens(inputs, (8, 8, 8))
    check_result(inputs, *decode(inputs, scheduler_metadata=step, cache_seqlens=8))
    with pytest.raises(ValueError, match="max_seqlen_q is 4; allowed: 3, as in the first call with this scheduler_metadata"):
        decode(inputs, scheduler_metadata=step, cu_seqlens_q=inputs.cu_seqlens_q.clone(), max_seqlen_q=4)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        decode(inputs, scheduler_metadata=step, cu_seqlens_q=None)


def test_layers_of_a_step_share_a_plan(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noticing must not mean planning in each layer: views of one tensor of lengths are the same lengths."""
    inputs = make_inputs(Case("layers", lens=(130, 70, 64)), seed)
    updates = []
    monkeypatch.setattr(etap.Plan, "update", lambda self, *lens, update=etap.Plan.update: updates.append(lens) or update(self, *lens))
    step = metadata(inputs)
    for layers in (1, 2):
        for _ in range(3):
            check_result(inputs, *decode(inputs, scheduler_metadata=step, cache_seqlens=inputs.cache_seqlens[:]))
        assert len(updates) == layers
        inputs.cache_seqlens.sub_(1)


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


def held(inputs: Inputs) -> int:
    """Tokens that a row of the block table holds."""
    return inputs.block_table.shape[1] * inputs.case.page_size


def two(q: torch.Tensor) -> torch.Tensor:
    """The queries as two tokens of each sequence."""
    return torch.stack([q, q], 1)


Refused = tuple[Callable[[Inputs], dict[str, Any]], type[Exception], str]
REFUSED: dict[str, Refused] = {
    name: (lambda i, name=name: {name: tensor}, NotImplementedError, f"{name} is a tensor; allowed: None")
    for name in ("k", "rotary_cos", "cache_batch_idx", "cache_leftpad")
} | {
    "attention_chunk": (lambda i: {"attention_chunk": 128}, NotImplementedError, "attention_chunk is 128; allowed: 0"),
    "softcap": (lambda i: {"softcap": 15.0}, NotImplementedError, "softcap is 15.0; allowed: 0.0"),
    "window_size": (lambda i: {"window_size": (128, 0)}, NotImplementedError, r"window_size is \(128, 0\); allowed: \(-1, -1\)"),
    "qv": (lambda i: {"qv": None}, NotImplementedError, r"qv is None; allowed: a tensor \(ETAP computes the MLA form over a paged cache\)"),
    "page_table": (lambda i: {"page_table": None}, NotImplementedError, "page_table is None; allowed: a tensor"),
    "cache_seqlens": (lambda i: {"cache_seqlens": None}, NotImplementedError, "cache_seqlens is None; allowed: a tensor"),
    "window to the left": (lambda i: {"window_size": (held(i) - 2, -1)}, NotImplementedError, r"window_size is \(\d+, -1\); allowed"),
    "window to the right": (
        lambda i: {"q": two(i.q_rope), "qv": two(i.q_nope), "window_size": (-1, 0), "causal": False},
        NotImplementedError,
        r"window_size is \(-1, 0\); allowed: \(-1, -1\)",
    ),
    "chunks": (lambda i: {"attention_chunk": held(i) - 1}, NotImplementedError, r"attention_chunk is \d+; allowed: 0"),
    "chunks before the first token": (
        lambda i: {"q": two(i.q_rope), "qv": two(i.q_nope), "attention_chunk": held(i), "causal": False},
        NotImplementedError,
        r"attention_chunk is \d+; allowed: 0",
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
    "q of FP8": (
        lambda i: {"q": i.q_rope[:, None].to(torch.float8_e4m3fn)},
        NotImplementedError,
        "q has type torch.float8_e4m3fn; allowed: torch.bfloat16 and torch.float16",
    ),
    "q of FP32": (lambda i: {"q": i.q_rope[:, None].float()}, ValueError, "q_dtype is 'fp32'; allowed: 'bf16', 'fp16'"),
    "qv of another type": (lambda i: {"qv": i.q_nope[:, None].half()}, ValueError, "qv has type fp16; allowed: bf16"),
    "no v_cache": (lambda i: {"v_cache": None}, TypeError, "v_cache is a NoneType; allowed: a tensor"),
    "page_table of 64 bits": (lambda i: {"page_table": i.block_table.long()}, ValueError, "page_table has type int64; allowed: int32"),
    "page_table of another batch": (
        lambda i: {"page_table": i.block_table[:1]},
        ValueError,
        r"page_table has shape \[1, .*; allowed: \[2,",
    ),
    "cache_seqlens of 64 bits": (
        lambda i: {"cache_seqlens": i.cache_seqlens.long()},
        ValueError,
        "cache_seqlens has type int64; allowed: int32",
    ),
    "KV heads": (
        lambda i: {
            "k_cache": cache_parts(i)[1].unsqueeze(2).expand(-1, -1, 2, -1),
            "v_cache": cache_parts(i)[0].unsqueeze(2).expand(-1, -1, 2, -1),
        },
        ValueError,
        r"\(v_cache, k_cache\) has shape \[.*, 64, 2, 576\]; allowed: \[any, 64, 576\]",
    ),
    "tensors of their own": (
        lambda i: {"k_cache": cache_parts(i)[1].unsqueeze(2).contiguous()},
        ValueError,
        r"\(v_cache, k_cache\) is a pair of .*; allowed: .* rows, pool\[..., :d_latent\] and pool\[..., d_latent:\]",
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
    if kind is NotImplementedError and what != "q of FP8":  # which is then another type than the plan's
        with pytest.raises(kind, match=sentence):
            decode(inputs, scheduler_metadata=step, **make(inputs))


def test_metadata_of_other_options_is_refused(seed: int) -> None:
    inputs = make_inputs(Case("options", lens=(70, 3)), seed)
    step = metadata(inputs)
    decode(inputs, scheduler_metadata=step)
    with pytest.raises(ValueError, match=r"is \(True, 1, 0\); allowed: \(True, 0, 0\), as in the first call with this scheduler_metadata"):
        decode(inputs, scheduler_metadata=step, num_splits=1)


DESCALES: dict[str, tuple[Callable[[torch.Tensor], dict[str, Any]], str]] = {
    "one": (lambda scale: {"k_descale": scale, "v_descale": None}, "k_descale and v_descale are different; allowed: the same memory"),
    "two": (lambda scale: {"k_descale": scale, "v_descale": scale.clone()}, "k_descale and v_descale are different; allowed: the same"),
    "by sequence": (
        lambda scale: dict.fromkeys(("k_descale", "v_descale"), scale.repeat(2, 1)),
        r"k_descale has shape \[2, 1\] and strides \[1, 1\]; allowed: one element, or strides of 0",
    ),
}


@pytest.mark.parametrize("what", DESCALES)
def test_scales_of_fp8_refused(what: str, device: str, seed: int) -> None:
    make, sentence = DESCALES[what]
    inputs = make_inputs(Case("descales", kv_format="e4m3", kv_scale_on_device=True, lens=(70, 3)), seed, device)
    with pytest.raises(NotImplementedError, match=sentence):
        decode(inputs, **make(inputs.kv_scale))
