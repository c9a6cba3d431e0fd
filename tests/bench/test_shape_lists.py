"""Shapes by name, by list, from files and swept: what `etap bench` makes of them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from etap_bench import results, runner, shape_lists, work
from etap_bench.errors import Refused
from etap_bench.measurement import Times
from etap_bench.report.text import significant
from etap_bench.shape import Shape
from etap_bench.table import COLUMNS, cells

from etap_py.__main__ import main


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_HOST_CACHE", 1 << 18)  # few pools: the arena is what takes time here


def test_shipped_lists() -> None:
    """Every list can be read, and names each shape once; the quick ones are of the whole table."""
    assert shape_lists.shipped() == ["cpu", "gpu", "more", "published", "quick", "sparse"]
    names = {name: [shape.name for shape in shape_lists.load(name)] for name in shape_lists.shipped()}
    assert all(len(set(listed)) == len(listed) for listed in names.values())
    assert len(names["published"]) == 14
    assert not set(names["published"]) & set(names["more"])
    assert set(names["quick"]) <= set(names["published"] + names["more"])
    assert len(work.of_shapes(["published", "more", "quick"]).items) == len(names["published"] + names["more"])


def test_names_of_lists_of_slots(seed: int) -> None:
    """A name says all of a shape of sparse attention, and libetap is asked for lists as wide as it says, whatever counts of them."""
    rng = random.Random(seed)
    for _ in range(50):
        context, lengths = rng.choice([1, 128, 2048, 2051, 65536]), ()
        if rng.random() < 0.5:
            lengths = (context, rng.randint(0, context))
        given = {"heads": rng.randint(1, 128), "kv_format": rng.choice(["bf16", "e4m3_656"]), "page_size": rng.choice([1, 64])}
        shape = Shape(lengths or (context,) * rng.randint(1, 9), context=context, sparse=True, **given)
        again = Shape.parse(shape.name, lengths if shape.name.endswith("-ragged") else ())
        assert again == shape and "-sparse" in shape.name
        problem = again.problem("cpu")
        assert (problem.topk, problem.batch, problem.page_size) == (context, shape.batch, shape.page_size)
    assert Shape.parse("bf16-3x2K-h16").problem("cpu").topk == 0
    for name in ("bf16-3x2K-h16-q2-sparse", "bf16-1x128K-h16-sparse"):
        with pytest.raises(ValueError, match="allowed with lists: 1, and widths from 1 to 65536"):
            Shape.parse(name)


def test_a_sweep_is_every_combination(seed: int) -> None:
    rng = random.Random(seed)
    heads = rng.sample(range(1, 129), 3)
    most = 2 ** rng.randint(0, 8)
    shapes = shape_lists.sweep([f"heads={','.join(map(str, heads))}", f"batch=1..{most}", "context=2K..8K", "kv_format=bf16,e4m3"])
    batches = [2**i for i in range(most.bit_length())]
    expected = {
        Shape.equal(batch, context, head, kv_format=kv_format).name
        for batch, context, head, kv_format in itertools.product(batches, (2048, 4096, 8192), heads, ("bf16", "e4m3"))
    }
    assert {shape.name for shape in shapes} == expected
    assert len(shapes) == len(expected)


def test_a_file_of_shapes() -> None:
    Path("mine.toml").write_text(
        'shapes = ["bf16-2x100-h8-ragged", "e4m3-1x64-h16-q2"]\n[lengths]\n"bf16-2x100-h8-ragged" = [100, 0]\n', encoding="utf-8"
    )
    made = work.of_arguments(["mine.toml", "bf16-1x64-h16"], [], [], "", 0)
    assert [item.shape.lengths for item in made.items] == [(100, 0), (64,), (64,)]
    assert made.groups == {"mine": ["bf16-2x100-h8-ragged", "e4m3-1x64-h16-q2"]}
    assert [item.shape.num_sms for item in work.of_shapes(["mine.toml"], num_sms=3).items] == [3, 3]
    assert [item.name for item in work.of_shapes(["mine.toml"], pattern="^e4m3").items] == ["e4m3-1x64-h16-q2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shapes = 3", "mine.toml: Expected `array`, got `int` - at `$.shapes`"),
        ("shapes = []", "mine.toml: shapes is empty; allowed: one or more"),
        (
            'shapes = ["bf16-1x9-h8"]\nlengths."bf16-2x9-h8-ragged" = [9, 5]',
            "lengths has 'bf16-2x9-h8-ragged'; allowed: the names in shapes",
        ),
        ("shapes = []\ncolour = 1", "mine.toml: Object contains unknown field `colour`"),
        ('shapes = ["bf16-2x100-h8-ragged"]', "mine.toml: shape is 'bf16-2x100-h8-ragged' with 0 lengths"),
        ('shapes = ["bf16-2x9-h8-ragged"]\nlengths."bf16-2x9-h8-ragged" = [9]', "with 1 lengths; allowed: 2, its batch"),
        ('shapes = ["bf16-2x9-h8-ragged"]\nlengths."bf16-2x9-h8-ragged" = [0, 0]', "lengths has 2 zeros only; allowed: one entry or more"),
        ('shapes = ["bf16-2x9-h8-ragged"]\nlengths."bf16-2x9-h8-ragged" = [9, 10]', "lengths has entries from 9 to 10; allowed: 0 to 9"),
    ],
)
def test_a_bad_file_of_shapes(text: str, words: str) -> None:
    Path("mine.toml").write_text(text)
    with pytest.raises(Refused) as refused:
        work.of_arguments(["mine.toml"], [], [], "", 0)
    assert words in str(refused.value)


def test_one_name_with_two_lengths() -> None:
    """Of two files with the same name and other lengths, the first's shape was dropped in silence; the same shape twice is one."""
    for name, lengths in (("a", "9, 5"), ("b", "9, 5"), ("c", "9, 6")):
        Path(f"{name}.toml").write_text(f'shapes = ["bf16-2x9-h8-ragged"]\nlengths."bf16-2x9-h8-ragged" = [{lengths}]')
    assert len(work.of_shapes(["a.toml", "b.toml"]).items) == 1
    with pytest.raises(Refused, match="shape bf16-2x9-h8-ragged is given twice with different lengths; allowed: once"):
        work.of_shapes(["a.toml", "c.toml"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["heads=8", "heads=16"], "sweep has heads twice; allowed: once, with commas"),
        (["context=3K..5K"], "sweep has '3K..5K' for context; allowed: ranges that double"),
        (["batch=8..4"], "sweep has '8..4' for batch; allowed: ranges that double"),
        (["batch=0..4"], "sweep has '0..4' for batch; allowed: ranges that double"),
    ],
)
def test_a_sweep_drops_no_value(settings: list[str], words: str) -> None:
    """The first heads, the end of a range, and a range that falls were left out in silence."""
    with pytest.raises(Refused) as refused:
        shape_lists.sweep(settings)
    assert words in str(refused.value)


def bench(*arguments: str) -> int:
    return main(["bench", *arguments, "--device", "cpu", "--rounds", "6", "--peers", "none"])


def test_shapes_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """A table for people, no file unless one is named; --json is what a file would hold, and each row's command gives that row."""
    assert bench("bf16-1x64-h16", "--sweep", "heads=8", "batch=1,2", "context=128") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("bf16-1x64-h16", "bf16-1x128-h8", "bf16-2x128-h8"))
    assert "sweep: geometric mean" in said and "No peer took part." in said
    assert list(Path().iterdir()) == []
    assert bench("e4m3-2x128-h8-q2", "bf16-1x64-h16", "--sustain", "0.05", "--json") == 0
    read = json.loads(capsys.readouterr().out)
    assert (read["format"], read["version"]) == ("etap-bench", results.VERSION)
    assert [row["name"] for row in read["rows"]] == read["run"]["rows"] == ["e4m3-2x128-h8-q2", "bf16-1x64-h16"]
    assert read["run"]["device"]["processor"]
    for row in read["rows"]:
        times = row["measured"]["times"]["etap"]
        assert times["low"] <= times["p50"] <= times["high"] and times["p50"] <= times["p90"] <= times["p99"]
        assert row["measured"]["sustained"]["etap"]["us"] > 0
        assert "millijoules" not in row["measured"]["sustained"]["etap"]
    command = read["rows"][1]["command"].split()[1:]
    assert main([*(word.strip("'") for word in command), "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["bf16-1x64-h16"]


def test_shapes_go_on_in_a_file(capsys: pytest.CaptureFixture[str], interrupted_at: Callable[[int], list[int]]) -> None:
    """Interrupted after two of three, the same command measures the third only; another list is not mixed in."""
    begun = interrupted_at(3)
    command = ("--sweep", "batch=1..4", "context=64", "-o", "run.json")
    assert bench(*command) == 130
    kept = results.read(Path("run.json")).rows
    assert len(kept) == 2
    assert bench(*command) == 0
    done = results.read(Path("run.json"))
    assert done.complete and done.rows[:2] == kept and len(begun) == 4
    assert "--fresh" not in capsys.readouterr().err
    assert bench(*command) == 0  # the numbers of before looked like new ones
    assert f"3 of 3 shapes are in run.json (all were measured on {done.started}; --fresh measures anew)." in capsys.readouterr().err
    assert len(begun) == 4
    assert bench("bf16-1x64-h16", "-o", "run.json") == 2
    assert "holds results of another run (rows differ)" in capsys.readouterr().err


def test_half_the_rows_are_sustained() -> None:
    assert bench("--sweep", "batch=1..8", "context=64", "--sustain", "0.02", "--sustain-rows", "2", "-o", "run.json") == 0
    assert [bool(row.measured.sustained) for row in results.read(Path("run.json")).rows] == [False, True, False, True]


def test_a_row_of_the_table_has_every_column(seed: int) -> None:
    """What was not measured is an empty cell, never a number."""
    from test_history import run_of

    (row,) = run_of({"bf16-1x4K-h16": 20.0}).rows
    assert len(cells(row)) == len(COLUMNS)
    shown = dict(zip(COLUMNS, cells(row), strict=True))
    assert shown["ETAP µs"] == "20.0" and shown["of the ceiling"] == "0.50"
    assert shown["mJ"] == shown["plan µs"] == shown["error"] == shown["best peer"] == ""
    assert dict(zip(COLUMNS, cells(row, significant), strict=True))["ETAP µs"] == "20.0"
    row.measured.times["etap"] = Times(128229.5)
    assert dict(zip(COLUMNS, cells(row, significant), strict=True))["ETAP µs"] == "128,000"  # seven figures, of which three mean something
    row.measured.times.clear()
    row.measured.skipped["etap"] = "no"
    assert dict(zip(COLUMNS, cells(row), strict=True))["ETAP µs"] == "no"
