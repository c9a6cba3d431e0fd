"""The backend within the vLLM that is installed: how it is registered, chosen and refused. Needs vLLM, no GPU."""

from __future__ import annotations

import inspect
import multiprocessing
from typing import Any

import pytest
import torch
from etap_vllm import NAME, plugin, seams
from vllm_kit import answer_with_name, asked

pytest.importorskip("vllm.platforms", reason="vLLM is not installed (docs/vllm.md tells how these tests were run)")

from etap_vllm import backend
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.utils import select_common_block_size


@pytest.fixture(autouse=True)
def _registered() -> None:
    plugin.register()


def test_every_seam_is_found() -> None:
    """Guards against a vLLM that moved."""
    assert [(name, detail) for name, found, detail in seams.probe() if not found] == []
    assert seams.missing() == ""


def test_the_command_line() -> None:
    """Guards --attention-backend ETAP_MLA, and a plugin that is loaded twice in one process, as vLLM says it may be."""
    plugin.register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = parser.parse_args(["--attention-backend", NAME])
    chosen = AttentionBackendEnum[options.attention_backend] if isinstance(options.attention_backend, str) else options.attention_backend
    assert chosen.name == NAME
    assert chosen.get_class() is backend.EtapMLABackend


def test_a_spawned_worker_knows_the_backend() -> None:
    """Guards spawned workers: they unpickle vLLM's configuration before they load plugins, and an enumeration is pickled by value."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=answer_with_name, args=(AttentionBackendEnum[NAME], answers))
    worker.start()
    assert answers.get(timeout=120) == (NAME, "etap_vllm.backend.EtapMLABackend")
    worker.join()
    assert worker.exitcode == 0


def reasons(**changes: Any) -> list[str]:
    """What vLLM's CUDA platform asks a backend before it takes it."""
    given = asked(**changes)
    given["device_capability"] = DeviceCapability(*given.pop("capability"))
    rest = {"use_mm_prefix": False, "use_per_head_quant_scales": False, "attn_type": "decoder"} | given
    result: list[str] = backend.EtapMLABackend.validate_configuration(**rest)
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
        ({"use_sparse": True}, "attention is sparse"),
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


def test_a_lost_seam_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a vLLM that moved: the backend is refused with the sentence, and not found out at the first request."""
    monkeypatch.setattr(seams, "missing", lambda: "the seam is gone")
    assert "the seam is gone" in reasons()


@pytest.mark.parametrize(("block_size", "kernel_block_size"), [(16, 16), (48, 16), (64, 64), (192, 64), (256, 256), (512, 256)])
def test_block_sizes(block_size: int, kernel_block_size: int) -> None:
    """Guards how vLLM cuts its blocks into libetap's pages."""
    assert backend.EtapMLABackend.supports_block_size(block_size)
    assert select_common_block_size(block_size, [backend.EtapMLABackend]) == kernel_block_size


@pytest.mark.parametrize(
    ("ours", "method"),
    [
        (backend.EtapMLABackend, "supports_combination"),
        (backend.EtapMLABackend, "get_supported_kernel_block_sizes"),
        (backend.EtapMLABackend, "supports_device_cpu_query_lens_mismatch"),
        (backend.EtapMLAMetadataBuilder, "_build_decode"),
        (backend.EtapMLAMetadataBuilder, "update_draft_decode_metadata"),
        (backend.EtapMLAImpl, "forward_mqa"),
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
