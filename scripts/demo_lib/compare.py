"""Whether two servers gave the same answer, as far as rounding lets them.

Two attention implementations round differently, so a token may differ where the two best candidates are as good as
equal. Up to the first such place all tokens must be equal, and the log-probabilities must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NEAR_TIE = 0.02
"""Two candidates this close (in nats) may change places between implementations in BF16."""


@dataclass(frozen=True)
class Comparison:
    """`equal` of `total` tokens are equal. `agrees`: all, or all up to a place where the reference had a near tie."""

    equal: int
    total: int
    agrees: bool
    largest_difference: float  # of log-probabilities, over the equal tokens
    note: str


def compare(answer: dict[str, Any], reference: dict[str, Any], near_tie: float = NEAR_TIE) -> Comparison:
    """Two answers of SGLang's /generate with `return_logprob` and `top_logprobs_num` of 2 or more."""
    ours, theirs = answer["output_ids"], reference["output_ids"]
    total = len(theirs)
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), total))
    pairs = zip(_logprobs(answer)[:equal], _logprobs(reference)[:equal], strict=True)
    difference = max((abs(a - b) for a, b in pairs), default=0.0)
    if equal == total == len(ours):
        return Comparison(equal, total, True, difference, "equal")
    best, second = (entry[0] for entry in reference["meta_info"]["output_top_logprobs"][min(equal, total - 1)][:2])
    gap = abs(best - second)
    note = f"differs at token {equal}, where the two best are {gap:.3f} nats apart"
    return Comparison(equal, total, gap < near_tie, difference, note)


def _logprobs(answer: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
