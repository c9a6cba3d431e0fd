"""compute-sanitizer over the reduced matrix of sanitize.py, one run for each tool. The summary lines stay in the test's output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).resolve().parent / "sanitize.py"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def find_sanitizer() -> str | None:
    on_path = shutil.which("compute-sanitizer")
    return on_path or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(tool: str, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against what results don't show: reads past the end, P^T read by WGMMA before its writers were fenced, workspace read
    before it was written, barriers that not all threads reach."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    command = [
        sanitizer,
        f"--tool={tool}",
        "--error-exitcode=86",
        "--print-limit=10",
        "--num-cuda-barriers=65536",
        sys.executable,
        str(DRIVER),
        str(seed),
    ]
    result = subprocess.run(
        command,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    summary = [line for line in result.stdout.splitlines() if "SUMMARY" in line]
    with capfd.disabled():
        print(f"\n{tool}: {'; '.join(summary).replace('=========', '').strip()}")
    assert result.returncode == 0, result.stdout[-8000:]
    assert summary and "are right" in result.stdout, result.stdout[-8000:]
