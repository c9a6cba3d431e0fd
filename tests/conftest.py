"""What all tests share: the seed."""

from __future__ import annotations

import zlib

import pytest
import torch
from harness import SEED

# The reference's OpenMP threads would spin against the library's own: on two cores that costs a factor of 20.
torch.set_num_threads(1)


def pytest_report_header() -> str:
    return f"ETAP_TEST_SEED={SEED} repeats this run's random inputs"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Another one for each test and each run; printed when the test fails."""
    value = (SEED ^ zlib.crc32(request.node.nodeid.encode())) % 2**31
    print(f"seed {value} (ETAP_TEST_SEED={SEED})")
    return value
