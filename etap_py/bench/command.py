"""The command `etap bench`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etap_py.bench.results import Results, Row
    from etap_py.bench.runner import Bench

ROUNDS = 15
_DESCRIPTION = """Runs a workload as a series of real decode steps, with ETAP and with every peer that can be imported, checks every
result, and writes one JSON file, which `etap report` reads. Interrupted, it goes on when it is called again."""


def add_parser(commands: Any) -> None:
    """Adds `bench` to the subparsers of `etap`. Exit status: 0; 1 when a result of ETAP was wrong or the run broke off; 2 for input that
    can't be used; 130 when interrupted."""
    parser = commands.add_parser("bench", help="a workload or a request trace as decode steps, timed and checked", description=_DESCRIPTION)
    add = parser.add_argument
    add("workload", help="chat, long-documents or agents, which are shipped, a workload file (.toml) or a trace (.jsonl, .csv)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is a usable one)")
    add("--peers", help="comma-separated names; 'none': no peers (default: all)")
    add("--rounds", type=_positive, default=ROUNDS, help=f"turns of each contender (default: {ROUNDS})")
    add("--steps", type=_positive, help="decode steps to measure (default: the workload's)")
    add("--energy", type=int, default=4, metavar="STEPS", help="steps whose energy is measured too: 1.3 s a contender (default: 4 steps)")
    add("--shrink", type=_positive, help="divide lengths, batch and cache, to try a workload on a small machine")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the workload, as in model.heads=8")
    add("--output", "-o", type=Path, metavar="FILE", help="default: etap-bench-WORKLOAD-DEVICE.json")
    add("--fresh", action="store_true", help="measure everything anew, whatever the file holds")
    add("--step", type=int, metavar="INDEX", help="measure this step only and write no file")
    add("--list", action="store_true", help="show the decode steps and measure nothing")
    add("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from etap_py.bench.errors import Refused

    try:
        return _run(options)
    except Refused as refused:
        print(f"etap bench: {refused}", file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as failure:  # a full disk, CUDA, EtapError
        print(f"etap bench: broke off: {str(failure).splitlines()[0]} (what was measured before is kept)", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    import msgspec

    from etap_py.bench import peers, workload
    from etap_py.bench.errors import Refused
    from etap_py.bench.runner import Bench, Options

    arguments = [options.workload]
    settings = list(options.set)
    for name in ("steps", "shrink"):
        if getattr(options, name):
            settings.append(f"{name}={getattr(options, name)}")
    for setting in settings:
        arguments += ["--set", setting]
    device = options.device or _default_device()
    names = peers.NAMES if options.peers is None else [name for name in options.peers.split(",") if name != "none"]
    arguments += ["--device", device]
    arguments += ["--peers", options.peers] if options.peers else []
    arguments += ["--rounds", str(options.rounds)] if options.rounds != ROUNDS else []
    try:
        chosen = workload.load(options.workload, settings)
        bench = Bench(chosen, Options(device, names, options.rounds, max(0, options.energy), arguments))
    except OSError as error:
        raise Refused(f"workload {options.workload}: {error}") from error
    if options.list:
        _print_steps(bench, options.json)
        return 0
    if options.step is not None:
        if not 0 <= options.step < len(bench.steps):
            raise Refused(f"step is {options.step}; allowed: 0 to {len(bench.steps) - 1}")
        rows = list(bench.measure([options.step]))
        if options.json:
            print(msgspec.json.encode(rows[0]).decode())
        else:
            _print_row(rows[0])
        return 1 if "etap" in rows[0].wrong else 0

    safe = re.sub(r"\W+", "-", f"{chosen.name}-{bench.timer.device}")
    path = options.output or Path(f"etap-bench-{safe}.json")
    results = bench.begin(path, options.fresh)
    interrupted = False
    try:
        _fill(bench, path, results)
    except KeyboardInterrupt:
        interrupted = True
    if options.json:
        print(msgspec.json.encode(results).decode())
    else:
        _print_summary(results)
    state = f"{len(results.rows)} of {results.steps} steps are in {path}"
    if interrupted:
        print(f"etap bench: interrupted; {state}, and the same command goes on", file=sys.stderr)
        return 130
    print(f"{state}. Next: etap report {path}", file=sys.stderr)
    return 1 if any("etap" in row.wrong for row in results.rows) else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _default_device() -> str:
    import etap_py as etap

    return "cuda" if etap.device_info("cuda").usable else "cpu"


def _fill(bench: Bench, path: Path, results: Results) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    title, last = TextColumn("{task.description}"), TextColumn("{task.fields[last]}")
    columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), last)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        name = f"{bench.workload.name} on {bench.run.device.name}"
        task = progress.add_task(name, total=results.steps, completed=len(results.rows), last="")

        def advance(row: Row) -> None:
            us = row.measured.us.get("etap")
            progress.update(task, advance=1, last=f"batch {len(row.lengths)}: {_time(us)}")

        bench.fill(path, results, advance)


def _time(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.1f} µs" if us < 1e4 else f"{us / 1e3:.1f} ms"


def _print_steps(bench: Bench, as_json: bool) -> None:
    import msgspec
    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(msgspec.json.encode(bench.steps).decode())
        return
    table = Table(title=f"{bench.workload.name}: {len(bench.steps)} of {bench.all_steps} decode steps", title_justify="left")
    for name in ("index", "second", "batch", "query tokens", "longest", "shortest", "KV tokens"):
        table.add_column(name, justify="right")
    for index, step in enumerate(bench.steps):
        numbers = (len(step.lengths), sum(step.query_lens), max(step.lengths), min(step.lengths), sum(step.lengths))
        table.add_row(str(index), f"{step.seconds:.1f}", *(f"{number:,}" for number in numbers))
    Console().print(table)


def _print_row(row: Row) -> None:
    from rich.console import Console
    from rich.table import Table

    measured = row.measured
    kernel = f", {measured.kernel}" if measured.kernel else ""
    table = Table(title=f"step {row.index}: batch {len(row.lengths)}, {sum(row.lengths):,} KV tokens{kernel}", title_justify="left")
    for name in ("contender", "a layer", "worst row error"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for name, us in sorted(measured.us.items(), key=lambda item: item[1]):
        error = measured.worst_row_error.get(name)
        table.add_row(name, _time(us), "-" if error is None else f"{error:.1e}")
    for name, why in {**row.wrong, **measured.skipped}.items():
        table.add_row(name, "wrong" if name in row.wrong else "left out", why)
    Console().print(table)


def _print_summary(results: Results) -> None:
    import statistics

    from rich.console import Console
    from rich.table import Table

    if not results.rows:
        return
    names = sorted({name for row in results.rows for name in row.measured.us})
    table = Table(title=f"{results.run.workload.name} on {results.run.device.name}: one layer's call", title_justify="left")
    for name in ("contender", "steps", "median", "longest", "sum over etap's, same steps"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for name in names:
        times = [row.measured.us[name] for row in results.rows if name in row.measured.us]
        both = [(row.measured.us[name], row.measured.us["etap"]) for row in results.rows if {name, "etap"} <= row.measured.us.keys()]
        ratio = f"{sum(a for a, _ in both) / sum(b for _, b in both):.2f}" if both else "-"
        table.add_row(name, str(len(times)), _time(statistics.median(times)), _time(max(times)), ratio)
    console = Console()
    console.print(table)
    for name in (*results.run.peers, "etap", "ceiling"):
        reasons = [why for row in results.rows for n, why in {**row.measured.skipped, **row.wrong}.items() if n == name]
        if reasons:
            console.print(f"{name}: not in {len(reasons)} of {len(results.rows)} steps: {reasons[0]}", markup=False, highlight=False)
