"""Finds what the tests of this folder share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import etap_py as etap

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # demo_lib: the small checkpoint, the comparison of answers
sys.path.append(str(Path(__file__).parent))


def why_no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    info = etap.device_info("cuda", 0)
    return "" if info.usable else f"libetap can't use the GPU: {info.reason}"


@pytest.fixture
def cuda() -> str:
    """For tests that are marked `gpu`."""
    if reason := why_no_gpu():
        pytest.skip(reason)
    return "cuda"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return request.getfixturevalue(name) if name == "cuda" else name
