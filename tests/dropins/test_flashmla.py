"""etap_flashmla against FP64, over the points of FlashMLA's own tests of decoding (tests/test_flash_mla_dense_decoding.py there)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Inputs, check, dequantise, make_inputs, reference
from dropins_kit import EMPTY, OUTSIDE, affordable, check_outside, draws, empty_inputs, fused_queries, shared_pages, with_lens
from etap_flashmla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
from harness import same_bits

import etap_py as etap

HEADS = [(h_q, h_kv) for h_q in (1, 3, 9, 63, 64, 126, 128) for h_kv in (1, 2, 3, 8) if h_q % h_kv == 0]
AXES = {
    "b": (1, 2, 6, 64, 128),
    "s_q": (1, 2, 4),
    "s_k": (20, 140, 4096),
    "varlen": (False, True),
    "zero_length": (False, True),
    "causal": (False, True),
    "dtype": ("bf16", "fp16"),
    "d": (576, 512),
    "old_form": (False, True),
}


def lengths(point: dict[str, Any], rng: random.Random) -> list[int]:
    lens = [point["s_k"]] * point["b"]
    if point["varlen"]:
        lens = [max(int(rng.normalvariate(length, length / 2)), point["s_q"]) for length in lens]
    return [0 if point["zero_length"] and rng.random() < 0.5 else length for length in lens]


def metadata(inputs: Inputs, heads: int, kv_heads: int, old_form: bool) -> tuple[FlashMLASchedMeta, None]:
    if not old_form:
        return get_mla_metadata()
    return get_mla_metadata(inputs.cache_seqlens, inputs.case.query_len * heads // kv_heads, kv_heads)


def check_result(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """[batch, tokens, heads, d_v] and [batch, heads, tokens]; +inf where a row sees no token, as FlashMLA has it."""
    assert not (lse == -math.inf).any()
    lse = torch.where(lse == math.inf, -math.inf, lse)
    check(inputs, out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1), reference(inputs))


def decode(inputs: Inputs, **overrides: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given: dict[str, Any] = {
        "q": fused_queries(inputs),
        "k_cache": inputs.kv_cache.unsqueeze(2),
        "block_table": inputs.block_table,
        "cache_seqlens": inputs.cache_seqlens,
        "head_dim_v": inputs.case.d_latent,
        "tile_scheduler_metadata": get_mla_metadata()[0],
        "softmax_scale": inputs.softmax_scale,
        "causal": inputs.case.causal,
    }
    return flash_mla_with_kvcache(**{**given, **overrides})


@pytest.mark.parametrize(("h_q", "h_kv"), HEADS)
def test_matrix(h_q: int, h_kv: int, device: str, seed: int) -> None:
    """Every head count and number of KV heads of FlashMLA's matrix, with draws of its other axes."""
    rng = random.Random(seed)
    for i, point in enumerate(draws(AXES, seed, device)):
        lens = affordable(lengths(point, rng), point["s_q"] * h_q, device)
        case = Case(
            f"{point} {lens} {h_q}/{h_kv}",
            lens=lens,
            pool_pages=shared_pages(lens, 64),
            heads=h_q // h_kv,
            query_len=point["s_q"],
            causal=point["causal"],
            q_dtype=point["dtype"],
            d_rope=point["d"] - 512,
        )
        first = make_inputs(case, seed + i, device)
        # Each KV head holds the values of the first in another order, and has queries of its own.
        kv_heads = [replace(first, kv_cache=first.kv_cache.roll(5 * n, -1), q_nope=first.q_nope.roll(n, -1)) for n in range(h_kv)]
        q = torch.cat([fused_queries(head) for head in kv_heads], 2)
        k_cache = torch.stack([head.kv_cache for head in kv_heads], 2)
        tile_scheduler_metadata, num_splits = metadata(first, h_q, h_kv, point["old_form"])
        for _ in range(2):  # the second layer of the step
            out, lse = flash_mla_with_kvcache(
                q,
                k_cache,
                first.block_table,
                first.cache_seqlens,
                512,
                tile_scheduler_metadata,
                num_splits,
                first.softmax_scale,
                point["causal"],
            )
        assert (out.shape, lse.shape) == ((len(lens), point["s_q"], h_q, 512), (len(lens), h_q, point["s_q"]))
        for n, head in enumerate(kv_heads):
            group = slice(n * case.heads, (n + 1) * case.heads)
            check_result(head, out[:, :, group], lse[:, group])


@pytest.mark.parametrize("stored", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_of_656_bytes(stored: torch.dtype, device: str, seed: int) -> None:
    """FlashMLA's FP8 rows, here with dense attention, in every type that frameworks keep them as."""
    inputs = make_inputs(Case("656", kv_format="e4m3_656", query_len=2, lens=(130, 0, 64, 7)), seed, device)
    check_result(inputs, *decode(inputs, k_cache=inputs.kv_cache.unsqueeze(2).view(stored), is_fp8_kvcache=True))


def test_e4m3_with_one_scale(device: str, seed: int) -> None:
    """`descale_k`, as vLLM's and SGLang's builds of FlashMLA have it."""
    inputs = make_inputs(Case("e4m3", kv_format="e4m3", kv_scale_on_device=True, lens=(130, 64)), seed, device)
    check_result(inputs, *decode(inputs, descale_k=inputs.kv_scale))


@pytest.mark.parametrize("kv_format", ["bf16", "e4m3_656"])
def test_arguments_without_effect(kv_format: str, device: str, seed: int) -> None:
    """vLLM passes descale_q and descale_k with every cache: only FP8 queries, and E4M3 caches, are scaled by them."""
    inputs = make_inputs(Case("effect", kv_format=kv_format, lens=(130, 0, 64)), seed, device)
    scale = torch.rand(1, device=device)
    k_cache = inputs.kv_cache.unsqueeze(2)
    check_result(inputs, *decode(inputs, k_cache=k_cache, is_fp8_kvcache=kv_format != "bf16", descale_q=scale, descale_k=scale))


@pytest.mark.parametrize("what", OUTSIDE)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_outside_of_the_table(kv_heads: int, what: str, device: str, seed: int) -> None:
    """A length beyond the columns of block_table went on in the next sequence's row, and past the last one in whatever came there."""

    def solve(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        q = torch.cat([fused_queries(inputs)] * kv_heads, 2)
        out, lse = decode(inputs, q=q, k_cache=torch.stack([inputs.kv_cache] * kv_heads, 2))
        return out[:, :, :16].flatten(0, 1), lse[:, :16].mT.flatten(0, 1)

    check_outside(what, solve, "cache_seqlens" if what == "a length" else "block_table", device, seed)


@pytest.mark.parametrize("what", EMPTY)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_nothing_stored(kv_heads: int, what: str, device: str, seed: int) -> None:
    """A pool without pages and a block_table without columns are legal where all lengths are 0."""
    inputs = empty_inputs(what, device, seed)
    q = torch.cat([fused_queries(inputs)] * kv_heads, 2)
    out, lse = decode(inputs, q=q, k_cache=torch.stack([inputs.kv_cache] * kv_heads, 2))
    for n in range(kv_heads):
        group = slice(n * 16, n * 16 + 16)
        check_result(inputs, out[:, :, group], lse[:, group])


def test_nothing_to_compute(device: str, seed: int) -> None:
    """No sequences, or no query tokens: results of that shape, and metadata that still serves any step."""
    inputs = make_inputs(Case("none", lens=(70, 3)), seed, device)
    q = fused_queries(inputs)
    none = {"cache_seqlens": inputs.cache_seqlens[:0], "block_table": inputs.block_table[:0]}
    for overrides, shape in (({"q": q[:0], **none}, (0, 1)), ({"q": q[:, :0]}, (2, 0))):
        step, _ = get_mla_metadata()
        out, lse = decode(inputs, **overrides, tile_scheduler_metadata=step)
        assert (out.shape, out.dtype) == ((*shape, 16, 512), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((shape[0], 16, shape[1]), torch.float32)
        check_result(inputs, *decode(inputs, tile_scheduler_metadata=step))


def test_default_softmax_scale(device: str, seed: int) -> None:
    inputs = make_inputs(Case("scale", lens=(70, 3)), seed, device)
    check_result(replace(inputs, softmax_scale=576**-0.5), *decode(inputs, softmax_scale=None))


def test_metadata_belongs_to_a_step(device: str, seed: int) -> None:
    """Lengths that changed in place count from the next metadata on; two metadata may be in use at once."""
    inputs = make_inputs(Case("steps", lens=(130, 70, 64)), seed, device)
    longer, _ = get_mla_metadata()
    out, lse = decode(inputs, tile_scheduler_metadata=longer)
    check_result(inputs, out, lse)
    shortened = replace(inputs, cache_seqlens=inputs.cache_seqlens - 60)
    shorter, _ = get_mla_metadata()
    for _ in range(2):
        check_result(shortened, *decode(shortened, tile_scheduler_metadata=shorter))
        again, _ = decode(inputs, tile_scheduler_metadata=longer)
        assert same_bits(out, again)


def test_metadata_used_for_another_step(device: str, seed: int) -> None:
    """Metadata that is used again kept the lengths of its first call: another tensor, and this one after it was written to, is noticed."""
    inputs = make_inputs(Case("again", lens=(130, 70, 64)), seed, device)
    step, _ = get_mla_metadata()
    check_result(inputs, *decode(inputs, tile_scheduler_metadata=step))
    for lens in ((3, 128, 64), (130, 2, 0), (9, 9, 9)):  # each in memory that may be the one before's
        inputs = with_lens(inputs, lens)
        check_result(inputs, *decode(inputs, tile_scheduler_metadata=step))
    inputs.cache_seqlens.add_(50)
    check_result(inputs, *decode(inputs, tile_scheduler_metadata=step))
    with torch.inference_mode():
        inputs = with_lens(inputs, (60, 0, 64))
    check_result(inputs, *decode(inputs, tile_scheduler_metadata=step))


def test_layers_of_a_step_share_a_plan(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noticing must not mean planning in each layer: views of one tensor of lengths are the same lengths."""
    inputs = make_inputs(Case("layers", lens=(130, 70, 64)), seed)
    updates = []
    monkeypatch.setattr(etap.Plan, "update", lambda self, *lens, update=etap.Plan.update: updates.append(lens) or update(self, *lens))
    step, _ = get_mla_metadata()
    for steps in (1, 2):
        for _ in range(3):
            check_result(inputs, *decode(inputs, tile_scheduler_metadata=step, cache_seqlens=inputs.cache_seqlens[:]))
        assert len(updates) == steps
        inputs.cache_seqlens.sub_(1)


@pytest.mark.gpu
def test_captured(cuda: str, seed: int) -> None:
    """Metadata made within the capture: a replay sees the lengths of its own time."""
    inputs = make_inputs(Case("captured", lens=(3000, 130, 64)), seed, cuda)
    decode(inputs)  # loads kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(inputs)
    for lens in ((1, 0, 64), (2999, 7, 3), (3000, 130, 64)):
        inputs.cache_seqlens.copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        check_result(inputs, out, lse)


# ---- Sparse attention, over the points of tests/test_flash_mla_sparse_decoding.py there ---------------------------------------

SPARSE_AXES = {
    "h_q": (1, 8, 16, 64, 128),
    "b": (2, 4, 74),
    "s_q": (1, 3),
    "pool": ((512, 64, 2), (512, 64, 69), (1024, 576, 61), (2046, 2048, 64), (2046, 2048, 576)),  # tokens, topk, page_block_size
    "kv_format": ("e4m3_656", "e4m3_528", "bf16"),
    "topk_length": (False, True),
    "attn_sink": (False, True),
    "all_invalid": (False, False, True),
    "stored": (torch.uint8, torch.float8_e4m3fn),
}


def sparse_case(point: dict[str, Any]) -> Case:
    tokens, _, page_size = point["pool"]
    case = Case(str(point), heads=point["h_q"], page_size=page_size, kv_format=point["kv_format"], lens=(tokens,), causal=False)
    batch = min(point["b"], max(2, 400_000 // (point["h_q"] * point["s_q"] * point["pool"][1])))
    rope = 0 if point["kv_format"] == "e4m3_528" else 64
    # One sequence fills the pool, and its tokens are seen by the queries of all.
    return replace(case, query_len=batch * point["s_q"], d_rope=rope)


def expected_of_lists(
    inputs: Inputs, q: torch.Tensor, indices: torch.Tensor, counts: torch.Tensor | None, sink: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """FP64 (out, lse) as FlashMLA's documentation of `indices`, `topk_length` and `attn_sink` has them; +inf where nothing is seen."""
    slots = torch.arange(len(inputs.kv_cache) * inputs.case.page_size)
    kv = dequantise(inputs, slots // inputs.case.page_size, slots % inputs.case.page_size)
    seen = indices >= 0
    if counts is not None:
        seen &= torch.arange(indices.shape[-1]) < counts[:, None, None]
    out = torch.zeros(*q.shape[:3], 512, dtype=torch.float64)
    lse = torch.full(q.shape[:3], math.inf, dtype=torch.float64)
    for b, token in ((b, t) for b in range(q.shape[0]) for t in range(q.shape[1])):
        mine = kv[indices[b, token][seen[b, token]].long()]
        if len(mine):
            logits = q[b, token].double() @ mine.T * inputs.softmax_scale
            lse[b, token] = logits.logsumexp(-1)
            out[b, token] = (logits - lse[b, token, :, None]).exp() @ mine[:, :512]
            if sink is not None:
                out[b, token] *= torch.sigmoid(lse[b, token] - sink.double())[:, None]
    return out, lse.mT


def draw_indices(inputs: Inputs, shape: tuple[int, ...], rng: random.Random) -> torch.Tensor:
    """Live tokens in any order, and -1 for a fifth of them."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    tokens = torch.randint(inputs.case.lens[0], shape, generator=generator)
    size = inputs.case.page_size
    slots = inputs.block_table[0, tokens // size].long() * size + tokens % size
    return slots.masked_fill(torch.rand(shape, generator=generator) < 0.2, -1).int()


@pytest.mark.parametrize("round_", range(6))
def test_sparse_matrix(round_: int, device: str, seed: int) -> None:
    """Draws from FlashMLA's matrix of sparse decoding, with our head counts and BF16 rows added: two layers with one metadata."""
    seed += round_
    rng = random.Random(seed)
    point = {name: rng.choice(values) for name, values in SPARSE_AXES.items()}
    case = sparse_case(point)
    inputs, there = make_inputs(case, seed), make_inputs(case, seed, device)
    batch, tokens, topk = case.query_len // point["s_q"], point["s_q"], point["pool"][1]
    q = fused_queries(inputs).view(batch, tokens, case.heads, -1)
    counts = torch.tensor([rng.randint(0, topk) for _ in range(batch)], dtype=torch.int32) if point["topk_length"] else None
    sink = torch.randn(case.heads) if point["attn_sink"] else None
    k_cache = there.kv_cache.unsqueeze(2)
    if point["kv_format"] != "bf16":
        k_cache = k_cache.view(point["stored"])
    step, _ = get_mla_metadata()
    for _ in range(2):
        indices = draw_indices(inputs, (batch, tokens, topk), rng)
        if point["all_invalid"]:
            indices[rng.randrange(batch)] = -1
        given = {
            "q": q.to(device),
            "k_cache": k_cache,
            "block_table": None,
            "cache_seqlens": None,
            "tile_scheduler_metadata": step,
            "is_fp8_kvcache": point["kv_format"] != "bf16",
            "indices": indices.to(device),
            "topk_length": None if counts is None else counts.to(device),
            "attn_sink": None if sink is None else sink.to(device),
            "causal": False,
        }
        out, lse = (result.cpu() for result in decode(there, **given))
        want, want_lse = expected_of_lists(inputs, q, indices, counts, sink)
        assert torch.equal(lse == math.inf, want_lse == math.inf)
        absolute = 4e-3 if device == "cuda" and case.kv_format != "bf16" else 1e-4  # etap.h: K is rounded in tiles of 64 rows
        torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=absolute)
        assert (out.double() - want).norm() <= 4e-3 * want.norm()  # twice rounded to BF16 where there is a sink


@pytest.mark.parametrize("heads", [1, 16])
def test_attn_sink(heads: int, seed: int) -> None:
    """In dense attention too: -inf changes nothing, +inf leaves 0, also in a row that sees no token; softmax_lse stays."""
    inputs = make_inputs(Case("sink", lens=(70, 0, 3), heads=heads), seed)
    out, lse = decode(inputs)
    for sink, want in ((-math.inf, out), (math.inf, torch.zeros_like(out))):
        got, got_lse = decode(inputs, attn_sink=torch.full((heads,), sink))
        assert torch.equal(got, want) and torch.equal(got_lse, lse)


def test_lengths_of_lists(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan a step, with topk_length and without; another tensor of lengths is planned again."""
    inputs = make_inputs(Case("counts", lens=(300,), query_len=4, causal=False, kv_format="e4m3_656"), seed)
    indices = draw_indices(inputs, (2, 2, 32), random.Random(seed))
    q = fused_queries(inputs).view(2, 2, 16, 576)
    updates = []
    monkeypatch.setattr(etap.Plan, "update", lambda self, *lens, update=etap.Plan.update: updates.append(lens) or update(self, *lens))
    step, _ = get_mla_metadata()
    for plans, counts in enumerate((None, (32, 5), (0, 32), None), 1):
        topk_length = None if counts is None else torch.tensor(counts, dtype=torch.int32)
        for _ in range(2):
            given = {"q": q, "indices": indices, "topk_length": topk_length, "causal": False, "is_fp8_kvcache": True}
            out, _ = decode(inputs, tile_scheduler_metadata=step, **given)
            want, _ = expected_of_lists(inputs, q, indices, topk_length, None)
            assert (out.double() - want).norm() <= 4e-3 * want.norm()
        assert len(updates) == plans


def test_lists_anyhow_in_memory(seed: int) -> None:
    """Lists in a larger buffer, expanded or transposed were refused for their strides; q is looked at as it is too."""
    inputs = make_inputs(Case("strides", lens=(300,), query_len=6, causal=False), seed)
    rng = random.Random(seed)
    q = fused_queries(inputs).view(2, 3, 16, 576)
    buffer = draw_indices(inputs, (2, 5, 40), rng)
    for indices in (buffer[:, :3, :32], buffer[:, :1, :32].expand(2, 3, 32), draw_indices(inputs, (3, 2, 32), rng).transpose(0, 1)):
        out, _ = decode(inputs, q=q, indices=indices, causal=False)
        want, _ = expected_of_lists(inputs, q, indices, None, None)
        assert (out.double() - want).norm() <= 4e-3 * want.norm()


def test_sink_is_no_parameter_of_a_graph(seed: int) -> None:
    """A sink that is a parameter of the model made `out` require a gradient."""
    inputs = make_inputs(Case("parameter", lens=(70, 3)), seed)
    out, lse = decode(inputs, attn_sink=torch.nn.Parameter(torch.zeros(16)))
    assert not out.requires_grad and not lse.requires_grad


def lists_of(*shape: int, slot: int = 0) -> torch.Tensor:
    return torch.full(shape, slot, dtype=torch.int32)


# Of two sequences with two query tokens each.
SPARSE_REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "two dimensions": ({"indices": lists_of(4, 8)}, ValueError, r"indices has shape \[4, 8\]; allowed: \[2, 2, topk\]"),
    "topk 0": ({"indices": lists_of(2, 2, 0)}, ValueError, r"indices has shape \[2, 2, 0\]; allowed: .* topk from 1 to 65536"),
    "no tensor": ({"indices": [[[0]]]}, TypeError, "indices is a list; allowed: a tensor"),
    "64 bits": ({"indices": lists_of(2, 2, 8).long()}, ValueError, "indices has type int64; allowed: int32"),
    "as many lists": ({"indices": lists_of(4, 1, 8)}, ValueError, r"indices has shape \[4, 1, 8\]; allowed: \[2, 2, topk\]"),
    "causal": ({"causal": True}, ValueError, "causal is True and k_cache has 1 heads; allowed: False and 1 with indices"),
    "beyond the pool": (
        {"indices": torch.cat([lists_of(2, 2, 7), torch.tensor([[[0], [0]], [[0], [10**6]]]).int()], 2)},
        ValueError,
        r"indices\[1, 1, 7\] is 1000000; allowed: -1 for none, or 0 to below num_blocks \* page_block_size",
    ),
    "counts": ({"topk_length": torch.tensor([8, 9]).int()}, ValueError, r"topk_length\[1\] is 9; allowed: 0 to topk, which is 8"),
    "a count for each list": ({"topk_length": lists_of(4)}, ValueError, r"topk_length has shape \[4\]; allowed: \[2\]"),
    "counts of no tensor": ({"topk_length": [8, 8]}, TypeError, "topk_length is a list; allowed: a tensor"),
    "counts apart": ({"topk_length": lists_of(4)[::2]}, ValueError, "topk_length has an innermost stride of 2 elements; allowed: 1"),
    "sink of 16 bits": ({"attn_sink": torch.zeros(16).bfloat16()}, ValueError, "attn_sink has type torch.bfloat16 and shape "),
    "sink of one head": ({"attn_sink": torch.zeros(1)}, ValueError, r"attn_sink .* shape \[1\]; allowed: torch.float32 and \[16\]"),
    "extra_k_cache": ({"extra_k_cache": torch.zeros(1)}, NotImplementedError, "extra_k_cache is given; allowed: None"),
}


@pytest.mark.parametrize("what", SPARSE_REFUSED)
def test_sparse_refused(what: str, seed: int) -> None:
    change, kind, sentence = SPARSE_REFUSED[what]
    inputs = make_inputs(Case("refused", lens=(70, 3), query_len=2), seed)
    with pytest.raises(kind, match=sentence):
        decode(inputs, **{"indices": lists_of(2, 2, 8), "causal": False, **change})


def test_sparse_refused_later(seed: int) -> None:
    """Metadata of a sparse step takes lists of its shape only, and no dense call: as many lists in another shape had kept their lengths."""
    inputs = make_inputs(Case("later", lens=(70, 3, 3), query_len=2), seed)
    step, _ = get_mla_metadata()
    given = {"tile_scheduler_metadata": step, "causal": False, "topk_length": lists_of(3, slot=8)}
    decode(inputs, **given, indices=lists_of(3, 2, 8))
    with pytest.raises(ValueError, match="indices is None; allowed: a tensor, as in the first call with this tile_scheduler_metadata"):
        decode(inputs, tile_scheduler_metadata=step, causal=False)
    with pytest.raises(ValueError, match=r"indices has shape \[6, 9\]; allowed: \[6, 8\]"):
        decode(inputs, **given, indices=lists_of(3, 2, 9))
    for q in (fused_queries(inputs).view(2, 3, 16, 576), fused_queries(inputs).flatten(0, 1)):
        with pytest.raises(ValueError, match=r"q has shape .* and indices .*; allowed: \[batch, 2, num_heads_q, head_dim\] and "):
            decode(inputs, **given, q=q, indices=lists_of(*q.shape[:-2], 8))
    for other, told in (({"head_dim_v": 256}, "head_dim_v is 256"), ({"is_fp8_kvcache": True}, "is_fp8_kvcache True")):
        with pytest.raises(ValueError, match=f"{told}.*as in the first call with this tile_scheduler_metadata"):
            decode(inputs, **given, indices=lists_of(3, 2, 8), **other)


@pytest.mark.gpu
def test_captured_lists(cuda: str, seed: int) -> None:
    """Metadata made within the capture: a replay sees the lists and their lengths of its own time."""
    rng = random.Random(seed)
    case = Case("captured", lens=(300,), query_len=4, causal=False, kv_format="e4m3_656")
    inputs, there = make_inputs(case, seed), make_inputs(case, seed, cuda)
    q = fused_queries(inputs).view(2, 2, 16, 576)
    indices, counts = draw_indices(inputs, (2, 2, 96), rng).to(cuda), torch.full((2,), 96, dtype=torch.int32, device=cuda)
    given = {"q": q.to(cuda), "indices": indices, "topk_length": counts, "causal": False, "is_fp8_kvcache": True}
    decode(there, **given)  # loads kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decode(there, **given)
    for lengths in ((0, 5), (96, 64), (1, 96)):
        indices.copy_(draw_indices(inputs, (2, 2, 96), rng))
        counts.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        want, _ = expected_of_lists(inputs, q, indices.cpu(), counts.cpu(), None)
        assert (out.cpu().double() - want).norm() <= 4e-3 * want.norm()


tensor = torch.zeros(1)
REFUSED: dict[str, tuple[Callable[[Inputs], dict[str, Any]], type[Exception], str]] = {
    "extra_k_cache": (
        lambda i: {"extra_k_cache": tensor},
        NotImplementedError,
        r"extra_k_cache is given; allowed: None \(ETAP reads one cache\)",
    ),
    "extra_indices_in_kvcache": (lambda i: {"extra_indices_in_kvcache": tensor}, NotImplementedError, "extra_indices_in_kvcache is given"),
    "topk_length": (lambda i: {"topk_length": tensor}, NotImplementedError, "topk_length is given without indices; allowed: None in dense"),
    "extra_topk_length": (lambda i: {"extra_topk_length": tensor}, NotImplementedError, "extra_topk_length is given; allowed: None"),
    "q of FP8": (
        lambda i: {"q": fused_queries(i).to(torch.float8_e4m3fn), "descale_q": tensor},
        NotImplementedError,
        "q has type torch.float8_e4m3fn; allowed: torch.bfloat16 and torch.float16",
    ),
    "q of FP32": (lambda i: {"q": fused_queries(i).float()}, ValueError, "q_dtype is 'fp32'; allowed: 'bf16', 'fp16'"),
    "k_cache of another type": (lambda i: {"k_cache": i.kv_cache.half().unsqueeze(2)}, ValueError, "k_cache has type fp16; allowed: bf16"),
    "block_table of 64 bits": (lambda i: {"block_table": i.block_table.long()}, ValueError, "block_table has type int64; allowed: int32"),
    "cache_seqlens of 64 bits": (
        lambda i: {"cache_seqlens": i.cache_seqlens.long()},
        ValueError,
        "cache_seqlens has type int64; allowed: int32",
    ),
    "an 8-bit cache of no kind": (
        lambda i: {"k_cache": i.kv_cache.to(torch.float8_e4m3fn).unsqueeze(2)},
        ValueError,
        "is_fp8_kvcache is False, descale_k is None and k_cache has type torch.float8_e4m3fn; allowed: is_fp8_kvcache or descale_k",
    ),
    "no KV heads": (lambda i: {"k_cache": i.kv_cache.unsqueeze(2)[:, :, :0]}, ValueError, "q has 16 heads and k_cache 0; allowed"),
    "rows of 584 bytes": (
        lambda i: {"k_cache": torch.zeros(2, 64, 1, 584, dtype=torch.uint8, device=i.device), "is_fp8_kvcache": True},
        NotImplementedError,
        "k_cache has rows of 584 bytes; allowed: 576 E4M3 values, or 656 or 528 bytes with their scales",
    ),
    "no q": (lambda i: {"q": None}, TypeError, "q is a NoneType; allowed: a tensor"),
    "head_dim_v": (lambda i: {"head_dim_v": 448}, etap.EtapInvalidArgument, r"is \(448, 128\); allowed: \(512, 64\)"),
    "block_table": (lambda i: {"block_table": None}, ValueError, "block_table or cache_seqlens is None; allowed: int32 tensors"),
    "cache_seqlens": (lambda i: {"cache_seqlens": None}, ValueError, "block_table or cache_seqlens is None; allowed: int32 tensors"),
    "metadata of tensors": (lambda i: {"tile_scheduler_metadata": tensor}, TypeError, "tile_scheduler_metadata is a Tensor and num_splits"),
    "num_splits": (lambda i: {"num_splits": tensor}, TypeError, "allowed: the pair that etap_flashmla.get_mla_metadata returned"),
    "is_fp8_kvcache": (lambda i: {"is_fp8_kvcache": True}, ValueError, "is_fp8_kvcache is True, descale_k is None and k_cache has type"),
    "three dimensions": (lambda i: {"k_cache": i.kv_cache}, ValueError, "k_cache .*; allowed: .*page_block_size, num_heads_k, head_dim"),
    "KV heads": (lambda i: {"k_cache": i.kv_cache.unsqueeze(2).expand(-1, -1, 3, -1)}, ValueError, "q has 16 heads and k_cache 3; allowed"),
    "page_block_size": (lambda i: {"k_cache": i.kv_cache[:, :48].unsqueeze(2)}, etap.EtapInvalidArgument, "page_size is 48; allowed"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, device: str, seed: int) -> None:
    """Each row of the table "refused" in docs/from-flashmla.md, with a sentence."""
    make, kind, sentence = REFUSED[what]
    inputs = make_inputs(Case("refused", lens=(70, 3)), seed, device)
    with pytest.raises(kind, match=sentence):
        decode(inputs, **make(inputs))


def test_refused_later(seed: int) -> None:
    """Metadata that serves a step is no way around the refusals, nor around its own causal."""
    inputs = make_inputs(Case("later", lens=(70, 3), query_len=2), seed)
    step, _ = get_mla_metadata()
    decode(inputs, tile_scheduler_metadata=step)
    with pytest.raises(NotImplementedError, match="extra_k_cache is given; allowed: None"):
        decode(inputs, tile_scheduler_metadata=step, extra_k_cache=tensor)
    with pytest.raises(ValueError, match="indices is a tensor; allowed: None, as in the first call with this tile_scheduler_metadata"):
        decode(inputs, tile_scheduler_metadata=step, indices=tensor)
    with pytest.raises(ValueError, match="causal is False; allowed: True, as in the first call with this tile_scheduler_metadata"):
        decode(inputs, tile_scheduler_metadata=step, causal=False)
    with pytest.raises(ValueError, match=r"q has shape \[2, 16, 576\]; allowed: \[4, 16, 576\]"):
        decode(inputs, tile_scheduler_metadata=step, q=fused_queries(inputs)[:1])
    two = torch.stack([inputs.kv_cache] * 2, 2)
    with pytest.raises(ValueError, match=r"k_cache has shape \[.*, 64, 2, 576\]; allowed: \[any, 64, 576\]"):
        decode(inputs, tile_scheduler_metadata=step, k_cache=two)
    step_of_two, _ = get_mla_metadata()
    q = fused_queries(inputs)
    decode(inputs, tile_scheduler_metadata=step_of_two, k_cache=two)
    for other in ({"k_cache": two[:, :, :1]}, {"k_cache": two, "q": torch.cat([q, q], 2)}, {"k_cache": two, "q": q[0]}):
        with pytest.raises(
            ValueError, match=r"and k_cache \[.*576\]; allowed: 16 heads and 2, as in the first call with this tile_scheduler"
        ):
            decode(inputs, tile_scheduler_metadata=step_of_two, **other)
    with pytest.raises(ValueError, match=r"cache_seqlens has shape \[1\]; allowed: \[2\]"):
        decode(inputs, tile_scheduler_metadata=step, cache_seqlens=inputs.cache_seqlens[:1])
    with pytest.raises(ValueError, match=r"q has shape \[4, 16, 0\]; allowed: \[4, 16, 5"):
        decode(inputs, tile_scheduler_metadata=step, q=fused_queries(inputs)[..., :0], softmax_scale=None)
    for name in ("block_table", "cache_seqlens"):
        with pytest.raises(ValueError, match="block_table or cache_seqlens is None; allowed: int32 tensors"):
            decode(inputs, tile_scheduler_metadata=step, **{name: None})
