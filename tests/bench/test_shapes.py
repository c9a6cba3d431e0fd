"""Fixed shapes on both devices, as `etap bench cpu` and `etap bench gpu` measure them: ceiling, etap and peers in interleaved rounds over
rotated KV, results checked, times not.

pytest-benchmark's table shows the host's time of a call that is waited for; what counts is in the files that --results names, which
`etap history` keeps and compares.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from etap_bench import inputs, shape_lists
from etap_bench.contenders import Etap
from etap_bench.errors import Refused
from etap_bench.measure import Rounds
from etap_bench.measurement import PEERS
from etap_bench.results import Results
from etap_bench.runner import Bench, Options
from etap_bench.work import of_shapes

import etap_py as etap

pytestmark = pytest.mark.bench

CPU_SHAPES, GPU_SHAPES = ([shape.name for shape in shape_lists.load(name)] for name in ("cpu", "gpu"))
ROUNDS = Rounds(9)


@pytest.mark.benchmark(group="cpu: shapes")
@pytest.mark.parametrize("name", CPU_SHAPES)
def test_cpu(name: str, benchmark: Any, measured: dict[str, Results], seed: int) -> None:
    torch.set_num_threads(etap.device_info("cpu").num_sms)  # the peers' too
    time_shape(name, "cpu", ROUNDS, seed, benchmark, measured)
    torch.set_num_threads(1)


@pytest.mark.gpu
@pytest.mark.benchmark(group="gpu: shapes")
@pytest.mark.parametrize("name", GPU_SHAPES)
def test_gpu(name: str, benchmark: Any, measured: dict[str, Results], seed: int) -> None:
    try:
        time_shape(name, "cuda", replace(ROUNDS, sustain=1.0), seed, benchmark, measured)
    except Refused as why:
        pytest.skip(str(why))


def time_shape(name: str, device: str, rounds: Rounds, seed: int, benchmark: Any, measured: dict[str, Results]) -> None:
    work = replace(of_shapes([name]), seed=seed)
    bench = Bench(work, Options(device, PEERS, rounds, 1, [name]))
    (row,) = bench.measure(work.items)
    assert row.wrong == {}
    assert row.measured.etap_us is not None, row.measured.skipped
    done = measured.setdefault(device, bench.begin(None))
    done.rows.append(row)
    done.run.rows[:] = [row.name for row in done.rows]

    shape, pools = work.items[0].shape, bench.pools_of(work.items[0])
    arena = inputs.Arena(shape.kv_format, shape.d_latent, shape.d_rope, inputs.arena_tokens(shape, pools), bench.timer.device)
    call = waited_for(Etap(inputs.Inputs(shape, arena, pools)), pools, device)
    benchmark.pedantic(call, rounds=5, iterations=max(1, row.measured.calls // 10), warmup_rounds=1)
    benchmark.extra_info.update(us=row.measured.us, fraction=row.measured.fraction, kernel=row.measured.kernel)


def waited_for(ours: Etap, pools: int, device: str) -> Callable[[], None]:
    pool = itertools.cycle(range(pools))

    def run() -> None:
        ours.call(next(pool))
        if device != "cpu":
            torch.cuda.synchronize()

    return run
