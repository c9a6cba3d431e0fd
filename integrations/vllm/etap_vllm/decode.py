"""A step of decode: its plan, made once for all layers, and a layer's call. Nothing here imports vLLM."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import etap_py as etap
import torch


class Planner:
    """Makes the plans of a group of layers, in one workspace whose address never changes.

    vLLM builds a step's metadata outside of its CUDA graphs, before each capture and each replay, with the padded numbers of
    sequences and tokens of the graph. A plan is a function of these numbers, so the schedule is written where the graph that was
    captured with them reads it. The plan itself need not outlive a capture, the planner must.

    problem: the layers' shape; its batch and query tokens don't matter
    max_batch: sequences of a step at most; max_query_len: query tokens of a sequence at most. With problem.topk each query token, which
        has a list of its own, is a sequence of one
    """

    def __init__(self, problem: etap.Problem, max_batch: int, max_query_len: int) -> None:
        self._problem = problem
        uniform = [self.shape(max_batch, max_batch * n, n) for n in range(1, max_query_len + 1)]
        ragged = [] if problem.topk else [replace(shape, total_q=shape.rows) for shape in uniform]
        self._workspace = etap.Plan(max(uniform + ragged, key=etap.workspace_size)).workspace

    def shape(self, batch: int, num_tokens: int, max_query_len: int) -> etap.Problem:
        """The problem of `batch` sequences with `num_tokens` query tokens in all and `max_query_len` in each at most.

        They are uniform when that leaves no choice: a CUDA graph's padding belongs to sequences of length 0.
        """
        uniform = num_tokens == batch * max_query_len
        return replace(self._problem, batch=batch, max_query_len=max_query_len, total_q=0 if uniform else num_tokens)

    def plan(self, batch: int, num_tokens: int, max_query_len: int) -> etap.Plan | EmptyPlan:
        """The plan of such a step. Valid for `update` and `run` until the next one is updated."""
        if batch == 0 or num_tokens == 0:
            return EmptyPlan(replace(self._problem, batch=batch, max_query_len=0))
        return etap.Plan(self.shape(batch, num_tokens, max_query_len), self._workspace)


@dataclass(frozen=True)
class EmptyPlan:
    """Stands for the plan of a step without query tokens: there is nothing to plan, and rows of q, if any, see no token."""

    problem: etap.Problem

    def run(self, q_nope: torch.Tensor, *_: Any, return_lse: bool, **_named: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `etap.Plan.run` for rows that see no token. Where each row has a list, there are no rows without a plan: ValueError."""
        rows = q_nope.shape[:-1]
        if self.problem.topk and rows[0]:
            raise ValueError(f"q_nope has {rows[0]} rows; allowed: 0, the step was planned without lists")
        out = q_nope.new_zeros((*rows, self.problem.d_latent))
        return out, q_nope.new_full(rows, -math.inf, dtype=torch.float32) if return_lse else None


def fit(seq_lens: torch.Tensor, block_table: torch.Tensor, page_size: int, max_seq_len: int) -> torch.Tensor:
    """`seq_lens`, cut to the tokens that a row of the block table has pages for, where vLLM's own bound of them says that it must be.

    No request's tokens are beyond its block table. The sequences of a dummy run (warm-up, profiling, a rank of data parallelism
    that has no requests) are none: their tables name page 0, and their lengths are made up from the number of query tokens, however
    long the model's context is. They are to be read without harm, and their outputs are thrown away.

    seq_lens: int32 [batch]; block_table: int32 [batch, pages]
    max_seq_len: what none of the lengths exceeds, known on the host
    """
    room = block_table.shape[1] * page_size
    return seq_lens if max_seq_len <= room else seq_lens.clamp(max=room)


def list_lengths(seq_lens: torch.Tensor, query_start_loc: torch.Tensor, requests: torch.Tensor, topk: int) -> torch.Tensor:
    """How many tokens the list of each query token can name: those up to itself, topk at most, and none for a CUDA graph's padding.

    A step is planned with these bounds, once for all layers. How many tokens a list does name is known within each layer only, when its
    indexer has run; they stand at its beginning, and -1 from there on.

    seq_lens: int32 [batch], tokens of each sequence, the new ones included; query_start_loc: int32 [batch + 1]
    requests: int32 [query tokens], the sequence of each; any for padding
    topk: places of a list
    """
    tokens = torch.arange(requests.shape[0], dtype=torch.int32, device=requests.device)
    ends = query_start_loc[1:].index_select(0, requests)
    seen = seq_lens.index_select(0, requests) - (ends - tokens) + 1
    return seen.clamp_(0, topk).masked_fill_(tokens >= ends, 0)


def update(
    plan: etap.Plan | EmptyPlan, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, block_table: torch.Tensor | None = None
) -> None:
    """Reads the lengths on the device, without synchronisation; a CUDA graph can record it.

    seq_lens: int32 [batch], KV tokens of each sequence, the new ones included; of a sparse problem: places of each list that count
    query_start_loc: int32 [batch + 1], prefix sums of the query counts
    block_table: int32 [batch, blocks], of all layers; for problems that share prefixes
    """
    if isinstance(plan, etap.Plan):
        table = block_table if plan.problem.shared_prefixes else None
        plan.update(seq_lens, query_start_loc if plan.problem.total_q else None, block_table=table)


def attend(
    plan: etap.Plan | EmptyPlan,
    q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    kv_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    *,
    slots: torch.Tensor | None = None,
    softmax_scale: float,
    k_scale: torch.Tensor,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One layer: (out [tokens, heads, latent], lse [tokens, heads] FP32 of base e or None).

    q: (latent part [tokens, heads, latent], rope part [tokens, heads, rope]), or both in one tensor
    kv_cache: [blocks, block_size, latent + rope], or rows of 656 bytes
    block_table: int32 [batch, blocks]; None in sparse attention, where slots: int32 [tokens, topk] has the row of the cache, taken as
        blocks of one row, of each token that a query token sees, or -1
    k_scale: FP32, one element, on the device: what the values of an FP8 cache are multiplied with. Rows of 656 bytes have scales of
        their own
    """
    q_nope, q_rope = q if isinstance(q, tuple) else (q, None)
    return plan.run(
        q_nope,
        q_rope if plan.problem.d_rope else None,
        kv_cache,
        block_table,
        slots=slots,
        softmax_scale=softmax_scale,
        kv_scale=k_scale if plan.problem.kv_format == "e4m3" else None,
        return_lse=return_lse,
    )
