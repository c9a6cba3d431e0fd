"""FlashMLA's decode interface, computed by ETAP.

    from etap_flashmla import flash_mla_with_kvcache, get_mla_metadata

in place of `from flash_mla import ...`. Both forms of the interface work: a metadata object that the first call fills (2026), and
metadata computed from the lengths (2025). What differs and what is refused: docs/from-flashmla.md. `etap_py.routing` can hand calls
to an installed FlashMLA instead.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import torch
from etap_py import Plan, Problem
from etap_py import __version__ as __version__
from etap_py.dropin import Watched, check_tensors
from etap_py.errors import REFUSALS, EtapError, Words
from etap_py.problem import FORMATS_OF_ROWS, ROW_BYTES
from etap_py.routing import Peer
from etap_py.tensors import check as check_view
from etap_py.tensors import view
from torch import Tensor

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]

_PEER = Peer("FlashMLA", "flash_mla")
_INF = float("inf")
_WORDS = Words({"q_nope": "q", "kv_cache": "k_cache", "kv_scale": "descale_k"})
_SPARSE_WORDS = Words(
    {
        "q_nope": "q",
        "kv_cache": "k_cache",
        "kv_scale": "descale_k",
        "slots": "indices",
        "cache_seqlens": "topk_length",
        "num_pages": "num_blocks",
        "page_size": "page_block_size",
    }
)


class FlashMLASchedMeta:
    """What the layers of a step share: made by `get_mla_metadata`, filled by the first `flash_mla_with_kvcache` that gets it.

    It serves calls with the same shapes, types and `causal`, all dense or all sparse; the next step takes a new one. Another tensor as
    `cache_seqlens` or `topk_length`, or the same one after PyTorch wrote to it, is planned again; what else writes to it is not noticed.
    It owns the workspace of its calls, so that two of them can be in use on two streams.
    """

    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.plan: Plan | None = None  # set by the first call, or else:
        self.peer: ModuleType | None = None
        self.peer_metadata: tuple[Any, Any] = (None, None)
        self.causal = False
        self.kv_heads = 1
        self.tokens = 1  # query tokens of a sequence
        self.is_fp8_kvcache = False
        self.lengths: Watched | None = None  # those of the plan: cache_seqlens, or topk_length
        self._arguments = arguments, keywords

    def hand_to(self, peer: ModuleType) -> None:
        """All calls go to the wrapped library, which gets what `get_mla_metadata` got."""
        arguments, keywords = self._arguments
        self.peer, self.peer_metadata = peer, peer.get_mla_metadata(*arguments, **keywords)

    def update(self, lengths: Tensor | None) -> None:
        """Plans for these lengths [batch]."""
        assert self.plan is not None
        planned = lengths
        if self.plan.problem.topk and lengths is not None:  # each query token has a list, and each list its length
            check_tensors(topk_length=lengths)
            batch = self.plan.problem.batch // self.tokens
            check_view("topk_length", view("topk_length", lengths), (batch,), "int32", self.plan.problem.device)
            planned = lengths.repeat_interleave(self.tokens) if self.tokens > 1 else lengths
        try:
            self.plan.update(planned)
        except REFUSALS as refusal:
            raise self.reworded(refusal) from None
        self.lengths = Watched(lengths)

    def reworded(self, refusal: ValueError | TypeError | EtapError) -> Exception:
        """In FlashMLA's words, and with places of [batch, ...] for those of the plan's lists, one a query token."""
        assert self.plan is not None
        if not self.plan.problem.topk:
            return _WORDS(refusal)

        def place(found: re.Match[str]) -> str:
            name, row = found[1], int(found[2])
            return f"{name}[{row // self.tokens}" + (f", {row % self.tokens}" if name == "indices" else "")

        return Words.replaced(_SPARSE_WORDS(refusal), lambda sentence: re.sub(r"\b(indices|topk_length)\[(\d+)", place, sentence))


def get_mla_metadata(*arguments: Any, **keywords: Any) -> tuple[FlashMLASchedMeta, None]:
    """(metadata, None), to be passed on as `tile_scheduler_metadata` and `num_splits`.

    Today's form takes no arguments. Those of the earlier one (cache_seqlens, num_q_tokens_per_head_k, num_heads_k, ...) are accepted;
    the plan is made from the lengths that the first call gets.
    """
    return FlashMLASchedMeta(arguments, keywords), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    *,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode attention of one layer: (out, softmax_lse); sparse with `indices`.

    q: BF16 or FP16 [batch, seq_len_q, num_heads_q, head_dim_v + rope]
    k_cache: [num_blocks, page_block_size, num_heads_k, head_dim_v + rope] of q's type, or of E4M3 with one scale; or 656 bytes a row
        (528 where rope is 0), [num_blocks, page_block_size, 1, 656] of any 8-bit type; V is its first head_dim_v values
    block_table: int32 [batch, max_num_blocks_per_seq]; entries past a sequence's end are never read. Without effect with indices
    cache_seqlens: int32 [batch], KV tokens, the new ones included. Without effect with indices
    head_dim_v: 512 or 256
    tile_scheduler_metadata, num_splits: what `get_mla_metadata` returned
    softmax_scale: default 1 / sqrt(q.shape[-1])
    causal: query token i of n sees the first L - n + i + 1 tokens
    is_fp8_kvcache: k_cache holds FP8
    indices: int32 [batch, seq_len_q, topk], block * page_block_size + offset of each KV token that a query token sees, or -1 where there
        is none, anywhere; topk is 1 to 65536, num_heads_k 1 and causal False
    topk_length: int32 [batch], with indices: how many of each list count, from its beginning; default: all
    attn_sink: FP32 [num_heads_q], logits of a token that has no value: out is multiplied by sigmoid(lse - attn_sink), softmax_lse stays
    descale_k: FP32 of one element, the scale of an E4M3 cache (the keyword of vLLM's and SGLang's builds of FlashMLA); without effect
        with another cache, as is descale_q

    out: of q's type [batch, seq_len_q, num_heads_q, head_dim_v]
    softmax_lse: FP32 [batch, num_heads_q, seq_len_q], base e, a view whose innermost stride is num_heads_q. A query row that sees no
        token gets out = 0 and, as FlashMLA has it, +inf here. Without sequences or query tokens nothing is computed.

    Raises NotImplementedError for what ETAP does not compute (a second cache, FP8 queries), TypeError and ValueError for arguments that
    don't fit, EtapError with the library's sentence.
    """
    step = tile_scheduler_metadata
    if not isinstance(step, FlashMLASchedMeta) or num_splits is not None:
        raise TypeError(
            f"tile_scheduler_metadata is a {type(step).__name__} and num_splits a {type(num_splits).__name__}; "
            "allowed: the pair that etap_flashmla.get_mla_metadata returned"
        )
    refusal = _refusal(indices, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
    if step.plan is None and step.peer is None:
        if refusal:
            step.hand_to(_PEER.instead(refusal))
        elif not _begin(step, q, k_cache, head_dim_v, causal, is_fp8_kvcache, indices, descale_k):
            shape = *q.shape[:3], head_dim_v
            return q.new_empty(shape), q.new_empty(q.shape[:3], dtype=torch.float32).mT
    if step.peer is not None:
        keywords = {
            "softmax_scale": softmax_scale,
            "indices": indices,
            "attn_sink": attn_sink,
            "extra_k_cache": extra_k_cache,
            "extra_indices_in_kvcache": extra_indices_in_kvcache,
            "topk_length": topk_length,
            "extra_topk_length": extra_topk_length,
            "descale_q": descale_q,
            "descale_k": descale_k,
        }
        given = {name: value for name, value in keywords.items() if value is not None}  # an older FlashMLA does not know them all
        if is_fp8_kvcache:
            given["is_fp8_kvcache"] = True
        result: tuple[Tensor, Tensor] = step.peer.flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, head_dim_v, *step.peer_metadata, causal=causal, **given
        )
        return result
    plan = step.plan
    assert plan is not None
    if refusal:
        raise NotImplementedError(refusal)
    sparse = plan.problem.topk > 0
    if causal != step.causal:
        raise ValueError(f"causal is {causal}; allowed: {step.causal}, as in the first call with this tile_scheduler_metadata")
    if sparse != (indices is not None):
        got, wanted = ("None", "a tensor") if sparse else ("a tensor", "None")
        raise ValueError(f"indices is {got}; allowed: {wanted}, as in the first call with this tile_scheduler_metadata")
    if not sparse and (block_table is None or cache_seqlens is None):
        raise ValueError("block_table or cache_seqlens is None; allowed: int32 tensors, dense attention needs both")
    if (head_dim_v, is_fp8_kvcache) != (plan.problem.d_latent, step.is_fp8_kvcache):
        raise ValueError(
            f"head_dim_v is {head_dim_v} and is_fp8_kvcache {is_fp8_kvcache}; allowed: {plan.problem.d_latent} and {step.is_fp8_kvcache}, "
            "as in the first call with this tile_scheduler_metadata"
        )
    if indices is not None:
        indices = _lists(q, indices, step.tokens)
    lengths = topk_length if sparse else cache_seqlens
    if step.lengths is None or not step.lengths.is_still(lengths):
        step.update(lengths)
    if softmax_scale is None:
        softmax_scale = (plan.problem.d_latent + plan.problem.d_rope) ** -0.5
    kv_format = plan.problem.kv_format
    if kv_format in ROW_BYTES and k_cache.dtype != torch.uint8:
        k_cache = k_cache.view(torch.uint8)
    kv_scale = descale_k if kv_format == "e4m3" else None
    lse: Tensor | None
    try:
        if step.kv_heads > 1:
            assert block_table is not None  # dense
            out, lse = _run_each_kv_head(plan, step.kv_heads, q, k_cache, block_table, softmax_scale, kv_scale)
        else:
            out, lse = plan.run(
                q,
                None,
                k_cache,
                None if sparse else block_table,
                slots=indices,
                softmax_scale=softmax_scale,
                kv_scale=kv_scale,
                lse_heads_first=True,
                empty_lse=_INF,
            )
    except REFUSALS as refused:
        raise step.reworded(refused) from None
    assert lse is not None  # return_lse is True
    if attn_sink is not None:
        _apply_sink(out, lse, attn_sink)
    return out, lse


def _refusal(
    indices: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices_in_kvcache: Tensor | None,
    topk_length: Tensor | None,
    extra_topk_length: Tensor | None,
) -> str:
    """Which argument ETAP has no use for; "": none."""
    extras = {
        "extra_k_cache": extra_k_cache,
        "extra_indices_in_kvcache": extra_indices_in_kvcache,
        "extra_topk_length": extra_topk_length,
    }
    for name, value in extras.items():
        if value is not None:
            return f"{name} is given; allowed: None (ETAP reads one cache)"
    if indices is None and topk_length is not None:
        return "topk_length is given without indices; allowed: None in dense attention"
    return ""


def _lists(q: Tensor, indices: Tensor, tokens: int) -> Tensor:
    """indices as one list a query token, [batch * tokens, topk]: a copy where strides leave no other way."""
    check_tensors(q=q, indices=indices)
    if (q.dim(), indices.dim()) != (4, 3) or q.shape[1] != tokens or indices.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q has shape {list(q.shape)} and indices {list(indices.shape)}; allowed: [batch, {tokens}, num_heads_q, head_dim] and "
            f"[batch, {tokens}, topk], as in the first call with this tile_scheduler_metadata"
        )
    return indices.flatten(0, 1)


def _apply_sink(out: Tensor, lse: Tensor, attn_sink: Tensor) -> None:
    """out times exp(lse) / (exp(lse) + exp(attn_sink)), in place. A row that sees no token, whose lse is +inf here, stays 0."""
    check_tensors(attn_sink=attn_sink)
    if attn_sink.shape != lse.shape[1:2] or attn_sink.dtype != torch.float32:
        raise ValueError(
            f"attn_sink has type {attn_sink.dtype} and shape {list(attn_sink.shape)}; allowed: torch.float32 and [{lse.shape[1]}]"
        )
    share = torch.sigmoid(lse - attn_sink.detach()[:, None]).masked_fill_(lse == _INF, 0.0)
    out.mul_(share.mT.unsqueeze(-1))


def _begin(
    step: FlashMLASchedMeta,
    q: Tensor,
    k_cache: Tensor,
    head_dim_v: int,
    causal: bool,
    is_fp8_kvcache: bool,
    indices: Tensor | None,
    descale_k: Tensor | None,
) -> bool:
    """The first call of a step: who computes it, and the plan. False: there is nothing to compute."""
    check_tensors(q=q, k_cache=k_cache)
    if q.element_size() == 1:
        step.hand_to(_PEER.instead(f"q has type {q.dtype}; allowed: torch.bfloat16 and torch.float16"))
        return True
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError(
            f"q has shape {list(q.shape)} and k_cache {list(k_cache.shape)}; allowed: [batch, seq_len_q, num_heads_q, head_dim] and "
            "[num_blocks, page_block_size, num_heads_k, head_dim]"
        )
    batch, tokens, heads, width = q.shape
    kv_heads = k_cache.shape[2]
    if not (batch and tokens):
        return False
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"q has {heads} heads and k_cache {kv_heads}; allowed: a multiple of k_cache's")
    fp8 = k_cache.element_size() == 1
    if (is_fp8_kvcache and not fp8) or (fp8 and not is_fp8_kvcache and descale_k is None):
        raise ValueError(
            f"is_fp8_kvcache is {is_fp8_kvcache}, descale_k is {descale_k} and k_cache has type {k_cache.dtype}; "
            "allowed: is_fp8_kvcache or descale_k with an 8-bit k_cache, is_fp8_kvcache False with a 16-bit one"
        )
    if fp8 and k_cache.shape[3] not in (width, *FORMATS_OF_ROWS):  # FlashMLA has rows of 584 bytes, with 448 values
        refusal = f"k_cache has rows of {k_cache.shape[3]} bytes; allowed: {width} E4M3 values, or 656 or 528 bytes with their scales"
        step.hand_to(_PEER.instead(refusal))
        return True
    topk = 0
    if indices is not None:
        check_tensors(indices=indices)
        if indices.dim() != 3 or indices.shape[:2] != (batch, tokens) or not indices.shape[2]:
            raise ValueError(f"indices has shape {list(indices.shape)}; allowed: [{batch}, {tokens}, topk] with topk from 1 to 65536")
        if causal or kv_heads > 1:
            raise ValueError(f"causal is {causal} and k_cache has {kv_heads} heads; allowed: False and 1 with indices")
        topk = indices.shape[2]
    kv_format = str(q.dtype)
    if fp8:
        kv_format = FORMATS_OF_ROWS.get(k_cache.shape[3], "e4m3")
    problem = Problem(
        num_heads=heads // kv_heads,
        batch=batch * tokens if topk else batch,
        page_size=k_cache.shape[1],
        d_latent=head_dim_v,
        d_rope=width - head_dim_v,
        q_dtype=str(q.dtype),
        kv_format=kv_format,
        max_query_len=1 if topk else tokens,
        causal=causal,
        topk=topk,
        device=str(q.device),
    )
    peer = _PEER.chosen_for(problem)
    if peer is not None:
        step.hand_to(peer)
        return True
    step.plan, step.causal, step.is_fp8_kvcache, step.kv_heads, step.tokens = Plan(problem), causal, is_fp8_kvcache, kv_heads, tokens
    return True


def _run_each_kv_head(
    plan: Plan, kv_heads: int, q: Tensor, k_cache: Tensor, block_table: Tensor, softmax_scale: float, kv_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Grouped-query attention: heads of q that share a KV head are a problem of their own, all with one plan."""
    check_tensors(q=q, k_cache=k_cache)
    group_size = plan.problem.num_heads
    if (q.dim(), k_cache.dim()) != (4, 4) or (q.shape[2], k_cache.shape[2]) != (kv_heads * group_size, kv_heads):
        raise ValueError(
            f"q has shape {list(q.shape)} and k_cache {list(k_cache.shape)}; allowed: {kv_heads * group_size} heads and {kv_heads}, as in "
            "the first call with this tile_scheduler_metadata"
        )
    out = q.new_empty((*q.shape[:3], plan.problem.d_latent))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for i in range(kv_heads):
        group = slice(i * group_size, (i + 1) * group_size)
        plan.run(
            q[:, :, group],
            None,
            k_cache[:, :, i],
            block_table,
            softmax_scale=softmax_scale,
            kv_scale=kv_scale,
            out=out[:, :, group],
            lse=lse[:, :, group],
            empty_lse=_INF,
        )
    return out, lse.mT
