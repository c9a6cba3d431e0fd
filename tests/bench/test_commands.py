"""`etap bench`, end to end on the CPU device; test_report.py has `etap report`."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from etap_bench import results, runner
from etap_bench.measurement import Measurement

from etap_py.__main__ import main

SMALL = ["agents", "--device", "cpu", "--shrink", "64", "--rounds", "2", "--peers", "pytorch"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_HOST_CACHE", 1 << 20)  # few pools: the arena is what takes time here


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run's file, which the tests copy."""
    path = tmp_path_factory.mktemp("run") / "run.json"
    assert main(["bench", *SMALL, "--steps", "6", "-o", str(path)]) == 0
    return path


def test_bench_writes_what_it_measured(measured: Path) -> None:
    read = results.read(measured)
    assert read.complete
    assert read.run.rows == [row.name for row in read.rows] == [f"step {index}" for index in range(6)]
    for index, row in enumerate(read.rows):
        assert row.wrong == {}
        assert {"etap", "pytorch", "ceiling"} <= row.measured.us.keys()
        assert row.measured.kernel.startswith("cpu_")
        assert set(row.shape.query_lens) == {4}
        assert row.shape.kv_bytes == sum(row.shape.lengths) * 1152
        assert row.command.endswith(f"--step {index}")
        assert row.step is not None and row.step.index == index
    assert max(row.shape.batch for row in read.rows) == 1  # 64 / 64
    assert read.run.software["torch"]


def test_a_row_is_measured_again_by_its_command(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = results.read(measured).rows[3]
    assert main([*row.command.split()[1:], "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert tuple(again["shape"]["lengths"]) == row.shape.lengths
    assert again["step"]["index"] == 3
    assert not Path("etap-bench-agents-cpu.json").exists()


def test_interrupted_and_resumed(capsys: pytest.CaptureFixture[str], interrupted_at: Callable[[int], list[int]]) -> None:
    """Ctrl-C in the third step: two are kept, the same command measures the others and those only."""
    begun = interrupted_at(3)
    command = ["bench", *SMALL, "--steps", "4"]
    assert main(command) == 130
    assert "interrupted; 2 of 4 steps are in etap-bench-agents-cpu.json" in capsys.readouterr().err
    kept = results.read(Path("etap-bench-agents-cpu.json")).rows
    assert main(command) == 0
    rows = results.read(Path("etap-bench-agents-cpu.json")).rows
    assert [row.name for row in rows] == ["step 0", "step 1", "step 2", "step 3"]
    assert [row.measured.us for row in rows[:2]] == [row.measured.us for row in kept]
    assert len(begun) == 5


def test_another_run_is_not_mixed_in(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of other settings in one file would be compared as if they were of one run."""
    before = measured.read_bytes()
    assert main(["bench", *SMALL, "--steps", "6", "--set", "model.heads=8", "-o", str(measured)]) == 2
    assert "holds results of another run (workload differ); choose another --output, or --fresh" in capsys.readouterr().err
    assert measured.read_bytes() == before


def test_an_input_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    """--fresh replaced the trace that it had read, and whatever else --output named; our own files may be damaged or of another version."""
    request = '{"arrival": 0, "prompt_tokens": 100, "answer_tokens": 2}'
    for name, text in (
        ("t.jsonl", request),
        ("w.toml", 'trace = "t.jsonl"'),
        ("s.toml", 'shapes = ["bf16-1x64-h16"]'),
        ("notes.md", "mine"),
    ):
        Path(name).write_text(text)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    for sources, output in (("t.jsonl", "t.jsonl"), ("w.toml", "t.jsonl"), ("w.toml", "./w.toml"), ("s.toml", "s.toml")):
        assert main(["bench", sources, "--device", "cpu", "--fresh", "-o", output]) == 2
        assert f"output is {Path(output)}, which is an input; allowed: another file" in capsys.readouterr().err
    command = ["bench", "bf16-1x64-h16", "--device", "cpu", "--rounds", "1", "--fresh", "-o"]
    assert main([*command, "notes.md"]) == 2
    assert "output is notes.md, which `etap bench` did not write; allowed with --fresh: files that it wrote" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    for text in ('{"format": "etap-bench", "version": 1}', '{\n"format":"etap-bench",\n"vers'):
        Path("old.json").write_text(text)
        assert main([*command, "old.json"]) == 0
        assert results.read(Path("old.json")).complete


def test_a_full_disk_keeps_what_was_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real, writes = Path.write_bytes, 0

    def full(path: Path, data: bytes) -> int:
        nonlocal writes
        writes += path.name.endswith(".partial")
        if writes == 3:
            real(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["bench", *SMALL, "--steps", "4", "-o", "run.json"]) == 1
    assert "etap bench: broke off: [Errno 28] No space left on device" in capsys.readouterr().err
    assert len(results.read(Path("run.json")).rows) == 2
    assert not list(Path().glob("*.partial"))


@pytest.mark.parametrize("output", ["gone/run.json", "folder", "/dev/full", "x" * 300])
def test_an_output_that_cant_be_written_is_noticed_at_once(
    output: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was noticed after the first step, which was lost, and "what was measured is kept" was said all the same. As root, a new file
    took the place of /dev/full."""
    Path("folder").mkdir()
    monkeypatch.setattr(runner, "measure", lambda *_, **__: pytest.fail("measured"))
    assert main(["bench", *SMALL, "--steps", "2", "-o", output]) == 2
    said = capsys.readouterr().err
    assert f"etap bench: {output} can't be written: " in said
    assert "kept" not in said
    assert said.count("\n") == 1
    assert Path("/dev/full").is_char_device()
    assert list(Path().iterdir()) == [Path("folder")]


@pytest.mark.parametrize("failure", [RuntimeError("CUDA error: an illegal access\nmore"), RuntimeError(), MemoryError()])
def test_what_is_kept_is_said_truly(failure: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one sentence, also for an exception that says nothing."""
    real, calls = runner.measure, 0

    def failing(*arguments: object, **options: object) -> Measurement:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise failure
        return real(*arguments, **options)

    monkeypatch.setattr(runner, "measure", failing)
    command = ["bench", *SMALL, "--steps", "3", "-o", "run.json"]
    words = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    assert main(command) == 1
    assert capsys.readouterr().err == f"etap bench: broke off: {words}; nothing was measured, and run.json is not written\n"
    assert not Path("run.json").exists()
    assert main(command) == 1
    assert capsys.readouterr().err == f"etap bench: broke off: {words}; 1 of 3 steps are in run.json, and the same command goes on\n"
    assert len(results.read(Path("run.json")).rows) == 1


def test_a_wrong_result_has_no_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """ETAP's wrong result makes the command fail, and is never shown as a speed."""
    real = runner.measure

    def wrong(*arguments: object, **options: object) -> Measurement:
        measured = real(*arguments, **options)
        measured.worst_row_error["etap"] = float("nan")
        return measured

    monkeypatch.setattr(runner, "measure", wrong)
    assert main(["bench", *SMALL, "--steps", "1", "-o", "run.json"]) == 1
    (row,) = results.read(Path("run.json")).rows
    assert "etap" not in row.measured.us
    assert row.wrong == {"etap": "a row of its result is off by nan of its norm"}
    assert main(["report", "run.json"]) == 0
    assert "ETAP did not compute this work: a row of its result is off" in Path("run.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "workload is 'nonsense'; allowed: agents, chat, long-documents"),
        ([], "the work is nothing; allowed: one workload (agents, chat, long-documents, a file or a trace), or shapes"),
        (["chat", "agents"], "the work is chat and agents; allowed: one workload"),
        (["chat", "--filter", "x"], "filter is given with the workload chat; allowed: with shapes"),
        (["bf16-1x1K-h16", "--set", "seed=1"], "setting is 'seed=1'; allowed: with a workload only"),
        (["bf16-1x1K-h16", "--filter", "q4"], "filter is 'q4', which no shape's name matches"),
        (["bf16-1x1K-h16", "--filter", "("], "filter is '('; allowed: regular expressions"),
        (["bf16-1x1K-h16-ragged"], "shape is 'bf16-1x1K-h16-ragged' with 0 lengths"),
        (["bf16-0x1K-h16"], "batch is 0; allowed: 1 to 65536"),
        (["chat", "--sweep", "heads=8"], "chat is a workload; allowed with --sweep: shapes"),
        (["--sweep", "colour=red"], "sweep has 'colour=red'; allowed: NAME=VALUES with the names batch, context"),
        (["--sweep", "heads=8,x"], "sweep has 'x' for heads; allowed: numbers like 16 and 4K"),
        (["--sweep", "batch=1..64", "heads=0"], "num_heads is 0; allowed: 1 to 128"),
        (["--sweep", "batch=1..65536", "context=1..1024K", "page_size=1..256", "heads=8,16"], "sweep has more than 4096 combinations"),
        (["bf16-1x1K-h16", "--step", "0", "--device", "cpu"], "step is 0; allowed: with a workload only (--filter chooses shapes)"),
        (["chat", "--step", "0", "-o", "x.json"], "output is given with step, which writes no file; allowed: one of them"),
        (["chat", "--step", "0", "--fresh"], "fresh is given with step, which writes no file"),
        (["chat", "--list", "-o", "x.json"], "output is given with list, which writes no file; allowed: one of them"),
        (
            ["bf16-1x1K-h16", "--device", "cpu", "--sustain-rows", "1"],
            "sustain_rows is 1 where nothing is sustained; allowed: with --sustain",
        ),
        (["gone.csv"], "etap bench: gone.csv can't be read: No such file or directory\n"),
        (["gone.toml"], "etap bench: gone.toml can't be read: No such file or directory\n"),
        (["chat", "--peers", "flashmla,best"], "peer is 'best'; allowed: flashmla, "),
        (["chat", "--device", "tpu"], "device is 'tpu'; allowed: cpu, cuda"),
        (["chat", "--device", "cuda:99"], "device is 'cuda:99', which can't be used: "),
        (["chat", "--device", "cpu", "--step", "48"], "step is 48; allowed: 0 to 47"),
        (["chat", "--set", "model.heads=0"], "Expected `int` >= 1"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, no traceback."""
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


WRONG_OPTIONS = [
    ("bench", "chat", "--sustain", "-1"),
    ("bench", "chat", "--warm-up", "-1"),
    ("bench", "chat", "--time-scale", "0"),
    ("bench", "chat", "--limit", "0"),
    ("bench", "chat", "--rounds", "0"),
    ("bench", "chat", "--steps", "many"),
    ("bench", "chat", "--shrink", "1.5"),
    ("bench", "chat", "--step", "-1"),
    ("report", "run.json", "--utilisation", "2"),
    ("report", "run.json", "--utilisation", "0"),
    ("report", "run.json", "--pue", "0.5"),
    ("report", "run.json", "--pue", "nan"),
    ("report", "run.json", "--years", "0"),
    ("report", "run.json", "--rent", "-1"),
    ("report", "run.json", "--rent", "much"),
    ("report", "run.json", "--card-price", "inf"),
    ("report", "run.json", "--power-price", "-0.1"),
    ("report", "run.json", "--rest-ms", "-1"),
    ("tune", "bf16-1x1K-h16", "--rounds", "x"),
    ("model", "crossover", "--gpu", "h20", "--batch", "0"),
    ("doctor", "--require", "rocm"),
    ("doctor", "--colour"),
]


@pytest.mark.parametrize("arguments", WRONG_OPTIONS, ids=" ".join)
def test_wrong_options(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Impossible values were taken, or blamed on a function of ours ("invalid _positive value"): one sentence that names the option."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert arguments[-2] in said.err or arguments[-1] in said.err
    assert "allowed" in said.err or "invalid choice" in said.err or "unrecognized" in said.err


def test_a_trace_is_introduced(capsys: pytest.CaptureFixture[str]) -> None:
    """What was taken for granted of a trace, and what was left out, is said; the list needs no library."""
    Path("t.csv").write_text("Timestamp,Model,Request tokens,Response tokens\n5,a,472,18\n45,b,0,0\n")
    assert main(["bench", "t.csv", "--list", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == "etap bench: BurstGPT, 1 request in 0.0 s; left out: 1 without prompt tokens\n"
    assert json.loads(said.out)[0]["shape"]["lengths"] == [473]
    assert main(["bench", "t.csv", "--device", "cpu", "--peers", "none", "--rounds", "1", "--steps", "1", "-o", "run.json"]) == 0
    assert "left out: 1 without prompt tokens\n" in capsys.readouterr().err
    assert results.read(Path("run.json")).run.workload_digest == hashlib.sha256(Path("t.csv").read_bytes()).hexdigest()


def test_the_note_of_a_prediction_is_a_line_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    """It was printed one letter a line."""
    assert main(["model", "predict", "bf16-16x4K-h16", "--gpu", "h100"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if ": " in line]
    assert [note.partition(":")[0] for note in notes] == ["etap on h100-sxm", "best-peer on h100-sxm"]


def test_a_calibration_that_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    """It was read as results then, whose format is no number, and its own fault was not said."""
    Path("c.json").write_text('{"format": 1, "gpu": "h100-sxm", "dev')
    assert main(["model", "calibrate", "c.json"]) == 2
    assert capsys.readouterr().err == "etap model: c.json is no calibration file: Input data was truncated\n"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "chat", "--device", "cpu", "--list", "--json", "--steps", "5"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 5
