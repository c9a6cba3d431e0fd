"""The first `etap bench chat` on a machine without a GPU: it is short, says so before anything slow, and is only that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from etap_bench import work, workload
from etap_bench.commands import bench
from etap_bench.errors import Refused

from etap_py.__main__ import main

ROOT = Path(__file__).parents[2]

# Ends where PyTorch would be imported, and says so.
WITHOUT_TORCH = """
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch is imported", file=sys.stderr, flush=True)
            raise SystemExit(3)
sys.meta_path.insert(0, Finder())
from etap_py.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def without_torch(*arguments: str) -> tuple[int, list[str]]:
    """Exit status, and the lines on standard error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), str(ROOT)])}
    command = [sys.executable, "-c", WITHOUT_TORCH, "bench", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


def asked_for(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> work.Work:
    """What would be measured."""
    asked: list[work.Work] = []

    def stop(chosen: work.Work, *_: object) -> None:
        asked.append(chosen)
        raise Refused("stopped by the test")

    monkeypatch.setattr(bench, "_bench", stop)
    assert main(["bench", *arguments]) == 2
    return asked[0]


@pytest.mark.parametrize("name", workload.shipped())
def test_it_says_how_long_before_pytorch_is_imported(name: str) -> None:
    """PyTorch alone takes seconds, in which nothing was to be seen."""
    status, said = without_torch(name, "--device", "cpu")
    assert status == 3
    assert said[-1] == "torch is imported"
    assert len(said) == 2
    steps, shrink = bench.FIRST_TRY["steps"], bench.FIRST_TRY["shrink"]
    assert said[0].startswith(f"etap bench: {name} on the CPU: {steps} of ")
    assert f"divided by {shrink}, without peers: 10 to 60 seconds; --steps, --shrink and --peers ask for more" in said[0]


def test_a_shipped_workload_as_it_is_is_a_first_try(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in workload.shipped():
        chosen = asked_for(monkeypatch, name, "--device", "cpu")
        assert len(chosen.items) == bench.FIRST_TRY["steps"]
        assert chosen.workload is not None and chosen.workload.shrink == bench.FIRST_TRY["shrink"]


@pytest.mark.parametrize(
    ("arguments", "steps", "shrink"),
    [
        (["--steps", "20"], 20, 1),
        (["--shrink", "32"], 48, 32),
        (["--peers", "pytorch"], 48, 1),
        (["--set", "model.heads=8"], 48, 1),
        (["--rounds", "99"], 48, 1),
        (["--sustain", "1"], 48, 1),
        (["--model", "kimi-k2", "--tp", "8"], 48, 1),
    ],
)
def test_who_asks_for_more_gets_it(arguments: list[str], steps: int, shrink: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: a run that is asked for must not be cut down by what was not."""
    chosen = asked_for(monkeypatch, "chat", "--device", "cpu", *arguments)
    assert chosen.workload is not None
    assert (len(chosen.items), chosen.workload.shrink) == (steps, shrink)


def test_other_work_is_no_first_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace or a file of one's own is measured whole."""
    Path("mine.toml").write_text("[[requests]]\ncount = 40\nrate = 5.0\nprompt = { median = 100 }\nanswer = { median = 50 }\n")
    chosen = asked_for(monkeypatch, "mine.toml", "--device", "cpu")
    assert chosen.workload is not None
    assert (len(chosen.items), chosen.workload.shrink) == (48, 1)


def test_a_gpu_makes_no_first_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_default_device", lambda: "cuda")
    assert len(asked_for(monkeypatch, "chat").items) == 48


@pytest.mark.parametrize("output", ["gone/run.json", "folder", "/dev/full"])
@pytest.mark.parametrize("name", ["chat", "bf16-1x1K-h16", "gone.csv"])
def test_the_output_is_tried_before_anything_else(
    name: str, output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long trace was read before it was noticed."""
    Path("folder").mkdir()
    monkeypatch.setattr(work, "of_arguments", lambda *_: pytest.fail("the work was read"))
    monkeypatch.setattr(bench, "_default_device", lambda: pytest.fail("a device was looked for"))
    assert main(["bench", name, "-o", output]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"etap bench: {output} can't be written: ")
    assert said.count("\n") == 1
    assert list(Path().iterdir()) == [Path("folder")]
