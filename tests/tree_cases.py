"""Drafts that are a tree: random cases of the SM90 kernels, on a GPU and on the emulator."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from cases import Case, Inputs, make_inputs
from harness import Session, same_bits
from matrix import KV_FORMATS, TREE_MASKS

FORMATS = ("bf16", "fp16", *KV_FORMATS[1:], "e4m3_528")
NAMED = [("chain", True), ("all", False)]
"""Masks that say what a flag does, and causal."""


def drawn(seed: int, **fields: Any) -> Case:
    """Drafts that end a block, straddle two or fill several, and sequences that are shorter than their drafts."""
    rng = random.Random(seed)
    kv_format = rng.choice(FORMATS)
    widths = {"e4m3_group": (512, 64), "e4m3_656": (512, 64), "e4m3_528": (512, 0)}
    d_latent, d_rope = widths.get(kv_format) or rng.choice([(512, 64), (512, 0), (256, 64)])
    batch, most = rng.randint(1, 5), rng.choice([rng.randint(1, 8), rng.randint(1, 40), rng.randint(60, 100)])
    counts = tuple(rng.randint(0, most) for _ in range(batch))
    ragged = any(counts) and rng.random() < 0.5
    case = Case(
        "drawn",
        tree_mask=rng.choice(TREE_MASKS),
        heads=rng.choice([1, 2, 5, 16]),
        query_len=1 if ragged else most,
        query_lens=counts if ragged else (),
        spare_rows=rng.randint(0, 2) if ragged else 0,
        lens=tuple(rng.choice([rng.randint(0, most), rng.randint(60, 70), rng.randint(1, 400)]) for _ in range(batch)),
        kv_format=kv_format,
        q_dtype="fp16" if kv_format == "fp16" else "bf16",
        out_dtype=rng.choice(["", "fp32"]),
        d_latent=d_latent,
        d_rope=d_rope,
        page_size=rng.choice([1, 16, 64, 128]),
        batch_invariant=rng.random() < 0.2,
        strided=rng.random() < 0.3,
        lse_base=rng.choice("e2"),
        empty_lse=rng.choice([-math.inf, math.inf]),
    )
    case = replace(case, **fields)
    print(case)
    return case


def check_named(kind: str, causal: bool, tile: int, kv_format: str, device: str, seed: int) -> None:
    """The lower triangle is a causal mask, all bits are none: equal bits where a plan does not depend on what rows see."""
    case = Case("named", heads=2, query_len=35, lens=(300, 20, 35, 64, 90), kv_format=kv_format, tree_mask=kind, batch_invariant=True)
    inputs = make_inputs(case, seed, device)
    plain = replace(inputs, case=replace(case, tree_mask="", causal=causal), tree_mask=None)
    assert all(map(same_bits, *(Session(each, force_tile=tile).solve() for each in (inputs, plain))))


def other_masks(inputs: Inputs, seed: int) -> Inputs:
    """The same call with another random mask."""
    case = replace(inputs.case, tree_mask="random")
    return replace(inputs, tree_mask=make_inputs(case, seed, inputs.device).tree_mask)
