"""Whole engines that serve a small model of DeepSeek-V3.2's architecture on the CPU, with the indexer of the CPU platform.

SGLang has no sparse attention on a CPU to compare with. So each call of libetap is checked in the engine itself, against FP64 and the
lists that it got; lists that hold the whole context must give the answers of dense attention; and speculation must change no answer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_lib.checkpoint import write_random
from demo_lib.model import ModelConfig
from safetensors.torch import load_file, save_file
from sparse_engines import MTP, arguments, expect_same, prompts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are the CPU platform's: its indexer, its KV pool")

TOPK = 48  # less than most prompts have tokens
WHOLE_CONTEXT = 512  # more than any
NEW_TOKENS = 8
CONFIG = ModelConfig(q_lora_rank=64, index_topk=TOPK, draft_layers=1)
PROMPTS = (1, 40, TOPK, TOPK + 1, 64, 150)  # tokens


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as a sparse model, as one whose lists hold the whole context, and as a dense model."""
    folder = tmp_path_factory.mktemp("sparse")
    sparse, whole, dense = (folder / name for name in ("sparse", "whole", "dense"))
    write_random(sparse, CONFIG)
    for copy, changes in ((whole, {"index_topk": WHOLE_CONTEXT}), (dense, {"index_topk": 0, "draft_layers": 0})):
        shutil.copytree(sparse, copy)
        config = ModelConfig(**(vars(CONFIG) | changes))
        (copy / "config.json").write_text(json.dumps(config.hugging_face()))
    weights = load_file(dense / "model.safetensors")
    draft = f"model.layers.{CONFIG.num_layers}."
    kept = {name: weight for name, weight in weights.items() if ".indexer." not in name and not name.startswith(draft)}
    save_file(kept, dense / "model.safetensors", metadata={"format": "pt"})
    return {"sparse": sparse, "whole": whole, "dense": dense}


Engines = Callable[[dict[str, Any]], dict[str, Any]]


def answers(engines: Engines, checkpoint: Path, backend: str, **options: Any) -> dict[str, Any]:
    """What an engine answers to `prompts`. libetap's sparse calls are watched; "watched" has the length of each one's longest list."""
    record = checkpoint.with_name(f"{checkpoint.name}-{'-'.join(map(str, options))}.watched")
    engine = arguments(model_path=str(checkpoint), attention_backend=backend, device="cpu", max_total_tokens=4096, **options)
    result = engines({"engine": engine, "environment": {}, "rounds": prompts(PROMPTS), "tokens": NEW_TOKENS, "watch": str(record)})
    return result | {"watched": [int(length) for length in record.read_text().split()] if record.exists() else []}


def expect_calls(result: dict[str, Any], *steps: str) -> None:
    """libetap served these steps, and each of its calls was watched."""
    assert {call["step"] for call in result["etap"]} == set(steps), result["etap"]
    assert sum(call["calls"] for call in result["etap"]) == len(result["watched"])


def test_lists_of_the_whole_context(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Guards every slot between the indexer and the kernel: with as many tokens chosen as there are, sparse attention is dense attention.
    Prompts come in chunks, and behind a cached prefix."""
    sparse = answers(engines, checkpoints["whole"], "etap", chunked_prefill_size=64)
    expect_calls(sparse, "decode", "extend")
    assert sparse["rounds"][1][0]["meta_info"]["cached_tokens"] >= 64, "no radix hit"
    assert max(sparse["watched"]) > max(PROMPTS)
    expect_same(sparse, answers(engines, checkpoints["dense"], "torch_native"), CONFIG.num_layers)


def test_an_fp8_cache(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Guards rows of 656 bytes, written by the CPU platform's pool and read by libetap."""
    result = answers(engines, checkpoints["sparse"], "etap", kv_cache_dtype="fp8_e4m3")
    expect_calls(result, "decode", "extend")
    assert all("e4m3_656" in call["kernel"] for call in result["etap"])


def test_speculation_changes_no_answer(engines: Engines, checkpoints: dict[str, Path]) -> None:
    """Guards verification, draft decode and draft extension, each of whose tokens has its own list, no longer than the model says. (That
    dense attention answers otherwise was asked once: a near tie of a first token had both answer alike.)"""
    plain = answers(engines, checkpoints["sparse"], "etap")
    expect_calls(plain, "decode", "extend")
    drafted = answers(engines, checkpoints["sparse"], "etap", **MTP)
    expect_calls(drafted, "draft", "draft_extend", "extend", "verify")
    expect_same(drafted, plain, CONFIG.num_layers)
    assert max(plain["watched"]) == max(drafted["watched"]) == TOPK < max(PROMPTS)
