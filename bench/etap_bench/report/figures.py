"""The report's figures: small panels, which a page puts side by side or one above another, with type that a phone shows legibly.

Contenders differ by colour and by marker, so that print in grey is legible too. Lines that bound something are labelled where they are.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from etap_bench.measurement import PEERS, REFERENCE
from etap_bench.report.limits import UNKNOWN, Limits
from etap_bench.report.summary import Given, common, context, drawn_names, step_ms
from etap_bench.report.text import label, rate_unit, signed_percent, significant, time_unit
from etap_bench.results import Results

MOST_SHAPES = 40  # that get a line each
_WIDTH, _HEIGHT = 3.9, 3.0  # inches; a phone's width at 96 pixels an inch

# Okabe and Ito's palette, which the colour-blind can tell apart (https://jfly.uni-koeln.de/color/), and what each is on a dark page.
_DARK = {
    "#0072b2": "#5ab4f0",
    "#d55e00": "#ff8f4a",
    "#009e73": "#35cfa2",
    "#cc79a7": "#e79ac6",
    "#56b4e9": "#bfe3fb",
    "#e69f00": "#f5bd45",
    "#666666": "#a3aab5",
    "#1b1f24": "#e3e7ec",
    "#dde1e6": "#363d47",
}
_COLOURS = tuple(_DARK)[:7]
_INK, _GRID = tuple(_DARK)[7:]
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.0,
    "svg.hashsalt": "etap",  # the same numbers give the same file
}


@dataclass(frozen=True)
class Plot:
    """caption: what it shows; alt: what can be read off it, for those who can't see it"""

    figure: Figure
    caption: str
    alt: str

    def svg(self, dark: bool = False) -> str:
        """On a transparent ground."""
        with matplotlib.rc_context(_STYLE), io.StringIO() as drawn:
            self.figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
            text = drawn.getvalue()
        return re.sub("|".join(_DARK), lambda found: _DARK[found[0]], text) if dark else text

    def png(self) -> bytes:
        with matplotlib.rc_context(_STYLE), io.BytesIO() as drawn:
            self.figure.savefig(drawn, format="png", dpi=200)
            return drawn.getvalue()


def plots(results: Results, bounds: Limits, given: Given) -> dict[str, Plot]:
    """By name. Those for which nothing was measured are left out."""
    with matplotlib.rc_context(_STYLE):
        made: dict[str, Plot | None] = {}
        if results.run.workload is not None:
            made = {"latency": _latency(results, given), "gain": _gain(results, given)}
        if results.run.workload is None and len(results.rows) <= MOST_SHAPES:
            made |= {"shapes": _shapes(results)}
        else:
            made |= {"context": _speed(results, "context"), "batch": _speed(results, "batch"), "ceiling": _ceiling(results)}
        made["roofline"] = _roofline(results, bounds)
    return {name: plot for name, plot in made.items() if plot is not None}


def _look(name: str) -> dict[str, Any]:
    """The same for a contender in every report."""
    place = ("etap", *PEERS).index(name) if name in PEERS else 0
    return {"color": _COLOURS[place], "marker": _MARKERS[place]}


def _panel(height: float = _HEIGHT) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, names)) <= 14 else 2  # of what the panel is wide enough for
    figure.legend(handles, names, loc="outside upper left", ncols=columns)


def _scale(axes: Any, letter: str, values: Sequence[float], few: bool = False) -> None:
    """Logarithmic where the values span much, with ticks that are plain numbers. letter: "x" or "y"; few: there is room for few ticks."""
    axis = getattr(axes, f"{letter}axis")
    span = max(values) / min(values) if min(values) > 0 else 1.0
    plain = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    if span > 6:
        axes.set(**{f"{letter}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 60 and not few else (1, 3) if span < 3e3 and not few else (1,)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(plain)


def _speed(results: Results, of: str) -> Plot | None:
    """Time by context or by batch."""
    size = [context(row) if of == "context" else float(row.shape.batch) for row in results.rows]
    if len(set(size)) == 1:
        return None
    names = drawn_names(results)
    unit = time_unit(us for row in results.rows for name, us in row.measured.us.items() if name == "etap" or "etap" not in names)
    figure, axes = _panel()
    series = {name: [(x, r.measured.us[name]) for x, r in zip(size, results.rows, strict=True) if name in r.measured.us] for name in names}
    ceiling = [(x, row.measured.ceiling_us) for x, row in zip(size, results.rows, strict=True) if row.measured.ceiling_us]
    for name, points in series.items():
        axes.scatter([x for x, _ in points], [us / unit.size for _, us in points], s=20, alpha=0.8, label=label(name), **_look(name))
    if ceiling:
        axes.scatter([x for x, _ in ceiling], [us / unit.size for _, us in ceiling], s=40, marker="_", color=_INK, label="ceiling")
    axes.set(
        xlabel="context a sequence, mean (tokens)" if of == "context" else "batch (sequences)", ylabel=f"{unit.name}, one layer's call"
    )
    _scale(axes, "x", size)
    _scale(axes, "y", [us / unit.size for points in (*series.values(), ceiling) for _, us in points])
    _legend(figure, axes)
    alt = f"Time of one layer's call in {unit.name} over the {of}, {_span(size)}, for {_list(names)}."
    return Plot(figure, f"Time of one layer's call, by {of}", alt)


def _ceiling(results: Results) -> Plot | None:
    names = drawn_names(results)
    rows = [row for row in results.rows if row.measured.ceiling_us and row.measured.times.keys() & names]
    if not rows:
        return None
    figure, axes = _panel()
    every: list[float] = []
    for name in names:
        points = [(r.shape.kv_bytes / 1e6, (r.measured.ceiling_us or 0.0) / r.measured.us[name]) for r in rows if name in r.measured.us]
        every += [fraction for _, fraction in points]
        axes.scatter([x for x, _ in points], [y for _, y in points], s=22, alpha=0.8, label=label(name), **_look(name))
    _scale(axes, "x", [row.shape.kv_bytes / 1e6 for row in rows])
    _to_the_ceiling(axes, "y", every)
    axes.axhline(1, color=_INK, linewidth=1)
    axes.text(0.99, 1, "ceiling: a mere copy", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    axes.set(xlabel="KV cache read by one layer (MB)", ylabel="of the ceiling's speed")
    _legend(figure, axes)
    alt = f"Fraction of the ceiling over the size of the KV cache, {_span(every)}, for {_list(names)}."
    return Plot(figure, "Fraction of the ceiling, by size of the KV cache", alt)


def _to_the_ceiling(axes: Any, letter: str, fractions: Sequence[float]) -> None:
    """Percent from 0 on; logarithmic where a copy was disturbed."""
    axis = getattr(axes, f"{letter}axis")
    if max(fractions) > 2:
        _scale(axes, letter, [*fractions, 1.0], few=True)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x" if value > 1 else f"{value * 100:g} %"))
    else:
        axes.set(**{f"{letter}lim": (0, max(1.12, max(fractions) * 1.06))})
        axis.set_major_formatter(PercentFormatter(1.0, symbol=" %", decimals=0))


def _shapes(results: Results) -> Plot | None:
    """A line for each shape."""
    names = drawn_names(results)
    rows = [row for row in results.rows if row.measured.ceiling_us and row.measured.times.keys() & names]
    if not rows:
        return None
    figure, axes = _panel(1.1 + 0.24 * len(rows))
    every = [1.0]
    for name in names:
        points = [
            (place, row, (row.measured.ceiling_us or 0.0) / row.measured.us[name])
            for place, row in enumerate(rows)
            if name in row.measured.us
        ]
        every += [fraction for _, _, fraction in points]
        places, fractions = [place for place, _, _ in points], [fraction for _, _, fraction in points]
        axes.scatter(fractions, places, s=24, alpha=0.85, label=label(name), zorder=3, **_look(name))
        if name == "etap":
            known = [
                (place, f, f * min(row.measured.uncertainty, 1.0)) for place, row, f in points if math.isfinite(row.measured.uncertainty)
            ]
            for place, f, spread in known:
                bar = ([min(spread, f * 0.9)], [spread])
                axes.errorbar([f], [place], xerr=bar, fmt="none", ecolor=_look(name)["color"], elinewidth=1.2)
    _to_the_ceiling(axes, "x", every)
    axes.axvline(1, color=_INK, linewidth=1)
    axes.text(1, -0.65, "ceiling", ha="center", va="bottom")
    axes.set(xlabel="of the ceiling's speed", ylim=(len(rows) - 0.3, -0.6))
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.grid(axis="y", visible=False)
    _legend(figure, axes)
    alt = f"Fraction of the ceiling of each of {len(rows)} shapes, {_span(every)}, for {_list(names)}."
    where = "" if all(math.isfinite(row.measured.uncertainty) for row in rows if "etap" in row.measured.us) else " where it is known"
    return Plot(figure, f"Fraction of the ceiling, with ETAP's uncertainty{where}", alt)


def _roofline(results: Results, bounds: Limits) -> Plot | None:
    rows = [
        (row, word) for row, word in zip(results.rows, bounds.of_row, strict=True) if "etap" in row.measured.us and row.distinct_kv_bytes
    ]
    if not rows:
        return None
    figure, axes = _panel()
    intensity = np.array([row.shape.flop / row.distinct_kv_bytes for row, _ in rows])
    speed = np.array([row.shape.flop / row.measured.us["etap"] * 1e6 for row, _ in rows])
    unit = rate_unit(speed, "FLOP/s")
    for place, word in enumerate(word for word in bounds.words if word in {word for _, word in rows}):
        chosen = np.array([w == word for _, w in rows])
        name = "ETAP" if word == UNKNOWN else f"{'ETAP: ' * (place == 0)}{word}"
        axes.scatter(intensity[chosen], speed[chosen] / unit.size, s=24, alpha=0.8, label=name, color=_COLOURS[0], marker=_MARKERS[place])
    left, right = intensity.min() / 12, intensity.max() * 4
    copies = [row.distinct_kv_bytes / row.measured.ceiling_us * 1e6 for row, _ in rows if row.measured.ceiling_us]
    low = [speed.min()]
    axes.set(xscale="log", yscale="log")
    if bounds.gpu:
        memory, peak = bounds.gpu.hbm_tbs * 1e12, bounds.gpu.bf16_tflops * 1e12
        ridge = peak / memory
        right = max(right, ridge * 6)
        axes.plot([left, ridge, right], np.array([left * memory, peak, peak]) / unit.size, color=_INK, linewidth=1)
        _along(axes, left * 1.15, memory / unit.size, f"{bounds.gpu.title}: {bounds.gpu.hbm_tbs:g} TB/s", above=True)
        axes.text(right, peak / unit.size * 1.1, f"{bounds.gpu.bf16_tflops:,.0f} TFLOP/s BF16", ha="right", va="bottom")
        low.append(left * memory)
    if copies:
        best = max(copies)
        bandwidth = rate_unit([best], "B/s")
        reach = min(right, bounds.gpu.bf16_tflops * 1e12 / best) if bounds.gpu else right
        axes.plot([left, reach], np.array([left, reach]) * best / unit.size, color=_INK, linewidth=1, linestyle=(0, (4, 2)))
        _along(axes, left * 1.15, best / unit.size, f"a copy: {bandwidth.named(best)}", above=bounds.gpu is None)
        low.append(left * best)
    axes.set(xlabel="FLOP a byte of KV cache (shared bytes once)", ylabel=unit.name, xlim=(left, right))
    axes.set_ylim(min(low) / unit.size / 1.6, axes.get_ylim()[1] * 1.4)
    _scale(axes, "x", (left, right))
    _scale(axes, "y", axes.get_ylim())
    _legend(figure, axes)
    alt = f"Roofline: {len(rows)} calls of ETAP, {_span(list(speed / unit.size))} {unit.name}, and the lines of what bounds them."
    return Plot(figure, "Roofline: a point for each call", alt)


def _along(axes: Any, x: float, slope: float, text: str, above: bool) -> None:
    """A label at the line y = slope · x, a little off it."""
    slope *= 1.06 if above else 0.9
    turned = {"rotation": math.degrees(math.atan(slope)), "rotation_mode": "anchor", "transform_rotates_text": True}
    axes.text(x, x * slope, text, va="bottom" if above else "top", **turned)


def _latency(results: Results, given: Given) -> Plot:
    figure, axes = _panel()
    every: list[float] = []
    names = drawn_names(results)
    medians = []
    unit = time_unit(1e3 * step_ms(row, name, results, given.rest) for row in results.rows for name in names[:1] if name in row.measured.us)
    for name in names:
        times = np.sort([step_ms(row, name, results, given.rest) for row in results.rows if name in row.measured.us]) * 1e3 / unit.size
        every += list(times)
        look = _look(name)
        axes.ecdf(times, color=look["color"], linewidth=1.4)
        axes.plot(np.percentile(times, (50, 90, 99)), (0.5, 0.9, 0.99), linestyle="", markersize=5, label=label(name), **look)
        medians.append(f"{label(name)} {significant(float(np.median(times)))} {unit.name}")
    if given.itl_limit_ms is not None:
        limit = given.itl_limit_ms * 1e3 / unit.size
        every.append(limit)
        axes.axvline(limit, color=_INK, linewidth=1)
        axes.text(limit, 1.01, f"limit: {given.itl_limit_ms:g} ms", transform=axes.get_xaxis_transform(), ha="center")
    whole = "the whole step" if given.rest.known else "attention of all layers"
    axes.set(xlabel=f"{unit.name}, {whole}", ylabel="steps that take no longer")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    _scale(axes, "x", every)
    _legend(figure, axes)
    alt = f"Cumulative distribution of the time of {whole}; medians: {', '.join(medians)}."
    return Plot(figure, "How long a step takes; marks at 50, 90 and 99\u00a0%", alt)


def _gain(results: Results, given: Given) -> Plot | None:
    """Of peers, by size: where ETAP helps and where it does not."""
    peers = [name for name in drawn_names(results) if name not in ("etap", REFERENCE) and common(results, [name, "etap"]).rows]
    if not peers:
        return None
    figure, axes = _panel()
    tokens: list[int] = []
    changes: list[float] = []
    for name in peers:
        rows = common(results, [name, "etap"]).rows
        times = [(step_ms(row, name, results, given.rest), step_ms(row, "etap", results, given.rest)) for row in rows]
        change = [theirs / ours - 1 for theirs, ours in times]
        tokens += [row.shape.tokens for row in rows]
        changes += change
        axes.scatter([row.shape.tokens / 1e3 for row in rows], change, s=22, alpha=0.8, label=label(name), **_look(name))
    axes.axhline(0, color=_INK, linewidth=1)
    axes.text(1.01, 0, "ETAP", transform=axes.get_yaxis_transform(), va="center")
    axes.set(xlabel="KV tokens of the batch (thousands)", ylabel="time above ETAP's")
    axes.set_ylim(min(-0.05, min(changes) * 1.15), max(0.05, max(changes) * 1.1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: signed_percent(value, 0) if value else "0 %"))
    _scale(axes, "x", [count / 1e3 for count in tokens])
    _legend(figure, axes)
    span = f"from {signed_percent(min(changes), 0)} to {signed_percent(max(changes), 0)}"
    alt = f"Time of each step above ETAP's, {span}, for {_list(peers)}; below 0 ETAP is the slower one."
    return Plot(figure, "Each step's time against ETAP's: below the line ETAP loses", alt)


def _span(values: Sequence[float]) -> str:
    return f"from {significant(min(values))} to {significant(max(values))}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(label, names))
