"""Reading traces and workload files, and what is said about those that can't be used."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from etap_py.bench import workload
from etap_py.bench.errors import Refused
from etap_py.bench.traces import read_trace


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_ours(tmp_path: Path, seed: int) -> None:
    """Requests come in order of arrival, from 0 s on, and keep what they share; those without an answer are left out."""
    rng = random.Random(seed)
    lines = [
        {"arrival": rng.uniform(5, 50), "prompt_tokens": rng.randint(100, 9999), "answer_tokens": rng.randint(1, 99)} for _ in range(20)
    ]
    lines[3] |= {"prefix_id": "tools", "prefix_tokens": 90, "speculative_tokens": 3}
    text = "\n".join(json.dumps(line) for line in [*lines, {"arrival": 1, "prompt_tokens": 5, "answer_tokens": 0}]) + "\n\n"
    requests = read_trace(written(tmp_path, "t.jsonl", text))
    in_order = sorted(lines, key=lambda line: line["arrival"])
    assert [(r.prompt_tokens, r.answer_tokens) for r in requests] == [(x["prompt_tokens"], x["answer_tokens"]) for x in in_order]
    assert requests[0].arrival == 0
    assert requests[-1].arrival == pytest.approx(in_order[-1]["arrival"] - in_order[0]["arrival"])
    (sharing,) = (r for r in requests if r.blocks)
    assert sharing.blocks == (("tools", 90),)
    assert sharing.speculative_tokens == 3


def test_mooncake(tmp_path: Path) -> None:
    """Milliseconds, and blocks of 512 tokens of which a last, incomplete one is not shared."""
    text = (
        '{"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 4, 5]}\n'
        '{"timestamp": 4500, "input_length": 512, "output_length": 2, "hash_ids": [0]}\n'
    )
    first, second = read_trace(written(tmp_path, "t.jsonl", text))
    assert (first.arrival, second.arrival) == (0, 1.5)
    assert first.blocks == ((0, 512), (4, 512))
    assert second.blocks == ((0, 512),)


def test_azure(tmp_path: Path) -> None:
    """Dates with seven decimals (2023) and with a time zone (2024)."""
    old = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.4799600,396,109\n"
    new = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,374,44\n2024-05-10 00:00:00.509930+00:00,396,109\n"
    for text in (old, new):
        first, second = read_trace(written(tmp_path, "t.csv", text))
        assert (first.prompt_tokens, first.answer_tokens, second.answer_tokens) == (374, 44, 109)
        assert second.arrival == pytest.approx(0.5, abs=1e-6)


def test_burstgpt(tmp_path: Path) -> None:
    """A failed request, which has no answer, is left out."""
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,log\n45,GPT-4,87,0,87,log\n"
    (only,) = read_trace(written(tmp_path, "t.csv", text))
    assert (only.arrival, only.prompt_tokens, only.answer_tokens) == (0, 472, 18)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 5}', "line 1 of trace .*missing required field `answer_tokens`"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": -5, "answer_tokens": 1}', "line 1 .*-5.*expected `int` >= 0 .*prompt_tokens"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 5, "answer_tokens": 1}\n{"arrival": 1', "line 2 of trace"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 5, "answer_tokens": 1, "prefix_tokens": 6}', "prefix_tokens is 6; allowed: 0 to 5"),
        ("t.jsonl", '{"arrival": 0, "prompt_tokens": 5, "answer_tokens": 1, "colour": 6}', "unknown field `colour`"),
        ("t.jsonl", '{"begin": 0}', "has the fields begin; allowed: a format with 'arrival' or 'timestamp'"),
        ("t.jsonl", "[1, 2]", "line 1 of trace"),
        ("t.jsonl", "", "holds no request with an answer"),
        ("t.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03,5\n", "line 2 of trace .*GeneratedTokens"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,5,5\n", "line 2 of trace .*noon"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,5,-5\n", "line 2 of trace .*-5"),
        ("t.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,5,5,9\n", "line 2 of trace"),
        ("t.csv", "a,b\n1,2\n", "allowed: a format with 'TIMESTAMP' or 'Timestamp'"),
        ("t.parquet", "", "ends in '.parquet'; allowed: .jsonl or .csv"),
    ],
)
def test_bad_trace(tmp_path: Path, name: str, text: str, words: str) -> None:
    """One sentence, which names the line."""
    with pytest.raises(Refused, match=words) as refused:
        read_trace(written(tmp_path, name, text))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", workload.shipped())
def test_shipped_workloads(name: str) -> None:
    """Draw the same requests each time, others with another seed, and within their limits."""
    chosen = workload.load(name)
    requests = chosen.all_requests()
    assert requests == workload.load(name).all_requests()
    assert requests != workload.load(name, ["seed=99"]).all_requests()
    assert len(requests) == sum(kind.count for kind in chosen.requests)
    assert all(a.arrival <= b.arrival for a, b in pairwise(requests))
    most = max(kind.prefix_tokens + kind.prompt.most for kind in chosen.requests)
    assert all(1 <= r.prompt_tokens <= most for r in requests)


def test_the_workloads_the_issue_asks_for() -> None:
    assert workload.shipped() == ["agents", "chat", "long-documents"]
    long = [r for r in workload.load("long-documents").all_requests() if r.prompt_tokens == 65_536 and r.arrival == 0]
    assert len(long) == 16
    agents = workload.load("agents").all_requests()
    assert len({r.blocks for r in agents}) == 4
    assert {r.speculative_tokens for r in agents} == {3}


def test_workload_file_with_a_trace(tmp_path: Path) -> None:
    """The trace is looked for beside the file."""
    written(tmp_path, "t.jsonl", '{"arrival": 0, "prompt_tokens": 5, "answer_tokens": 1}')
    path = written(tmp_path, "mine.toml", 'trace = "t.jsonl"\n[model]\nheads = 8\n')
    chosen = workload.load(str(path), ["model.kv_format=e4m3", "scheduler.max_batch=3"])
    assert (chosen.name, chosen.model.heads, chosen.model.kv_format, chosen.scheduler.max_batch) == ("mine", 8, "e4m3", 3)
    assert len(chosen.all_requests()) == 1


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        ("chit-chat", [], "workload is 'chit-chat'; allowed: agents, chat, long-documents"),
        ("chat", ["model.heads=129"], "Expected `int` <= 128 - at `\\$.model.heads`"),
        ("chat", ["model.colour=1"], "unknown field `colour`"),
        ("chat", ["heads"], "setting is 'heads'; allowed: NAME=VALUE"),
        ("chat", ["seed.x=1"], "seed has no fields of its own"),
        ("chat", ["requests=[]"], "neither requests and a trace"),
        ("chat", ["trace=x.csv"], "both requests and a trace"),
    ],
)
def test_bad_workload(source: str, settings: list[str], words: str) -> None:
    with pytest.raises(Refused, match=words):
        workload.load(source, settings)
