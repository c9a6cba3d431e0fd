"""Fixed shapes on both devices: ceiling, etap and peers in interleaved rounds over rotated KV (on CUDA, replays of graphs).

pytest-benchmark times the host, which waits for a replay; what counts is in `extra_info`: microseconds by contender, TB/s, fraction of the
ceiling, energy, clock and card. scripts/bench_history.py keeps it and compares runs. Results are checked, times are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from etap_bench import peers
from etap_bench.contenders import Etap, ceiling_of
from etap_bench.errors import Refused
from etap_bench.inputs import Arena, Inputs, Shape
from etap_bench.measure import measure
from etap_bench.runner import usable_timer
from etap_bench.shape import Shape as NamedShape

import etap_py as etap

pytestmark = pytest.mark.bench

CPU_SHAPES = ("bf16-1x1K-h16", "bf16-4x4K-h16", "bf16-16x1K-h16", "bf16-4x4K-h128", "e4m3-4x4K-h16")
GPU_SHAPES = (
    *("bf16-1x512-h16", "bf16-1x4K-h16", "bf16-1x64K-h16", "bf16-16x1K-h16", "bf16-16x4K-h16", "bf16-16x16K-h16", "bf16-16x64K-h16"),
    *("bf16-16x16K-h8", "bf16-16x16K-h32", "bf16-16x16K-h64", "bf16-16x16K-h128", "bf16-16x16K-h16-q4", "bf16-16x16K-h16-p1"),
    *("e4m3-16x1K-h16", "e4m3-16x16K-h16", "e4m3-16x64K-h16"),
)
CACHE_BYTES_OF_THE_HOST = 64 << 20  # a virtual machine is told its host's whole cache


@pytest.mark.benchmark(group="cpu: shapes")
@pytest.mark.parametrize("name", CPU_SHAPES)
def test_cpu(name: str, benchmark: Any, seed: int) -> None:
    torch.set_num_threads(etap.device_info("cpu").num_sms)  # the peers' too
    time_shape(name, "cpu", seed, benchmark)
    torch.set_num_threads(1)


@pytest.mark.gpu
@pytest.mark.benchmark(group="gpu: shapes")
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_gpu(name: str, benchmark: Any, seed: int) -> None:
    try:
        usable_timer("cuda")
    except Refused as why:
        pytest.skip(str(why))
    time_shape(name, "cuda", seed, benchmark)


def time_shape(name: str, device: str, seed: int, benchmark: Any) -> None:
    torch.manual_seed(seed)
    timer = usable_timer(device)
    info = etap.device_info("cpu" if device == "cpu" else "cuda", 0)
    shape = Shape.of(NamedShape.parse(name))
    pools = shape.pools(min(info.l2_bytes, CACHE_BYTES_OF_THE_HOST))
    inputs = Inputs(shape, Arena(shape.kv_format, 512, 64, shape.arena_tokens(pools), timer.device), pools)
    result = measure(inputs, timer, ceiling=ceiling_of(timer.device), peer_names=peers.NAMES, rounds=9, energy=True)
    assert result.wrong == [], result.worst_row_error
    assert result.etap_us is not None, result.skipped

    ours = Etap(inputs)
    benchmark.pedantic(waited_for(timer.replay_of(ours.call, pools, result.calls), device), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        name=name,
        card=info.name,
        us={contender: round(us, 2) for contender, us in result.us.items()},
        ceiling_us=result.ceiling_us,
        etap_us=result.etap_us,
        fraction=result.fraction,
        terabytes_per_second=shape.kv_bytes / result.etap_us / 1e6,
        plan_us=result.plan_us,
        millijoules=result.millijoules.get("etap"),
        error=result.error["etap"],
        sm_mhz=result.sm_mhz,
        kernel=result.kernel,
    )


def waited_for(replay: Callable[[], None], device: str) -> Callable[[], None]:
    def run() -> None:
        replay()
        if device != "cpu":
            torch.cuda.synchronize()

    return run
