"""Timers of the two devices: contenders take turns, round by round, so that all meet the same clocks and the same noise."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from etap_bench.measurement import Sustained

Call = Callable[[int], "torch.Tensor | None"]  # enqueues one call on a pool of pages; returns its output
Replay = Callable[[], None]  # a fixed number of calls that take turns over the pools

PERIOD_US = 2000.0  # a replay takes about this long: its launch is then a fraction of a percent
SETTLING = 0.3  # seconds, until clock and power are those of the load
BATCH_SECONDS = 0.05  # between two looks at clock and power
LEAST_ENERGY_SECONDS = 0.5  # the counter moves ten times a second: over less its steps are too large a part


class Timer(Protocol):
    """Times calls on one device."""

    device: str

    def calls(self, kv_bytes: int, pools: int) -> int:
        """How many calls that read so many bytes a replay should hold."""

    def replay_of(self, call: Call, pools: int, calls: int) -> Replay: ...

    def rounds(self, replays: dict[str, Replay], rounds: int, warm_up: int) -> tuple[dict[str, list[float]], int]:
        """Microseconds of each replay in each of `rounds` rounds, after `warm_up` others, and the SM clock (MHz; 0: not known) under that
        load."""

    def sustain(self, replay: Replay, calls: int, seconds: float) -> Sustained:
        """Nothing but replays, of `calls` calls each, for so long, after SETTLING seconds of them that don't count."""


class Nvml:
    """Clock, energy and driver through nvidia-ml-py. Where it is not installed or fails, `reason` says so and `handle` is None."""

    def __init__(self, index: int) -> None:
        self.handle: Any = None
        self.reason = ""
        try:
            import pynvml
        except ImportError:
            self.reason = "nvidia-ml-py is not installed"
            return
        self.nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(index).uuid).removeprefix("GPU-")
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            self.reason = str(error)

    def _ask(self, function: str, *arguments: Any) -> Any:
        """None where the card or the virtual machine does not answer."""
        if self.handle is None:
            return None
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None

    def sm_clock(self) -> int:
        """MHz; 0: not known."""
        return int(self._ask("nvmlDeviceGetClockInfo", 1) or 0)  # 1: NVML_CLOCK_SM

    def millijoules(self) -> int | None:
        """Since the driver was loaded."""
        counted = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if counted is None else int(counted)

    def driver(self) -> str:
        return str(self.nvml.nvmlSystemGetDriverVersion()) if self.handle else ""

    def power_limit(self) -> float | None:
        """Watts."""
        milliwatts = self._ask("nvmlDeviceGetPowerManagementLimit")
        return None if milliwatts is None else milliwatts / 1e3


class CudaTimer:
    """CUDA graphs, timed by events."""

    ASSUMED_TBS = 3.0  # only to decide how many calls fill PERIOD_US
    LAUNCH_US = 4.0

    def __init__(self, device: str) -> None:
        self.device = device
        self.nvml = Nvml(torch.device(device).index or 0)

    def calls(self, kv_bytes: int, pools: int) -> int:
        estimate_us = self.LAUNCH_US + kv_bytes / self.ASSUMED_TBS / 1e6
        return pools * max(1, round(PERIOD_US / (pools * estimate_us)))

    def replay_of(self, call: Call, pools: int, calls: int) -> Replay:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # torch.cuda.graph() would collect garbage each time
            graph.capture_begin()
            try:
                for i in range(calls):
                    call(i % pools)
            finally:  # also when a peer fails: a stream that is left capturing would take the others with it
                graph.capture_end()
        replay: Replay = graph.replay
        return replay

    def rounds(self, replays: dict[str, Replay], rounds: int, warm_up: int) -> tuple[dict[str, list[float]], int]:
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
        for name in turns(list(replays), warm_up):
            replays[name]()
        for name in turns(list(replays), rounds):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replays[name]()
            end.record()
            events[name].append((begin, end))
        clock = self.nvml.sm_clock()
        torch.cuda.synchronize()
        return {name: [begin.elapsed_time(end) * 1e3 for begin, end in pairs] for name, pairs in events.items()}, clock

    def sustain(self, replay: Replay, calls: int, seconds: float) -> Sustained:
        replay()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        replay()
        torch.cuda.synchronize()
        batch = max(1, round(BATCH_SECONDS / (time.perf_counter() - begin)))
        begin = time.perf_counter()
        samples: list[_Sample] = []
        clocks: list[int] = []
        queued: deque[tuple[torch.cuda.Event, int]] = deque()
        done = 0
        while len(samples) < 2 or samples[-1].second < begin + SETTLING + seconds:
            for _ in range(batch):
                replay()
            done += batch * calls
            queued.append((torch.cuda.Event(), done))
            queued[-1][0].record()
            if len(queued) <= 2:
                continue
            # Two batches wait while the driver is asked, which takes milliseconds in a virtual machine.
            event, finished = queued.popleft()
            event.synchronize()
            now = time.perf_counter()
            if now > begin + SETTLING:
                samples.append(_Sample(now, finished, self.nvml.millijoules()))
                clocks.append(self.nvml.sm_clock())
        torch.cuda.synchronize()
        first, last = samples[0], samples[-1]
        us = (last.second - first.second) * 1e6 / (last.calls - first.calls) if last.calls > first.calls else None
        return Sustained(last.second - first.second, us, _millijoules(samples), int(statistics.median(clocks)) or None)


class _Sample(NamedTuple):
    """Of a load: calls that were finished, and the energy counter, at a second."""

    second: float
    calls: int
    millijoules: int | None


def _millijoules(samples: list[_Sample]) -> float | None:
    """Of a call. The counter moves some ten times a second: power is that from step to step. None: it stood still, or half a second is not
    between its steps."""
    steps = [now for before, now in itertools.pairwise(samples) if now.millijoules != before.millijoules]
    if len(steps) < 2 or steps[-1].second - steps[0].second < LEAST_ENERGY_SECONDS:
        return None
    first, last = steps[0], steps[-1]
    return ((last.millijoules or 0) - (first.millijoules or 0)) / (last.calls - first.calls)


class CpuTimer:
    """The host's clock. There is no counter of energy that a program may read everywhere."""

    ASSUMED_TBS = 0.005
    PAUSE_SECONDS = 0.01  # OpenMP's threads, PyTorch's, spin for a while after their work and would slow who is next
    device = "cpu"

    def calls(self, kv_bytes: int, pools: int) -> int:  # noqa: ARG002 - replays go on with the next pool, see replay_of
        return max(1, round(PERIOD_US / (kv_bytes / self.ASSUMED_TBS / 1e6)))

    def replay_of(self, call: Call, pools: int, calls: int) -> Replay:
        pool = itertools.cycle(range(pools))  # goes on where the last replay ended, so that few calls meet all pools too

        def replay() -> None:
            for _ in range(calls):
                call(next(pool))

        return replay

    def rounds(self, replays: dict[str, Replay], rounds: int, warm_up: int) -> tuple[dict[str, list[float]], int]:
        times: dict[str, list[float]] = {name: [] for name in replays}
        for name in turns(list(replays), warm_up):
            replays[name]()
        for name in turns(list(replays), rounds):
            time.sleep(self.PAUSE_SECONDS)
            begin = time.perf_counter()
            replays[name]()
            times[name].append((time.perf_counter() - begin) * 1e6)
        return times, 0

    def sustain(self, replay: Replay, calls: int, seconds: float) -> Sustained:
        done = 0
        begin = now = time.perf_counter()
        while now < begin + SETTLING:
            replay()
            now = time.perf_counter()
        begin = now
        while now < begin + seconds:
            replay()
            done += calls
            now = time.perf_counter()
        return Sustained(now - begin, (now - begin) * 1e6 / done)


def timer_of(device: str) -> Timer:
    """device: "cpu" or "cuda:0"."""
    return CpuTimer() if device == "cpu" else CudaTimer(device)


def turns(names: list[str], rounds: int) -> list[str]:
    """Every name once a round; each round begins with the next one."""
    return [name for i in range(rounds) for name in (names[i % len(names) :] + names[: i % len(names)] if names else [])]
