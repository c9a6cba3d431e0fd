"""The places of SGLang that the backend hooks into.

SGLang keeps several lists of attention backends by name, and a name that one of them doesn't know silently gets another
path. Each is a seam here: where it is, what goes wrong without it, and how the plugin mends it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import etap_py.seams
from etap_py.seams import Seam

from . import NAME, cpu_platform_is_asked_for

if TYPE_CHECKING:
    from .backend import EtapAttnBackend

WRITTEN_FOR = "0.5.23"

# What goes wrong where a name is missing that is merely imported is always the same; `imports` lists those.
_MENDED = (
    Seam("plugins", "sglang.srt.plugins", "load_plugins", "SGLang does not call the plugin"),
    Seam(
        "choices",
        "sglang.srt.arg_groups.choices",
        "add_attention_backend_choices",
        "the command line does not know --attention-backend etap",
    ),
    Seam(
        "registry",
        "sglang.srt.layers.attention.attention_registry",
        "register_attention_backend",
        "the server can't make the backend",
        ("name",),
    ),
    Seam(
        "hooks",
        "sglang.srt.plugins.hook_registry",
        "HookRegistry.register",
        "no function of SGLang can be extended",
        ("target", "hook", "hook_type"),
    ),
    Seam(
        "page size",
        "sglang.srt.arg_groups.attention_hook",
        "_mla_backend_page_constraints",
        "the page size stays 1 unless --page-size is given",
    ),
    Seam(
        "deterministic inference",
        "sglang.srt.arg_groups.choices",
        "add_deterministic_attention_backend_choices",
        "--enable-deterministic-inference is refused",
    ),
    Seam(
        "deterministic inference with a radix cache",
        "sglang.srt.arg_groups.choices",
        "add_radix_supported_deterministic_attention_backend_choices",
        "--enable-deterministic-inference is refused for DeepSeek models",
    ),
    Seam(
        "absorbed queries",
        "sglang.srt.models.deepseek_common.utils",
        "FORWARD_ABSORB_CORE_ATTENTION_BACKENDS",
        "queries and keys are concatenated before each layer: two copies",
    ),
    Seam(
        "MLA handler",
        "sglang.srt.models.deepseek_common.attention_backend_handler",
        "AttentionBackendRegistry.register",
        "prompts take the path of another backend",
        ("backend_name", "handler_func"),
    ),
    Seam(
        "draft backends",
        "sglang.srt.speculative.draft_utils",
        "DraftBackendFactory._create_backend",
        "EAGLE is refused",
        ("self", "backend_name", "backend_map", "error_template", "stamps_children"),
    ),
    Seam(
        "draft-extend graphs",
        "sglang.srt.layers.attention.triton_backend",
        "TritonAttnBackend",
        "EAGLE's draft extension runs without a CUDA graph",
    ),
    Seam(
        "base class",
        "sglang.srt.layers.attention.base_attn_backend",
        "AttentionBackend.init_forward_metadata_in_graph",
        "CUDA graphs can't record how a step is planned",
        ("self", "forward_batch"),
    ),
    Seam(
        "KV writes",
        "sglang.srt.mem_cache.memory_pool",
        "MLATokenToKVPool.set_mla_kv_buffer",
        "latent and rope can't be written to the cache",
        ("self", "layer", "loc_info", "cache_k_nope", "cache_k_rope"),
    ),
    Seam(
        "KV pages",
        "sglang.srt.mem_cache.layout.paged_view",
        "paged_view",
        "the cache can't be seen as pages without a copy",
        ("flat", "page_size"),
    ),
    Seam(
        "server info",
        "sglang.srt.managers.scheduler",
        "Scheduler.get_internal_state",
        "/server_info does not tell how many calls libetap served",
        ("self", "recv_req"),
    ),
)

_SPARSE = (
    Seam(
        "sparse models' options",
        "sglang.srt.arg_groups.model_override_base",
        "register_model_override_predicate",
        "--attention-backend etap does not become dsa for sparse models",
        ("predicate",),
    ),
    Seam(
        "sparse backend",
        "sglang.srt.layers.attention.attention_registry",
        "create_dsa_backend",
        "SGLang's own kernels decode sparse models",
        ("runner",),
    ),
    Seam(
        "sparse decode",
        "sglang.srt.layers.attention.dsa_backend",
        "DeepseekSparseAttnBackend._forward_fa3",
        "SGLang's own kernels decode sparse models",
        ("q_rope", "kv_cache", "v_head_dim", "q_nope", "page_table", "cache_seqlens", "sm_scale"),
    ),
    Seam(
        "sparse steps",
        "sglang.srt.layers.attention.dsa_backend",
        "DeepseekSparseAttnBackend.init_forward_metadata_in_graph",
        "CUDA graphs can't record how a sparse step is planned",
        ("self", "forward_batch"),
    ),
    Seam(
        "sparse drafts",
        "sglang.srt.layers.attention.dsa_backend",
        "DeepseekSparseAttnMultiStepBackend.init_forward_metadata_out_graph",
        "the counters miss the draft steps of sparse models",
        ("self", "forward_batch", "in_capture"),
    ),
)


def _files(prefix: str) -> list[Path]:
    return sorted(Path(__file__).parent.glob(f"{prefix}*.py"))


_COMMON_FILES = [file for file in _files("") if file not in (*_files("cpu_"), *_files("sparse"))]

SEAMS = (*etap_py.seams.imports("sglang", _COMMON_FILES, (*_MENDED, *_SPARSE)), *_MENDED)
"""What the plugin imports, and what it mends."""

SPARSE_SEAMS = (*etap_py.seams.imports("sglang", _files("sparse"), (*SEAMS, *_SPARSE)), *_SPARSE)
"""What it needs besides for models with sparse attention."""

CPU_SEAMS = etap_py.seams.imports("sglang", _files("cpu_"), (*SEAMS, *SPARSE_SEAMS))
"""What only the CPU platform imports."""


def probe() -> list[tuple[str, bool, str]]:
    """(seam, found, detail) for SGLang itself and each seam, as `etap_py.seams.probe` gives them."""
    return etap_py.seams.probe("sglang", WRITTEN_FOR, (*SEAMS, *SPARSE_SEAMS, *CPU_SEAMS))


def found() -> str:
    """For the log: the version of SGLang and how many seams were found in it."""
    (_, _, version), *seams = probe()
    return f"SGLang {version}; {sum(ok for _, ok, _ in seams)} of {len(seams)} seams found"


def missing() -> str:
    """A sentence that names the seams that have moved, or "" when all are there that are needed on this platform."""
    lost = _lost((*SEAMS, *(CPU_SEAMS if cpu_platform_is_asked_for() else ())))
    return f"the etap attention backend does not fit this SGLang (it was written for {WRITTEN_FOR}): {lost}" if lost else ""


def missing_for_sparse() -> str:
    """The same for sparse models."""
    lost = _lost(SPARSE_SEAMS)
    if not lost:
        return ""
    return f"the etap attention backend can't serve sparse models with this SGLang (it was written for {WRITTEN_FOR}): {lost}"


def _lost(seams: tuple[Seam, ...]) -> str:
    return "; ".join(f"{name} ({detail})" for name, found, detail in etap_py.seams.probe("sglang", WRITTEN_FOR, seams) if not found)


# ---- How each is mended ----------------------------------------------------------------------------------------------


def mend_command_line() -> None:
    """Before SGLang parses its arguments."""
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    choices.add_attention_backend_choices([NAME])
    choices.add_deterministic_attention_backend_choices([NAME])
    choices.add_radix_supported_deterministic_attention_backend_choices([NAME])
    # Where the function is called, which imported it by name.
    page_constraints = "sglang.srt.arg_groups.attention_hook._mla_backend_page_constraints"
    HookRegistry.register(page_constraints, _prefer_whole_pages, HookType.AROUND)


def mend_sparse_models() -> None:
    """Before SGLang parses its arguments: what `--attention-backend etap` means for sparse models, and who makes their backend."""
    from sglang.srt.arg_groups import model_override_base
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from . import sparse_options

    model_override_base.register_model_override_predicate(lambda _: True)(sparse_options.resolve)
    HookRegistry.register("sglang.srt.layers.attention.attention_registry.create_dsa_backend", _create_sparse, HookType.AROUND)
    # The registry holds the function as it was before hooks are applied.
    attention_registry.register_attention_backend(sparse_options.INSIDE)(lambda runner: attention_registry.create_dsa_backend(runner))


def _create_sparse(original: Callable[[Any], Any], runner: Any) -> Any:
    from . import plugin, sparse_options

    if sparse_options.is_asked_for(runner.server_args):
        plugin.prepare(runner)
        _replace_sparse_backends()
    return original(runner)


@functools.cache
def _replace_sparse_backends() -> None:
    """In the scheduler's process: SGLang's classes are replaced by subclasses, wherever one is made from now on, drafts included."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from . import sparse

    module = "sglang.srt.layers.attention.dsa_backend"
    HookRegistry.register(f"{module}.DeepseekSparseAttnBackend", sparse.EtapSparseAttnBackend, HookType.REPLACE)
    HookRegistry.register(f"{module}.DeepseekSparseAttnMultiStepBackend", sparse.EtapSparseMultiStepBackend, HookType.REPLACE)
    HookRegistry.apply_hooks()
    _hook_scheduler()


def mend_model_paths(backend: EtapAttnBackend) -> None:
    """When a backend is made, in the scheduler's process: these modules are slow to import and touch the device."""
    from sglang.srt.models.deepseek_common import attention_backend_handler as handlers
    from sglang.srt.models.deepseek_common.utils import FORWARD_ABSORB_CORE_ATTENTION_BACKENDS

    if NAME not in FORWARD_ABSORB_CORE_ATTENTION_BACKENDS:
        FORWARD_ABSORB_CORE_ATTENTION_BACKENDS.append(NAME)
    registry = handlers.AttentionBackendRegistry
    # Triton's handler, which is also that of names that SGLang doesn't know, computes prompts without a prefix unabsorbed.
    registry.register(NAME, registry.get_handler("triton") if backend.prefill is not None else handlers._dispatch_mla_subtype)
    if backend.device.type == "cuda":
        from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

        # The draft worker captures draft extension for the classes of a list that it keeps to itself.
        TritonAttnBackend.register(type(backend))
    _hook_scheduler()


def mend_draft_paths() -> None:
    """What drafts need where SGLang's Triton backend serves under this plugin's name."""
    _hook_scheduler()


@functools.cache
def _hook_scheduler() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    create_backend = "sglang.srt.speculative.draft_utils.DraftBackendFactory._create_backend"
    HookRegistry.register(create_backend, _add_draft_backend, HookType.AROUND)
    get_internal_state = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
    HookRegistry.register(get_internal_state, _add_calls, HookType.AFTER)
    HookRegistry.apply_hooks()


def _prefer_whole_pages(original: Callable[[Any], dict[str, Any]], view: Any) -> dict[str, Any]:
    """64 tokens a page where the user doesn't say otherwise: libetap then fetches whole pages. With trees of drafts SGLang wants 1."""
    chosen = original(view)
    is_free = view.page_size is None and (view.speculative_eagle_topk or 1) == 1
    if is_free and NAME in (view.attention_backend, view.decode_attention_backend):
        return {"page_size": 64, **chosen}
    return chosen


def _add_draft_backend(
    original: Callable[..., Any],
    factory: Any,
    backend_name: str,
    backend_map: dict[str, Callable[[], tuple[str, Any]]],
    error_template: str,
    stamps_children: bool = False,
) -> Any:
    """Only the multi-step container stamps its children; the other map is that of the draft-extend backend."""
    runner = factory.draft_model_runner

    def create() -> tuple[str, Any]:
        from .backend import EtapAttnBackend
        from .dispatch import Dispatch, chosen
        from .draft import EtapMultiStepDraftBackend

        if chosen(runner.device) is Dispatch.TRITON:
            return backend_map["triton"]()
        if stamps_children:
            return NAME, EtapMultiStepDraftBackend(runner, factory.topk, factory.speculative_num_steps)
        return NAME, EtapAttnBackend(runner)

    return original(factory, backend_name, {**backend_map, NAME: create}, error_template, stamps_children)


def _add_calls(result: Any, *_args: Any, **_kwargs: Any) -> Any:
    from . import calls

    result.internal_state[NAME] = calls.snapshot()
    if (shared := calls.shared_prefixes()) is not None:
        result.internal_state[f"{NAME}_shared_prefixes"] = shared
    return result
