"""The CUDA kernels against FP64 where libetap is the emulator's: `test_emulator.py` runs this file in a process of its own."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import prefix_cases
import pytest
import sparse_cases
import torch
import tree_cases
from cases import INT_MAX, Case, check, make_inputs, reference
from harness import Session, check_values_times, same_bits, workers_are_single
from invariance import check_batch_invariance, select
from matrix import KV_FORMATS, TABLES, TREE_MASKS

import etap_py as etap

MIXED = (500, 65, 0, 1, 128)
CASES = [
    *(
        Case(f"rows_{h}x{q}", heads=h, query_len=q, lens=MIXED)
        for h, q in ((1, 1), (8, 1), (16, 1), (4, 4), (16, 2), (64, 1), (16, 4), (96, 1))
    ),
    Case("fp16", heads=16, lens=MIXED, q_dtype="fp16"),
    Case("causal", heads=4, query_len=4, lens=(300, 2, 64, 66), causal=True),
    Case("invariant", heads=16, lens=(700, 65), batch_invariant=True),
    *(Case(f"page_{p}_h{h}", heads=h, lens=(200, 65), page_size=p) for p in (1, 2, 16, 256) for h in (16, 64)),
    Case("no_rope", heads=16, lens=(300, 65), d_latent=512, d_rope=0),
    Case("latent_256", heads=16, lens=(300, 65), d_latent=256, d_rope=64),
    *(Case(f"{f}_page_{p}", heads=16, lens=MIXED, kv_format=f, page_size=p) for f in ("e4m3", "e4m3_group", "e4m3_656") for p in (1, 64)),
    Case("e4m3_h24", heads=24, lens=MIXED, kv_format="e4m3"),
    *(
        Case(f"{f}_page_{p}_h{h}", heads=h, lens=MIXED, kv_format=f, page_size=p, d_rope=0 if f == "e4m3_528" else 64)
        for f in ("e4m3", "e4m3_group", "e4m3_656", "e4m3_528")
        for p, h in ((1, 32), (64, 64), (128, 96), (16, 41))
    ),
    Case("e4m3_no_rope_h64", heads=64, lens=MIXED, kv_format="e4m3", d_rope=0),
    *(Case(f"e4m3_latent_256_h{h}", heads=h, lens=MIXED, kv_format="e4m3", d_latent=256) for h in (32, 64)),
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


UNEVEN = [
    *(Case(f"rows_{h}", heads=h, lens=()) for h in (8, 16, 64)),
    *(Case(f"page_1_h{h}", heads=h, page_size=1, lens=()) for h in (16, 64)),
    *(Case(f"{f}_h{h}", heads=h, kv_format=f, lens=()) for f in ("e4m3", "e4m3_group", "e4m3_656") for h in (16, 32, 64)),
    Case("drafts", heads=4, query_len=4, causal=True, lens=()),
    Case("latent_256", heads=16, d_latent=256, lens=()),
]


@pytest.mark.parametrize("case", UNEVEN, ids=lambda case: case.name)
def test_uneven_lengths_take_single_ctas(case: Case, seed: int) -> None:
    """The CTAs of pairs and threes as workers of their own, the last of which to arrive adds up a unit; and with the same plan pairs
    again, where the lengths are even."""
    rng = random.Random(seed)
    lens = (rng.randint(3900, 6000), *(rng.randint(1, 130) for _ in range(rng.randint(1, 2))))
    uneven = make_inputs(replace(case, lens=tuple(rng.sample(lens, len(lens)))), seed)
    session = Session(uneven)
    assert etap.query(session.problem).cluster_size > 1
    check(uneven, *session.solve(), reference(uneven))
    assert workers_are_single(session)
    even = make_inputs(replace(case, lens=(200,) * len(lens)), seed)
    session.inputs = even
    check(even, *session.solve(), reference(even))
    assert not workers_are_single(session)


@pytest.mark.parametrize("power", [-85, -30, 24, 60])
@pytest.mark.parametrize("lens", [(700, 65), (4000, 70)], ids=["cut", "one_is_long"])
@pytest.mark.parametrize("heads", [8, 64])
def test_values_of_any_size_travel_as_fp16(heads: int, lens: tuple[int, ...], power: int, seed: int) -> None:
    """Guards partial results that travel as FP16: values of V far outside of its range, in pieces that a kernel of its own merges and in
    those of which the last CTA to arrive does."""
    case = Case(f"times_2^{power}", heads=heads, lens=lens)
    check_values_times(power, case, seed, "cpu", force_cluster=1 if lens == (700, 65) else 0)


# One chunk, a token more, several with and without a rest, and eight of more than eight blocks.
CHUNKED = (513, 0, 1300, 512, 1, 4300)
INVARIANT = [
    *(Case(f"rows_{h}", heads=h, lens=CHUNKED) for h in (16, 64)),
    *(Case(f"page_1_h{h}", heads=h, page_size=1, lens=CHUNKED[:5]) for h in (16, 64)),
    *(Case(f"{f}_h{h}", heads=h, kv_format=f, lens=CHUNKED[:5]) for f in ("e4m3", "e4m3_group", "e4m3_656") for h in (16, 64)),
    *(Case(f"drafts_h{h}", heads=h, query_len=4, lens=(513, 514, 2, 1025)) for h in (4, 16)),
    *(Case(f"tree_h{h}", heads=h, query_len=5, tree_mask="random", lens=(513, 517, 2, 1025)) for h in (3, 12)),
    Case("not_causal", heads=4, query_len=4, causal=False, lens=(513, 2, 1025)),
    Case("ragged", heads=16, query_lens=(1, 4, 0, 2, 3), spare_rows=2, lens=(600, 514, 700, 3, 1100)),
    Case("tiles", heads=96, lens=(513, 700, 3)),
    *(Case(f"fp32_h{h}", heads=h, out_dtype="fp32", lens=CHUNKED[:5]) for h in (16, 64)),
    Case("fp16", heads=16, q_dtype="fp16", lens=CHUNKED[:5]),
    Case("latent_256", heads=16, d_latent=256, lens=CHUNKED[:5]),
]


@pytest.mark.parametrize("case", INVARIANT, ids=lambda case: case.name)
def test_batch_invariant_mode(case: Case, seed: int) -> None:
    """The chunks of a sequence are right, and its bits the same alone and in batches, on one SM and on all of them."""
    case = replace(case, batch_invariant=True)
    solve_and_check(case, seed, force_cluster=3)  # which is ignored
    check_batch_invariance(case, seed, "cpu")


@pytest.mark.parametrize(("query_len", "chunks"), [(6, 8), (65, 1)])
def test_prompts_in_batch_invariant_mode(query_len: int, chunks: int, seed: int) -> None:
    """Of many tiles, which are cut into fewer chunks, in the end into none: then units are whole, like those of other plans."""
    inputs = make_inputs(Case("prompts", heads=128, query_len=query_len, lens=(520, 3), batch_invariant=True), seed)
    session = Session(inputs)
    assert etap.query(session.problem).max_splits == chunks
    out, lse = session.solve()
    check(inputs, out, lse, reference(inputs))
    alone = Session(select(inputs, [0]), num_sms=1).solve()
    assert same_bits(out[:query_len], alone[0]) and same_bits(lse[:query_len], alone[1])


def test_more_units_than_fit_into_shared_memory(seed: int) -> None:
    """The plan of a large batch in batch-invariant mode: threads add up several units each, which they find in the workspace."""
    rng = random.Random(seed)
    long = rng.randrange(2700)
    inputs = make_inputs(Case("many", heads=1, lens=tuple(700 * (b == long) + b % 2 for b in range(2700)), batch_invariant=True), seed)
    session = Session(inputs, force_tile=16)
    out, lse = session.solve()
    check(inputs, out, lse, reference(inputs))
    alone = Session(select(inputs, [long]), force_tile=16).solve()
    assert same_bits(out[long : long + 1], alone[0]) and same_bits(lse[long : long + 1], alone[1])


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
def test_lengths_beyond_the_table(kv_format: str, page_size: int, heads: int, seed: int) -> None:
    """Guards against chunks of a sequence that is longer than its table, from which nothing may be read: they are NaN, and no others."""
    lens = (600, 1100, 64)
    inputs = make_inputs(Case("liar", heads=heads, lens=lens, kv_format=kv_format, page_size=page_size, batch_invariant=True), seed)
    session = Session(inputs)
    honest = session.solve()
    inputs.cache_seqlens[1] = INT_MAX
    for got, want in zip(session.solve(), honest, strict=True):
        assert got[1].isnan().all()
        assert same_bits(got[::2], want[::2])


@pytest.mark.parametrize("number", range(20))
def test_random_problems(number: int, seed: int) -> None:
    """Of the tiles that are built; clusters as the dispatch chooses, or forced."""
    rng = random.Random(seed)
    kv_format = rng.choice(["bf16", "bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656", "e4m3_528"])
    fp8 = kv_format.startswith("e4m3")
    heads, query_len = rng.choice(
        [(16, 1), (4, 4), (32, 1), (16, 3), (16, 4)] if fp8 else [(1, 1), (8, 1), (16, 1), (4, 4), (32, 1), (64, 1), (32, 2), (128, 1)]
    )
    widths = {"e4m3_group": (512, 64), "e4m3_656": (512, 64), "e4m3_528": (512, 0)}
    d_latent, d_rope = widths.get(kv_format) or rng.choice([(512, 64), (512, 0), (256, 64)])
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


COMMON = (1500, 1403, 0, 1301, 2000, 70, 1409)
PREFIX_CASES = [
    *(Case(f"{tables}_page_{p}", tables=tables, page_size=p, heads=16, lens=COMMON) for tables in TABLES for p in (1, 16, 64, 256)),
    *(
        Case(f"{f}_{tables}", tables=tables, heads=16, kv_format=f, lens=(1500, 1500, 1400))
        for f in KV_FORMATS[1:]
        for tables in TABLES[1:]
    ),
    *(
        Case(f"rows_{h}x{q}", tables="twice", heads=h, query_len=q, lens=(1282, 1282, 1345, 1400))
        for h, q in ((1, 1), (8, 1), (4, 4), (16, 2))
    ),
    *(
        Case(f"drafts_{f}", tables="twice", kv_format=f, heads=4, query_len=4, tree_mask="random", lens=(1281, 1283, 1345, 1345))
        for f in ("bf16", "e4m3_656")
    ),
    Case("not_causal", tables="twice", heads=4, query_len=4, lens=(1280, 1280, 1344, 1344), causal=False),
    Case("no_suffix", tables="twice", heads=16, lens=(1280, 1280, 1344, 1344)),
    Case("ragged", tables="common", heads=4, query_lens=(1, 4, 0, 2, 4, 1), lens=(1500, 1500, 1500, 1403, 1600, 1300), spare_rows=3),
    Case("fp16_256", tables="common", q_dtype="fp16", d_latent=256, heads=16, lens=(1280,) * 5, lse_base="2", out_dtype="fp32"),
    Case("strided", tables="families", strided=True, heads=8, row_gap=16, page_gap=64, lens=(1600,) * 4),
    Case("live_nan", tables="families", content="live_nan", heads=8, lens=(1500, 1600, 1403, 2000)),
]


@pytest.mark.parametrize("num_sms", [0, 2, 1])
@pytest.mark.parametrize("case", PREFIX_CASES, ids=lambda case: case.name)
def test_shared_prefixes(case: Case, num_sms: int, seed: int) -> None:
    """Prefixes and sequences as units of one plan: most of them cut, few, none. Twice, with other workers first: the same bits."""
    inputs = make_inputs(replace(case, shared_prefixes=True), seed)
    session = Session(inputs, num_sms=num_sms)
    solved = session.solve()
    check(inputs, *solved, reference(inputs))
    found = session.plan.shared()
    print(found)
    if case.tables in ("common", "twice"):
        assert found.groups > 0
    if num_sms == 2:
        assert all(map(same_bits, solved, session.solve()))


@pytest.mark.parametrize("cluster", [0, 2])
def test_groups_come_and_go(cluster: int, seed: int) -> None:
    """Guards against work of an earlier step that either kernel, or the merge, finds in the workspace: tables change between steps."""
    rng = random.Random(seed)
    case = Case("steps", tables="own", heads=16, lens=tuple(rng.randint(1300, 1500) for _ in range(6)), shared_prefixes=True)
    inputs = make_inputs(case, seed)
    session, (out, lse) = Session(inputs, force_cluster=cluster), inputs.outputs()
    own = inputs.block_table.clone()
    for first in ([0] * 6, None, [0, 0, 2, 2, 2, 5], [0, 1, 1, 1, 1, 0], None, [0] * 6):
        inputs.block_table.copy_(own)
        if first is not None:
            inputs.block_table[:, :19] = own[first, :19]
        out.fill_(math.nan)
        lse.fill_(math.nan)
        session.update()
        session.run(out, lse)
        check(inputs, out, lse, reference(inputs))
        assert (session.plan.shared().groups > 0) == (first is not None)


@pytest.mark.parametrize(("count", "groups"), [(8, 2), (4, 0)])
def test_groups_only_where_they_pay(count: int, groups: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the card's costs: half the batch saves less than the merge costs, and then no bits change."""
    monkeypatch.setenv("ETAP_EMULATOR_COSTS", "1")
    inputs = make_inputs(Case("few", tables="common", heads=16, lens=(1400,) * count, shared_prefixes=True), seed)
    session = Session(inputs)
    solved = session.solve()
    check(inputs, *solved, reference(inputs))
    assert session.plan.shared().groups == groups
    plain = replace(inputs, case=replace(inputs.case, shared_prefixes=False))
    assert all(map(same_bits, solved, Session(plain).solve())) == (groups == 0)


@pytest.mark.parametrize("number", range(12))
def test_random_prefixes(number: int, seed: int) -> None:
    rng = random.Random(seed)  # of the tiles that are built
    fields = {"heads": rng.choice([1, 2, 4, 8, 16]), "kv_format": "bf16"}
    if number % 3 == 0:
        fields = {"heads": 16, "kv_format": rng.choice(KV_FORMATS[1:]), "query_len": 1, "query_lens": (), "spare_rows": 0}
    solve_and_check(prefix_cases.drawn(seed, **fields), seed)


@pytest.mark.parametrize("heads", [4, 8])  # whose kernel merges pieces by itself, and in a kernel of its own
@pytest.mark.parametrize("out_dtype", ["", "fp32"])
@pytest.mark.parametrize("cluster", [1, 2])
def test_nothing_in_common_changes_no_bits(cluster: int, out_dtype: str, heads: int, seed: int) -> None:
    case = Case("own", heads=heads, query_lens=(2, 1, 0, 4, 1), spare_rows=2, lens=(500, 3, 0, 700, 65), out_dtype=out_dtype)
    inputs = make_inputs(case, seed)
    sharing = replace(inputs, case=replace(case, shared_prefixes=True))
    got, want = (Session(each, force_cluster=cluster).solve() for each in (sharing, inputs))
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize("empty_lse", [-math.inf, math.inf])
def test_rows_that_see_nothing(empty_lse: float, seed: int) -> None:
    case = Case("empty", tables="common", heads=8, lens=(1500, 0, 1400, 0), empty_lse=empty_lse, shared_prefixes=True)
    solve_and_check(case, seed)


def test_tables_that_lie(seed: int) -> None:
    prefix_cases.check_liars("cpu", seed)


TREE_TILES = {"bf16": (8, 16, 40, 64), "e4m3": (16, 24, 32, 48, 64), "e4m3_528": (32, 64)}  # of the other formats as of their kin


def tiles_of(kv_format: str) -> tuple[int, ...]:
    return TREE_TILES.get(kv_format) or TREE_TILES["e4m3" if kv_format.startswith("e4m3") else "bf16"]


@pytest.mark.parametrize("kind", TREE_MASKS)
@pytest.mark.parametrize(("kv_format", "tile"), [(f, tile) for f in tree_cases.FORMATS for tile in tiles_of(f)])
def test_trees(kv_format: str, tile: int, kind: str, seed: int) -> None:
    """Drafts before a block's end, across it, of three blocks, and of sequences that are shorter than their drafts."""
    rng = random.Random(seed)
    drafts = rng.choice([5, 34, 70])
    case = Case(
        "trees",
        tree_mask=kind,
        heads=rng.choice([1, 2, 3]),
        query_len=drafts,
        lens=(rng.randint(1, drafts), 64, 64 + rng.randint(1, drafts), rng.randint(130, 300), 0),
        kv_format=kv_format,
        q_dtype="fp16" if kv_format == "fp16" else "bf16",
        d_rope=0 if kv_format == "e4m3_528" else 64,
        page_size=rng.choice([1, 16, 64]),
        strided=rng.random() < 0.5,
    )
    print(case)
    solve_and_check(case, seed, force_tile=tile, force_cluster=rng.choice([1, 2]))


@pytest.mark.parametrize("number", range(40))
def test_random_trees(number: int, seed: int) -> None:
    rng = random.Random(seed)
    case = tree_cases.drawn(seed)
    cluster = 0 if case.batch_invariant else rng.choice([0, 1, 2, 3])
    solve_and_check(case, seed, force_tile=rng.choice(tiles_of(case.kv)), force_cluster=cluster)


@pytest.mark.parametrize(("kind", "causal"), tree_cases.NAMED)
@pytest.mark.parametrize(("kv_format", "tile"), [("bf16", 16), ("bf16", 40), ("bf16", 64), ("e4m3_group", 24), ("e4m3", 64)])
def test_trees_that_have_a_name(kv_format: str, tile: int, kind: str, causal: bool, seed: int) -> None:
    tree_cases.check_named(kind, causal, tile, kv_format, "cpu", seed)


def test_a_plan_takes_other_masks(seed: int) -> None:
    inputs = make_inputs(tree_cases.drawn(seed, kv_format="bf16", q_dtype="bf16"), seed)
    session = Session(inputs, force_tile=16)
    session.solve()
    other = tree_cases.other_masks(inputs, seed + 1)
    out, lse = inputs.outputs()
    session.run(out, lse, tree_mask=other.tree_mask)
    check(other, out, lse, reference(other))


@pytest.mark.parametrize("cluster", [1, 2])
def test_dims_of_v_shared_out(cluster: int, seed: int) -> None:
    """Tiles of 33 to 56 rows, which cards with slow tensor cores take."""
    solve_and_check(Case("dv", heads=40, lens=(500, 300)), seed, force_cluster=cluster, force_tile=40)


def test_a_piece_of_one_block(seed: int) -> None:
    """dv_split put the sums of a piece where a warp that is late by a whole softmax still read the last block's maxima."""
    for n in range(10):
        solve_and_check(Case("dv_short", heads=40, lens=(64, 65)), seed + n, force_cluster=2, force_tile=40)


@pytest.mark.parametrize("number", range(24))
def test_lists_of_slots(number: int, seed: int) -> None:
    """Sparse attention: holes anywhere, tokens twice, counts, pools of any page size with and without gaps."""
    rng = random.Random(seed)
    kv_format = rng.choice(["bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656", "e4m3_528"])
    heads = rng.choice([16, 64, 128] if kv_format.startswith("e4m3") else [1, 8, 16, 64, 128])
    case = sparse_cases.drawn(rng, kv_format=kv_format, heads=heads)
    if kv_format in ("e4m3_group", "e4m3_656", "e4m3_528"):
        case = replace(case, d_latent=512, d_rope=0 if kv_format == "e4m3_528" else 64)
    inputs = make_inputs(case, seed)
    topk = rng.choice([1, 7, 64, 100, 130])
    slots = sparse_cases.lists(rng, inputs, topk)
    counts = None if rng.random() < 0.5 else torch.tensor([rng.randint(0, topk) for _ in range(case.rows)], dtype=torch.int32)
    solved = sparse_cases.solve(inputs, slots, counts, force_cluster=rng.choice([1, 2]))
    check(inputs, *solved, sparse_cases.reference(inputs, slots, counts))


@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("kv_format", ["bf16", "e4m3", "e4m3_656"])
def test_lists_in_batch_invariant_mode(kv_format: str, heads: int, seed: int) -> None:
    """A list of several chunks alone, on another number of SMs: the bits that it has in the batch."""
    rng = random.Random(seed)
    fields = {"kv_format": kv_format, "heads": heads, "d_latent": 512, "d_rope": 64, "lens": (90, 70, 5, 80)}
    inputs = make_inputs(sparse_cases.drawn(rng, **fields), seed)
    slots = sparse_cases.lists(rng, inputs, 1100)
    counts = torch.tensor([1100, 513, 512, rng.randint(0, 1100)], dtype=torch.int32)
    out, lse = sparse_cases.solve(inputs, slots, counts, batch_invariant=True)
    check(inputs, out, lse, sparse_cases.reference(inputs, slots, counts))
    for row in range(4):
        alone = sparse_cases.solve(
            select(inputs, [row]), slots[row : row + 1], counts[row : row + 1], batch_invariant=True, num_sms=rng.choice([1, 2, 6])
        )
        assert same_bits(out[row : row + 1], alone[0]) and same_bits(lse[row : row + 1], alone[1])
