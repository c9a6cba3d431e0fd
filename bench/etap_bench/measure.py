"""Times one shape: ceiling, etap and peers in turn, every result against the float64 reference."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import etap_py as etap
import torch

from etap_bench import peers
from etap_bench.contenders import Ceiling, Etap, Skip
from etap_bench.inputs import Inputs
from etap_bench.measurement import Measurement, Times
from etap_bench.timing import Call, Timer

PLAN_CALLS = 32


@dataclass(frozen=True)
class Rounds:
    """How often: rounds that count, rounds before them, and seconds of each contender alone (0: none)."""

    rounds: int
    warm_up: int = 1
    sustain: float = 0.0


def measure(inputs: Inputs, timer: Timer, *, ceiling: Ceiling | None, peer_names: Sequence[str], rounds: Rounds) -> Measurement:
    """A contender that refuses the shape, or a peer that fails, is named in `skipped`; an error of etap or the ceiling is raised."""
    result = Measurement(calls=timer.calls(inputs.shape.kv_bytes, inputs.pools))
    calls: dict[str, Call] = dict(ceiling.contenders(inputs)) if ceiling else {}
    try:
        ours = Etap(inputs)
        calls["etap"] = ours.call
        result.kernel, result.reason = ours.decision.kernel, ours.decision.reason
        updates = {"plan": timer.replay_of(lambda _: ours.update(), 1, PLAN_CALLS)}
        result.plan_us = statistics.median(timer.rounds(updates, rounds.rounds, rounds.warm_up)[0]["plan"]) / PLAN_CALLS
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
                if name != "etap":
                    difference[row_norms == 0] = 0.0  # a row that sees no token: what that gives is etap.h's rule, not the peers'
                result.error[name] = (difference.norm() / norm).item()
                result.worst_row_error[name] = (difference.norm(dim=-1) / row_norms.clamp(min=torch.finfo(torch.float64).tiny)).max().item()
            replays[name] = timer.replay_of(call, inputs.pools, result.calls)
        except Exception as error:
            if name not in peers.NAMES:
                raise
            result.skipped[name] = f"{type(error).__name__}: {error}"
    times, result.sm_mhz = timer.rounds(replays, rounds.rounds, rounds.warm_up)
    result.times = {name: Times.of([us / result.calls for us in samples]) for name, samples in times.items()}
    if rounds.sustain:
        computing = [name for name in replays if name in result.error]  # a ceiling's energy says nothing
        result.sustained = {name: timer.sustain(replays[name], result.calls, rounds.sustain) for name in computing}
    return result
