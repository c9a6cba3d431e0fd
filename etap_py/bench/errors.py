"""What a person gave that can't be used."""

from __future__ import annotations


class Refused(Exception):
    """A file, an option or a setting can't be used; the message is one sentence that names it, its value and what is allowed."""
