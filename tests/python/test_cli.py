"""The command `etap`, as tables and as JSON."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import etap_py as etap
from etap_py import doctor, terminal
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


def etap_command(*arguments: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own. Options: those of subprocess.run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.run([sys.executable, "-m", "etap_py", *arguments], env=environment, check=False, **options)


def test_tables() -> None:
    done = etap_command("doctor")
    for words in (str(etap.library_path()), "Devices", "cpu", "cuda:0", "passed", "largest error", "Versions", "numpy", "SGLang"):
        assert words in done.stdout, words
    assert ("All is well." in done.stdout or "It works, with" in done.stdout) == (done.returncode == 0)
    assert done.stderr == ""


# ---- A library that can't be used ----


def bad_library(kind: str, folder: Path) -> Path:
    """What ETAP_LIBRARY may name by mistake."""
    path = folder / "libetap.so"
    if kind == "missing":
        return path
    if kind == "a folder":
        return folder
    if kind == "another library":
        return Path(_shared_object("libm.so.6"))
    if kind == "too long a name":
        return folder / ("x" * 300)
    if kind == "an old interface":
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            pytest.skip("no C compiler")
        (folder / "old.c").write_text("int etap_abi_version(void) { return 0; }\n")
        subprocess.run([compiler, "-shared", "-fPIC", folder / "old.c", "-o", path], check=True)
        return path
    content = {"a text file": b"not a library\n", "an empty file": b"", "half a library": etap.library_path().read_bytes()[:5000]}
    path.write_bytes(content[kind])
    return path


def _shared_object(name: str) -> str:
    """The path of a library that this process has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f"/{name}"):
            return line.split()[-1]
    pytest.skip(f"{name} is not loaded")


BAD = ("missing", "a folder", "another library", "too long a name", "an old interface", "a text file", "an empty file", "half a library")


@pytest.mark.parametrize("kind", BAD)
def test_doctor_diagnoses_a_broken_library(kind: str, tmp_path: Path) -> None:
    """It died of what it should diagnose: a traceback, and no JSON."""
    bad = {"ETAP_LIBRARY": str(bad_library(kind, tmp_path))}
    done = etap_command("doctor", "--json", env=bad)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert done.stderr == ""
    assert not report["ok"]
    assert report["library_problem"]
    assert "\n" not in report["library_problem"]
    assert report["devices"] == []
    assert report["packages"]["numpy"] == np.__version__
    shown = etap_command("doctor", env=bad)
    assert (shown.returncode, shown.stderr) == (1, "")
    assert f"library  broken, because {report['library_problem']}" in shown.stdout
    assert "Versions" in shown.stdout


COMMANDS = {
    ("--version",): 0,
    ("--help",): 0,
    ("bench", "--help"): 0,
    ("bench", "chat", "--list", "--steps", "2"): 0,
    ("report", "--help"): 0,
    ("report", "gone.json"): 2,
    ("model", "gpus"): 0,
    ("model", "predict", "bf16-16x4K-h16", "--gpu", "h200"): 0,
    ("tune", "--help"): 0,
    ("bench", "bf16-1x64-h16", "--device", "cpu"): 1,
    ("tune", "bf16-1x1K-h16"): 1,
    ("doctor", "--require", "cuda"): 1,
}


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_without_a_library(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Those that need no library failed without one; those that need it end in one sentence."""
    done = etap_command(*arguments, env={"ETAP_LIBRARY": str(tmp_path / "gone.so")}, cwd=tmp_path)
    assert done.returncode == COMMANDS[arguments], done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1
    if done.returncode == 1 and arguments[0] != "doctor":
        assert f"etap {arguments[0]}: ETAP_LIBRARY names {tmp_path / 'gone.so'}, which is not a file\n" == done.stderr


# ---- Output ----


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("doctor",), ("doctor", "--json"), ("model", "gpus")], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cant_be_written(arguments: tuple[str, ...], unbuffered: str) -> None:
    """A full disk is a sentence, and a reader that has what it wants (`| head`) is nothing; both were tracebacks."""
    env = {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = etap_command(*arguments, env=env, stdout=full)
    assert (done.returncode, done.stderr) == (1, "etap: standard output can't be written: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = etap_command(*arguments, env=env, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_output_that_is_closed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["sh", "-c", f"{sys.executable} -m etap_py model gpus >&-"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "etap: standard output can't be written: Bad file descriptor\n")


TABLES = [
    ("doctor",),
    ("bench", "chat", "--list", "--steps", "3"),
    ("model", "gpus"),
    ("model", "roofline", "--gpu", "h20"),
    ("model", "crossover", "--gpu", "h200"),
    ("model", "validate"),
    ("model", "predict", "bf16-16x64K-h128-sm66", "e4m3_group-128x8K-h16", "--gpu", "h100-sxm", "--gpu", "h20-3e"),
]


@pytest.mark.parametrize("arguments", TABLES, ids=" ".join)
def test_tables_in_a_pipe_and_in_80_columns(arguments: tuple[str, ...]) -> None:
    """Words were broken ("shap/e") and frames drawn. In 80 columns every word of the wide table that is shown is whole."""
    wide = etap_command(*arguments, env={"COLUMNS": ""}).stdout
    narrow = etap_command(*arguments, env={"COLUMNS": "80"}).stdout
    for printed in (wide, narrow):
        assert not set(printed) & set("┏┃│┡\x1b")
    words = set(wide.split())
    broken = {word for word in narrow.split() if word not in words and set(word) != {"-"} and not re.search(r"\d%|-\d|\d-", word)}
    note = {"Not", "in", "80", "columns:", "a", "wider", "terminal,", "pipe", "and", "--json", "have", "them."}
    assert broken <= note | {f"{word}{mark}" for word in words for mark in ",;"}
    for table in narrow.split("\n\n"):
        # A dotted name of 78 letters stays whole, with its state beside it.
        longest = max(map(len, table.split()), default=0) + len("  found")
        assert max(map(len, table.splitlines()), default=0) <= max(80, longest), table


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    """None in a pipe, none with NO_COLOR, none where the terminal has none."""
    marked = ("Title", ("a", "b"), [("x", terminal.Mark("good", "green"))], "")
    assert "\x1b[32mgood\x1b[0m" in "\n".join(terminal.lines(*marked, 80, True))
    assert "\x1b" not in "\n".join(terminal.lines(*marked, 80, False))
    assert not terminal.coloured()
    monkeypatch.setattr(terminal, "_is_terminal", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm")
    for no_colour, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_colour)
        assert terminal.coloured() is coloured
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.coloured()


def test_tables_fit(seed: int) -> None:
    """Any table fits, as far as its words do: optional columns go first, from the last on, and are named."""
    rng = random.Random(seed)
    for _ in range(200):
        columns = [terminal.Column(f"c{i} {'w' * rng.randint(0, 9)}", rng.random() < 0.5, i > 0) for i in range(rng.randint(1, 8))]
        rows = [["y" * rng.randint(1, 12) + " z" * rng.randint(0, 20) for _ in columns] for _ in range(rng.randint(0, 4))]
        limit = rng.randint(20, 100)
        printed = list(terminal.lines("title", columns, rows, "", limit, False))
        assert max(map(len, printed)) <= max(limit, 12)
        header = " ".join(itertools.takewhile(lambda line: set(line) - {"-", " "}, printed[1:])).split()  # to the rule of dashes
        assert header[0] == "c0"
        left_out = [column.name for column in columns if column.name.split()[0] not in header]
        note = " ".join(printed)
        assert ("columns:" in note) == bool(left_out)
        if rows and not left_out:
            assert sum(line.count("z") for line in printed) == sum(cell.count("z") for row in rows for cell in row)


def test_version_and_bad_calls(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"etap {etap.__version__}\n"
    with pytest.raises(SystemExit) as end:
        main(["cure"])
    assert end.value.code == 2
    assert "invalid choice: 'cure'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", TABLES, ids=" ".join)
def test_without_rich(arguments: tuple[str, ...]) -> None:
    """`pip install .` brings no rich; `etap doctor` then said that the tables need it."""
    program = "import sys; sys.modules['rich'] = None; from etap_py.__main__ import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n---" in done.stdout


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


# ---- What works less than it could ----


@pytest.mark.parametrize("where", ["sys/bus/pci/devices/0000:01:00.0", "proc/driver/nvidia/gpus/0000:01:00.0", "dev/nvidia0"])
def test_nvidia_cards_are_found(where: str, tmp_path: Path) -> None:
    """With a driver, without one, and in a container; other vendors' cards and NVIDIA's sound devices don't count."""
    assert doctor.nvidia_cards(tmp_path) == 0
    (tmp_path / where).mkdir(parents=True)
    if where.startswith("sys"):
        for vendor, kind, cards in (("0x8086", "0x030000", 0), ("0x10de", "0x040300", 0), ("0x10de", "0x030200", 1)):
            (tmp_path / where / "vendor").write_text(f"{vendor}\n")
            (tmp_path / where / "class").write_text(f"{kind}\n")
            assert doctor.nvidia_cards(tmp_path) == cards
    assert doctor.nvidia_cards(tmp_path) == 1


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [("libetap was built without CUDA", "install a wheel of etap-py with CUDA"), ("compute capability 8.0", "need a Hopper card")],
)
def test_an_unused_card_is_a_warning(reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """ "All is well" on a machine with an NVIDIA card and a library that does not use it."""
    monkeypatch.delenv("COLUMNS", raising=False)
    real = doctor.device_info
    unusable = replace(real("cpu", 0), usable=False, reason=reason)
    monkeypatch.setattr(doctor, "device_info", lambda kind, index: unusable if kind == "cuda" else real(kind, index))
    for cards, expected in ((0, 0), (2, 1)):
        monkeypatch.setattr(doctor, "nvidia_cards", lambda count=cards: count)
        warnings = [warning for warning in doctor.examine().warnings if "NVIDIA" in warning]
        assert len(warnings) == expected
    assert reason in warnings[0]
    assert remedy in warnings[0]
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"Warning: {warnings[0]}\n" in said
    assert "All is well" not in said
    assert main(["doctor", "--require", "cuda"]) == 1
    said = capsys.readouterr().out
    assert f"Required: cuda: {reason}" in said
    assert "Something is wrong" in said


@pytest.mark.parametrize("framework", ["sglang", "vllm"])
def test_a_plugin_without_its_framework_is_a_warning(
    framework: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "All is well" with our plugin and nothing to plug it into; `--require` makes it an error, as it does without the plugin."""
    plugins = {name: types.ModuleType(f"etap_{name}") for name in ("sglang", "vllm")}
    for name, plugin in plugins.items():
        plugin.seams = types.SimpleNamespace(probe=lambda: [("registry", True, "module:1")])
        monkeypatch.setitem(sys.modules, f"etap_{name}", plugin)
    monkeypatch.setattr(doctor, "installed", lambda package: package != framework)
    report = doctor.examine()
    assert report.ok
    assert sum(f"etap-{framework} is installed" in warning for warning in report.warnings) == 1
    assert f"pip install {framework}" in " ".join(report.warnings)
    other = "vllm" if framework == "sglang" else "sglang"
    assert doctor.examine(require=[other]).ok
    assert main(["doctor", "--json", "--require", framework]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == [f"{framework}: {framework} is not installed"]
    monkeypatch.setitem(sys.modules, f"etap_{framework}", None)
    report = doctor.examine(require=[framework])
    assert not report.ok
    assert f"the plugin etap-{framework} is not installed" in report.missing[0]


def test_a_plugin_that_cant_be_looked_at_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a framework or our plugin does, the rest is still shown."""

    def broken() -> None:
        raise SyntaxError("invalid syntax")

    plugin = types.ModuleType("etap_vllm")
    plugin.seams = types.SimpleNamespace(probe=broken)
    monkeypatch.setitem(sys.modules, "etap_vllm", plugin)
    monkeypatch.setattr(doctor, "installed", lambda package: True)
    report = doctor.examine()
    assert not report.ok
    assert [(seam.found, seam.detail) for seam in report.vllm_seams] == [(False, "it can't be looked at: invalid syntax")]


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b"not json", b'{"internal_states": [{"etap": [{"x": 1}]}]}'])
def test_a_server_that_is_another_is_a_sentence(answer: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that answers something else was a traceback, and one that does not answer hid the rest of the report."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert main(["doctor", "--json", "--server", url]) == 1
        server.shutdown()
    report = json.loads(capsys.readouterr().out)
    assert report["server_problem"].startswith(f"there is no SGLang server that answers at {url}: ")
    assert report["devices"][0]["self_test"]["passed"]


def test_a_bug_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What nobody thought of must not look like a crash either."""

    def bug(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(doctor, "examine", bug)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "etap doctor: KeyError: 'x'\n"


@pytest.mark.parametrize(
    "arguments", [("bench", "chat", "--rounds", "2"), ("report",), ("history", "--store", "x"), ("model", "gpus"), ("tune",)]
)
def test_commands_without_etap_bench(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Who has installed etap-py alone is told which package has the command, in one sentence, whatever stands behind it."""
    program = "import sys; sys.modules['etap_bench'] = None; from etap_py.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"etap {arguments[0]}: needs etap_bench, which is not installed: pip install etap-bench ")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
