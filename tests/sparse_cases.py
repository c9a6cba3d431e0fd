"""Sparse attention: problems, lists of slots and a reference, for all devices."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from cases import Case, Expected, Inputs, dequantise
from harness import Guarded, poisoned_workspace, problem_of
from torch import Tensor

import etap_py as etap

FORMATS = ["bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656", "e4m3_528"]


def drawn(rng: random.Random, **fields: Any) -> Case:
    """A pool that some sequences fill; its query tokens, one a row, will choose among all of its live tokens."""
    kv_format = fields.pop("kv_format", None) or rng.choice(FORMATS)
    dims = {"e4m3_656": [(512, 64)], "e4m3_528": [(512, 0)]}.get(kv_format, [(512, 64), (512, 0), (256, 64)])
    d_latent, d_rope = rng.choice(dims)
    case = {
        "lens": tuple(rng.randint(0, 90) for _ in range(rng.randint(1, 9))),
        "heads": rng.choice([1, 4, 8, 16, 64, 128]),
        "page_size": rng.choice([1, 2, 16, 61, 64, 256, 576]),
        "d_latent": d_latent,
        "d_rope": d_rope,
        "q_dtype": "fp16" if kv_format == "fp16" else "bf16",
        "kv_format": kv_format,
        "out_dtype": rng.choice(["", "fp32"]),
        "causal": False,
        "strided": rng.random() < 0.5,
        "row_gap": rng.choice([0, 16]),
        "page_gap": rng.choice([0, 32]),
        "lse_base": rng.choice(["e", "2"]),
        "empty_lse": rng.choice([-math.inf, math.inf]),
        **fields,
    }
    return Case("sparse", **case)


def lists(rng: random.Random, inputs: Inputs, topk: int, duplicates: bool = True) -> Tensor:
    """[rows, topk], with holes anywhere, tokens of any sequence, and the same one twice."""
    case = inputs.case
    live = [
        int(inputs.block_table[b, t // case.page_size]) * case.page_size + t % case.page_size
        for b, length in enumerate(inputs.cache_seqlens.tolist())
        for t in range(length)
    ]
    slots = torch.full((case.rows, topk), -1, dtype=torch.int32)
    for row in slots:
        count = rng.choice([0, 1, rng.randint(0, topk), topk]) if live else 0
        chosen = rng.choices(live, k=count) if duplicates else rng.sample(live, min(count, len(live)))
        places = rng.sample(range(topk), len(chosen))
        row[places] = torch.tensor(chosen, dtype=torch.int32)
    return slots


def reference(inputs: Inputs, slots: Tensor, counts: Tensor | None) -> Expected:
    """As etap.h defines it, in FP64."""
    case = inputs.case
    q = inputs.q_nope if inputs.q_rope is None else torch.cat([inputs.q_nope, inputs.q_rope], -1)
    out = torch.zeros(case.rows, case.heads, case.d_latent, dtype=torch.float64)
    lse = torch.full((case.rows, case.heads), -math.inf, dtype=torch.float64)
    size = torch.zeros_like(lse)
    values = []
    for row in range(case.rows):
        mine = slots[row, : slots.shape[1] if counts is None else int(counts[row])].long()
        mine = mine[mine >= 0]
        if len(mine) == 0:
            continue
        kv = dequantise(inputs, mine // case.page_size, mine % case.page_size)
        values.append(kv[:, : case.d_latent])
        logits = q[row].double() @ kv.T * inputs.softmax_scale
        size[row] = (q[row].double().abs() @ kv.abs().T * abs(inputs.softmax_scale)).amax(-1)
        lse[row] = logits.logsumexp(-1)
        out[row] = (logits - lse[row, :, None]).exp() @ kv[:, : case.d_latent]
    if case.lse_base == "2":
        lse = lse / math.log(2)
    lse = torch.where(lse == -math.inf, case.empty_lse, lse)
    rms = float(torch.cat(values).square().mean().sqrt()) if values else 0.0
    return Expected(out, lse, size, rms)


def options(inputs: Inputs) -> dict[str, Any]:
    return {
        "softmax_scale": inputs.softmax_scale,
        "kv_scale": inputs.kv_scale,
        "kv_group_scales": inputs.kv_group_scales,
        "lse_base": inputs.case.lse_base,
        "empty_lse": inputs.case.empty_lse,
    }


def solve(inputs: Inputs, slots: Tensor, counts: Tensor | None, byte: int = 0xFF, **overrides: Any) -> tuple[Tensor, Tensor]:
    """By a plan, into poisoned outputs whose surroundings must stay as they were."""
    problem = problem_of(inputs.case, inputs.device, topk=slots.shape[-1], **overrides)
    plan = etap.Plan(problem, workspace=poisoned_workspace(problem, byte))
    plan.update(counts)
    out, lse = inputs.outputs()
    guards = Guarded(out), Guarded(lse)
    plan.run(inputs.q_nope, inputs.q_rope, inputs.kv_cache, None, slots=slots, out=out, lse=lse, **options(inputs))
    assert all(guard.untouched_outside() for guard in guards)
    return out, lse
