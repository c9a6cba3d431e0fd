"""The device of a test: the CPU device, and the CUDA device where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import etap_py as etap
from etap_py import routing


def _why_no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    info = etap.device_info("cuda")
    return "" if info.usable else f"libetap can't use the GPU: {info.reason}"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda" and _why_no_gpu():
        pytest.skip(_why_no_gpu())
    return name


@pytest.fixture
def cuda() -> str:
    """For tests of CUDA graphs, which are marked `gpu`."""
    if _why_no_gpu():
        pytest.skip(_why_no_gpu())
    return "cuda"


@pytest.fixture(autouse=True)
def _route(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test begins on the default route, and leaves no decision of its fake peers behind."""
    monkeypatch.delenv("ETAP_ROUTE", raising=False)
    monkeypatch.setattr(routing, "_used", None)
    yield
    for remembered in (routing._chosen, routing._import, routing._log_refusal):
        remembered.cache_clear()
