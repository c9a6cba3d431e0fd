"""The CUDA suite: marked `gpu`, skipped with a reason where there is no SM90 GPU or no CUDA device in the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Case
from harness import problem_of
from promises import skip

import etap_py as etap


def why_no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    info = etap.device_info("cuda", 0)
    return "" if info.usable else f"libetap can't use the GPU: {info.reason}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    mine = [item for item in items if here in item.path.parents]
    reason = why_no_gpu() if mine else ""
    for item in mine:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """An illegal address or an assertion on the device ends the process's CUDA context: what follows would only fail with it."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the CUDA context is lost after {item.nodeid}: {error}", returncode=1)


@pytest.fixture
def supported() -> Callable[[Case], None]:
    """Skips the test when the library refuses the case; fails when that refusal is not on the list of promises.py."""

    def check(case: Case) -> None:
        try:
            etap.query(problem_of(case, "cuda"))
        except etap.EtapUnsupported as refusal:
            skip(refusal, case)

    return check
