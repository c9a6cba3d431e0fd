"""The timers' own logic, as far as it needs no GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from etap_bench import timing
from etap_bench.timing import CpuTimer, CudaTimer, spread, turns


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


def test_spread() -> None:
    assert spread([float(i) for i in range(1, 21)]) == pytest.approx((19 - 2) / 10.5)
    assert spread([3.0]) == 0


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
    assert timer.has_energy == answers
    assert timer.nvml.power_limit() == (700.0 if answers else None)
    assert timer.nvml.sm_clock() == (700_000 if answers else 0)
    assert timer.nvml.driver() == "580"


def test_calls_of_a_graph() -> None:
    """About two milliseconds of calls, in whole turns over the pools."""
    timer = CudaTimer.__new__(CudaTimer)
    assert timer.calls(kv_bytes=300_000_000, pools=1) == 19  # 104 µs each
    assert timer.calls(kv_bytes=3_000_000, pools=34) == 408  # 5 µs each
    assert timer.calls(kv_bytes=3_000_000_000, pools=3) == 3


def test_energy_is_taken_between_steps_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter moves ten times a second: read at arbitrary moments, a second of 500 W may look like 450 or 550 W."""
    now = 0.0

    def replay() -> None:
        nonlocal now
        now += 0.07

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    event = types.SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timer = CudaTimer.__new__(CudaTimer)
    timer.nvml = types.SimpleNamespace(millijoules=lambda: int(now / 0.14 + 1e-6) * 70_000)  # 500 W in steps of 0.14 s
    assert timer.millijoules(replay, 2000.0) == pytest.approx(1000.0)
    timer.nvml = types.SimpleNamespace(millijoules=lambda: 70_000)
    assert timer.millijoules(replay, 2000.0) is None
