"""The store of benchmark runs (scripts/bench_history.py) and the JSON of scripts/bench_gpu.py, which it reads."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from etap_bench.measurement import Measurement

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("bench_history")
    monkeypatch.setattr(module, "STORE", tmp_path / "benchmarks")
    return module


def benchmark_json(folder: Path, times: dict[str, float], card: str = "NVIDIA X1") -> Path:
    """What pytest-benchmark writes, as far as it is read; a ceiling of 10 µs for every shape."""
    rows = [
        {"extra_info": {"name": name, "card": card, "us": {"etap": us}, "ceiling_us": 10.0, "etap_us": us, "fraction": 10.0 / us}}
        for name, us in times.items()
    ]
    for row in rows:
        row["extra_info"] |= dict.fromkeys(("terabytes_per_second", "plan_us", "error", "sm_mhz"), 1.0) | {
            "millijoules": None,
            "kernel": "k",
        }
    path = folder / "bench.json"
    path.write_text(json.dumps({"benchmarks": [*rows, {"extra_info": {}}], "machine_info": {"cpu": {"brand_raw": "Some CPU"}}}))
    return path


def test_stored_runs_come_back(history: ModuleType, tmp_path: Path, seed: int) -> None:
    """What was stored is what was measured, one line a shape, and earlier runs stay as they were."""
    rng = random.Random(seed)
    for count in (1, 2, 3):
        times = {f"shape-{i}": round(rng.uniform(11, 99), 1) for i in range(5)}
        (run,) = history.read_runs(benchmark_json(tmp_path, times))
        earlier = history.stored("NVIDIA X1")
        path = history.add(run)
        assert path.name == "nvidia-x1.json"
        runs = history.stored("NVIDIA X1")
        assert runs[:-1] == earlier
        assert len(runs) == count
        assert {name: row["etap_us"] for name, row in runs[-1]["rows"].items()} == times
        assert len(re.findall(r'^    "shape-\d":', path.read_text(), flags=re.MULTILINE)) == 5 * count


def test_comparison_is_of_ratios(history: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The fraction of the ceiling decides, with the last run of the same card; another card's runs are not looked at."""
    history.main(["store", str(benchmark_json(tmp_path, {"a": 20.0, "b": 20.0, "c": 20.0}))])
    history.main(["store", str(benchmark_json(tmp_path, {"a": 99.0}, card="NVIDIA X2"))])
    capsys.readouterr()
    history.main(["compare", str(benchmark_json(tmp_path, {"a": 25.0, "b": 20.1, "c": 16.0, "new": 1.0}))])
    said = capsys.readouterr().out
    assert "2 of 3 shapes moved by more than 3%" in said
    assert re.search(r"a .*-20.0%", said)
    assert re.search(r"c .*\+25.0%", said)
    assert not re.search(r"│ (b|new) ", said)
    history.main(["compare", str(benchmark_json(tmp_path, {"a": 1.0}, card="NVIDIA X3"))])
    assert "NVIDIA X3: no stored run to compare 1 shapes with" in capsys.readouterr().out


def test_page(history: ModuleType, tmp_path: Path) -> None:
    """A figure for each card, within the page."""
    for card in ("NVIDIA X1", "cpu (avx2)"):
        history.main(["store", str(benchmark_json(tmp_path, {"a": 20.0, "b": 30.0}, card=card))])
    history.main(["page", str(tmp_path / "trends.html")])
    page = (tmp_path / "trends.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "<h2>cpu (avx2), Some CPU</h2>" in page


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmarks": [{}]}'])
def test_bad_file(history: ModuleType, tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"bad.json can't be read as a benchmark's JSON"):
        history.read_runs(path)


def test_table_of_bench_gpu(history: ModuleType, tmp_path: Path) -> None:
    """The rows that scripts/bench_gpu.py writes keep the names that the store and `etap model` read; refused shapes have no time."""
    bench_gpu = load("bench_gpu")
    done = Measurement(
        us={"ceiling16": 90.0, "ceiling64": 80.0, "etap": 100.0, "fa3": 120.0}, error={"etap": 2e-3}, plan_us=9.0, kernel="k"
    )
    refused = Measurement(us={"ceiling16": 90.0}, skipped={"etap": "no"})
    shapes = bench_gpu.TABLE + bench_gpu.OWN
    rows: list[dict[str, Any]] = [bench_gpu.Row(shapes[0], done).as_dict(), bench_gpu.Row(shapes[1], refused).as_dict()]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"device": "NVIDIA X1", "rows": rows}))
    (run,) = history.read_runs(path)
    assert list(run["rows"]) == [shapes[0].name]
    row = run["rows"][shapes[0].name]
    assert (row["etap_us"], row["ceiling_us"], row["fraction"], row["error"]) == (100.0, 80.0, 0.8, 2e-3)
    assert rows[0]["shape"]["heads"] == shapes[0].heads
    uneven = next(shape for shape in shapes if shape.lengths)
    assert bench_gpu.Row(uneven, done).as_dict()["shape"]["lengths"] == uneven.lengths
    assert rows[0]["best_peer"] == "fa3"
    assert "100.0" in bench_gpu.line(bench_gpu.Row(shapes[0], done))
    assert len({shape.name for shape in shapes}) == len(shapes)
    assert {shape.name for shape in shapes}.issuperset(bench_gpu.QUICK)


def test_a_run_is_of_the_day_it_was_measured(history: ModuleType, tmp_path: Path) -> None:
    """A run that was stored after midnight was dated a day late."""
    path = benchmark_json(tmp_path, {"a": 20.0})
    os.utime(path, (0, 86_400 * 365 - 60))  # a minute before the end of 1970
    assert [run["date"] for run in history.read_runs(path)] == ["1970-12-31"]
