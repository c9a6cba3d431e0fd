"""How many attention calls this process served, by kind of step and by kernel.

A call is one layer of one step; the kernel is libetap's name for it, or "triton" where SGLang's backend served, or the name of the method
of SGLang's `dsa` backend that served a sparse model's prompt. `/server_info` carries the snapshot of each scheduler process as
`internal_states[i]["etap"]`; with --enable-metrics, `/metrics` has the sum over the processes as
`etap:attention_calls_total{step,kernel}`. Calls replayed inside a CUDA graph are counted when the graph is replayed.

With ETAP_SGLANG_SHARED_PREFIXES, `/server_info` also has `internal_states[i]["etap_shared_prefixes"]`: what the last step found to share.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import etap_py as etap

STEPS = ("decode", "extend", "verify", "draft", "draft_extend")

DELEGATED = "triton"
"""The kernel's name where SGLang's Triton backend computes for this one."""

_calls: Counter[tuple[str, str]] = Counter()
_published: Any = None
_sharing: etap.Plan | None = None


def count(step: str, kernel: str, calls: int = 1) -> None:
    """Add `calls` of a step (one of STEPS) that `kernel` served."""
    _calls[step, kernel] += calls
    if _published is not None:
        _published.labels(step, kernel).inc(calls)


def snapshot() -> list[dict[str, str | int]]:
    """One {"step", "kernel", "calls"} for each pair seen so far, in a fixed order."""
    return [{"step": step, "kernel": kernel, "calls": calls} for (step, kernel), calls in sorted(_calls.items())]


def publish() -> None:
    """From now on count on SGLang's metrics endpoint too. For a process whose PROMETHEUS_MULTIPROC_DIR is set already."""
    global _published
    if _published is None:
        import prometheus_client  # reads PROMETHEUS_MULTIPROC_DIR when it is imported

        description = "Attention calls (one layer of one step) by kind of step and kernel; triton: SGLang's own backend"
        _published = prometheus_client.Counter("etap:attention_calls", description, ["step", "kernel"])


def planned(plan: etap.Plan) -> None:
    """The plan of a step whose requests may share prefixes."""
    global _sharing
    _sharing = plan


def shared_prefixes() -> dict[str, int] | None:
    """{"groups", "sequences", "tokens"} as etap.Plan.shared has them, of the last step given to `planned`; None: there was none. Waits for
    the GPU."""
    if _sharing is None:
        return None
    if _sharing.problem.device != "cpu":
        import torch

        torch.cuda.synchronize()  # the step may run on another stream than this thread's
    return asdict(_sharing.shared())
