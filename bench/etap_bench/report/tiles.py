"""The three questions that the report begins with, and their answers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from etap_bench.measurement import REFERENCE
from etap_bench.report.limits import UNKNOWN, Limits
from etap_bench.report.summary import NOISE, Contender, Given, best_peer, check, common, contenders, differs, workload
from etap_bench.report.text import count, difference, duration, energy_unit, percent, significant
from etap_bench.results import Results, Row

NO_PEER = "No peer took part, so this can't say whether ETAP would gain anything here."
SOUND = 1.1  # fractions of the ceiling above it say that the ceiling was none
_LEFT = "Attention alone: give the rest of a step with --rest-ms or --rest."


@dataclass(frozen=True)
class Tile:
    """marks: what the answer holds for, in a word or two"""

    question: str
    headline: str
    sentences: tuple[str, ...]
    marks: tuple[str, ...] = ()


def tiles(results: Results, given: Given, bounds: Limits) -> list[Tile]:
    """Of a workload: what a step gains, what limits it, what it saves. Of shapes: what a call gains, how near it is to the ceiling, what
    limits it. Raises Refused when nothing was measured."""
    check(results)
    if not any("etap" in row.measured.times for row in results.rows):
        reasons = sorted({row.wrong.get("etap") or row.measured.skipped.get("etap", "it was not asked to") for row in results.rows})
        return [Tile("What does it gain?", "nothing", (f"ETAP did not compute this work: {'; '.join(reasons)}.",))]
    if results.run.workload is None:
        return [_gain_of_calls(results), _nearness(results), _limit(results, bounds)]
    return [_gain_of_steps(results, given), _limit(results, bounds, with_ceiling=True), _saving(results, given)]


def remarks(results: Results) -> list[str]:
    """What a reader must know before a number is believed."""
    said, rows, what = [], results.rows, "step" if results.run.workload else "shape"
    if not results.complete:
        said.append(f"The run is not complete: {len(rows)} of {count(len(results.run.rows), what)} are measured.")
    if results.run.workload and results.run.workload.shrink > 1:
        said.append(f"A trial: lengths, batch and cache were divided by {results.run.workload.shrink}.")
    wrong = sorted({name for row in rows for name in row.wrong})
    if wrong:
        number = sum(bool(row.wrong) for row in rows)
        said.append(
            f"Results were wrong in {number} of {count(len(rows), what)} ({', '.join(wrong)}); their times are left out everywhere."
        )
    above = sum((row.measured.fraction or 0.0) > SOUND for row in rows)
    if above:
        reason = "a CPU's caches, or other work on the machine, are why" if results.run.device.kind == "cpu" else "something disturbed it"
        said.append(f"In {above} of {count(len(rows), what)} the copy was slower than ETAP and is no ceiling: {reason}.")
    shaky = [row.measured.times["etap"].uncertainty for row in common(results, ["etap"]).rows]
    unknown = sum(map(math.isinf, shaky))
    if unknown:
        said.append(f"How uncertain medians are is not known in {unknown} of {count(len(rows), what)}: six --rounds and more say it.")
    elif shaky and statistics.median(shaky) > 0.05:
        said.append(f"Medians are uncertain by ±{percent(statistics.median(shaky))}: more --rounds on a quiet machine say more.")
    return said


def _gain_of_steps(results: Results, given: Given) -> Tile:
    everyone = contenders(results, given)
    best = best_peer(everyone)
    question, marks = "What does a step gain?", () if given.rest.known else ("attention alone",)
    if best is None:
        return Tile(question, "not known", (NO_PEER, *_reference(everyone)), marks)
    pair = common(results, [best.name, "etap"])
    ours, theirs = (sum(c.step_ms[0] for c in contenders(pair, given) if c.name == name) for name in ("etap", best.name))
    ratio = best.against_etap or 1.0
    what = "step" if given.rest.known else "step's attention"
    median = f"the median {what} takes {duration(ours * 1e3)} with ETAP and {duration(theirs * 1e3)} with {best.name}"
    said = [f"Against {best.name}, the best peer that ran here, in the {count(len(pair.rows), 'step')} that both computed: {median}."]
    if given.rest.known:
        attention = best.attention_against_etap or 1.0
        said.append(f"Of that attention: {_headline(attention)}.")
    return Tile(question, _headline(ratio), (*said, *_lost(results)), marks)


def _gain_of_calls(results: Results) -> Tile:
    ratios: dict[str, list[float]] = {}
    for row in common(results, ["etap"]).rows:
        for name in row.measured.others:
            ratios.setdefault(name, []).append(row.measured.us[name] / row.measured.us["etap"])
    means = {name: statistics.geometric_mean(of) for name, of in ratios.items()}
    peers = [name for name in means if name != REFERENCE]
    if not peers:
        said = [_slower(means[name]) for name in means]
        return Tile("What does a call gain?", "not known", (NO_PEER, *said))
    best = min(peers, key=means.__getitem__)
    said = [f"Against {best}, the best peer that ran here: the geometric mean over {count(len(ratios[best]), 'shape')} that both computed."]
    return Tile("What does a call gain?", _headline(means[best]), (*said, *_energy_of_calls(results, best), *_lost(results)))


def _energy_of_calls(results: Results, peer: str) -> list[str]:
    both = [row.measured.millijoules for row in results.rows if {peer, "etap"} <= row.measured.millijoules.keys()]
    if not both:
        return []
    mean = statistics.geometric_mean(one[peer] / one["etap"] for one in both)
    return [f"Under sustained load, in {count(len(both), 'shape')}: {_headline(mean, 'less energy', 'more energy')}."]


def _headline(ratio: float, less: str = "less time", more: str = "more time") -> str:
    """ratio: theirs over ETAP's."""
    if abs(ratio - 1) < NOISE:
        return "no difference"
    change = 1 - 1 / ratio
    return f"{percent(abs(change))} {less if change > 0 else more}"


def _reference(everyone: Sequence[Contender]) -> list[str]:
    return [_slower(c.attention_against_etap) for c in everyone if c.name == REFERENCE and c.attention_against_etap]


def _slower(ratio: float) -> str:
    return f"PyTorch's operators, a reference that nobody serves with, took {significant(ratio)} times as long as ETAP."


def _lost(results: Results) -> list[str]:
    """Where ETAP does not help, the worst first: peers that are faster for certain."""
    what = "step" if results.run.workload else "shape"
    lost: list[tuple[float, Row, str]] = []
    unknown = 0
    for row in common(results, ["etap"]).rows:
        peer = row.measured.best_peer
        sign = differs(row, peer, "etap") if peer else 0
        unknown += sign is None
        if peer and sign == -1:
            lost.append((row.measured.us["etap"] / row.measured.us[peer], row, peer))
    few = [f"Too few rounds to say in which {what} a peer was faster."] if unknown else []
    if not lost:
        return few or [f"In no {what} was a peer faster."]
    ratio, row, peer = max(lost, key=lambda entry: entry[0])
    where = f" (batch {row.shape.batch}, {row.shape.tokens:,} KV tokens)" if results.run.workload else ""
    worst = f"at worst {row.name}{where}, where {peer} takes {percent(1 - 1 / ratio)} less time"
    return [f"It does not help in {len(lost)} of {count(len(results.rows), what)}: {worst}.", *few]


def _nearness(results: Results) -> Tile:
    fractions = {row.name: row.measured.fraction for row in results.rows if row.measured.fraction}
    question = "How near is it to the ceiling?"
    if not fractions:
        return Tile(question, "not known", ("The ceiling was not measured.",))
    least, most = min(fractions, key=lambda n: fractions[n] or 0), max(fractions, key=lambda n: fractions[n] or 0)
    said = f"Geometric mean over {count(len(fractions), 'shape')} of the speed of a mere copy of the same pages"
    if len(fractions) == 1:
        said = "Of the speed of a mere copy of the same pages"
    else:
        said += f": from {percent(fractions[least])} ({least}) to {percent(fractions[most])} ({most})"
    mean = statistics.geometric_mean(f for f in fractions.values() if f)
    return Tile(question, percent(mean) if mean <= SOUND else "not known", (f"{said}.",))


def _limit(results: Results, bounds: Limits, with_ceiling: bool = False) -> Tile:
    """The most frequent of the limits, and with_ceiling how near the median step is to a copy."""
    what, said = "step" if results.run.workload else "shape", []
    words = bounds.words
    if words == [UNKNOWN]:
        said.append(f"The limit is not known: {bounds.source}.")
    else:
        parts = [f"{word if word != UNKNOWN else 'not known'} in {count(bounds.of_row.count(word), what)}" for word in words]
        said.append(f"{', '.join(parts)} ({bounds.source}).")
        said[0] = said[0][0].upper() + said[0][1:]
    fractions = [row.measured.fraction for row in results.rows if row.measured.fraction]
    headline = words[0]
    if with_ceiling and fractions:
        median = percent(statistics.median(fractions))
        said.append(f"The median {what} reaches {median} of the speed of a mere copy of the same pages, the ceiling.")
        if words == [UNKNOWN] and statistics.median(fractions) <= SOUND:
            headline = f"{median} of the ceiling"
        short = [row for row in results.rows if row.measured.fraction and row.measured.fraction < 0.5]
        if short:
            most = max(row.shape.tokens for row in short)
            said.append(f"Less than half of it in {len(short)} of {count(len(results.rows), what)}, of up to {most:,} KV tokens.")
    return Tile("What limits it?", headline, tuple(said))


def _saving(results: Results, given: Given) -> Tile:
    """Money first: ETAP's against the best peer's in the same steps; alone where there is no peer or no price."""
    prices, run = given.prices, workload(results)
    everyone = contenders(results, given)
    best = best_peer(everyone)
    pair = contenders(common(results, [best.name, "etap"]) if best else results, given)
    ours = next(c for c in pair if c.name == "etap")
    theirs = next((c for c in pair if best and c.name == best.name), None)
    powered = ours.watts is not None
    assumed = bool(prices.guessed(powered)) and ours.owned is not None
    marks = (*(() if given.rest.known else ("attention alone",)), *(("default prices",) if assumed else ()))
    cards = "one card" if run.server.tp == 1 else count(run.server.tp, "card")
    said: list[str] = []
    headline = "not known"
    if ours.owned is None:
        why = "a CPU has no card's price: give --card-price" if results.run.device.kind == "cpu" else "ETAP's power was not measured here"
        said.append(f"No cost: {why}.")
    elif theirs is None or theirs.owned is None:
        headline = f"{prices.currency} {significant(ours.owned)} a million"
        said += [
            f"What a million answer tokens cost on {cards} of one's own.",
            NO_PEER if best is None else f"{best.name}'s cost is unknown.",
        ]
    else:
        ratio = theirs.owned / ours.owned
        headline = _headline(ratio, "cheaper", "dearer")
        said.append(
            f"A million answer tokens cost {prices.currency} {significant(ours.owned)} with ETAP and {significant(theirs.owned)} with "
            f"{theirs.name}, on {cards} of one's own, in the same steps."
        )
        if given.rest.known and abs(ratio - 1) >= NOISE:
            year = (theirs.owned - ours.owned) * ours.tokens_per_second * 3600 * 8760 * prices.utilisation / 1e6
            said.append(f"Over a year of such work: {prices.currency} {significant(abs(year), 2)} {'less' if year > 0 else 'more'}.")
    if theirs and theirs.joules is not None and ours.joules is not None:
        unit = energy_unit([theirs.joules])
        said.append(
            f"Energy: {unit.of(ours.joules)} instead of {unit.named(theirs.joules)} a million, {difference(ours.joules / theirs.joules)}."
        )
    if ours.owned is None and best is None:
        said.append(NO_PEER)
    said += prices.words(powered) if ours.owned is not None else []
    said += [] if given.rest.known else [_LEFT]
    return Tile("What does it save?", headline, tuple(said), marks)
