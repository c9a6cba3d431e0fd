"""The cases that every device must solve, in groups. Lengths of unnamed cases are drawn from the seed."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from cases import Case

MODELS = ((512, 64), (512, 0), (256, 64))

# heads that models have a GPU (tensor parallelism included), and others
HEADS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 63, 64, 80, 96, 127, 128)

PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

TREE_MASKS = ("tree", "random", "cycle", "none", "all", "chain")

TABLES = ("own", "common", "families", "twice", "middle")

KV_FORMATS = ("bf16", "e4m3", "e4m3_group", "e4m3_656")


def _lengths(page_size: int) -> tuple[int, ...]:
    edges = {1, 2, 7, page_size - 1, page_size, page_size + 1, 2 * page_size, 3 * page_size - 1}
    return (0, *sorted(edges - {0}), -1, 300)


def _formats() -> list[Case]:
    cases = []
    for d_latent, d_rope in MODELS:
        for q_dtype in ("bf16", "fp16"):
            for kv_format in (q_dtype, *KV_FORMATS[1:]):
                if kv_format == "e4m3_656" and (d_latent, d_rope) != (512, 64):
                    continue
                for out_dtype in ("bf16", "fp16", "fp32"):
                    name = f"{q_dtype}_{kv_format}_{out_dtype}_{d_latent}_{d_rope}"
                    cases.append(Case(name, q_dtype=q_dtype, kv_format=kv_format, out_dtype=out_dtype, d_latent=d_latent, d_rope=d_rope))
    return cases


MATRIX: dict[str, list[Case]] = {
    "format": _formats(),
    "heads": [
        *(Case(f"heads_{h}", heads=h, batch=3) for h in HEADS),
        *(Case(f"heads_{h}_e4m3", heads=h, batch=3, kv_format="e4m3") for h in (1, 12, 20, 32, 40, 64, 96, 128)),
    ],
    "length": [
        *(Case(f"edges_page_{p}", lens=_lengths(p), page_size=p) for p in PAGE_SIZES),
        *(Case(f"random_page_{p}_e4m3", page_size=p, batch=5, kv_format="e4m3") for p in (1, 16, 64, 256)),
        Case("one_token", lens=(1,)),
        Case("all_empty", lens=(0, 0, -5)),
        Case("one_long", lens=(9001,)),
        Case("one_long_among_short", lens=(3, 6007, 0, 64, 65, 1)),
        Case("many_short", batch=257, max_len=20, heads=4, page_size=16),
        Case("batch_invariant", lens=(1, 130, 0, 2500, 64), batch_invariant=True),
        Case("one_worker", num_sms=1),
    ],
    "query": [
        *(Case(f"tokens_{n}", query_len=n, heads=8, lens=(0, 1, n - 1, n, n + 1, 63 + n, 64, 65, 500)) for n in range(1, 9)),
        Case("tokens_3_heads_12", query_len=3, heads=12),
        Case("tokens_4_heads_128", query_len=4, heads=128, batch=2),
        Case("tokens_4_not_causal", query_len=4, causal=False, lens=(0, 2, 4, 5, 300)),
        Case("tokens_4_long", query_len=4, lens=(4099, 2, 2048)),
        # the last tokens, and so a whole piece of the sequence, are hidden from the first query tokens
        Case("causal_edges", query_len=8, heads=4, lens=(64 * 47 + 1, 64 * 20 + 3, 64 * 33 + 7, 64 * 10, 64 * 12 + 8, 7)),
        Case("tokens_2_e4m3", query_len=2, kv_format="e4m3"),
        Case("ragged", query_lens=(1, 4, 0, 2, 8, 1), lens=(70, 300, 64, 1, 513, 0)),
        Case("ragged_spare_rows", query_lens=(3, 1, 2), lens=(2, 129, 400), spare_rows=5),
        Case("ragged_not_causal", query_lens=(2, 5), lens=(200, 3), causal=False),
        Case("ragged_heads_20_page_1", query_lens=(2, 1, 3), lens=(90, 100, 33), heads=20, page_size=1),
    ],
    "tree": [
        *(Case(kind, tree_mask=kind, query_len=7, heads=8, lens=(0, 1, 6, 7, 8, 40, 70, 500)) for kind in TREE_MASKS),
        *(
            Case(f"drafts_{n}", tree_mask="random", query_len=n, heads=2, lens=(n - 1, n, n + 32, 300))
            for n in (1, 31, 32, 33, 64, 65, 256)
        ),
        *(Case(kind, tree_mask="tree", query_len=5, kv_format=kind, lens=(5, 64, 301)) for kind in KV_FORMATS[1:]),
        Case("fp16", tree_mask="tree", query_len=6, q_dtype="fp16", d_rope=0, lens=(3, 200)),
        Case("d_latent_256", tree_mask="random", query_len=6, d_latent=256, lens=(3, 200)),
        Case("heads_128", tree_mask="tree", query_len=4, heads=128, lens=(2, 90)),
        Case("long", tree_mask="tree", query_len=16, heads=4, lens=(64 * 47 + 1, 16, 64 * 20 + 3, 64 * 33 + 7)),
        Case("batch_invariant", tree_mask="tree", query_len=5, lens=(1, 130, 0, 2500), batch_invariant=True),
        Case("ragged", tree_mask="random", query_lens=(1, 40, 0, 2, 8, 1), lens=(70, 300, 64, 1, 513, 0), heads=4),
        Case("ragged_spare_rows", tree_mask="tree", query_lens=(3, 1, 9), lens=(2, 129, 400), spare_rows=5, lse_base="2"),
        Case("page_1_strided", tree_mask="random", query_len=9, heads=5, page_size=1, strided=True, row_gap=8, lens=(9, 33, 100)),
        Case("sees_nothing", tree_mask="none", query_len=8, lens=(3, 8, 9), empty_lse=math.inf),
    ],
    "layout": [
        Case("strided", strided=True),
        Case("strided_fused", strided=True, q_layout="fused"),
        Case("fused", q_layout="fused", query_len=2),
        Case("transposed", q_layout="transposed"),
        Case("strided_transposed_tokens", strided=True, q_layout="transposed", query_len=2),
        Case("row_gap", row_gap=64),
        Case("row_gap_page_1", row_gap=8, page_size=1),
        Case("page_gap", page_gap=3 * 64 * 576, strided=True),
        Case("row_and_page_gap_e4m3", row_gap=48, page_gap=4096, kv_format="e4m3"),
        Case("row_gap_e4m3_656", row_gap=112, kv_format="e4m3_656", strided=True),
        Case("strided_group_scales", kv_format="e4m3_group", strided=True, row_gap=16),
        Case("shared_pages", pool_pages=5, batch=40),
        Case("fp16_page_gap", q_dtype="fp16", page_gap=128, page_size=16),
    ],
    "content": [
        Case("one_hot", content="one_hot", lens=(200,) * 13),
        Case("one_hot_page_1", content="one_hot", lens=(67,) * 5, page_size=1),
        Case("one_hot_heads_64", content="one_hot", lens=(257,) * 5, heads=64),
        Case("one_hot_fp16", content="one_hot", lens=(130,) * 9, q_dtype="fp16"),
        Case("huge_logits", content="huge_logits"),
        Case("huge_logits_split", content="huge_logits", lens=(5000,)),
        Case("huge_logits_e4m3", content="huge_logits", kv_format="e4m3", kv_scale=0.5),
        Case("equal_logits", content="equal_logits"),
        Case("rope_dominant", content="rope"),
        Case("latent_dominant", content="latent"),
        Case("subnormal", content="subnormal", q_dtype="fp16"),
        Case("subnormal_bf16_kv", content="subnormal", q_dtype="fp16", kv_format="e4m3"),
        Case("saturated", content="saturated", kv_format="e4m3"),
        Case("saturated_group", content="saturated", kv_format="e4m3_group"),
        Case("zero_kv", content="zero_kv"),
        Case("zero_kv_e4m3", content="zero_kv", kv_format="e4m3"),
        Case("live_nan", content="live_nan", lens=(5, 300, 64)),
        Case("lse_base_2", lse_base="2"),
        Case("lse_base_2_split", lse_base="2", lens=(5000, 3)),
        Case("empty_lse", empty_lse=math.inf, lens=(0, 1, 5000, 0), query_len=3),
        Case("empty_lse_spare_rows", empty_lse=math.inf, lens=(0, 70), query_lens=(1, 2), spare_rows=3),
    ],
    "prefix": [
        *(Case(kind, tables=kind, heads=8, lens=(1500, 1403, 0, 1301, 1300, 2000, 70, 1409)) for kind in TABLES),
        *(Case(f"page_{p}", tables="families", page_size=p, lens=(2100, 1403, 1700, 2049, 1301)) for p in PAGE_SIZES),
        *(Case(f"common_{f}", tables="common", heads=4, kv_format=f, lens=(1500, 1403, 1500, 1301)) for f in KV_FORMATS[1:]),
        Case("fp16_256", tables="common", q_dtype="fp16", d_latent=256, heads=16, lens=(1280,) * 6),
        Case("no_rope_fp32", tables="common", d_rope=0, out_dtype="fp32", heads=16, lens=(1280,) * 6, lse_base="2"),
        Case("drafts_causal", tables="twice", query_len=5, heads=4, lens=(1280, 1283, 1345, 1345, 1600, 1282)),
        Case("drafts_not_causal", tables="twice", query_len=3, heads=8, lens=(1280, 1280, 1344, 1344), causal=False),
        Case("no_suffix", tables="twice", heads=16, lens=(1280, 1280, 1344, 1344)),
        Case("ragged", tables="common", query_lens=(1, 4, 0, 2, 8, 1), lens=(1500, 1500, 1500, 1403, 1600, 1300), heads=4, spare_rows=3),
        Case("strided", tables="families", strided=True, q_layout="transposed", row_gap=16, page_gap=64, lens=(1900,) * 6),
        Case("one_worker", tables="common", num_sms=1, lens=(1500,) * 3),
        Case("heads_64", tables="common", heads=64, lens=(1500,) * 3),
        Case("one_head", tables="common", heads=1, batch=70, lens=(400,) * 70, page_size=16),
        Case("batch_of_many", tables="common", heads=2, lens=(130,) * 513, page_size=16),
        Case("live_nan", tables="families", content="live_nan", lens=(1500, 1600, 1403, 2000)),
        Case("empty_lse", tables="twice", empty_lse=math.inf, query_len=3, heads=8, lens=(2, 0, 1400, 1400)),
    ],
    "scale": [
        Case("scale_negative", kv_format="e4m3", kv_scale=-0.05),
        Case("scale_on_device", kv_format="e4m3", kv_scale_on_device=True),
        Case("scale_zero_on_device", kv_format="e4m3", kv_scale=0.0, kv_scale_on_device=True),
        Case("scale_negative_on_device_group", kv_format="e4m3_group", kv_scale=-0.5, kv_scale_on_device=True),
        Case("far_scales_group", content="far_scales", kv_format="e4m3_group"),
        Case("far_scales_656", content="far_scales", kv_format="e4m3_656"),
        Case("scale_tiny", kv_format="e4m3", kv_scale=2.0**-20),
        Case("scale_large", kv_format="e4m3", kv_scale=512.0),
    ],
}

MATRIX["prefix"] = [replace(case, shared_prefixes=True) for case in MATRIX["prefix"]]
MATRIX["prefix"].append(
    Case("drafts_tree", tables="twice", query_len=5, tree_mask="tree", heads=4, lens=(1281, 1283, 1345, 1345), shared_prefixes=True)
)

ALL: list[Case] = [replace(case, name=f"{group}-{case.name}") for group, cases in MATRIX.items() for case in cases]


def random_case(seed: int) -> Case:
    """Any case of the contract, small enough for a fraction of a second."""
    rng = random.Random(seed)
    d_latent, d_rope = rng.choice(MODELS)
    q_dtype = rng.choice(("bf16", "fp16"))
    formats = [q_dtype, "e4m3", "e4m3_group"] + ["e4m3_656"] * ((d_latent, d_rope) == (512, 64))
    batch = rng.randint(1, 9)
    lens = tuple(rng.choice((0, 1, rng.randint(0, 100), rng.randint(0, 1500))) for _ in range(batch))
    ragged = rng.random() < 0.3
    counts = tuple(rng.randint(0, 5) for _ in range(batch)) if ragged else ()
    if not any(counts):
        counts = ()
    heads = rng.randint(1, 128)
    invariant = rng.random() < 0.3
    return Case(
        f"random_{seed}",
        lens=lens,
        heads=heads,
        page_size=rng.choice(PAGE_SIZES),
        d_latent=d_latent,
        d_rope=d_rope,
        q_dtype=q_dtype,
        kv_format=rng.choice(formats),
        out_dtype=rng.choice(("bf16", "fp16", "fp32")),
        query_len=1 if counts else rng.randint(1, 4 if heads < 40 else 2),
        query_lens=counts,
        spare_rows=rng.randint(0, 3) if counts else 0,
        causal=rng.random() < 0.7,
        tree_mask=rng.choice(TREE_MASKS) if rng.random() < 0.25 else "",
        batch_invariant=invariant,
        tables=rng.choice(TABLES),
        shared_prefixes=not invariant and rng.random() < 0.4,
        num_sms=rng.choice((0, 0, 1, 2)),
        lse_base=rng.choice(("e", "2")),
        empty_lse=rng.choice((-math.inf, math.inf)),
        q_layout=rng.choice(("split", "fused", "transposed")),
        strided=rng.random() < 0.5,
        row_gap=rng.choice((0, 16, 64)),
        page_gap=rng.choice((0, 64, 4096)),
        kv_scale_on_device=rng.random() < 0.5,
    )
