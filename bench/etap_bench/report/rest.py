"""What a decode step takes beside attention: one number, or what SGLang's steps were measured to take."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from etap_py import files
from msgspec import Meta, Struct

from etap_bench.errors import Refused

_Time = Annotated[float, Meta(ge=0, le=1e12)]


class _Measured(Struct):
    """A line of integrations/sglang/bench_decode.py; times in microseconds. Without a GPU it has no `attention`."""

    batch: Annotated[int, Meta(ge=1)]
    context: Annotated[int, Meta(ge=1)]
    step: _Time
    attention: _Time


@dataclass(frozen=True)
class Rest:
    """constant_ms: for every step, 0: not known; by_context: else, for each context that was measured, (batch, ms) in order of the batch"""

    constant_ms: float = 0.0
    by_context: dict[int, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        return bool(self.constant_ms or self.by_context)

    def ms(self, batch: int, context: float) -> float:
        """Of a step: at the nearest context that was measured, between its batches by their distance, beyond them as at the last one."""
        if not self.by_context:
            return self.constant_ms
        batches, times = zip(*self.by_context[min(self.by_context, key=lambda measured: abs(measured - context))], strict=True)
        return float(np.interp(batch, batches, times))


def read(path: Path) -> Rest:
    """The rest (step without attention) of every row that bench_decode.py appended to the file; the median where a batch and context was
    measured more than once. Raises Refused for a file that can't be read, has no rows or has one without these times."""
    try:
        lines = files.read(path).splitlines()
    except OSError as failure:
        raise Refused(f"rest {path} can't be read: {failure.strerror}") from failure
    found: dict[int, dict[int, list[float]]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=_Measured)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refused(f"rest {path}, line {number}: {error}; allowed: what bench_decode.py --rows writes on a GPU") from error
        if row.attention > row.step:
            raise Refused(f"rest {path}, line {number}: attention is {row.attention:g}; allowed: 0 to {row.step:g}, the step")
        found.setdefault(row.context, {}).setdefault(row.batch, []).append((row.step - row.attention) / 1e3)
    if not found:
        raise Refused(f"rest {path} has no rows; allowed: what bench_decode.py --rows writes on a GPU")
    return Rest(by_context={context: [(b, statistics.median(ms)) for b, ms in sorted(of.items())] for context, of in found.items()})
