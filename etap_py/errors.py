"""The library's errors as exceptions, and refusals in other words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


class EtapError(RuntimeError):
    """A call of the library returned a status other than ETAP_OK; nothing was launched and outputs are untouched.

    status: the number, name: "ETAP_UNSUPPORTED", message: the library's sentence (argument, value, what is allowed).
    """

    def __init__(self, status: int, name: str, message: str) -> None:
        super().__init__(status, name, message)  # as they came, so that it can be pickled from one process to another
        self.status = status
        self.name = name
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} ({self.name})"


class EtapInvalidArgument(EtapError, ValueError):
    """ETAP_INVALID_ARGUMENT: a value that is never allowed."""


class EtapUnsupported(EtapError):
    """ETAP_UNSUPPORTED: a problem that is well formed, but that this device or build can't solve."""


_CLASSES: dict[str, type[EtapError]] = {
    "ETAP_INVALID_ARGUMENT": EtapInvalidArgument,
    "ETAP_UNSUPPORTED": EtapUnsupported,
}


def error(status: int, name: str, message: str) -> EtapError:
    """The exception for a status."""
    return _CLASSES.get(name, EtapError)(status, name, message)


# What a plan raises for arguments that don't fit.
REFUSALS = (ValueError, TypeError, EtapError)


class Words:
    """Refusals in other words, `raise words(refusal) from None`: `names` maps arguments of `etap_py.Plan` to what the caller calls them."""

    def __init__(self, names: Mapping[str, str]) -> None:
        longest_first = sorted(names, key=len, reverse=True)
        self._names = dict(names)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def __call__(self, refusal: ValueError | TypeError | EtapError) -> Exception:
        return self.replaced(refusal, lambda sentence: self._pattern.sub(lambda name: self._names[name[0]], sentence))

    @staticmethod
    def replaced(refusal: Exception, change: Callable[[str], str]) -> Exception:
        """The same exception with another sentence."""
        sentence = change(refusal.message if isinstance(refusal, EtapError) else str(refusal))
        given = (refusal.status, refusal.name, sentence) if isinstance(refusal, EtapError) else (sentence,)
        same: Exception = type(refusal)(*given)
        return same.with_traceback(refusal.__traceback__)
