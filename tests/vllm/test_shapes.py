"""vLLM's words for a shape, and what is refused in which words. Needs no vLLM."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from etap_vllm import NAME, SPARSE_NAME, decode, plugin, seams, shapes
from vllm_kit import asked

import etap_py as etap


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_size": 512},
        {"head_size": 320, "dtype": torch.float16},
        *({"kv_cache_dtype": name} for name in (None, *shapes.KV_FORMATS)),
        *({"block_size": size} for size in (16, 48, 64, 256, 1024)),
    ],
    ids=str,
)
def test_what_fits(changes: dict[str, Any]) -> None:
    """Guards against refusing what docs/vllm.md lists as supported."""
    assert shapes.refusal(**asked(**changes)) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_mla": False}, "the model has no multi-head latent attention (MLA)"),
        ({"head_size": 192}, "a KV row has 192 values; allowed: 576, 512, 320"),
        ({"dtype": torch.float32}, "--dtype is float32; allowed: bfloat16, float16"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype is fp8_e5m2; allowed: auto, float16, bfloat16, fp8, fp8_e4m3, fp8_ds_mla"),
        ({"block_size": 8}, "--block-size is 8; allowed: multiples of 16"),
        ({"has_sink": True}, "attention sinks"),
        ({"use_sparse": True}, "the model's attention is sparse; allowed: --attention-backend ETAP_MLA_SPARSE"),
        ({"capability": (8, 0)}, "compute capability 8.0; allowed: 9.0 (H20, H100, H200)"),
        ({"capability": (10, 0)}, "compute capability 10.0; allowed: 9.0"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    """Guards against a server that starts and answers wrongly: each refusal of docs/vllm.md, in a sentence with the value it had."""
    told = shapes.refusal(**asked(**changes))
    assert told is not None
    assert said in told
    assert told.startswith("ETAP_MLA: ")
    assert ";" not in told.replace("; allowed", "")  # nothing else is wrong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"head_size": 512, "kv_cache_dtype": "fp8_ds_mla", "block_size": 192}, None),
        ({"use_sparse": False}, "the model's attention is not sparse; allowed: --attention-backend ETAP_MLA"),
        ({"has_sink": True}, "attention sinks"),
        ({"block_size": 8}, "--block-size is 8; allowed: multiples of 16"),
        ({"capability": (10, 0)}, "compute capability 10.0; allowed: 9.0"),
    ],
    ids=str,
)
def test_what_the_sparse_backend_refuses(changes: dict[str, Any], said: str | None) -> None:
    """Guards sparse models against the dense backend's name in a sentence, and dense ones against lists that nobody makes."""
    told = shapes.refusal(**asked(**{"use_sparse": True, **changes}), backend=SPARSE_NAME)
    if said is None:
        assert told is None
    else:
        assert told is not None
        assert told.startswith("ETAP_MLA_SPARSE: ")
        assert told.endswith(said) if "--attention-backend" in said else said in told


def test_a_device_without_sparse_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the choice of the backend: what libetap refuses of such a device or such rows is told at start-up, in its own words."""
    given = {"head_size": 576, "dtype": torch.bfloat16, "kv_cache_dtype": None}
    assert shapes.device_refusal(**given, device="cpu") is None
    told = shapes.device_refusal(**given, device="cuda:99")
    assert told is not None
    assert told.startswith("ETAP_MLA_SPARSE: ")
    assert "ETAP_NO_DEVICE" in told

    def query(problem: etap.Problem) -> None:
        assert (problem.topk > 0, problem.page_size, problem.kv_format) == (True, 1, "bf16")
        raise etap.EtapUnsupported(2, "ETAP_UNSUPPORTED", "kv_format has group scales; the CUDA device takes it with")

    monkeypatch.setattr(shapes.etap, "query", query)
    told = shapes.device_refusal(**given, device="cpu")
    assert told is not None
    assert told.startswith("ETAP_MLA_SPARSE: kv_format has group scales; the CUDA device takes it with")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"hisparse": True}, "ETAP_MLA_SPARSE: HiSparse keeps part of the cache in host memory, which the plugin does not serve"),
        ({"max_tokens": 65537}, "ETAP_MLA_SPARSE: --max-num-batched-tokens is 65537; allowed: up to 65536, each with a list of its own"),
    ],
    ids=str,
)
def test_configurations_that_sparse_models_can_not_have(given: dict[str, Any], said: str | None) -> None:
    """Guards against lists that no plan has: a layer's second call with HiSparse, and more than libetap takes."""
    assert shapes.sparse_refusal(**({"hisparse": False, "max_tokens": 65536} | given)) == said


@pytest.mark.parametrize("head_size", [576, 512])
@pytest.mark.parametrize("name", shapes.KV_FORMATS)
def test_kv_formats_of_sparse_models(name: str, head_size: int) -> None:
    """Guards every name of a KV cache, and models without rope, whose fp8_ds_mla rows vLLM fills up to 656 bytes."""
    latent, rope = shapes.HEAD_SIZES[head_size]
    dtype = torch.float16 if name == "float16" else torch.bfloat16
    given = {"num_heads": 8, "kv_lora_rank": latent, "qk_rope_head_dim": rope, "dtype": dtype, "kv_cache_dtype": name}
    problem = shapes.problem(**given, device="cpu", block_size=48, topk=2051)
    wanted = "e4m3_528" if (name, rope) == ("fp8_ds_mla", 0) else shapes.KV_FORMATS[name] or "bf16"
    assert (problem.kv_format, problem.page_size, problem.topk) == (wanted, 1, 2051)


def test_all_that_is_wrong_is_told() -> None:
    """Guards against one restart of a server for each mistake on its command line."""
    told = shapes.refusal(**asked(head_size=128, block_size=8))
    assert told is not None
    assert "128 values" in told
    assert "--block-size is 8" in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alibi": True}, "ALiBi slopes"),
        ({"sliding_window": True}, "a sliding window"),
        ({"logits_soft_cap": True}, "capped logits"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only instead of decoder"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", [NAME, SPARSE_NAME])
def test_layers_that_are_refused(changes: dict[str, Any], said: str, backend: str) -> None:
    """Guards against layers whose attention is another function of their inputs."""
    fits = {"alibi": False, "sliding_window": False, "logits_soft_cap": False, "attn_type": "decoder", "backend": backend}
    assert shapes.layer_refusal(**fits) is None
    told = shapes.layer_refusal(**(fits | changes))
    assert told == f"{backend}: a layer has {said}, which libetap does not compute"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 129}, "num_heads is 129"),
        ({"kv_lora_rank": 448, "qk_rope_head_dim": 128}, "d_latent"),
        ({"kv_cache_dtype": "float16"}, "kv_format"),
        ({"block_size": 48}, "page_size is 48"),
        ({"device": "cuda:99"}, "ETAP_NO_DEVICE"),
    ],
    ids=str,
)
def test_what_libetap_refuses(changes: dict[str, Any], said: str) -> None:
    """Guards head counts, widths, mixed types and devices: libetap's own sentence reaches whoever starts the server."""
    fits = {
        "num_heads": 16,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "device": "cpu",
    }
    assert shapes.problem(**fits).kv_format == "bf16"
    with pytest.raises(shapes.EtapRefusal) as refused:
        shapes.problem(**(fits | changes))
    assert said in str(refused.value)


@pytest.mark.parametrize(("name", "kv_format"), shapes.KV_FORMATS.items())
def test_kv_formats(name: str, kv_format: str) -> None:
    """Guards the names of KV caches: FP16 ones need an FP16 model, all others serve a BF16 model."""
    dtype = torch.float16 if name == "float16" else torch.bfloat16
    problem = shapes.problem(num_heads=8, kv_lora_rank=512, qk_rope_head_dim=64, dtype=dtype, kv_cache_dtype=name, device="cpu")
    assert problem.kv_format == (kv_format or "bf16")


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_batch_invariance(batch_invariant: bool) -> None:
    """Guards VLLM_BATCH_INVARIANT: with it every step's plan is batch-invariant, and none without it."""
    problem = shapes.problem(
        num_heads=8,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        dtype=torch.bfloat16,
        kv_cache_dtype="auto",
        device="cpu",
        batch_invariant=batch_invariant,
    )
    planner = decode.Planner(problem, 4, 2)
    assert planner.plan(3, 5, 2).problem.batch_invariant is batch_invariant


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("vllm.model_executor.layers.attention.mla_attention", "MLACommonDecodeMetadata"),
        ("vllm.model_executor.layers.attention.mla_attention", "QueryLenSupport.VARLEN"),
        ("vllm.platforms.interface", "DeviceCapability"),
        ("vllm", "envs.VLLM_BATCH_INVARIANT"),
        ("vllm.v1.attention.backends.registry", "AttentionBackendEnum"),  # imported in a function
        ("vllm.v1.attention.backends.mla.cpu_mla", "CPUMLAImpl"),  # on vLLM's CPU platform
        ("vllm.model_executor.layers.attention.sparse_mla_attention", "SparseMLACommonMetadata"),  # for sparse models
    ],
)
def test_imports_are_seams(module: str, attribute: str) -> None:
    """Guards against a probe that knows less than the plugin imports: doctor said yes to a plugin that could not be imported."""
    assert (module, attribute) in {(seam.module, seam.attribute) for seam in (*seams.SEAMS, *seams.SPARSE_SEAMS, *seams.CPU_SEAMS)}


def test_seams_of_sparse_models_are_needed_for_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards dense models on a vLLM that has no such sparse attention, as 0.32.0."""
    monkeypatch.setattr(seams.seams, "probe", lambda package, _, needed: [(seam.name, False, "") for seam in needed])
    assert "lists" in seams.missing.__wrapped__(SPARSE_NAME)
    assert "decode metadata" in seams.missing.__wrapped__(SPARSE_NAME)
    assert "decode metadata" in seams.missing.__wrapped__(NAME)
    assert "sparse" not in seams.missing.__wrapped__(NAME)
    assert seams.missing.__wrapped__(SPARSE_NAME).startswith("the ETAP_MLA_SPARSE backend does not fit this vLLM")


@pytest.mark.parametrize("asked", [False, True])
def test_the_cpu_platform_is_needed_where_it_is_asked_for(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards GPU servers against a refusal for the sake of vLLM's CPU platform, and that platform against none."""
    monkeypatch.setenv(plugin.ENVIRONMENT_VARIABLE, str(int(asked)))
    monkeypatch.setattr(seams.seams, "probe", lambda package, _, needed: [(seam.name, False, "") for seam in needed])
    assert ("CPUMLAImpl" in seams.missing.__wrapped__(NAME)) is asked


def test_rooms() -> None:
    """Guards the rooms: the plugin knows etap_py's public names alone, and what is tested without vLLM imports none of it."""
    for path in Path(shapes.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("etap_py"):
                assert path.name == "seams.py", f"{path.name}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm"):
                assert path.name in ("backend.py", "cpu.py", "plugin.py", "sparse_backend.py"), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "etap":
                assert node.attr in etap.__all__, f"{path.name}:{node.lineno} uses etap_py.{node.attr}"
