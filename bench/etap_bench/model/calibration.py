"""Calibrations: measurements of kernels on one card, and the parameters fitted to them.

A calibration file holds both, so that anyone can refit it or look at its residuals. `fit` changes only the fields of `Kernel` that the file
names in `fitted`, by least squares on the logarithm of measured over predicted time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from etap_bench.model import files
from etap_bench.model.gpu import Gpu, load_gpu
from etap_bench.model.kernel import Kernel, Memory, Prediction, block_cycles, predict
from etap_bench.shape import BLOCK_TOKENS, Shape

FORMAT = 1
LONG_CONTEXT = 16384  # tokens; from here on a sequence counts as long in the summaries
# Fitted fields with the range they may take.
FITTED = {
    "fixed_us": (0.0, 100.0),
    "split_us": (0.0, 50.0),
    "part_us": (0.0, 5.0),
    "latency_cycles": (0.0, 20000.0),
    "on_m_latency_cycles": (0.0, 20000.0),
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
        unknown = set(self.fitted) - FITTED.keys()
        if unknown:
            raise ValueError(f"fitted names {', '.join(sorted(unknown))}; allowed: {', '.join(FITTED)}")


class Calibration(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One measuring session on one card."""

    format: int
    gpu: str  # packaged description, or path of one
    device: str  # what CUDA calls the card
    date: str
    source: str  # what was measured, by whom, with what
    sm_mhz: float  # SM clock under load; 0: not known, the clock of the tensor cores' peak is taken
    memory: Memory
    lengths: dict[str, tuple[int, ...]] = {}  # of the shapes whose names end in -ragged
    streams: dict[str, float] = {}  # shape's name: microseconds that copying its pages into shared memory takes; empty: memory is assumed
    kernels: list[Measured]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"format is {self.format}; allowed: {FORMAT}")

    def shape(self, name: str) -> Shape:
        return Shape.parse(name, self.lengths.get(name, ()))

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
        shape = calibration.shape(name)
        return Residual(shape, us, predict(measured.kernel, calibration.memory, shape, gpu, clock))

    return [one(name, us) for name, us in measured.calls.items()]


def rms(errors: list[float]) -> float:
    return math.sqrt(sum(error * error for error in errors) / len(errors)) if errors else math.nan


def fit(calibration: Calibration) -> Calibration:
    """The calibration with its memory (when streams were measured) and the fitted fields of its kernels set to what fits best."""
    streams = [(calibration.shape(name), us) for name, us in calibration.streams.items()]
    memory = _fit_memory(streams) if streams else calibration.memory
    fitted = msgspec.structs.replace(calibration, memory=memory)
    gpu, clock = load_gpu(calibration.gpu), calibration.clock()
    fitted.kernels = [
        _fit_kernel(m, [(calibration.shape(name), us) for name, us in m.calls.items()], memory, gpu, clock) for m in calibration.kernels
    ]
    return fitted


def _fit_memory(streams: Sequence[tuple[Shape, float]]) -> Memory:
    from scipy.optimize import least_squares

    def errors(parameters: Any) -> list[float]:
        memory = Memory(latency_us=parameters[0], tbs=parameters[1])
        return [math.log(memory.stream_us(shape.kv_bytes) / us) for shape, us in streams]

    latency_us, tbs = least_squares(errors, [2.0, 3.0], bounds=([0.0, 0.01], [100.0, 100.0])).x
    return Memory(latency_us=_rounded(latency_us), tbs=_rounded(tbs))


def _fit_kernel(measured: Measured, calls: Sequence[tuple[Shape, float]], memory: Memory, gpu: Gpu, clock: float) -> Measured:
    from scipy.optimize import least_squares

    names = measured.fitted
    if not names:
        return measured
    blocks = [(Shape.equal(batch=1, context=BLOCK_TOKENS, heads=rows), cycles) for rows, cycles in measured.block_cycles.items()]

    def with_values(values: Any) -> Kernel:
        return msgspec.structs.replace(measured.kernel, **{name: _rounded(value) for name, value in zip(names, values, strict=True)})

    def errors(values: Any) -> list[float]:
        kernel = msgspec.structs.replace(measured.kernel, **dict(zip(names, values, strict=True)))
        of_calls = [math.log(predict(kernel, memory, shape, gpu, clock).us / us) for shape, us in calls]
        return of_calls + [math.log(block_cycles(kernel, shape, gpu).total / cycles) for shape, cycles in blocks]

    low, high = zip(*(FITTED[name] for name in names), strict=True)
    start = [FITTED[name][0] + FITTED[name][1] / 10 for name in names]
    solution = least_squares(errors, start, bounds=(low, high), x_scale=start)
    return msgspec.structs.replace(measured, kernel=with_values(solution.x))


def _rounded(value: float) -> float:
    """To four digits, and what is 0 but for the solver's last steps, whose rounding differs between machines, to 0: no measurement here
    has more."""
    return 0.0 if abs(value) < 1e-4 else float(f"{value:.4g}")


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
