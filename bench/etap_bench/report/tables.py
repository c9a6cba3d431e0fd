"""The report's tables: cells as people read them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from etap_bench.measurement import ROW_ERROR_LIMIT
from etap_bench.report.limits import UNKNOWN, Limits
from etap_bench.report.prices import Prices
from etap_bench.report.summary import NOISE, Bucket, Contender, contender_names
from etap_bench.report.text import NOTHING, count, difference, energy_unit, label, percent, significant, time_unit
from etap_bench.results import Results
from etap_bench.workload import Server

SLOWER = f"Slower, faster: by more than {NOISE * 100:g}\u00a0% and than both medians are certain to; a dash: too few rounds to say."


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
    head = (
        "contender",
        "steps",
        *(f"{name}, {unit.name}" for name in ("median", "90th", "99th", "longest")),
        "against ETAP",
        "slower",
        "faster",
    )
    rows = []
    for c in everyone:
        times = (unit.of(ms * 1e3) for ms in c.step_ms)
        compared = (
            (NOTHING,) * 3
            if c.name == "etap"
            else (difference(c.against_etap), *(NOTHING if n is None else str(n) for n in (c.slower, c.faster)))
        )
        rows.append((label(c.name), str(c.steps), *times, *compared))
    return Table(caption, head, rows, note=f"90th, 99th: percentiles. Against ETAP: time of the steps that both computed. {SLOWER}")


def sizes(caption: str, first: str, rows: Sequence[Bucket], names: Sequence[str]) -> Table:
    """Of ETAP the time, of others the difference from it."""
    unit = time_unit(row.us["etap"] for row in rows if "etap" in row.us)
    others = [name for name in names if name != "etap"]
    head = (first, "steps", f"ETAP, {unit.name}", "of the ceiling", "limited by", *map(label, others))
    body = []
    for row in rows:
        differences = (difference(row.against_etap.get(name)) for name in others)
        body.append((row.label, str(row.steps), unit.of(row.us.get("etap")), percent(row.fraction), _limit(row.limit), *differences))
    return _without_empty(caption, head, body, (4,))


def _limit(word: str) -> str:
    return NOTHING if word == UNKNOWN else word


def limit_counts(results: Results, bounds: Limits) -> Table:
    rows: list[tuple[str, ...]] = []
    for word in bounds.words:
        of_word = [row.measured.fraction for row, limit in zip(results.rows, bounds.of_row, strict=True) if limit == word]
        fractions = [fraction for fraction in of_word if fraction]
        spread = [percent(of(fractions)) for of in (min, statistics.median, max)] if fractions else [NOTHING] * 3
        rows.append((word, str(len(of_word)), *spread))
    head = ("limited by", "steps" if results.run.workload else "shapes", "least of the ceiling", "median", "most")
    return Table("What limits ETAP, and how near it is to the ceiling", head, rows, note=f"Source: {bounds.source}.")


def server(everyone: Sequence[Contender], of: Server, prices: Prices, limit_ms: float | None) -> Table:
    """What the whole server gives and takes."""
    unit = energy_unit(c.joules for c in everyone if c.joules is not None)
    head = ["contender", "tokens a second", f"goodput within {limit_ms or 0:g}\u00a0ms", "steps within it"]
    head += ["watts", f"{unit.name} a million", f"{prices.currency} a million, own", f"{prices.currency} a million, rented"]
    rows = []
    for c in everyone:
        money = (significant(c.owned), significant(c.rented))
        within = (significant(c.goodput), percent(c.within))
        rows.append((label(c.name), significant(c.tokens_per_second), *within, significant(c.watts), unit.of(c.joules), *money))
    caption = "One device" if of.tp == 1 else f"The whole server: {count(of.tp, 'card')} in {count(of.dp, 'attention group')}"
    return _without_empty(caption, head, rows)


def checks(results: Results) -> Table:
    """Who was compared with float64, how far off it was, and who is missing where."""
    rows: list[tuple[str, ...]] = []
    names = [*contender_names(results), *(name for row in results.rows for name in {**row.measured.skipped, **row.wrong})]
    for name in dict.fromkeys(names):
        reasons = [why for row in results.rows for n, why in {**row.measured.skipped, **row.wrong}.items() if n == name]
        errors = [row.measured.worst_row_error[name] for row in results.rows if name in row.measured.worst_row_error]
        missing = f"{reasons[0]} ({len(reasons)} of {len(results.rows)})" if reasons else NOTHING
        off = percent(max(errors)) if errors else NOTHING
        rows.append((label(name), str(sum(name in row.measured.times for row in results.rows)), off, missing))
    what = "steps" if results.run.workload else "shapes"
    limit = f"{ROW_ERROR_LIMIT * 100:g}\u00a0%"
    note = f"Error: the largest of a row, of its norm. Rounding to BF16 gives about 0.2\u00a0%; from {limit} on it is wrong."
    return Table("Results that were checked", ("contender", what, "worst error", "left out where, and why"), rows, words=(3,), note=note)


def shapes(results: Results, bounds: Limits) -> Table:
    """A row for each shape; of others the difference from ETAP's time."""
    names = [name for name in contender_names(results) if name != "etap"]
    unit = time_unit(row.measured.us.get("etap", 0.0) for row in results.rows)
    times = (f"ceiling, {unit.name}", f"ETAP, {unit.name}", "±", f"99th, {unit.name}")
    head = ("shape", *times, "of the ceiling", "plan, µs", "limited by", *map(label, names))
    rows = []
    for row, limit in zip(results.rows, bounds.of_row, strict=True):
        m, ours = row.measured, row.measured.times.get("etap")
        sure = percent(ours.uncertainty if ours else None)
        others = (difference(m.us[name] / m.us["etap"] if {name, "etap"} <= m.times.keys() else None) for name in names)
        own = (unit.of(m.ceiling_us), unit.of(m.etap_us), sure, unit.of(ours.p99 if ours else None))
        rows.append((row.name, *own, percent(m.fraction), significant(m.plan_us), _limit(limit), *others))
    note = (
        "±: half of the interval in which ETAP's median lies with 95\u00a0% confidence, of the median; a dash: too few rounds. "
        "99th: percentile of the rounds."
        f"{' Others: how much more time they take than ETAP.' * bool(names)}"
    )
    return _without_empty("Medians of one layer's call", head, rows, (7,), note)


def load_of_steps(results: Results) -> Table | None:
    """Each contender alone for some seconds, over the steps in which all that were so measured took part; None: nothing was."""
    names = [name for name in contender_names(results) if any(name in row.measured.sustained for row in results.rows)]
    rows = [row for row in results.rows if all(name in row.measured.sustained and name in row.measured.times for name in names)]
    if not names or not rows:
        return None
    made = []
    for name in names:
        every = [row.measured.sustained[name] for row in rows]
        us, millijoules = sum(one.us or 0.0 for one in every), [one.millijoules for one in every if one.millijoules is not None]
        joules = sum(millijoules) if len(millijoules) == len(every) else None
        mhz = [one.sm_mhz for one in every if one.sm_mhz]
        ours = sum(row.measured.sustained["etap"].us or 0.0 for row in rows) if "etap" in names else 0.0
        made.append(
            (
                label(name),
                difference(us / ours) if ours and name != "etap" else NOTHING,
                difference(us / sum(row.measured.us[name] for row in rows)),
                significant(joules / len(every) if joules is not None else None),
                significant(joules / us * 1e3 if joules is not None and us else None),
                f"{statistics.median(mhz):,.0f}" if mhz else NOTHING,
            )
        )
    head = ("contender", "time against ETAP", "against its rounds", "mJ a call", "W a card", "MHz")
    return _without_empty("Under sustained load", head, made, (), f"{count(len(rows), 'step')}. {_sustaining(results)}")


def load_of_shapes(results: Results) -> Table | None:
    """ETAP alone for some seconds, and the best peer's difference from it; None: it was not measured."""
    sustained = [
        (row, one) for row in results.rows if (one := row.measured.sustained.get("etap")) and one.us and "etap" in row.measured.times
    ]
    if not sustained:
        return None
    unit = time_unit(one.us or 0.0 for _, one in sustained)
    made = []
    for row, ours in sustained:
        peer = row.measured.best_peer or ""
        theirs = row.measured.sustained.get(peer)
        clock = f"{ours.sm_mhz:,}" if ours.sm_mhz else NOTHING
        own = (
            unit.of(ours.us),
            difference((ours.us or 0.0) / row.measured.us["etap"]),
            significant(ours.millijoules),
            significant(ours.watts),
        )
        time = difference(theirs.us / ours.us) if theirs and theirs.us and ours.us else NOTHING
        energy = difference(theirs.millijoules / ours.millijoules) if theirs and theirs.millijoules and ours.millijoules else NOTHING
        made.append((row.name, *own, clock, peer or NOTHING, time, energy))
    head = ("shape", f"ETAP, {unit.name}", "against its rounds", "mJ a call", "W", "MHz", "best peer", "its time", "its energy")
    return _without_empty("Under sustained load", head, made, (6,), _sustaining(results))


def _sustaining(results: Results) -> str:
    said = f"Each alone for {results.run.sustain:g} s, in which the power limit may lower the clock; the rounds are short."
    if results.run.device.kind == "cpu":
        return f"Each alone for {results.run.sustain:g} s. This device counts no energy that a program may read."
    return f"{said} Energy is counted by the card."


def _without_empty(caption: str, head: Sequence[str], rows: Sequence[tuple[str, ...]], words: Sequence[int] = (), note: str = "") -> Table:
    """Columns in which nobody has anything are left out."""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] != NOTHING for row in rows)]
    return Table(
        caption,
        tuple(head[i] for i in kept),
        [tuple(row[i] for i in kept) for row in rows],
        tuple(kept.index(i) for i in words if i in kept),
        note,
    )
