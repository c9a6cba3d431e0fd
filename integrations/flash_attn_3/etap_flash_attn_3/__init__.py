"""FlashAttention-3's decode interface in its MLA form, computed by ETAP.

    from etap_flash_attn_3 import flash_attn_with_kvcache, get_scheduler_metadata

in place of `from flash_attn_interface import ...`. The MLA form: q holds the rope part of the queries, qv the latent part, k_cache the
rope part of the rows, v_cache the latent part. What differs and what is refused: docs/from-flash-attention-3.md. `etap_py.routing` can
hand calls to an installed FlashAttention-3 instead.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from etap_py import Plan, Problem, device_info
from etap_py import __version__ as __version__
from etap_py.dropin import Watched, check_tensors
from etap_py.errors import REFUSALS, Words
from etap_py.routing import Peer
from torch import Tensor

__all__ = ["SchedulerMetadata", "flash_attn_with_kvcache", "get_scheduler_metadata"]

_PEER = Peer("FlashAttention-3", "flash_attn_interface")
_NO_WINDOW = (-1, -1)
_WORDS = Words(
    {
        "q_nope": "qv",
        "q_rope": "q",
        "kv_cache": "(v_cache, k_cache)",
        "kv_cache[0]": "v_cache",
        "kv_cache[1]": "k_cache",
        "kv_scale": "k_descale",
        "block_table": "page_table",
    }
)


class SchedulerMetadata:
    """What the layers of a step share: made by `get_scheduler_metadata`, filled by the first `flash_attn_with_kvcache` that gets it.

    It serves calls with the same shapes, types and options; the next step takes a new one. Other tensors as `cache_seqlens` and
    `cu_seqlens_q`, or these tensors after PyTorch wrote to them, are planned again; what else writes to them is not noticed. It owns the
    workspace of its calls, so that two of them can be in use on two streams.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.plan: Plan | None = None  # set by the first call, or else:
        self.peer: ModuleType | None = None
        self.peer_metadata: Tensor | None = None
        self.options: tuple[bool, int, int] = (False, 0, 0)  # causal, num_splits, sm_margin
        self.cache_seqlens: int | Watched | None = None  # those of the plan
        self.cu_seqlens_q: Watched | None = None
        self._arguments = arguments

    def hand_to(self, peer: ModuleType) -> None:
        """All calls go to the wrapped library, which gets what `get_scheduler_metadata` got."""
        self.peer = peer
        if self._arguments:
            self.peer_metadata = peer.get_scheduler_metadata(**self._arguments)

    def update(self, cache_seqlens: int | Tensor, cu_seqlens_q: Tensor | None, max_seqlen_q: int | None, held: int) -> None:
        """Plans for these lengths, each of which may be `held` tokens."""
        assert self.plan is not None
        problem = self.plan.problem
        if cu_seqlens_q is not None and max_seqlen_q != problem.max_query_len:
            raise ValueError(
                f"max_seqlen_q is {max_seqlen_q}; allowed: {problem.max_query_len}, as in the first call with this scheduler_metadata"
            )
        lens = cache_seqlens
        if isinstance(lens, int):
            if lens > held:
                raise ValueError(f"cache_seqlens is {lens}; allowed: up to {held}, the tokens that the columns of page_table hold")
            lens = torch.full((problem.batch,), lens, dtype=torch.int32, device=problem.device)
        try:
            self.plan.update(lens, cu_seqlens_q)
        except REFUSALS as refusal:
            raise _WORDS(refusal) from None
        self.cache_seqlens = cache_seqlens if isinstance(cache_seqlens, int) else Watched(cache_seqlens)
        self.cu_seqlens_q = None if cu_seqlens_q is None else Watched(cu_seqlens_q)

    def has(self, cache_seqlens: int | Tensor, cu_seqlens_q: Tensor | None) -> bool:
        """Is the plan for these lengths, as far as that can be noticed?"""
        return _is_still(self.cache_seqlens, cache_seqlens) and _is_still(self.cu_seqlens_q, cu_seqlens_q)


def _is_still(planned: int | Watched | None, given: int | Tensor | None) -> bool:
    if isinstance(planned, Watched):
        return isinstance(given, Tensor) and planned.is_still(given)
    return type(given) is type(planned) and given == planned


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Sequence[int] = _NO_WINDOW,
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> SchedulerMetadata:
    """Metadata to be passed on as `scheduler_metadata`, so that the layers of a step share one plan.

    The arguments are those of FlashAttention-3. ETAP makes the plan in the first call that gets the metadata, from that call's tensors;
    a wrapped library gets the arguments as they are.
    """
    return SchedulerMetadata(dict(locals()))


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = _NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: SchedulerMetadata | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """MLA decode attention of one layer: out, or (out, softmax_lse) with return_softmax_lse.

    q: BF16 or FP16 [batch, seqlen, nheads, rope], or [total_q, nheads, rope] with cu_seqlens_q: the rope part of the queries
    qv: likewise with latent values, 512 or 256
    k_cache: [num_pages, page_size, 1, rope], v_cache: [num_pages, page_size, 1, latent], of q's type or E4M3: the parts of the rows of
        one pool, views pool[..., latent:] and pool[..., :latent]
    cache_seqlens: int32 [batch], KV tokens, the new ones included; a number: that many for every sequence
    page_table: int32 [batch, max_num_pages_per_seq]; entries past a sequence's end are never read
    cu_seqlens_q: int32 [batch + 1], prefix sums of the query counts, and max_seqlen_q, the largest of them
    k_descale, v_descale: FP32, the scale of an E4M3 cache: one for both, one element or views [batch, 1] of it with strides of 0
    softmax_scale: default 1 / sqrt(rope + latent)
    causal: query token i of n sees the first L - n + i + 1 tokens
    scheduler_metadata: what `get_scheduler_metadata` returned; None: this call plans for itself
    num_splits: 1: a sequence's bits don't depend on what else is in the batch; otherwise ETAP decides
    sm_margin: multiprocessors to leave to others
    window_size, attention_chunk: only such as hide nothing, whatever the lengths within page_table's columns
    v, rotary_sin, rotary_seqlens, rotary_interleaved, cu_seqlens_k_new, q_descale, pack_gqa: without effect, as are k_descale and
        v_descale with a 16-bit cache

    out: of q's type, of qv's shape; softmax_lse: FP32 [batch, nheads, seqlen] or [nheads, total_q], base e, a view whose innermost stride
    is nheads. A query row that sees no token gets out = 0 and softmax_lse = -inf. Without sequences or query tokens nothing is computed.

    Raises NotImplementedError for what ETAP does not compute, ValueError for arguments that don't fit, EtapError with the library's
    sentence.
    """
    step = SchedulerMetadata({}) if scheduler_metadata is None else scheduler_metadata
    if not isinstance(step, SchedulerMetadata):
        raise TypeError(f"scheduler_metadata is a {type(step).__name__}; allowed: what etap_flash_attn_3.get_scheduler_metadata returned")
    refusal = _refusal(k_cache, qv, page_table, cache_seqlens, k_descale, v_descale)
    unusual = (k, rotary_cos, cache_batch_idx, cache_leftpad, attention_chunk, softcap, *window_size)
    if refusal is None and unusual != _USUAL:
        assert page_table is not None
        tokens = q.shape[-3] if cu_seqlens_q is None else max_seqlen_q or 0
        refusal = _effect(unusual, causal, tokens, page_table.shape[-1] * k_cache.shape[1])
    options = (causal, num_splits, sm_margin)
    if step.plan is None and step.peer is None:
        if refusal:
            step.hand_to(_PEER.instead(refusal))
        else:
            assert qv is not None
            check_tensors(q=q, qv=qv, k_cache=k_cache, v_cache=v_cache, page_table=page_table)
            if not _begin(step, q, qv, k_cache, cu_seqlens_q, max_seqlen_q, options):
                nothing = torch.zeros_like(qv)
                lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
                return (nothing, q.new_full(lse_shape, -math.inf, dtype=torch.float32)) if return_softmax_lse else nothing
    if step.peer is not None:
        given = {name: value for name, value in locals().items() if name in _PARAMETERS}
        theirs: Tensor | tuple[Tensor, Tensor] = step.peer.flash_attn_with_kvcache(**{**given, "scheduler_metadata": step.peer_metadata})
        return theirs
    plan = step.plan
    if refusal:
        raise NotImplementedError(refusal)
    assert plan is not None
    assert qv is not None
    assert page_table is not None
    assert cache_seqlens is not None
    if options != step.options:
        raise ValueError(
            f"(causal, num_splits, sm_margin) is {options}; allowed: {step.options}, as in the first call with this scheduler_metadata"
        )
    if not step.has(cache_seqlens, cu_seqlens_q):
        step.update(cache_seqlens, cu_seqlens_q, max_seqlen_q, page_table.shape[-1] * k_cache.shape[1])
    out: Tensor
    try:
        out, lse = plan.run(
            qv,
            q,
            (v_cache, k_cache),
            page_table,
            softmax_scale=(plan.problem.d_latent + plan.problem.d_rope) ** -0.5 if softmax_scale is None else softmax_scale,
            kv_scale=None if k_descale is None or k_cache.element_size() > 1 else k_descale.as_strided((1,), (1,)),
            return_lse=return_softmax_lse,
            lse_heads_first=True,
        )
    except REFUSALS as refused:
        raise _WORDS(refused) from None
    return out if lse is None else (out, lse)


_PARAMETERS = frozenset(inspect.signature(flash_attn_with_kvcache).parameters)
# k, rotary_cos, cache_batch_idx, cache_leftpad, attention_chunk, softcap, window_size
_USUAL = (None, None, None, None, 0, 0.0, *_NO_WINDOW)


def _refusal(
    k_cache: Tensor,
    qv: Tensor | None,
    page_table: Tensor | None,
    cache_seqlens: int | Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
) -> str | None:
    """Why ETAP does not compute a call; None: it may. Every call is asked, metadata of the step or not."""
    if qv is None or page_table is None or cache_seqlens is None:
        name = "qv" if qv is None else "page_table" if page_table is None else "cache_seqlens"
        return f"{name} is None; allowed: a tensor (ETAP computes the MLA form over a paged cache)"
    if (k_descale is None and v_descale is None) or k_cache.element_size() > 1:  # FlashAttention-3 reads them with FP8 only
        return None
    if k_descale is None or v_descale is None or k_descale.data_ptr() != v_descale.data_ptr():
        return "k_descale and v_descale are different; allowed: the same memory (ETAP's E4M3 rows have one scale for both parts)"
    if any(stride for size, stride in zip(k_descale.shape, k_descale.stride(), strict=True) if size > 1):
        return f"k_descale has shape {list(k_descale.shape)} and strides {list(k_descale.stride())}; allowed: one element, or strides of 0"
    return None


def _effect(unusual: tuple[Any, ...], causal: bool, tokens: int, held: int) -> str | None:
    """Which of these arguments would change a result, of `tokens` query tokens a sequence over a page_table that holds `held`."""
    k, rotary_cos, cache_batch_idx, cache_leftpad, chunk, softcap, left, right = unusual
    if k is not None and k.numel():
        return "k is a tensor; allowed: None"
    for name, value in (("rotary_cos", rotary_cos), ("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if value is not None:
            return f"{name} is a tensor; allowed: None"
    # A token before the first, of which there are some in a sequence that is shorter than its queries, has chunks of its own.
    if chunk > 0 and not (chunk >= held and (causal or tokens == 1)):
        return f"attention_chunk is {chunk}; allowed: 0"
    if softcap > 0:
        return f"softcap is {softcap}; allowed: 0.0"
    if 0 <= left < held - 1 or (0 <= right < tokens - 1 and not causal):
        return f"window_size is {(left, right)}; allowed: {_NO_WINDOW}"
    return None


def _begin(
    step: SchedulerMetadata,
    q: Tensor,
    qv: Tensor,
    k_cache: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    options: tuple[bool, int, int],
) -> bool:
    """The first call of a step: who computes it, and the plan. False: there is nothing to compute."""
    causal, num_splits, sm_margin = options
    if q.element_size() == 1:
        step.hand_to(_PEER.instead(f"q has type {q.dtype}; allowed: torch.bfloat16 and torch.float16"))
        return True
    if q.dim() != (4 if cu_seqlens_q is None else 3) or k_cache.dim() != 4:
        raise ValueError(
            f"q has shape {list(q.shape)} and k_cache {list(k_cache.shape)}; allowed: [batch, seqlen, nheads, rope], or [total_q, nheads, "
            "rope] with cu_seqlens_q, and [num_pages, page_size, 1, rope]"
        )
    if cu_seqlens_q is None:
        batch, tokens, total_q = len(q), q.shape[1], 0
    elif max_seqlen_q is None:
        raise ValueError("max_seqlen_q is None; allowed with cu_seqlens_q: the largest query count")
    else:
        batch, tokens, total_q = len(cu_seqlens_q) - 1, max_seqlen_q, len(q)
    if not (batch and tokens and len(q)):
        return False
    problem = Problem(
        num_heads=q.shape[-2],
        batch=batch,
        page_size=k_cache.shape[1],
        d_latent=qv.shape[-1],
        d_rope=q.shape[-1],
        q_dtype=str(q.dtype),
        kv_format=str(k_cache.dtype) if k_cache.element_size() > 1 else "e4m3",
        max_query_len=tokens,
        total_q=total_q,
        causal=causal,
        batch_invariant=num_splits == 1,
        num_sms=max(1, device_info(q.device.type, q.device.index or 0).num_sms - sm_margin) if sm_margin else 0,
        device=str(q.device),
    )
    peer = _PEER.chosen_for(problem)
    if peer is not None:
        step.hand_to(peer)
        return True
    step.plan, step.options = Plan(problem), options
    return True
