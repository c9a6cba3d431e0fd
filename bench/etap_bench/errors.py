"""What a person gave that can't be used."""

from __future__ import annotations

import re


class Refused(Exception):
    """A file, an option or a setting can't be used; the message is one sentence that names it, its value and what is allowed."""


def check_device(device: str) -> None:
    """Raises Refused for what is no name of a device."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,4})?", device, flags=re.ASCII):
        raise Refused(f"device is {device!r}; allowed: cpu, cuda, cuda:0 and so on")
