"""The backend that vLLM imports for sparse models when it is chosen: decode through libetap, over the tokens that an indexer chose.

The indexer is vLLM's, and so is the translation of its choice, a list of tokens for each query token, into rows of the cache.
Prompts of which every token still sees all others go through vLLM's MLA prefill; longer ones are computed as decodes are, since
every query token has a list of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import etap_py as etap
import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.sparse_mla_attention import (
    SparseMLACommonImpl,
    SparseMLACommonMetadata,
    SparseMLACommonMetadataBuilder,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.mla.sparse_utils import align_blocks_to_rows, flat_kv_row_view
from vllm.v1.attention.ops.metadata import compute_token_to_req_indices
from vllm.v1.kv_cache_interface import AttentionSpec

from . import SPARSE_NAME, decode, shapes
from .backend import EtapLayer, EtapMLABackend

logger = init_logger(f"vllm.{__name__}")  # vLLM sets up the loggers of its own name


class EtapMLASparseBackend(EtapMLABackend):
    """`--attention-backend ETAP_MLA_SPARSE`."""

    @staticmethod
    def get_name() -> str:
        return SPARSE_NAME

    @staticmethod
    def get_builder_cls() -> type[EtapMLASparseMetadataBuilder]:
        return EtapMLASparseMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return EtapMLASparseImpl

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(shapes.BLOCK_SIZES[0])]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Lists count rows, so blocks must be whole rows apart."""
        return align_blocks_to_rows(spec)

    @classmethod
    def is_sparse(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Sums depend on the order of a list, and vLLM promises none."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """What a query token can see is told from the query counts on the device."""
        return True

    @classmethod
    def device_refusal(cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None) -> str | None:
        return shapes.device_refusal(head_size=head_size, dtype=dtype, kv_cache_dtype=kv_cache_dtype, device=current_platform.device_type)


@dataclass(kw_only=True)
class EtapMLASparseMetadata(SparseMLACommonMetadata):
    """What the layers of a step share."""

    plan: etap.Plan | decode.EmptyPlan | None = None  # None: until the builder, whose base makes the rest, has planned the step

    def update(self) -> None:
        """Plans the step from the lengths that are on the device now."""
        assert self.plan is not None
        requests = self.req_id_per_token[: self.plan.problem.batch]
        lengths = decode.list_lengths(self.seq_lens, self.query_start_loc, requests, self.plan.problem.topk)
        decode.update(self.plan, lengths, self.query_start_loc)


class EtapMLASparseMetadataBuilder(SparseMLACommonMetadataBuilder[EtapMLASparseMetadata]):
    """Plans a step's lists on the device, once for all layers of a group."""

    metadata_cls = EtapMLASparseMetadata
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        # A rank's share of a sequence's tokens is not advanced between the steps of a draft.
        self.supports_draft_decode_metadata_update = self.dcp_world_size == 1
        self._layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        problem = shapes.problem(
            num_heads=self._layer.impl.num_heads * self.dcp_world_size,  # context parallelism gathers the heads of its ranks
            kv_lora_rank=self.mla_dims.kv_lora_rank,
            qk_rope_head_dim=self.mla_dims.qk_rope_head_dim,
            dtype=self.model_config.dtype,
            kv_cache_dtype=kv_cache_spec.cache_dtype_str or "auto",
            device=device,
            topk=self._layer.impl.topk,
        )
        decision = etap.query(problem)
        logger.info_once("%s decodes with %s: %s", SPARSE_NAME, decision.kernel, decision.reason)
        max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        max_tokens = max(max_tokens, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self._planner = decode.Planner(problem, max_tokens, 1)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> EtapMLASparseMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        # The layer leaves prompts to vLLM's prefill, or none; as it will decide, so the step is planned.
        without_prompts = metadata.num_prefills > 0 and self._layer._use_sparse_mha(metadata)
        num_tokens = metadata.num_decode_tokens if without_prompts else metadata.num_actual_tokens
        metadata.plan = self._planner.plan(num_tokens, num_tokens, 1)
        metadata.update()
        return metadata

    def update_draft_decode_metadata(self, metadata: EtapMLASparseMetadata) -> None:
        """Recorded by a draft's CUDA graph between its steps, after the lengths have grown on the device."""
        if metadata.num_decode_tokens:
            tokens = metadata.num_decode_tokens
            compute_token_to_req_indices(metadata.query_start_loc, metadata.req_id_per_token, tokens, tokens)
            metadata.update()


class EtapMLASparseImpl(EtapLayer, SparseMLACommonImpl[EtapMLASparseMetadata]):
    """On CUDA."""

    backend: ClassVar[str] = SPARSE_NAME
    group_conversion_decode_only: ClassVar[bool] = True

    def __init__(self, *args: Any, **named: Any) -> None:
        config = get_current_vllm_config()
        refused = shapes.sparse_refusal(
            hisparse=config.attention_config.hisparse_config is not None,
            max_tokens=config.scheduler_config.max_num_batched_tokens,
        )
        if refused:
            raise shapes.EtapRefusal(refused)
        super().__init__(*args, **named)
        if self.kv_cache_dtype == "fp8_ds_mla" and self.qk_rope_head_dim == 0:
            self.supports_dense_mha_prefill = False  # vLLM's prefill would gather rows of 576 values where 512 have room

    @property
    def topk(self) -> int:
        lists = self.topk_indices_buffer
        if lists is None:
            raise shapes.EtapRefusal(f"{SPARSE_NAME}: a layer has no buffer of an indexer's lists")
        width: int = lists.shape[1]
        return width

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: EtapMLASparseMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """vLLM's, which translates the lists and calls `_forward_mqa_kernel`, but does not hand on the step's metadata."""
        self._plan = attn_metadata.plan
        return super().forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)

    def _forward_mqa_kernel(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_cache: torch.Tensor,
        topk_indices: torch.Tensor,
        valid_counts: torch.Tensor,
        *,
        layer: AttentionLayer,
        block_size: int,
        is_decode: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`decode.attend` of the step's lists. Their ends are marked by -1, so that the counts, which differ from layer to layer, are not
        needed beside the plan."""
        rows, _ = flat_kv_row_view(kv_cache, block_size)
        return decode.attend(
            self._plan,
            q,
            rows[:, None, : self._plan.problem.kv_width],
            None,
            slots=topk_indices,
            softmax_scale=self.scale,
            k_scale=layer._k_scale,
            return_lse=self.need_to_return_lse_for_decode,
        )
