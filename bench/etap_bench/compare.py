"""Runs beside each other: other commits, other cards, other days."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from msgspec import Struct

from etap_bench.errors import Refused
from etap_bench.measurement import Measurement, apart
from etap_bench.report.text import significant
from etap_bench.results import Results, Row

# Of a ratio between two runs: on one card they differ by less than 2 % though nothing has changed, more than their rounds do.
NOISE = 0.03
WHAT_IS_NOISE = f"{NOISE * 100:g} % or the medians' uncertainty, whichever is more"
NO_UNCERTAINTY = "fewer than six rounds give no uncertainty"


@dataclass(frozen=True)
class Change:
    """A row of both runs.

    speedup: how many times as fast the later is
    fraction: its fraction of the ceiling over that of the earlier; None where one has none. On one card it decides, for other clocks and
        neighbours move both: on two, `speedup`.
    """

    name: str
    before: Measurement
    after: Measurement
    speedup: float
    fraction: float | None
    same_card: bool

    @property
    def by_fraction(self) -> bool:
        return self.same_card and self.fraction is not None

    @property
    def ratio(self) -> float:
        """The one that decides."""
        return self.fraction if self.same_card and self.fraction is not None else self.speedup

    @property
    def uncertainty(self) -> float:
        """Of the medians that `ratio` is of, together; infinite where it is not known."""
        return sum(_uncertainty(of, self.by_fraction) for of in (self.before, self.after))

    @property
    def moved(self) -> str:
        """ "faster", "slower", "" within the noise, or "unknown": by more than NOISE, but few rounds give no uncertainty."""
        return {1: "faster", -1: "slower", 0: "", None: "unknown"}[apart(self.ratio, NOISE, self.uncertainty)]


def _uncertainty(of: Measurement, by_fraction: bool) -> float:
    """0 where medians alone were kept, as a script did before `etap bench`: NOISE is more than what its runs differed by."""
    ours = of.times["etap"]
    if ours.p90 is None:
        return 0.0
    return of.uncertainty if by_fraction else ours.uncertainty


def changes(before: Results, after: Results) -> list[Change]:
    """Of ETAP in the rows that both have. Raises Refused where that is none, or the steps are of different work."""
    if different := list(_differences(before, after)):
        raise Refused(f"the runs are of different work: {', '.join(different)}; allowed: the same workload, or shapes")
    earlier = {row.name: row for row in before.rows}
    same_card = before.run.device.title == after.run.device.title
    pairs = [(earlier[row.name], row) for row in after.rows if row.name in earlier]
    pairs = [(old, new) for old, new in pairs if old.shape == new.shape and old.measured.etap_us and new.measured.etap_us]
    if not pairs:
        raise Refused(
            f"the runs have no shape in common that ETAP computed; the first has {len(before.rows)}, the second {len(after.rows)}"
        )
    return [_change(old, new, same_card) for old, new in pairs]


def _differences(before: Results, after: Results) -> Iterator[str]:
    """Of the work of two runs. Two traces are one where their contents are, whatever their paths."""
    one, two = before.run.workload, after.run.workload
    if one is None or two is None:
        if one is not two:
            yield " and ".join("shapes" if run is None else f"steps of {run.name}" for run in (one, two))
        return
    for name, first, second in _unequal(one, two):
        if name not in ("name", "description", "trace"):
            yield f"{name} is {first!r} and {second!r}" if isinstance(first, (str, int, float)) else f"{name} differ"
    if before.run.workload_digest != after.run.workload_digest:
        yield f"the traces {one.trace or '(none)'} and {two.trace or '(none)'} have other contents"


def _unequal(one: Struct, two: Struct, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields, by their dotted names, in which two of the same type differ."""
    for name in one.__struct_fields__:
        first, second = getattr(one, name), getattr(two, name)
        if isinstance(first, Struct):
            yield from _unequal(first, second, f"{prefix}{name}.")
        elif first != second:
            yield f"{prefix}{name}", first, second


def _change(old: Row, new: Row, same_card: bool) -> Change:
    before, after = old.measured, new.measured
    fractions = after.fraction / before.fraction if after.fraction and before.fraction else None
    return Change(
        name=new.name,
        before=before,
        after=after,
        speedup=(before.etap_us or 0) / (after.etap_us or 1),
        fraction=fractions,
        same_card=same_card,
    )


def labels(runs: Sequence[Results], paths: Sequence[Path]) -> list[str]:
    """What tells each run from the others: card where they differ, tree, day; and the file where this is not enough."""
    same_card = len({run.run.device.title for run in runs}) == 1
    made = [run.source if same_card else f"{run.run.device.title}, {run.source}" for run in runs]
    if len(set(made)) == len(made):
        return made
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else map(str, paths)
    return [f"{name}: {label}" for name, label in zip(names, made, strict=True)]


def head(labels: Sequence[str]) -> list[str]:
    """Of the table of `rows`."""
    names = ["shape", f"µs: {labels[0]}"]
    for label in labels[1:]:
        names += [f"µs: {label}", "times as fast", "of the ceiling", "moved"]
    return names


def rows(runs: Sequence[Results], shown: Callable[[float], str] = significant) -> Iterator[list[str]]:
    """A line for each row of the first run that another has too: its µs, and for each other run µs, how many times as fast, the two
    fractions of the ceiling, and what moved beyond the noise. shown: how numbers are written. Raises Refused."""
    others = [{change.name: change for change in changes(runs[0], run)} for run in runs[1:]]
    for row in runs[0].rows:
        if row.measured.etap_us and any(row.name in other for other in others):
            yield [row.name, shown(row.measured.etap_us), *(cell for other in others for cell in _cells(other.get(row.name), shown))]


def exact(value: float) -> str:
    """For machines."""
    return f"{value:.9g}"


def _cells(change: Change | None, shown: Callable[[float], str]) -> list[str]:
    if change is None:
        return [""] * 4
    fractions = [of.fraction for of in (change.before, change.after) if of.fraction]
    return [
        shown(change.after.etap_us or 0),
        shown(change.speedup),
        " → ".join(map(shown, fractions)) if len(fractions) == 2 else "",
        change.moved,
    ]


def said(runs: Sequence[Results], labels: Sequence[str]) -> list[str]:
    """A sentence for each run after the first."""
    sentences = []
    for run, label in zip(runs[1:], labels[1:], strict=True):
        found = changes(runs[0], run)
        mean = geometric_mean(change.speedup for change in found)
        moved = Counter(change.moved for change in found)
        what = "fraction of the ceiling" if all(change.by_fraction for change in found) else "time"
        sentences.append(
            f"{label}: {significant(mean)} times as fast over {len(found)} (geometric mean); by {what}, {moved['faster']} faster "
            f"and {moved['slower']} slower beyond the noise, {moved['']} as before"
            + (f", {moved['unknown']} unknown: {NO_UNCERTAINTY}" if moved["unknown"] else "")
        )
    return sentences


def as_dicts(runs: Sequence[Results], labels: Sequence[str]) -> list[dict[str, Any]]:
    """For JSON: the first with each of the others. Raises Refused."""
    return [_as_dict(runs[0], run, labels[0], label) for run, label in zip(runs[1:], labels[1:], strict=True)]


def _as_dict(before: Results, after: Results, *labels: str) -> dict[str, Any]:
    return {
        "before": labels[0],
        "after": labels[1],
        "rows": [
            {
                "name": change.name,
                "before_us": change.before.etap_us,
                "after_us": change.after.etap_us,
                "speedup": change.speedup,
                "fraction_ratio": change.fraction,
                "noise": max(NOISE, change.uncertainty) if math.isfinite(change.uncertainty) else None,
                "moved": change.moved,
            }
            for change in changes(before, after)
        ],
    }
