"""Whole engines on a GPU that serve a small model of DeepSeek-V3.2's architecture: tokens of libetap's decode against those of SGLang's own
kernels. Decode and drafts run in CUDA graphs; the indexer and prompts are SGLang's in both.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_lib.checkpoint import write_random
from demo_lib.model import ModelConfig
from sparse_engines import MTP, arguments, expect_same, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the GPU is not an SM90"),
]

TOPK = 2048  # the only width that SGLang's top-k has for prompts
PROMPTS = (1, 64, TOPK - 1, TOPK, TOPK + 1, 3000)  # tokens
NEW_TOKENS = 12
# A rank of eight of the real one, but for the number of layers and their width.
CONFIG = ModelConfig(
    hidden_size=1024, qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=512, index_topk=TOPK, index_heads=64, draft_layers=1
)
# SGLang's own decode of a BF16 cache and of an FP8 one, and the module that it needs.
NATIVE = {"flashmla_sparse": "flash_mla", "fa3": "sgl_kernel.flash_ops", "flashmla_kv": "flash_mla"}
# FlashAttention-3, which computes short prompts by default, does not come with every SGLang: prompts are sparse attention, too.
ENVIRONMENT = {"SGLANG_DSA_PREFILL_DENSE_ATTN_KV_LEN_THRESHOLD": "0"}


@pytest.fixture(scope="module")
def sparse_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "checkpoint"
    write_random(folder, CONFIG)
    return folder


Answers = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def answers(engines: Callable[[dict[str, Any]], dict[str, Any]], sparse_checkpoint: Path) -> Answers:
    """What an engine with these options answers."""
    small = {"cuda_graph_max_bs_decode": 8, "cuda_graph_backend_prefill": "disabled", "max_total_tokens": 16384}

    def run(**options: Any) -> dict[str, Any]:
        engine = arguments(model_path=str(sparse_checkpoint), device="cuda", **small, **options)
        return engines({"engine": engine, "environment": ENVIRONMENT, "rounds": prompts(PROMPTS), "tokens": NEW_TOKENS})

    return run


@pytest.mark.parametrize("options", [{}, MTP, {"disable_cuda_graph": True}], ids=["graphs", "MTP", "eager"])
@pytest.mark.parametrize(("cache", "native"), [("bfloat16", "flashmla_sparse"), ("bfloat16", "fa3"), ("fp8_e4m3", "flashmla_kv")])
def test_tokens_of_native_attention(answers: Answers, cache: str, native: str, options: dict[str, Any]) -> None:
    """Guards every path between SGLang's top-k and the kernel: a wrong slot, count or scale changes the tokens. A random MTP layer's drafts
    are hardly ever accepted, and change no token either."""
    try:
        importlib.import_module(NATIVE[native])
    except ImportError as error:
        pytest.skip(f"{NATIVE[native]}, which SGLang's {native} needs, can't be imported: {error}")
    if options is MTP and importlib.util.find_spec("deep_gemm") is None:
        pytest.skip("SGLang's indexer in PyTorch, which stands in for DeepGEMM, has no speculative decoding (dsa/utils.py says so)")
    ours = answers(attention_backend="etap", kv_cache_dtype=cache, **options)
    theirs = answers(attention_backend="dsa", dsa_decode_backend=native, kv_cache_dtype=cache)
    assert theirs["etap"] == [], "libetap computed what it is compared with"
    expect_calls(ours, cache, drafts=options is MTP)
    assert ours["rounds"][1][0]["meta_info"]["cached_tokens"] >= TOPK, "no radix hit"
    expect_same(ours, theirs, CONFIG.num_layers, fp8_cache=cache == "fp8_e4m3")


def expect_calls(result: dict[str, Any], cache: str, drafts: bool) -> None:
    """libetap served these steps, with a kernel for this cache, and no prompt."""
    steps = {"verify", "draft", "draft_extend"} if drafts else {"decode"}
    ours = {call["step"]: call["kernel"] for call in result["etap"] if call["kernel"].startswith("sm90_")}
    assert set(ours) == steps, result["etap"]
    assert all(("e4m3" in kernel) == (cache == "fp8_e4m3") for kernel in ours.values()), ours
