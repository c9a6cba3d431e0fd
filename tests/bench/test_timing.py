"""The timers' own logic, as far as it needs no GPU."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable

import numpy as np
import pytest
import torch
from etap_bench import timing
from etap_bench.measurement import Sustained, Times
from etap_bench.timing import CpuTimer, CudaTimer, turns


def test_pools_take_turns_across_replays() -> None:
    """Replays of fewer calls than there are pools must not read the same pools each time: they would come from the cache."""
    seen: list[int] = []
    replay = CpuTimer().replay_of(lambda pool: seen.append(pool), pools=5, calls=2)
    for _ in range(5):
        replay()
    assert seen == [0, 1, 2, 3, 4] * 2


def test_contenders_take_turns() -> None:
    """Each is once in every place, so that none always follows the same one."""
    order = turns(["a", "b", "c"], rounds=3)
    assert order == list("abcbcacab")
    assert turns([], rounds=3) == []


def test_percentiles(seed: int) -> None:
    """Against NumPy's, also of a single round."""
    rng = np.random.default_rng(seed)
    for count in (1, 2, 15, 100):
        samples = rng.lognormal(size=count)
        times = Times.of(samples.tolist())
        assert (times.p50, times.p90, times.p99) == pytest.approx(tuple(np.percentile(samples, (50, 90, 99))))
        if count > 2:
            assert min(samples) <= (times.low or 0) <= times.p50 <= (times.high or 0) <= max(samples)


def test_confidence(seed: int) -> None:
    """The median of a skewed distribution, 1, lies between low and high in about 95 of 100 measurements of 15 rounds."""
    rng = np.random.default_rng(seed)
    every = [Times.of(rng.lognormal(size=15).tolist()) for _ in range(1000)]
    covered = sum((times.low or 0) <= 1 <= (times.high or 0) for times in every)
    assert 930 <= covered <= 995  # binomial: 15 rounds give 0.965, and 5 standard deviations of 1000 draws are 29
    assert Times(2.0, low=1.9, high=2.3).uncertainty == pytest.approx(0.1)
    assert Times(2.0).uncertainty == math.inf


def test_confidence_is_what_is_said() -> None:
    """min to max of 2 to 5 rounds, which cover 50 to 93.75 %, were called 95 %, and a single round "± 0.0 %"; the upper end of others was
    one too far out."""
    for count in range(1, 6):
        few = Times.of([float(i) for i in range(1, count + 1)])
        assert (few.low, few.high, few.uncertainty) == (None, None, math.inf)
    for count in range(6, 101):
        times = Times.of([float(i) for i in range(count)])
        assert times.low is not None and times.high is not None
        low, high = int(times.low), int(times.high)
        assert low == count - 1 - high
        covered = [1 - 2 * sum(math.comb(count, i) for i in range(place + 1)) / 2**count for place in (low, low + 1)]
        assert covered[0] >= 0.95 > covered[1]


@pytest.mark.parametrize("answers", [True, False])
def test_nvml(answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual machines often refuse the energy counter: then there is no energy, and no failure."""

    class NVMLError(Exception):
        pass

    def ask(*arguments: object) -> int:
        if not answers:
            raise NVMLError("Not Supported")
        return 700_000

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=ask,
        nvmlDeviceGetClockInfo=lambda handle, clock: ask(),
        nvmlDeviceGetPowerManagementLimit=ask,
        nvmlSystemGetDriverVersion=lambda: "580",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="1"))
    timer = CudaTimer("cuda:0")
    assert timer.nvml.millijoules() == (700_000 if answers else None)
    assert timer.nvml.power_limit() == (700.0 if answers else None)
    assert timer.nvml.sm_clock() == (700_000 if answers else 0)
    assert timer.nvml.driver() == "580"


def test_calls_of_a_graph() -> None:
    """About two milliseconds of calls, in whole turns over the pools."""
    timer = CudaTimer.__new__(CudaTimer)
    assert timer.calls(kv_bytes=300_000_000, pools=1) == 19  # 104 µs each
    assert timer.calls(kv_bytes=3_000_000, pools=34) == 408  # 5 µs each
    assert timer.calls(kv_bytes=3_000_000_000, pools=3) == 3


def sustained(monkeypatch: pytest.MonkeyPatch, seconds: float, counter: Callable[[float], int | None]) -> Sustained:
    """Of a load of replays of 70 ms and 10 calls on a made-up card."""
    now = 0.0

    def replay() -> None:
        nonlocal now
        now += 0.07

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = CudaTimer.__new__(CudaTimer)
    timer.nvml = types.SimpleNamespace(millijoules=lambda: counter(now), sm_clock=lambda: 1400 if now > 0.3 else 1980)
    return timer.sustain(replay, 10, seconds)


def test_energy_is_taken_between_steps_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter moves ten times a second: read at arbitrary moments, a second of 500 W may look like 450 or 550 W. The time before clock
    and power have settled does not count."""
    found = sustained(monkeypatch, 1.0, lambda now: int(now / 0.14 + 1e-6) * 70_000)  # 500 W in steps of 0.14 s
    assert found.us == pytest.approx(7000.0)
    assert found.millijoules == pytest.approx(3500.0)
    assert found.watts == pytest.approx(500.0)
    assert found.sm_mhz == 1400
    assert found.seconds >= 0.9


@pytest.mark.parametrize(
    ("seconds", "counter"), [(0.3, lambda now: int(now * 10) * 50_000), (1.0, lambda _: 70_000), (1.0, lambda _: None)]
)
def test_no_energy_from_less_than_half_a_second(
    seconds: float, counter: Callable[[float], int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few steps of the counter, one that stands still or none: no energy is given rather than a wrong one; the time is."""
    found = sustained(monkeypatch, seconds, counter)
    assert found.millijoules is None and found.watts is None
    assert found.us == pytest.approx(7000.0)


def test_sustained_load_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def replay() -> None:
        nonlocal now
        now += 0.05

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    found = CpuTimer().sustain(replay, 5, 0.5)
    assert found.us == pytest.approx(10_000.0)
    assert found.seconds == pytest.approx(0.5)
    assert found.millijoules is None
