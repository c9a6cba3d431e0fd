"""Calibrations: measurements of kernels on one card, and the parameters fitted to them.

A calibration file holds both, so that anyone can refit it or look at its residuals. `fit` changes only the fields of `Kernel` that the file
names in `fitted`, by least squares on the logarithm of measured over predicted time.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from etap_py.model import files
from etap_py.model.gpu import Gpu, gpu_of_device, load_gpu
from etap_py.model.kernel import Kernel, Memory, Prediction, block_cycles, predict
from etap_py.model.shape import BLOCK_TOKENS, Shape

FORMAT = 1
LONG_CONTEXT = 16384  # tokens; from here on a sequence counts as long in the summaries
# Fitted fields with the range they may take.
_BOUNDS = {
    "fixed_us": (0.0, 100.0),
    "split_us": (0.0, 50.0),
    "part_us": (0.0, 5.0),
    "latency_cycles": (0.0, 20000.0),
    "row_cycles": (0.0, 500.0),
    "convert_cycles": (0.0, 50000.0),
    "overlap_loss": (0.0, 1.0),
}


class Measured(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A kernel, the names of its fitted fields, and what they are fitted to."""

    kernel: Kernel
    fitted: tuple[str, ...]
    calls: dict[str, float]  # shape's name: microseconds of a call
    block_cycles: dict[int, float] = {}  # rows of a tile: cycles of a BF16 block on so few SMs that memory is no limit

    def __post_init__(self) -> None:
        unknown = set(self.fitted) - _BOUNDS.keys()
        if unknown:
            raise ValueError(f"fitted names {', '.join(sorted(unknown))}; allowed: {', '.join(_BOUNDS)}")


class Calibration(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One measuring session on one card."""

    format: int
    gpu: str  # packaged description, or path of one
    device: str  # what CUDA calls the card
    date: str
    source: str  # what was measured, by whom, with what
    sm_mhz: float  # SM clock under load; 0: not known, the clock of the tensor cores' peak is taken
    memory: Memory
    streams: dict[str, float] = {}  # shape's name: microseconds that copying its pages into shared memory takes; empty: memory is assumed
    kernels: list[Measured]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format is {self.format}; allowed: {FORMAT}")

    def clock(self) -> float:
        return self.sm_mhz or load_gpu(self.gpu).sm_mhz


@dataclass(frozen=True)
class Residual:
    """A measurement beside the model's value. `error`: predicted / measured - 1."""

    shape: Shape
    measured_us: float
    prediction: Prediction

    @property
    def error(self) -> float:
        return self.prediction.us / self.measured_us - 1

    @property
    def long(self) -> bool:
        return self.shape.context >= LONG_CONTEXT


def residuals(calibration: Calibration, measured: Measured) -> list[Residual]:
    """The model against every call that the kernel was fitted to."""
    gpu, clock = load_gpu(calibration.gpu), calibration.clock()

    def one(name: str, us: float) -> Residual:
        shape = Shape.parse(name)
        return Residual(shape, us, predict(measured.kernel, calibration.memory, shape, gpu, clock))

    return [one(name, us) for name, us in measured.calls.items()]


def rms(errors: list[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else math.nan


def fit(calibration: Calibration) -> Calibration:
    """The calibration with its memory (when streams were measured) and the fitted fields of its kernels set to what fits best."""
    memory = _fit_memory(calibration.streams) if calibration.streams else calibration.memory
    fitted = msgspec.structs.replace(calibration, memory=memory)
    gpu, clock = load_gpu(calibration.gpu), calibration.clock()
    fitted.kernels = [_fit_kernel(measured, memory, gpu, clock) for measured in calibration.kernels]
    return fitted


def _fit_memory(streams: dict[str, float]) -> Memory:
    from scipy.optimize import least_squares

    points = [(Shape.parse(name).kv_bytes, us) for name, us in streams.items()]

    def errors(parameters: Any) -> list[float]:
        memory = Memory(latency_us=parameters[0], tbs=parameters[1])
        return [math.log(memory.stream_us(size) / us) for size, us in points]

    latency_us, tbs = least_squares(errors, [2.0, 3.0], bounds=([0.0, 0.01], [100.0, 100.0])).x
    return Memory(latency_us=_rounded(latency_us), tbs=_rounded(tbs))


def _fit_kernel(measured: Measured, memory: Memory, gpu: Gpu, clock: float) -> Measured:
    from scipy.optimize import least_squares

    names = measured.fitted
    if not names:
        return measured
    calls = [(Shape.parse(name), us) for name, us in measured.calls.items()]
    blocks = [(Shape(batch=1, context=BLOCK_TOKENS, heads=rows), cycles) for rows, cycles in measured.block_cycles.items()]

    def with_values(values: Any) -> Kernel:
        return msgspec.structs.replace(measured.kernel, **{name: _rounded(value) for name, value in zip(names, values, strict=True)})

    def errors(values: Any) -> list[float]:
        kernel = msgspec.structs.replace(measured.kernel, **dict(zip(names, values, strict=True)))
        of_calls = [math.log(predict(kernel, memory, shape, gpu, clock).us / us) for shape, us in calls]
        return of_calls + [math.log(block_cycles(kernel, shape, gpu).total / cycles) for shape, cycles in blocks]

    low, high = zip(*(_BOUNDS[name] for name in names), strict=True)
    start = [_BOUNDS[name][0] + _BOUNDS[name][1] / 10 for name in names]
    solution = least_squares(errors, start, bounds=(low, high), x_scale=start)
    return msgspec.structs.replace(measured, kernel=with_values(solution.x))


def _rounded(value: float) -> float:
    """To four digits: no measurement here has more."""
    return float(f"{value:.4g}")


# ---- Files -----------------------------------------------------------------------------------------------------------


def load(file: Path) -> Calibration:
    """A calibration file. Raises FileError."""
    return files.read(file, Calibration)


def save(calibration: Calibration, file: Path) -> None:
    """Writes a calibration file, whole or not at all."""
    draft = file.with_name(f"{file.name}.part")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=1) + b"\n")
    draft.replace(file)


@cache
def packaged_calibrations() -> dict[str, Calibration]:
    """The calibrations that come with the package, by name."""
    return {name: files.read(file, Calibration) for name, file in files.packaged("calibrations", ".json").items()}


# What the library's dispatch does (libetap/src/sm90/dispatch.cc), and what is fitted.
_OURS = Kernel(name="etap", layout="exact", shared_tile_rows=24, max_cluster=8, busy_tile_rows=48, cut_blocks=2.0)
_OURS_FP8 = Kernel(name="etap", layout="exact", fp8=True, max_tile_rows=32, shared_tile_rows=16, max_cluster=2, cut_blocks=2.0)
_FITTED = ("fixed_us", "split_us", "part_us", "latency_cycles", "row_cycles", "overlap_loss")
_FITTED_FP8 = ("fixed_us", "convert_cycles")
_FITTED_PADDED = ("fixed_us", "part_us", "latency_cycles", "overlap_loss")


def from_benchmark(file: Path, gpu: str | None = None) -> tuple[Calibration, list[str]]:
    """A fitted calibration from what `scripts/bench_gpu.py --json` wrote, and a sentence for each row that was left out.

    gpu: a packaged description or the path of one; default: the one that knows the device
    """
    try:
        report = json.loads(file.read_bytes())
        device, rows = report["device"], report["rows"]
        found = gpu or gpu_of_device(device)
        if found is None:
            raise files.FileError(f"{file} was measured on {device}, which no packaged GPU description knows; name one with --gpu")
        load_gpu(found)
        calls: dict[str, dict[str, float]] = {}
        streams: dict[str, float] = {}
        left_out = []
        for row in rows:
            name = row["name"]
            if row["shape"]["ragged"]:
                left_out.append(f"{name}: the file does not say its lengths")
                continue
            if row["shape"]["num_sms"] == 0:  # fewer SMs can't ask for all of the memory's bandwidth
                streams[name] = row["ceiling_us"]
            for contender, us in row["us"].items():
                if not contender.startswith(("ceiling", "gather")):
                    calls.setdefault(contender, {})[name] = us
            left_out += [f"{name}: {contender}: {why}" for contender, why in row["skipped"].items()]
        clocks = [row["sm_mhz"] for row in rows if row["sm_mhz"]]
        source = f"scripts/bench_gpu.py --json on {device}; etap {report['etap']}, torch {report['torch']}, {report['rounds']} rounds"
    except OSError as failure:
        raise files.FileError(f"{file} can't be read: {failure.strerror}") from failure
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        if isinstance(failure, files.FileError):
            raise
        raise files.FileError(f"{file} is no result of scripts/bench_gpu.py --json: {failure!r}") from failure
    if not streams or not calls:
        raise files.FileError(f"{file} holds no measured shape that the model can use")
    calibration = Calibration(
        format=FORMAT,
        gpu=found,
        device=device,
        date=datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC).date().isoformat(),
        source=source,
        sm_mhz=sorted(clocks)[len(clocks) // 2] if clocks else 0.0,
        memory=Memory(latency_us=0.0, tbs=1.0),
        streams=streams,
        kernels=list(_measured(calls, left_out)),
    )
    return fit(calibration), left_out


def _measured(calls: dict[str, dict[str, float]], left_out: list[str]) -> Iterator[Measured]:
    for contender, times in calls.items():
        for fp8 in (False, True):
            chosen = {name: us for name, us in times.items() if Shape.parse(name).fp8 == fp8}
            if contender == _OURS.name:
                kernel, fitted = (_OURS_FP8, _FITTED_FP8) if fp8 else (_OURS, _FITTED)
            else:
                kernel, fitted = Kernel(name=contender, layout="padded", fp8=fp8), _FITTED_PADDED
            if len(chosen) > len(fitted):
                yield Measured(kernel=kernel, fitted=fitted, calls=chosen)
            elif chosen:
                left_out.append(f"{contender}: {', '.join(chosen)} are too few to fit {', '.join(fitted)}")


# ---- Which numbers to use for a card -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Basis:
    """The parameters for a kernel on a card. `measured`: both the kernel and the memory were measured on that card."""

    gpu: Gpu
    kernel: Kernel
    memory: Memory
    sm_mhz: float
    measured: bool
    words: str

    def predict(self, shape: Shape) -> Prediction:
        return predict(self.kernel, self.memory, shape, self.gpu, self.sm_mhz)


def basis(gpu_name: str, kernel_name: str, fp8: bool = False, own: Calibration | None = None) -> Basis:
    """Parameters for a kernel on a GPU: from `own` or a packaged calibration of that card; where there is none, the kernel's from another
    card and the memory's from any calibration of this card, or else the share of the specified bandwidth that measured cards reach.

    Raises ValueError for a GPU or kernel that is not known.
    """
    gpu = load_gpu(gpu_name)
    calibrations = [own, *packaged_calibrations().values()] if own else list(packaged_calibrations().values())
    having = [(c, m) for c in calibrations for m in c.kernels if (m.kernel.name, m.kernel.fp8) == (kernel_name, fp8)]
    if not having:
        names = dict.fromkeys(m.kernel.name for c in calibrations for m in c.kernels if m.kernel.fp8 == fp8)
        raise ValueError(f"kernel is {kernel_name!r}; allowed with {'an FP8' if fp8 else 'a 16-bit'} cache: {', '.join(names)}")
    here = next(((c, m) for c, m in having if c.gpu == gpu_name), None)
    if here is not None:
        calibration, measured = here
        words = f"fitted to {len(measured.calls)} calls on {calibration.device}, {calibration.date}"
        words += "" if calibration.streams else "; memory assumed"
        return Basis(gpu, measured.kernel, calibration.memory, calibration.clock(), True, words)
    calibration, measured = having[0]
    memory_of = next((c for c in calibrations if c.gpu == gpu_name and c.streams), None)
    if memory_of is not None:
        memory, words = memory_of.memory, f"memory measured on {memory_of.device}"
    else:
        memory = assumed_memory(gpu, calibrations)
        words = f"memory assumed: {memory.tbs / gpu.hbm_tbs:.0%} of the specified bandwidth, as measured cards reach"
    clock = memory_of.clock() if memory_of is not None else gpu.sm_mhz
    words = f"PREDICTED: {kernel_name} was measured on {calibration.device}, not on this card; {words}"
    return Basis(gpu, measured.kernel, memory, clock, False, words)


def assumed_memory(gpu: Gpu, calibrations: list[Calibration]) -> Memory:
    """Latency and share of the specified bandwidth: the means over the calibrations whose streams were measured."""
    measured = [c for c in calibrations if c.streams]
    share = sum(c.memory.tbs / load_gpu(c.gpu).hbm_tbs for c in measured) / len(measured)
    return Memory(latency_us=sum(c.memory.latency_us for c in measured) / len(measured), tbs=gpu.hbm_tbs * share)
