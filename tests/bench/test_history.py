"""Runs under version control (`etap history`), and runs beside each other (etap_bench.compare)."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from etap_bench import compare, history, results
from etap_bench.errors import Refused
from etap_bench.measurement import Measurement, Times
from etap_bench.results import Device, Results, Row, Run
from etap_bench.shape import Shape
from msgspec.structs import replace

from etap_py.__main__ import main

NAMES = ("bf16-1x4K-h16", "bf16-2x4K-h16", "bf16-3x4K-h16", "e4m3-1x4K-h16")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_of(
    times: dict[str, float], card: str = "NVIDIA X1", ceiling: float | None = 10.0, spread: float | None = 0.0, **others: Any
) -> Results:
    """Measured times of ETAP by shape, with a ceiling for all and a confidence of +- `spread`; None: not known."""
    rows = []
    for name, us in times.items():
        shape = Shape.parse(name)
        measured = Measurement(times={"etap": Times(us, us, us, *((us * (1 - spread), us * (1 + spread)) if spread is not None else ()))})
        if ceiling is not None:
            measured.times["ceiling"] = Times(ceiling, low=ceiling, high=ceiling)
        rows.append(Row(name=name, shape=shape, distinct_kv_bytes=shape.kv_bytes, measured=measured))
    device = Device(kind="cuda", name=card, num_sms=132, cache_bytes=1)
    run = Run(rows=list(times), device=device, peers=[], warm_up=1, rounds=9, sustain=0.0, sustained_rows=0, software={}, **others)
    return Results(run=run, command="etap bench x", started="2026-01-02T03:04:05+00:00", rows=rows)


def written(run: Results, name: str = "run.json") -> str:
    results.write(Path(name), run)
    return name


def test_stored_runs_come_back(seed: int) -> None:
    """What was stored is what was measured, one line a shape, and earlier runs stay as they were, also from the tenth and the thousandth
    on."""
    rng = random.Random(seed)
    folder = Path("store/nvidia-x1")
    runs = []
    for count in range(1, 12):
        runs.append(run_of({name: round(rng.uniform(11, 99), 1) for name in NAMES}, commit=f"{count:07x}"))
        path = history.add(runs[-1], Path("store"))
        assert path == folder / f"{count:03}-{count:07x}.json"
        assert len(re.findall(r'^\{"name":', path.read_text(), flags=re.MULTILINE)) == len(NAMES)
    path.rename(folder / "1234-later.json")
    assert history.add(runs[0], Path("store")).name == "1235-0000001.json"
    assert history.runs(folder) == [*runs, runs[0]]
    assert history.cards(Path("store")) == [folder]


def test_what_can_not_be_stored(capsys: pytest.CaptureFixture[str]) -> None:
    for run in (run_of({}), run_of({NAMES[0]: 20.0}, workload=_workload())):
        assert main(["history", "store", written(run)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    Path("bad.json").write_text("{}")
    assert main(["history", "compare", "bad.json"]) == 2
    assert "allowed: a file that `etap bench` wrote" in capsys.readouterr().err
    assert main(["history", "compare", "missing.json"]) == 2
    assert "missing.json can't be read" in capsys.readouterr().err
    assert not Path("benchmarks").exists()


def _workload() -> Any:
    from etap_bench import workload

    return workload.load("chat")


def test_comparison_is_of_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    """The fraction of the ceiling decides, with the last run of the same card; another card's runs are not looked at."""
    a, b, c, new = NAMES
    assert main(["history", "store", written(run_of({a: 20.0, b: 20.0, c: 20.0}))]) == 0
    assert main(["history", "store", written(run_of({a: 99.0}, card="NVIDIA X2"))]) == 0
    capsys.readouterr()
    assert main(["history", "compare", written(run_of({a: 25.0, b: 20.1, c: 16.0, new: 1.0}))]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 shapes moved beyond the noise (3 % or the medians' uncertainty, whichever is more) since" in said
    assert re.search(rf"{a} .*\u221220\xa0%", said)
    assert re.search(rf"{c} .*\+25\xa0%", said)
    assert b not in said and new not in said
    assert main(["history", "compare", written(run_of({a: 1.0}, card="NVIDIA X3"))]) == 0
    assert "NVIDIA X3: no stored run to compare 1 shapes with" in capsys.readouterr().out


def test_page() -> None:
    """A figure for each card, within the page; CPUs are told apart by their processor."""
    for card in ("NVIDIA X1", "cpu (avx2)"):
        run = run_of({NAMES[0]: 20.0, NAMES[1]: 30.0}, card=card)
        device = replace(run.run.device, processor="Some CPU" if card.startswith("cpu") else "")
        history.add(replace(run, run=replace(run.run, device=device)), Path("benchmarks"))
    assert main(["history", "page", "trends.html"]) == 0
    page = Path("trends.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "<h2>cpu (avx2) Some CPU</h2>" in page
    assert main(["history", "page", "trends.html"]) == 0


def test_other_shapes_are_stored_too(capsys: pytest.CaptureFixture[str]) -> None:
    """A run without a shape of the last one was refused: it is the first of its shapes."""
    assert main(["history", "store", written(run_of({NAMES[0]: 20.0}))]) == 0
    capsys.readouterr()
    assert main(["history", "compare", written(run_of({NAMES[1]: 20.0}, commit="b"))]) == 2
    assert "no shape in common" in capsys.readouterr().err
    assert main(["history", "store", "run.json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines() == [
        "the runs have no shape in common that ETAP computed; the first has 1, the second 1",
        "stored in benchmarks/nvidia-x1/002-b.json",
    ]
    assert Path("benchmarks/nvidia-x1/002-b.json").read_bytes() == Path("run.json").read_bytes()


@pytest.mark.parametrize("us", ["0.0", "-20.0"])
@pytest.mark.parametrize("command", ["report", "history compare", "history store"])
def test_times_are_above_0(command: str, us: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A median of 0 in a file ended in ZeroDivisionError, a negative one in StatisticsError."""
    path = Path(written(run_of({NAMES[0]: 20.0})))
    path.write_text(path.read_text().replace('"p50":20.0', f'"p50":{us}'))
    assert main([*command.split(), "run.json"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"etap {command.split()[0]}: run.json is damaged: Expected `float` > 0.0") and said.count("\n") == 1


def test_a_page_replaces_no_results(capsys: pytest.CaptureFixture[str]) -> None:
    """`etap history page run.json` wrote the page over the measurements."""
    before = Path(written(run_of({NAMES[0]: 20.0}))).read_bytes()
    assert main(["history", "page", "run.json"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("etap history: run.json can't be written: it is there and is no HTML page") and said.count("\n") == 1
    assert Path("run.json").read_bytes() == before


def test_what_moved_beyond_the_noise(seed: int) -> None:
    """Against arithmetic by hand: on one card the fraction decides, on two the time; wide confidence hides what it could explain."""
    rng = random.Random(seed)
    for _ in range(100):
        before, after, ceiling, spread = rng.uniform(20, 40), rng.uniform(20, 40), rng.uniform(5, 15), rng.choice([0.0, 0.02, 0.2])
        old, new = run_of({NAMES[0]: before}), run_of({NAMES[0]: after}, ceiling=ceiling, spread=spread)
        (change,) = compare.changes(old, new)
        assert change.speedup == pytest.approx(before / after)
        assert change.fraction == pytest.approx(ceiling / after / (10 / before))
        distance = max(change.fraction, 1 / change.fraction) - 1
        expected = "" if distance <= max(0.03, spread) + 1e-12 else "faster" if change.fraction > 1 else "slower"
        assert change.moved == expected
        (other,) = compare.changes(old, run_of({NAMES[0]: after}, card="NVIDIA X2", ceiling=ceiling))
        assert other.moved == ("" if max(before / after, after / before) - 1 <= 0.03 else "faster" if before > after else "slower")


def test_slower_counts_as_much_as_faster() -> None:
    """A tenfold slowdown was "as before" where both medians were uncertain by 50 %: a ratio of 0.1 is never further than 1 from 1."""
    fast, slow = (run_of({NAMES[0]: us}, spread=0.5) for us in (20.0, 200.0))
    assert [compare.changes(*pair)[0].moved for pair in ((fast, slow), (slow, fast), (fast, fast))] == ["slower", "faster", ""]


def test_medians_of_an_earlier_script() -> None:
    """The stored runs that hold nothing but medians could not be compared: what exceeds the noise of that script's runs has moved."""
    a, b, c = NAMES[:3]
    old, new = run_of({a: 20.0, b: 20.0, c: 20.0}), run_of({a: 40.0, b: 20.1, c: 19.0}, commit="b")
    for row in (*old.rows, *new.rows):
        row.measured.times = {name: Times(times.p50) for name, times in row.measured.times.items()}
    assert [change.moved for change in compare.changes(old, new)] == ["slower", "", "faster"]


def test_unknown_uncertainty_is_not_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Medians of one round were compared as if they were exact."""
    a, b = NAMES[:2]
    old, new = run_of({a: 20.0, b: 20.0}), run_of({a: 40.0, b: 20.1}, spread=None, commit="b")
    for pair in ((old, new), (new, old)):
        assert [change.moved for change in compare.changes(*pair)] == ["unknown", ""]
    assert "0 faster and 0 slower beyond the noise, 1 as before, 1 unknown: fewer than six rounds" in compare.said([old, new], ["", "b"])[0]
    assert json.loads(json.dumps(compare.as_dicts([old, new], ["", "b"]), allow_nan=False))[0]["rows"][0]["noise"] is None
    assert main(["history", "store", written(old)]) == 0
    assert main(["history", "compare", written(new)]) == 0
    said = capsys.readouterr().out
    assert "0 of 2 shapes moved" in said and "and 1 may have: fewer than six rounds" in said
    assert re.search(rf"{a} .*\u221250\xa0%", said) and f"{b} " not in said


def on(run: Results, **device: Any) -> Results:
    """The same times on another device."""
    return replace(run, run=replace(run.run, device=replace(run.run.device, **device)))


def test_a_processor_is_a_card() -> None:
    """Two CPUs with the same instructions were one card, and a processor that is four times as fast was "as before"."""
    slow, fast = on(run_of({NAMES[0]: 40.0}), processor="Old CPU"), on(run_of({NAMES[0]: 10.0}, ceiling=2.5), processor="New CPU")
    (change,) = compare.changes(slow, fast)
    assert (change.same_card, change.ratio, change.moved) == (False, 4.0, "faster")
    assert [name.partition(",")[0] for name in compare.labels([slow, fast], [Path(), Path()])] == ["NVIDIA X1 Old CPU", "NVIDIA X1 New CPU"]


def test_time_is_judged_by_its_own_noise() -> None:
    """Between cards the time decides: a ceiling whose median nobody can trust hid any difference."""
    runs = [on(run_of({NAMES[0]: us}, spread=0.01), name=card) for us, card in ((20.0, "X1"), (10.0, "X2"), (10.0, "X1"))]
    for run in runs:
        run.rows[0].measured.times["ceiling"] = Times(10.0, low=1.0, high=19.0)
    assert [compare.changes(runs[0], run)[0].moved for run in runs[1:]] == ["faster", ""]


@pytest.mark.parametrize("other", [run_of({NAMES[1]: 20.0}), run_of({}), run_of({NAMES[0]: 20.0}, workload=_workload())])
def test_nothing_to_compare(other: Results) -> None:
    """Two runs of different work are refused, not shown as an empty table."""
    with pytest.raises(Refused, match="no shape in common|different work"):
        compare.changes(run_of({NAMES[0]: 20.0}), other)


def test_three_runs_beside_each_other() -> None:
    """A shape that a run lacks has empty cells; one that only a later run has is left out."""
    runs = [
        run_of({NAMES[0]: 20.0, NAMES[1]: 30.0}),
        run_of({NAMES[1]: 15.0}, commit="b"),
        run_of({NAMES[0]: 20.1, NAMES[2]: 1.0}, commit="c"),
    ]
    labels = compare.labels(runs, [Path()] * 3)
    head, rows = compare.head(labels), list(compare.rows(runs))
    assert [len(row) for row in rows] == [len(head)] * 2
    assert rows[0][0] == NAMES[0] and rows[0][2:6] == [""] * 4 and rows[0][6:8] == ["20.1", "0.995"] and rows[0][9] == ""
    assert rows[1][2:6] == ["15.0", "2.00", "0.333 → 0.667", "faster"]
    said = compare.said(runs, labels)
    assert "b, 2026-01-02: 2.00 times as fast over 1" in said[0] and "1 faster and 0 slower" in said[0]


def test_files_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of one tree, day and card had the same head three times."""
    for number, folder in enumerate(("x", "y"), start=1):
        Path(folder).mkdir()
        written(run_of({NAMES[0]: 20.0}), f"q{number}.json")
        written(run_of({NAMES[0]: 20.0}), f"{folder}/q.json")
    source = "etap of an unknown version, 2026-01-02"
    for files, names in ((["q1.json", "q2.json"], ["q1", "q2"]), (["x/q.json", "y/q.json"], ["x/q.json", "y/q.json"])):
        first, second = (f"{name}: {source}" for name in names)
        assert main(["report", *files]) == 0
        said = capsys.readouterr().out
        assert f"µs: {first}  µs: {second}" in said and f"\n{second}: 1." in said
        for how in ("csv", "markdown"):
            assert main(["report", *files, "--table", how]) == 0
            head = capsys.readouterr().out.splitlines()[0]
            assert f"µs: {first}" in head and f"µs: {second}" in head
        assert main(["report", *files, "--json"]) == 0
        (pair,) = json.loads(capsys.readouterr().out)
        assert (pair["before"], pair["after"]) == (first, second)


def test_what_differs_in_the_work() -> None:
    """ "of different work, tr and tr" named no difference; a trace that lies elsewhere is the same."""
    from etap_bench import workload

    def of(digest: str = "x", **fields: Any) -> Results:
        made = replace(workload.load("chat"), name="tr", trace="a/tr.jsonl", requests=[])
        return run_of({NAMES[0]: 20.0}, workload=replace(made, **fields), workload_digest=digest)

    assert len(compare.changes(of(), of(trace="b/other.jsonl", name="other", description="copied"))) == 1
    for other, words in (
        (of(steps=3, model=replace(of().run.workload.model, heads=8)), "steps is 48 and 3, model.heads is 16 and 8;"),  # type: ignore[union-attr]
        (of("y", trace="b/tr.jsonl"), "the traces a/tr.jsonl and b/tr.jsonl have other contents;"),
        (of(requests=workload.load("chat").requests), "requests differ;"),
        (run_of({NAMES[0]: 20.0}), "steps of tr and shapes;"),
    ):
        with pytest.raises(Refused) as refused:
            compare.changes(of(), other)
        assert str(refused.value) == f"the runs are of different work: {words} allowed: the same workload, or shapes"


def test_reports_of_several_files(capsys: pytest.CaptureFixture[str]) -> None:
    """For people, as CSV, as Markdown and as JSON; what belongs to a page is refused, and nothing is written."""
    names = [
        written(run_of({NAMES[0]: 20.0, NAMES[1]: 30.0}, commit="a"), "a.json"),
        written(run_of({NAMES[0]: 10.0, NAMES[1]: 30.3}, commit="b"), "b.json"),
    ]
    assert main(["report", *names]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"{NAMES[0]} +20.0 +10.0 +2.00 .* faster", said)
    assert "1 faster and 0 slower beyond the noise, 1 as before" in said
    assert main(["report", *names, "--table", "csv"]) == 0
    lines = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert [line[0] for line in lines] == ["shape", *NAMES[:2]]
    assert lines[2][1:4] == ["30", "30.3", "0.99009901"] and lines[2][-1] == ""
    assert main(["report", *names, "--table", "markdown"]) == 0
    assert f"| {NAMES[0]} | 20.0 | 10.0 | 2.00 |" in capsys.readouterr().out
    assert main(["report", *names, "--json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)
    assert [row["moved"] for row in pair["rows"]] == ["faster", ""] and pair["rows"][0]["speedup"] == 2.0
    for option in (["-o", "x.html"], ["--pue", "1.2"], ["--rest-ms", "3"]):
        assert main(["report", *names, *option]) == 2
        assert f"{option[0].replace('-o', '--output')} is given with 2 files" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["a.json", "b.json"]


def test_people_read_three_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """ "128229.5" µs and "10.000 times as fast" said more than a median holds; CSV is for machines, which round by themselves."""
    names = [written(run_of({NAMES[0]: us}), f"{name}.json") for us, name in ((128229.51, "a"), (12822.951, "b"))]
    for how in ([], ["--table", "markdown"]):
        assert main(["report", *names, *how]) == 0
        said = capsys.readouterr().out
        assert "128,000" in said and "12,800" in said and "10.0" in said
        assert "128229" not in said and "10.00" not in said
    assert main(["report", *names, "--table", "csv"]) == 0
    assert f"{NAMES[0]},128229.51,12822.951,10," in capsys.readouterr().out
    assert main(["history", "store", names[0]]) == main(["history", "compare", names[1]]) == 0
    assert re.search(rf"{NAMES[0]} .* 10.0 times +128,000  12,800", capsys.readouterr().out)


def test_a_table_of_one_file(capsys: pytest.CaptureFixture[str]) -> None:
    written(run_of({NAMES[0]: 20.0, NAMES[1]: 30.0}), "a.json")
    assert main(["report", "a.json", "--table", "csv"]) == 0
    head, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert head[:3] == ["shape", "ceiling µs", "ETAP µs"] and [row[:3] for row in rows] == [
        [NAMES[0], "10.0", "20.0"],
        [NAMES[1], "10.0", "30.0"],
    ]
