"""The report's tables: cells as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from etap_bench.report.limits import UNKNOWN, Limits
from etap_bench.report.prices import Prices
from etap_bench.report.summary import NOISE, Bucket, Contender, contender_names
from etap_bench.report.text import NOTHING, Unit, count, difference, energy_unit, label, percent, significant, time_unit
from etap_bench.results import Results

SLOWER = f"Slower, faster: by more than {NOISE:.0%} and than both medians are certain to."


@dataclass(frozen=True)
class Table:
    """head: of the columns, the first of which names the rows; words: which columns hold words"""

    caption: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: tuple[int, ...] = ()
    note: str = ""


def steps(everyone: Sequence[Contender], caption: str) -> Table:
    """Percentiles of the steps' time, and the difference from ETAP's."""
    unit = time_unit(c.step_ms[0] * 1e3 for c in everyone)
    head = ("", "steps", *(f"{name}, {unit.name}" for name in ("median", "90th", "99th", "longest")), "against ETAP", "slower", "faster")
    rows = []
    for c in everyone:
        times = (unit.of(ms * 1e3) for ms in c.step_ms)
        compared = (NOTHING,) * 3 if c.name == "etap" else (difference(c.against_etap), str(c.slower), str(c.faster))
        rows.append((label(c.name), str(c.steps), *times, *compared))
    return Table(caption, head, rows, note=f"90th, 99th: percentiles. Against ETAP: time of the steps that both computed. {SLOWER}")


def sizes(caption: str, first: str, rows: Sequence[Bucket], names: Sequence[str]) -> Table:
    unit = time_unit(us for row in rows for name, us in row.us.items() if name == "etap" or "etap" not in names)
    head = (first, "steps", *(f"{label(name)}, {unit.name}" for name in names), "of the ceiling", "limited by")
    body = []
    for row in rows:
        times = (_against(row.us.get(name), row.against_etap.get(name) if name != "etap" else None, unit) for name in names)
        body.append((row.label, str(row.steps), *times, percent(row.fraction), row.limit))
    return Table(caption, head, body, words=(len(head) - 1,))


def _against(us: float | None, ratio: float | None, unit: Unit) -> str:
    return unit.of(us) if us is None or ratio is None else f"{unit.of(us)} ({difference(ratio)})"


def limit_counts(results: Results, bounds: Limits) -> Table:
    rows = []
    for word in sorted(set(bounds.of_row), key=lambda word: -bounds.of_row.count(word)):
        fractions = sorted(r.measured.fraction for r, w in zip(results.rows, bounds.of_row, strict=True) if w == word and r.measured.fraction)
        spread = tuple(percent(fractions[i]) for i in (0, len(fractions) // 2, -1)) if fractions else (NOTHING,) * 3
        rows.append((word, str(bounds.of_row.count(word)), *spread))
    head = ("limited by", "steps" if results.run.workload else "shapes", "least of the ceiling", "median", "most")
    return Table("What limits ETAP, and how near it is to the ceiling", head, rows, note=f"Source: {bounds.source}.")


def server(everyone: Sequence[Contender], prices: Prices, limit_ms: float | None) -> Table:
    """What the whole server gives and takes. Columns that nobody has are left out."""
    unit = energy_unit(c.joules for c in everyone if c.joules is not None)
    head = ["", "tokens a second", f"goodput within {limit_ms or 0:g} ms", "steps within it", "watts", f"{unit.name} a million"]
    head += [f"{prices.currency} a million, own", f"{prices.currency} a million, rented"]
    rows = []
    for c in everyone:
        money = (significant(c.owned), significant(c.rented))
        within = (significant(c.goodput), percent(c.within))
        rows.append((label(c.name), significant(c.tokens_per_second), *within, significant(c.watts), unit.of(c.joules), *money))
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] != NOTHING for row in rows)]
    return Table("Answer tokens, energy and cost", tuple(head[i] for i in kept), [tuple(row[i] for i in kept) for row in rows])


def checks(results: Results) -> Table:
    """Who was compared with float64, how far off it was, and who is missing where."""
    rows = []
    names = [*contender_names(results), *(name for row in results.rows for name in {**row.measured.skipped, **row.wrong})]
    for name in dict.fromkeys(names):
        reasons = [why for row in results.rows for n, why in {**row.measured.skipped, **row.wrong}.items() if n == name]
        errors = [row.measured.worst_row_error[name] for row in results.rows if name in row.measured.worst_row_error]
        missing = f"{reasons[0]} ({len(reasons)} of {len(results.rows)})" if reasons else NOTHING
        off = f"{max(errors):.1e}" if errors else NOTHING
        rows.append((label(name), str(sum(name in row.measured.times for row in results.rows)), off, missing))
    what = "steps" if results.run.workload else "shapes"
    note = "Error: the largest of a row, over its norm, against float64. Rounding to BF16 gives about 2e-3 whatever the kernel."
    return Table("Results that were checked", ("", what, "worst error", "left out where, and why"), rows, words=(3,), note=note)


def shapes(results: Results, bounds: Limits) -> Table:
    """A row for each shape; of others the time and its difference from ETAP's."""
    names = [name for name in contender_names(results) if name != "etap"]
    unit = time_unit(row.measured.us.get("etap", 0.0) for row in results.rows)
    times = ("ceiling", "ETAP", "±", "99th", *map(label, names))
    head = ("shape", *(name if name == "±" else f"{name}, {unit.name}" for name in times), "of the ceiling", "± ", "plan, µs", "limited by")
    rows = []
    for row, limit in zip(results.rows, bounds.of_row, strict=True):
        m, ours = row.measured, row.measured.times.get("etap")
        sure = percent(ours.uncertainty) if ours and ours.low is not None else NOTHING
        others = (_against(m.us.get(name), m.us[name] / m.us["etap"] if {name, "etap"} <= m.times.keys() else None, unit) for name in names)
        own = (unit.of(m.ceiling_us), unit.of(m.etap_us), sure, unit.of(ours.p99 if ours else None))
        nearness = (percent(m.fraction), percent(m.uncertainty) if m.fraction else NOTHING)
        rows.append((row.name, *own, *others, *nearness, significant(m.plan_us), limit if limit != UNKNOWN else NOTHING))
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] != NOTHING for row in rows)]
    note = (
        "Medians of one layer's call. ±: half of the interval in which the median lies with 95 % confidence; of a fraction, both intervals "
        f"together. 99th: percentile of the rounds. {_others(names)}"
    )
    words = (kept.index(len(head) - 1),) if len(head) - 1 in kept else ()
    return Table(f"{count(len(rows), 'shape')}", tuple(head[i] for i in kept), [tuple(row[i] for i in kept) for row in rows], words, note)


def _others(names: Sequence[str]) -> str:
    return "In brackets: the difference from ETAP's time." if names else ""


def sustained(results: Results) -> Table | None:
    """One contender alone for some seconds; None: it was not measured."""
    every = [(row, name, one) for row in results.rows for name, one in row.measured.sustained.items() if name in row.measured.times]
    if not every:
        return None
    unit = time_unit(one.us for _, name, one in every if one.us and name == "etap")
    rows = []
    for row, name, one in every:
        against = difference(one.us / row.measured.us[name]) if one.us else NOTHING
        clock = f"{one.sm_mhz:,}" if one.sm_mhz else NOTHING
        rows.append((row.name, label(name), unit.of(one.us), against, significant(one.millijoules), significant(one.watts), clock))
    head = ("step" if results.run.workload else "shape", "contender", unit.name, "against the rounds", "mJ a call", "W", "MHz")
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] != NOTHING for row in rows)]
    note = f"Each alone for {results.run.sustain:g} s, whose power limit may lower the clock; the rounds are short. Energy is the card's own counter's."
    if all(one.millijoules is None for _, _, one in every):
        note = f"Each alone for {results.run.sustain:g} s. This device counts no energy that a program may read."
    return Table("Under sustained load", tuple(head[i] for i in kept), [tuple(row[i] for i in kept) for row in rows], (1,), note)
