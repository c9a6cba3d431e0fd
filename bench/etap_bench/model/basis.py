"""Which parameters to predict with: those measured on the card in question, or the nearest there is, and then it is said."""

from __future__ import annotations

from dataclasses import dataclass

from etap_bench.model.calibration import Calibration, packaged_calibrations
from etap_bench.model.gpu import Gpu, load_gpu
from etap_bench.model.gpu import gpu_name as packaged_name
from etap_bench.model.kernel import Kernel, Memory, Prediction, predict
from etap_bench.shape import Shape


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
    """Parameters for a kernel on a GPU: from `own` or a packaged calibration of that card; where there is none, the kernel's latest from
    another card and the memory's from any calibration of this card, or else the share of the specified bandwidth that measured cards
    reach.

    Raises ValueError for a GPU or kernel that is not known.
    """
    gpu_name, gpu = packaged_name(gpu_name), load_gpu(gpu_name)
    latest = sorted(packaged_calibrations().values(), key=lambda calibration: calibration.date, reverse=True)
    calibrations = [own, *latest] if own else latest
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
