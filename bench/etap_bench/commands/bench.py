"""The command `etap bench`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etap_py import terminal
from etap_py.options import whole
from etap_py.terminal import Column

if TYPE_CHECKING:
    from etap_bench.results import Results, Row
    from etap_bench.runner import Bench
    from etap_bench.scheduler import Step
    from etap_bench.workload import Workload

ROUNDS = 15
_DESCRIPTION = """Runs a workload as a series of real decode steps, with ETAP and with every peer that can be imported, checks every
result, and writes one JSON file, which `etap report` reads. Interrupted, it goes on when it is called again."""


def add_parser(commands: Any) -> None:
    """Adds `bench` to the subparsers of `etap`. Exit status: 0; 1 when a result of ETAP was wrong or the run broke off; 2 for input that
    can't be used; 130 when interrupted."""
    parser = commands.add_parser("bench", help="a workload or a request trace as decode steps, timed and checked", description=_DESCRIPTION)
    add = parser.add_argument
    traces = "a trace (.jsonl, .csv, also with .gz; - for standard input)"
    add("workload", help=f"chat, long-documents or agents, which are shipped, a workload file (.toml), or {traces}")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is a usable one)")
    add("--peers", help="comma-separated names; 'none': no peers (default: all)")
    add("--rounds", type=whole(1), default=ROUNDS, help=f"turns of each contender (default: {ROUNDS})")
    add("--steps", type=whole(1), help="decode steps to measure (default: the workload's)")
    add("--energy", type=whole(0), default=4, metavar="STEPS", help="steps whose energy is measured too, 1.3 s a contender (default: 4)")
    add("--shrink", type=whole(1), help="divide lengths, batch and cache, to try a workload on a small machine")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the workload, as in model.heads=8")
    add("--output", "-o", type=Path, metavar="FILE", help="default: etap-bench-WORKLOAD-DEVICE.json")
    add("--fresh", action="store_true", help="measure everything anew, whatever the file holds")
    add("--step", type=whole(0), metavar="INDEX", help="measure this step only and write no file")
    add("--list", action="store_true", help="show the decode steps and measure nothing")
    add("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from etap_bench.errors import Refused

    try:
        return _run(options)
    except Refused as refused:
        terminal.complain(f"etap bench: {refused}")
        return 2
    except (OSError, RuntimeError, MemoryError) as failure:  # CUDA, EtapError
        terminal.complain(f"etap bench: broke off: {terminal.sentence(failure)} (nothing was measured)")
        return 1


def _run(options: argparse.Namespace) -> int:
    from etap_bench import workload
    from etap_bench.errors import Refused, check_device

    arguments = [options.workload]
    settings = list(options.set)
    for name in ("steps", "shrink"):
        if getattr(options, name):
            settings.append(f"{name}={getattr(options, name)}")
    for setting in settings:
        arguments += ["--set", setting]
    names = _peer_names(options.peers)
    if options.device:
        check_device(options.device)
    try:
        chosen = workload.load(options.workload, settings)
        if options.list:
            return _list(chosen, options.json)
        device = options.device or _default_device()
        arguments += ["--device", device]
        arguments += ["--peers", options.peers] if options.peers else []
        arguments += ["--rounds", str(options.rounds)] if options.rounds != ROUNDS else []
        from etap_bench.runner import Bench, Options

        bench = Bench(chosen, Options(device, names, options.rounds, options.energy, arguments))
    except OSError as error:
        raise Refused(f"workload {options.workload}: {error}") from error
    _say_note(bench.note)
    if options.step is not None:
        return _measure_one(bench, options.step, options.json)
    safe = re.sub(r"\W+", "-", f"{chosen.name}-{bench.timer.device}")
    return _measure_all(bench, options.output or Path(f"etap-bench-{safe}.json"), options.fresh, options.json)


def _peer_names(given: str | None) -> Sequence[str]:
    from etap_bench.errors import Refused
    from etap_bench.measurement import PEERS

    names = PEERS if given is None else [name for name in given.split(",") if name != "none"]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise Refused(f"peer is {unknown[0]!r}; allowed: {', '.join(PEERS)}, none")
    return names


def _say_note(note: str) -> None:
    if note:
        terminal.complain(f"etap bench: {note}")


def _list(chosen: Workload, as_json: bool) -> int:
    """Needs neither the library nor PyTorch."""
    import msgspec

    from etap_bench.scheduler import sample_steps

    trace = chosen.read()
    _say_note(trace.note if chosen.trace else "")
    steps, every = sample_steps(chosen, trace.requests)
    if as_json:
        terminal.write(msgspec.json.encode(steps).decode())
    else:
        _print_steps(chosen.name, steps, every)
    return 0


def _measure_one(bench: Bench, index: int, as_json: bool) -> int:
    import msgspec

    from etap_bench.errors import Refused

    if index >= len(bench.steps):
        raise Refused(f"step is {index}; allowed: 0 to {len(bench.steps) - 1}")
    (row,) = bench.measure([index])
    if as_json:
        terminal.write(msgspec.json.encode(row).decode())
    else:
        _print_row(row)
    return 1 if "etap" in row.wrong else 0


def _measure_all(bench: Bench, path: Path, fresh: bool, as_json: bool) -> int:
    import msgspec

    results = bench.begin(path, fresh)
    status, why = 0, ""
    try:
        _fill(bench, path, results)
    except KeyboardInterrupt:
        status, why = 130, "interrupted"
    except (OSError, RuntimeError, MemoryError) as failure:  # a full disk, CUDA, EtapError
        status, why = 1, f"broke off: {terminal.sentence(failure)}"
    if as_json:
        terminal.write(msgspec.json.encode(results).decode())
    else:
        _print_summary(results)
    measured = len(results.rows)
    state = f"{measured} of {results.steps} steps are in {path}" if measured else f"nothing was measured, and {path} is not written"
    if status:
        terminal.complain(f"etap bench: {why}; {state}{', and the same command goes on' if measured else ''}")
        return status
    terminal.complain(f"{state}. Next: etap report {path}")
    return 1 if any("etap" in row.wrong for row in results.rows) else 0


def _default_device() -> str:
    import etap_py as etap

    return "cuda" if etap.device_info("cuda").usable else "cpu"


def _fill(bench: Bench, path: Path, results: Results) -> None:
    title = f"{bench.workload.name} on {bench.run.device.name}"
    with terminal.Progress(title, results.steps, done=len(results.rows)) as progress:

        def advance(row: Row) -> None:
            progress.advance(f"batch {len(row.lengths)}: {_time(row.measured.us.get('etap'))}")

        bench.fill(path, results, advance)


def _time(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.1f} µs" if us < 1e4 else f"{us / 1e3:.1f} ms"


def _print_steps(name: str, steps: Sequence[Step], every: int) -> None:
    columns = [Column("index", right=True), Column("second", right=True), Column("batch", right=True), Column("query tokens", right=True)]
    columns += [Column("longest", right=True), Column("shortest", right=True, optional=True), Column("KV tokens", right=True)]
    rows = []
    for index, step in enumerate(steps):
        numbers = (len(step.lengths), sum(step.query_lens), max(step.lengths), min(step.lengths), sum(step.lengths))
        rows.append((str(index), f"{step.seconds:.1f}", *(f"{number:,}" for number in numbers)))
    terminal.table(f"{name}: {len(steps)} of {every} decode steps", columns, rows)


def _print_row(row: Row) -> None:
    measured = row.measured
    kernel = f", {measured.kernel}" if measured.kernel else ""
    rows = []
    for name, us in sorted(measured.us.items(), key=lambda item: item[1]):
        error = measured.worst_row_error.get(name)
        rows.append((name, _time(us), "-" if error is None else f"{error:.1e}"))
    title = f"step {row.index}: batch {len(row.lengths)}, {sum(row.lengths):,} KV tokens{kernel}"
    columns = ("contender", Column("a layer", right=True), Column("worst row error", right=True))
    left_out = [f"{name} is wrong: {why}" for name, why in row.wrong.items()]
    left_out += [f"{name} is left out: {why}" for name, why in measured.skipped.items()]
    terminal.table(title, columns, rows, "\n".join(left_out))


def _print_summary(results: Results) -> None:
    import statistics

    if not results.rows:
        return
    rows = []
    for name in sorted({name for row in results.rows for name in row.measured.us}):
        times = [row.measured.us[name] for row in results.rows if name in row.measured.us]
        both = [(row.measured.us[name], row.measured.us["etap"]) for row in results.rows if {name, "etap"} <= row.measured.us.keys()]
        ratio = f"{sum(a for a, _ in both) / sum(b for _, b in both):.2f}" if both else "-"
        rows.append((name, str(len(times)), _time(statistics.median(times)), _time(max(times)), ratio))
    numbers = ("steps", "median", "longest", "sum over etap's, same steps")
    columns = [Column("contender"), *(Column(name, right=True) for name in numbers)]
    left_out = []
    for name in (*results.run.peers, "etap", "ceiling"):
        reasons = [why for row in results.rows for n, why in {**row.measured.skipped, **row.wrong}.items() if n == name]
        if reasons:
            left_out.append(f"{name}: not in {len(reasons)} of {len(results.rows)} steps: {reasons[0]}")
    terminal.table(f"{results.run.workload.name} on {results.run.device.name}: one layer's call", columns, rows, "\n".join(left_out))
