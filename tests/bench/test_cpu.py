"""The CPU device against PyTorch's eager attention and against two roofs of this machine, measured in the same run.

Each test prints one line and keeps its numbers in `extra_info` (--benchmark-json=FILE writes them down). Ratios are of medians over
interleaved rounds. Nothing is asserted about time; results are compared with FP64.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import Session

import etap_py as etap

pytestmark = pytest.mark.bench

ROOFS = Path(__file__).resolve().parents[2] / "build" / "cpu_roofs"


@pytest.fixture(autouse=True)
def all_threads() -> Any:
    """Both sides get every processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def roofs() -> dict[str, float]:
    """Bytes a second that memcpy moves and FLOP a second of multiply-adds on registers, on as many threads as the library uses."""
    if not ROOFS.is_file():
        pytest.skip(f"{ROOFS.name} is not built: make bench")
    threads = etap.device_info("cpu").num_sms
    measured: dict[str, float] = json.loads(subprocess.run([ROOFS, str(threads)], check=True, capture_output=True, text=True).stdout)
    return measured


def interleaved(*functions: Callable[[], object], rounds: int) -> list[float]:
    """Median seconds of each, one call of each in turn, so that all meet the same noise."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 2):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if round_ >= 2:  # the first two warm up
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def eager(inputs: Inputs, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """matmul, softmax, matmul over a contiguous cache of equal lengths, as a model without a paged cache has it. Paging, which the library
    does and this does not, is left out of the time."""
    assert inputs.q_rope is not None
    q = torch.cat([inputs.q_nope, inputs.q_rope], -1).to(dtype)
    pages = inputs.block_table[:, : int(inputs.cache_seqlens[0]) // inputs.case.page_size].long()
    kv = inputs.kv_cache[pages].flatten(1, 2).to(dtype)  # [batch, tokens, d]
    values = kv[..., : inputs.case.d_latent]

    def attend() -> torch.Tensor:
        weights = torch.softmax(q @ kv.transpose(1, 2) * inputs.softmax_scale, dim=-1)
        return weights @ values

    return attend


def prepare(case: Case, seed: int) -> tuple[Inputs, Callable[[], None]]:
    """The inputs, and one layer's call, whose results are right."""
    inputs = make_inputs(case, seed)
    session = Session(inputs)
    session.update()
    out, lse = inputs.outputs()

    def run() -> None:
        session.run(out, lse)

    run()
    check(inputs, out, lse, reference(inputs))
    return inputs, run


def report(benchmark: Any, capsys: pytest.CaptureFixture[str], line: str, **numbers: Any) -> None:
    benchmark.extra_info.update(numbers, device=etap.device_info("cpu").name)
    with capsys.disabled():
        print(f"\n{line}")


@pytest.mark.benchmark(group="cpu: against PyTorch eager")
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_against_eager(batch: int, benchmark: Any, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    """16 heads, 4096 tokens, BF16; PyTorch in BF16 and in FP32, and the better of the two for the ratio."""
    inputs, run = prepare(Case(f"{batch}_x_4k", lens=(4096,) * batch), seed)
    ours, bf16, fp32 = interleaved(run, eager(inputs, torch.bfloat16), eager(inputs, torch.float32), rounds=15)
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    speedup = min(bf16, fp32) / ours
    line = (
        f"{batch} x 4096, 16 heads: etap {ours * 1e3:.2f} ms; eager BF16 {bf16 * 1e3:.2f} ms, "
        f"FP32 {fp32 * 1e3:.2f} ms: {speedup:.1f} times as fast"
    )
    report(benchmark, capsys, line, etap_s=ours, eager_bf16_s=bf16, eager_fp32_s=fp32, speedup=speedup)


@pytest.mark.benchmark(group="cpu: against the roofs")
@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
@pytest.mark.parametrize("batch", [1, 4])
def test_against_roofs(
    batch: int, kv_format: str, benchmark: Any, capsys: pytest.CaptureFixture[str], roofs: dict[str, float], seed: int
) -> None:
    """16 heads, 16384 tokens. The lower roof is what would take longer: to copy the KV bytes once, or to do its multiply-adds in FP32."""
    case = Case(f"{batch}_x_16k", lens=(16384,) * batch, kv_format=kv_format)
    inputs, run = prepare(case, seed)
    (ours,) = interleaved(run, rounds=15)
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    tokens = sum(case.lens)
    row = inputs.kv_cache.shape[-1]
    memory = tokens * row * inputs.kv_cache.element_size() / roofs["copy_bytes_per_second"]
    compute = 2 * tokens * case.heads * (row + case.d_latent) / roofs["fma_flop_per_second"]
    fraction = max(memory, compute) / ours
    line = (
        f"{batch} x 16384 {kv_format}, 16 heads: etap {ours * 1e3:.2f} ms; memory roof {memory * 1e3:.2f} ms, "
        f"FMA roof {compute * 1e3:.2f} ms: {fraction:.2f} of the lower"
    )
    report(benchmark, capsys, line, etap_s=ours, memory_s=memory, compute_s=compute, fraction=fraction, **roofs)
