"""Times one shape: ceiling, etap and peers in turn, every result against the float64 reference."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import etap_py as etap
from etap_py.bench import peers
from etap_py.bench.contenders import Ceiling, Etap, Skip
from etap_py.bench.inputs import Inputs
from etap_py.bench.timing import Call, Timer, spread

PLAN_CALLS = 32
ROW_ERROR_LIMIT = 2e-2  # of a row's norm: BF16 rounding gives 2e-3, a wrong row about 1


@dataclass
class Measurement:
    """Of one layer's call, by contender. Times in microseconds."""

    calls: int = 0  # in a replay
    us: dict[str, float] = field(default_factory=dict)  # median of a call
    spread: dict[str, float] = field(default_factory=dict)  # (p90 - p10) / median over the rounds
    error: dict[str, float] = field(default_factory=dict)  # norm of the difference / norm of the reference
    worst_row_error: dict[str, float] = field(default_factory=dict)
    millijoules: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # why
    kernel: str = ""
    reason: str = ""
    plan_us: float | None = None
    sm_mhz: int = 0

    @property
    def ceiling_us(self) -> float | None:
        return min((us for name, us in self.us.items() if name.startswith("ceiling")), default=None)

    @property
    def gather_us(self) -> float | None:
        return min((us for name, us in self.us.items() if name.startswith("gather")), default=None)

    @property
    def etap_us(self) -> float | None:
        return self.us.get("etap")

    @property
    def fraction(self) -> float | None:
        """Of the ceiling."""
        return self.ceiling_us / self.etap_us if self.ceiling_us and self.etap_us else None

    @property
    def best_peer(self) -> str | None:
        return min((name for name in self.us if name in peers.NAMES), key=self.us.__getitem__, default=None)

    @property
    def wrong(self) -> list[str]:
        """Contenders with a row that is off by more than ROW_ERROR_LIMIT of its norm, or not a number."""
        return [name for name, error in self.worst_row_error.items() if not error < ROW_ERROR_LIMIT]


def measure(
    inputs: Inputs, timer: Timer, *, ceiling: Ceiling | None, peer_names: Sequence[str], rounds: int, energy: bool = False
) -> Measurement:
    """A contender that refuses the shape, or a peer that fails, is named in `skipped`; an error of etap or the ceiling is raised."""
    result = Measurement(calls=timer.calls(inputs.shape.kv_bytes, inputs.pools))
    calls: dict[str, Call] = dict(ceiling.contenders(inputs)) if ceiling else {}
    try:
        ours = Etap(inputs)
        calls["etap"] = ours.call
        result.kernel, result.reason = ours.decision.kernel, ours.decision.reason
        updates = {"plan": timer.replay_of(lambda _: ours.update(), 1, PLAN_CALLS)}
        result.plan_us = statistics.median(timer.rounds(updates, rounds)[0]["plan"]) / PLAN_CALLS
    except etap.EtapError as error:
        result.skipped["etap"] = str(error)
    for name in peer_names:
        try:
            calls[name] = peers.prepare(name, inputs)
        except Skip as why:
            result.skipped[name] = str(why)

    reference = inputs.reference()
    norm, row_norms = reference.norm(), reference.norm(dim=-1)
    replays = {}
    for name, call in calls.items():
        try:
            out = call(0)
            if out is not None:
                difference = out.view_as(reference).double() - reference
                result.error[name] = (difference.norm() / norm).item()
                result.worst_row_error[name] = (difference.norm(dim=-1) / row_norms).max().item()
            replays[name] = timer.replay_of(call, inputs.pools, result.calls)
        except Exception as error:
            if name not in peers.NAMES:
                raise
            result.skipped[name] = f"{type(error).__name__}: {error}"
    times, result.sm_mhz = timer.rounds(replays, rounds)
    for name, samples in times.items():
        result.us[name] = statistics.median(samples) / result.calls
        result.spread[name] = spread(samples)
    if energy and timer.has_energy:
        for name, replay in replays.items():
            result.millijoules[name] = timer.millijoules(replay, result.us[name] * result.calls) / result.calls
    return result
