"""The CUDA kernels without a GPU: compiled as C++ for an SM90 of fibers (machine.h), whose copies, products and warps are late at
random. It shows wrong addresses, layouts, masks and merges, and waits that are missing or never end. What it can't show, speed,
registers and the precision of the tensor cores, is the GPU suite's."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import SEED
from matrix import TABLES
from prefix_cases import planned

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / os.environ.get("ETAP_BUILD", "build")
LIBRARY = BUILD / "emulator" / "libetap.so"
MORE_CPU = BUILD / "more" / "libetap.so"
NOTHING, WAIT_FOR_COPY, WAIT_FOR_PRODUCT, BARRIER, ARRIVAL = range(5)
RIGHT, WRONG, STUCK = range(3)

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the emulator is built where nvcc's headers are: make emulator")


@pytest.fixture(scope="module")
def emulator() -> ctypes.CDLL:
    return ctypes.CDLL(str(LIBRARY))


def test_a_right_kernel_is_right_for_every_seed(emulator: ctypes.CDLL, seed: int) -> None:
    assert {emulator.emulator_self_test(NOTHING, seed + n) for n in range(50)} == {RIGHT}


@pytest.mark.parametrize("missing", [WAIT_FOR_COPY, WAIT_FOR_PRODUCT, BARRIER])
def test_what_is_missing_shows(emulator: ctypes.CDLL, missing: int, seed: int) -> None:
    """An emulator in which everything happens at once and in order would pass any kernel."""
    assert WRONG in {emulator.emulator_self_test(missing, seed + n) for n in range(50)}


def test_a_barrier_that_nobody_completes_is_told(emulator: ctypes.CDLL, seed: int) -> None:
    assert emulator.emulator_self_test(ARRIVAL, seed) == STUCK


def environment(library: Path = LIBRARY) -> dict[str, str]:
    return os.environ | {"ETAP_LIBRARY": str(library), "ETAP_TEST_SEED": str(SEED), "ETAP_EMULATOR_SEED": str(SEED % 2**31)}


def test_plans_find_the_groups_of_the_cpu_device(seed: int) -> None:
    """One search, whether a thread or a CTA makes it, and tiles of 64 rows on both."""
    cases = [(tables, batch, page_size, seed) for tables in TABLES for batch in (2, 9, 70) for page_size in (1, 64)]
    program = f"import prefix_cases\nfor case in {cases}: print(prefix_cases.planned('cpu', *case))"
    path = os.pathsep.join([str(HERE.parent), *sys.path])
    ran = subprocess.run([sys.executable, "-c", program], env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines() == [str(planned("cpu", *case)) for case in cases]


def run_with(library: Path, *files: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    ran = subprocess.run(command, env=environment(library), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    print(ran.stdout[-200:])


@pytest.mark.timeout(1800)  # some 600 tests in a process: six minutes, ten on a slow machine
def test_kernels() -> None:
    run_with(LIBRARY, HERE / "emulated_kernels.py", HERE.parent / "python" / "numerics" / "test_merge.py")


def test_one_more_of_each() -> None:
    run_with(LIBRARY, HERE / "one_more.py")


@pytest.mark.skipif(not MORE_CPU.exists(), reason="make emulator builds it")
def test_one_more_of_each_on_the_cpu_device() -> None:
    run_with(MORE_CPU, HERE / "one_more.py")
