"""The command `etap report`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etap_py import terminal
from etap_py.files import cant_write
from etap_py.options import amount
from etap_py.terminal import Column

from etap_bench.errors import Refused

if TYPE_CHECKING:
    from etap_bench.report.summary import Given
    from etap_bench.results import Results

_PRICES = ("card_price", "years", "utilisation", "power_price", "pue", "rent", "currency")
_OF_STEPS = ("rest_ms", "rest", "itl_limit", *_PRICES)
_OF_PAGE = ("output", *_OF_STEPS)
_DESCRIPTION = """Makes one HTML page, which needs nothing but itself, and a PNG of each figure from the file that `etap bench` wrote: what
ETAP gains, what limits it, and what it saves. Two files and more - other commits, other cards - are compared with the first: how many times
as fast, and what moved beyond the noise."""


def add_parser(commands: Any) -> None:
    """Adds `report` to the subparsers of `etap`. Exit status: 0; 1 when a file can't be written; 2 for input that can't be used."""
    parser = commands.add_parser("report", help="an HTML page and PNGs from what `etap bench` measured", description=_DESCRIPTION)
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="the JSON file of `etap bench`")
    add("--output", "-o", type=Path, metavar="FILE", help="the HTML file; PNGs lie beside it (default: RESULTS with .html)")
    printed = parser.add_mutually_exclusive_group().add_argument
    printed("--json", action="store_true", help="print the report's numbers as JSON and write nothing")
    printed("--table", choices=("csv", "markdown"), help="print a table of the rows, or of the comparison, and write nothing")
    step = parser.add_argument_group("a whole decode step").add_mutually_exclusive_group()
    step.add_argument("--rest-ms", type=amount(), metavar="MS", help="of a step beside attention (default: 0, attention alone)")
    step.add_argument("--rest", type=Path, metavar="FILE", help="the same, as SGLang's bench_decode.py --rows measured it")
    add("--itl-limit", type=amount(above=True), metavar="MS", help="goodput: count answer tokens of steps that take at most so long")
    prices = parser.add_argument_group("prices (their defaults are guesses, which the page marks)")
    add = prices.add_argument
    add("--card-price", type=amount(), help="of one card with its share of the server (default: 35000)")
    add("--years", type=amount(0.1), help="over which the card is written off (default: 3)")
    add("--utilisation", type=amount(0, 1, above=True), help="share of the time in which the card works (default: 0.6)")
    add("--power-price", type=amount(), help="of a kWh (default: 0.25)")
    add("--pue", type=amount(1), help="the building's power for each watt of the cards (default: 1.3)")
    add("--rent", type=amount(), help="of one card for an hour")
    add("--currency", help="of all prices (default: EUR)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except Refused as refused:
        terminal.complain(f"etap report: {refused}")
        return 2
    except OSError as failure:
        terminal.complain(f"etap report: {cant_write(failure)}")
        return 1


def _run(options: argparse.Namespace) -> int:
    runs = [_read(path) for path in options.results]
    if len(runs) > 1:
        return _compare(runs, options)
    (read,), (path,) = runs, options.results
    if options.json:
        _refuse(options, ("output",), "--json", "without it, with which nothing is written")
    if options.table:
        from etap_bench.table import COLUMNS, cells

        _refuse(options, _OF_PAGE, "--table", "without it, for a table has the rows alone")
        _print_table(options.table, list(COLUMNS), [cells(row) for row in read.rows])
        return 0
    given = _given(read, options)
    if options.json:
        terminal.write(json.dumps(_numbers(read, given), indent=2))
        return 0
    from etap_bench.report import page

    written = page.write(read, given, options.output or path.with_suffix(".html"))
    terminal.write("\n".join(map(str, written)))
    return 0


def _read(path: Path) -> Results:
    from etap_bench import results

    try:
        return results.read(path)
    except OSError as failure:
        raise Refused(f"{path} can't be read: {failure.strerror}") from failure


def _refuse(options: argparse.Namespace, idle: Sequence[str], given: str, allowed: str) -> None:
    """Raises Refused where an option of `idle` is given, which would change nothing."""
    for name in idle:
        if getattr(options, name) is not None:
            raise Refused(f"--{name.replace('_', '-')} is given with {given}; allowed: {allowed}")


def _compare(runs: list[Results], options: argparse.Namespace) -> int:
    """The later runs beside the first."""
    from etap_bench import compare
    from etap_bench.report.text import significant

    _refuse(options, _OF_PAGE, f"{len(runs)} files", "with one, of which a page is made")
    labels = compare.labels(runs, options.results)
    head, rows = compare.head(labels), list(compare.rows(runs, compare.exact if options.table == "csv" else significant))
    if options.json:
        terminal.write(json.dumps(compare.as_dicts(runs, labels), indent=1))
    elif options.table:
        _print_table(options.table, head, rows)
    else:
        columns = [Column(name, right=name not in ("shape", "moved")) for name in head]
        terminal.table("Runs beside the first", columns, rows, "\n".join(compare.said(runs, labels)))
    return 0


def _print_table(how: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from etap_bench.table import as_csv, markdown

    terminal.write(as_csv(head, rows) if how == "csv" else markdown(head, rows, text=("shape", "best peer", "moved")))


def _given(read: Results, options: argparse.Namespace) -> Given:
    from etap_bench.report import rest
    from etap_bench.report.prices import Prices
    from etap_bench.report.summary import Given

    prices = {name: getattr(options, name) for name in _PRICES}
    if read.run.workload is None:
        _refuse(options, _OF_STEPS, read.title, "with the steps of a workload, which have a rest, tokens and costs")
    known = rest.read(options.rest) if options.rest else rest.Rest(options.rest_ms or 0.0)
    return Given(Prices.of(**prices), known, options.itl_limit)


def _numbers(read: Results, given: Given) -> dict[str, Any]:
    from dataclasses import asdict

    from etap_bench.report.limits import limits
    from etap_bench.report.summary import contenders
    from etap_bench.report.tiles import remarks, tiles

    answers = [asdict(tile) for tile in tiles(read, given, limits(read))]
    every = [asdict(contender) for contender in contenders(read, given)] if read.run.workload else []
    return {"tiles": answers, "remarks": remarks(read), "contenders": every}
