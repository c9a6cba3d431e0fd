"""Requests to decode steps, and the tensors made of a step."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from etap_bench import workload
from etap_bench.contenders import HostCopy
from etap_bench.errors import Refused
from etap_bench.inputs import Arena, Inputs, arena_tokens
from etap_bench.measure import Rounds, measure
from etap_bench.scheduler import Step, sample_steps
from etap_bench.shape import Shape
from etap_bench.timing import CpuTimer


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


def random_shape(rng: random.Random) -> Shape:
    kv_format = rng.choice(["bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656"])
    batch = rng.randint(2, 5)
    shared = (("a", 128), ("b", 64))
    return Shape(
        lengths=tuple(rng.randint(200, 500) for _ in range(batch)),
        query_lens=tuple(rng.randint(1, 3) for _ in range(batch)),
        heads=rng.choice([4, 16]),
        kv_format=kv_format,
        page_size=rng.choice([1, 16, 64]),
        shared=tuple(shared[: rng.randint(0, 2)] for _ in range(batch)),
    )


def test_block_tables(seed: int) -> None:
    """Shared blocks are the same pages, everything else is distinct, within a pool and between pools."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = random_shape(rng)
    inputs = Inputs(shape, Arena(shape.kv_format, 512, 64, arena_tokens(shape, 3), "cpu"), pools=3)
    pages = [table[table >= 0] for table in inputs.block_tables]
    every = torch.cat([page.unique() for page in pages])
    assert len(every.unique()) == len(every)
    holders = [i for i, blocks in enumerate(shape.shared) if blocks]
    if len(holders) > 1:
        first, second = (inputs.block_tables[0, i, : 128 // shape.page_size] for i in holders[:2])
        assert torch.equal(first, second)
    assert len(pages[0].unique()) * shape.page_size >= shape.distinct_kv_bytes // shape.token_bytes
    assert shape.distinct_kv_bytes <= shape.kv_bytes


def test_measure_finds_right_results_right(seed: int) -> None:
    """ETAP and PyTorch on random shapes, ragged queries and shared pages among them, agree with the float64 reference."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(4):
        shape = random_shape(rng)
        inputs = Inputs(shape, Arena(shape.kv_format, 512, 64, arena_tokens(shape, 2), "cpu"), pools=2)
        result = measure(inputs, CpuTimer(), ceiling=HostCopy(), peer_names=["pytorch", "flashmla"], rounds=Rounds(2))
        assert result.wrong == [], (shape, result.worst_row_error)
        assert {"etap", "ceiling"} <= result.us.keys()
        assert all(us > 0 for us in result.us.values())
        assert ("pytorch" in result.us) == (shape.kv_format in ("bf16", "fp16"))
        assert result.skipped["flashmla"] == "takes CUDA tensors only"
        assert result.plan_us is not None


def test_measure_finds_wrong_results_wrong(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads one page too few, and one that gives NaN: both must be noticed."""
    from etap_bench import peers

    torch.manual_seed(seed)
    shape = Shape(lengths=(300, 200), query_lens=(1, 1), heads=4)
    inputs = Inputs(shape, Arena("bf16", 512, 64, arena_tokens(shape, 1), "cpu"), pools=1)
    short = Inputs(Shape(lengths=(236, 200), query_lens=(1, 1), heads=4), inputs.arena, pools=1)
    short.q, short.block_tables = inputs.q, inputs.block_tables

    def wrong(name: str, given: Inputs) -> object:
        if name == "fa3":
            return lambda pool: torch.full((2, 4, 512), torch.nan, dtype=torch.bfloat16)
        return real("pytorch", short if name == "flashmla" else given)

    real = peers.prepare
    monkeypatch.setattr(peers, "prepare", wrong)
    result = measure(inputs, CpuTimer(), ceiling=None, peer_names=["flashmla", "fa3", "pytorch"], rounds=Rounds(1))
    assert sorted(result.wrong) == ["fa3", "flashmla"]
