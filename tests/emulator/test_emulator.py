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

HERE = Path(__file__).resolve().parent
LIBRARY = HERE.parents[1] / os.environ.get("ETAP_BUILD", "build") / "emulator" / "libetap.so"
NOTHING, WAIT_FOR_COPY, WAIT_FOR_PRODUCT, BARRIER, ARRIVAL, NEIGHBOUR = range(6)
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


def test_a_copy_into_a_cta_that_has_ended_is_told(emulator: ctypes.CDLL, seed: int) -> None:
    assert STUCK in {emulator.emulator_self_test(NEIGHBOUR, seed + n) for n in range(50)}


def test_kernels() -> None:
    environment = os.environ | {"ETAP_LIBRARY": str(LIBRARY), "ETAP_TEST_SEED": str(SEED), "ETAP_EMULATOR_SEED": str(SEED % 2**31)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "emulated_kernels.py")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    print(ran.stdout[-200:])
