"""The attention backend: SGLang's batches on one side, libetap's plans on the other.

Decode, target verification and draft extension are computed by libetap. Prompts (EXTEND, MIXED) are, too, with the weights
absorbed and ragged query counts, unless `dispatch` has them delegated to SGLang's Triton backend, as on CUDA it usually does.

A step's page table, lengths and plan are built once and used by all its layers. In a CUDA graph they are static buffers,
filled by kernels that the graph itself records: a replay needs no host work and no lengths on the host.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import etap_py as etap
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.verify_mask import VerifyMask, maybe_create_verify_mask
from sglang.srt.mem_cache.layout.paged_view import paged_view
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_exec, get_parallel, get_spec
from sglang.srt.speculative.eagle_utils import TreeMaskMode

from . import block_table, calls, tree_mask
from .dispatch import Dispatch, chosen, prefixes_are_shared
from .refusals import KV_FORMATS, EtapRefusal, check_runner, check_trees
from .workspace import Workspace

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What the layers of one forward pass share."""

    kind: str  # for the counters: one of calls.STEPS
    plan: etap.Plan
    kernel: str
    block_table: torch.Tensor  # int32 [batch, pages]
    gathered_kv: torch.Tensor | None = None  # [tokens, 1, latent + rope], of all ranks; None: the pool is read
    tree_mask: torch.Tensor | None = None  # int32 [batch * drafts, words], of a verification whose drafts are trees


@dataclass(frozen=True)
class Branches:
    """Of a draft: how many each request has, and the slots that are set aside for each."""

    count: int
    tokens: int


@dataclass
class Buffers(Workspace):
    """A workspace with page table, lengths and tree mask, which grow and stay as it does."""

    table: torch.Tensor = field(init=False)
    seqlens: torch.Tensor = field(init=False)
    tree_mask: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.table = torch.empty((0, 0), dtype=torch.int32, device=self.device)
        self.seqlens = torch.empty(0, dtype=torch.int32, device=self.device)
        self.tree_mask = torch.empty((0, 0), dtype=torch.int32, device=self.device)

    def reserve_for(self, problem: etap.Problem, pages: int) -> None:
        """Make room for a step with so many pages a sequence, keeping what is large enough already."""
        self.reserve(etap.workspace_size(problem))
        batch, (rows, columns) = problem.batch, self.table.shape
        if batch > rows or pages > columns:
            self.check_growth()
            self.table = torch.zeros((max(batch, rows), max(pages, columns)), dtype=torch.int32, device=self.device)
            self.seqlens = torch.zeros(max(batch, rows), dtype=torch.int32, device=self.device)
        if problem.tree_mask and problem.rows > len(self.tree_mask):
            self.check_growth()
            self.tree_mask = torch.zeros((problem.rows, problem.tree_mask_words), dtype=torch.int32, device=self.device)


_CHAIN = Branches(count=1, tokens=0)


class EtapAttnBackend(AttentionBackend):
    """`--attention-backend etap`. Raises EtapRefusal for a server that it can't serve.

    draft_step: for the i-th step of an EAGLE draft, i + 1: the tokens it reads beyond the batch's lengths.
    branches: of that draft.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: ModelRunner, draft_step: int = 0, branches: Branches = _CHAIN) -> None:
        super().__init__()
        check_runner(runner)
        config = runner.model_config
        self.device = torch.device(runner.device)
        self.page_size = runner.page_size
        self.latent, self.rope = config.kv_lora_rank, config.qk_rope_head_dim
        parallel = get_parallel()
        self.num_heads = config.num_attention_heads // parallel.attn_tp_size
        self.dcp_size = parallel.attn_dcp_size
        self.dcp_rank = parallel.attn_dcp_rank if self.dcp_size > 1 else 0  # SGLang knows no rank where there is one
        self.max_context_len = config.context_len
        self.dtype, self.data_type = runner.dtype, runner.kv_cache_dtype
        self.draft_step, self.branches = draft_step, branches
        self.drafts_are_trees = (get_spec().speculative_eagle_topk or 1) > 1
        self.num_draft_tokens = get_spec().speculative_num_draft_tokens or 0
        self.batch_invariant = bool(get_exec().deterministic.enable_deterministic_inference)
        self.shared_prefixes = prefixes_are_shared() and not self.batch_invariant
        self.is_draft_runner = runner.is_draft_worker
        self.req_to_token_pool = runner.req_to_token_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.kv_index_translator = runner.kv_index_translator
        self.forward_metadata: Step | None = None  # None: delegated, or without query tokens
        self._without_queries = False
        self._eager = Buffers(self.device)
        self._graph = Buffers(self.device)
        self._graph_steps: dict[tuple[str, int], Step] = {}
        self._logged: set[tuple[str, str]] = set()
        self._verify_mask: VerifyMask | None = None
        if self.drafts_are_trees:
            self._verify_mask = self._tree_verify_mask(max_bs=0)
            check_trees(lambda: etap.query(self._problem(batch=1, query_len=self.num_draft_tokens, tree=True)))
        try:
            for query_len in self._query_lens():
                etap.query(self._problem(batch=1, query_len=query_len))
        except etap.EtapError as error:
            raise EtapRefusal(f"the etap attention backend can't serve this model here: {error}") from error
        # Triton's MLA does not read what SGLang gathers for a prompt under decode context parallelism.
        delegates = self.device.type == "cuda" and not draft_step and self.dcp_size == 1 and chosen(runner.device) is Dispatch.AUTO
        self.prefill = triton_backend(runner) if delegates else None
        self.extend_dummy_seqs_capped_by_req_pool = self.prefill is not None

    # ---- A step -------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Outside a graph."""
        self.forward_metadata = None
        self._without_queries = not self._has_queries(forward_batch)
        if self._without_queries:
            return
        if self._is_delegated(forward_batch.forward_mode):
            self.prefill.init_forward_metadata(forward_batch)
            return
        batch = forward_batch.batch_size * self.branches.count
        kind, query_len, extra_tokens = self._shape(forward_batch.forward_mode)
        seq_lens, cu_seqlens_q, total_q = forward_batch.seq_lens, None, 0
        if kind == "extend":
            query_len = max(forward_batch.extend_seq_lens_cpu)
            total_q = int(sum(forward_batch.extend_seq_lens_cpu))
            cu_seqlens_q = torch.zeros(batch + 1, dtype=torch.int32, device=self.device)
            torch.cumsum(forward_batch.extend_seq_lens, 0, dtype=torch.int32, out=cu_seqlens_q[1:])
        elif kind == "draft_extend":
            # The window is num_draft_tokens wide for every request, whatever part of it seq_lens counts.
            seq_lens = seq_lens - forward_batch.extend_seq_lens + query_len
        problem = self._problem(batch, query_len, total_q, tree=kind == "verify" and self.drafts_are_trees)
        pages = self._pages(forward_batch, extra_tokens + query_len, problem.page_size)
        self._eager.reserve_for(problem, pages)
        self.forward_metadata = self._step(kind, problem, self._eager)
        if kind == "extend" and self.dcp_size > 1:
            self._fill_gathered(forward_batch, pages)
        else:
            self._fill(self._eager, forward_batch, seq_lens, extra_tokens)
        if problem.tree_mask:
            self._fill_tree_mask(forward_batch.spec_info.custom_mask)
        self._update(self._eager, cu_seqlens_q)
        if problem.shared_prefixes:
            calls.planned(self.forward_metadata.plan)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        sequences = max_bs * self.branches.count
        problems = [self._problem(sequences, query_len) for query_len in self._query_lens()]
        if self.drafts_are_trees:
            problems.append(self._problem(sequences, self.num_draft_tokens, tree=True))
        self._graph = Buffers(self.device)
        # As many tokens as a request can have: the last drafts may lie beyond the context's length.
        pages = -(-self.req_to_token.shape[1] // self.page_size)
        for problem in sorted(problems, key=etap.workspace_size, reverse=True):  # the largest first, so that no memory is given back
            self._graph.reserve_for(problem, pages)
        self._graph.static = True
        self._graph_steps.clear()
        if self.drafts_are_trees:
            self._verify_mask = self._tree_verify_mask(max_bs)
            return
        self._verify_mask = maybe_create_verify_mask(
            is_draft_runner=self.is_draft_runner,
            skip_prefill=bool(self.draft_step),
            max_bs=max_bs,
            max_context_len=self.max_context_len,
            num_draft_tokens=self.num_draft_tokens,
            device=self.device,
            is_read=False,
        )

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Before a capture and before every replay. Host work only, and little: the graph has its plan."""
        self._without_queries = forward_batch.batch_size == 0
        if self._without_queries:
            return
        if self._is_delegated(forward_batch.forward_mode):
            self.prefill.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
            return
        batch = forward_batch.batch_size * self.branches.count
        kind, query_len, _ = self._shape(forward_batch.forward_mode)
        if (kind, batch) not in self._graph_steps:
            problem = self._problem(batch, query_len, tree=kind == "verify" and self.drafts_are_trees)
            self._graph.reserve_for(problem, pages=0)
            self._graph_steps[kind, batch] = self._step(kind, problem, self._graph)
        self.forward_metadata = self._graph_steps[kind, batch]
        if not in_capture:
            calls.count(kind, self.forward_metadata.kernel, self.token_to_kv_pool.layer_num)
            if self.shared_prefixes:
                calls.planned(self.forward_metadata.plan)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Recorded by the graph: page table, lengths, tree mask and plan, from what the batch's tensors hold at the replay."""
        if self._without_queries:
            return
        if self._is_delegated(forward_batch.forward_mode):
            self.prefill.init_forward_metadata_in_graph(forward_batch)
            return
        _, _, extra_tokens = self._shape(forward_batch.forward_mode)
        # A graph's draft-extend batch already counts its window in seq_lens.
        self._fill(self._graph, forward_batch, forward_batch.seq_lens, extra_tokens)
        if self.forward_metadata.tree_mask is not None:
            self._fill_tree_mask(self._verify_mask.buffer)
        self._update(self._graph)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    @property
    def verify_mask(self) -> VerifyMask | None:
        """Where the draft stage writes its tree mask, and in which layout. A chain's mask is the causal one, so nobody reads it."""
        return self._verify_mask

    def update_verify_buffers_to_fill_after_draft(self, spec_info: Any, cuda_graph_bs: int | None) -> None:
        """Nothing to do: the tree mask is read where a graph records it, and outside of graphs after the draft."""

    # ---- A layer ------------------------------------------------------------------------------------------------

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """q [tokens, heads, latent] with q_rope [tokens, heads, rope], or both in one q; k and k_rope likewise, one head.

        Returns [tokens, heads * latent]. Under decode context parallelism a decode step gets the heads of all ranks, attends to
        this rank's tokens, and returns the log-sum-exp too, FP32 [tokens, heads] in base 2, with which SGLang merges the ranks.
        """
        if self._without_queries:
            return self._nothing(q, layer, forward_batch.forward_mode)
        if save_kv_cache and k is not None:
            self._write(layer, forward_batch, k, v, k_rope)
        return self._attend(q, q_rope, layer)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        q_rope: torch.Tensor | None = None,
        k_rope: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As forward_decode, with several query tokens a request, or delegated (also unabsorbed, with other widths)."""
        if self._without_queries or not self._is_delegated(forward_batch.forward_mode):
            return self.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope)
        if q_rope is not None:
            q = torch.cat([q.view(-1, layer.tp_q_head_num, self.latent), q_rope], dim=-1)
        if k_rope is not None:
            k = torch.cat([k, k_rope], dim=-1)
        calls.count("extend", calls.DELEGATED)
        return self.prefill.forward_extend(q, k, v, layer, forward_batch, save_kv_cache)

    # ---- Parts --------------------------------------------------------------------------------------------------

    def _is_delegated(self, mode: ForwardMode) -> bool:
        return self.prefill is not None and mode.is_extend_without_speculative()

    def _has_queries(self, forward_batch: ForwardBatch) -> bool:
        """A batch may have none: a rank of data-parallel attention without requests, requests with an empty prompt."""
        if forward_batch.forward_mode.is_idle() or forward_batch.batch_size == 0:
            return False
        kind, query_len, _ = self._shape(forward_batch.forward_mode)
        if kind != "extend":
            return query_len > 0
        return forward_batch.extend_seq_lens_cpu is None or sum(forward_batch.extend_seq_lens_cpu) > 0

    def _shape(self, mode: ForwardMode) -> tuple[str, int, int]:
        """(kind of step, query tokens a request, tokens to read beyond the batch's lengths)"""
        if mode.is_decode_or_idle():
            return "draft" if self.draft_step else "decode", 1, self.draft_step
        if mode.is_target_verify():
            return "verify", self.num_draft_tokens, self.num_draft_tokens
        if mode.is_draft_extend_v2():
            return "draft_extend", self.num_draft_tokens, 0
        return "extend", 0, 0

    def _query_lens(self) -> set[int]:
        """Query tokens a request of the steps that SGLang captures in graphs."""
        return {1, self.num_draft_tokens} if self.num_draft_tokens else {1}

    def _step(self, kind: str, problem: etap.Problem, buffers: Buffers) -> Step:
        """A step with its plan, not yet updated. Tells the log when a kernel serves a kind of step for the first time."""
        decision = etap.query(problem)
        if (kind, decision.kernel) not in self._logged:
            self._logged.add((kind, decision.kernel))
            shape = f"batch {problem.batch}, {problem.num_heads} heads, {problem.max_query_len} query tokens"
            logger.info("etap: %s (%s) by %s: %s", kind, shape, decision.kernel, decision.reason)
        plan = etap.Plan(problem, workspace=buffers.memory)
        mask = buffers.tree_mask[: problem.rows] if problem.tree_mask else None
        return Step(kind, plan, decision.kernel, buffers.table[: problem.batch], tree_mask=mask)

    def _problem(self, batch: int, query_len: int, total_q: int = 0, tree: bool = False) -> etap.Problem:
        """total_q: of a prompt, whose KV is gathered from all ranks under decode context parallelism; else 0.
        tree: query tokens are the drafts of a tree"""
        gathered = total_q > 0 and self.dcp_size > 1
        return etap.Problem(
            num_heads=self.num_heads if gathered else self.num_heads * self.dcp_size,
            batch=batch,
            page_size=1 if gathered else self.page_size,
            d_latent=self.latent,
            d_rope=self.rope,
            q_dtype=self.dtype,
            kv_format=KV_FORMATS[self.data_type],
            max_query_len=query_len,
            total_q=total_q,
            causal=True,
            tree_mask=tree,
            batch_invariant=self.batch_invariant,
            shared_prefixes=self.shared_prefixes and not total_q,
            device=str(self.device),
        )

    def _update(self, buffers: Buffers, cu_seqlens_q: torch.Tensor | None = None) -> None:
        """Plans the step from the lengths that are on the device now, and from the page table where prefixes are shared."""
        plan = self.forward_metadata.plan
        batch = plan.problem.batch
        plan.update(buffers.seqlens[:batch], cu_seqlens_q, block_table=buffers.table[:batch] if plan.problem.shared_prefixes else None)

    def _pages(self, forward_batch: ForwardBatch, beyond: int, page_size: int) -> int:
        """Columns of an eager page table: tight where the lengths are on the host, else those of the longest context."""
        lengths = forward_batch.seq_lens if self.device.type == "cpu" else forward_batch.seq_lens_cpu
        longest = self.req_to_token.shape[1] if lengths is None else int(lengths.max())
        return -(-(longest + beyond) // page_size)

    def _fill(self, buffers: Buffers, forward_batch: ForwardBatch, seq_lens: torch.Tensor, extra_tokens: int) -> None:
        batch = forward_batch.batch_size
        if self.branches.count > 1:
            block_table.fill_branches(
                buffers.table[: batch * self.branches.count],
                buffers.seqlens[: batch * self.branches.count],
                req_to_token=self.req_to_token,
                req_pool_indices=forward_batch.req_pool_indices[:batch],
                seq_lens=seq_lens[:batch],
                branches=self.branches.count,
                branch_tokens=self.branches.tokens,
                extra_tokens=extra_tokens,
                page_size=self.page_size,
            )
            return
        block_table.fill(
            buffers.table[:batch],
            buffers.seqlens[:batch],
            req_to_token=self.req_to_token,
            req_pool_indices=forward_batch.req_pool_indices[:batch],
            seq_lens=seq_lens[:batch],
            extra_tokens=extra_tokens,
            page_size=self.page_size,
            dcp_size=self.dcp_size,
            dcp_rank=self.dcp_rank,
        )

    def _tree_verify_mask(self, max_bs: int) -> VerifyMask:
        """Of the drafts alone: bool [max_bs, drafts, drafts]. SGLang makes one for a batch that it has no room for, laid out likewise."""
        buffer = torch.zeros(max_bs * self.num_draft_tokens**2, dtype=torch.bool, device=self.device)
        return VerifyMask(buffer=buffer, mode=TreeMaskMode.QLEN_ONLY, max_bs=max_bs)

    def _fill_tree_mask(self, mask: torch.Tensor) -> None:
        """mask: as `_tree_verify_mask` has it, flat; it may be longer than the batch, and shorter than one that was padded."""
        bits = self.forward_metadata.tree_mask
        rows = mask[: bits.shape[0] * self.num_draft_tokens].view(-1, self.num_draft_tokens)
        tree_mask.pack(rows, bits[: len(rows)])

    def _fill_gathered(self, forward_batch: ForwardBatch, pages: int) -> None:
        """A prompt under decode context parallelism: each layer finds the KV of all ranks in a buffer that SGLang fills."""
        batch, gathered = forward_batch.batch_size, forward_batch.attn_dcp_metadata
        block_table.fill_gathered(
            self._eager.table[:batch, :pages],
            self._eager.seqlens[:batch],
            kv_indptr=gathered.dcp_kv_indptr,
            kv_indices=gathered.dcp_kv_indices,
            seq_lens=forward_batch.seq_lens,
        )
        self.forward_metadata = replace(self.forward_metadata, gathered_kv=gathered.dcp_kv_buffer)

    def _write(
        self,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        k: torch.Tensor,
        v: torch.Tensor | None,
        k_rope: torch.Tensor | None,
    ) -> None:
        where = KVWriteLoc.for_batch(forward_batch)
        if k_rope is None:
            self.token_to_kv_pool.set_kv_buffer(layer, where, k, v)
        else:
            self.token_to_kv_pool.set_mla_kv_buffer(layer, where, k, k_rope)

    def _nothing(self, q: torch.Tensor, layer: RadixAttention, mode: ForwardMode) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """What forward_decode and forward_extend return for a batch without query tokens. Rows of q, if any, are padding."""
        out = q.new_zeros(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)
        if self.dcp_size == 1 or mode.is_extend_without_speculative():
            return out
        return out, q.new_full((q.shape[0], layer.tp_q_head_num), -math.inf, dtype=torch.float32)

    def _attend(
        self, q: torch.Tensor, q_rope: torch.Tensor | None, layer: RadixAttention
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        step = self.forward_metadata
        if step.gathered_kv is None:
            kv = paged_view(self.token_to_kv_pool.get_key_buffer(layer.layer_id), self.page_size)
        else:
            kv = step.gathered_kv
        is_share = self.dcp_size > 1 and step.gathered_kv is None
        if q_rope is None:
            q = q.view(-1, layer.tp_q_head_num, self.latent + self.rope)
            q, q_rope = q[..., : self.latent], q[..., self.latent :] if self.rope else None
        else:
            q, q_rope = q.view(-1, layer.tp_q_head_num, self.latent), q_rope.view(-1, layer.tp_q_head_num, self.rope)
        out, lse = step.plan.run(
            q,
            q_rope,
            kv,
            step.block_table,
            softmax_scale=layer.scaling,
            return_lse=is_share,
            lse_base="2",
            tree_mask=step.tree_mask,
        )
        if not (out.is_cuda and torch.cuda.is_current_stream_capturing()):
            calls.count(step.kind, step.kernel)
        out = out.view(-1, layer.tp_q_head_num * self.latent)
        return (out, lse) if is_share else out


def triton_backend(runner: ModelRunner) -> AttentionBackend:
    """SGLang's own backend, which a machine without Triton's CUDA side can't import."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    return TritonAttnBackend(runner)
