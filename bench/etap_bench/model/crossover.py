"""Where one kernel beats another: predicted times over contexts and query rows."""

from __future__ import annotations

from dataclasses import dataclass

from etap_bench.model.basis import Basis
from etap_bench.model.kernel import Prediction
from etap_bench.shape import BLOCK_TOKENS, Shape

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
ROWS = (8, 16, 24, 32, 48, 64, 96, 128)
LONGEST = 1 << 20  # tokens: as far as is looked


@dataclass(frozen=True)
class Cell:
    """Both kernels on one shape."""

    shape: Shape
    first: Prediction
    second: Prediction

    @property
    def speedup(self) -> float:
        """Time of the second kernel over that of the first: above 1 the first is faster."""
        return self.second.us / self.first.us


@dataclass(frozen=True)
class Line:
    """One number of query rows: a cell for each of CONTEXTS."""

    rows: int
    cells: tuple[Cell, ...]
    half_fixed: int  # tokens from which on the first kernel's fixed cost is less than half of its time
    faster: str  # where the first kernel is: "always", "never", "up to 4096", "from 512", "here and there"


def crossover(first: Basis, second: Basis, batch: int, kv_format: str = "bf16", rows: tuple[int, ...] = ROWS) -> list[Line]:
    """A line for each number of query rows; the kernels may be on different GPUs."""

    def line(heads: int) -> Line:
        def cell(context: int) -> Cell:
            shape = Shape.equal(batch=batch, context=context, heads=heads, kv_format=kv_format)
            return Cell(shape, first.predict(shape), second.predict(shape))

        def grown(context: int) -> bool:
            prediction = cell(context).first
            return prediction.us >= 2 * prediction.fixed_us

        steps = [BLOCK_TOKENS * 2**step for step in range((LONGEST // BLOCK_TOKENS).bit_length())]
        return Line(
            rows=heads,
            cells=tuple(cell(context) for context in CONTEXTS),
            half_fixed=next((context for context in steps if grown(context)), LONGEST),
            faster=_where([cell(context).speedup >= 1 for context in steps], steps),
        )

    return [line(heads) for heads in rows]


def _where(holds: list[bool], contexts: list[int]) -> str:
    count = sum(holds)
    if count in (0, len(holds)):
        return "always" if count else "never"
    if all(holds[:count]):
        return f"up to {contexts[count - 1]}"
    return f"from {contexts[-count]}" if all(holds[-count:]) else "here and there"
