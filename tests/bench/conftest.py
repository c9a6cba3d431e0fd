"""Benchmarks run when they are asked for, with --benchmark-only (make bench): a test run should neither wait for them nor disturb them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """A function after which the n-th measurement is interrupted, by Ctrl-C; its list grows with each that begins."""
    from etap_bench import runner

    real, begun = runner.measure, list[int]()

    def at(nth: int) -> list[int]:
        def measure(*arguments: Any, **options: Any) -> Any:
            begun.append(len(begun) + 1)
            if begun[-1] == nth:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(runner, "measure", measure)
        return begun

    return at


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
