"""Runs under version control: a folder for each card, in it the files that `etap bench` wrote, numbered in the order in which they were
stored."""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
from pathlib import Path

from etap_bench import results
from etap_bench.errors import Refused
from etap_bench.results import Device, Results

COLUMNS = 6  # panels beside each other on the page
_STORED = re.compile(r"(\d{3,})-.*\.json")


def folder_of(store: Path, device: Device) -> Path:
    """Where the runs of such a card lie."""
    return store / re.sub(r"[^a-z0-9]+", "-", device.title.lower()).strip("-")


def paths(folder: Path) -> list[Path]:
    """The files of a card, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("*.json") if (match := _STORED.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def runs(folder: Path) -> list[Results]:
    """Of a card, oldest first. Raises Refused for a file that is something else, OSError."""
    return [results.read(path) for path in paths(folder)]


def cards(store: Path) -> list[Path]:
    """The folders of a store that hold runs. Raises OSError."""
    return sorted(folder for folder in store.iterdir() if folder.is_dir() and paths(folder)) if store.exists() else []


def add(run: Results, store: Path) -> Path:
    """Writes a run of shapes beside the earlier ones of its card, which stay as they are; its file. Raises Refused, OSError."""
    if run.run.workload is not None:
        raise Refused(f"the file has the steps of the workload {run.run.workload.name}; allowed: runs of shapes")
    if not run.rows:
        raise Refused("the file has no measured shape; allowed: one or more")
    folder = folder_of(store, run.run.device)
    folder.mkdir(parents=True, exist_ok=True)
    last = paths(folder)
    number = int(last[-1].name.partition("-")[0]) + 1 if last else 1
    name = re.sub(r"[^A-Za-z0-9.]+", "-", run.run.commit or run.started[:10])
    path = folder / f"{number:03}-{name}.json"
    results.write(path, run)
    return path


def page(store: Path) -> str:
    """HTML with a figure for each card, in it a panel for each shape: fraction of the ceiling by run. Raises Refused, OSError."""
    body = "\n".join(_trend(runs(folder)) for folder in cards(store)) or "<p>No run is stored yet.</p>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>ETAP: benchmark trends</title>\n'
        "<style>body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem } img { width: 100% }"
        f"</style></head>\n<body>\n<main>\n<h1>Benchmark trends</h1>\n{body}\n</main>\n</body></html>\n"
    )


def _trend(stored: list[Results]) -> str:
    from matplotlib.figure import Figure

    fractions = [{row.name: row.measured.fraction for row in run.rows if row.measured.fraction} for run in stored]
    names = list(dict.fromkeys(name for run in fractions for name in run))
    count = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 1.25 * count + 0.5), layout="constrained")
    panels = figure.subplots(count, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, name in itertools.zip_longest(panels, names):
        if name is None:
            panel.set_axis_off()
            continue
        points = [(i, run[name]) for i, run in enumerate(fractions) if name in run]
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, color="#0072B2")
        panel.set_title(f"{name}\n{points[-1][1]:.2f}", fontsize=7)
        panel.set(ylim=(0, 1.05), xlim=(-0.3, len(stored) - 0.7), xticks=range(len(stored)))
        panel.tick_params(labelsize=6, labelbottom=False)
        panel.grid(color="#dddddd")
    svg = io.BytesIO()
    figure.savefig(svg, format="svg")
    card = html.escape(stored[-1].run.device.title)
    data = base64.b64encode(svg.getvalue()).decode()
    listed = "".join(f"<li>{html.escape(run.source)}</li>" for run in stored)
    image = f'<img alt="Fraction of the ceiling by run on {card}" src="data:image/svg+xml;base64,{data}">'
    return f"<h2>{card}</h2>\n<p>Fraction of the ceiling, run by run:</p><ol>{listed}</ol>\n{image}"
