"""Every number of the report. Times are of decode attention; what else a step takes is the user's to say (Prices.rest_ms)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from etap_bench.errors import Refused
from etap_bench.measurement import REFERENCE
from etap_bench.results import Results, Row

NOISE = 1.02  # ratios closer to 1 than this count as equal
HOURS_A_YEAR = 8760


@dataclass(frozen=True)
class Prices:
    """What the user says. None: not given.

    card_price: of one card with its share of the server; written off over `years`, in use `utilisation` of the time
    power_price: a kWh; pue: power of the building for each watt of the server
    rent: of one card for an hour
    rest_ms: what a decode step takes beside attention
    """

    card_price: float | None = None
    years: float = 3.0
    utilisation: float = 0.6
    power_price: float | None = None
    pue: float = 1.3
    rent: float | None = None
    currency: str = "EUR"
    rest_ms: float = 0.0


@dataclass(frozen=True)
class Contender:
    """ETAP or a peer over the steps it took part in.

    step_ms: all layers (ETAP: and the plan) and rest_ms, at percentiles 50, 90, 99, 100 of the steps
    against_etap: its time over ETAP's, summed over the steps that both did; 1 for ETAP
    slower, faster: steps in which it is slower or faster than ETAP by more than NOISE
    tokens_per_second: answer tokens over the time of the steps, at the batches of the workload
    joules: a million answer tokens, attention alone; None: not measured
    owned, rented: currency a million answer tokens; None: no price given, or no energy for a power price
    """

    name: str
    steps: int
    us: float  # median of one layer's call
    fraction: float | None  # of the ceiling, median
    step_ms: tuple[float, ...]
    against_etap: float | None
    slower: int
    faster: int
    tokens_per_second: float
    watts: float | None
    joules: float | None
    owned: float | None
    rented: float | None
    worst_error: float


PERCENTILES = (50, 90, 99, 100)


def contender_names(results: Results) -> list[str]:
    """ETAP first, then the peers that took part, the fastest first."""
    peers = [name for name in results.run.peers if any(name in row.measured.us for row in results.rows)]
    peers.sort(key=lambda name: statistics.median(row.measured.us[name] for row in results.rows if name in row.measured.us))
    return [*(["etap"] if any("etap" in row.measured.us for row in results.rows) else []), *peers]


def contenders(results: Results, prices: Prices) -> list[Contender]:
    """Raises Refused when nothing was measured."""
    names = contender_names(results)
    if not names:
        raise Refused("the file holds no measured step; allowed: one or more (call `etap bench` again, it goes on)")
    return [_contender(name, results, prices) for name in names]


def step_ms(row: Row, name: str, results: Results, rest_ms: float) -> float:
    plan_us = (row.measured.plan_us or 0.0) if name == "etap" else 0.0
    return (row.measured.us[name] * results.run.workload.model.layers + plan_us) / 1e3 + rest_ms


def _contender(name: str, results: Results, prices: Prices) -> Contender:
    rows = [row for row in results.rows if name in row.measured.us]
    times = [step_ms(row, name, results, prices.rest_ms) for row in rows]
    both = [(row.measured.us[name], row.measured.us["etap"]) for row in rows if "etap" in row.measured.us]
    fractions = [row.measured.ceiling_us / row.measured.us[name] for row in rows if row.measured.ceiling_us]
    tokens_per_second = sum(row.new_tokens for row in rows) / sum(times) * 1e3
    powered = [row for row in rows if name in row.measured.millijoules]
    watts = joules = None
    if powered:
        millijoules = sum(row.measured.millijoules[name] for row in powered)
        watts = millijoules / sum(row.measured.us[name] for row in powered) * 1e3
        joules = millijoules / 1e3 * results.run.workload.model.layers / sum(row.new_tokens for row in powered) * 1e6
    hours = 1e6 / tokens_per_second / 3600
    return Contender(
        name=name,
        steps=len(rows),
        us=statistics.median(row.measured.us[name] for row in rows),
        fraction=statistics.median(fractions) if fractions else None,
        step_ms=tuple(float(value) for value in np.percentile(times, PERCENTILES)),
        against_etap=sum(a for a, _ in both) / sum(b for _, b in both) if both else None,
        slower=sum(a > b * NOISE for a, b in both),
        faster=sum(a * NOISE < b for a, b in both),
        tokens_per_second=tokens_per_second,
        watts=watts,
        joules=joules,
        owned=_owned(hours, watts, prices),
        rented=None if prices.rent is None else hours * prices.rent,
        worst_error=max(row.measured.worst_row_error[name] for row in rows),
    )


def _owned(hours: float, watts: float | None, prices: Prices) -> float | None:
    """Write-off and power, at the power that attention draws."""
    if prices.card_price is None or prices.power_price is None or watts is None:
        return None
    write_off = prices.card_price / (prices.years * HOURS_A_YEAR * prices.utilisation)
    return hours * (write_off + watts / 1e3 * prices.pue * prices.power_price)


@dataclass(frozen=True)
class Bucket:
    """Steps of similar size: medians of one layer's call."""

    label: str
    steps: int
    us: dict[str, float]
    fraction: float | None  # ETAP's, of the ceiling
    limit: str  # the most frequent


def buckets(results: Results, limits: Sequence[str], of: str) -> list[Bucket]:
    """of: "context" (KV tokens a sequence, the mean of a step) or "batch"; powers of two."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(results.rows):
        value = len(row.lengths) if of == "batch" else sum(row.lengths) / len(row.lengths)
        groups.setdefault(int(np.log2(value)), []).append(index)
    names = contender_names(results)
    made = []
    for power, indices in sorted(groups.items()):
        rows = [results.rows[index] for index in indices]
        fractions = [row.measured.fraction for row in rows if row.measured.fraction]
        words = [limits[index] for index in indices]
        made.append(
            Bucket(
                label=f"{2**power:,}" if of == "batch" and power == 0 else f"{2**power:,} to {2 ** (power + 1) - 1:,}",
                steps=len(rows),
                us={n: statistics.median(t) for n in names if (t := [row.measured.us[n] for row in rows if n in row.measured.us])},
                fraction=statistics.median(fractions) if fractions else None,
                limit=max(sorted(set(words)), key=words.count),
            )
        )
    return made


def verdict(results: Results, all_contenders: Sequence[Contender]) -> list[str]:
    """What ETAP is worth for this workload on this card, and where it is worth nothing, in sentences."""
    ours = next((c for c in all_contenders if c.name == "etap"), None)
    if ours is None:
        reasons = {row.wrong.get("etap") or row.measured.skipped.get("etap", "") for row in results.rows}
        return [f"ETAP did not compute this workload: {'; '.join(sorted(reasons))}."]
    said = []
    peers = [c for c in all_contenders if c.name not in ("etap", REFERENCE) and c.against_etap]
    reference = next((c for c in all_contenders if c.name == REFERENCE and c.against_etap), None)
    if peers:
        best = min(peers, key=lambda c: c.against_etap or 0)
        ratio = best.against_etap or 0
        what = f"{ratio:.2f} times as fast as {best.name}" if ratio >= 1 else f"slower than {best.name}, at {ratio:.2f} of its speed"
        said.append(f"Over the steps that both computed, ETAP is {what}, the best peer that ran here.")
    else:
        said.append("No peer took part, so this report can't say whether ETAP would gain anything here.")
        if reference:
            said.append(
                f"PyTorch's operators, a reference that nobody serves with, took {reference.against_etap:.3g} times as long as ETAP."
            )
    if ours.fraction is not None:
        said.append(
            f"The median step takes {ours.us:,.1f} µs a layer, at {ours.fraction:.2f} of the speed of a mere copy of the same pages."
        )
    lost = [(row, other, ratio) for row in results.rows for other, ratio in _fastest_other(row) if ratio > NOISE]
    if lost:
        worst, other, ratio = max(lost, key=lambda entry: entry[2])
        said.append(
            f"ETAP does not help in {len(lost)} of {len(results.rows)} steps, where another is faster; the worst is step {worst.index} "
            f"(batch {len(worst.lengths)}, {sum(worst.lengths):,} KV tokens), where {other} is {ratio:.2f} times as fast."
        )
    elif peers:
        said.append("In no step was a peer faster.")
    short = [row for row in results.rows if row.measured.fraction and row.measured.fraction < 0.5]
    if short:
        most = max(sum(row.lengths) for row in short)
        said.append(f"{len(short)} of {len(results.rows)} steps, of up to {most:,} KV tokens, reach less than half of the ceiling.")
    wrong = sum(bool(row.wrong) for row in results.rows)
    if wrong:
        said.append(f"In {wrong} of {len(results.rows)} steps a result was wrong; such times are left out everywhere.")
    if not results.complete:
        said.append(f"The run is not complete: {len(results.rows)} of {results.steps} steps are measured.")
    return said


def _fastest_other(row: Row) -> list[tuple[str, float]]:
    """The fastest of a step beside ETAP, the reference among them, and ETAP's time over its time; [] where one of them is missing."""
    others, ours = row.measured.others, row.measured.etap_us
    return [(others[0], ours / row.measured.us[others[0]])] if others and ours else []
