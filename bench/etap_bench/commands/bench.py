"""The command `etap bench`."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etap_py import terminal
from etap_py.options import amount, whole
from etap_py.terminal import Column

from etap_bench.errors import Refused, check_device
from etap_bench.measurement import PEERS, REFERENCE

if TYPE_CHECKING:
    from etap_bench.results import Results, Row
    from etap_bench.runner import Bench
    from etap_bench.work import Work

ROUNDS, WARM_UP = 15, 1
SUSTAIN, SUSTAINED_STEPS = 1.0, 4  # of a workload on a GPU
# Of a workload on a CPU, where nothing else is asked for: 10 s on two idle cores, 30 s on two busy ones.
FIRST_TRY = {"steps": 8, "shrink": 8}
_DESCRIPTION = """Times a workload as a series of real decode steps, or shapes, with ETAP and with every peer that can be imported, checks
every result against float64, and writes one JSON file, which `etap report` reads. Interrupted, it goes on when it is called again."""
_WORK = """chat, long-documents or agents, which are shipped, a workload file (.toml), or a trace (.jsonl, .csv, also with .gz; - for
standard input); or shapes: names like bf16-16x16K-h16, the lists published, more, quick, sparse, cpu and gpu, files of them (.toml)"""
_SUSTAIN = f"""each contender alone for so long, with energy, power and clock (default: {SUSTAIN:g} in some steps of a workload on a GPU,
else 0)"""


def add_parser(commands: Any) -> None:
    """Adds `bench` to the subparsers of `etap`. Exit status: 0; 1 when a result of ETAP was wrong or the run broke off; 2 for input that
    can't be used; 130 when interrupted."""
    parser = commands.add_parser("bench", help="a workload, a request trace or shapes, timed and checked", description=_DESCRIPTION)
    what = parser.add_argument_group("what to measure")
    add = what.add_argument
    add("work", nargs="*", help=_WORK)
    add("--sweep", nargs="+", default=[], metavar="NAME=VALUES", help="all combinations: heads=8,16 batch=1..64 (doubling) context=2K..64K")
    add("--filter", default="", metavar="REGEX", help="only shapes whose names match")
    add("--sms", type=whole(0), default=0, help="SMs for every shape (default: what its name says)")
    add("--steps", type=whole(1), help="decode steps to measure (default: the workload's)")
    add("--shrink", type=whole(1), help="divide lengths, batch and cache, to try a workload on a small machine")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the workload, as in model.heads=8")
    add("--limit", type=whole(1), help="requests of a trace to take (default: all)")
    add("--skip", type=whole(0), help="requests of a trace to leave out before them")
    add("--time-scale", type=amount(above=True), help="multiply the times of a trace's arrivals: 0.5 is twice the load")
    add("--model", metavar="PRESET", help="whose heads, layers and widths: kimi-k2, deepseek-v3.2, ... (default: the workload's)")
    add("--tp", type=whole(1), metavar="CARDS", help="that serve the model, counted as SGLang does (default: 1)")
    add("--dp", type=whole(1), metavar="GROUPS", help="of cards, each with requests of its own (default: 1); one is measured")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is a usable one)")
    add("--peers", help="comma-separated names; 'none': no peers (default: all; on a CPU none)")
    add("--rounds", type=whole(1), default=ROUNDS, help=f"turns of each contender (default: {ROUNDS})")
    add("--warm-up", type=whole(0), default=WARM_UP, metavar="ROUNDS", help=f"turns before them (default: {WARM_UP})")
    add("--sustain", type=amount(), metavar="SECONDS", help=_SUSTAIN)
    add("--sustain-rows", type=whole(0), metavar="ROWS", help=f"in how many (default: {SUSTAINED_STEPS} steps of a workload, every shape)")
    add("--commit", default="", help="what to call the tree that is measured (default: git's name for it)")
    where = parser.add_argument_group("where it goes")
    add = where.add_argument
    add("--output", "-o", type=Path, metavar="FILE", help="default: etap-bench-WORKLOAD-DEVICE.json; of shapes none")
    add("--fresh", action="store_true", help="measure everything anew, whatever the file holds")
    add("--step", type=whole(0), metavar="INDEX", help="measure this step only and write no file")
    add("--list", action="store_true", help="show the steps or shapes and measure nothing")
    add("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except Refused as refused:
        terminal.complain(f"etap bench: {refused}")
        return 2
    except (OSError, RuntimeError, MemoryError) as failure:  # CUDA, EtapError
        terminal.complain(f"etap bench: broke off: {terminal.sentence(failure)} (nothing was measured)")
        return 1


def _run(options: argparse.Namespace) -> int:
    from etap_bench import presets, work

    without_file = "step" if options.step is not None else "list" if options.list else ""
    for name in ("output", "fresh"):
        if without_file and getattr(options, name):
            raise Refused(f"{name} is given with {without_file}, which writes no file; allowed: one of them")
    if options.output is not None:
        _check(options.output)
    settings = list(options.set)
    settings += [f"{name}={getattr(options, name)}" for name in ("steps", "shrink") if getattr(options, name)]
    settings += [f"trace_{name}={getattr(options, name)}" for name in ("limit", "skip", "time_scale") if getattr(options, name) is not None]
    settings += [f"server.preset={presets.name_of(options.model)}"] if options.model else []
    settings += [f"server.{name}={getattr(options, name)}" for name in ("tp", "dp") if getattr(options, name)]
    names = _peer_names(options.peers)
    if options.device:
        check_device(options.device)
    try:
        device = options.device or ("" if options.list else _default_device())
        sources = options.work
        first_try = not options.list and device == "cpu" and _is_first_try(options)
        if first_try:
            settings += [f"{name}={value}" for name, value in FIRST_TRY.items()]
        chosen = work.of_arguments(sources, settings, options.sweep, options.filter, options.sms)
    except OSError as failure:
        raise Refused(f"{failure.filename or ' '.join(options.work)} can't be read: {failure.strerror}") from failure
    _check_is_no_input(options, chosen)
    _say(chosen.note)
    if options.list:
        return _list(chosen, options.json)
    if options.peers is None and device == "cpu":
        names = []
    path = options.output
    if path is None and chosen.workload is not None:
        path = Path(f"etap-bench-{re.sub(r'[^A-Za-z0-9_]+', '-', f'{chosen.name}-{device}')}.json")
        if options.step is None:
            _check(path)
    if first_try:
        _say(f"{chosen.name} on the CPU: {_first_try(chosen)}; --steps, --shrink and --peers ask for more")
    bench = _bench(chosen, options, settings, device, names)
    if options.step is not None:
        return _measure_one(bench, options.step, options.json)
    return _measure_all(bench, path, options.fresh, options.json)


def _is_first_try(options: argparse.Namespace) -> bool:
    """A shipped workload as it is: a new user on a machine without a GPU should see results within a minute."""
    from etap_bench import workload

    asked = [getattr(options, name) for name in ("steps", "shrink", "peers", "step", "sustain", "model", "tp", "dp")]
    more = options.set or options.rounds > ROUNDS or any(value is not None for value in asked)
    return len(options.work) == 1 and options.work[0] in workload.shipped() and not more


def _first_try(chosen: Work) -> str:
    assert chosen.workload is not None
    return (
        f"{len(chosen.items)} of {chosen.all_steps:,} steps, lengths, batch and cache divided by {chosen.workload.shrink}, without peers: "
        "10 to 60 seconds"
    )


def _bench(chosen: Work, options: argparse.Namespace, settings: Sequence[str], device: str, names: Sequence[str]) -> Bench:
    """PyTorch and libetap are imported here."""
    of_steps = chosen.workload is not None
    default = SUSTAIN if of_steps and device != "cpu" else 0.0
    seconds = default if options.sustain is None else options.sustain
    rows = options.sustain_rows
    if rows and not seconds:
        raise Refused(f"sustain_rows is {rows} where nothing is sustained; allowed: with --sustain SECONDS above 0")
    if rows is None:
        rows = SUSTAINED_STEPS if of_steps else len(chosen.items)

    from etap_bench.measure import Rounds
    from etap_bench.runner import Bench, Options

    arguments = list(options.work)
    arguments += ["--sweep", *options.sweep] if options.sweep else []
    arguments += ["--sms", str(options.sms)] if options.sms else []
    for setting in settings:
        arguments += ["--set", setting]
    arguments += ["--device", device, "--peers", ",".join(names) or "none"]
    arguments += ["--rounds", str(options.rounds)] if options.rounds != ROUNDS else []
    arguments += ["--warm-up", str(options.warm_up)] if options.warm_up != WARM_UP else []
    arguments += ["--sustain", f"{seconds:g}"] if seconds != default else []
    return Bench(
        chosen, Options(device, names, Rounds(options.rounds, options.warm_up, seconds), rows if seconds else 0, arguments, options.commit)
    )


def _peer_names(given: str | None) -> list[str]:
    names = list(PEERS) if given is None else [name for name in given.split(",") if name != "none"]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise Refused(f"peer is {unknown[0]!r}; allowed: {', '.join(PEERS)}, none")
    return names


def _check(path: Path) -> None:
    """Before anything slow is imported."""
    from etap_py.files import cant_write, check_writable

    try:
        check_writable(path)
    except OSError as failure:
        raise Refused(cant_write(failure)) from failure


def _check_is_no_input(options: argparse.Namespace, chosen: Work) -> None:
    """A run would replace the trace or the list that it was made of."""
    inputs = [*options.work, chosen.workload.trace if chosen.workload else ""]
    of_files = [Path(name) for name in inputs if Path(name).suffix and Path(name).exists()]
    output: Path | None = options.output
    if output is not None and output.exists() and any(output.samefile(path) for path in of_files):
        raise Refused(f"output is {output}, which is an input; allowed: another file")


def _say(note: str) -> None:
    if note:
        terminal.complain(f"etap bench: {note}")


def _list(chosen: Work, as_json: bool) -> int:
    """Needs neither the library nor PyTorch."""
    import msgspec

    if as_json:
        terminal.write(msgspec.json.encode(chosen.items, enc_hook=str).decode())
    elif chosen.workload is not None:
        _print_steps(chosen)
    else:
        terminal.write("\n".join(item.name for item in chosen.items))
    return 0


def _measure_one(bench: Bench, index: int, as_json: bool) -> int:
    import msgspec

    of_steps = [item for item in bench.work.items if item.step is not None and item.step.index == index]
    if not of_steps:
        allowed = f"0 to {len(bench.work.items) - 1}" if bench.work.workload else "with a workload only (--filter chooses shapes)"
        raise Refused(f"step is {index}; allowed: {allowed}")
    (row,) = bench.measure(of_steps)
    if as_json:
        terminal.write(msgspec.json.encode(row).decode())
    else:
        _print_row(row)
    return 1 if "etap" in row.wrong else 0


def _measure_all(bench: Bench, path: Path | None, fresh: bool, as_json: bool) -> int:
    from etap_bench import results

    done = bench.begin(path, fresh)
    old = f" (all were measured on {done.started}; --fresh measures anew)" if done.complete else ""
    status, why = 0, ""
    try:
        _fill(bench, path, done)
    except KeyboardInterrupt:
        status, why = 130, "interrupted"
    except (OSError, RuntimeError, MemoryError) as failure:  # a full disk, CUDA, EtapError
        status, why = 1, f"broke off: {terminal.sentence(failure)}"
    if as_json:
        terminal.write(results.encoded(done).decode().rstrip())
    else:
        (_print_shapes if done.run.workload is None else _print_summary)(done, bench.work)
    measured = f"{len(done.rows)} of {len(done.run.rows)} {'steps' if done.run.workload else 'shapes'}"
    if path is None:
        if status:
            terminal.complain(f"etap bench: {why} after {measured}; --output keeps what is measured")
        return status or _exit_status(done)
    state = f"{measured} are in {path}" if done.rows else f"nothing was measured, and {path} is not written"
    if status:
        terminal.complain(f"etap bench: {why}; {state}{', and the same command goes on' if done.rows else ''}")
        return status
    terminal.complain(f"{state}{old}. Next: etap report {path}")
    return _exit_status(done)


def _exit_status(done: Results) -> int:
    return 1 if any("etap" in row.wrong for row in done.rows) else 0


def _default_device() -> str:
    import etap_py as etap

    return "cuda" if etap.device_info("cuda").usable else "cpu"


def _fill(bench: Bench, path: Path | None, done: Results) -> None:
    with terminal.Progress(f"{bench.work.name} on {bench.run.device.name}", len(done.run.rows), done=len(done.rows)) as progress:

        def advance(row: Row) -> None:
            progress.advance(f"{row.name}: {_time(row.measured.etap_us)}")

        bench.fill(path, done, advance)


def _time(us: float | None) -> str:
    from etap_bench.report.text import duration

    return "-" if us is None else duration(us)


def _print_steps(chosen: Work) -> None:
    columns = [Column("index", right=True), Column("second", right=True), Column("batch", right=True), Column("query tokens", right=True)]
    columns += [Column("longest", right=True), Column("shortest", right=True, optional=True), Column("KV tokens", right=True)]
    rows = []
    for item in chosen.items:
        assert item.step is not None
        numbers = (item.shape.batch, item.shape.query_tokens, max(item.shape.lengths), min(item.shape.lengths), item.shape.tokens)
        rows.append((str(item.step.index), f"{item.step.seconds:.1f}", *(f"{number:,}" for number in numbers)))
    assert chosen.workload is not None
    title = f"{chosen.name}: {len(chosen.items)} of {chosen.all_steps:,} decode steps, {chosen.workload.served}"
    terminal.table(title, columns, rows)


def _print_row(row: Row) -> None:
    measured = row.measured
    kernel = f", {measured.kernel}" if measured.kernel else ""
    rows = []
    for name, us in sorted(measured.us.items(), key=lambda item: item[1]):
        error = measured.worst_row_error.get(name)
        rows.append((name, _time(us), "-" if error is None else f"{error:.1e}"))
    title = f"{row.name}: batch {row.shape.batch}, {row.shape.tokens:,} KV tokens{kernel}"
    columns = ("contender", Column("a layer", right=True), Column("worst row error", right=True))
    left_out = [f"{name} is wrong: {why}" for name, why in row.wrong.items()]
    left_out += [f"{name} is left out: {why}" for name, why in measured.skipped.items()]
    terminal.table(title, columns, rows, "\n".join(left_out))


def _print_summary(done: Results, _: Work) -> None:
    """Of a workload: each contender over its steps."""
    if not done.rows:
        return
    rows = []
    for name in sorted({name for row in done.rows for name in row.measured.times}):
        times = [row.measured.us[name] for row in done.rows if name in row.measured.times]
        both = [(row.measured.us[name], row.measured.us["etap"]) for row in done.rows if {name, "etap"} <= row.measured.times.keys()]
        ratio = f"{sum(a for a, _ in both) / sum(b for _, b in both):.2f}" if both else "-"
        rows.append((name, str(len(times)), _time(statistics.median(times)), _time(max(times)), ratio))
    numbers = ("steps", "median", "longest", "sum over etap's, same steps")
    columns = [Column("contender"), *(Column(name, right=True) for name in numbers)]
    terminal.table(f"{done.title} on {done.run.device.name}: one layer's call", columns, rows, "\n".join(_left_out(done)))


def _left_out(done: Results) -> list[str]:
    said = []
    for name in (*done.run.peers, "etap", "ceiling"):
        reasons = [why for row in done.rows for n, why in {**row.measured.skipped, **row.wrong}.items() if n == name]
        if reasons:
            said.append(f"{name}: not in {len(reasons)} of {len(done.rows)} rows: {reasons[0]}")
    return said


def _print_shapes(done: Results, chosen: Work) -> None:
    """A line for each shape."""
    from etap_bench.report.text import significant
    from etap_bench.table import COLUMNS, cells, geometric_means

    if not done.rows:
        return
    columns = [Column(name, right=name not in ("shape", "best peer"), optional=optional) for name, optional in COLUMNS.items()]
    notes = [
        f"{name}: geometric mean {mean:.3f} of the ceiling, {count} shapes" for name, mean, count in geometric_means(done, chosen.groups)
    ]
    if all(name == REFERENCE for name in done.run.peers) or not any(row.measured.best_peer for row in done.rows):
        notes.append("No peer took part.")
    rows = [cells(row, significant) for row in done.rows]
    shown = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
    terminal.table(
        f"One layer's call on {done.run.device.name}",
        [columns[i] for i in shown],
        [[row[i] or "-" for i in shown] for row in rows],
        "\n".join([*notes, *_left_out(done)]),
    )
