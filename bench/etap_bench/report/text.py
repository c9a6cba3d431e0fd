"""Numbers as people read them: two or three significant figures, a unit that fits, differences in percent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from etap_bench.measurement import REFERENCE

NOTHING = "\u2013"  # a dash
_MINUS = "\u2212"
_SPACE = "\u00a0"  # a number stays with its unit


def significant(value: float | None, digits: int = 3) -> str:
    """ "1,240", "12.4", "0.0124"; a dash for None."""
    if value is None or not math.isfinite(value):
        return NOTHING
    decimals = digits - 1 - int(f"{value:.{digits - 1}e}".partition("e")[2]) if value else 0
    return f"{round(value, decimals):,.{max(decimals, 0)}f}".replace("-", _MINUS)


def percent(fraction: float | None) -> str:
    """Whole percent from ten on, below two figures; a multiple where it is more than ten times; a dash for None and what is not finite."""
    if fraction is None or not math.isfinite(fraction):
        return NOTHING
    if fraction >= 10:
        return f"{significant(fraction)} times"
    return f"{fraction:,.0%}".replace("%", f"{_SPACE}%") if abs(fraction) >= 0.0995 else f"{significant(fraction * 100, 2)}{_SPACE}%"


def difference(ratio: float | None) -> str:
    """Of a ratio from 1, with its sign; large ones as a multiple."""
    if ratio is None:
        return NOTHING
    if ratio >= 3:
        return f"{significant(ratio)} times"
    return signed_percent(ratio - 1, 0 if abs(ratio - 1) >= 0.0995 else 1)


def signed_percent(change: float, decimals: int) -> str:
    return f"{change * 100:+.{decimals}f}{_SPACE}%".replace("-", _MINUS)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Unit:
    """name: "µs"; size: in the unit that values are stored in."""

    name: str
    size: float

    def of(self, value: float | None) -> str:
        """Without the name."""
        return NOTHING if value is None else significant(value / self.size)

    def named(self, value: float) -> str:
        return f"{self.of(value)}{_SPACE}{self.name}"


def _fitting(values: Iterable[float], units: tuple[Unit, ...]) -> Unit:
    """The largest in which the median is 1 and more, else the smallest."""
    middle = statistics.median([*values] or [0.0])
    return next((unit for unit in reversed(units) if middle >= unit.size), units[0])


def time_unit(microseconds: Iterable[float]) -> Unit:
    return _fitting(microseconds, (Unit("µs", 1.0), Unit("ms", 1e3), Unit("s", 1e6)))


def rate_unit(values: Iterable[float], of: str) -> Unit:
    """of: "B/s" or "FLOP/s", in which the values are."""
    return _fitting(values, (Unit(f"M{of}", 1e6), Unit(f"G{of}", 1e9), Unit(f"T{of}", 1e12)))


def energy_unit(joules: Iterable[float]) -> Unit:
    return _fitting(joules, (Unit("J", 1.0), Unit("kJ", 1e3), Unit("MJ", 1e6)))


def duration(microseconds: float) -> str:
    return time_unit([microseconds]).named(microseconds)


def label(name: str) -> str:
    """Of a contender."""
    return {"etap": "ETAP", REFERENCE: "PyTorch (reference)"}.get(name, name)
