"""Every number of the report of a workload. Times are of decode attention; what else a step takes is the user's to say (Given.rest)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from etap_bench.errors import Refused
from etap_bench.measurement import REFERENCE, apart
from etap_bench.report.prices import Prices
from etap_bench.report.rest import Rest
from etap_bench.results import Results, Row
from etap_bench.workload import Workload

NOISE = 0.02  # relative differences below it count as none
PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True)
class Given:
    """What a person says beside the measurement. itl_limit_ms: the longest step that counts in the goodput; None: there is no limit"""

    prices: Prices = field(default_factory=Prices.of)
    rest: Rest = field(default_factory=Rest)
    itl_limit_ms: float | None = None


@dataclass(frozen=True)
class Contender:
    """ETAP or another over the steps it took part in, of the whole server.

    step_ms: all layers (ETAP: and the plan) and the rest, at PERCENTILES of the steps
    against_etap, attention_against_etap: time of its steps, and of their attention, over ETAP's, in the steps that both did; 1 for ETAP
    slower, faster: steps in which its attention is so for certain, see `differs`; None: not known
    tokens_per_second: answer tokens over the time of the steps, at the batches of the workload
    goodput, within: those of steps within the limit over the time of all, and the share of such steps; None: there is no limit
    watts: of the cards in attention; joules: of them for a million answer tokens, at this power all the time; None: not measured
    owned, rented: currency a million answer tokens; None: no price
    """

    name: str
    steps: int
    us: float  # median of one layer's call
    fraction: float | None  # of the ceiling, median
    step_ms: tuple[float, ...]
    against_etap: float | None
    attention_against_etap: float | None
    slower: int | None
    faster: int | None
    tokens_per_second: float
    goodput: float | None
    within: float | None
    watts: float | None
    joules: float | None
    owned: float | None
    rented: float | None
    worst_error: float


def contender_names(results: Results) -> list[str]:
    """ETAP first, then the others that took part, the fastest first."""
    others = [name for name in results.run.peers if any(name in row.measured.times for row in results.rows)]
    others.sort(key=lambda name: statistics.median(row.measured.us[name] for row in results.rows if name in row.measured.times))
    return [*(["etap"] if any("etap" in row.measured.times for row in results.rows) else []), *others]


def drawn_names(results: Results) -> list[str]:
    """Those that figures show: the reference, which would stretch every scale, where there is no peer."""
    names = contender_names(results)
    return [name for name in names if name != REFERENCE] if set(names) - {"etap", REFERENCE} else names


def check(results: Results) -> None:
    """Raises Refused when nothing was measured."""
    if not contender_names(results) and not any(row.wrong for row in results.rows):
        raise Refused("the file holds no measured row; allowed: one or more (call `etap bench` again, it goes on)")


def contenders(results: Results, given: Given) -> list[Contender]:
    """In the order of contender_names."""
    return [_contender(name, results, given) for name in contender_names(results)]


def common(results: Results, names: Sequence[str]) -> Results:
    """The rows in which all of them have a time: the same work for each."""
    return msgspec.structs.replace(results, rows=[row for row in results.rows if all(name in row.measured.times for name in names)])


def workload(results: Results) -> Workload:
    assert results.run.workload is not None, "shapes have no steps"
    return results.run.workload


def context(row: Row) -> float:
    """KV tokens of a sequence, the mean."""
    return row.shape.tokens / row.shape.batch


def attention_ms(row: Row, name: str, results: Results) -> float:
    """All layers, and ETAP's plan; the planning of others is not measured."""
    plan_us = (row.measured.plan_us or 0.0) if name == "etap" else 0.0
    return (row.measured.us[name] * workload(results).model.layers + plan_us) / 1e3


def step_ms(row: Row, name: str, results: Results, rest: Rest) -> float:
    return attention_ms(row, name, results) + rest.ms(row.shape.batch, context(row))


def differs(row: Row, name: str, other: str) -> int | None:
    """1: `name` is slower than `other` in this row, -1: faster, 0: by less than NOISE or than their medians are certain to. None: how
    certain they are is not known."""
    one, two = row.measured.times[name], row.measured.times[other]
    return apart(one.p50 / two.p50, NOISE, one.uncertainty + two.uncertainty)


def _contender(name: str, results: Results, given: Given) -> Contender:
    rows = common(results, [name]).rows
    both = common(results, [name, "etap"]).rows
    against = [differs(row, name, "etap") for row in both]
    times = [step_ms(row, name, results, given.rest) for row in rows]
    tokens = [row.step.new_tokens if row.step else 0.0 for row in rows]
    fractions = [row.measured.ceiling_us / row.measured.us[name] for row in rows if row.measured.ceiling_us]
    server, limit = workload(results).server, given.itl_limit_ms
    per_second = server.dp / sum(times) * 1e3  # of a token in each group's steps
    tokens_per_second = sum(tokens) * per_second
    watts = _watts(rows, name)
    hours = server.tp * 1e6 / tokens_per_second / 3600  # of a card
    powered = any(row.measured.millijoules for row in results.rows)
    # Where no energy was measured at all, power is left out for everyone. A price of a card is none of a CPU.
    priced = (watts is not None or not powered) and (results.run.device.kind == "cuda" or "card_price" not in given.prices.assumed)
    return Contender(
        name=name,
        steps=len(rows),
        us=statistics.median(row.measured.us[name] for row in rows),
        fraction=statistics.median(fractions) if fractions else None,
        step_ms=tuple(float(value) for value in np.percentile(times, PERCENTILES)),
        against_etap=_ratio([(step_ms(r, name, results, given.rest), step_ms(r, "etap", results, given.rest)) for r in both]),
        attention_against_etap=_ratio([(attention_ms(r, name, results), attention_ms(r, "etap", results)) for r in both]),
        slower=None if None in against else against.count(1),
        faster=None if None in against else against.count(-1),
        tokens_per_second=tokens_per_second,
        goodput=None if limit is None else sum(n for n, ms in zip(tokens, times, strict=True) if ms <= limit) * per_second,
        within=None if limit is None else sum(ms <= limit for ms in times) / len(times),
        watts=None if watts is None else server.tp * watts,
        joules=None if watts is None else watts * hours * 3600,
        owned=given.prices.owned_hour(watts or 0.0) * hours if priced else None,
        rented=None if given.prices.rent is None else hours * given.prices.rent,
        worst_error=max(row.measured.worst_row_error.get(name, 0.0) for row in rows),
    )


def _watts(rows: Sequence[Row], name: str) -> float | None:
    """Of one card, over the rows in which its energy was measured."""
    sustained = [row.measured.sustained[name] for row in rows if name in row.measured.sustained]
    both = [(one.millijoules, one.us) for one in sustained if one.millijoules is not None and one.us]
    return sum(mj for mj, _ in both) / sum(us for _, us in both) * 1e3 if both else None


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None


def best_peer(all_contenders: Sequence[Contender]) -> Contender | None:
    """Who takes least beside ETAP in the same steps; the reference is none."""
    peers = [c for c in all_contenders if c.name not in ("etap", REFERENCE) and c.against_etap is not None]
    return min(peers, key=lambda c: c.against_etap or 0.0, default=None)


@dataclass(frozen=True)
class Bucket:
    """Steps of similar size: medians of one layer's call, and of others the time over ETAP's, in the steps that both did."""

    label: str
    steps: int
    us: dict[str, float]
    against_etap: dict[str, float | None]
    fraction: float | None  # ETAP's, of the ceiling
    limit: str  # the most frequent


def buckets(results: Results, limits: Sequence[str], of: str) -> list[Bucket]:
    """of: "context" (KV tokens a sequence, the mean of a step) or "batch"; powers of two."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(results.rows):
        value = row.shape.batch if of == "batch" else context(row)
        groups.setdefault(int(np.log2(max(value, 1))), []).append(index)
    made = []
    for power, indices in sorted(groups.items()):
        rows = [results.rows[index] for index in indices]
        fractions = [row.measured.fraction for row in rows if row.measured.fraction]
        words = [limits[index] for index in indices]
        us = {n: [row.measured.us[n] for row in rows if n in row.measured.times] for n in contender_names(results)}
        both = {n: [(r.measured.us[n], r.measured.us["etap"]) for r in rows if {n, "etap"} <= r.measured.times.keys()] for n in us}
        made.append(
            Bucket(
                label=f"{2**power:,}" if of == "batch" and power == 0 else f"{2**power:,} to {2 ** (power + 1) - 1:,}",
                steps=len(rows),
                us={name: statistics.median(times) for name, times in us.items() if times},
                against_etap={name: _ratio(pairs) for name, pairs in both.items()},
                fraction=statistics.median(fractions) if fractions else None,
                limit=max(sorted(set(words)), key=words.count),
            )
        )
    return made
