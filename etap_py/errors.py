"""The library's errors as exceptions."""

from __future__ import annotations


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
