"""integrations/sglang/bench_decode.py on the CPU platform: steps of a dense model and of a sparse one. Nothing is timed here but to have a
row."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_lib.checkpoint import write_random
from demo_lib.model import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "integrations/sglang/bench_decode.py"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, it is there to be measured")


def rows(folder: Path, config: ModelConfig, *options: str, environment: dict[str, str]) -> list[dict[str, Any]]:
    write_random(folder / "checkpoint", config)
    command = [sys.executable, str(SCRIPT), "--model-path", str(folder / "checkpoint"), "--rows", str(folder / "rows"), "--device", "cpu"]
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, "--attention-backend", "etap", "--page-size", "64", *options],
        env=os.environ | variables | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (folder / "rows").read_text().splitlines()]


def test_a_common_prefix(tmp_path: Path) -> None:
    """Guards what --common-prefix is there for: pages that requests really share, and none without it."""
    options = ["--batches", "4", "--contexts", "1700", "--common-prefix", "0", "1600", "--max-total-tokens", "8192"]
    without, shared = rows(tmp_path, ModelConfig(), *options, environment={"ETAP_SGLANG_SHARED_PREFIXES": "1"})
    assert (without["common_prefix"], without["sharers"]) == (0, 0)
    assert (shared["common_prefix"], shared["sharers"]) == (1600, 4)
    assert min(without["step"], shared["step"]) > 0


def test_a_verification_of_a_sparse_model(tmp_path: Path) -> None:
    """Guards rows with scales and index keys, which must be filled in their own form, and the lengths of a verification."""
    options = ["--batches", "1", "3", "--contexts", "200", "--kv-cache-dtype", "fp8_e4m3", "--max-total-tokens", "1024"]
    options += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1"]
    config = ModelConfig(q_lora_rank=64, index_topk=48, draft_layers=1)
    found = rows(tmp_path, config, *options, "--speculative-num-draft-tokens", "4", environment={})
    assert [(row["batch"], row["query_tokens"], row["layers"]) for row in found] == [(1, 4, 2), (3, 4, 2)]
    assert all(row["step"] > 0 for row in found)


def test_time_that_is_covered(seed: int) -> None:
    """Guards kernels that overlap, which were counted twice."""
    spec = importlib.util.spec_from_file_location("bench_decode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = random.Random(seed)
    for _ in range(200):
        intervals = [(start, start + rng.randrange(10)) for start in rng.choices(range(50), k=rng.randrange(8))]
        assert module.covered(intervals) == len({second for start, end in intervals for second in range(start, end)})
    assert math.isclose(module.covered([(0.5, 1.0), (0.75, 2.0)]), 1.5)
