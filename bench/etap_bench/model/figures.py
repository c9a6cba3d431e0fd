"""The figures of docs/theory.md, drawn from the same functions that `etap model` prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.colors
from matplotlib.figure import Figure

from etap_bench.model import roofline
from etap_bench.model.basis import basis
from etap_bench.model.calibration import packaged_calibrations, residuals
from etap_bench.model.crossover import CONTEXTS, crossover
from etap_bench.model.gpu import load_gpu
from etap_bench.shape import BLOCK_TOKENS, Shape

_BLUE, _ORANGE, _GREY, _GREEN = "#0072b2", "#d55e00", "#777777", "#009e73"  # told apart by the colour-blind and in print
_GPUS = ("h20", "h100-sxm", "h200")
# The same bytes on every run: no date, no random ids; text stays text.
_STYLE: Any = {
    "svg.hashsalt": "etap",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def _axes(columns: int, height: float = 3.4, share_y: bool = False) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(3.4 * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=share_y)
    return figure, list(axes[0])


def _contexts(axis: Any) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(CONTEXTS, [f"{c // 1024}K" if c >= 1024 else str(c) for c in CONTEXTS])
    axis.set_xlabel("context, tokens a sequence")


def block_cycles() -> Figure:
    """What 64 KV tokens cost an SM by rows: tensor cores, shared memory, padded, and the memory's share, BF16."""
    figure, all_axes = _axes(3, share_y=True)
    rows = range(8, 65, 8)
    shapes = [Shape.equal(batch=1, context=BLOCK_TOKENS, heads=heads) for heads in rows]
    for axis, name in zip(all_axes, _GPUS, strict=True):
        gpu = load_gpu(name)
        roofs = [roofline.roof(roofline.EXACT, shape, gpu) for shape in shapes]
        padded = [roofline.roof(roofline.PADDED, shape, gpu).tensor for shape in shapes]
        axis.plot(rows, padded, color=_ORANGE, marker="s", label="tensor cores, padded to 64")
        axis.plot(rows, [r.tensor for r in roofs], color=_BLUE, marker="o", label="tensor cores, exact N")
        axis.plot(rows, [r.shared_memory for r in roofs], color=_GREEN, marker="^", label="shared memory, exact N")
        axis.axhline(roofs[0].hbm, color=_GREY, linestyle="--", label="HBM, BF16")
        axis.axhline(roofs[0].hbm / 2, color=_GREY, linestyle=":", label="HBM, FP8")
        axis.set_title(gpu.title)
        axis.set_xticks(list(rows))
        axis.set_xlabel("query rows")
        axis.set_ylim(0)
    all_axes[0].set_ylabel("cycles for 64 KV tokens")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def rooflines() -> Figure:
    """Useful TFLOP/s against FLOP a byte."""
    figure, all_axes = _axes(3)
    for axis, name in zip(all_axes, _GPUS, strict=True):
        gpu = load_gpu(name)
        edge = [1.0, gpu.bf16_tflops / gpu.hbm_tbs, 2000.0]
        axis.plot(edge, [gpu.hbm_tbs * edge[0], gpu.bf16_tflops, gpu.bf16_tflops], color=_GREY)
        for kv_format, filled in (("bf16", True), ("e4m3", False)):
            shapes = [Shape.equal(batch=1, context=BLOCK_TOKENS, heads=heads, kv_format=kv_format) for heads in (8, 16, 32, 64, 128)]
            for kernel, colour, marker, label in (
                (roofline.PADDED, _ORANGE, "s", "padded to 64"),
                (roofline.exact(shapes[0]), _BLUE, "o", "exact N"),
            ):
                roofs = [roofline.roof(kernel, shape, gpu) for shape in shapes]
                heights = [roofline.tflops(bounds, shape, gpu) for bounds, shape in zip(roofs, shapes, strict=True)]
                axis.plot(
                    [r.flop_per_byte for r in roofs],
                    heights,
                    linestyle="none",
                    marker=marker,
                    color=colour,
                    fillstyle="full" if filled else "none",
                    label=f"{label}, {'BF16' if filled else 'FP8'}",
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("useful FLOP a byte of KV cache")
        axis.set_title(f"{gpu.title}: {gpu.bf16_tflops:g} TFLOP/s, {gpu.hbm_tbs:g} TB/s")
    all_axes[0].set_ylabel("useful TFLOP/s at the bounds")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def h20_paper() -> Figure:
    """The paper's table on an H20, and the model with two fitted numbers a kernel."""
    figure, all_axes = _axes(2, share_y=True)
    calibration = packaged_calibrations()["h20-paper"]
    for axis, batch in zip(all_axes, (16, 32), strict=True):
        for measured, colour, title in zip(calibration.kernels, (_ORANGE, _BLUE), ("FlashMLA", "ETAP"), strict=True):
            rows = [r for r in residuals(calibration, measured) if r.shape.batch == batch]
            contexts = [r.shape.context for r in rows]
            axis.plot(contexts, [r.shape.flop / r.measured_us / 1e6 for r in rows], "o", color=colour, label=f"{title}, the paper's table")
            axis.plot(contexts, [r.shape.flop / r.prediction.us / 1e6 for r in rows], "-", color=colour, label=f"{title}, model")
        _contexts(axis)
        axis.set_title(f"H20, 16 heads, batch {batch}")
    all_axes[0].set_ylabel("useful TFLOP/s")
    all_axes[0].set_ylim(0, 115)
    all_axes[0].legend(loc="upper left", fontsize=8)
    return figure


def where_the_time_goes() -> Figure:
    """16 heads on an H100 by context: measured, model, and its parts."""
    figure, all_axes = _axes(2)
    calibration = packaged_calibrations()["h100-sxm-etap"]
    measured = calibration.kernels[0]
    found = basis(calibration.gpu, measured.kernel.name)
    for axis, batch in zip(all_axes, (1, 16), strict=True):
        shapes = [Shape.equal(batch=batch, context=context, heads=16) for context in CONTEXTS]
        predictions = [found.predict(shape) for shape in shapes]
        axis.plot(CONTEXTS, [p.us for p in predictions], color=_BLUE, label="model")
        axis.plot(CONTEXTS, [p.memory_us for p in predictions], color=_GREY, linestyle="--", label="HBM")
        axis.plot(CONTEXTS, [p.sm_us for p in predictions], color=_GREEN, linestyle="--", label="SM")
        axis.plot(CONTEXTS, [p.fixed_us for p in predictions], color=_ORANGE, linestyle="--", label="fixed cost")
        points = [(shape.context, measured.calls[shape.name]) for shape in shapes if shape.name in measured.calls]
        axis.plot(*zip(*points, strict=True), "o", color="black", label="measured")
        axis.set_yscale("log")
        _contexts(axis)
        axis.set_title(f"{found.gpu.title}, 16 heads, batch {batch}")
    all_axes[0].set_ylabel("microseconds")
    all_axes[0].legend()
    return figure


def speedup() -> Figure:
    """etap against the best padded kernel, by rows and context."""
    figure, all_axes = _axes(3, height=3.0)
    for axis, name in zip(all_axes, _GPUS, strict=True):
        first, second = basis(name, "etap"), basis(name, "best-peer")
        lines = crossover(first, second, batch=16)
        table = [[cell.speedup for cell in line.cells] for line in lines]
        axis.imshow(table, cmap="RdBu", norm=mpl.colors.TwoSlopeNorm(1.0, 0.4, 2.2), aspect="auto")
        for y, line in enumerate(lines):
            for x, cell in enumerate(line.cells):
                axis.text(
                    x, y, f"{cell.speedup:.2f}", ha="center", va="center", fontsize=6.5, color="white" if cell.speedup > 1.8 else "black"
                )
        axis.set_xticks(range(len(CONTEXTS)), [f"{c // 1024}K" if c >= 1024 else str(c) for c in CONTEXTS])
        axis.set_yticks(range(len(lines)), [str(line.rows) for line in lines])
        axis.grid(visible=False)
        axis.set_xlabel("context, tokens a sequence")
        axis.set_title(f"{first.gpu.title}{'' if first.measured and second.measured else ' (predicted)'}")
    all_axes[0].set_ylabel("query rows")
    return figure


ALL: dict[str, Callable[[], Figure]] = {
    "block-cycles": block_cycles,
    "rooflines": rooflines,
    "h20-paper": h20_paper,
    "where-the-time-goes": where_the_time_goes,
    "speedup": speedup,
}


def save(name: str, folder: Path) -> Path:
    """Draws a figure of ALL into `folder` as SVG, the same bytes on every run."""
    file = folder / f"{name}.svg"
    with mpl.rc_context(_STYLE):
        ALL[name]().savefig(file, metadata={"Date": None})
    return file
