"""The backend that vLLM imports when it is chosen: decode through libetap, prompts through vLLM's own MLA prefill.

vLLM sorts a batch into decodes (up to 1 + draft tokens each) and prompts. Its common MLA code writes the cache, absorbs the
weights and computes prompts unabsorbed, in which libetap has no part; what is added here is the plan of a step and a layer's call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import etap_py as etap
import torch
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer
from vllm.v1.kv_cache_interface import AttentionSpec

from . import NAME, decode, seams, shapes
from .plugin import prefixes_are_shared

logger = init_logger(f"vllm.{__name__}")  # vLLM sets up the loggers of its own name


class EtapMLABackend(MLACommonBackend):
    """`--attention-backend ETAP_MLA`."""

    supported_dtypes: ClassVar[list[torch.dtype]] = list(shapes.DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(shapes.KV_FORMATS)

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_builder_cls() -> type[EtapMLAMetadataBuilder]:
        return EtapMLAMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return EtapMLAImpl

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(shapes.HEAD_SIZES)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return list(shapes.BLOCK_SIZES)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return tuple(capability) == shapes.COMPUTE_CAPABILITY

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Whether a step is uniform is told from the host's query counts."""
        return False

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: str | None,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: DeviceCapability,
    ) -> str | None:
        """vLLM's own reasons are a few words each; this one says what was asked for and what is allowed."""
        refused = seams.missing(cls.get_name()) or shapes.refusal(
            head_size=head_size,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            block_size=block_size,
            use_mla=use_mla,
            has_sink=has_sink,
            use_sparse=use_sparse,
            capability=tuple(device_capability),
            backend=cls.get_name(),
        )
        return refused or cls.device_refusal(head_size, dtype, kv_cache_dtype)

    @classmethod
    def device_refusal(cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None) -> str | None:
        """What libetap can't do on this device, as far as it is known before there are layers, which ask again."""
        return None


@dataclass
class EtapMLADecodeMetadata(MLACommonDecodeMetadata):
    """What the layers of a step share."""

    plan: etap.Plan | decode.EmptyPlan
    query_start_loc: torch.Tensor
    max_seq_len: int  # of vLLM, on the host

    def update(self) -> None:
        """Plans the step from the lengths that are on the device now."""
        lens = decode.fit(self.seq_lens, self.block_table, self.plan.problem.page_size, self.max_seq_len)
        decode.update(self.plan, lens, self.query_start_loc, self.block_table)


class EtapMLAMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata[EtapMLADecodeMetadata]]):
    """Plans a step's decodes on the device, once for all layers of a group.

    Full CUDA graphs hold decodes of 1 or 1 + draft tokens each. Elsewhere query counts may differ within a batch.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # A rank's share of a sequence's tokens is not advanced between the steps of a draft.
        self.supports_draft_decode_metadata_update = self.dcp_world_size == 1
        problem = shapes.problem(
            num_heads=self.num_heads * self.dcp_world_size,  # context parallelism gathers the heads of its ranks
            kv_lora_rank=self.mla_dims.kv_lora_rank,
            qk_rope_head_dim=self.mla_dims.qk_rope_head_dim,
            dtype=self.model_config.dtype,
            kv_cache_dtype=kv_cache_spec.cache_dtype_str or "auto",
            device=device,
            block_size=kv_cache_spec.block_size,
            batch_invariant=envs.VLLM_BATCH_INVARIANT,
            shared_prefixes=prefixes_are_shared(),
        )
        decision = etap.query(problem)
        logger.info_once("%s decodes with %s: %s", NAME, decision.kernel, decision.reason)
        max_batch = max(vllm_config.scheduler_config.max_num_seqs, vllm_config.compilation_config.max_cudagraph_capture_size or 0)
        self._planner = decode.Planner(problem, max_batch, self.reorder_batch_threshold)

    def _build_decode(
        self,
        block_table_tensor: torch.Tensor,
        seq_lens_device: torch.Tensor,
        max_seq_len: int,
        query_start_loc_cpu: torch.Tensor,
        query_start_loc_device: torch.Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: torch.Tensor | None,
    ) -> EtapMLADecodeMetadata:
        metadata = EtapMLADecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            plan=self._planner.plan(seq_lens_device.shape[0], num_decode_tokens, max_query_len),
            query_start_loc=query_start_loc_device,
            # For a capture vLLM names the longest context, and gives its sequences query tokens alone.
            max_seq_len=max(max_seq_len, max_query_len),
        )
        metadata.update()
        return metadata

    def update_draft_decode_metadata(self, metadata: MLACommonMetadata[EtapMLADecodeMetadata]) -> None:
        """Recorded by a draft's CUDA graph between its steps, after the lengths have grown on the device."""
        if metadata.decode is not None:
            metadata.decode.update()


class EtapLayer:
    """A layer that is refused when it is made, before the weights are loaded, or never. The class of vLLM that is extended comes next
    among the bases."""

    backend: ClassVar[str] = NAME
    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_dcp: bool = True
    supports_pcp: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        refused = seams.missing(self.backend) or shapes.layer_refusal(
            alibi=bool(alibi_slopes),
            sliding_window=bool(sliding_window),
            logits_soft_cap=bool(logits_soft_cap),
            attn_type=attn_type,
            backend=self.backend,
        )
        if refused:
            raise shapes.EtapRefusal(refused)
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )
        self.supports_quant_query_input = False  # queries stay in 16 bits beside an FP8 cache
        # The builder, which knows the block size, comes after the weights.
        shapes.problem(
            num_heads=num_heads * self.dcp_world_size,
            kv_lora_rank=self.kv_lora_rank,
            qk_rope_head_dim=self.qk_rope_head_dim,
            dtype=get_current_vllm_config().model_config.dtype,
            kv_cache_dtype=kv_cache_dtype,
            device=current_platform.device_type,
            topk=self.topk,
        )

    @property
    def topk(self) -> int:
        """Places in the lists of sparse attention; 0: dense."""
        return 0


class DecodeImpl(EtapLayer):
    """A layer's dense decode, for the class of vLLM that computes its prompts."""

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata[EtapMLADecodeMetadata],
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`decode.attend` of the step's decodes."""
        step = attn_metadata.decode
        return decode.attend(
            step.plan,
            q,
            kv_c_and_k_pe_cache,
            step.block_table,
            softmax_scale=self.scale,
            k_scale=layer._k_scale,
            return_lse=self.need_to_return_lse_for_decode,
        )


class EtapMLAImpl(DecodeImpl, MLACommonImpl[MLACommonMetadata[EtapMLADecodeMetadata]]):
    """On CUDA."""
