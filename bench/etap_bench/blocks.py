"""What sequences can share."""

from __future__ import annotations

from collections.abc import Hashable

Block = tuple[Hashable, int]  # the name of a block of KV tokens, which stands for all before it too, and their number
