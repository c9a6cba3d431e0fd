"""Whole engines whose requests begin with a system prompt that the radix cache holds once, on this machine's GPU or on the CPU platform:
the same answers with ETAP_SGLANG_SHARED_PREFIXES as without, and prefixes that are really read together.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_lib.checkpoint import write_random
from demo_lib.model import ModelConfig
from harness import SEED
from safetensors.torch import load_file, save_file
from sparse_engines import arguments, expect_same

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":
    not_sm90 = torch.cuda.get_device_capability() != (9, 0)
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not_sm90, reason="the GPU is not an SM90")]

# Two system prompts, which end inside a page, and the requests behind them.
SIZES = {
    "cuda": {"common": 256 * 64, "beyond": 37, "requests": 64, "own": 1000},
    "cpu": {"common": 24 * 64, "beyond": 37, "requests": 6, "own": 100},
}[DEVICE]
NEW_TOKENS = 12
SHARPNESS = 3.0
CONFIG = ModelConfig(max_positions=32768, **({"hidden_size": 1024, "qk_nope_head_dim": 128, "v_head_dim": 128} if DEVICE == "cuda" else {}))


@pytest.fixture(scope="module")
def sharp_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights whose attention looks at a few tokens. An average over thousands, which unscaled queries make, would be as good as
    nothing, with the right prefix or another one."""
    folder = tmp_path_factory.mktemp("sharp") / "checkpoint"
    write_random(folder, CONFIG)
    weights = load_file(folder / "model.safetensors")
    queries = [name for name in weights if name.endswith("q_proj.weight")]
    assert len(queries) == CONFIG.num_layers
    save_file(weights | {name: weights[name] * SHARPNESS for name in queries}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rounds() -> list[list[list[int]]]:
    """The system prompts; then the requests behind them, in pairs that differ in the system prompt alone, all in random order."""
    print(f"ETAP_TEST_SEED={SEED}")
    rng = random.Random(SEED)

    def tokens(count: int) -> list[int]:
        return rng.choices(range(1, CONFIG.vocab_size), k=count)

    systems = [tokens(SIZES["common"] + SIZES["beyond"]) for _ in range(2)]
    own = [tokens(rng.randint(1, SIZES["own"])) for _ in range(SIZES["requests"] // 2)]
    requests = [system + suffix for suffix in own for system in systems]
    rng.shuffle(requests)
    return [systems, requests]


def test_answers_do_not_depend_on_sharing(engines: Callable[[dict[str, Any]], dict[str, Any]], sharp_checkpoint: Path) -> None:
    """Guards what reaches the plan, eager and in a graph: with another table or other lengths than the step's, requests read a prefix that
    is not theirs, or share none."""
    asked = rounds()
    engine = {
        "model_path": str(sharp_checkpoint),
        "attention_backend": "etap",
        "device": DEVICE,
        "max_total_tokens": 3 * SIZES["common"] + SIZES["requests"] * (SIZES["own"] + 128),
        "max_running_requests": SIZES["requests"],
        **({"cuda_graph_bs_decode": [16, SIZES["requests"]], "cuda_graph_backend_prefill": "disabled"} if DEVICE == "cuda" else {}),
    }
    job = {"engine": arguments(**engine), "rounds": asked, "tokens": NEW_TOKENS}
    shared = engines({**job, "environment": {"ETAP_SGLANG_SHARED_PREFIXES": "1"}})
    alone = engines({**job, "environment": {}})

    assert alone["shared_prefixes"] == []
    (found,) = shared["shared_prefixes"]
    print(f"the last step shared {found}")
    assert found["sequences"] > SIZES["requests"] / 2, "requests behind one system prompt don't share it"
    assert found["tokens"] >= (found["sequences"] - found["groups"]) * SIZES["common"], "they share less than the system prompt"
    for result in (shared, alone):
        assert all(answer["meta_info"]["cached_tokens"] >= SIZES["common"] for answer in result["rounds"][1]), "no radix hit"
        assert {call["step"] for call in result["etap"]} >= {"decode"}

    answers = {tuple(prompt): answer["output_ids"] for prompt, answer in zip(asked[1], alone["rounds"][1], strict=True)}
    systems = [len(system) for system in asked[0]]
    same = [
        other == answers[tuple(asked[0][1]) + prompt[systems[0] :]]
        for prompt, other in answers.items()
        if prompt[: systems[0]] == tuple(asked[0][0])
    ]
    assert sum(same) < len(same) / 2, "answers don't depend on the system prompt, so they show nothing"

    behind = [{"rounds": result["rounds"][1:]} for result in (shared, alone)]
    expect_same(*behind, CONFIG.num_layers)
