"""The command `etap`, as tables and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import etap_py as etap
from etap_py import doctor
from etap_py.__main__ import main

ROOT = Path(etap.__file__).parents[1]


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["library"] == str(etap.library_path())
    assert report["library_version"] == etap.__version__
    cpu, cuda = report["devices"][:2]
    assert cpu["device"] == "cpu"
    assert cpu["self_test"]["passed"]
    assert cpu["self_test"]["kernel"].startswith("cpu_")
    assert cuda["device"] == "cuda:0"
    assert cuda["info"]["usable"] == (cuda["self_test"] is not None)
    assert cuda["info"]["usable"] or cuda["info"]["reason"]
    assert report["packages"]["numpy"] == np.__version__
    assert status == (0 if report["ok"] else 1)


def test_tables() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "etap_py", "doctor"], cwd=ROOT, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True
    )
    for words in (str(etap.library_path()), "Devices", "cpu", "cuda:0", "passed", "largest error", "Versions", "numpy", "SGLang"):
        assert words in done.stdout, words
    assert ("All is well." in done.stdout) == (done.returncode == 0)
    assert done.stderr == ""


def test_version_and_bad_calls(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"etap {etap.__version__}\n"
    with pytest.raises(SystemExit) as end:
        main(["cure"])
    assert end.value.code == 2
    assert "invalid choice: 'cure'" in capsys.readouterr().err


def test_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """rich is an extra: without it, a sentence and no traceback."""
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "etap: the tables need rich: pip install 'etap-py[cli]', or use --json\n"


def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test must fail for a device that computes wrong: here one that swaps two heads."""
    right = doctor._decode

    def wrong(*arguments: object) -> object:
        out = right(*arguments)
        out[0, [3, 4]] = out[0, [4, 3]]
        return out

    assert doctor.self_test("cpu").passed
    monkeypatch.setattr(doctor, "_decode", wrong)
    failed = doctor.self_test("cpu")
    assert not failed.passed
    assert not doctor.examine().ok


def test_refusing_device_is_noticed() -> None:
    failed = doctor.self_test("cuda:99")
    assert not failed.passed
    assert "ETAP_NO_DEVICE" in failed.detail


@pytest.mark.parametrize(("framework", "field"), [("sglang", "seams"), ("vllm", "vllm_seams")])
def test_seams(monkeypatch: pytest.MonkeyPatch, framework: str, field: str) -> None:
    """Found ones and missing ones come from the plugin; a missing one is not well."""
    for name in ("etap_sglang", "etap_vllm"):
        monkeypatch.setitem(sys.modules, name, None)
    plugin = types.ModuleType(f"etap_{framework}")
    plugin.seams = types.SimpleNamespace(probe=lambda: [("registry", True, "module:1"), ("choices", False, "no such function")])
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    monkeypatch.setattr(doctor, "installed", lambda package: True)
    report = doctor.examine()
    assert [(seam.name, seam.found) for seam in getattr(report, field)] == [("registry", True), ("choices", False)]
    assert not report.ok


def test_without_the_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "etap_sglang", None)
    monkeypatch.setitem(sys.modules, "etap_vllm", None)
    report = doctor.examine()
    assert report.seams == report.vllm_seams == []
    assert "etap-sglang is not installed" in report.sglang
    assert "etap-vllm is not installed" in report.vllm
    assert report.ok


def test_without_the_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin whose framework is gone is told, and is not wrong."""
    monkeypatch.setattr(doctor, "installed", lambda package: False)
    report = doctor.examine()
    assert (report.sglang, report.vllm) == ("sglang is not installed", "vllm is not installed")
    assert report.ok


def test_all_is_well_needs_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = etap.device_info("cpu")
    monkeypatch.setattr(doctor, "device_info", lambda kind, index: replace(usable, usable=False, reason="none"))
    assert not doctor.examine().ok
