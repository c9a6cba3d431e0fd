"""Puts the report together: which tables and figures stand in which section. Computes and draws nothing."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from etap_py.files import check_replaceable, write_all
from markupsafe import Markup, escape

from etap_bench.report import tables
from etap_bench.report.figures import plots
from etap_bench.report.limits import Limits, limits
from etap_bench.report.summary import Given, buckets, contender_names, contenders, drawn_names, workload
from etap_bench.report.tables import Table
from etap_bench.report.text import count, label
from etap_bench.report.tiles import remarks, tiles
from etap_bench.results import Results


@dataclass
class Section:
    """In the order in which they are shown. plots: by name; code: a command"""

    title: str
    words: list[str] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    code: str = ""


def write(results: Results, given: Given, output: Path) -> list[Path]:
    """Writes `output`, an HTML file that refers to nothing outside itself, and a PNG of each figure beside it, into a folder that is made
    where there is none. Returns all paths.

    Raises Refused when nothing was measured, OSError when a file can't be written or is there and of another kind: nothing but an earlier
    report is replaced, and that by the whole of the new one.
    """
    bounds = limits(results)
    answers = tiles(results, given, bounds)
    drawn = plots(results, bounds, given) if contender_names(results) else {}
    beside = {name: output.with_name(f"{output.stem}-{name}.png") for name in drawn}
    output.parent.mkdir(parents=True, exist_ok=True)
    check_replaceable(output, "HTML page")
    for path in beside.values():
        check_replaceable(path, "PNG")
    loader = jinja2.PackageLoader("etap_bench.report", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["marked"] = _marked
    html = environment.get_template("page.html.j2").render(
        title=f"{results.title} on {results.run.device.name}",
        subtitle=_subtitle(results),
        tiles=answers,
        remarks=remarks(results),
        sections=[*(_of_steps if results.run.workload else _of_shapes)(results, given, bounds), _what_was_run(results)],
        plots=drawn,
        pictures={name: {dark: _data_uri(plot.svg(dark)) for dark in (False, True)} for name, plot in drawn.items()},
    )
    contents = {output: html.encode(), **{path: drawn[name].png() for name, path in beside.items()}}
    write_all(contents)
    return list(contents)


def _marked(text: str) -> Markup:
    """Options are set as code, and never broken after their dashes."""
    return Markup(re.sub(r"--[a-z]+(-[a-z]+)*", lambda option: f"<code>{option[0]}</code>", str(escape(text))))


def _data_uri(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _subtitle(results: Results) -> str:
    measured = f"{len(results.rows)} of {results.all_steps:,} decode steps" if results.run.workload else "one layer's call"
    return f"MLA decode attention with ETAP {results.run.software.get('etap', '')}, {measured}, {results.started[:10]}"


def _of_steps(results: Results, given: Given, bounds: Limits) -> list[Section]:
    everyone = contenders(results, given)
    if not everyone:
        return [_checks(results)]
    model, names = workload(results).model, contender_names(results)
    rest = given.rest
    if rest.by_context:
        whole = (
            f"Attention of all {model.layers} layers, and the rest of a step as SGLang's bench_decode measured it at the nearest context."
        )
    elif rest.known:
        whole = f"Attention of all {model.layers} layers, and {rest.constant_ms:g} ms for the rest of a step, as given."
    else:
        whole = f"Attention alone, of all {model.layers} layers: --rest-ms or --rest FILE adds the rest of a step."
    words = [f"{whole} ETAP's plan is included, once a step; the planning of others is not measured."]
    if names != drawn_names(results):
        words.append("PyTorch's operators, a reference that nobody serves with, are in the tables and not in the figures.")
    step = Section(
        "A decode step",
        words=words,
        plots=["latency", "gain"],
        tables=[tables.steps(everyone, "Time of a decode step" if rest.known else "Attention of a decode step, all layers")],
    )
    sizes = Section(
        "By context and batch",
        words=[
            "One layer's call. Tables: medians of steps of similar size, and how much more time others take than ETAP in the same steps."
        ],
        plots=["context", "batch"],
        tables=[
            tables.sizes(f"By {of}", first, buckets(results, bounds.of_row, of), names)
            for of, first in (("context", "tokens a sequence"), ("batch", "sequences"))
        ],
    )
    limit = [tables.limit_counts(results, bounds)]
    nearness = Section("The ceiling, and what limits a call", [_ceiling(results)], ["ceiling", "roofline"], limit)
    return [step, sizes, nearness, _server(results, given), _checks(results)]


def _of_shapes(results: Results, _: Given, bounds: Limits) -> list[Section]:
    if not contender_names(results):
        return [_checks(results)]
    of_all = [tables.shapes(results, bounds), tables.load_of_shapes(results), tables.limit_counts(results, bounds)]
    figures = ["shapes", "context", "batch", "ceiling", "roofline"]
    return [Section("Every shape", [_ceiling(results)], figures, [table for table in of_all if table]), _checks(results)]


def _ceiling(results: Results) -> str:
    copy = "a kernel" if results.run.device.kind == "cuda" else "a copy by PyTorch"
    return f"The ceiling is {copy} that brings the same shuffled pages from memory and does no arithmetic, timed in the same rounds."


def _server(results: Results, given: Given) -> Section:
    """What the whole server does, and what that rests on."""
    server, prices, everyone = workload(results).server, given.prices, contenders(results, given)
    priced, powered = any(c.owned is not None for c in everyone), any(c.watts is not None for c in everyone)
    several = f"Each of the {server.dp} groups, with requests of its own, gives as many" if server.dp > 1 else "The one group gives them"
    unmeasured = "this device counts none that a program may read" if results.run.device.kind == "cpu" else "no step was sustained"
    unequal = len({c.steps for c in everyone}) > 1
    notes = {
        "Attention alone: a whole model is slower and dearer.": not given.rest.known,
        "Answer tokens over the time of the measured steps, at this workload's batches; energy and cost of a million of them.": True,
        f"{several}; all {server.tp} cards draw power and cost money.": server.tp > 1,
        "Goodput: the tokens of steps within the limit, over the time of all steps.": given.itl_limit_ms is not None,
        "Watts are what cards draw in attention, by their own counters, and are taken to be drawn all the time: what a card draws in "
        "the rest of a step, idle or not, is not modelled, nor are the server's processors and fans.": powered,
        f"Energy was not measured: {unmeasured}.": not powered,
        **dict.fromkeys(prices.words(powered), priced),
        f"Rented: {prices.currency} {prices.rent or 0:g} a card and hour.": prices.rent is not None,
        "Contenders that took part in other steps had other work: compare those with the same number of steps.": unequal,
    }
    of_all = [tables.server(everyone, server, prices, given.itl_limit_ms), tables.load_of_steps(results)]
    return Section(
        "Tokens, energy and cost",
        tables=[table for table in of_all if table],
        notes=[note for note, holds in notes.items() if holds],
    )


def _checks(results: Results) -> Section:
    return Section("Correctness", ["Every result was compared with float64."], tables=[tables.checks(results)])


def _what_was_run(results: Results) -> Section:
    run = results.run
    words = [f"Medians of {count(run.rounds, 'round')} in which the contenders take turns: {', '.join(map(label, ('etap', *run.peers)))}."]
    if run.workload is not None:
        model = run.workload.model
        description = (run.workload.description or f"A request trace: {run.workload.trace}").strip()
        preset = f" of {run.workload.server.preset}" if run.workload.server.preset else ""
        sample = f"{len(results.rows)} of {results.all_steps:,} decode steps, evenly spaced"
        attention = (
            f"{model.heads} query heads on a card, {model.kv_format} cache in pages of {model.page_size}, {model.layers} layers{preset}"
        )
        words = [description, f"{sample}; {attention}.", *words]
    notes = [f"{name} {version}" for name, version in run.software.items()]
    notes += [f"commit {run.commit}"] if run.commit else []
    notes += [f"driver {run.device.driver}"] if run.device.driver else []
    notes += [f"power limit {run.device.power_limit_w:,.0f} W"] if run.device.power_limit_w else []
    again = "--step INDEX" if run.workload else "--filter NAME"
    return Section("How to repeat it", words, notes=[f"With {again} it measures one row. {', '.join(notes)}."], code=results.command)
