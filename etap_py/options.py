"""Options of the commands: a parser that refuses in one sentence, and the kinds of numbers it takes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from etap_py.terminal import complain, write


class Parser(argparse.ArgumentParser):
    """What can't be understood ends in one sentence and exit status 2, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        complain(f"{self.prog}: {message} ({self.prog} --help tells more)")
        raise SystemExit(2)

    def _print_message(self, message: str, *_: object) -> None:
        """Help and version, which argparse would lose without a word where they can't be written."""
        write(message.rstrip("\n"))


def whole(least: int) -> Callable[[str], int]:
    """Whole numbers from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: whole numbers from {least} on")
        return value

    return parse


def amount(least: float = 0.0, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Finite numbers from `least` (`above`: above it) to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < least or (above and value == least) or value > most:
            lowest = f"above {least:g}" if above else f"from {least:g}"
            highest = f" to {most:g}" if most < math.inf else " on" * (not above)
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: numbers {lowest}{highest}")
        return value

    return parse
