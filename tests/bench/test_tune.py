"""`etap tune` and the file that it writes: what is chosen, when it is applied, and what is ignored."""

from __future__ import annotations

import dataclasses
import json
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from etap_bench import timing
from etap_bench.commands import tune
from etap_bench.shape import Shape

import etap_py as etap
from etap_py import doctor, routing, tuning
from etap_py.__main__ import main

PROBLEM = etap.Problem(num_heads=16, batch=2)
CHOICE = tuning.Choice(tile=8, cluster=0, speedup=1.2, contexts=(512,))
SHAPES = [Shape.equal(batch=2, context=context, heads=16) for context in (512, 4096)]


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test has a file of its own, and leaves no tuned plan behind."""
    file = tmp_path / "etap" / "tuning.json"
    file.parent.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("ETAP_TUNING", raising=False)
    tuning.forget()
    yield file
    tuning.forget()


def store(file: Path, choice: tuning.Choice = CHOICE, problem: etap.Problem = PROBLEM) -> None:
    tuning.store(file, tuning.card(problem), {tuning.key(problem): choice})


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content["cards"][tuning.card(PROBLEM)].update(changes)
    file.write_text(json.dumps(content))


def faked(**speed: float) -> tune.Measure:
    """A clock for which candidate "8_0" of tiles and clusters takes 100 us times what is given, in each of SHAPES ("8_0_512") or in all."""

    def measure(shape: Shape, device: str, chosen: list[tune.Candidate], rounds: int) -> tune.Times:
        def times(candidate: tune.Candidate) -> list[float]:
            name = f"t{candidate[0]}_{candidate[1]}"
            factor = speed.get(f"{name}_{shape.context}", speed.get(name, 1.5))
            return [100 * factor * (1 + 0.01 * (i % 3 - 1) * speed.get("noise", 0.1)) for i in range(rounds)]

        return {candidate: times(candidate) for candidate in chosen}

    return measure


# ---- The search ----


def test_candidates_are_different_and_accepted() -> None:
    """The library's choice comes first; no two decide the same, none is refused or wants more workspace."""
    for heads in (8, 16, 48, 128):
        problem = dataclasses.replace(PROBLEM, num_heads=heads)
        found = tune.candidates(problem)
        assert found[0] == (0, 0)
        forced = [dataclasses.replace(problem, force_tile=tile, force_cluster=cluster) for tile, cluster in found]
        decisions = [(d.tile_rows, d.cluster_size, d.num_workers) for d in map(etap.query, forced)]
        assert len(set(decisions)) == len(decisions)
        assert all(etap.workspace_size(f) <= etap.workspace_size(problem) for f in forced)


def test_a_faster_choice_is_taken() -> None:
    result = tune.search(PROBLEM, SHAPES, 9, measure=faked(t0_0=1.0, t8_0=0.8))
    assert result.choice == tuning.Choice(8, 0, pytest.approx(1.25, abs=1e-3), (512, 4096))
    assert [times.p50 for times in result.library] == pytest.approx([100, 100], rel=0.01)


@pytest.mark.parametrize(
    ("clock", "why"),
    [
        ({"t0_0": 1.0, "t8_0": 0.7, "t8_0_512": 1.01}, "slower in some context"),
        ({"t0_0": 1.0, "t8_0": 0.995}, "needed: 1.01"),
        ({"t0_0": 1.0, "t8_0": 0.95, "noise": 30.0}, "needed: 1."),
    ],
)
def test_the_library_is_kept(clock: dict[str, float], why: str) -> None:
    """Never slower than the default on what was measured: not in one of two contexts, not for a gain within the noise."""
    result = tune.search(PROBLEM, SHAPES, 9, measure=faked(**clock))
    assert result.choice is None
    assert why in result.why


def test_nothing_to_choose() -> None:
    """One head has one tile on the CPU device: that is said, and nothing is timed."""
    result = tune.search(etap.Problem(num_heads=1, batch=1), SHAPES, 9, measure=faked())
    assert result.choice is None
    assert "nothing to choose" in result.why


def test_command(own_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of one problem are tuned together, and what was found is stored where plans look for it."""
    monkeypatch.setattr(tune, "measure_shape", faked(t0_0=1.0, t8_0=0.8))
    assert main(["tune", "bf16-2x512-h16", "bf16-2x4K-h16", "bf16-2x512-h1", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["stored_in"] == str(own_file)
    assert (report["format"], report["version"], report["device"]["kind"]) == ("etap-tune", 1, "cpu")
    assert [r["contexts"] for r in report["results"]] == [[512, 4096], [512]]
    assert etap.query(PROBLEM).tile_rows == 8
    assert main(["tune", "bf16-2x512-h16", "--device", "cpu", "--dry-run"]) == 0
    assert "nothing stored" in capsys.readouterr().out


def test_command_measures(own_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way on the CPU device: real calls, whose results are compared."""
    assert main(["tune", "bf16-1x64-h16", "--device", "cpu", "--rounds", "6", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert result["candidates"] >= 2
    assert 0 < result["library"][0]["low"] <= result["library"][0]["p50"] <= result["library"][0]["p99"]
    assert own_file.exists() == (result["choice"] is not None)


def test_every_plan_lives_as_long_as_the_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph keeps no Python object: candidates whose plans were dropped ran on each other's workspaces."""
    plans: list[weakref.ref[etap.Plan]] = []

    class Clock(timing.CpuTimer):
        def replay_of(self, call: timing.Call, pools: int, calls: int) -> timing.Replay:
            plans.append(weakref.ref(call.__self__.plan))  # type: ignore[attr-defined]
            return lambda: None

        def rounds(self, replays: dict[str, timing.Replay], rounds: int, warm_up: int) -> tuple[dict[str, list[float]], int]:
            assert len(plans) == len(replays) > 1
            assert all(plan() is not None for plan in plans)
            return {name: [1.0] * rounds for name in replays}, 0

    monkeypatch.setattr(timing, "timer_of", lambda device: Clock())
    tune.measure_shape(Shape.equal(batch=2, context=64, heads=16), "cpu", tune.candidates(PROBLEM), rounds=3)


def test_lengths_as_serving_has_them(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fastest for equal lengths can be 15 % slower for a serving batch."""
    seen: list[Shape] = []

    def measure(shape: Shape, device: str, chosen: list[tune.Candidate], rounds: int) -> tune.Samples:
        seen.append(shape)
        return {candidate: [1.0] * rounds for candidate in chosen}

    monkeypatch.setattr(tune, "measure_shape", measure)
    monkeypatch.setattr(tune, "candidates", lambda problem: [(0, 0), (8, 0)])
    assert main(["tune", "bf16-8x4K-h16", "--ragged", "--device", "cpu"]) == 0
    assert seen
    for shape in seen:
        assert sorted(shape.lengths) == [64, 256, 576, 1024, 1600, 2304, 3136, 4096] != list(shape.lengths)
        assert shape.name == "bf16-8x4K-h16-ragged"
    assert main(["tune", "bf16-8x4K-h16", "--device", "cpu", "--dry-run"]) == 0
    assert set(seen[-1].lengths) == {4096}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["e4m3_656-8x2K-h8-sparse", "--ragged"], "shape is 'e4m3_656-8x2K-h8-sparse'; allowed where lengths are to differ"),
        (["what"], "shape is 'what'; allowed: names like"),
        (["bf16-1x64-h16", "--rounds", "5"], "--rounds is 5; allowed: 6 and more"),
        (["bf16-1x64-h200"], "num_heads is 200"),
        (["bf16-1x64-h16", "--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_bad_calls(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device", "cpu", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_disk(own_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "measure_shape", faked(t0_0=1.0, t8_0=0.8))
    own_file.write_text("a file where a folder should be")
    assert main(["tune", "bf16-2x512-h16", "--device", "cpu", "-o", str(own_file / "tuning.json"), "--json"]) == 1
    assert "can't be written" in capsys.readouterr().err


# ---- The file ----


def test_plans_take_the_choice(own_file: Path) -> None:
    """Decision and plan follow the file; the results stay what they are."""
    rng = np.random.default_rng()
    q, kv = (rng.integers(0x3C00, 0x3F80, shape, dtype=np.uint16) for shape in ((2, 16, 576), (4, 64, 576)))
    table, lens = np.arange(4, dtype=np.int32).reshape(2, 2), np.array([100, 128], np.int32)

    def decode_once() -> np.ndarray:
        plan = etap.Plan(PROBLEM)
        plan.update(lens)
        return plan.run(q[..., :512], q[..., 512:], kv, table, softmax_scale=0.01)[0]

    before = etap.query(PROBLEM), decode_once()
    store(own_file)
    assert before[0].tile_rows == 16
    assert etap.query(PROBLEM).tile_rows == 8
    np.testing.assert_allclose(
        (decode_once().astype(np.uint32) << 16).view(np.float32), (before[1].astype(np.uint32) << 16).view(np.float32), rtol=1e-2
    )
    assert etap.query(dataclasses.replace(PROBLEM, batch=3)).tile_rows == 16
    assert "1 choices in" in tuning.state(PROBLEM)
    assert next(d for d in doctor.examine().devices if d.device == "cpu").tuning == tuning.state(PROBLEM)


def served(plan: etap.Plan) -> str:
    """What of the library's plans a plan runs: the same library plan is the same kernel with the same tiles."""
    return str(plan._plan)


def test_tuning_is_no_hidden_state(own_file: Path) -> None:
    """Guards: plans of before that go on being served after a choice was stored, or while choices are ignored, when `query` already says
    something else. A plan is always the one of the explicit problem that `tuned` gives at that time."""

    def agree() -> int:
        explicit = tuning.tuned(PROBLEM)
        assert served(etap.Plan(PROBLEM)) == served(etap.Plan(explicit))
        assert etap.query(PROBLEM) == etap.query(explicit)
        assert explicit.force_tile in (0, etap.query(PROBLEM).tile_rows)
        return etap.query(PROBLEM).tile_rows

    assert agree() == 16
    before = served(etap.Plan(PROBLEM))
    store(own_file)
    assert agree() == 8
    assert served(etap.Plan(PROBLEM)) != before
    with tuning.ignored():
        assert agree() == 16
        assert served(etap.Plan(PROBLEM)) == before
    assert agree() == 8


def test_routes_follow_the_choice(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: a drop-in's route, remembered for the problem, that was decided for another tile."""
    asked: list[etap.Problem] = []
    monkeypatch.setattr(routing, "_chosen", lambda peer, problem, route: asked.append(problem))
    peer = routing.Peer("a peer", "no_such_peer")
    peer.chosen_for(PROBLEM)
    store(own_file)
    peer.chosen_for(PROBLEM)
    assert [problem.force_tile for problem in asked] == [0, 8]


def test_forced_and_invariant_problems_are_left_alone(own_file: Path) -> None:
    store(own_file)
    for changed in ({"force_tile": 16}, {"batch_invariant": True}):
        problem = dataclasses.replace(PROBLEM, **changed)
        store(own_file, problem=problem)
        assert tuning.tuned(problem) is problem
    with tuning.ignored():
        assert tuning.tuned(PROBLEM) is PROBLEM


def test_one_read_for_many_problems(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(own_file)
    reads = []
    monkeypatch.setattr(tuning, "_read", lambda *arguments: reads.append(arguments) or {})
    for batch in range(1, 6):
        tuning.tuned(dataclasses.replace(PROBLEM, batch=batch))
    assert len(reads) == 1


def test_a_choice_that_wants_more_memory_or_is_refused_is_not_taken(own_file: Path) -> None:
    """A workspace that was sized for the library's choice must do; a file edited by hand must not turn into an error of a plan."""
    for tile in (4096, 12):
        store(own_file, dataclasses.replace(CHOICE, tile=tile))
        assert tuning.tuned(PROBLEM) is PROBLEM


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Expecting property name"),
        ("[]", "it is no tuning file of format 1"),
        ('{"format": 2, "cards": {}}', "it is no tuning file of format 1"),
        ('{"format": 1, "cards": {"NVIDIA H20 (78)": {}}}', "it is for NVIDIA H20 \\(78\\), not for"),
        ("version", "it was made with etap 0.0.1"),
        ("damaged", "it is damaged"),
        (None, "there is no such file"),
    ],
)
def test_wrong_and_foreign_files_are_ignored_with_one_warning(
    content: str | None, words: str, own_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content in ("version", "damaged"):
        store(own_file)
        edit(own_file, **({"etap": "0.0.1"} if content == "version" else {"choices": {tuning.key(PROBLEM): {"tile": 8}}}))
    elif content is not None:
        own_file.write_text(content)
    monkeypatch.setenv("ETAP_TUNING", str(own_file))
    with pytest.warns(UserWarning, match=f"the tuning file .* is ignored: .*{words}"):
        assert tuning.tuned(PROBLEM) is PROBLEM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.tuned(dataclasses.replace(PROBLEM, batch=9)).force_tile == 0


def test_no_file_is_no_warning(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default file need not be there; an empty ETAP_TUNING means that none is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.tuned(PROBLEM) is PROBLEM
        assert tuning.state(PROBLEM) == "not tuned: the library decides"
        store(own_file)
        assert tuning.tuned(PROBLEM).force_tile == 8
        monkeypatch.setenv("ETAP_TUNING", "")
        assert tuning.tuned(PROBLEM) is PROBLEM


def test_store_keeps_what_is_there(own_file: Path) -> None:
    """Other cards and other problems stay; choices of another library version go."""
    own_file.write_text(json.dumps({"format": 1, "cards": {"NVIDIA H20 (78)": {"etap": "0.0.1", "choices": {}}}}))
    store(own_file)
    other = dataclasses.replace(PROBLEM, batch=7)
    store(own_file, problem=other)
    cards = json.loads(own_file.read_text())["cards"]
    assert set(cards) == {"NVIDIA H20 (78)", tuning.card(PROBLEM)}
    assert set(cards[tuning.card(PROBLEM)]["choices"]) == {tuning.key(PROBLEM), tuning.key(other)}
    edit(own_file, etap="0.0.1")
    store(own_file)
    assert set(json.loads(own_file.read_text())["cards"][tuning.card(PROBLEM)]["choices"]) == {tuning.key(PROBLEM)}


def test_lists_without_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty one tuned nothing and said that all was well; one that is missing could not be "written"."""
    empty = tmp_path / "empty.toml"
    empty.write_text("shapes = []\n")
    assert main(["tune", str(empty), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"etap tune: {empty}: shapes is empty; allowed: one or more\n"
    assert main(["tune", "gone.toml", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "etap tune: gone.toml can't be read: No such file or directory\n"
