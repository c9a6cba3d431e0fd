"""The command `etap report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etap_py import terminal
from etap_py.files import cant_write
from etap_py.options import amount

from etap_bench.errors import Refused

if TYPE_CHECKING:
    from etap_bench.report.summary import Given
    from etap_bench.results import Results

_PRICES = ("card_price", "years", "utilisation", "power_price", "pue", "rent", "currency")
_DESCRIPTION = """Makes one HTML page, which needs nothing but itself, and a PNG of each figure from the file that `etap bench` wrote: what
ETAP gains, what limits it, and what it saves. Two files and more are compared."""


def add_parser(commands: Any) -> None:
    """Adds `report` to the subparsers of `etap`. Exit status: 0; 1 when a file can't be written; 2 for input that can't be used."""
    parser = commands.add_parser("report", help="an HTML page and PNGs from what `etap bench` measured", description=_DESCRIPTION)
    add = parser.add_argument
    add("results", type=Path, nargs="+", help="the JSON file of `etap bench`")
    add("--output", "-o", type=Path, metavar="FILE", help="the HTML file; PNGs lie beside it (default: RESULTS with .html)")
    add("--json", action="store_true", help="print the report's numbers as JSON and write nothing")
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
    if len(options.results) > 1:
        from etap_bench import compare

        return compare.run(options)
    from etap_bench import results

    (path,) = options.results
    try:
        read = results.read(path)
    except OSError as failure:
        raise Refused(f"{path} can't be read: {failure.strerror}") from failure
    given = _given(read, options)
    if options.json:
        terminal.write(json.dumps(_numbers(read, given), indent=2))
        return 0
    from etap_bench.report import page

    written = page.write(read, given, options.output or path.with_suffix(".html"))
    terminal.write("\n".join(map(str, written)))
    return 0


def _given(read: Results, options: argparse.Namespace) -> Given:
    from etap_bench.report import rest
    from etap_bench.report.prices import Prices
    from etap_bench.report.summary import Given

    prices = {name: getattr(options, name) for name in _PRICES}
    of_steps = {"rest_ms": options.rest_ms, "rest": options.rest, "itl_limit": options.itl_limit, **prices}
    idle = [f"--{name.replace('_', '-')}" for name, value in of_steps.items() if value is not None]
    if idle and read.run.workload is None:
        raise Refused(f"{idle[0]} is given with {read.title}; allowed: with the steps of a workload, which have a rest, tokens and costs")
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
