"""What is measured of one shape. Without PyTorch: reports read it anywhere."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

PEERS = ("flashmla", "flashinfer-fa3", "flashinfer-fa2", "fa3", "sglang-triton", "pytorch")  # peers.py has their adapters
REFERENCE = "pytorch"  # operators that anyone has: a reference for results and times, not a kernel that people serve with
ROW_ERROR_LIMIT = 2e-2  # of a row's norm: BF16 rounding gives 2e-3, a wrong row about 1

Above0 = Annotated[float, Meta(gt=0)]


class Times(Struct, frozen=True, omit_defaults=True):
    """Microseconds of a call over the rounds, each of which is the mean of a replay's calls. None: not kept.

    low, high: between them lies the median of all rounds that could be measured, with 95 % confidence and more; few rounds can't say it
    """

    p50: Above0
    p90: Above0 | None = None
    p99: Above0 | None = None
    low: Above0 | None = None
    high: Above0 | None = None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        ordered = sorted(samples)
        place = _place(len(ordered))
        low, high = (None, None) if place is None else (ordered[place], ordered[-1 - place])
        return cls(statistics.median(ordered), percentile(ordered, 90), percentile(ordered, 99), low, high)

    @property
    def uncertainty(self) -> float:
        """Of the median: half of what lies between low and high, relative; infinite where they are not known."""
        return math.inf if self.low is None or self.high is None else (self.high - self.low) / 2 / self.p50


def _place(count: int) -> int | None:
    """How far from both ends the order statistics may be between which the median lies with 95 % confidence, whatever the distribution:
    how many of `count` samples lie below it is binomial (Conover, Practical Nonparametric Statistics, 3.2). None: the ends are too near."""
    ways, beyond, place = 1, 1, 0  # in which `place` samples, or at most so many, lie below
    while 2 * beyond * 20 <= 2**count:
        place += 1
        ways = ways * (count - place + 1) // place
        beyond += ways
    return place - 1 if place else None


def apart(ratio: float, noise: float, uncertainty: float) -> int | None:
    """1: a ratio of medians is above 1, -1: below, 0: by no more than `noise` and their `uncertainty` in either direction. None: by more
    than `noise`, and how uncertain they are is not known."""
    distance = max(ratio, 1 / ratio) - 1
    if distance <= noise:
        return 0
    if math.isinf(uncertainty):
        return None
    return 0 if distance <= uncertainty else 1 if ratio > 1 else -1


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, interpolated."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


class Sustained(Struct, frozen=True, omit_defaults=True):
    """One contender alone for some seconds: what a card under load does, whose power limit lowers its clock. None: not known."""

    seconds: float
    us: Above0 | None = None  # of a call
    millijoules: float | None = None  # of a call, by the card's counter over half a second and more
    sm_mhz: int | None = None  # median

    @property
    def watts(self) -> float | None:
        return self.millijoules / self.us * 1e3 if self.millijoules is not None and self.us else None


class Measurement(Struct, omit_defaults=True):
    """Of one layer's call, by contender. Times in microseconds."""

    calls: int = 0  # in a replay
    times: dict[str, Times] = {}
    sustained: dict[str, Sustained] = {}
    error: dict[str, float] = {}  # norm of the difference / norm of the reference
    worst_row_error: dict[str, float] = {}
    skipped: dict[str, str] = {}  # why
    kernel: str = ""
    reason: str = ""
    plan_us: Annotated[float, Meta(ge=0)] | None = None
    sm_mhz: int = 0  # under the load of the rounds; 0: not known

    @property
    def us(self) -> dict[str, float]:
        """Medians."""
        return {name: times.p50 for name, times in self.times.items()}

    @property
    def millijoules(self) -> dict[str, float]:
        return {name: one.millijoules for name, one in self.sustained.items() if one.millijoules is not None}

    @property
    def ceiling(self) -> str | None:
        """The fastest of the copies."""
        return min((name for name in self.times if name.startswith("ceiling")), key=self.us.__getitem__, default=None)

    @property
    def ceiling_us(self) -> float | None:
        return self.us[self.ceiling] if self.ceiling else None

    @property
    def etap_us(self) -> float | None:
        return self.us.get("etap")

    @property
    def fraction(self) -> float | None:
        """Of the ceiling."""
        return self.ceiling_us / self.etap_us if self.ceiling_us and self.etap_us else None

    @property
    def uncertainty(self) -> float:
        """Of `fraction`, relative; infinite where it is not known."""
        return sum(self.times[name].uncertainty for name in ("etap", self.ceiling) if name in self.times)

    @property
    def best_peer(self) -> str | None:
        """The fastest kernel beside ETAP; the reference is none."""
        return min((name for name in self.others if name != REFERENCE), key=self.us.__getitem__, default=None)

    @property
    def others(self) -> list[str]:
        """Who was timed beside ETAP and the ceilings, the fastest first."""
        return sorted((name for name in self.times if name != "etap" and not is_copy(name)), key=self.us.__getitem__)

    @property
    def wrong(self) -> list[str]:
        """Contenders with a row that is off by more than ROW_ERROR_LIMIT of its norm, or not a number."""
        return [name for name, error in self.worst_row_error.items() if not error < ROW_ERROR_LIMIT]

    def without(self, name: str) -> None:
        """Forgets what a contender that was wrong has reached."""
        for by_name in (self.times, self.sustained, self.error, self.worst_row_error):
            by_name.pop(name, None)


def is_copy(name: str) -> bool:
    """A contender that computes nothing: the ceiling, or a gather of single rows."""
    return name.startswith(("ceiling", "gather"))
