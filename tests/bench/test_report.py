"""`etap report`: its numbers against arithmetic by hand, its page by its HTML, and its refusals."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from etap_bench import results, runner, work, workload
from etap_bench.errors import Refused
from etap_bench.measurement import PEERS, Measurement, Sustained, Times
from etap_bench.report import page, rest, tables, text
from etap_bench.report.figures import plots
from etap_bench.report.limits import UNKNOWN, Limits, limits
from etap_bench.report.prices import Prices
from etap_bench.report.rest import Rest
from etap_bench.report.summary import Contender, Given, contenders, differs
from etap_bench.report.tiles import remarks, tiles
from etap_bench.results import Device, Results, Row, Run
from etap_bench.shape import Shape
from matplotlib.text import Text

from etap_py.__main__ import main

US = {"ceiling": 80.0, "etap": 100.0, "flashmla": 110.0, "pytorch": 5000.0}
H200 = Device("cuda", "NVIDIA H200", 132, 50 << 20, power_limit_w=700.0)
CPU = Device("cpu", "cpu (avx2)", 8, 32 << 20)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `etap bench` writes of a workload on the CPU."""
    path = tmp_path_factory.mktemp("run") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_HOST_CACHE", 1 << 20)  # few pools: the arena is what takes time here
        small = ["--device", "cpu", "--steps", "4", "--shrink", "64", "--rounds", "2", "--peers", "pytorch"]
        assert main(["bench", "agents", *small, "-o", str(path)]) == 0
    return path


def measurement(us: dict[str, float], millijoules: dict[str, float] | None = None, uncertainty: float | None = 0.0) -> Measurement:
    """uncertainty None: not known"""
    ends = () if uncertainty is None else (1 - uncertainty, 1 + uncertainty)
    times = {name: Times(t, t, t * 1.1, *(t * end for end in ends)) for name, t in us.items()}
    return Measurement(
        times=times,
        sustained={name: Sustained(1.0, us[name], mj, 1755) for name, mj in (millijoules or {}).items()},
        worst_row_error={name: 2e-3 for name in us if not name.startswith("ceiling")},
        plan_us=0.0,
    )


def of_steps(us: dict[str, float] = US, device: Device = H200, settings: Sequence[str] = (), **measured: object) -> Results:
    """Of four steps of "agents", each with the same times."""
    todo = work.of_workload(workload.load("agents", ["steps=4", *settings]))
    rows = [
        Row(i.name, replace(i.shape, shared=()), i.shape.distinct_kv_bytes, measurement(us, **measured), step=i.step)  # type: ignore[arg-type]
        for i in todo.items
    ]
    return made(rows, device, workload=todo.workload, workload_digest=todo.digest)


def of_shapes(us: dict[str, float] = US, device: Device = H200, **measured: object) -> Results:
    shapes = [Shape.parse(name) for name in ("bf16-16x16K-h16", "bf16-1x1K-h16", "bf16-16x16K-h128")]
    rows = [Row(shape.name, shape, shape.kv_bytes, measurement(us, **measured)) for shape in shapes]  # type: ignore[arg-type]
    return made(rows, device)


def made(rows: list[Row], device: Device, **others: object) -> Results:
    software = {"etap": "0.2.0", "python": "3.11"}
    run = Run([row.name for row in rows], device, list(PEERS), 1, 15, 1.0, 4, software, commit="abcdef0", **others)  # type: ignore[arg-type]
    return Results(run, "etap bench agents --device cuda:0", "2026-11-29T10:00:00+00:00", all_steps=1000, rows=rows)


def first(read: Results, given: Given | None = None) -> Contender:
    return contenders(read, given or Given())[0]


def answers(read: Results, given: Given | None = None) -> dict[str, tuple[str, str]]:
    """Each tile's headline, and its sentences with its marks."""
    every = tiles(read, given or Given(), limits(read))
    return {tile.question: (tile.headline, " ".join((*tile.sentences, *tile.marks))) for tile in every}


class _Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.inside: list[tuple[str, ...]] = []  # what each tag stands in
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tuple(self.open))
        if tag not in ("img", "meta", "br", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


REPORTS = {
    "steps": of_steps,
    "steps without a peer": lambda: of_steps({"ceiling": 80.0, "etap": 100.0, "pytorch": 5000.0}, millijoules={"etap": 50.0}),
    "steps on a CPU": lambda: of_steps({"ceiling": 8e4, "etap": 1e5}, CPU, uncertainty=0.2),
    "steps with energy": lambda: of_steps(
        millijoules={"etap": 50.0, "flashmla": 60.0}, settings=["server.preset=deepseek-v3", "server.tp=8"]
    ),
    "steps of peers alone": lambda: of_steps({"ceiling": 80.0, "flashmla": 110.0}),
    "shapes": lambda: of_shapes(millijoules={"etap": 50.0, "flashmla": 60.0}),
    "shapes on a CPU": lambda: of_shapes({"ceiling": 8e6, "etap": 1e5}, CPU),
    "shapes of a single round": lambda: of_shapes(uncertainty=None),
    "shapes without a ceiling": lambda: of_shapes({"etap": 100.0}),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_page(kind: str) -> None:
    """A page that refers to nothing outside itself, that a reader of screens finds the way in, and without half-finished values."""
    given = Given(Prices.of(rent=2.5), Rest(constant_ms=10.0), itl_limit_ms=25.0)
    written = page.write(REPORTS[kind](), given, Path("pages/page.html"))
    html = written[0].read_text()
    read = _Page(html)
    assert read.open == []
    assert (len(read.all("main")), len(read.all("h1"))) == (1, 1)
    assert read.all("html") == [{"lang": "en"}]
    assert len(read.all("table")) == len(read.all("caption")) > 0
    assert len(read.all("figure")) == len(read.all("figcaption")) == len(read.all("img")) == len(written) - 1
    assert {cell.get("scope") for cell in read.all("th")} == {"col", "row"}
    headers = [inside for (tag, _), inside in zip(read.tags, read.inside, strict=True) if tag == "th"]
    assert all("thead" in inside or "tbody" in inside for inside in headers)
    assert all(len(image["alt"] or "") > 40 for image in read.all("img"))
    links = [str(tag[name]) for _, tag in read.tags for name in ("href", "src", "srcset") if name in tag]
    assert all(link.startswith("data:image/svg+xml;base64,") and b"</svg>" in base64.b64decode(link.split(",")[1]) for link in links)
    assert "http" not in re.sub(r"data:[^\"]*", "", html)
    assert {path.read_bytes()[:4] for path in written[1:]} <= {b"\x89PNG"}
    assert not read.all("script")
    shown = " ".join(read.text)
    assert not re.search(r"\bNone\b|\bnan\b|\binf\b|[({]{2}|\d\.\d{5}|\d%", shown)
    assert "peer" not in " ".join(part for part in read.text if "PyTorch" in part)


def test_columns_are_as_many_as_cells() -> None:
    """A row that is a cell short puts every number after it below another head."""
    given = Given(Prices.of(rent=2.5), itl_limit_ms=7.0)
    read = of_steps(millijoules={"etap": 50.0, "flashmla": 60.0})
    bounds = limits(read)
    everyone = contenders(read, given)
    of_steps_ = [tables.steps(everyone, ""), tables.server(everyone, workload.Server(), given.prices, 7.0), tables.load_of_steps(read)]
    shapes = of_shapes(millijoules={"etap": 50.0, "flashmla": 60.0})
    of_shapes_ = [tables.shapes(shapes, limits(shapes)), tables.load_of_shapes(shapes), tables.checks(shapes)]
    for table in (*of_steps_, *of_shapes_, tables.limit_counts(read, bounds)):
        assert table is not None
        assert {len(row) for row in table.rows} == {len(table.head)}
        assert all(place < len(table.head) for place in table.words)


def test_figures_in_the_dark() -> None:
    """Dark ink on a dark page can't be read; a light ground on it dazzles."""
    for plot in plots(of_steps(), limits(of_steps()), Given()).values():
        light, dark = plot.svg(), plot.svg(dark=True)
        assert "#1b1f24" in light and "#1b1f24" not in dark
        assert "#e3e7ec" in dark
        assert "fill: #ffffff" not in dark


def test_type_on_a_phone() -> None:
    """At 390 pixels with margins of 16 no letter is smaller than 11 pixels: figures of a desk's width had 5."""
    for read in (of_steps(), of_shapes()):
        for plot in plots(read, limits(read), Given(itl_limit_ms=7.0)).values():
            plot.svg()  # ticks get their labels
            shown = 358 / (plot.figure.get_figwidth() * 96)
            sizes = [letters.get_fontsize() * 96 / 72 * shown for letters in plot.figure.findobj(Text) if letters.get_text()]
            assert len(sizes) > 8
            assert min(sizes) >= 11


def test_the_same_results_give_the_same_page() -> None:
    """A page that differs from itself can't be compared or stored."""
    once, again = (page.write(of_steps(), Given(), Path(f"{folder}/page.html"))[0].read_bytes() for folder in ("one", "two"))
    assert once == again


def test_report_command(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what `etap bench` really wrote; a folder that is not there yet is made."""
    assert main(["report", str(measured), "-o", "pages/page.html"]) == 0
    paths = capsys.readouterr().out.split()
    assert paths[0] == "pages/page.html"
    assert all(Path(path).exists() for path in paths)
    html = Path("pages/page.html").read_text()
    assert "A trial: lengths, batch and cache were divided by 64." in html
    assert "Energy was not measured: this device counts none" in html
    assert html.count("No peer took part") == 2  # in both boxes that would speak of one
    assert "agents --set steps=4" in html


def test_report_needs_no_pytorch(measured: Path) -> None:
    """A file that a GPU machine wrote is read on a laptop that has etap-bench only."""
    program = "import sys; sys.modules['torch'] = None; from etap_py.__main__ import main; sys.exit(main(sys.argv[1:]))"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'bench'}:{root}"}
    command = [sys.executable, "-c", program, "report", str(measured), "-o", "page.html"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("page.html").stat().st_size > 0


def test_report_as_json(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(measured), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in said["contenders"]] == ["etap", "pytorch"]
    assert said["contenders"][0]["steps"] == 4
    assert [tile["question"] for tile in said["tiles"]] == ["What does a step gain?", "What limits it?", "What does it save?"]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace('"version": 2', '"version": 7'), "is of version 7; allowed: 2"),
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "{}", "has the format 'unknown'; allowed: a file that `etap bench` wrote"),
        (lambda text: text.replace('"lengths"', '"widths"'), "is damaged: Object missing required field `lengths`"),
    ],
)
def test_a_bad_file(change: object, words: str, measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(change)
    Path("bad.json").write_text(change(measured.read_text()))
    assert main(["report", "bad.json"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_file_without_rows() -> None:
    with pytest.raises(Refused, match="the file holds no measured row; allowed: one or more"):
        page.write(made([], H200), Given(), Path("page.html"))
    assert not Path("page.html").exists()


def test_gain_of_a_step() -> None:
    """Against the best peer, in the steps that both computed: flashmla's 110 µs against 100."""
    headline, said = answers(of_steps())["What does a step gain?"]
    assert headline == "9.1\u00a0% less time"
    assert "Against flashmla, the best peer that ran here, in the 4 steps that both computed" in said
    assert "the median step's attention takes 6.10\u00a0ms with ETAP and 6.71\u00a0ms with flashmla" in said
    assert "In no step was a peer faster." in said
    assert said.endswith("attention alone")


def test_gain_with_the_rest_of_a_step() -> None:
    """A gain in attention is a smaller one in the whole step: 61 · 0.11 ms and 13.9 ms against 61 · 0.1 and 13.9."""
    headline, said = answers(of_steps(), Given(rest=Rest(13.9)))["What does a step gain?"]
    assert headline == "3.0\u00a0% less time"
    assert "the median step takes 20.0\u00a0ms with ETAP" in said
    assert "Of that attention: 9.1\u00a0% less time." in said
    assert "attention alone" not in said


def test_where_etap_does_not_help() -> None:
    """A step in which a peer is faster must be named, with the worst."""
    read = of_steps()
    read.rows[2].measured = measurement({**US, "etap": 300.0, "flashmla": 100.0})
    _, said = answers(read)["What does a step gain?"]
    assert "It does not help in 1 of 4 steps: at worst step 2 (batch " in said
    assert "where flashmla takes 67\u00a0% less time" in said


def test_a_peer_is_faster_only_for_certain() -> None:
    """Medians that are 5 % apart and uncertain by 4 % each were called a loss."""
    sure, unsure = (of_steps({"etap": 105.0, "flashmla": 100.0}, uncertainty=of) for of in (0.001, 0.04))
    assert differs(sure.rows[0], "flashmla", "etap") == -1
    assert differs(unsure.rows[0], "flashmla", "etap") == 0
    assert (contenders(sure, Given())[1].faster, contenders(unsure, Given())[1].faster) == (4, 0)


def test_too_few_rounds_to_say() -> None:
    """One round was "± 0.0 %", and a peer that was 10 % faster in it was so for certain."""
    read, shapes = (of({"ceiling": 80.0, "etap": 110.0, "flashmla": 100.0}, uncertainty=None) for of in (of_steps, of_shapes))
    assert differs(read.rows[0], "flashmla", "etap") is None
    assert differs(of_steps({"etap": 101.0, "flashmla": 100.0}, uncertainty=None).rows[0], "flashmla", "etap") == 0
    peer = contenders(read, Given())[1]
    assert (peer.faster, peer.slower) == (None, None)
    assert tables.steps(contenders(read, Given()), "").rows[1][-2:] == (text.NOTHING,) * 2
    assert "Too few rounds to say in which step a peer was faster." in answers(read)["What does a step gain?"][1]
    assert remarks(read) == ["How uncertain medians are is not known in 4 of 4 steps: six --rounds and more say it."]
    assert "±" not in tables.shapes(shapes, limits(shapes)).head
    assert plots(shapes, limits(shapes), Given())["shapes"].caption == "Fraction of the ceiling, with ETAP's uncertainty where it is known"
    assert plots(of_shapes(), limits(shapes), Given())["shapes"].caption == "Fraction of the ceiling, with ETAP's uncertainty"


def test_the_reference_is_no_peer() -> None:
    """A first report on a CPU said "59.54 times as fast as pytorch, the best peer that ran"."""
    read = of_steps({"ceiling": 1.9, "etap": 2.0, "pytorch": 120.0})
    for question in ("What does a step gain?", "What does it save?"):
        headline, said = answers(read)[question]
        assert "No peer took part" in said
        assert "best peer" not in said and "less" not in headline
    assert "took 60.0 times as long as ETAP" in answers(read)["What does a step gain?"][1]
    assert "No peer took part" in answers(of_shapes({"etap": 2.0, "pytorch": 120.0}))["What does a call gain?"][1]


def test_the_reference_is_in_figures_only_where_it_is_alone() -> None:
    """It is 50 times as slow: beside peers it would press them into a line."""
    both, alone = of_steps(), of_steps({"ceiling": 80.0, "etap": 100.0, "pytorch": 5000.0})
    assert "PyTorch" not in plots(both, limits(both), Given())["latency"].alt
    assert "PyTorch" in plots(alone, limits(alone), Given())["latency"].alt
    assert "gain" not in plots(alone, limits(alone), Given())


def test_a_wrong_contender_has_no_numbers() -> None:
    """Times of wrong results must not be compared, and who was wrong is said at the top."""
    read = of_steps()
    for row in read.rows:
        row.measured.without("flashmla")
        row.wrong = {"flashmla": "a row of its result is off by 0.3 of its norm"}
    assert "No peer took part" in answers(read)["What does a step gain?"][1]
    assert "Results were wrong in 4 of 4 steps (flashmla); their times are left out everywhere." in remarks(read)
    (row,) = (row for row in tables.checks(read).rows if row[0] == "flashmla")
    assert row == ("flashmla", "0", text.NOTHING, "a row of its result is off by 0.3 of its norm (4 of 4)")


def test_etap_was_wrong_everywhere() -> None:
    read = of_steps({"ceiling": 80.0, "etap": 100.0})
    for row in read.rows:
        row.measured.without("etap")
        row.wrong = {"etap": "a row of its result is off by nan of its norm"}
    ((_, said),) = answers(read).values()
    assert said == "ETAP did not compute this work: a row of its result is off by nan of its norm."
    assert page.write(read, Given(), Path("page.html"))[0].exists()


def test_energy_and_prices() -> None:
    """Against arithmetic by hand: 61 layers of 1000 µs at 100 W, and 39 ms for the rest, make 100 ms a step."""
    read = of_steps({"etap": 1000.0}, millijoules={"etap": 100.0})
    prices = Prices.of(card_price=26280.0, years=3.0, utilisation=1.0, power_price=0.5, pue=2.0, rent=2.0)
    etap = first(read, Given(prices, Rest(39.0)))
    tokens = sum(row.step.new_tokens for row in read.rows if row.step)
    assert etap.step_ms == pytest.approx((100.0,) * 4)
    assert etap.tokens_per_second == pytest.approx(tokens / 0.4)
    assert etap.watts == pytest.approx(100.0)
    assert etap.joules == pytest.approx(100.0 * 0.4 / tokens * 1e6)
    hours = 1e6 / (tokens / 0.4) / 3600
    assert etap.rented == pytest.approx(2.0 * hours)
    assert etap.owned == pytest.approx((1.0 + 0.1 * 2.0 * 0.5) * hours)


@pytest.mark.parametrize(("tp", "dp"), [(8, 1), (8, 8), (8, 2)])
def test_a_whole_server(tp: int, dp: int) -> None:
    """One card's energy and cost were printed for work that eight do, and one group's tokens for that of eight."""
    given = Given(Prices.of(rent=2.0))
    us, millijoules = {"etap": 1000.0}, {"etap": 100.0}
    one = first(of_steps(us, millijoules=millijoules), given)
    read = of_steps(us, millijoules=millijoules)
    assert read.run.workload is not None
    read.run.workload.server = workload.Server(tp=tp, dp=dp)
    all_ = first(read, given)
    assert all_.step_ms == one.step_ms
    assert all_.tokens_per_second == pytest.approx(dp * one.tokens_per_second)
    assert all_.watts == pytest.approx(tp * (one.watts or 0))
    for whole, single in ((all_.joules, one.joules), (all_.owned, one.owned), (all_.rented, one.rented)):
        assert whole == pytest.approx(tp / dp * (single or 0))


def test_goodput() -> None:
    """Tokens of steps within the limit over the time of all: of 6.1, 6.1, 61 and 61 ms two are within 20."""
    read = of_steps({"etap": 100.0})
    for row in read.rows[2:]:
        row.measured = measurement({"etap": 1000.0})
    etap = first(read, Given(itl_limit_ms=20.0))
    tokens = sum(row.step.new_tokens for row in read.rows[:2] if row.step)
    assert etap.within == 0.5
    assert etap.goodput == pytest.approx(tokens / 0.1342)
    assert first(read).goodput is None
    assert "limit" not in " ".join(tables.server([first(read)], workload.Server(), Prices.of(), None).head)


def test_default_prices_are_marked() -> None:
    """A guess of ours that looks like a fact."""
    read = of_steps(millijoules={"etap": 50.0, "flashmla": 60.0})
    headline, said = answers(read)["What does it save?"]
    assert headline.endswith("cheaper")
    assert "Default, change with --card-price, --years, --utilisation, --power-price, --pue: a card" in said
    assert "default prices" in said and "attention alone" in said
    own = Prices.of(card_price=30000.0, years=4.0, utilisation=0.5, power_price=0.2, pue=1.1)
    _, said = answers(read, Given(own, Rest(10.0)))["What does it save?"]
    assert "As given: a card with its share of the server EUR 30,000" in said
    assert "efault" not in said and "attention alone" not in said


def test_a_cpu_has_no_default_price() -> None:
    """35,000 EUR for a card were charged for a laptop's CPU."""
    read = of_steps(device=CPU)
    assert first(read).owned is None
    headline, said = answers(read)["What does it save?"]
    assert headline == "not known" and "give --card-price" in said and "35,000" not in said
    assert first(read, Given(Prices.of(card_price=2000.0))).owned is not None


def test_costs_without_power_name_no_price_of_it() -> None:
    """ "EUR 0.25 a kWh, PUE 1.3" stood among the defaults of costs that have no power in them, of a CPU."""
    for given in ({}, {"power_price": 0.31, "pue": 1.1}):
        costs = Given(Prices.of(card_price=2000.0, **given))
        _, said = answers(of_steps(device=CPU), costs)["What does it save?"]
        assert "Costs are without power, which was not measured." in said
        assert "As given: a card with its share of the server EUR 2,000." in said
        assert "Default, change with --years, --utilisation: written off over 3 years" in said
        html = page.write(of_steps(device=CPU), costs, Path("page.html"))[0].read_text()
        for words in ("kWh", "PUE"):
            assert words not in said and words not in html
    _, said = answers(of_steps(device=CPU), Given(Prices.of(card_price=2000.0, years=3.0, utilisation=0.5)))["What does it save?"]
    assert "default prices" not in said and "Default" not in said
    assert "without power" not in answers(of_steps(millijoules={"etap": 50.0, "flashmla": 60.0}))["What does it save?"][1]


def test_power_that_was_not_measured() -> None:
    """Where no energy was measured, power is left out for everyone; else it would favour who was not measured."""
    assert first(of_steps()).owned is not None
    read = of_steps(millijoules={"etap": 50.0})
    everyone = {c.name: c for c in contenders(read, Given())}
    assert everyone["etap"].owned is not None
    assert everyone["flashmla"].owned is None
    assert "flashmla's cost is unknown" in answers(read)["What does it save?"][1]


def test_a_disturbed_ceiling_is_none() -> None:
    """ "172.37 of the ceiling" was said of a machine that did other things."""
    read = of_shapes({"ceiling": 8e6, "etap": 1e5}, CPU)
    assert answers(read)["How near is it to the ceiling?"][0] == "not known"
    assert any("3 of 3 shapes the copy was slower than ETAP and is no ceiling" in said for said in remarks(read))
    assert "of the ceiling" not in answers(of_steps({"ceiling": 8e6, "etap": 1e5}, CPU))["What limits it?"][0]


def test_remarks() -> None:
    """What makes numbers doubtful stands before them; nothing stands there without need."""
    assert remarks(of_steps()) == []
    read = of_steps(settings=["shrink=16"], uncertainty=0.2)
    read.rows.pop()
    assert remarks(read) == [
        "The run is not complete: 3 of 4 steps are measured.",
        "A trial: lengths, batch and cache were divided by 16.",
        "Medians are uncertain by ±20\u00a0%: more --rounds on a quiet machine say more.",
    ]


def test_tiles_of_shapes() -> None:
    """Shapes have no steps, tokens and costs: a gain and a fraction, as geometric means, and a limit."""
    read = of_shapes(millijoules={"etap": 50.0, "flashmla": 40.0})
    read.rows[1].measured = measurement({**US, "flashmla": 100.0 / 1.1})
    said = answers(read)
    assert list(said) == ["What does a call gain?", "How near is it to the ceiling?", "What limits it?"]
    mean = 1.1 ** (1 / 3)
    assert said["What does a call gain?"][0] == f"{text.percent(1 - 1 / mean)} less time"
    assert "at worst bf16-1x1K-h16, where flashmla takes 9.1\u00a0% less time" in said["What does a call gain?"][1]
    assert "Under sustained load, in 2 shapes: 25\u00a0% more energy." in said["What does a call gain?"][1]
    assert said["How near is it to the ceiling?"][0] == "80\u00a0%"


def test_table_of_shapes() -> None:
    """Confidence, and what was sustained, stand beside each shape."""
    read = of_shapes(millijoules={"etap": 50.0, "flashmla": 60.0}, uncertainty=0.012)
    table = tables.shapes(read, limits(read))
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert row["shape"] == "bf16-16x16K-h16"
    assert row["±"] == "1.2\u00a0%"
    assert (row["ETAP, µs"], row["of the ceiling"], row["flashmla"], row["limited by"]) == ("100", "80\u00a0%", "+10\u00a0%", "HBM")
    load = tables.load_of_shapes(read)
    assert load is not None
    row = dict(zip(load.head, load.rows[0], strict=True))
    assert (row["mJ a call"], row["W"], row["MHz"], row["its energy"]) == ("50.0", "500", "1,755", "+20\u00a0%")
    assert tables.load_of_shapes(of_shapes()) is None


def test_limits_come_from_the_model() -> None:
    """On a described card the words of `etap model`, for an FP8 cache the FP8 kernel's; on another one "not known", never a guess."""
    read = of_shapes()
    known = limits(read)
    assert known.gpu is not None and known.of_row == ["HBM", "fixed cost", "shared memory"]
    h100 = Device("cuda", "NVIDIA H100 80GB HBM3", 132, 50 << 20)
    fp8 = Shape.parse("e4m3-16x64K-h16")
    assert limits(made([Row(fp8.name, fp8, fp8.kv_bytes, measurement(US))], h100)).of_row == ["conversion"]
    for device in (CPU, Device("cuda", "NVIDIA X1", 132, 50 << 20)):
        unknown = of_shapes(device=device)
        assert set(limits(unknown).of_row) == {UNKNOWN}
        assert answers(unknown)["What limits it?"][0] == "not known"


ROWS = """
{"backend": "etap", "batch": 16, "context": 2048, "step": 12000.0, "attention": 2000.0, "host": 50}
{"batch": 64, "context": 2048, "step": 26000.0, "attention": 6000.0}
{"batch": 16, "context": 16384, "step": 15000.0, "attention": 4000.0}
{"batch": 16, "context": 16384, "step": 18000.0, "attention": 5000.0}
"""


def test_rest_of_a_step_as_measured() -> None:
    """Step without attention, between the batches at the nearest context, and no further than what was measured."""
    Path("rest.jsonl").write_text(ROWS)
    read = rest.read(Path("rest.jsonl"))
    assert read.known
    assert read.ms(16, 2048) == 10.0
    assert read.ms(40, 3000.0) == pytest.approx(15.0)  # half way from 16 to 64
    assert (read.ms(1, 100), read.ms(128, 100)) == (10.0, 20.0)
    assert read.ms(40, 12000) == 12.0  # the median of two
    steps = of_steps({"etap": 100.0})
    etap = first(steps, Given(rest=read))
    longest = max(row.shape.batch for row in steps.rows)
    assert longest > 16
    assert etap.step_ms[-1] == pytest.approx(6.1 + max(read.ms(row.shape.batch, row.shape.tokens / row.shape.batch) for row in steps.rows))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "rest rest.jsonl can't be read: No such file"),
        ("", "rest rest.jsonl has no rows; allowed: what bench_decode.py --rows writes on a GPU"),
        (
            '{"batch": 1, "context": 2048, "step": 12000.0}',
            "line 1: Object missing required field `attention`; allowed: what bench_decode.py",
        ),
        (ROWS + '{"batch": 1, "context": 2, "step": 3.0, "attention": 4.0}', "line 6: attention is 4; allowed: 0 to 3, the step"),
        ('{"batch": 0, "context": 2048, "step": 2.0, "attention": 1.0}', "line 1: Expected `int` >= 1"),
        ("batch=1 context=2048", "line 1: JSON is malformed"),
        ("\udcff", "line 1: "),
    ],
)
def test_a_rest_that_cant_be_used(content: str | None, words: str, measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        Path("rest.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    assert main(["report", str(measured), "--rest", "rest.jsonl"]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not Path("run.html").exists()


@pytest.mark.parametrize("option", ["--rest-ms", "--itl-limit", "--card-price"])
def test_shapes_have_no_steps(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An option that changes nothing was taken without a word."""
    results.write(Path("shapes.json"), of_shapes())
    assert main(["report", "shapes.json", option, "3"]) == 2
    assert capsys.readouterr().err.startswith(f"etap report: {option} is given with 3 shapes; allowed: with the steps of a workload")


def test_limits_are_counted_in_an_order() -> None:
    """Ties were in the order of a set, which is another one in every process."""
    assert Limits(["b", "c", "a", "c", "b"], "", None).words == ["b", "c", "a"]


def test_one_rest_only(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(measured), "--rest", "rest.jsonl", "--rest-ms", "3"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234.5, "1,230"), (99.96, "100"), (0.012345, "0.0123"), (-5.5, "\u22125.50"), (None, "\u2013"), (float("nan"), "\u2013")],
)
def test_significant_figures(value: float | None, shown: str) -> None:
    assert text.significant(value) == shown


def test_units_fit() -> None:
    """Times of a CPU were printed as 742990.7 µs, its bandwidth as 0.00109 TB/s."""
    assert text.duration(742990.7) == "743\u00a0ms"
    assert text.duration(88.84) == "88.8\u00a0µs"
    assert text.rate_unit([1.09e9], "B/s").named(1.09e9) == "1.09\u00a0GB/s"
    assert (text.percent(0.874), text.percent(0.0123), text.percent(172.4)) == ("87\u00a0%", "1.2\u00a0%", "172 times")
    assert (text.difference(1.104), text.difference(0.985), text.difference(13.46)) == ("+10\u00a0%", "\u22121.5\u00a0%", "13.5 times")


def test_results_are_left_alone(measured: Path) -> None:
    """The report of a run that goes on must not change what it goes on from."""
    before = measured.read_bytes()
    read = results.read(measured)
    page.write(read, Given(itl_limit_ms=5.0), Path("page.html"))
    assert measured.read_bytes() == before
    assert msgspec.json.encode(read) == msgspec.json.encode(results.read(measured))


def test_nothing_but_a_report_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    """`etap report run.json -o run.json` wrote the page over the measurements, `-o` of a text, or a picture's place, over those."""
    for name, output in (("run.json", "run.json"), ("run.json", "link.html"), ("page-latency.png", "page.html"), ("run.json", "notes")):
        results.write(Path(name), of_steps())
        Path("link.html").unlink(missing_ok=True)
        Path("link.html").symlink_to("run.json")
        Path("notes").write_text("mine")
        before = {path: path.read_bytes() for path in Path().iterdir()}
        assert main(["report", name, "-o", output]) == 1
        said = capsys.readouterr().err
        kind = "PNG" if name.endswith("png") else "HTML page"
        assert f"can't be written: it is there and is no {kind}; allowed: a new file, or an earlier one of this kind" in said
        assert said.count("\n") == 1
        assert {path: path.read_bytes() for path in Path().iterdir()} == before
    Path("page-latency.png").unlink()
    Path("page.html").touch()
    for _ in range(2):
        assert main(["report", "run.json", "-o", "page.html"]) == 0


def folder() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


def test_a_report_is_written_whole_or_not_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    """With a folder in the place of one picture, the page and the pictures before it were of the new run and the rest of the old."""
    results.write(Path("run.json"), of_steps())
    assert main(["report", "run.json", "-o", "page.html"]) == 0
    Path("page-roofline.png").unlink()
    Path("page-roofline.png").mkdir()
    before = folder()
    results.write(Path("run.json"), of_steps({**US, "etap": 50.0}))
    capsys.readouterr()
    assert main(["report", "run.json", "-o", "page.html"]) == 1
    assert capsys.readouterr() == ("", "etap report: page-roofline.png can't be written: Is a directory\n")
    assert {**folder(), "run.json": b""} == {**before, "run.json": b""}


FULL = """
import resource, sys
from etap_py.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("command", [["report", "run.json", "-o", "page.html"], ["history", "page", "page.html"]])
def test_a_full_disk_keeps_the_earlier_page(command: list[str]) -> None:
    """A file was cut off where the disk was full, and the sentence named no file: an OSError of write() has no name."""
    results.write(Path("run.json"), of_shapes())
    assert main(["history", "store", "run.json"]) == 0
    assert main(command) == 0
    before = folder()
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'bench'}:{root}"}
    done = subprocess.run([sys.executable, "-c", FULL, "4096", *command], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"etap {command[0]}: page.html can't be written: File too large\n"
    assert folder() == before


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        (1, ["--table", "csv", "--itl-limit", "5"], "--itl-limit is given with --table; allowed: without it"),
        (1, ["--table", "markdown", "--rent", "5"], "--rent is given with --table; allowed: without it"),
        (1, ["--table", "csv", "-o", "x.html"], "--output is given with --table; allowed: without it"),
        (1, ["--json", "-o", "x.html"], "--output is given with --json; allowed: without it"),
        (2, ["--table", "csv", "--rest-ms", "5"], "--rest-ms is given with 2 files; allowed: with one"),
        (1, ["--json", "--table", "csv"], "argument --table: not allowed with argument --json"),
        (2, ["--json", "--table", "csv"], "argument --table: not allowed with argument --json"),
    ],
)
def test_options_that_do_nothing(files: int, options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They were taken without a word, and of --json and --table another one won for one file than for two."""
    results.write(Path("run.json"), of_steps())
    with contextlib.suppress(SystemExit):
        assert main(["report", *["run.json"] * files, *options]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.out == ""
    assert [path.name for path in Path().iterdir()] == ["run.json"]
