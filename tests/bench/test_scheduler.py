"""Requests to decode steps."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from etap_bench import workload
from etap_bench.errors import Refused
from etap_bench.scheduler import Step, sample_steps


def steps_of(folder: Path, requests: list[dict[str, object]], *settings: str) -> list[Step]:
    path = folder / "t.jsonl"
    path.write_text("\n".join(json.dumps(request) for request in requests))
    steps, total = sample_steps(workload.load(str(path), ["steps=1000", *settings]))
    assert len(steps) == total
    return steps


def test_lengths_grow_step_by_step(tmp_path: Path) -> None:
    """Prompt, what was answered, and the new token; the second request joins when it has arrived."""
    requests = [{"arrival": 0, "prompt_tokens": 100, "answer_tokens": 4}, {"arrival": 0.05, "prompt_tokens": 7, "answer_tokens": 2}]
    steps = steps_of(tmp_path, requests)
    assert [step.lengths for step in steps] == [(101,), (102,), (103, 8), (104, 9)]
    assert [step.new_tokens for step in steps] == [1, 1, 2, 2]
    assert [step.seconds for step in steps] == pytest.approx([0, 0.025, 0.05, 0.075])


def test_speculative_tokens(tmp_path: Path) -> None:
    """Four query tokens a step, of which 1 + 0.5 · 3 stay."""
    steps = steps_of(
        tmp_path, [{"arrival": 0, "prompt_tokens": 10, "answer_tokens": 6, "speculative_tokens": 3}], "scheduler.acceptance=0.5"
    )
    assert [step.lengths for step in steps] == [(14,), (16,), (19,)]
    assert {step.query_lens for step in steps} == {(4,)}


def test_no_token_past_the_end_of_an_answer(tmp_path: Path, seed: int) -> None:
    """50 answers of one token were counted as 155: each gained a whole step's tokens. All tokens of all steps are those of the answers,
    for the last request is in the batch until it is answered."""
    rng = random.Random(seed)
    answers = [1, 1, *(rng.randint(1, 9) for _ in range(20)), 40]
    requests: list[dict[str, object]] = [
        {"arrival": i, "prompt_tokens": 10, "answer_tokens": answer, "speculative_tokens": 3} for i, answer in enumerate(answers)
    ]
    steps = steps_of(tmp_path, requests, "scheduler.acceptance=0.7")
    assert sum(step.new_tokens for step in steps) == pytest.approx(sum(answers))


def test_limits_hold(tmp_path: Path, seed: int) -> None:
    """Never more sequences than max_batch, never more distinct tokens than the cache has; nobody is forgotten."""
    rng = random.Random(seed)
    requests: list[dict[str, object]] = []
    for i in range(60):
        prefix = {"prefix_id": f"p{rng.randrange(3)}", "prefix_tokens": 128} if rng.random() < 0.5 else {}
        requests.append({"arrival": i * 0.01, "prompt_tokens": rng.randint(128, 600), "answer_tokens": rng.randint(1, 40), **prefix})
    steps = steps_of(tmp_path, requests, "scheduler.max_batch=9", "scheduler.kv_tokens=3000")
    assert max(len(step.lengths) for step in steps) <= 9
    assert max(len(step.lengths) for step in steps) > 3
    for step in steps:
        repeated, seen = 0, set()
        for blocks in step.shared:
            for name, tokens in blocks:
                repeated += tokens if name in seen else 0
                seen.add(name)
        assert sum(step.lengths) - repeated <= 3000
    # The run stops when half of the last batch has left: at most that many are not answered in full.
    answered = sum(step.new_tokens for step in steps)
    assert answered >= sum(int(str(r["answer_tokens"])) for r in requests) - 9 * 40


def test_idle_time_is_skipped(tmp_path: Path) -> None:
    requests = [{"arrival": t, "prompt_tokens": 10, "answer_tokens": 1} for t in (0, 1000)]
    assert [step.seconds for step in steps_of(tmp_path, requests)] == [0, 1000]


def test_request_larger_than_the_cache(tmp_path: Path) -> None:
    """It would wait for ever."""
    with pytest.raises(Refused, match=r"a request has 900 prompt and 200 answer tokens; allowed: together 1000"):
        steps_of(tmp_path, [{"arrival": 0, "prompt_tokens": 900, "answer_tokens": 200}], "scheduler.kv_tokens=1000")


def test_samples_are_spread_over_the_whole_run() -> None:
    """From the first step to the very end, whatever the number: a sample of the beginning would see small batches only."""
    for count in (2, 7, 48):
        steps, total = sample_steps(workload.load("chat", [f"steps={count}", "shrink=8"]))
        numbers = [step.number for step in steps]
        assert len(numbers) == count
        assert numbers[0] == 0
        assert numbers[-1] > total - total / (2 * count) - 2
        gaps = [b - a for a, b in pairwise(numbers)]
        assert max(gaps) <= 2 * min(gaps) + 4
