"""What bounds each step: the words of `etap model`, where it knows the card."""

from __future__ import annotations

from dataclasses import dataclass

from etap_bench.model.calibration import packaged_calibrations
from etap_bench.model.gpu import Gpu, gpu_of_device, load_gpu
from etap_bench.model.kernel import predict
from etap_bench.results import Results, Row
from etap_bench.shape import Shape

UNKNOWN = "not known"


@dataclass(frozen=True)
class Limits:
    """of_row: "HBM", "tensor cores", "shared memory", "conversion", "fixed cost" or UNKNOWN for each row; source: where that comes from."""

    of_row: list[str]
    source: str
    gpu: Gpu | None


def limits(results: Results) -> Limits:
    """Of ETAP's kernel, in every step."""
    device = results.run.device
    name = gpu_of_device(device.name) if device.kind == "cuda" else None
    if name is None:
        return Limits([UNKNOWN] * len(results.rows), f"etap model has no description of {device.name}", None)
    gpu = load_gpu(name)
    fp8 = results.run.workload.model.kv_format.startswith("e4m3")
    for calibration in packaged_calibrations().values():
        for kernel in (measured.kernel for measured in calibration.kernels):
            if calibration.gpu == name and (kernel.name, kernel.fp8) == ("etap", fp8):
                shapes = [_shape(results, row) for row in results.rows]
                words = [predict(kernel, calibration.memory, shape, gpu, calibration.clock()).limit for shape in shapes]
                return Limits(words, f"etap model, calibrated on {calibration.device}, {calibration.date}", gpu)
    return Limits([UNKNOWN] * len(results.rows), f"ETAP has not been calibrated on {gpu.title}", gpu)


def _shape(results: Results, row: Row) -> Shape:
    model = results.run.workload.model
    return Shape(
        batch=len(row.lengths),
        context=max(row.lengths),
        heads=model.heads,
        query_len=max(row.query_lens),
        kv_format=model.kv_format,
        page_size=model.page_size,
        d_latent=model.d_latent,
        d_rope=model.d_rope,
        lengths=tuple(row.lengths),
    )
