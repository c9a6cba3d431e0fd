"""From what `etap bench SHAPES -o FILE` writes to a calibration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median_low

import msgspec

from etap_bench import results
from etap_bench.errors import Refused
from etap_bench.measurement import REFERENCE, is_copy
from etap_bench.model import files
from etap_bench.model.calibration import FORMAT, Calibration, Measured, fit
from etap_bench.model.gpu import gpu_name, gpu_of_device, load_gpu
from etap_bench.model.kernel import Kernel, Memory
from etap_bench.results import Results, Row

# What the library's dispatch does (libetap/src/sm90/dispatch.cc), and what is fitted.
OURS = Kernel(name="etap", layout="exact", max_cluster=8, busy_tile_rows=48, piece_blocks=7.0, cut_blocks=3.0, on_m_latency_cycles=600.0)
OURS_FP8 = msgspec.structs.replace(  # a piece takes as long as with 16 bits, and a block about half
    OURS,
    fp8=True,
    on_m_latency_cycles=600.0,
    kv_operand="registers",
    max_tile_rows=24,
    max_many_cluster=2,
    piece_blocks=10.0,
    latency_cycles=0.0,
)
LEAST_PAGE = 32  # tokens: smaller pages are gathered, or keep the copy engine busy for longer than their bytes take
FITTED: tuple[str, ...] = ("fixed_us", "split_us", "part_us", "latency_cycles", "row_cycles", "on_m_latency_cycles", "overlap_loss")
FITTED_FP8: tuple[str, ...] = ("fixed_us", "part_us", "row_cycles", "convert_cycles", "on_m_latency_cycles", "overlap_loss")
FITTED_PADDED: tuple[str, ...] = ("fixed_us", "part_us", "latency_cycles", "overlap_loss")


def calibrate(file: Path, gpu: str | None = None) -> tuple[Calibration, list[str]]:
    """A fitted calibration, and a sentence for each measurement that was left out.

    gpu: a packaged description or the path of one; default: the one that knows the device

    Raises FileError for a file that can't be used, ValueError for a GPU that is not known.
    """
    try:
        benchmark = results.read(file)
    except OSError as failure:
        raise files.FileError(f"{file} can't be read: {failure.strerror}") from failure
    except Refused as refused:
        raise files.FileError(str(refused)) from refused
    run = benchmark.run
    name = gpu_name(gpu) if gpu else gpu_of_device(run.device.name)
    if name is None:
        raise files.FileError(f"{file} was measured on {run.device.name}, which no packaged GPU description knows: name one with --gpu")
    load_gpu(name)
    if run.workload is not None:
        raise files.FileError(f"{file} has the steps of a workload; needed: shapes, as `etap bench published more -o FILE` measures them")
    left_out = [f"{row.name}: the model leaves out what {_beyond(row)} cost" for row in benchmark.rows if _beyond(row)]
    rows = [row for row in benchmark.rows if not _beyond(row)]
    timed = {contender for row in rows for contender in row.measured.times} - {REFERENCE}  # nobody misses a peer that is not installed
    skipped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for contender, why in row.measured.skipped.items():
            if contender in timed:
                skipped.setdefault((contender, why), []).append(row.name)
    left_out += [
        f"{contender} at {names[0] if len(names) == 1 else f'{len(names)} shapes'}: {why}" for (contender, why), names in skipped.items()
    ]
    # A part of the SMs can't ask for all of the memory's bandwidth.
    streams = {row.name: row.measured.ceiling_us for row in rows if row.measured.ceiling_us is not None and row.shape.num_sms == 0}
    kernels = list(_kernels(rows, left_out))
    if len(streams) < 2 or not kernels:
        raise files.FileError(f"{file} has {len(streams)} ceilings and {len(kernels)} kernels with enough shapes; needed: 2 and 1")
    clocks = [row.measured.sm_mhz for row in rows if row.measured.sm_mhz]
    measured = Calibration(
        format=FORMAT,
        gpu=name,
        device=run.device.name,
        date=benchmark.started[:10],
        source=_source(benchmark),
        sm_mhz=float(median_low(clocks)) if clocks else 0.0,
        memory=Memory(latency_us=0.0, tbs=1.0),  # fitted to the streams
        lengths={row.name: row.shape.lengths for row in rows if row.name.endswith("-ragged")},
        streams=streams,
        kernels=kernels,
    )
    return fit(measured), left_out


def _source(benchmark: Results) -> str:
    run = benchmark.run
    said = [benchmark.command, f"{run.rounds} rounds" if run.rounds else "", run.commit and f"tree {run.commit}"]
    said += [f"{name} {run.software[name]}" for name in ("etap", "torch") if name in run.software]
    return ", ".join(part for part in said if part)


def _beyond(row: Row) -> str:
    """What a shape has that the model does not know; "" for nothing."""
    if row.shape.kv_format in ("e4m3_group", "e4m3_656", "e4m3_528"):
        return "group scales"
    if row.shape.sparse:
        return "lists of slots"
    return f"pages of fewer than {LEAST_PAGE} tokens" if row.shape.page_size < LEAST_PAGE else ""


def _kernels(rows: list[Row], left_out: list[str]) -> Iterator[Measured]:
    contenders = dict.fromkeys(name for row in rows for name in row.measured.times if not is_copy(name) and name != REFERENCE)
    for contender in contenders:
        for fp8 in (False, True):
            calls = {row.name: row.measured.us[contender] for row in rows if contender in row.measured.times and row.shape.fp8 == fp8}
            if contender == OURS.name:
                kernel, fitted = (OURS_FP8, FITTED_FP8) if fp8 else (OURS, FITTED)
            else:
                kernel, fitted = Kernel(name=contender, layout="padded", fp8=fp8), FITTED_PADDED
            if len(calls) > len(fitted):
                yield Measured(kernel=kernel, fitted=fitted, calls=calls)
            elif calls:
                left_out.append(f"{contender}: {', '.join(calls)}: too few to fit {', '.join(fitted)}")
