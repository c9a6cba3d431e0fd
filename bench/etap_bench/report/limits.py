"""What bounds each step: the words of `etap model`, where it knows the card."""

from __future__ import annotations

from dataclasses import dataclass

from etap_bench.model.calibration import Calibration, packaged_calibrations
from etap_bench.model.gpu import Gpu, gpu_of_device, load_gpu
from etap_bench.model.kernel import Kernel, predict
from etap_bench.results import Results

UNKNOWN = "not known"


@dataclass(frozen=True)
class Limits:
    """of_row: "HBM", "tensor cores", "shared memory", "conversion", "fixed cost" or UNKNOWN for each row; source: where that comes from."""

    of_row: list[str]
    source: str
    gpu: Gpu | None

    @property
    def words(self) -> list[str]:
        """Each limit once, the most frequent first."""
        return sorted(set(self.of_row), key=lambda word: (-self.of_row.count(word), word))


def limits(results: Results) -> Limits:
    """Of ETAP's kernel, in every step."""
    device = results.run.device
    name = gpu_of_device(device.name) if device.kind == "cuda" else None
    if name is None:
        return Limits([UNKNOWN] * len(results.rows), f"etap model has no description of {device.name}", None)
    gpu = load_gpu(name)
    of_row, sources = [], {}
    for row in results.rows:
        found = _kernel(name, row.shape.fp8)
        if found is None:
            of_row.append(UNKNOWN)
            continue
        calibration, kernel = found
        of_row.append(predict(kernel, calibration.memory, row.shape, gpu, calibration.clock(), row.distinct_kv_bytes).limit)
        sources[f"etap model, calibrated on {calibration.device}, {calibration.date}"] = True
    return Limits(of_row, "; ".join(sources) or f"ETAP has not been calibrated on {gpu.title}", gpu)


def _kernel(gpu: str, fp8: bool) -> tuple[Calibration, Kernel] | None:
    """ETAP's on this card."""
    for calibration in packaged_calibrations().values():
        for kernel in (measured.kernel for measured in calibration.kernels):
            if calibration.gpu == gpu and (kernel.name, kernel.fp8) == ("etap", fp8):
                return calibration, kernel
    return None
