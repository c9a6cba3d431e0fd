"""`BatchMLAPagedAttentionWrapper` as in flashinfer.mla. `etap_py.routing` can hand its calls to an installed FlashInfer instead."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import torch
from etap_py import Plan, Problem
from etap_py.dropin import check_tensors
from etap_py.errors import REFUSALS, Words
from etap_py.routing import Peer
from torch import Tensor

__all__ = ["BatchMLAPagedAttentionWrapper"]

_PEER = Peer("FlashInfer", "flashinfer.mla")
_BACKENDS = ("auto", "fa2", "fa3")
_NO_PAGE = -1  # in the block table past a sequence's own pages: a length that reaches it is refused, or gives NaN
_WORDS = Words(
    {
        "q_rope": "q_pe",
        "kv_cache": "(ckv_cache, kpe_cache)",
        "kv_cache[0]": "ckv_cache",
        "kv_cache[1]": "kpe_cache",
        "kv_scale": "ckv_scale",
        "kv_group_scales": "ckv_scale_arr",
        "block_table": "the block table of kv_indices",
        "cache_seqlens": "kv_len_arr",
        "cu_seqlens_q": "qo_indptr",
        "softmax_scale": "sm_scale",
    }
)


class _Step(NamedTuple):
    """The arrays of a step, cut to its batch, and what the host knows of them."""

    qo_indptr: Tensor
    kv_indptr: Tensor
    kv_indices: Tensor
    kv_len_arr: Tensor
    rows: int  # of q
    query_counts: list[int]
    page_counts: list[int]
    num_indices: int  # kv_indptr[batch]

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[:4]


class BatchMLAPagedAttentionWrapper:
    """Decode attention over a paged cache whose page lists are given in compressed form: `plan` once a step, `run` once a layer.

    float_workspace_buffer: only its device counts. ETAP keeps the schedule of a step in its workspace, so that each wrapper has its own.
    use_cuda_graph: `run` may be captured, and replayed after further `plan` calls outside of the graph. The batch is then fixed, and a
        sequence may have len(kv_indices) // batch pages.
    qo_indptr, kv_indptr, kv_indices, kv_len_arr: buffers, needed with use_cuda_graph, that `plan` copies its arguments into: int32
        [batch + 1], [batch + 1], [as many pages as there may be], [batch]. The prefix sums' may be longer
    backend: "auto", "fa2" or "fa3", all the same here
    """

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        self.device = float_workspace_buffer.device
        self._arguments = (float_workspace_buffer, use_cuda_graph, qo_indptr, kv_indptr, kv_indices, kv_len_arr, backend)
        self._backend = backend
        self._peer: Any = None  # the peer's wrapper while it computes,
        self._peer_made: Any = None  # and once it was made
        self._problem: Problem | None = None
        self._plan: Plan | None = None
        self._grouped = False  # FP8 caches come with a scale for each token and 128 values
        self._idle = False  # the planned step has no query tokens
        self._buffers: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        if backend not in _BACKENDS:
            self._hand_over_refused()
        elif use_cuda_graph:
            if qo_indptr is None or kv_indptr is None or kv_indices is None or kv_len_arr is None:
                raise ValueError("use_cuda_graph is True and a buffer is None; allowed: qo_indptr, kv_indptr, kv_indices and kv_len_arr")
            batch = _batch(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
            self._buffers = (qo_indptr[: batch + 1], kv_indptr[: batch + 1], kv_indices, kv_len_arr)
            columns = max(1, len(kv_indices) // max(1, batch))
            self._table = torch.full((batch, columns), _NO_PAGE, dtype=torch.int32, device=self.device)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        """Plans a step. Copies `qo_indptr` and `kv_indptr` to the host, as FlashInfer does; no wait where they are there already.

        qo_indptr, kv_indptr: int32 [batch + 1] or longer, prefix sums of the query tokens and of the pages of each sequence
        kv_indices: int32 [kv_indptr[batch]] or longer, the pages, sequence after sequence
        kv_len_arr: int32 [batch], KV tokens of each sequence, the new ones included; 0: none. One that its pages don't hold is refused
            where the array is on the CPU; on a GPU the rows of that sequence become NaN
        num_heads: 1 to 128; (head_dim_ckv, head_dim_kpe): (512, 64), (512, 0) or (256, 64); page_size: a power of two from 1 to 256
        causal: query token i of n sees the first L - n + i + 1 tokens
        sm_scale: factor of the dot products
        q_data_type: torch.bfloat16 or torch.float16, of q and of the results; kv_data_type: the same, or torch.float8_e4m3fn

        A step without query tokens, or without sequences, is one in which `run` returns empty results.

        Raises ValueError for arrays that don't fit each other, EtapError with the library's sentence, NotImplementedError for
        use_profiler.
        """
        if self._backend not in _BACKENDS or use_profiler or kv_data_type not in (q_data_type, torch.float8_e4m3fn):
            self._hand_over_refused(use_profiler, q_data_type, kv_data_type)
        else:
            step = _step(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
            if step.rows == 0:
                if self._buffers is not None and step.query_counts:
                    raise ValueError("qo_indptr counts no query tokens; allowed with use_cuda_graph: as many in each plan, 1 or more")
                self._peer, self._idle = None, True
                return
            problem = Problem(
                num_heads=num_heads,
                batch=len(step.query_counts),
                page_size=page_size,
                d_latent=head_dim_ckv,
                d_rope=head_dim_kpe,
                q_dtype=str(q_data_type),
                kv_format=self._kv_format(kv_data_type),
                max_query_len=max(step.query_counts),
                total_q=0 if len(set(step.query_counts)) == 1 else step.rows,
                causal=causal,
                device=str(self.device),
            )
            peer = _PEER.chosen_for(problem)
            if peer is not None:
                self._hand_over(peer)
            else:
                _check_lengths(step, page_size)
                self._fill(problem, step)
                self._peer, self._softmax_scale = None, sm_scale
                self._update()
            self._idle = False
        if self._peer is not None:
            shape = (num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type, use_profiler)
            self._peer.plan(qo_indptr, kv_indptr, kv_indices, kv_len_arr, *shape)

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: Tensor | None = None,
        kv_len: Tensor | None = None,
        page_table: Tensor | None = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | None = None,
        ckv_scale_arr: Tensor | None = None,
        kpe_scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One layer: out, or (out, lse) with return_lse.

        q_nope: [rows, num_heads, head_dim_ckv], q_pe: [rows, num_heads, head_dim_kpe]
        ckv_cache: [num_pages, page_size, head_dim_ckv], kpe_cache: [num_pages, page_size, head_dim_kpe], the two parts of the rows of one
            pool: views pool[..., :head_dim_ckv] and pool[..., head_dim_ckv:]
        out: like q_nope, lse: FP32 [rows, num_heads]; written when given, whatever return_lse says
        return_lse_base_on_e: lse in base e instead of 2. A row that sees no token has out = 0, lse = -inf.
        ckv_scale and kpe_scale: of an FP8 cache, equal; or ckv_scale_arr, FP32 [num_pages, page_size, head_dim_ckv / 128], and kpe_scale 1
        profiler_buffer, kv_len, page_table: without effect

        Raises ValueError when the tensors don't fit the plan, NotImplementedError for o_scale and for other combinations of scales.
        """
        if self._peer is not None:
            later = {"o_scale": o_scale, "ckv_scale": ckv_scale, "ckv_scale_arr": ckv_scale_arr, "kpe_scale": kpe_scale}
            given: dict[str, Any] = {name: value for name, value in later.items() if value is not None}  # an older one lacks them
            if return_lse_base_on_e:
                given["return_lse_base_on_e"] = True
            options = (out, lse, return_lse, profiler_buffer, kv_len, page_table)
            theirs: Tensor | tuple[Tensor, Tensor] = self._peer.run(q_nope, q_pe, ckv_cache, kpe_cache, *options, **given)
            return theirs
        if o_scale is not None:
            raise NotImplementedError(f"o_scale is {o_scale}; allowed: None")
        if self._idle:
            return _nothing(q_nope, out, lse, return_lse)
        plan = self._plan
        if plan is None:
            raise RuntimeError("run is called before plan; allowed: after it")
        if plan.problem.kv_format.startswith("e4m3") or (ckv_scale, ckv_scale_arr, kpe_scale) != (None, None, None):
            plan = self._plan_for_scales(plan, ckv_scale, ckv_scale_arr, kpe_scale)
        has_rope = plan.problem.d_rope > 0
        try:
            result, sums = plan.run(
                q_nope,
                q_pe if has_rope else None,
                (ckv_cache, kpe_cache) if has_rope else ckv_cache,
                self._table,
                softmax_scale=self._softmax_scale,
                kv_scale=ckv_scale,
                kv_group_scales=ckv_scale_arr,
                out=out,
                lse=lse,
                return_lse=return_lse,
                lse_base="e" if return_lse_base_on_e else "2",
            )
        except REFUSALS as refusal:
            raise _WORDS(refusal) from None
        if not return_lse:
            only: Tensor = result
            return only
        assert sums is not None
        return result, sums

    def _hand_over(self, peer: ModuleType) -> None:
        """The peer's wrapper computes, one for the life of this one: a graph may have been captured with it."""
        if self._peer_made is None:
            self._peer_made = peer.BatchMLAPagedAttentionWrapper(*self._arguments)
        self._peer = self._peer_made

    def _hand_over_refused(self, use_profiler: bool = False, q: torch.dtype | None = None, kv: torch.dtype | None = None) -> None:
        if self._backend not in _BACKENDS:
            refusal = f"backend is {self._backend!r}; allowed: {', '.join(repr(known) for known in _BACKENDS)}"
        elif use_profiler:
            refusal = "use_profiler is True; allowed: False"
        else:
            refusal = f"kv_data_type is {kv}; allowed: {q}, which is q_data_type, and torch.float8_e4m3fn"
        self._hand_over(_PEER.instead(refusal))

    def _kv_format(self, kv_data_type: torch.dtype) -> str:
        if kv_data_type != torch.float8_e4m3fn:
            return str(kv_data_type)
        return "e4m3_group" if self._grouped else "e4m3"

    def _fill(self, problem: Problem, step: _Step) -> None:
        """The step's arrays on the device, in the buffers where there are any, and the block table."""
        widest = max(step.page_counts)
        if self._buffers is None:
            self._queries, starts, indices, self._lens = (array.to(self.device) for array in step.arrays)
            self._table = torch.full((problem.batch, max(1, widest)), _NO_PAGE, dtype=torch.int32, device=self.device)
        else:
            self._check_captured(problem, step)
            self._queries, starts, indices, self._lens = self._buffers
            for buffer, values in zip(self._buffers, step.arrays, strict=True):
                buffer[: len(values)].copy_(values, non_blocking=True)
            self._table.fill_(_NO_PAGE)
        if widest:
            places = starts[:-1, None] + torch.arange(widest, dtype=torch.int32, device=self.device)
            own = places < starts[1:, None]
            self._table[:, :widest] = torch.where(own, indices[places.clamp_(max=step.num_indices - 1)], _NO_PAGE)
        self._problem = problem

    def _check_captured(self, problem: Problem, step: _Step) -> None:
        """A graph may have been captured: its addresses, and what its kernel was chosen by, stay."""
        assert self._buffers is not None
        batch, columns = self._table.shape
        widest, room = max(step.page_counts), len(self._buffers[2])
        if problem.batch != batch:
            raise ValueError(f"kv_len_arr is for {problem.batch} sequences; allowed: {batch}, the length of its buffer")
        if widest > columns:
            raise ValueError(
                f"a sequence has {widest} pages; allowed: {columns}, the length of the kv_indices buffer divided by the batch of {batch}"
            )
        if step.num_indices > room:
            raise ValueError(f"kv_indptr[{batch}] is {step.num_indices}; allowed: up to {room}, the length of the kv_indices buffer")
        if self._problem not in (None, problem):
            raise ValueError(f"the step is {problem}; allowed with use_cuda_graph: {self._problem}, as in the first plan")

    def _update(self) -> None:
        """Plans the step; a plan of the same problem, and its workspace, are used again."""
        assert self._problem is not None
        if self._plan is None or self._plan.problem != self._problem:
            self._plan = Plan(self._problem)
        try:
            self._plan.update(self._lens, self._queries if self._problem.total_q else None)
        except REFUSALS as refusal:
            raise _WORDS(refusal) from None

    def _plan_for_scales(self, plan: Plan, ckv_scale: float | None, ckv_scale_arr: Tensor | None, kpe_scale: float | None) -> Plan:
        """Checks the scales. Which kind they are is known here first, so the plan of the other kind may have to be made."""
        fp8 = plan.problem.kv_format.startswith("e4m3")
        if not fp8 or kpe_scale is None or (ckv_scale is None) == (ckv_scale_arr is None):
            raise ValueError(
                f"ckv_scale is {ckv_scale}, ckv_scale_arr {'None' if ckv_scale_arr is None else 'a tensor'}, kpe_scale {kpe_scale}, the "
                f"cache {plan.problem.kv_format}; allowed: kpe_scale and one of the others with torch.float8_e4m3fn, none otherwise"
            )
        if plan.problem.d_rope and kpe_scale != (1 if ckv_scale is None else ckv_scale):
            raise NotImplementedError(
                f"kpe_scale is {kpe_scale} and ckv_scale {ckv_scale}; allowed: equal ones, or ckv_scale_arr with a kpe_scale of 1 "
                "(ETAP's E4M3 rows have one scale for both parts)"
            )
        if self._grouped != (ckv_scale_arr is not None):
            assert self._problem is not None
            self._grouped = not self._grouped
            self._problem = replace(self._problem, kv_format=self._kv_format(torch.float8_e4m3fn))
            self._update()
            assert self._plan is not None
        return self._plan or plan


def _batch(qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor) -> int:
    """The sequences of a step, which FlashInfer takes from kv_len_arr: it looks at no more of the prefix sums than belongs to them."""
    arrays = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_len_arr": kv_len_arr}
    check_tensors(**arrays)
    for name, array in arrays.items():
        if array.dtype != torch.int32 or array.dim() != 1:
            raise ValueError(f"{name} is {array.dtype} of shape {list(array.shape)}; allowed: torch.int32 of one dimension")
    batch = len(kv_len_arr)
    for name in ("qo_indptr", "kv_indptr"):
        if len(arrays[name]) <= batch:
            raise ValueError(
                f"{name} has {len(arrays[name])} entries; allowed: {batch + 1} or more, for the {batch} sequences of kv_len_arr"
            )
    return batch


def _step(qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor) -> _Step:
    batch = _batch(qo_indptr, kv_indptr, kv_indices, kv_len_arr)
    qo_indptr, kv_indptr = qo_indptr[: batch + 1], kv_indptr[: batch + 1]
    queries, pages = qo_indptr.tolist(), kv_indptr.tolist()
    if queries[0] != 0:
        raise ValueError(f"qo_indptr[0] is {queries[0]}; allowed: 0")
    if pages[0] < 0:
        raise ValueError(f"kv_indptr[0] is {pages[0]}; allowed: 0 or more")
    query_counts, page_counts = ([after - before for before, after in pairwise(sums)] for sums in (queries, pages))
    for name, sums, counts in (("qo_indptr", queries, query_counts), ("kv_indptr", pages, page_counts)):
        if counts and min(counts) < 0:
            at = next(i for i, count in enumerate(counts) if count < 0)
            raise ValueError(f"{name}[{at + 1}] is {sums[at + 1]}; allowed: {sums[at]} or more, {name}[{at}]")
    if len(kv_indices) < pages[-1]:
        raise ValueError(f"kv_indices has {len(kv_indices)} entries; allowed: {pages[-1]} or more, kv_indptr[{batch}]")
    return _Step(qo_indptr, kv_indptr, kv_indices[: pages[-1]], kv_len_arr, queries[-1], query_counts, page_counts, pages[-1])


def _check_lengths(step: _Step, page_size: int) -> None:
    """That each sequence's tokens lie on its own pages: as far as it can be known without waiting for a GPU."""
    if step.kv_len_arr.device.type != "cpu":
        return
    for i, (length, pages, queries) in enumerate(zip(step.kv_len_arr.tolist(), step.page_counts, step.query_counts, strict=True)):
        if length > pages * page_size and queries:
            raise ValueError(
                f"kv_len_arr[{i}] is {length}; allowed: up to {pages * page_size}, the tokens of the {pages} pages that kv_indptr gives "
                f"sequence {i}"
            )


def _nothing(q_nope: Tensor, out: Tensor | None, lse: Tensor | None, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The results of a step without query tokens."""
    if len(q_nope):
        raise ValueError(f"q_nope has shape {list(q_nope.shape)}; allowed: [0, ..], as many rows as qo_indptr counted in the last plan")
    out = torch.empty_like(q_nope) if out is None else out
    if not return_lse:
        return out
    return out, q_nope.new_empty(q_nope.shape[:2], dtype=torch.float32) if lse is None else lse
