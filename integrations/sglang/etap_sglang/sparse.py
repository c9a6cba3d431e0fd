"""SGLang's backend for sparse attention, with libetap in the place of its decode kernels.

Everything but attention itself is SGLang's: the indexer, what it chooses, lengths, tables and graphs. It hands over, for each query
token, a list of slots of the KV pool and how many of them count. That is libetap's sparse problem as it stands: every query token is a
sequence of its own, so decode, verification, draft extension and draft decode differ in the number of rows alone.

A step is planned by the first of its layers. In a CUDA graph that layer records the plan: lists and counts are static tensors there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import etap_py as etap
import torch
from sglang.srt.layers.attention.dsa_backend import DeepseekSparseAttnBackend, DeepseekSparseAttnMultiStepBackend

from . import calls
from .refusals import EtapRefusal, check_sparse_runner
from .sparse_options import INSIDE, computes_prompts
from .workspace import Workspace

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

PACKED_ROWS = {656: "e4m3_656", 528: "e4m3_528"}
"""libetap's names of an FP8 cache's rows, by their bytes."""


@dataclass(frozen=True)
class Step:
    """What the layers of one forward pass share."""

    kind: str  # for the counters: one of calls.STEPS
    rows: int
    plan: etap.Plan
    kernel: str


class EtapSparseAttnBackend(DeepseekSparseAttnBackend):
    """`--attention-backend etap` for a model with `index_topk`. Raises EtapRefusal for a server that it can't serve."""

    def __init__(self, model_runner: ModelRunner, *args: Any, **kwargs: Any) -> None:
        check_sparse_runner(model_runner)
        super().__init__(model_runner, *args, **kwargs)
        self._is_draft = model_runner.is_draft_worker
        self._computes_prompts = computes_prompts(model_runner.server_args)
        self._dtype = model_runner.dtype
        self._kv_format = "bf16"
        if self.dsa_kv_cache_store_fp8:
            self._kv_format = PACKED_ROWS.get(self.kv_cache_dim, "")
        elif self.kv_cache_dtype != torch.bfloat16:
            self._kv_format = ""
        if not self._kv_format:
            raise EtapRefusal(
                f"the etap attention backend can't read a sparse model's KV cache of {self.kv_cache_dtype} with {self.kv_cache_dim} values "
                f"a token; allowed: bfloat16, and FP8 in rows of {' or '.join(map(str, PACKED_ROWS))} bytes, which hold their scales"
            )
        self._mode: ForwardMode | None = None
        self._step: Step | None = None  # None: the next layer plans
        self._eager, self._graph = Workspace(torch.device(self.device)), Workspace(torch.device(self.device))
        self._in_graph = False
        self._graph_steps: dict[tuple[str, int], Step] = {}
        self._logged: set[tuple[str, str]] = set()
        try:
            etap.query(self._problem(1))
        except etap.EtapError as error:
            raise EtapRefusal(
                f"the etap attention backend can't serve this sparse model here: {error}; "
                f"--attention-backend {INSIDE} serves it without etap"
            ) from error

    # ---- A step -------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Outside a graph."""
        super().init_forward_metadata(forward_batch)
        self._begin(forward_batch.forward_mode, in_graph=False)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self._graph = Workspace(torch.device(self.device))
        self._graph.reserve(etap.workspace_size(self._problem(max_num_tokens)))
        self._graph.static = True
        self._graph_steps.clear()

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Before a capture and before every replay. SGLang fills the static tensors here; for libetap there is nothing to do."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        self._begin(forward_batch.forward_mode, in_graph=True)
        if not in_capture:
            self.count_replay(forward_batch.batch_size)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """At the beginning of what a graph records, and of the trials before: the first layer that follows plans."""
        super().init_forward_metadata_in_graph(forward_batch)
        self._step = None

    def count_replay(self, batch: int) -> None:
        """The layers of a graph for `batch` requests, for the counters. Of a prompt's graph libetap computes nothing."""
        kind = self._kind()
        rows = batch * (1 if kind in ("decode", "draft") else self.speculative_num_draft_tokens or 1)
        if step := self._graph_steps.get((kind, rows)):
            calls.count(kind, step.kernel, self.token_to_kv_pool.layer_num)

    # ---- A layer ------------------------------------------------------------------------------------------------

    def forward_extend(self, *args: Any, **kwargs: Any) -> Any:
        """Prompts, verification, draft extension. Prompts that SGLang computes are counted by its method's name."""
        if self._kind() == "extend" and not self._computes_prompts:
            calls.count("extend", "mha" if self.use_mha else self.dsa_prefill_impl)
        return super().forward_extend(*args, **kwargs)

    def _forward_fa3(
        self,
        q_rope: torch.Tensor,
        kv_cache: torch.Tensor,
        v_head_dim: int,
        q_nope: torch.Tensor,
        page_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        sm_scale: float,
        logit_cap: float,
        page_size: int,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of each query token to the slots of its list.

        q_nope [tokens, heads, latent], q_rope [tokens, heads, rope], both strided as they come; kv_cache [slots, 1, row]
        page_table int32 [tokens, width]: slots of the pool, or -1; cache_seqlens int32: how many count, one for each token of the batch

        Returns [tokens, heads, latent]. Under decode context parallelism the log-sum-exp too, FP32 [tokens, heads] in base 2, over the
        tokens that this rank holds.
        """
        if self._kind() == "extend" and not self._computes_prompts:
            return super()._forward_fa3(
                q_rope=q_rope,
                kv_cache=kv_cache,
                v_head_dim=v_head_dim,
                q_nope=q_nope,
                page_table=page_table,
                cache_seqlens=cache_seqlens,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=max_seqlen_q,
                sm_scale=sm_scale,
                logit_cap=logit_cap,
                page_size=page_size,
            )
        is_share = self.dcp_size > 1
        rows, heads = q_nope.shape[:2]
        if rows == 0:
            out = q_nope.new_zeros(rows, heads, v_head_dim)
            return (out, q_nope.new_zeros(rows, heads, dtype=torch.float32)) if is_share else out
        if self._step is None or self._step.rows != rows:
            self._step = self._plan(rows, cache_seqlens)
        if is_share:
            page_table = own_slots(page_table, self.dcp_size, self.dcp_rank)
        out, lse = self._step.plan.run(
            q_nope,
            q_rope if self.qk_rope_head_dim else None,
            kv_cache.view(torch.uint8) if self.dsa_kv_cache_store_fp8 else kv_cache,
            None,
            slots=page_table,
            softmax_scale=sm_scale,
            return_lse=is_share,
            lse_base="2",
        )
        if not (out.is_cuda and torch.cuda.is_current_stream_capturing()):
            calls.count(self._step.kind, self._step.kernel)
        return (out, lse) if is_share else out

    # ---- Parts --------------------------------------------------------------------------------------------------

    def _begin(self, mode: ForwardMode, in_graph: bool) -> None:
        self._mode, self._step = mode, None
        self._in_graph = in_graph and self._kind() != "extend"  # a prompt's graph has its attention computed between its pieces

    def _kind(self) -> str:
        """Of the step, for the counters: one of calls.STEPS."""
        if self._mode is None or self._mode.is_decode_or_idle():
            return "draft" if self._is_draft else "decode"
        if self._mode.is_target_verify():
            return "verify"
        return "draft_extend" if self._mode.is_draft_extend_v2() else "extend"

    def _plan(self, rows: int, counts: torch.Tensor) -> Step:
        """Plans a step of so many query tokens. Data-parallel attention pads them, or the counts: padded rows have a count of 0."""
        if self._in_graph:
            key = self._kind(), rows
            if key not in self._graph_steps:
                self._graph_steps[key] = self._new_step(rows, self._graph)
            step = self._graph_steps[key]
        else:
            step = self._new_step(rows, self._eager)
        if len(counts) < rows:
            counts = torch.cat([counts, counts.new_zeros(rows - len(counts))])
        step.plan.update(counts[:rows])
        return step

    def _new_step(self, rows: int, workspace: Workspace) -> Step:
        """A step with its plan, not yet updated. Tells the log when a kernel serves a kind of step for the first time."""
        kind, problem = self._kind(), self._problem(rows)
        decision = etap.query(problem)
        if (kind, decision.kernel) not in self._logged:
            self._logged.add((kind, decision.kernel))
            shape = f"{rows} query tokens, {problem.num_heads} heads, lists of {problem.topk}"
            logger.info("etap: sparse %s (%s) by %s: %s", kind, shape, decision.kernel, decision.reason)
        workspace.reserve(etap.workspace_size(problem))
        return Step(kind, rows, etap.Plan(problem, workspace=workspace.memory), decision.kernel)

    def _problem(self, rows: int) -> etap.Problem:
        return etap.Problem(
            num_heads=self.num_dcp_q_heads,
            batch=rows,
            page_size=1,  # a slot is a row of the pool
            d_latent=self.kv_lora_rank,
            d_rope=self.qk_rope_head_dim,
            q_dtype=self._dtype,
            kv_format=self._kv_format,
            topk=self.dsa_index_topk + self.dsa_index_kpool - 1,
            device=str(self.device),
        )


class EtapSparseMultiStepBackend(DeepseekSparseAttnMultiStepBackend):
    """The container of EAGLE's draft steps, whose replays pass by the steps' own backends."""

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        if not in_capture:
            for backend in self.attn_backends:
                backend.count_replay(forward_batch.batch_size)


def own_slots(slots: torch.Tensor, ranks: int, rank: int) -> torch.Tensor:
    """Under decode context parallelism slots are numbered over all ranks together: slot s is row s // ranks of rank s % ranks. Rows of this
    rank, and -1 for those of others; a list keeps its places, and the step its plan."""
    return torch.where(slots % ranks == rank, slots.div(ranks, rounding_mode="floor"), -1)
