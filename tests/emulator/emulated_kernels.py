"""The CUDA kernels against FP64 where libetap is the emulator's: `test_emulator.py` runs this file in a process of its own."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import sparse_cases
import torch
from cases import Case, check, make_inputs, reference
from harness import Session, same_bits

import etap_py as etap

MIXED = (500, 65, 0, 1, 128)
CASES = [
    *(Case(f"rows_{h}x{q}", heads=h, query_len=q, lens=MIXED) for h, q in ((1, 1), (8, 1), (16, 1), (4, 4), (64, 1), (16, 4), (96, 1))),
    Case("fp16", heads=16, lens=MIXED, q_dtype="fp16"),
    Case("causal", heads=4, query_len=4, lens=(300, 2, 64, 66), causal=True),
    Case("invariant", heads=16, lens=(700, 65), batch_invariant=True),
    *(Case(f"page_{p}_h{h}", heads=h, lens=(200, 65), page_size=p) for p in (1, 2, 16, 256) for h in (16, 64)),
    Case("no_rope", heads=16, lens=(300, 65), d_latent=512, d_rope=0),
    Case("latent_256", heads=16, lens=(300, 65), d_latent=256, d_rope=64),
    *(Case(f"{f}_page_{p}", heads=16, lens=MIXED, kv_format=f, page_size=p) for f in ("e4m3", "e4m3_group", "e4m3_656") for p in (1, 64)),
    *(Case(f"{f}_h32", heads=32, lens=MIXED, kv_format=f) for f in ("e4m3", "e4m3_group", "e4m3_656")),
    Case("strided", heads=16, lens=MIXED, strided=True, row_gap=16, page_gap=64),
]


def solve_and_check(case: Case, seed: int, **forced: int) -> None:
    inputs = make_inputs(case, seed)
    session = Session(inputs, **forced)
    assert "sm90" in etap.query(session.problem).kernel
    check(inputs, *session.solve(), reference(inputs))


@pytest.mark.parametrize("cluster", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_fp64(case: Case, cluster: int, seed: int) -> None:
    solve_and_check(case, seed, force_cluster=cluster)


@pytest.mark.parametrize("cluster", [2, 4, 6, 8])
@pytest.mark.parametrize(
    "case",
    [
        *(Case(f"rows_{h}x{q}", heads=h, query_len=q, lens=MIXED) for h, q in ((65, 1), (128, 1), (9, 8), (40, 1), (100, 3))),
        Case("cut", heads=128, lens=(1500,)),
        Case("causal", heads=32, query_len=4, lens=(300, 2, 64, 66), causal=True),
        Case("ragged", heads=48, query_lens=(1, 4, 0, 2), lens=(300, 130, 64, 700), spare_rows=2),
        Case("invariant", heads=128, lens=(700, 65), batch_invariant=True),
        *(Case(f"page_{p}", heads=96, lens=(200, 65), page_size=p) for p in (8, 32, 256)),
        *(Case(f"{a}_{b}", heads=128, lens=(300, 65), d_latent=a, d_rope=b, q_dtype="fp16") for a, b in ((512, 0), (256, 64))),
    ],
    ids=lambda case: case.name,
)
def test_pairs_of_ctas(case: Case, cluster: int, seed: int) -> None:
    """Guards: a copy into the neighbour's box before it is empty, a box that is announced for the wrong lap, a CTA that ends before its
    neighbour has given back its boxes."""
    solve_and_check(case, seed, force_cluster=cluster, force_tile=128)


@pytest.mark.parametrize(("heads", "tile"), [(16, 0), (64, 0), (128, 64), (128, 128)])
def test_pages_that_do_not_exist(heads: int, tile: int, seed: int) -> None:
    """The rows of a sequence that names one are NaN, all others have the bits that they have without it."""
    inputs = make_inputs(Case("no_page", heads=heads, lens=(300, 700, 64), page_size=32), seed)
    session = Session(inputs, force_tile=tile, force_cluster=2)
    honest = session.solve()
    check(inputs, *honest, reference(inputs))
    for sequence, column, page in ((0, 0, -1), (1, 21, len(inputs.kv_cache)), (2, 1, -(2**31))):
        table = inputs.block_table.clone()
        table[sequence, column] = page
        lying = inputs.outputs()
        session.run(*lying, block_table=table)
        others = [row for row in range(3) if row != sequence]
        for before, after in zip(honest, lying, strict=True):
            assert after[sequence].isnan().all()
            assert same_bits(before[others], after[others])


@pytest.mark.parametrize("number", range(20))
def test_random_problems(number: int, seed: int) -> None:
    """Of the tiles that are built; clusters as the dispatch chooses, or forced."""
    rng = random.Random(seed)
    kv_format = rng.choice(["bf16", "bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656"])
    fp8 = kv_format.startswith("e4m3")
    heads, query_len = rng.choice(
        [(16, 1), (4, 4), (32, 1), (16, 4)] if fp8 else [(1, 1), (8, 1), (16, 1), (4, 4), (64, 1), (32, 2), (128, 1)]
    )
    d_latent, d_rope = (512, 64) if kv_format in ("e4m3_group", "e4m3_656") else rng.choice([(512, 64), (512, 0), (256, 64)])
    case = Case(
        "random",
        heads=heads,
        query_len=query_len,
        lens=tuple(rng.choice([0, 1, 64, 65, 128, rng.randint(1, 70), rng.randint(60, 400)]) for _ in range(rng.randint(1, 4))),
        kv_format=kv_format,
        q_dtype="fp16" if kv_format == "fp16" else "bf16",
        d_latent=d_latent,
        d_rope=d_rope,
        page_size=rng.choice([1, 2, 8, 16, 64, 128]),
        causal=rng.random() < 0.5,
        batch_invariant=rng.random() < 0.2,
        strided=rng.random() < 0.3,
    )
    solve_and_check(case, seed, force_cluster=rng.choice([0, 1, 2, 3]))


@pytest.mark.parametrize("cluster", [1, 2])
def test_dims_of_v_shared_out(cluster: int, seed: int) -> None:
    """Tiles of 25 to 56 rows, which cards with slow tensor cores take."""
    solve_and_check(Case("dv", heads=40, lens=(500, 300)), seed, force_cluster=cluster, force_tile=40)


def test_a_piece_of_one_block(seed: int) -> None:
    """dv_split put the sums of a piece where a warp that is late by a whole softmax still read the last block's maxima."""
    for n in range(10):
        solve_and_check(Case("dv_short", heads=40, lens=(64, 65)), seed + n, force_cluster=2, force_tile=40)


@pytest.mark.parametrize("number", range(24))
def test_lists_of_slots(number: int, seed: int) -> None:
    """Sparse attention: holes anywhere, tokens twice, counts, pools of any page size with and without gaps."""
    rng = random.Random(seed)
    kv_format = rng.choice(["bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656"])
    heads = rng.choice([16, 64, 128] if kv_format.startswith("e4m3") else [1, 8, 16, 64, 128])
    case = sparse_cases.drawn(rng, kv_format=kv_format, heads=heads)
    if kv_format in ("e4m3_group", "e4m3_656"):
        case = replace(case, d_latent=512, d_rope=64)
    inputs = make_inputs(case, seed)
    topk = rng.choice([1, 7, 64, 100, 130])
    slots = sparse_cases.lists(rng, inputs, topk)
    counts = None if rng.random() < 0.5 else torch.tensor([rng.randint(0, topk) for _ in range(case.rows)], dtype=torch.int32)
    solved = sparse_cases.solve(inputs, slots, counts, force_cluster=rng.choice([1, 2]))
    check(inputs, *solved, sparse_cases.reference(inputs, slots, counts))
