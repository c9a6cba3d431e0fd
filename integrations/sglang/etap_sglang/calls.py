"""How many attention calls this process gave to libetap, by kind of step and by kernel.

A call is one layer of one step. SGLang's `/server_info` carries the snapshot of each scheduler process as
`internal_states[i]["etap"]`. Calls replayed inside a CUDA graph are counted when the graph is replayed.
"""

from __future__ import annotations

from collections import Counter

_calls: Counter[tuple[str, str]] = Counter()


def count(step: str, kernel: str, calls: int = 1) -> None:
    """Add `calls` of a step ("decode", "extend", "verify", "draft_extend") that `kernel` served."""
    _calls[step, kernel] += calls


def snapshot() -> list[dict[str, str | int]]:
    """One {"step", "kernel", "calls"} for each pair seen so far, in a fixed order."""
    return [{"step": step, "kernel": kernel, "calls": calls} for (step, kernel), calls in sorted(_calls.items())]
