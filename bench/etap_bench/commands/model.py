"""The command `etap model`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etap_py import terminal
from etap_py.files import cant_write, check_writable
from etap_py.options import whole
from etap_py.terminal import Column

if TYPE_CHECKING:
    from etap_bench.model.calibration import Calibration, Measured, Residual

_DESCRIPTION = """Explains and predicts the time of MLA decode on Hopper GPUs: what bounds a shape, whether exact N or padding to 64 rows is
faster, and how far the model is from what was measured. docs/theory.md derives it. Predictions for cards on which the kernel was not
measured are marked with ~."""
_SHAPES = "like bf16-16x4K-h16: format, batch x context, heads; -q2: query tokens, -sm66: SMs, -d512_0: d_latent and d_rope"
_OUR_KERNEL, _PADDED_KERNEL = "etap", "best-peer"


def add_parser(commands: Any) -> None:
    """Adds `model` to the subparsers of `etap`. Exit status: 0; 1 when a file can't be written; 2 for input that can't be used."""
    parser = commands.add_parser("model", help="what bounds a shape on a GPU, and how long it takes", description=_DESCRIPTION)
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, do: Callable[[argparse.Namespace], Any], help_text: str) -> Callable[..., Any]:
        made = actions.add_parser(name, help=help_text, description=help_text)
        made.set_defaults(do=do)
        made.add_argument("--json", action="store_true", help="JSON instead of tables")
        add: Callable[..., Any] = made.add_argument
        return add

    action("gpus", _gpus, "the GPUs that are described, and the calibrations")

    add = action("roofline", _roofline, "bounds that need no measurement: cycles of a 64-token block, padded against exact N")
    add("--gpu", required=True, help="a name of `etap model gpus`, or a TOML file like theirs")
    add("--kv-format", default="bf16", help="default: bf16")

    add = action("predict", _predict, "time and limit of shapes")
    add("shapes", nargs="+", metavar="SHAPE", help=_SHAPES)
    add("--gpu", action="append", required=True, help="may be repeated")
    add("--kernel", action="append", help=f"may be repeated (default: {_OUR_KERNEL}, and with a 16-bit cache {_PADDED_KERNEL})")
    add("--calibration", type=Path, metavar="FILE", help="of `etap model calibrate`, before the packaged ones")

    add = action("crossover", _crossover, "a table of speed-ups over contexts and query rows")
    add("--gpu", required=True)
    add("--batch", type=whole(1), default=16, help="default: 16")
    add("--kernels", nargs=2, default=[_OUR_KERNEL, _PADDED_KERNEL], metavar=("FIRST", "SECOND"), help="default: %(default)s")
    add("--kv-format", default="bf16", help="default: bf16")
    add("--calibration", type=Path, metavar="FILE")

    add = action("validate", _validate, "the model against every measurement that it is fitted to, and on a card that it is not")
    add("files", nargs="*", type=Path, metavar="FILE", help="calibrations (default: the packaged ones)")
    add("--rows", action="store_true", help="every measurement, not only the summary")

    add = action("calibrate", _calibrate, "fit the model to what `etap bench published more -o FILE` measured, or refit a calibration")
    add("file", type=Path, help="a file of etap bench, or a calibration")
    add("--gpu", help="the card's description, when its name is not known")
    add("--output", "-o", type=Path, metavar="FILE", help="where to write the calibration (default: only show it)")

    add = action("figures", _figures, "draw the figures of docs/theory.md")
    add("--output", "-o", type=Path, default=Path("docs/figures"), metavar="FOLDER", help="default: %(default)s")


def run(options: argparse.Namespace) -> int:
    try:
        data = options.do(options)
    except ValueError as refused:
        terminal.complain(f"etap model: {terminal.sentence(refused)}")
        return 2
    except OSError as failure:
        terminal.complain(f"etap model: {cant_write(failure)}")
        return 1
    if options.json:
        terminal.write(json.dumps(data, indent=1))
    return 0


def _table(
    options: argparse.Namespace,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    note: str = "",
    text: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> None:
    """All columns but the first and those in `text` hold numbers."""
    if options.json:
        return
    described = [Column(name, right=i > 0 and name not in text, optional=name in optional) for i, name in enumerate(columns)]
    terminal.table(title, described, rows, note)


# ---- Actions: each prints its tables and returns what --json prints ----------------------------------------------------


def _gpus(options: argparse.Namespace) -> Any:
    import msgspec

    from etap_bench.model.calibration import packaged_calibrations
    from etap_bench.model.gpu import packaged_gpus

    gpus, calibrations = packaged_gpus(), packaged_calibrations()
    of_gpus = [
        (name, gpu.title, str(gpu.num_sms), f"{gpu.bf16_tflops:g}", f"{gpu.hbm_tbs:g}", f"{gpu.hbm_gb:g}", f"{gpu.power_w:g}")
        for name, gpu in gpus.items()
    ]
    _table(
        options,
        "GPUs",
        ("name", "card", "SMs", "BF16 TFLOP/s", "TB/s", "GB", "W"),
        of_gpus,
        "The source of each number: --json",
        text=("card",),
    )
    rows = [
        (name, c.gpu, c.date, ", ".join(f"{m.kernel.name}{' FP8' if m.kernel.fp8 else ''} ({len(m.calls)} calls)" for m in c.kernels))
        for name, c in calibrations.items()
    ]
    _table(
        options,
        "Calibrations",
        ("name", "gpu", "date", "kernels"),
        rows,
        "What was measured, and how: --json",
        text=("gpu", "date", "kernels"),
    )
    return msgspec.to_builtins({"gpus": gpus, "calibrations": calibrations})


def _roofline(options: argparse.Namespace) -> Any:
    from etap_bench.model import roofline
    from etap_bench.model.crossover import ROWS
    from etap_bench.model.gpu import gpu_name, load_gpu
    from etap_bench.shape import BLOCK_TOKENS, Shape

    gpu = load_gpu(options.gpu)
    data = []
    for heads in ROWS:
        shape = Shape.equal(batch=1, context=BLOCK_TOKENS, heads=heads, kv_format=options.kv_format)
        for kernel in (roofline.PADDED, roofline.exact(shape)):
            bounds = roofline.roof(kernel, shape, gpu)
            data.append(
                {
                    "rows": heads,
                    "layout": kernel.layout,
                    "flop_per_byte": bounds.flop_per_byte,
                    "tile_rows": bounds.tile_rows,
                    "tiles": bounds.tiles,
                    "hbm_cycles": bounds.hbm,
                    "tensor_cycles": bounds.tensor,
                    "shared_memory_cycles": bounds.shared_memory,
                    "tflops": roofline.tflops(bounds, shape, gpu),
                    "limit": bounds.limit,
                }
            )
    columns = ("rows", "layout", "FLOP/byte", "tiles", "HBM", "tensor", "shared memory", "TFLOP/s", "limit")
    rows = [
        (
            *(str(d["rows"]), str(d["layout"]), f"{d['flop_per_byte']:.1f}", f"{d['tiles']} x {d['tile_rows']}"),
            *(f"{d[part]:.0f}" for part in ("hbm_cycles", "tensor_cycles", "shared_memory_cycles", "tflops")),
            str(d["limit"]),
        )
        for d in data
    ]
    least = roofline.least_rows_without_gain(options.kv_format, gpu)
    note = f"From {least} rows on the bounds are the same. No latency, no fixed cost: see `etap model predict`."
    _table(
        options,
        f"{gpu.title}, {options.kv_format}: cycles of an SM for 64 KV tokens",
        columns,
        rows,
        note,
        ("layout", "tiles", "limit"),
        ("FLOP/byte",),
    )
    return {"gpu": gpu_name(options.gpu), "kv_format": options.kv_format, "least_rows_without_gain": least, "rows": data}


def _own(options: argparse.Namespace) -> Calibration | None:
    from etap_bench.model.calibration import load

    return load(options.calibration) if options.calibration else None


def _predict(options: argparse.Namespace) -> Any:
    from dataclasses import asdict

    from etap_bench.model.basis import basis
    from etap_bench.model.gpu import gpu_name
    from etap_bench.shape import Shape

    own = _own(options)
    data = []
    for name in options.shapes:
        shape = Shape.parse(name)
        for gpu in map(gpu_name, options.gpu):
            for kernel in options.kernel or ([_OUR_KERNEL] if shape.fp8 else [_OUR_KERNEL, _PADDED_KERNEL]):
                found = basis(gpu, kernel, shape.fp8, own)
                if shape.num_sms > found.gpu.num_sms:
                    raise ValueError(f"num_sms of {shape.name} is {shape.num_sms}; allowed on {gpu}: 0 to {found.gpu.num_sms}")
                result = found.predict(shape)
                data.append(
                    {
                        "shape": shape.name,
                        "gpu": gpu,
                        "kernel": kernel,
                        "measured": found.measured,
                        "basis": found.words,
                        "kv_bytes": shape.kv_bytes,
                        "flop": shape.flop,
                        "tbs": shape.kv_bytes / result.us / 1e6,
                        "tflops": shape.flop / result.us / 1e6,
                        "stream_us": found.memory.stream_us(shape.kv_bytes),
                        **asdict(result),
                    }
                )
    columns = ("shape", "gpu", "kernel", "us", "HBM", "SM", "fixed", "TB/s", "TFLOP/s", "of the stream", "limit")
    rows = [
        (
            *(d["shape"], d["gpu"], d["kernel"], f"{'' if d['measured'] else '~'}{d['us']:.1f}"),
            *(f"{d[part]:.1f}" for part in ("memory_us", "sm_us", "fixed_us")),
            *(f"{d['tbs']:.2f}", f"{d['tflops']:.0f}", f"{d['stream_us'] / d['us']:.2f}", d["limit"]),
        )
        for d in data
    ]
    note = "\n".join(dict.fromkeys(f"{d['kernel']} on {d['gpu']}: {d['basis']}" for d in data))
    _table(
        options,
        "Predicted times, in microseconds",
        columns,
        rows,
        note,
        text=("gpu", "kernel", "limit"),
        optional=columns[4:10],
    )
    return data


def _crossover(options: argparse.Namespace) -> Any:
    from etap_bench.model.basis import basis
    from etap_bench.model.crossover import CONTEXTS, crossover
    from etap_bench.model.gpu import gpu_name
    from etap_bench.shape import Shape

    own = _own(options)
    fp8 = Shape.equal(batch=options.batch, context=1, heads=1, kv_format=options.kv_format).fp8
    first, second = (basis(options.gpu, kernel, fp8, own) for kernel in options.kernels)
    lines = crossover(first, second, options.batch, options.kv_format)
    mark = "" if first.measured and second.measured else "~"
    columns = ("rows", *(f"{c // 1024}K" if c >= 1024 else str(c) for c in CONTEXTS), "faster", "fixed < half from")
    rows = [
        (
            str(line.rows),
            *(f"{mark}{cell.speedup:.2f}" for cell in line.cells),
            line.faster,
            f"{line.half_fixed}",
        )
        for line in lines
    ]
    title = f"{first.gpu.title}, batch {options.batch}, {options.kv_format}: time of {options.kernels[1]} / time of {options.kernels[0]}"
    note = "\n".join(f"{kernel}: {found.words}" for kernel, found in zip(options.kernels, (first, second), strict=True))
    _table(options, title, columns, rows, note, text=("faster",), optional=("fixed < half from",))
    return {
        "gpu": gpu_name(options.gpu),
        "batch": options.batch,
        "kv_format": options.kv_format,
        "kernels": options.kernels,
        "measured": first.measured and second.measured,
        "basis": [first.words, second.words],
        "lines": [
            {
                "rows": line.rows,
                "speedup": {cell.shape.context: cell.speedup for cell in line.cells},
                "limits": {cell.shape.context: [cell.first.limit, cell.second.limit] for cell in line.cells},
                "faster": line.faster,
                "half_fixed": line.half_fixed,
            }
            for line in lines
        ],
    }


def _validate(options: argparse.Namespace) -> Any:
    from etap_bench.model.calibration import load, packaged_calibrations, residuals
    from etap_bench.model.transfer import transfers

    chosen = {str(file): load(file) for file in options.files} or packaged_calibrations()
    data = [(name, calibration, m, residuals(calibration, m)) for name, calibration in chosen.items() for m in calibration.kernels]
    if options.rows:
        for name, _, m, found in data:
            _residual_table(options, f"{name}: {_title(m)}", found)
    of_lengths = ("long rms", "long worst", "short rms", "short worst")
    columns: tuple[str, ...] = ("calibration", "kernel", "calls", "parameters", "rms", "worst", *of_lengths)
    rows = [
        (name, _title(m), str(len(m.calls)), str(len(m.fitted)), *_errors(found), *_errors(_long(found)), *_errors(_long(found, False)))
        for name, _, m, found in data
    ]
    note = "Errors: predicted / measured - 1. Long: contexts from 16K on. Every kernel's parameters were fitted to these calls."
    text = ("kernel", "fitted on", "tested on", "worst", "long worst", "short worst")
    _table(options, "The model against what it is fitted to", columns, rows, note, text, ("parameters", *of_lengths))
    across = [] if options.files else transfers()
    if across:
        title = "The model on a card that the kernel was not fitted to"
        columns = ("kernel", "fitted on", "tested on", "calls", "rms", "worst")
        tests = [(t.kernel, t.fitted_on, t.tested_on, str(len(t.residuals)), *_errors(t.residuals)) for t in across]
        _table(options, title, columns, tests, "Of the other card only the memory was measured.", text)

    def calls(found: list[Residual]) -> list[dict[str, Any]]:
        return [{"shape": r.shape.name, "us": r.measured_us, "predicted_us": r.prediction.us, "limit": r.prediction.limit} for r in found]

    fitted = [{"calibration": name, "kernel": _title(m), "parameters": _parameters(m), "calls": calls(r)} for name, _, m, r in data]
    tested = [{"kernel": t.kernel, "fitted_on": t.fitted_on, "tested_on": t.tested_on, "calls": calls(t.residuals)} for t in across]
    return {"fitted": fitted, "transferred": tested}


def _calibrate(options: argparse.Namespace) -> Any:
    import msgspec

    from etap_bench.model import benchmark, calibration, files

    if options.output:
        check_writable(options.output)
    left_out: list[str] = []
    try:
        made = calibration.fit(calibration.load(options.file))
    except files.FileError:
        if _is_calibration(options.file):
            raise
        made, left_out = benchmark.calibrate(options.file, options.gpu)
    for m in made.kernels:
        _residual_table(options, f"{_title(m)} on {made.device}", calibration.residuals(made, m))
    memory = {"latency_us": made.memory.latency_us, "tbs": made.memory.tbs}
    rows = [("memory", *pair) for pair in memory.items()]
    rows += [(_title(m), *pair) for m in made.kernels for pair in _parameters(m).items()]
    note = "\n".join(f"left out: {why}" for why in left_out)
    _table(options, "Fitted", ("of", "parameter", "value"), [(of, name, f"{value:g}") for of, name, value in rows], note, ("parameter",))
    if options.output:
        calibration.save(made, options.output)
    return {"calibration": msgspec.to_builtins(made, str_keys=True), "left_out": left_out}


def _is_calibration(file: Path) -> bool:
    """Also a damaged one: its format is a number, that of results a name."""
    return file.is_file() and re.match(rb'\s*\{\s*"format"\s*:\s*\d', file.read_bytes()) is not None


def _figures(options: argparse.Namespace) -> Any:
    from etap_bench.model import figures

    options.output.mkdir(parents=True, exist_ok=True)
    names = []
    for draw in terminal.track(list(figures.ALL), "Drawing", hidden=options.json):
        names.append(figures.save(draw, options.output))
    _table(options, "Figures", ("file",), [(str(name),) for name in names])
    return [str(name) for name in names]


def _title(m: Measured) -> str:
    return f"{m.kernel.name} FP8" if m.kernel.fp8 else m.kernel.name


def _parameters(m: Measured) -> dict[str, float]:
    return {name: getattr(m.kernel, name) for name in m.fitted}


def _long(found: list[Residual], long: bool = True) -> list[Residual]:
    return [r for r in found if r.long == long]


def _errors(found: list[Residual]) -> tuple[str, str]:
    """rms and the worst, in words."""
    from etap_bench.model.calibration import rms

    if not found:
        return "-", "-"
    worst = max(found, key=lambda r: abs(r.error))
    return f"{rms([r.error for r in found]):.1%}", f"{worst.error:+.1%} {worst.shape.name}"


def _residual_table(options: argparse.Namespace, title: str, found: list[Residual]) -> None:
    rows = [(r.shape.name, f"{r.measured_us:.1f}", f"{r.prediction.us:.1f}", f"{r.error:+.1%}", r.prediction.limit) for r in found]
    _table(options, title, ("shape", "measured us", "model us", "error", "limit"), rows, text=("limit",))
