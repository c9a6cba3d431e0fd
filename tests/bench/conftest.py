"""Benchmarks run when they are asked for, with --benchmark-only (make bench): a test run should neither wait for them nor disturb them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from etap_bench import results
from etap_bench.results import Results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", default="", metavar="CPU,GPU", help="two files for what the benchmarks of each device measure")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark-only", False):
        return
    benchmarks = [item for item in items if item.get_closest_marker("bench")]
    if benchmarks:
        config.hook.pytest_deselected(items=benchmarks)
        items[:] = [item for item in items if item not in benchmarks]


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Iterator[dict[str, Results]]:
    """By device, "cpu" and "cuda": filled by the benchmarks, written at the end, also for those who interrupted them."""
    found: dict[str, Results] = {}
    named = request.config.getoption("--results", "")
    paths = dict(zip(("cpu", "cuda"), map(Path, named.split(",")), strict=True)) if named else {}

    yield found
    for device, path in paths.items():
        path.unlink(missing_ok=True)
        if device in found:
            results.write(path, found[device])
