#!/usr/bin/env python3
"""Keeps benchmark runs under version control, one JSON file a card in benchmarks/, and compares runs of the same card.

    python scripts/bench_history.py compare build/bench.json    # what moved against the last stored run of the card
    python scripts/bench_history.py store build/bench.json      # adds the run to the store
    python scripts/bench_history.py page build/trends.html      # plots every card's runs

It reads what `pytest tests/bench --benchmark-json` writes (make bench) and what `scripts/bench_gpu.py --json` writes. What moved is judged
by the fraction of the ceiling, a ratio within one run, so that a card with other clocks or neighbours does not look like a change; medians
in microseconds are shown beside it.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import itertools
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "benchmarks"
FIELDS = ("etap_us", "ceiling_us", "fraction", "terabytes_per_second", "plan_us", "millijoules", "error", "sm_mhz", "kernel")
COLUMNS = 6  # panels beside each other on the page
NOISE = 0.03  # of a fraction; repeated runs on one card differ by less than 2 %

Run = dict[str, Any]  # date, commit, card, rows: {shape: {field: value}}


def read_runs(path: Path, tree: str = "") -> list[Run]:
    """A file's rows by card; shapes that ETAP did not compute are left out. tree: what was measured; "": this working tree."""
    try:
        content = json.loads(path.read_text())
        if "benchmarks" in content:
            rows = [bench["extra_info"] for bench in content["benchmarks"] if "card" in bench["extra_info"]]
            host = content["machine_info"].get("cpu", {}).get("brand_raw", "unknown processor")
            found = [(f"{row['card']}, {host}" if row["card"].startswith("cpu") else row["card"], row) for row in rows]
        else:
            energy = [{**row, "millijoules": row["millijoules"].get("etap"), "error": row["error"].get("etap")} for row in content["rows"]]
            found = [(content["device"], row) for row in energy]
        written = datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
        runs: dict[str, Run] = {}
        for card, row in found:
            run = runs.setdefault(card, {"date": written, "commit": tree or commit(), "card": card, "rows": {}})
            if row["etap_us"] is not None:
                run["rows"][row["name"]] = {name: rounded(row[name]) for name in FIELDS if row[name] is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"bench_history: {path} can't be read as a benchmark's JSON: {error!r}") from error
    return list(runs.values())


def commit() -> str:
    """The tree that was measured; marked where it has changes that are not committed."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return described.stdout.strip() or "unknown"


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def store_of(card: str) -> Path:
    return STORE / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json")


def stored(card: str) -> list[Run]:
    """Oldest first."""
    path = store_of(card)
    runs: list[Run] = json.loads(path.read_text())["runs"] if path.exists() else []
    return runs


def add(run: Run) -> Path:
    """Appends a run to its card's file: a line for each shape, so that a diff reads like a table."""
    parts = []
    for one in [*stored(run["card"]), run]:
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in one["rows"].items())
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(one[key])}" for key in ("date", "commit", "card"))
        parts.append(f'  {{{head}, "rows": {{\n{rows}\n  }}}}')
    path = store_of(run["card"])
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"runs": [\n' + ",\n".join(parts) + "\n]}\n")
    return path


def compare(run: Run) -> list[tuple[str, float, float, float, float]]:
    """Shapes of both this and the card's last stored run: (name, fraction then, now, microseconds then, now), the most changed first."""
    before = stored(run["card"])[-1]["rows"]
    both = [(name, before[name], row) for name, row in run["rows"].items() if name in before]
    pairs = [(name, old["fraction"], new["fraction"], old["etap_us"], new["etap_us"]) for name, old, new in both]
    return sorted(pairs, key=lambda pair: pair[2] / pair[1])


def print_comparison(run: Run) -> None:
    sys.path.append(str(ROOT))
    from etap_py import terminal
    from etap_py.terminal import Column, Mark

    runs = stored(run["card"])
    if not runs:
        terminal.write(f"{run['card']}: no stored run to compare {len(run['rows'])} shapes with")
        return
    pairs = compare(run)
    moved = [pair for pair in pairs if abs(pair[2] / pair[1] - 1) > NOISE]
    last = runs[-1]
    title = f"{run['card']}: {len(moved)} of {len(pairs)} shapes moved by more than {NOISE:.0%} since {last['date']} ({last['commit']})"
    if not moved:
        terminal.write(title)
        return
    rows = [
        (
            *(name, f"{old:.3f}", f"{new:.3f}"),
            *(Mark(f"{new / old - 1:+.1%}", "green" if new > old else "red"), f"{old_us:.1f}", f"{new_us:.1f}"),
        )
        for name, old, new, old_us, new_us in moved
    ]
    terminal.table(
        title, ("shape", *(Column(name, right=True) for name in ("of the ceiling then", "now", "change", "µs then", "now"))), rows
    )


def trend_page(path: Path) -> None:
    """One figure a card, with a panel for each shape: fraction of the ceiling by run."""
    body = "\n".join(trend(store) for store in sorted(STORE.glob("*.json"))) or "<p>No run is stored yet.</p>"
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>ETAP: benchmark trends</title>\n'
        "<style>body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem } img { width: 100% }"
        f"</style></head>\n<body>\n<h1>Benchmark trends</h1>\n{body}\n</body></html>\n"
    )


def trend(store: Path) -> str:
    from matplotlib.figure import Figure

    runs: list[Run] = json.loads(store.read_text())["runs"]
    names = list(dict.fromkeys(name for run in runs for name in run["rows"]))
    rows = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(2 * COLUMNS, 1.25 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, name in itertools.zip_longest(panels, names):
        if name is None:
            panel.set_axis_off()
            continue
        points = [(i, run["rows"][name]["fraction"]) for i, run in enumerate(runs) if name in run["rows"]]
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, color="#0072B2")
        panel.set_title(f"{name}\n{points[-1][1]:.2f}", fontsize=7)
        panel.set(ylim=(0, 1.05), xlim=(-0.3, len(runs) - 0.7), xticks=range(len(runs)))
        panel.tick_params(labelsize=6, labelbottom=False)
        panel.grid(color="#dddddd")
    svg = io.BytesIO()
    figure.savefig(svg, format="svg")
    card = html.escape(runs[-1]["card"])
    data = base64.b64encode(svg.getvalue()).decode()
    listed = "".join(f"<li>{run['date']}, {html.escape(run['commit'])}</li>" for run in runs)
    image = f'<img alt="Fraction of the ceiling by run on {card}" src="data:image/svg+xml;base64,{data}">'
    return f"<h2>{card}</h2>\n<p>Fraction of the ceiling, run by run:</p><ol>{listed}</ol>\n{image}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("action", choices=("compare", "store", "page"))
    parser.add_argument("file", type=Path, help="the benchmark's JSON; for page, the HTML file to write")
    parser.add_argument("--commit", default="", help="the tree that was measured, where it is not this one as it is now")
    options = parser.parse_args(arguments)
    if options.action == "page":
        trend_page(options.file)
        return 0
    for run in read_runs(options.file, options.commit):
        print_comparison(run)
        if options.action == "store":
            print(f"stored in {add(run)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
