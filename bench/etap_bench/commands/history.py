"""The command `etap history`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from etap_py import terminal
from etap_py.files import cant_write, check_replaceable, write_all

from etap_bench.errors import Refused

_DESCRIPTION = """Keeps the files that `etap bench` wrote of shapes in a folder, by card, for version control; says what moved since the
last run of the same card; draws the trends. What moved is judged by the fraction of the ceiling, a ratio within one run, so that a card
with other clocks or neighbours does not look like a change."""


def add_parser(commands: Any) -> None:
    """Adds `history` to the subparsers of `etap`. Exit status: 0; 1 when a file can't be written; 2 for input that can't be used."""
    parser = commands.add_parser("history", help="runs under version control, and what moved since the last", description=_DESCRIPTION)
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, what in (
        ("compare", "what moved since the card's last stored run"),
        ("store", "the same, and add the run"),
        ("page", "an HTML page with the trend of every shape"),
    ):
        action = actions.add_parser(name, help=what, description=what)
        action.add_argument("file", type=Path, help="the HTML file to write" if name == "page" else "what `etap bench -o` wrote")
        action.add_argument("--store", type=Path, default=Path("benchmarks"), metavar="FOLDER", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    from etap_bench import history, results

    try:
        if options.action == "page":
            check_replaceable(options.file, "HTML page")
            write_all({options.file: history.page(options.store).encode()})
            terminal.write(str(options.file))
            return 0
        try:
            new = results.read(options.file)
        except OSError as failure:
            raise Refused(f"{options.file} can't be read: {failure.strerror}") from failure
        stored = history.runs(history.folder_of(options.store, new.run.device))
        if options.action == "compare":
            _compare(stored, new)
            return 0
        path = history.add(new, options.store)
        try:
            _compare(stored, new)
        except Refused as incomparable:
            terminal.say(str(incomparable))
        terminal.write(f"stored in {path}")
    except Refused as refused:
        terminal.complain(f"etap history: {refused}")
        return 2
    except OSError as failure:
        terminal.complain(f"etap history: {cant_write(failure)}")
        return 1
    return 0


def _compare(stored: list[Any], new: Any) -> None:
    from etap_py.terminal import Column, Mark

    from etap_bench.compare import NO_UNCERTAINTY, WHAT_IS_NOISE, changes
    from etap_bench.report.text import difference, significant

    card = new.run.device.title
    if not stored:
        terminal.write(f"{card}: no stored run to compare {len(new.rows)} shapes with")
        return
    found = changes(stored[-1], new)
    moved = sorted((change for change in found if change.moved), key=lambda change: change.ratio)
    unknown = sum(change.moved == "unknown" for change in moved)
    title = f"{card}: {len(moved) - unknown} of {len(found)} shapes moved beyond the noise ({WHAT_IS_NOISE}) since {stored[-1].source}"
    if unknown:
        title += f", and {unknown} may have: {NO_UNCERTAINTY}"
    if not moved:
        terminal.write(title)
        return
    colours = {"faster": "green", "slower": "red", "unknown": "yellow"}
    rows = [
        (
            *(change.name, significant(change.before.fraction), significant(change.after.fraction)),
            Mark(difference(change.ratio), colours[change.moved]),
            *(significant(change.before.etap_us), significant(change.after.etap_us)),
        )
        for change in moved
    ]
    columns = [Column("shape"), *(Column(name, right=True) for name in ("of the ceiling then", "now", "change", "µs then", "now"))]
    terminal.table(title, columns, rows)
