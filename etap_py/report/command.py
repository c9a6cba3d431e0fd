"""The command `etap report`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_DESCRIPTION = """Makes one HTML page, which needs nothing but itself, and a PNG of each figure from the file that `etap bench` wrote. With
prices it says what a million tokens cost on a card of one's own and on a rented one."""


def add_parser(commands: Any) -> None:
    """Adds `report` to the subparsers of `etap`. Exit status: 0; 1 when a file can't be written; 2 for input that can't be used."""
    parser = commands.add_parser("report", help="an HTML page and PNGs from what `etap bench` measured", description=_DESCRIPTION)
    add = parser.add_argument
    add("results", type=Path, help="the JSON file of `etap bench`")
    add("--output", "-o", type=Path, metavar="FILE", help="the HTML file; PNGs lie beside it (default: RESULTS with .html)")
    add("--card-price", type=_amount, help="of one card with its share of the server")
    add("--years", type=_positive, default=3.0, help="over which the card is written off (default: 3)")
    add("--utilisation", type=_positive, default=0.6, help="share of the time in which the card works (default: 0.6)")
    add("--power-price", type=_amount, help="of a kWh")
    add("--pue", type=_positive, default=1.3, help="the building's power for each watt of the server (default: 1.3)")
    add("--rent", type=_amount, help="of one card for an hour")
    add("--currency", default="EUR", help="of all prices (default: EUR)")
    add("--rest-ms", type=_amount, default=0.0, help="milliseconds of a decode step beside attention (default: 0, attention alone)")
    add("--json", action="store_true", help="print the report's numbers as JSON and write nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dataclasses import asdict, fields

    from etap_py.bench import results
    from etap_py.bench.errors import Refused
    from etap_py.report import page, summary

    prices = summary.Prices(**{field.name: getattr(options, field.name) for field in fields(summary.Prices)})
    try:
        read = results.read(options.results)
        if options.json:
            all_contenders = summary.contenders(read, prices)
            said = {"verdict": summary.verdict(read, all_contenders), "contenders": [asdict(c) for c in all_contenders]}
            print(json.dumps(said, indent=2))
            return 0
        output = options.output or options.results.with_suffix(".html")
        for path in page.write(read, prices, output):
            print(path)
    except Refused as refused:
        print(f"etap report: {refused}", file=sys.stderr)
        return 2
    except OSError as failure:
        print(f"etap report: {failure}", file=sys.stderr)
        return 1
    return 0


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not an amount; allowed: 0 and more")
    return value


def _positive(text: str) -> float:
    value = _amount(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value
