"""The places of vLLM that the backend hooks into, each with what would go wrong if it moved."""

from __future__ import annotations

import functools
from pathlib import Path

from etap_py import seams
from etap_py.seams import Seam

from . import NAME, SPARSE_NAME, plugin

WRITTEN_FOR = "0.33.0"

_BACKEND = "vllm.v1.attention.backend"
_MLA = "vllm.model_executor.layers.attention.mla_attention"
_SPARSE_MLA = "vllm.model_executor.layers.attention.sparse_mla_attention"
_SPARSE_UTILS = "vllm.v1.attention.backends.mla.sparse_utils"

_HOOKED_INTO = (
    Seam(
        "registry",
        "vllm.v1.attention.backends.registry",
        "register_backend",
        f"the command line does not know --attention-backend {NAME}",
        ("backend", "class_path"),
    ),
    Seam("plugins", "vllm.plugins", "load_general_plugins", "vLLM does not call the plugin"),
    Seam(
        "choice",
        _BACKEND,
        "AttentionBackend.supports_combination",
        "a model that can't be served is not refused at start-up",
        ("head_size", "dtype", "kv_cache_dtype", "block_size", "use_mla", "has_sink", "use_sparse", "device_capability"),
    ),
    Seam(
        "block sizes",
        _BACKEND,
        "AttentionBackend.get_supported_kernel_block_sizes",
        "vLLM does not know which pages libetap reads",
        ("kv_cache_spec",),
    ),
    Seam("CUDA graphs", _BACKEND, "AttentionCGSupport", "decode runs without full CUDA graphs"),
    Seam("query lengths", _MLA, "QueryLenSupport", "drafts are verified on the path of prompts"),
    Seam("backend", _MLA, "MLACommonBackend", "there is no MLA backend to extend"),
    Seam(
        "decode metadata",
        _MLA,
        "MLACommonMetadataBuilder._build_decode",
        "a step is not planned",
        (
            "block_table_tensor",
            "seq_lens_device",
            "query_start_loc_device",
            "num_decode_tokens",
            "max_query_len",
            "dcp_tot_seq_lens_device",
        ),
    ),
    Seam(
        "draft metadata",
        _BACKEND,
        "AttentionMetadataBuilder.update_draft_decode_metadata",
        "the steps of a draft are planned outside of its CUDA graph",
        ("metadata",),
    ),
    Seam(
        "decode",
        _MLA,
        "MLACommonImpl.forward_mqa",
        "vLLM does not call libetap",
        ("q", "kv_c_and_k_pe_cache", "attn_metadata", "layer"),
    ),
    Seam("prefill", _MLA, "MLACommonBaseImpl.forward_mha", "prompts are not computed", ("q", "kv_c_normed", "k_pe", "attn_metadata")),
    Seam(
        "context parallelism",
        _BACKEND,
        "AttentionImplBase.need_to_return_lse_for_decode",
        "the log-sum-exp that decode context parallelism asks for is not returned",
    ),
)

_SPARSE_HOOKED_INTO = (
    Seam("sparse models", _BACKEND, "AttentionBackend.is_sparse", "vLLM does not know that the backend is for sparse models"),
    Seam("whole rows", _BACKEND, "AttentionBackend.customize_spec", "blocks may begin within a row, and lists count rows", ("spec",)),
    Seam(
        "sparse metadata",
        _SPARSE_MLA,
        "SparseMLACommonMetadataBuilder.build",
        "a step's lists are not planned",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Seam(
        "sparse prompts",
        _MLA,
        "MLAAttention._use_sparse_mha",
        "it is not known which query tokens of a step are computed by lists",
        ("attn_metadata",),
    ),
    Seam(
        "sparse decode",
        _SPARSE_MLA,
        "SparseMLACommonImpl.forward_mqa",
        "a layer does not know the plan of its step",
        ("q", "kv_c_and_k_pe_cache", "attn_metadata", "layer"),
    ),
    Seam(
        "lists",
        _SPARSE_MLA,
        "SparseMLACommonImpl._forward_mqa_kernel",
        "vLLM does not call libetap",
        ("q", "kv_cache", "topk_indices", "valid_counts", "layer", "block_size", "is_decode"),
    ),
    Seam("rows", _SPARSE_UTILS, "flat_kv_row_view", "the rows that lists count are others than libetap's", ("kv_cache", "block_size")),
    Seam(
        "ends of lists",
        _SPARSE_UTILS,
        "triton_convert_req_index_to_global_index",
        "lists need not have their tokens at the beginning and -1 from there on",
        ("return_valid_counts",),
    ),
)

_FILES = {file.name: file for file in sorted(Path(__file__).parent.glob("*.py"))}
_FOR_SPARSE_MODELS, _FOR_THE_CPU = _FILES.pop("sparse_backend.py"), _FILES.pop("cpu.py")

SEAMS = (*seams.imports("vllm", _FILES.values(), (*_HOOKED_INTO, *_SPARSE_HOOKED_INTO)), *_HOOKED_INTO)
"""What the plugin imports, and what it hooks into."""

SPARSE_SEAMS = (*seams.imports("vllm", [_FOR_SPARSE_MODELS], (*SEAMS, *_SPARSE_HOOKED_INTO)), *_SPARSE_HOOKED_INTO)
"""What is needed for sparse models only."""

CPU_SEAMS = seams.imports("vllm", [_FOR_THE_CPU], SEAMS)
"""What is imported on vLLM's CPU platform only."""


def probe() -> list[tuple[str, bool, str]]:
    """(seam, found, detail) for vLLM itself and each seam."""
    return seams.probe("vllm", WRITTEN_FOR, (*SEAMS, *SPARSE_SEAMS, *CPU_SEAMS))


@functools.cache
def missing(backend: str) -> str:
    """A sentence that names the seams of this backend that have moved, or "" when all are there that are needed on this platform."""
    needed = (*SEAMS, *(SPARSE_SEAMS if backend == SPARSE_NAME else ()), *(CPU_SEAMS if plugin.cpu_is_asked_for() else ()))
    lost = [f"{name} ({detail})" for name, found, detail in seams.probe("vllm", WRITTEN_FOR, needed) if not found]
    return f"the {backend} backend does not fit this vLLM (it was written for {WRITTEN_FOR}): {'; '.join(lost)}" if lost else ""
