"""The report's figures. Contenders differ by colour and by marker, so that print in grey is legible too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from etap_bench.report.limits import Limits
from etap_bench.report.summary import Contender, contender_names, step_ms
from etap_bench.results import Results

# Okabe and Ito's palette, which the colour-blind can tell apart (https://jfly.uni-koeln.de/color/).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "etap",  # the same numbers give the same file
}


def figures(results: Results, contenders: Sequence[Contender], limits: Limits, rest_ms: float) -> dict[str, Figure]:
    """By name. Those for which nothing was measured are left out."""
    with matplotlib.rc_context(_STYLE):
        made = {
            "speed": _speed(results),
            "ceiling": _ceiling(results),
            "roofline": _roofline(results, limits),
            "latency": _latency(results, rest_ms),
            "energy": _energy(contenders),
            "error": _error(results),
        }
    return {name: figure for name, figure in made.items() if figure is not None}


def _look(position: int) -> dict[str, Any]:
    return {"color": _COLOURS[position % len(_COLOURS)], "marker": _MARKERS[position % len(_MARKERS)]}


def _figure(width: float = 7.2, height: float = 3.2, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _plain(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))


def _speed(results: Results) -> Figure:
    figure, (by_context, by_batch) = _figure(columns=2)
    names = contender_names(results)
    mean_context = [sum(row.lengths) / len(row.lengths) for row in results.rows]
    batch = [len(row.lengths) for row in results.rows]
    for axes, values, label in ((by_context, mean_context, "mean context (tokens)"), (by_batch, batch, "batch (sequences)")):
        for position, name in enumerate(names):
            points = [(x, row.measured.us[name]) for x, row in zip(values, results.rows, strict=True) if name in row.measured.us]
            axes.scatter(*zip(*points, strict=True), s=18, alpha=0.8, label=name, **_look(position))
        ceiling = [(x, row.measured.ceiling_us) for x, row in zip(values, results.rows, strict=True) if row.measured.ceiling_us]
        if ceiling:
            axes.scatter(*zip(*ceiling, strict=True), s=30, marker="_", color="black", label="ceiling")
        axes.set(xlabel=label, xscale="log", yscale="log")
        _plain(axes.xaxis)
        _plain(axes.yaxis)
    by_context.set_ylabel("µs, one layer's call")
    figure.legend(*by_context.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def _ceiling(results: Results) -> Figure | None:
    rows = [row for row in results.rows if row.measured.ceiling_us]
    if not rows:
        return None
    figure, (axes,) = _figure()
    for position, name in enumerate(contender_names(results)):
        points = [(r.kv_bytes / 1e6, (r.measured.ceiling_us or 0) / r.measured.us[name]) for r in rows if name in r.measured.us]
        if points:
            axes.scatter(*zip(*points, strict=True), s=22, alpha=0.8, label=name, **_look(position))
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xlabel="KV cache read by one layer (MB)", ylabel="fraction of the ceiling", xscale="log", ylim=(0, None))
    if axes.get_ylim()[1] > 2:  # a ceiling that was disturbed
        axes.set_yscale("log")
        axes.autoscale(axis="y")
    _plain(axes.xaxis)
    axes.legend(loc="best")
    return figure


def _roofline(results: Results, limits: Limits) -> Figure | None:
    rows = [(row, word) for row, word in zip(results.rows, limits.of_row, strict=True) if "etap" in row.measured.us]
    if not rows:
        return None
    figure, (axes,) = _figure(height=3.8)
    intensity = np.array([row.flop / row.distinct_kv_bytes for row, _ in rows])
    speed = np.array([row.flop / row.measured.us["etap"] / 1e6 for row, _ in rows])
    for position, word in enumerate(sorted({word for _, word in rows})):
        chosen = np.array([w == word for _, w in rows])
        label = f"ETAP, limited by {word}" if word != "not known" else "ETAP, limit not known"
        axes.scatter(intensity[chosen], speed[chosen], s=24, alpha=0.8, label=label, **_look(position))
    span = np.geomspace(intensity.min() / 2, intensity.max() * 4, 64)
    streams = [row.distinct_kv_bytes / row.measured.ceiling_us / 1e6 for row, _ in rows if row.measured.ceiling_us]
    if streams:
        axes.plot(span, span * max(streams), color="black", linewidth=1, label=f"best copy measured here: {max(streams):.3g} TB/s")
    if limits.gpu:
        peak = np.minimum(span * limits.gpu.hbm_tbs, limits.gpu.bf16_tflops)
        name = f"{limits.gpu.title}: {limits.gpu.hbm_tbs:g} TB/s, {limits.gpu.bf16_tflops:g} TFLOP/s BF16"
        axes.plot(span, peak, color="black", linewidth=1, linestyle="--", label=name)
    axes.set(xlabel="FLOP a byte of KV cache (shared bytes counted once)", ylabel="TFLOP/s", xscale="log", yscale="log")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
    axes.legend(loc="best")
    return figure


def _latency(results: Results, rest_ms: float) -> Figure:
    figure, (axes,) = _figure()
    for position, name in enumerate(contender_names(results)):
        times = np.sort([step_ms(row, name, results, rest_ms) for row in results.rows if name in row.measured.us])
        look = _look(position)
        axes.ecdf(times, label=name, color=look["color"], linewidth=1.4)
        axes.plot(np.percentile(times, (50, 90, 99)), (0.5, 0.9, 0.99), linestyle="", markersize=5, **look)
    what = "attention of all layers" if not rest_ms else f"attention of all layers and {rest_ms:g} ms for the rest"
    axes.set(xlabel=f"ms a decode step: {what}", ylabel="steps that take at most so long", xscale="log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _plain(axes.xaxis)
    axes.legend(loc="best")
    return figure


def _energy(contenders: Sequence[Contender]) -> Figure | None:
    measured = [(position, c) for position, c in enumerate(contenders) if c.joules is not None]
    if not measured:
        return None
    figure, (axes,) = _figure(height=0.8 + 0.4 * len(measured))
    joules = [(c.joules or 0) / 1e6 for _, c in measured]
    bars = axes.barh([c.name for _, c in measured], joules, color=[_COLOURS[p % len(_COLOURS)] for p, _ in measured])
    axes.bar_label(bars, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="joules an answer token, attention of all layers")
    axes.margins(x=0.12)
    return figure


def _error(results: Results) -> Figure:
    figure, (axes,) = _figure(height=1 + 0.35 * len(contender_names(results)))
    names = contender_names(results)
    every: list[float] = []
    for position, name in enumerate(names):
        errors = [row.measured.worst_row_error[name] for row in results.rows if name in row.measured.worst_row_error]
        every += errors
        axes.scatter(errors, np.full(len(errors), position), s=18, alpha=0.5, **_look(position))
    axes.set(xlabel="largest error of a row, as a fraction of its norm, against float64", xscale="log", ylim=(len(names) - 0.5, -0.5))
    axes.set_xlim(min(every) / 3, max(every) * 3)
    _plain(axes.xaxis)
    axes.set_yticks(range(len(names)), names)
    return figure
