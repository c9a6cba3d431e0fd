"""The honest test: kernels predicted on a card that they were not fitted to, against measurements of that card."""

from __future__ import annotations

from dataclasses import dataclass

from etap_bench.model.calibration import FITTED, Residual, packaged_calibrations
from etap_bench.model.gpu import load_gpu
from etap_bench.model.kernel import Kernel, predict


@dataclass(frozen=True)
class Transfer:
    """A kernel fitted on one card, its residuals on another; only the memory and the clock are the other card's."""

    kernel: str
    fitted_on: str
    tested_on: str
    residuals: list[Residual]


def same(one: Kernel, other: Kernel) -> bool:
    """Whether two kernels work alike, whatever was fitted: a kernel that has been changed since is another one."""
    described = [name for name in Kernel.__struct_fields__ if name not in FITTED]
    orientations = {kernel.on_m_latency_cycles is None for kernel in (one, other)}
    return len(orientations) == 1 and all(getattr(one, name) == getattr(other, name) for name in described)


def transfers() -> list[Transfer]:
    """Every ordered pair of packaged calibrations of different GPUs that measured the same kernel."""
    calibrations = packaged_calibrations().values()
    found = []
    for here in calibrations:
        for there in calibrations:
            if here.gpu == there.gpu:
                continue
            for fitted in here.kernels:
                for tested in there.kernels:
                    if not same(fitted.kernel, tested.kernel):
                        continue
                    gpu, clock = load_gpu(there.gpu), there.clock()
                    shapes = [(there.shape(name), us) for name, us in tested.calls.items()]
                    rows = [Residual(shape, us, predict(fitted.kernel, there.memory, shape, gpu, clock)) for shape, us in shapes]
                    found.append(Transfer(fitted.kernel.name, here.gpu, there.gpu, rows))
    return found
