"""Decode attention and the merge of partial results: `query`, `Plan`, `mla_decode`, `mla_decode_sparse`, `merge`."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, NamedTuple

from etap_py.binding import CData, check, ffi, lib, new
from etap_py.errors import EtapError, Words
from etap_py.problem import (
    FORMATS_OF_ROWS,
    Decision,
    Problem,
    Shared,
    decide,
    device_numbers,
    dtype_number,
    empty_lse_number,
    lse_base_number,
    workspace_size,
)
from etap_py.tensors import ITEM_BYTES, Tensor, View, address, cpu_workspace, cuda_empty, current_stream, dtype_name, empty, locate, view
from etap_py.tensors import check as check_view
from etap_py.tuning import tuned

# What KV formats are stored as. E4M3 caches are often kept as bytes.
_KV_STORAGE = {
    "bf16": "bf16",
    "fp16": "fp16",
    "e4m3": "e4m3",
    "e4m3_group": "e4m3",
    "e4m3_656": "uint8",
    "e4m3_528": "uint8",
}

# (d_latent, d_rope) of queries that hold both parts.
_FUSED = ((512, 64), (256, 64))

_VOID = ffi.typeof("void *")
_INT32 = ffi.typeof("int32_t *")
_FLOAT = ffi.typeof("float *")


def query(problem: Problem) -> Decision:
    """Is this problem supported, by which kernel, and why? What a `Plan` of it made now would run. Raises EtapError with the library's
    sentence when it is not."""
    return decide(tuned(problem))


@functools.lru_cache(maxsize=256)
def _c_plan(problem: Problem) -> CData:
    """The library's plan of exactly this problem. It is read-only and host memory only, so every `Plan` of an equal problem shares it."""
    plan = ffi.new("etap_plan **")
    check(lib.etap_plan_create(problem.to_c(), plan))
    return ffi.gc(plan[0], lib.etap_plan_destroy)


def _stream_number(stream: Any, device: str) -> int:
    """A stream argument (None: torch's current one; a cudaStream_t as int; an object with cuda_stream) as a number."""
    if stream is None:
        return current_stream(device)
    number: int = getattr(stream, "cuda_stream", stream)
    return number


def _stream(stream: Any, device: str) -> CData:
    return ffi.cast(_VOID, _stream_number(stream, device))


def _input(name: str, tensor: Tensor, shape: tuple[int | None, ...] | None, dtype: str | None, device: str | None) -> View:
    return check_view(name, view(name, tensor), shape, dtype, device)


def _rows(name: str, got: View, shape: tuple[int, ...], dtype: str, device: str) -> View:
    """A view of shape [rows, ...], or of shape [batch, query tokens, ...] whose first two dimensions make equally spaced rows, as
    [rows, ...]."""
    if len(got.shape) == len(shape) + 1:
        batch, tokens, *tail = got.shape
        outer, inner = got.strides[:2]
        if batch > 1 and tokens > 1 and outer != tokens * inner:
            raise ValueError(f"{name} has strides {list(got.strides)}; allowed: a first one of {tokens * inner}, {tokens} times the second")
        got = got._replace(shape=(batch * tokens, *tail), strides=(inner if tokens > 1 else outer, *got.strides[2:]))
    return check_view(name, got, shape, dtype, device)


def _cache_parts(kv_cache: Tensor | tuple[Tensor, Tensor]) -> tuple[tuple[str, Tensor], tuple[str, Tensor | None]]:
    """A cache, or its latent and its rope part, each with its name."""
    if isinstance(kv_cache, tuple):
        latent, rope = kv_cache
        return ("kv_cache[0]", latent), ("kv_cache[1]", rope)
    return ("kv_cache", kv_cache), ("", None)


def _cache_rows(kv: View, rope: View | None) -> View:
    """A cache as [num_pages, page_size, row], without a dimension of one KV head, and the parts of a row joined."""
    kv = _without_heads(kv)
    if rope is None:
        return kv
    rope = _without_heads(rope)
    apart = rope.pointer - kv.pointer
    same = (kv.shape[:-1], kv.dtype, kv.device) == (rope.shape[:-1], rope.dtype, rope.device)
    together = kv.strides == rope.strides and apart == kv.shape[-1] * ITEM_BYTES.get(kv.dtype, 0)
    if not same or not (together or 0 in kv.shape):  # in a pool of no pages there is nothing that could lie apart
        raise ValueError(
            f"kv_cache is a pair of {kv.dtype} {list(kv.shape)} with strides {list(kv.strides)} and, {apart} bytes further, "
            f"{rope.dtype} {list(rope.shape)} with strides {list(rope.strides)}; "
            "allowed: the two parts of the same rows, pool[..., :d_latent] and pool[..., d_latent:]"
        )
    return kv._replace(shape=(*kv.shape[:-1], kv.shape[-1] + rope.shape[-1]))


def _without_heads(kv: View) -> View:
    if len(kv.shape) == 4 and kv.shape[2] == 1:
        return kv._replace(shape=(*kv.shape[:2], kv.shape[3]), strides=(*kv.strides[:2], kv.strides[3]))
    return kv


class _Call(NamedTuple):
    """What all calls with one layout of their tensors share."""

    args: CData  # etap_run_args, checked, without the pointers and the numbers that differ from layer to layer
    words: memoryview  # the same memory as integers of eight bytes: a pointer is set faster so than through a cast
    rope_offset: int  # bytes from q_nope to the rope part of a fused q; 0: not fused
    out_shape: tuple[int, ...]  # of results that are allocated
    lse_shape: tuple[int, ...]
    lse_strides: tuple[int, ...] | None  # None: contiguous


def _word(field: str) -> int:
    """Where a field of etap_run_args stands, in words of eight bytes."""
    offset: int = ffi.offsetof("etap_run_args", field)
    return offset // 8


_Q_NOPE, _Q_ROPE, _KV_CACHE, _BLOCK_TABLE, _SLOTS = map(_word, ("q_nope", "q_rope", "kv_cache", "block_table", "slots"))
_OUT, _LSE, _KV_GROUP_SCALES, _TREE_MASK, _STREAM = map(_word, ("out", "lse", "kv_group_scales", "tree_mask", "stream"))
_NOT_GIVEN = (0, None, None)
_MAX_LAYOUTS = 64  # that a plan remembers; block tables may get wider from step to step


class Plan:
    """Decode attention for one problem: owns the workspace, is updated once a step, and run once a layer.

    workspace: memory on the problem's device, aligned to 256 bytes, at least `workspace_size(problem)` bytes, that no call in flight
    uses; allocated when not given (with torch on CUDA, with NumPy on the CPU). It may be larger: one that was sized for the largest
    batch serves all.

    On CUDA, `update` and `run` enqueue work on `stream` (default: torch's current stream) and return: no synchronisation, no host
    copy. Both may be captured in a CUDA graph; keep the plan, and with it the workspace, as long as the graph. One plan must not run
    on two streams or in two threads at once: make two plans, the library's part of them is shared.

    What `etap tune` stored for the problem when the plan is made counts for as long as the plan lives; `tuned(problem)` shows it.

    Raises EtapError with the library's sentence when the problem is refused, ValueError when tensors don't fit the problem.
    """

    def __init__(self, problem: Problem, workspace: Tensor | None = None) -> None:
        self.problem = problem
        self._plan = _c_plan(tuned(problem))
        self._nope_shape = (problem.rows, problem.num_heads, problem.d_latent)  # of out too
        self._rope_shape = (problem.rows, problem.num_heads, problem.d_rope)
        self._fused_shape = (problem.rows, problem.num_heads, problem.d_latent + problem.d_rope)
        self._kv_shape = (problem.page_size, problem.kv_width)
        self._kv_dtype = _KV_STORAGE[problem.kv_format]
        self._lse_shape = (problem.rows, problem.num_heads)
        self._planned = workspace is not None  # in memory of its own there is no plan yet, though it may look like one that was deleted
        if workspace is None:
            size = workspace_size(problem)
            workspace = cpu_workspace(size) if problem.device == "cpu" else cuda_empty((size,), "uint8", problem.device)
        self.workspace = workspace
        memory = _input("workspace", workspace, (None,), "uint8", problem.device)
        self._workspace = ffi.cast(_VOID, memory.pointer)
        self._workspace_bytes = memory.shape[0]
        self._calls: dict[tuple[object, ...], _Call] = {}

    def update(
        self,
        cache_seqlens: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        stream: Any = None,
        block_table: Tensor | None = None,
    ) -> None:
        """Cuts the batch into pieces of even work; every `run` until the next update uses them.

        cache_seqlens: int32 [batch], KV tokens of each sequence, the new ones included; <= 0: none. With problem.topk: slots of each
            list that count, from its beginning; None: all of them
        cu_seqlens_q: int32 [batch + 1], prefix sums of the query counts, when total_q > 0; else None
        block_table: with problem.shared_prefixes: that of every `run` until the next update; else None
        """
        p = self.problem
        args = new(
            "etap_plan_args",
            batch=p.batch,
            workspace=self._workspace,
            workspace_bytes=self._workspace_bytes,
            stream=_stream(stream, p.device),
        )
        if cache_seqlens is not None or p.topk == 0:
            lens = _input("cache_seqlens", cache_seqlens, (p.batch,), "int32", p.device)
            args.cache_seqlens = ffi.cast(_INT32, lens.pointer)
        if cu_seqlens_q is not None:
            sums = _input("cu_seqlens_q", cu_seqlens_q, (p.batch + 1,), "int32", p.device)
            args.cu_seqlens_q = ffi.cast(_INT32, sums.pointer)
        if (block_table is not None) != p.shared_prefixes:
            given = "None" if block_table is None else "given"
            raise ValueError(
                f"block_table is {given} and the problem's shared_prefixes is {p.shared_prefixes}; allowed: a table and True, or neither"
            )
        if block_table is not None:
            table = _input("block_table", block_table, (p.batch, None), "int32", p.device)
            args.block_table = ffi.cast(_INT32, table.pointer)
            args.block_table_stride, args.block_table_columns = table.strides[0], table.shape[1]
        check(lib.etap_plan_update(self._plan, args))
        self._planned = True

    def shared(self, stream: Any = None) -> Shared:
        """What the last update found to share, with problem.shared_prefixes: for logs and tests, as it waits for the stream on CUDA."""
        found = new("etap_shared")
        check(lib.etap_plan_shared(self._plan, self._workspace, self._workspace_bytes, _stream(stream, self.problem.device), found))
        return Shared(groups=found.groups, sequences=found.sequences, tokens=found.tokens)

    def run(
        self,
        q_nope: Tensor,
        q_rope: Tensor | None,
        kv_cache: Tensor | tuple[Tensor, Tensor],
        block_table: Tensor | None,
        *,
        softmax_scale: float,
        slots: Tensor | None = None,
        tree_mask: Tensor | None = None,
        kv_scale: float | Tensor | None = None,
        kv_group_scales: Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = True,
        lse_base: str = "e",
        lse_heads_first: bool = False,
        empty_lse: float = -math.inf,
        stream: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer: (out, lse).

        q_nope: q_dtype [rows, num_heads, d_latent] or [batch, query tokens, num_heads, d_latent]
        q_rope: q_dtype [rows, num_heads, d_rope], likewise; None when d_rope is 0 or when q_nope holds both parts, d_latent + d_rope
        kv_cache: [num_pages, page_size, d_latent + d_rope] or [num_pages, page_size, 1, d_latent + d_rope] in kv_format, or the pair of
            views (pool[..., :d_latent], pool[..., d_latent:]) of one such pool
        block_table: int32 [batch, >= pages of the longest sequence]; entries past a sequence's end are never read. A length that the
            columns don't hold, or a page that is not in kv_cache: ValueError on the CPU; on CUDA, where lengths are on the device, the
            rows of that sequence become NaN. Both tensors may be empty when all lengths are 0. None with problem.topk
        softmax_scale: factor of the dot products
        slots: with problem.topk: int32 [rows, topk] or [batch, query tokens, topk], page * page_size + offset of each KV token that a
            query token sees, or -1 where there is none, anywhere in the list; else None
        tree_mask: with problem.tree_mask: int32 [rows, problem.tree_mask_words] or [batch, query tokens, problem.tree_mask_words]; bit
            j % 32 of word j // 32 is set where a query token sees the sequence's query token j. All see what is before the first of
            them; bits past the last are not looked at. Else None
        kv_scale: of E4M3 caches, one for the tensor: a number, or an FP32 tensor of one element, of any shape, on the device; None: 1
        kv_group_scales: FP32 [num_pages, page_size, d_latent / 128] with "e4m3_group"
        out: out_dtype, of q_nope's shape; lse: FP32 [rows, num_heads] or [batch, query tokens, num_heads]; allocated when not given
        return_lse: False: lse is None unless it was given
        lse_base: "e" or "2", of lse
        lse_heads_first: lse is allocated as [num_heads, rows] or [batch, num_heads, query tokens], with an innermost stride of num_heads
        empty_lse: -inf or +inf, lse of a query row that sees no token; its out is 0
        """
        if not self._planned:
            raise ValueError("workspace holds no plan; allowed: run after update, which cuts the batch for its lengths")
        tensors = (
            ("q_nope", q_nope),
            ("q_rope", q_rope),
            *_cache_parts(kv_cache),
            ("slots", slots) if self.problem.topk else ("block_table", block_table),
            ("out", out),
            ("lse", lse),
            ("kv_group_scales", kv_group_scales),
            ("tree_mask", tree_mask),
        )
        located = [_NOT_GIVEN if tensor is None else locate(name, tensor) for name, tensor in tensors]
        nope_at, rope_at, kv_at, kv_rope_at, table_at, out_at, lse_at, scales_at, tree_at = [where[0] for where in located]
        parts_apart = kv_rope_at and kv_rope_at - kv_at
        layout = (*[where[1] for where in located], parts_apart, lse_base, lse_heads_first, empty_lse, kv_scale is None)
        call = self._calls.get(layout)
        if (block_table if self.problem.topk else slots) is not None:
            given, wanted = ("block_table", "slots") if self.problem.topk else ("slots", "block_table")
            raise ValueError(f"{given} is given with topk {self.problem.topk}; allowed: None, and {wanted}")
        if call is None:
            call = self._prepare(tensors, lse_base, lse_heads_first, empty_lse)
            if len(self._calls) >= _MAX_LAYOUTS:
                self._calls.clear()
            self._calls[layout] = call

        if out is None:
            out = empty(q_nope, self.problem.device, call.out_shape, self.problem.out_dtype)
            out_at = address(out)
        if lse is None and return_lse:
            lse = empty(q_nope, self.problem.device, call.lse_shape, "fp32", call.lse_strides)
            lse_at = address(lse)
        args, words = call.args, call.words
        words[_Q_NOPE] = nope_at
        words[_Q_ROPE] = nope_at + call.rope_offset if call.rope_offset else rope_at
        words[_KV_CACHE] = kv_at
        words[_SLOTS if self.problem.topk else _BLOCK_TABLE] = table_at
        words[_OUT] = out_at
        words[_LSE] = lse_at
        words[_KV_GROUP_SCALES] = scales_at
        words[_TREE_MASK] = tree_at
        words[_STREAM] = _stream_number(stream, self.problem.device)
        args.softmax_scale = softmax_scale
        if kv_scale is not None:
            self._set_kv_scale(args, kv_scale)
        check(lib.etap_run(self._plan, args))
        return out, lse

    def _prepare(
        self,
        tensors: tuple[tuple[str, Tensor | None], ...],
        lse_base: str,
        lse_heads_first: bool,
        empty_lse: float,
    ) -> _Call:
        """Checks the tensors of a call; what they have in common with all others of their layout is the result."""
        p = self.problem
        for name, tensor in tensors[:5:2]:  # q_nope, the cache or its latent part, block_table or slots
            if tensor is None:
                raise TypeError(f"{name} is None; allowed: a tensor")
        views = [None if tensor is None else view(name, tensor) for name, tensor in tensors]
        nope, rope, kv, kv_rope, table, out, lse, scales, tree = views
        assert nope is not None
        assert kv is not None
        assert table is not None
        device = p.device
        fused = rope is None and p.d_rope > 0 and nope.shape[-1:] == (p.d_latent + p.d_rope,)
        queries = _rows("q_nope", nope, self._fused_shape if fused else self._nope_shape, p.q_dtype, device)
        kv = check_view("kv_cache", _cache_rows(kv, kv_rope), (None, *self._kv_shape), self._kv_dtype, device)
        if p.topk:
            if len(table.shape) == 3 and len(nope.shape) == 4:
                check_view("slots", table, (*nope.shape[:2], None), None, None)
            table = _rows("slots", table, (p.batch, p.topk), "int32", device)
        else:
            check_view("block_table", table, (p.batch, None), "int32", device)
        args = new(
            "etap_run_args",
            batch=p.batch,
            q_nope_row_stride=queries.strides[0],
            q_nope_head_stride=queries.strides[1],
            num_pages=kv.shape[0],
            kv_page_stride=kv.strides[0],
            kv_row_stride=kv.strides[1],
            block_table_stride=0 if p.topk else table.strides[0],
            block_table_columns=0 if p.topk else table.shape[1],
            slots_stride=table.strides[0] if p.topk else 0,
            out_row_stride=p.num_heads * p.d_latent,
            out_head_stride=p.d_latent,
            lse_row_stride=p.num_heads,
            lse_head_stride=1,
            lse_base=lse_base_number(lse_base),
            empty_lse=empty_lse_number(empty_lse),
            workspace=self._workspace,
            workspace_bytes=self._workspace_bytes,
        )
        if fused:
            args.q_rope_row_stride, args.q_rope_head_stride = queries.strides[:2]
        elif rope is not None:
            args.q_rope_row_stride, args.q_rope_head_stride = _rows("q_rope", rope, self._rope_shape, p.q_dtype, device).strides[:2]
        if out is not None:
            args.out_row_stride, args.out_head_stride = _rows("out", out, self._nope_shape, p.out_dtype, device).strides[:2]
        if lse is not None:
            args.lse_row_stride, args.lse_head_stride = _rows("lse", lse, self._lse_shape, "fp32", device).strides
        if scales is not None:
            check_view("kv_group_scales", scales, (kv.shape[0], p.page_size, p.d_latent // 128), "fp32", device)
            args.kv_group_scales_page_stride, args.kv_group_scales_row_stride = scales.strides[:2]
        if (tree is not None) != p.tree_mask:
            given = "None" if tree is None else "given"
            raise ValueError(f"tree_mask is {given} and the problem's tree_mask is {p.tree_mask}; allowed: a mask and True, or neither")
        if tree is not None:
            args.tree_mask_stride = _rows("tree_mask", tree, (p.rows, p.tree_mask_words), "int32", device).strides[0]
        *batch, rows, heads = nope.shape[:-1]
        return _Call(
            args=args,
            words=memoryview(ffi.buffer(args)).cast("Q"),
            rope_offset=p.d_latent * ITEM_BYTES[p.q_dtype] if fused else 0,
            out_shape=(*nope.shape[:-1], p.d_latent),
            lse_shape=(*batch, heads, rows) if lse_heads_first else (*batch, rows, heads),
            lse_strides=(*[rows * heads for _ in batch], 1, heads) if lse_heads_first else None,
        )

    def _set_kv_scale(self, args: CData, kv_scale: float | Tensor) -> None:
        if not isinstance(kv_scale, (int, float, numbers.Real)):  # the first two are told faster
            scale = _input("kv_scale", kv_scale, None, "fp32", self.problem.device)
            if math.prod(scale.shape) != 1:
                raise ValueError(f"kv_scale has shape {list(scale.shape)}; allowed: one element")
            args.kv_scale_ptr = ffi.cast(_FLOAT, scale.pointer)
        elif kv_scale == 0:
            raise ValueError("kv_scale is 0; allowed: other numbers (in the C interface 0 is the default, 1), or a tensor that holds 0")
        else:
            args.kv_scale_ptr = ffi.NULL  # it would count, and the call before may have set it
            args.kv_scale = kv_scale


def mla_decode(
    q_nope: Tensor,
    q_rope: Tensor | None,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    max_query_len: int | None = None,
    tree_mask: Tensor | None = None,
    kv_scale: float | Tensor | None = None,
    kv_group_scales: Tensor | None = None,
    q_dtype: object = None,
    kv_format: str | None = None,
    out_dtype: object = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = True,
    lse_base: str = "e",
    lse_heads_first: bool = False,
    empty_lse: float = -math.inf,
    batch_invariant: bool = False,
    shared_prefixes: bool = False,
    num_sms: int = 0,
    stream: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Decode attention in one call: plan, update and run for the problem that the tensors describe. Tensors and options as in `Plan.run`.

    max_query_len: with cu_seqlens_q, the most query tokens of a sequence (default: rows of q); else what q's shape says
    tree_mask: the query tokens are drafts, each of which sees those whose bits it has, whatever causal says
    q_dtype: what uint16 arrays of q and KV hold, "bf16" or "fp16"; default: the type of q_nope
    kv_format: default: q's type; "e4m3" for E4M3 and byte tensors, "e4m3_group" with kv_group_scales, "e4m3_656" or
        "e4m3_528" for rows of so many bytes
    out_dtype: default: q's type
    shared_prefixes: read the pages with which several sequences begin once for them, if that saves time

    The library's plans are kept, 256 at most. The workspace is allocated anew in each call, so that calls from several threads, on
    several streams and within captured graphs don't meet. A model's step, which has many layers, is better served by one `Plan`.
    """
    layer = _layer(q_nope, q_rope, kv_cache, q_dtype, kv_format, out_dtype, kv_group_scales is not None)
    batch, rows = _input("cache_seqlens", cache_seqlens, (None,), None, None).shape[0], layer.rows
    if cu_seqlens_q is None:
        tokens, rest = divmod(rows, max(1, batch))
        if rest or max_query_len not in (None, tokens):
            wanted = "a multiple of it" if max_query_len is None else f"{max_query_len} times as many"
            raise ValueError(f"q_nope has {rows} rows for {batch} sequences; allowed: {wanted}, or different counts with cu_seqlens_q")
    else:
        tokens = rows if max_query_len is None else max_query_len
    problem = Problem(
        **layer.fields,
        batch=batch,
        max_query_len=tokens,
        total_q=0 if cu_seqlens_q is None else rows,
        causal=causal,
        batch_invariant=batch_invariant,
        num_sms=num_sms,
        tree_mask=tree_mask is not None,
        shared_prefixes=shared_prefixes,
    )
    plan = Plan(problem)
    plan.update(cache_seqlens, cu_seqlens_q, stream, block_table if shared_prefixes else None)
    return plan.run(
        q_nope,
        q_rope,
        kv_cache,
        block_table,
        softmax_scale=softmax_scale,
        tree_mask=tree_mask,
        kv_scale=kv_scale,
        kv_group_scales=kv_group_scales,
        out=out,
        lse=lse,
        return_lse=return_lse,
        lse_base=lse_base,
        lse_heads_first=lse_heads_first,
        empty_lse=empty_lse,
        stream=stream,
    )


def mla_decode_sparse(
    q_nope: Tensor,
    q_rope: Tensor | None,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    slots: Tensor,
    slot_counts: Tensor | None = None,
    *,
    softmax_scale: float,
    kv_scale: float | Tensor | None = None,
    kv_group_scales: Tensor | None = None,
    q_dtype: object = None,
    kv_format: str | None = None,
    out_dtype: object = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = True,
    lse_base: str = "e",
    lse_heads_first: bool = False,
    empty_lse: float = -math.inf,
    batch_invariant: bool = False,
    num_sms: int = 0,
    stream: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Sparse decode attention in one call: every query token sees the KV tokens that its list of slots names (DeepSeek Sparse Attention).
    Options as in `mla_decode`, results as in `Plan.run`. The CPU device computes it; CUDA: EtapUnsupported.

    slots: int32 [rows, topk] or [batch, query tokens, topk], page * page_size + offset of each KV token, or -1 where there is none
    slot_counts: int32 [rows] or [batch, query tokens], contiguous: slots of each list that count, from its beginning; None: all of them
    """
    layer = _layer(q_nope, q_rope, kv_cache, q_dtype, kv_format, out_dtype, kv_group_scales is not None)
    lists = view("slots", slots)
    if not lists.shape or not lists.shape[-1]:
        raise ValueError(f"slots has shape {list(lists.shape)}; allowed: [rows, topk] with topk from 1 to 65536")
    plan = Plan(Problem(**layer.fields, batch=layer.rows, topk=lists.shape[-1], batch_invariant=batch_invariant, num_sms=num_sms))
    try:
        plan.update(None if slot_counts is None else _flat_counts(slot_counts, lists, layer.rows), stream=stream)
    except EtapError as refusal:
        raise _COUNTS(refusal) from None
    return plan.run(
        q_nope,
        q_rope,
        kv_cache,
        None,
        slots=slots,
        softmax_scale=softmax_scale,
        kv_scale=kv_scale,
        kv_group_scales=kv_group_scales,
        out=out,
        lse=lse,
        return_lse=return_lse,
        lse_base=lse_base,
        lse_heads_first=lse_heads_first,
        empty_lse=empty_lse,
        stream=stream,
    )


_COUNTS = Words({"cache_seqlens": "slot_counts"})


def _flat_counts(slot_counts: Tensor, slots: View, rows: int) -> View:
    """Counts of [rows] or of the shape of the lists without their last dimension, as [rows]."""
    counts = view("slot_counts", slot_counts)
    check_view("slot_counts", counts, (rows,) if counts.shape == (rows,) else slots.shape[:-1], "int32", slots.device)
    if len(counts.shape) == 2 and counts.shape[0] > 1 and counts.strides[0] != counts.shape[1]:
        raise ValueError(f"slot_counts has strides {list(counts.strides)}; allowed: {[counts.shape[1], 1]}, contiguous")
    return counts._replace(shape=(rows,), strides=(1,))


class _Layer(NamedTuple):
    """What the tensors of a layer say of its problem."""

    rows: int  # of q
    fields: dict[str, Any]  # of Problem


def _layer(
    q_nope: Tensor,
    q_rope: Tensor | None,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    q_dtype: object,
    kv_format: str | None,
    out_dtype: object,
    grouped: bool,
) -> _Layer:
    nope = view("q_nope", q_nope)
    (latent_name, latent), (k_rope_name, k_rope) = _cache_parts(kv_cache)
    kv = _cache_rows(view(latent_name, latent), None if k_rope is None else view(k_rope_name, k_rope))
    if len(nope.shape) not in (3, 4):
        raise ValueError(f"q_nope has shape {list(nope.shape)}; allowed: [rows, heads, d_latent] or [batch, query tokens, heads, d_latent]")
    if len(kv.shape) != 3:
        raise ValueError(f"kv_cache has shape {list(kv.shape)}; allowed: [num_pages, page_size, d_latent + d_rope]")
    q_type = nope.dtype if q_dtype is None else dtype_name(q_dtype)
    if q_type == "uint16":
        raise ValueError("q_nope has type uint16; say with q_dtype whether its bits are 'bf16' or 'fp16'")
    d_latent, d_rope = (nope.shape[-1], view("q_rope", q_rope).shape[-1]) if q_rope is not None else split_width(nope.shape[-1])
    fields = {
        "num_heads": nope.shape[-2],
        "page_size": kv.shape[1],
        "d_latent": d_latent,
        "d_rope": d_rope,
        "q_dtype": q_type,
        "kv_format": _guess_kv_format(kv, q_type, grouped) if kv_format is None else kv_format,
        "out_dtype": q_type if out_dtype is None else dtype_name(out_dtype),
        "device": nope.device,
    }
    return _Layer(math.prod(nope.shape[:-2]), fields)


def split_width(width: int) -> tuple[int, int]:
    """(d_latent, d_rope) of queries that come without q_rope: both parts in one tensor, or no rope at all."""
    for parts in _FUSED:
        if width == sum(parts):
            return parts
    return width, 0


def _guess_kv_format(kv: View, q_type: str, grouped: bool) -> str:
    if kv.dtype == "uint16":
        return q_type
    if kv.dtype == "uint8" and (rows_of_bytes := FORMATS_OF_ROWS.get(kv.shape[-1])):
        return rows_of_bytes
    if kv.dtype in ("e4m3", "uint8"):
        return "e4m3_group" if grouped else "e4m3"
    return kv.dtype


def merge(
    parts: Tensor,
    parts_lse: Tensor,
    lse_base: str = "e",
    *,
    dtype: object = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    stream: Any = None,
) -> tuple[Tensor, Tensor]:
    """Joins results over disjoint sets of KV tokens: (out, lse).

    parts: BF16, FP16 or FP32 [num_parts, rows, num_heads, d]; d a multiple of 8, up to 1024
    parts_lse: FP32 [num_parts, rows, num_heads], base lse_base, as is the merged lse
    dtype: what uint16 arrays hold
    out, lse: allocated when not given

    out = sum_p w_p parts_p with w_p = exp(lse_p - lse) and lse = log sum_p exp(lse_p) (FlashAttention-2, section 3.1). A part with
    lse = -inf counts as empty; where all are, out = 0 and lse = -inf.
    """
    values = _input("parts", parts, (None, None, None, None), None, None)
    name = values.dtype if dtype is None else dtype_name(dtype)
    number = dtype_number("the type of parts", name)
    check_view("parts", values, None, name, None)
    num_parts, rows, heads, d = values.shape
    sums = _input("parts_lse", parts_lse, (num_parts, rows, heads), "fp32", values.device)
    if out is None:
        out = empty(parts, values.device, (rows, heads, d), name)
    if lse is None:
        lse = empty(parts, values.device, (rows, heads), "fp32")
    result = _input("out", out, (rows, heads, d), name, values.device)
    result_lse = _input("lse", lse, (rows, heads), "fp32", values.device)
    device_type, device_index = device_numbers(values.device)
    args = new(
        "etap_merge_args",
        device_type=device_type,
        device_index=device_index,
        num_parts=num_parts,
        rows=rows,
        num_heads=heads,
        d=d,
        dtype=number,
        lse_base=lse_base_number(lse_base),
        parts=ffi.cast(_VOID, values.pointer),
        parts_part_stride=values.strides[0],
        parts_row_stride=values.strides[1],
        parts_head_stride=values.strides[2],
        parts_lse=ffi.cast(_FLOAT, sums.pointer),
        parts_lse_part_stride=sums.strides[0],
        parts_lse_row_stride=sums.strides[1],
        parts_lse_head_stride=sums.strides[2],
        out=ffi.cast(_VOID, result.pointer),
        out_row_stride=result.strides[0],
        out_head_stride=result.strides[1],
        lse=ffi.cast(_FLOAT, result_lse.pointer),
        lse_row_stride=result_lse.strides[0],
        lse_head_stride=result_lse.strides[1],
        stream=_stream(stream, values.device),
    )
    check(lib.etap_merge(args))
    return out, lse
