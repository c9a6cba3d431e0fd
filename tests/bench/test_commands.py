"""`etap bench` and `etap report`, end to end on the CPU device."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from etap_bench import results, runner
from etap_bench.measurement import Measurement
from etap_bench.report import limits, summary
from etap_bench.report.summary import Prices
from msgspec.structs import replace

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


def copy(measured: Path, **changes: object) -> results.Results:
    """What the file says, after changes to the first row's measurement."""
    read = results.read(measured)
    for name, value in changes.items():
        setattr(read.rows[0].measured, name, value)
    return read


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


def test_interrupted_and_resumed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the third step: two are kept, the same command measures the others and those only."""
    real, calls = runner.measure, 0

    def interrupted(*arguments: object, **options: object) -> Measurement:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(runner, "measure", interrupted)
    command = ["bench", *SMALL, "--steps", "4"]
    assert main(command) == 130
    assert "interrupted; 2 of 4 steps are in etap-bench-agents-cpu.json" in capsys.readouterr().err
    kept = results.read(Path("etap-bench-agents-cpu.json")).rows
    assert main(command) == 0
    rows = results.read(Path("etap-bench-agents-cpu.json")).rows
    assert [row.name for row in rows] == ["step 0", "step 1", "step 2", "step 3"]
    assert [row.measured.us for row in rows[:2]] == [row.measured.us for row in kept]
    assert calls == 5


def test_another_run_is_not_mixed_in(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of other settings in one file would be compared as if they were of one run."""
    before = measured.read_bytes()
    assert main(["bench", *SMALL, "--steps", "6", "--set", "model.heads=8", "-o", str(measured)]) == 2
    assert "holds results of another run (workload differ); choose another --output, or --fresh" in capsys.readouterr().err
    assert measured.read_bytes() == before


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
    assert "ETAP did not compute this workload: a row of its result is off" in Path("run.html").read_text()


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
        (["bf16-1x1K-h16", "--step", "0", "--device", "cpu"], "step is 0; allowed: of a workload"),
        (["gone.csv"], "No such file or directory: 'gone.csv'"),
        (["chat", "--peers", "flashmla,best"], "peer is 'best'; allowed: flashmla, "),
        (["chat", "--device", "tpu"], "device is 'tpu'; allowed: cpu, cuda"),
        (["chat", "--device", "cuda:99"], "device is 'cuda:99', which can't be used: "),
        (["chat", "--device", "cpu", "--step", "48"], "step is 48; allowed: of a workload, 0 to 47"),
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


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "chat", "--device", "cpu", "--list", "--json", "--steps", "5"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 5


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str | None] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "img":
            self.images.append(given)
        self.links += [given[name] for name in ("href", "src") if name in given]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_page_and_pngs(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page refers to nothing outside itself, every image has words for those who can't see it, and the PNGs are PNGs. A folder
    that is not there yet is made."""
    assert main(["report", str(measured), "-o", "pages/page.html", "--rent", "2.5", "--card-price", "30000", "--power-price", "0.3"]) == 0
    html = Path("pages/page.html").read_text()
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert len(page.images) == 5  # energy is not measured on the CPU
    assert all(image["alt"] for image in page.images)
    assert all(str(link).startswith("data:image/svg+xml;base64,") for link in page.links)
    assert all(b"</svg>" in base64.b64decode(str(link).split(",")[1]) for link in page.links)
    assert "http" not in re.sub(r"data:[^\"]*", "", html)
    paths = capsys.readouterr().out.split()
    assert paths[0] == "pages/page.html"
    assert {Path(path).read_bytes()[:4] for path in paths[1:]} == {b"\x89PNG"}
    assert "Energy was not measured" in html
    assert "Lengths, batch and cache were divided by 64." in html
    assert "agents --set steps=6" in html


def test_report_needs_no_pytorch(measured: Path) -> None:
    """A file that a GPU machine wrote is read on a laptop that has the extra `bench` only."""
    program = "import sys; sys.modules['torch'] = None; from etap_py.__main__ import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", program, "report", str(measured), "-o", "page.html"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path("page.html").stat().st_size > 0


def test_report_as_json(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(measured), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in said["contenders"]] == ["etap", "pytorch"]
    assert said["contenders"][0]["steps"] == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace('"version": 1\n', '"version": 7\n'), "is of version 7; allowed: 1"),
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "{}", "has the format 'unknown'; allowed: a file that `etap bench` wrote"),
        (lambda text: text.replace('"lengths"', '"widths"'), "is damaged: Object missing required field `lengths`"),
    ],
)
def test_report_of_a_bad_file(change: object, words: str, measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(change)
    Path("bad.json").write_text(change(measured.read_text()))
    assert main(["report", "bad.json"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_report_says_where_etap_does_not_help(measured: Path) -> None:
    """A step in which a peer is faster must be named."""
    read = copy(measured, us={"etap": 300.0, "pytorch": 100.0, "ceiling": 90.0})
    said = " ".join(summary.verdict(read, summary.contenders(read, Prices())))
    assert re.search(r"ETAP does not help in [1-6] of 6 steps", said)
    assert "where pytorch is 3.00 times as fast" in said


def test_the_reference_is_no_peer(measured: Path) -> None:
    """A first report on a CPU said "59.54 times as fast as pytorch, the best peer that ran"."""
    read = copy(measured, us={"etap": 2.0, "pytorch": 120.0, "ceiling": 1.9})
    read.rows = read.rows[:1]
    said = " ".join(summary.verdict(read, summary.contenders(read, Prices())))
    assert "No peer took part" in said
    assert "took 60 times as long as ETAP" in said
    assert "best peer" not in said and "In no step was a peer faster" not in said


def test_the_best_peer_is_named(measured: Path) -> None:
    errors = {"etap": 0.0, "fa3": 0.0, "pytorch": 0.0}
    read = copy(measured, us={"etap": 100.0, "fa3": 120.0, "pytorch": 110.0, "ceiling": 90.0}, worst_row_error=errors)
    read.rows, read.run = read.rows[:1], replace(read.run, peers=["fa3", "pytorch"])
    said = " ".join(summary.verdict(read, summary.contenders(read, Prices())))
    assert "1.20 times as fast as fa3, the best peer that ran here" in said
    assert read.rows[0].measured.best_peer == "fa3"


def test_energy_and_prices(measured: Path) -> None:
    """Against arithmetic by hand: 61 layers of 100 mJ and 1000 µs a call at one sequence of four draft-verified tokens (3.1 kept)."""
    read = copy(measured, us={"etap": 1000.0}, millijoules={"etap": 100.0}, plan_us=0.0)
    read.rows = read.rows[:1]
    (etap,) = summary.contenders(
        read, Prices(card_price=26280.0, years=3, utilisation=1.0, power_price=0.5, pue=2.0, rent=2.0, rest_ms=39.0)
    )
    tokens = read.rows[0].new_tokens
    assert tokens == pytest.approx(1 + 3 * 0.7)
    assert etap.step_ms == pytest.approx((100.0,) * 4)
    assert etap.tokens_per_second == pytest.approx(tokens / 0.1)
    assert etap.watts == pytest.approx(100.0)
    assert etap.joules == pytest.approx(6.1 / tokens * 1e6)
    hours = 1e6 / (tokens / 0.1) / 3600
    assert etap.rented == pytest.approx(2.0 * hours)
    assert etap.owned == pytest.approx((1.0 + 0.1 * 2.0 * 0.5) * hours)


def test_limits_come_from_the_model(measured: Path) -> None:
    """On a described card the words of `etap model`, for an FP8 cache the FP8 kernel's; on another one "not known", never a guess."""
    read = results.read(measured)
    assert set(limits.limits(read).of_row) == {limits.UNKNOWN}
    read.rows[0].lengths, read.rows[0].query_lens = [65536] * 16, [1] * 16

    def on(name: str, kv_format: str = "bf16") -> limits.Limits:
        workload = replace(read.run.workload, model=replace(read.run.workload.model, kv_format=kv_format))
        device = results.Device(kind="cuda", name=name, num_sms=132, cache_bytes=50 << 20)
        return limits.limits(replace(read, run=replace(read.run, workload=workload, device=device)))

    known = on("NVIDIA H100 80GB HBM3")
    assert known.gpu is not None
    assert set(known.of_row) == {"HBM", "fixed cost"}
    assert on("NVIDIA H100 80GB HBM3", "e4m3").of_row[0] == "conversion"
    assert set(on("NVIDIA X1").of_row) == {limits.UNKNOWN}
