"""What is measured of one shape. Without PyTorch: `etap report` reads it anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field

PEERS = ("flashmla", "flashinfer-fa3", "flashinfer-fa2", "fa3", "sglang-triton", "pytorch")  # etap_py/bench/peers.py has their adapters
REFERENCE = "pytorch"  # operators that anyone has: a reference for results and times, not a kernel that people serve with
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
        """The fastest kernel beside ETAP; the reference is none."""
        return min((name for name in self.others if name != REFERENCE), key=self.us.__getitem__, default=None)

    @property
    def others(self) -> list[str]:
        """Who was timed beside ETAP and the ceilings, the fastest first."""
        return sorted((name for name in self.us if name != "etap" and not name.startswith(("ceiling", "gather"))), key=self.us.__getitem__)

    @property
    def wrong(self) -> list[str]:
        """Contenders with a row that is off by more than ROW_ERROR_LIMIT of its norm, or not a number."""
        return [name for name, error in self.worst_row_error.items() if not error < ROW_ERROR_LIMIT]
