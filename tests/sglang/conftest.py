"""SGLang on this machine: on its GPU, or on the CPU platform of the plugin."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # demo_lib: the small checkpoint, the server, the comparison of answers
sys.path.append(str(Path(__file__).parent))

if not torch.cuda.is_available():
    # Before the first import of sglang, in this process and in those that it starts.
    os.environ["ETAP_SGLANG_CPU"] = "1"
elif importlib.util.find_spec("deep_gemm") is None:
    # SGLang's indexer without DeepGEMM, in PyTorch.
    os.environ.setdefault("SGLANG_FP8_PAGED_MQA_LOGITS_TORCH", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 checkpoint with random weights, whose answers depend on the whole context, and a layer that drafts."""
    from demo_lib.checkpoint import write_random
    from demo_lib.model import ModelConfig

    # On a GPU the dimensions of a rank of eight, which its kernels are made for; small ones where the CPU computes.
    rank = {"hidden_size": 1024, "qk_nope_head_dim": 128, "v_head_dim": 128} if torch.cuda.is_available() else {}
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    config = ModelConfig(draft_layers=1, **rank)
    write_random(folder, config)
    return folder


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """A function that runs a job of engine.py, or knows the result of an equal one."""
    folder, on_cpu = tmp_path_factory.mktemp("jobs"), not torch.cuda.is_available()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["TRITON_INTERPRET"] = "1" if on_cpu else "0"
    if on_cpu:
        environment["OMP_NUM_THREADS"] = "1"  # PyTorch's threads spin, against libetap's and those of other ranks
    command = [sys.executable, str(Path(__file__).with_name("engine.py"))]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as processes:

        @functools.cache
        def run(job_text: str) -> dict[str, Any]:
            job = folder / f"job-{zlib.crc32(job_text.encode())}.json"
            job.write_text(job_text)
            print(job, file=processes.stdin, flush=True)
            status = processes.stdout.readline()
            assert status == "0\n", f"{status}{job.with_suffix('.log').read_text()[-4000:]}"
            return json.loads(job.with_suffix(".out").read_text())

        yield lambda job: run(json.dumps(job))
