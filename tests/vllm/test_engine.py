"""vLLM's engine on its CPU platform: answers computed with libetap against those of vLLM's own decode. Needs vLLM built for the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.platforms", reason="vLLM is not installed (docs/vllm.md tells how these tests were run)")

from demo_lib.checkpoint import write_random
from demo_lib.compare import compare
from demo_lib.model import ModelConfig
from etap_vllm import plugin
from rounding import largest_difference, near_tie
from vllm.platforms import current_platform

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the vLLM that is installed is not built for the CPU")

ENGINE = Path(__file__).with_name("engine.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3's architecture with random weights, whose answers depend on the whole context, and a layer that drafts."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    write_random(folder, ModelConfig(draft_layers=1))
    return folder


@cache
def _run(arguments: str, etap: bool, processes: str) -> dict[str, Any]:
    environment = os.environ | {plugin.ENVIRONMENT_VARIABLE: str(int(etap)), "OMP_NUM_THREADS": "2"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if processes else "0"
    environment["VLLM_WORKER_MULTIPROC_METHOD"] = processes or "fork"
    with tempfile.NamedTemporaryFile() as output:
        command = [sys.executable, str(ENGINE), arguments, output.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        result: dict[str, Any] = json.load(output)
    return result


def run(model: Path, *, etap: bool = True, processes: str = "", **arguments: Any) -> dict[str, Any]:
    return _run(json.dumps({"model": str(model)} | arguments), etap, processes)


def check(ours: dict[str, Any], theirs: dict[str, Any], dtype: str = "bf16") -> None:
    """Equal tokens, save after a near tie, and log-probabilities within the rounding of `dtype`, that of the logits too."""
    limit = largest_difference(ModelConfig().num_layers, dtype=dtype, logits=dtype)
    for number, (answer, reference) in enumerate(zip(ours["answers"], theirs["answers"], strict=True)):
        compared = compare(answer, reference, near_tie(limit))
        assert compared.agrees, f"prompt {number}: {compared.note}"
        print(
            f"prompt {number}: log-probabilities differ by {compared.largest_difference:.4f} at most, of {limit:.4f} that rounding allows"
        )
        assert compared.largest_difference < limit


@pytest.mark.parametrize("arguments", [{}, {"block_size": 64}, {"block_size": 48}], ids=str)
def test_answers(checkpoint: Path, arguments: dict[str, Any]) -> None:
    """Guards the whole way: vLLM's metadata, cache and absorbed queries as libetap takes them, in blocks of any size."""
    ours = run(checkpoint, **arguments)
    assert ours["steps"], "libetap computed nothing"
    assert all(tokens == batch and longest == 1 for batch, tokens, longest, _ in ours["steps"])
    check(ours, run(checkpoint, etap=False))


def test_fp16(checkpoint: Path) -> None:
    """Guards the types: an FP16 model has FP16 queries and an FP16 cache."""
    check(run(checkpoint, dtype="float16"), run(checkpoint, etap=False, dtype="float16"), "fp16")


@pytest.mark.parametrize(
    "speculation",
    [
        {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1},
        {"method": "mtp", "num_speculative_tokens": 2},
    ],
    ids=lambda value: value["method"],
)
def test_drafts(checkpoint: Path, speculation: dict[str, Any]) -> None:
    """Guards the verification of drafts: they don't change an answer, and are verified as decodes of several query tokens."""
    ours = run(checkpoint, speculative_config=speculation)
    assert any(longest > 1 for _, _, longest, _ in ours["steps"]), "no step verified a draft"
    check(ours, run(checkpoint, etap=False))
    if speculation["method"] == "ngram":
        assert any(tokens != batch * longest for batch, tokens, longest, _ in ours["steps"]), "drafts of one length only"


def test_spawned_processes(checkpoint: Path) -> None:
    """Guards an engine in a process of its own, started by spawn, with the backend's name in its configuration."""
    check(run(checkpoint, processes="spawn", attention_backend="ETAP_MLA"), run(checkpoint, etap=False))


def test_tensor_parallelism(checkpoint: Path) -> None:
    """Guards ranks: each plans for the heads that it has."""
    check(run(checkpoint, processes="fork", tensor_parallel_size=2), run(checkpoint, etap=False))
