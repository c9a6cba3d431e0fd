"""compute-sanitizer over the reduced matrix of sanitize.py, one run for each tool. The summary lines stay in the test's output."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DRIVER = HERE / "sanitize.py"
RACE_FREE = HERE / "mbarrier_without_race.cu"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def find_tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def skip_if_racecheck_is_blind(sanitizer: str, folder: Path) -> None:
    """racecheck of CUDA 13.0 doesn't follow mbarriers: it reports a race in a kernel of a few lines that has none. Where it does,
    what it says about ours means nothing."""
    nvcc, program = find_tool("nvcc"), folder / "mbarrier_without_race"
    if nvcc is None:
        pytest.skip("nvcc, to find out whether racecheck follows mbarriers, is neither on PATH nor in /usr/local/cuda/bin")
    subprocess.run([nvcc, "-gencode=arch=compute_90a,code=sm_90a", "-o", str(program), str(RACE_FREE)], check=True)
    result = subprocess.run(
        [sanitizer, "--tool=racecheck", "--error-exitcode=86", str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode == 86:
        pytest.skip("racecheck of this toolkit reports a race in a kernel that has none: it does not follow mbarriers")
    assert result.returncode == 0, result.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(tool: str, seed: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against what results don't show: reads past the end, P^T read by WGMMA before its writers were fenced, workspace read
    before it was written, barriers that not all threads reach."""
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    if tool == "racecheck":
        skip_if_racecheck_is_blind(sanitizer, tmp_path)
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
