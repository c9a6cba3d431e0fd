"""The honest test: kernels predicted on a card that they were not fitted to, against measurements of that card."""

from __future__ import annotations

from dataclasses import dataclass

from etap_bench.model.calibration import Residual, packaged_calibrations
from etap_bench.model.gpu import load_gpu
from etap_bench.model.kernel import predict


@dataclass(frozen=True)
class Transfer:
    """A kernel fitted on one card, its residuals on another; only the memory and the clock are the other card's."""

    kernel: str
    fitted_on: str
    tested_on: str
    residuals: list[Residual]


def transfers() -> list[Transfer]:
    """Every ordered pair of packaged calibrations of different GPUs that measured a kernel of the same name."""
    calibrations = packaged_calibrations().values()
    found = []
    for here in calibrations:
        for there in calibrations:
            if here.gpu == there.gpu:
                continue
            for fitted in here.kernels:
                for tested in there.kernels:
                    if (fitted.kernel.name, fitted.kernel.fp8) != (tested.kernel.name, tested.kernel.fp8):
                        continue
                    gpu, clock = load_gpu(there.gpu), there.clock()
                    shapes = [(there.shape(name), us) for name, us in tested.calls.items()]
                    rows = [Residual(shape, us, predict(fitted.kernel, there.memory, shape, gpu, clock)) for shape, us in shapes]
                    found.append(Transfer(fitted.kernel.name, here.gpu, there.gpu, rows))
    return found
