"""Results as a table with a row for each shape or step: what a terminal, CSV and Markdown show."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import geometric_mean

from etap_bench.results import Results, Row

# The name of each column, and whether it goes first where there is no room.
COLUMNS = {
    "shape": False,
    "ceiling µs": False,
    "ETAP µs": False,
    "±": True,
    "p99": True,
    "TB/s": True,
    "of the ceiling": False,
    "plan µs": True,
    "error": True,
    "MHz": True,
    "sustained µs": False,
    "mJ": False,
    "W": True,
    "sustained MHz": True,
    "best peer": False,
}


def cells(row: Row, time: Callable[[float], str] = "{:.1f}".format) -> tuple[str, ...]:
    """In the order of COLUMNS; "" for what was not measured. time: how microseconds are written."""

    def us_of(value: float | None) -> str:
        return "" if value is None else time(value)

    measured = row.measured
    ours, sustained = measured.times.get("etap"), measured.sustained.get("etap")
    peer = measured.best_peer
    us = measured.etap_us
    return (
        row.name,
        us_of(measured.ceiling_us),
        us_of(us) if us else "no",
        _number(ours.uncertainty, ".1%") if ours and ours.low is not None else "",
        us_of(ours.p99 if ours else None),
        _number(row.shape.kv_bytes / us / 1e6 if us else None, ".3g"),
        _number(measured.fraction, ".2f"),
        us_of(measured.plan_us if us else None),
        _number(measured.error.get("etap"), ".1e"),
        str(measured.sm_mhz or ""),
        us_of(sustained.us if sustained else None),
        _number(sustained.millijoules if sustained else None, ".1f"),
        _number(sustained.watts if sustained else None, ".0f"),
        str(sustained.sm_mhz or "") if sustained else "",
        f"{peer} {time(measured.us[peer])}" + (f" ({measured.us[peer] / us:.2f}x)" if us else "") if peer else "",
    )


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def geometric_means(done: Results, groups: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, float, int]]:
    """Of the fractions of each group's shapes: (group, mean, number of shapes)."""
    for group, names in groups.items():
        fractions = [row.measured.fraction for row in done.rows if row.name in names and row.measured.fraction]
        if fractions:
            yield group, geometric_mean(fractions), len(fractions)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[str]) -> str:
    """Columns that are not in `text` are set to the right."""
    rule = ["---" if name in text else "---:" for name in head]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def as_csv(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")
