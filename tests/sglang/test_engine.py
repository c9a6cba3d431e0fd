"""Whole engines: greedy tokens and log-probabilities of `etap` against SGLang's own attention on the same checkpoint.

One engine a configuration. Each gets the same prompts in two rounds: many at once of very different lengths, then the
same prompts continued, whose beginnings the radix cache holds.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_lib.compare import compare
from demo_lib.model import ModelConfig
from harness import SEED
from rounding import largest_difference, near_tie

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = "triton" if DEVICE == "cuda" else "torch_native"
NEW_TOKENS = 12
# Ranks of decode context parallelism merge their results in a Triton kernel, and its interpreter takes half a second for each step.
NEW_TOKENS_OF_CONTEXT_PARALLELISM = 4
FP8 = {"kv_cache_dtype": "fp8_e4m3"}
DRAFT = {"speculative_eagle_topk": 1, "speculative_num_steps": 3, "speculative_num_draft_tokens": 4}
# All that is drafted is verified: 2 drafts, and twice the best 2 of the 4 that follow two of them. The accepted ones are not neighbours.
TREES = {"speculative_eagle_topk": 2, "speculative_num_steps": 3, "speculative_num_draft_tokens": 11}
# As models are served, more is drafted than verified.
WIDE_TREES = {"speculative_eagle_topk": 4, "speculative_num_steps": 3, "speculative_num_draft_tokens": 16}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "page 64": {},
    "page 1, no overlap": {"page_size": 1, "disable_overlap_schedule": True},
    "page 16, chunked prefill": {"page_size": 16, "chunked_prefill_size": 64},
    "page 32, mixed chunks, FP8 cache": {"page_size": 32, "chunked_prefill_size": 64, "enable_mixed_chunk": True, **FP8},
    # The model drafts for itself, so drafts are accepted; a random MTP layer's never are.
    "draft model": {**DRAFT, "speculative_algorithm": "STANDALONE"},
    "MTP layer": {**DRAFT, "speculative_algorithm": "EAGLE"},
    "draft model, trees": {**TREES, "speculative_algorithm": "STANDALONE"},
    **({"MTP layer, wide trees": {**WIDE_TREES, "speculative_algorithm": "EAGLE"}} if DEVICE == "cuda" else {}),
    "two ranks of tensor parallelism": {"tp_size": 2},
    "decode context parallelism, chunked prefill": {"tp_size": 2, "dcp_size": 2, "chunked_prefill_size": 64},
    "data-parallel attention": {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
    "decode only": {"prefill_attention_backend": NATIVE, "decode_attention_backend": "etap"},
}


def prompts() -> list[list[list[int]]]:
    """Two rounds of token ids, fresh in each run of the tests."""
    print(f"ETAP_TEST_SEED={SEED}")
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = ModelConfig().vocab_size

    def tokens(count: int) -> list[int]:
        return torch.randint(1, vocabulary, (count,), generator=generator).tolist()

    first = [tokens(count) for count in (1, 2, 15, 16, 17, 63, 64, 65, 130, 200)]
    return [first, [prompt + tokens(5) for prompt in first if len(prompt) > 128]]


@functools.cache
def without_draft_layer(checkpoint: Path) -> Path:
    """The same weights as a DeepSeek-V2 model: SGLang takes a V3 model that drafts for its MTP layer."""
    folder = checkpoint.with_name("without-draft-layer")
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= ModelConfig().hugging_face() | {name: config[name] for name in ("hidden_size", "qk_nope_head_dim", "v_head_dim")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Answers = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def answers(engines: Callable[[dict[str, Any]], dict[str, Any]], checkpoint: Path) -> Answers:
    """What an engine with this attention backend and these options answers to `prompts`."""
    return lambda backend, options: engines(job_of(checkpoint, backend, options))


def job_of(checkpoint: Path, backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """For engine.py."""
    arguments = {
        "model_path": str(checkpoint),
        "attention_backend": backend,
        "device": DEVICE,
        "mem_fraction_static": 0.3,
        "max_total_tokens": 16384,
        "enable_fp32_lm_head": True,
        "log_level": "warning",
        "random_seed": 1,
        **options,
    }
    if options.get("speculative_algorithm") == "STANDALONE":
        arguments["speculative_draft_model_path"] = str(without_draft_layer(checkpoint))
    environment = {}
    if DEVICE == "cpu" and "tp_size" in options:
        # The cores of each rank: SGLang wants to be told where there are more ranks than NUMA nodes.
        cores = sorted(os.sched_getaffinity(0))
        environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(options["tp_size"]))
    return {"engine": arguments, "environment": environment, "rounds": prompts(), "tokens": new_tokens(options)}


def new_tokens(options: dict[str, Any]) -> int:
    return NEW_TOKENS_OF_CONTEXT_PARALLELISM if DEVICE == "cpu" and "dcp_size" in options else NEW_TOKENS


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_tokens_of_native_attention(answers: Answers, name: str) -> None:
    """Guards every path between a request and a kernel: a wrong page, length or scale changes the tokens."""
    options = CONFIGURATIONS[name]
    if options.get("enable_dp_attention") and DEVICE == "cpu":
        pytest.skip("SGLang pins memory for it, which PyTorch can't without an accelerator")
    if DEVICE == "cuda" and torch.cuda.device_count() < options.get("tp_size", 1):
        pytest.skip(f"{options['tp_size']} ranks need as many GPUs")
    ours = answers("etap", options)
    fp8_cache = FP8.items() <= options.items()
    reference = answers(NATIVE, FP8 if fp8_cache else {})
    given, expected = [*chain(*ours["rounds"])], [*chain(*reference["rounds"])]
    expected = [wanted | {"output_ids": wanted["output_ids"][: new_tokens(options)]} for wanted in expected]
    limit = largest_difference(ModelConfig().num_layers, fp8_cache=fp8_cache, fp8_weights=NATIVE == "triton")
    results = [compare(answer, wanted, near_tie(limit)) for answer, wanted in zip(given, expected, strict=True)]
    assert all(result.agrees for result in results), [result for result in results if not result.agrees]
    furthest = max(result.largest_difference for result in results)
    print(f"{name}: log-probabilities differ by {furthest:.4f} at most, of {limit:.4f} that rounding allows")
    assert furthest < limit
    # An answer counts up to its first near tie, and random weights have many of these: 112 of 144 tokens were equal once, all
    # answers agreeing. Attention that is wrong by more than rounding loses nearly all.
    assert sum(result.equal for result in results) > 0.5 * sum(result.total for result in results)
    assert all(answer["meta_info"]["cached_tokens"] >= 64 for answer in ours["rounds"][1]), "no radix hit"
    if options.get("speculative_algorithm") == "STANDALONE":
        # SGLang gives a draft model the prompt without its first token, which short answers suffer from.
        long = [answer["meta_info"]["spec_accept_length"] for answer in given if answer["meta_info"]["prompt_tokens"] >= 63]
        assert sum(long) > 3 * len(long), f"a model that drafts for itself has its drafts accepted, up to 4 tokens a step: {long}"
    expect_calls(options, {call["step"]: call["calls"] for call in ours["etap"]})


def expect_calls(options: dict[str, Any], calls: dict[str, int]) -> None:
    """libetap served the steps that it is there for, and a call is one layer of one step."""
    expected = {"decode"}
    if algorithm := options.get("speculative_algorithm"):
        expected = {"verify", "draft", "draft_extend"}
    if DEVICE == "cpu" and "prefill_attention_backend" not in options:
        expected |= {"extend"}
    assert expected <= set(calls), calls
    targets = set(calls) & {"decode", "verify"} if algorithm == "EAGLE" else set(calls)
    assert all(calls[step] % ModelConfig().num_layers == 0 for step in targets), calls
