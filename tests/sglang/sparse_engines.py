"""What engines are asked, those of sparse models above all, and how their answers are compared: on the CPU platform and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from demo_lib.compare import compare
from demo_lib.model import ModelConfig
from harness import SEED
from rounding import largest_difference, near_tie

MTP = {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": 1, "speculative_num_steps": 3, "speculative_num_draft_tokens": 4}


def prompts(lengths: Sequence[int]) -> list[list[list[int]]]:
    """Two rounds of token ids, fresh in each run of the tests; the second round is the last prompt of the first, which the radix cache
    then holds, and five tokens more."""
    print(f"ETAP_TEST_SEED={SEED}")
    generator = torch.Generator().manual_seed(SEED)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, ModelConfig().vocab_size, (count,), generator=generator).tolist()

    first = [tokens(count) for count in lengths]
    return [first, [first[-1] + tokens(5)]]


def arguments(**options: Any) -> dict[str, Any]:
    """Of an engine."""
    return {"mem_fraction_static": 0.3, "enable_fp32_lm_head": True, "log_level": "warning", "random_seed": 1, **options}


def expect_same(given: dict[str, Any], wanted: dict[str, Any], layers: int, **rounding: Any) -> None:
    """The same tokens up to near ties, and log-probabilities as near as rounding has them in a model of so many layers."""
    limit = largest_difference(layers, **rounding)
    pairs = zip(chain(*given["rounds"]), chain(*wanted["rounds"]), strict=True)
    results = [compare(answer, expected, near_tie(limit)) for answer, expected in pairs]
    print(f"log-probabilities differ by {max(result.largest_difference for result in results):.4f} at most, of {limit:.4f} allowed")
    assert all(result.agrees for result in results), [result for result in results if not result.agrees]
    assert max(result.largest_difference for result in results) < limit
    assert sum(result.equal for result in results) > 0.5 * sum(result.total for result in results)
