"""What the tests of this folder share. Imports no vLLM: a spawned process must start without it."""

from __future__ import annotations

from typing import Any

import torch
from cases import DTYPES, Case, Inputs
from etap_vllm import decode, shapes
from torch import Tensor

import etap_py as etap


def asked(**changes: Any) -> dict[str, Any]:
    """What vLLM asks of a backend before it makes a layer: a DeepSeek-V3 on an H100, but for the changes."""
    fits = {
        "head_size": 576,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": None,
        "use_mla": True,
        "has_sink": False,
        "use_sparse": False,
        "capability": (9, 0),
    }
    return fits | changes


def answer_with_name(member: Any, answers: Any) -> None:
    """In a spawned process: what has become of a pickled member of vLLM's enumeration of backends."""
    answers.put((member.name, member.get_path()))


MAX_BATCH = 8
MAX_QUERY_LEN = 4
# libetap's names to those of vLLM's --kv-cache-dtype
KV_CACHE_DTYPES = {"bf16": "auto", "fp16": "auto", "e4m3": "fp8", "e4m3_656": "fp8_ds_mla"}


def planner(case: Case, device: str = "cpu") -> decode.Planner:
    """What the metadata builder makes once."""
    problem = shapes.problem(
        num_heads=case.heads,
        kv_lora_rank=case.d_latent,
        qk_rope_head_dim=case.d_rope,
        dtype=DTYPES[case.q_dtype],
        kv_cache_dtype=KV_CACHE_DTYPES[case.kv],
        device=device,
        block_size=case.page_size,
        batch_invariant=case.batch_invariant,
    )
    return decode.Planner(problem, MAX_BATCH, MAX_QUERY_LEN)


def query_start_loc(case: Case) -> Tensor:
    counts = case.query_lens or (case.query_len,) * case.num_seqs
    return torch.tensor([0, *counts]).cumsum(0).int()


def plan(made_by: decode.Planner, case: Case, seq_lens: Tensor) -> etap.Plan | decode.EmptyPlan:
    """What the metadata builder does once a step."""
    step = made_by.plan(case.num_seqs, case.rows, case.max_query_len)
    decode.update(step, seq_lens, query_start_loc(case).to(seq_lens.device))
    return step


def attend(step: etap.Plan | decode.EmptyPlan, inputs: Inputs, *, return_lse: bool = True, **changes: Any) -> tuple[Tensor, Tensor | None]:
    """What a layer does. vLLM gives the layer's k_scale whatever the cache's type is."""
    rope = inputs.q_nope.new_empty((*inputs.q_nope.shape[:-1], 0)) if inputs.q_rope is None else inputs.q_rope
    k_scale = inputs.kv_scale if isinstance(inputs.kv_scale, Tensor) else inputs.cache_seqlens.new_ones((), dtype=torch.float32)
    given: dict[str, Any] = {"q": (inputs.q_nope, rope), "kv_cache": inputs.kv_cache, "block_table": inputs.block_table} | changes
    return decode.attend(step, **given, softmax_scale=inputs.softmax_scale, k_scale=k_scale, return_lse=return_lse)
