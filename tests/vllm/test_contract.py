"""The backend within the vLLM that is installed: how it is registered, chosen and refused. Needs vLLM, no GPU."""

from __future__ import annotations

import inspect
import multiprocessing
from typing import Any

import pytest
import torch
from etap_vllm import NAME, SPARSE_NAME, plugin, seams
from vllm_kit import answer_with_name, asked

pytest.importorskip("vllm.platforms", reason="vLLM is not installed (docs/vllm.md tells how these tests were run)")

from etap_vllm import backend, sparse_backend
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.utils import select_common_block_size


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def test_every_seam_is_found() -> None:
    """Guards against a vLLM that moved."""
    assert [(name, detail) for name, found, detail in seams.probe() if not found] == []
    assert (seams.missing(NAME), seams.missing(SPARSE_NAME)) == ("", "")


BACKENDS = {NAME: backend.EtapMLABackend, SPARSE_NAME: sparse_backend.EtapMLASparseBackend}


@pytest.mark.parametrize("name", BACKENDS)
def test_the_command_line(name: str) -> None:
    """Guards --attention-backend, and a plugin that is loaded twice in one process, as vLLM says it may be."""
    plugin.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = parser.parse_args(["--attention-backend", name])
    chosen = AttentionBackendEnum[options.attention_backend] if isinstance(options.attention_backend, str) else options.attention_backend
    assert chosen.name == name
    assert chosen.get_class() is BACKENDS[name]
    assert chosen.get_class().get_name() == name


@pytest.mark.parametrize("name", BACKENDS)
def test_a_spawned_worker_knows_the_backend(name: str) -> None:
    """Guards spawned workers: they unpickle vLLM's configuration before they load plugins, and an enumeration is pickled by value."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=answer_with_name, args=(AttentionBackendEnum[name], answers))
    worker.start()
    of = BACKENDS[name]
    assert answers.get(timeout=120) == (name, f"{of.__module__}.{of.__name__}")
    worker.join()
    assert worker.exitcode == 0


def reasons(of: type[backend.EtapMLABackend] = backend.EtapMLABackend, **changes: Any) -> list[str]:
    """What vLLM's CUDA platform asks a backend before it takes it."""
    given = asked(**changes)
    given["device_capability"] = DeviceCapability(*given.pop("capability"))
    rest = {"use_mm_prefix": False, "use_per_head_quant_scales": False, "attn_type": "decoder"} | given
    result: list[str] = of.validate_configuration(**rest)
    return result


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_cache_dtype": "fp8", "block_size": 64},
        {"dtype": torch.float16, "head_size": 320},
        {"use_dcp": True},
        {"use_batch_invariant": True},
        {"use_kv_connector": True},
    ],
    ids=str,
)
def test_what_vllm_accepts(changes: dict[str, Any]) -> None:
    """Guards against a backend that refuses what it documents as supported."""
    assert reasons(**changes) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_mla": False}, "no multi-head latent attention"),
        ({"use_sparse": True}, "the model's attention is sparse; allowed: --attention-backend ETAP_MLA_SPARSE"),
        ({"has_sink": True}, "attention sinks"),
        ({"head_size": 192}, "a KV row has 192 values"),
        ({"dtype": torch.float32}, "--dtype is float32"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype is fp8_e5m2"),
        ({"block_size": 8}, "--block-size is 8"),
        ({"capability": (8, 0)}, "compute capability 8.0"),
        ({"capability": (10, 0)}, "compute capability 10.0"),
        # told by vLLM alone, in its words
        ({"use_non_causal": True}, "non-causal"),
        ({"use_pcp": True}, "PCP"),
        ({"use_adaptive_verification": True}, "query lens mismatch"),
        ({"has_sliding_window": True}, "sliding window"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
    ],
    ids=str,
)
def test_what_vllm_refuses(changes: dict[str, Any], said: str) -> None:
    """Guards the refusals of docs/vllm.md where vLLM asks for them: at start-up, before weights are loaded."""
    assert said in " / ".join(reasons(**changes))


@pytest.fixture
def _a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has sparse attention, whatever the platform is."""
    monkeypatch.setattr(sparse_backend.current_platform, "device_type", "cpu", raising=False)


@pytest.mark.usefixtures("_a_device")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_cache_dtype": "fp8_ds_mla", "block_size": 64},
        {"kv_cache_dtype": "fp8_ds_mla", "head_size": 512},
        {"kv_cache_dtype": "fp8", "block_size": 192},
        {"dtype": torch.float16, "head_size": 512},
        {"use_dcp": True},
        {"use_kv_connector": True},
        {"use_adaptive_verification": True},
    ],
    ids=str,
)
def test_what_vllm_accepts_of_sparse_models(changes: dict[str, Any]) -> None:
    """Guards against a backend that refuses what it documents as supported."""
    assert reasons(sparse_backend.EtapMLASparseBackend, use_sparse=True, **changes) == []


@pytest.mark.usefixtures("_a_device")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_sparse": False}, "the model's attention is not sparse; allowed: --attention-backend ETAP_MLA"),
        ({"has_sink": True}, "attention sinks"),
        ({"dtype": torch.float32}, "--dtype is float32"),
        ({"kv_cache_dtype": "nvfp4_ds_mla"}, "--kv-cache-dtype is nvfp4_ds_mla"),
        ({"block_size": 8}, "--block-size is 8"),
        ({"capability": (10, 0)}, "compute capability 10.0"),
        ({"use_batch_invariant": True}, "batch invariance"),
        ({"use_pcp": True}, "PCP"),
    ],
    ids=str,
)
def test_what_vllm_refuses_of_sparse_models(changes: dict[str, Any], said: str) -> None:
    """Guards the refusals of docs/vllm.md where vLLM asks for them: at start-up, before weights are loaded."""
    assert said in " / ".join(reasons(sparse_backend.EtapMLASparseBackend, **{"use_sparse": True, **changes}))


def test_a_device_without_sparse_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the choice of the backend where libetap computes no lists: its sentence, at start-up."""
    monkeypatch.setattr(sparse_backend.current_platform, "device_type", "cuda:99", raising=False)
    assert "ETAP_MLA_SPARSE: device_index is 99" in " / ".join(reasons(sparse_backend.EtapMLASparseBackend, use_sparse=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_lost_seam_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a vLLM that moved: the backend is refused with the sentence, and not found out at the first request."""
    monkeypatch.setattr(seams, "missing", lambda backend: f"a seam of {backend} is gone")
    assert f"a seam of {name} is gone" in reasons(BACKENDS[name], use_sparse=name == SPARSE_NAME)


@pytest.mark.parametrize(("block_size", "kernel_block_size"), [(16, 16), (48, 16), (64, 64), (192, 64), (256, 256), (512, 256)])
def test_block_sizes(block_size: int, kernel_block_size: int) -> None:
    """Guards how vLLM cuts its blocks into libetap's pages."""
    assert backend.EtapMLABackend.supports_block_size(block_size)
    assert select_common_block_size(block_size, [backend.EtapMLABackend]) == kernel_block_size


@pytest.mark.parametrize("block_size", [64, 128, 192])
def test_block_sizes_of_sparse_models(block_size: int) -> None:
    """Guards the indexer, whose own cache has blocks of 64 tokens: lists count rows, whatever the blocks are."""
    assert sparse_backend.EtapMLASparseBackend.supports_block_size(block_size)
    assert select_common_block_size(block_size, [sparse_backend.EtapMLASparseBackend, DeepseekV32IndexerBackend]) == 64


@pytest.mark.parametrize(
    ("ours", "method"),
    [
        (backend.EtapMLABackend, "supports_combination"),
        (backend.EtapMLABackend, "get_supported_kernel_block_sizes"),
        (backend.EtapMLABackend, "supports_device_cpu_query_lens_mismatch"),
        (backend.EtapMLAMetadataBuilder, "_build_decode"),
        (backend.EtapMLAMetadataBuilder, "update_draft_decode_metadata"),
        (backend.EtapMLAImpl, "forward_mqa"),
        (sparse_backend.EtapMLASparseBackend, "supports_combination"),
        (sparse_backend.EtapMLASparseBackend, "get_supported_kernel_block_sizes"),
        (sparse_backend.EtapMLASparseBackend, "customize_spec"),
        (sparse_backend.EtapMLASparseMetadataBuilder, "build"),
        (sparse_backend.EtapMLASparseMetadataBuilder, "update_draft_decode_metadata"),
        (sparse_backend.EtapMLASparseImpl, "forward_mqa"),
        (sparse_backend.EtapMLASparseImpl, "_forward_mqa_kernel"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_methods_take_what_vllm_passes(ours: type, method: str) -> None:
    """Guards the methods that vLLM calls: its parameters in its order."""
    base = next(cls for cls in ours.__mro__ if cls.__module__.startswith("vllm.") and method in vars(cls))
    assert list(inspect.signature(getattr(ours, method)).parameters) == list(inspect.signature(getattr(base, method)).parameters)


def test_what_the_runner_asks() -> None:
    """Guards full CUDA graphs, drafts as decodes, and the log-sum-exp of context parallelism."""
    builder, layer = backend.EtapMLABackend.get_builder_cls(), backend.EtapMLABackend.get_impl_cls()
    assert builder._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
    assert builder.query_len_support is backend.QueryLenSupport.VARLEN
    assert backend.EtapMLABackend.supports_dcp()
    assert (layer.can_return_lse_for_decode, layer.lse_base_on_e) == (True, True)


def test_what_the_runner_asks_of_sparse_models() -> None:
    """Guards the same of sparse models."""
    of = sparse_backend.EtapMLASparseBackend
    assert of.get_builder_cls()._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
    assert (of.is_mla(), of.is_sparse(), of.get_impl_cls().is_sparse) == (True, True, True)
    assert of.supports_dcp()
    assert (of.get_impl_cls().can_return_lse_for_decode, of.get_impl_cls().lse_base_on_e) == (True, True)


def test_the_cpu_platform_waits_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards vLLM's CPU platform where nobody set the variable."""
    monkeypatch.setenv(plugin.ENVIRONMENT_VARIABLE, "0")
    AttentionBackendEnum.CPU_MLA.clear_override()
    plugin.register()
    assert not AttentionBackendEnum.CPU_MLA.is_overridden()
    monkeypatch.setenv(plugin.ENVIRONMENT_VARIABLE, "1")
    plugin.register()
    assert AttentionBackendEnum.CPU_MLA.get_class().get_name() == NAME
    AttentionBackendEnum.CPU_MLA.clear_override()
