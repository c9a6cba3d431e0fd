"""The command `etap report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from etap_py import terminal
from etap_py.files import cant_write
from etap_py.options import amount

_DESCRIPTION = """Makes one HTML page, which needs nothing but itself, and a PNG of each figure from the file that `etap bench` wrote. With
prices it says what a million tokens cost on a card of one's own and on a rented one."""


def add_parser(commands: Any) -> None:
    """Adds `report` to the subparsers of `etap`. Exit status: 0; 1 when a file can't be written; 2 for input that can't be used."""
    parser = commands.add_parser("report", help="an HTML page and PNGs from what `etap bench` measured", description=_DESCRIPTION)
    add = parser.add_argument
    add("results", type=Path, help="the JSON file of `etap bench`")
    add("--output", "-o", type=Path, metavar="FILE", help="the HTML file; PNGs lie beside it (default: RESULTS with .html)")
    add("--card-price", type=amount(), help="of one card with its share of the server")
    add("--years", type=amount(0.1), default=3.0, help="over which the card is written off (default: 3)")
    add("--utilisation", type=amount(0, 1, above=True), default=0.6, help="share of the time in which the card works (default: 0.6)")
    add("--power-price", type=amount(), help="of a kWh")
    add("--pue", type=amount(1), default=1.3, help="the building's power for each watt of the server (default: 1.3)")
    add("--rent", type=amount(), help="of one card for an hour")
    add("--currency", default="EUR", help="of all prices (default: EUR)")
    add("--rest-ms", type=amount(), default=0.0, help="milliseconds of a decode step beside attention (default: 0, attention alone)")
    add("--json", action="store_true", help="print the report's numbers as JSON and write nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dataclasses import asdict, fields

    from etap_bench import results
    from etap_bench.errors import Refused
    from etap_bench.report import summary

    prices = summary.Prices(**{field.name: getattr(options, field.name) for field in fields(summary.Prices)})
    try:
        try:
            read = results.read(options.results)
        except OSError as failure:
            raise Refused(f"{options.results} can't be read: {failure.strerror}") from failure
        if options.json:
            all_contenders = summary.contenders(read, prices)
            said = {"verdict": summary.verdict(read, all_contenders), "contenders": [asdict(c) for c in all_contenders]}
            terminal.write(json.dumps(said, indent=2))
            return 0
        from etap_bench.report import page

        output = options.output or options.results.with_suffix(".html")
        written = page.write(read, prices, output)
    except Refused as refused:
        terminal.complain(f"etap report: {refused}")
        return 2
    except OSError as failure:
        terminal.complain(f"etap report: {cant_write(failure)}")
        return 1
    terminal.write("\n".join(map(str, written)))
    return 0
