"""Every case of the shared matrix and the shapes that only a GPU makes interesting, element by element against FP64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from cases import Case, make_inputs
from harness import SEED, Session, check_case, check_values_times, workers_are_single
from matrix import ALL, MODELS, PAGE_SIZES, TREE_MASKS
from promises import skip

import etap_py as etap

Supported = Callable[[Case], None]

MIXED = (3000, 17, 0, 700, 64, 1)  # cut sequences among whole and empty ones

# (heads, query tokens): every tile, full and padded, and several tiles
ROWS = [(8, 1), (3, 3), (12, 1), (12, 2), (5, 5), (16, 2), (13, 3), (40, 1), (11, 4), (16, 3), (7, 8), (56, 1), (16, 4), (9, 8)]
ROWS += [(64, 2), (100, 1), (128, 1), (128, 3), (63, 5)]
ROWS_E4M3 = [(8, 1), (16, 1), (20, 1), (16, 2), (5, 5), (10, 4), (48, 1), (16, 4), (96, 1), (128, 1)]

# the last block, and so a whole split of it, is masked for the first of 8 query tokens
CAUSAL_EDGES = (64 * 47 + 1, 64 * 20 + 3, 64 * 33 + 7, 64 * 10, 64 * 12 + 8, 7)

GPU_CASES = [
    *(Case(f"rows_{h}x{q}", heads=h, query_len=q, lens=MIXED) for h, q in ROWS),
    *(Case(f"rows_{h}x{q}_e4m3", heads=h, query_len=q, lens=MIXED, kv_format="e4m3") for h, q in ROWS_E4M3),
    *(Case(f"causal_edges_{h}x8", heads=h, query_len=8, lens=CAUSAL_EDGES) for h in (4, 16)),
    Case("causal_edges_one_split_a_block", heads=2, query_len=4, lens=(64 * 100 + 2,)),
    # long sequences: many splits, the most and one
    Case("one_of_64k", lens=(65536,)),
    Case("one_of_64k_e4m3", lens=(65536,), kv_format="e4m3"),
    Case("one_of_50001_page_1", lens=(50001,), page_size=1, heads=12),
    Case("two_of_20k_heads_128", lens=(20011, 19999), heads=128),
    # hung: PV, late for the last P, missed it because the sums were announced on the same barrier
    Case("late_for_the_last_p_64", lens=(12603,), heads=64),
    Case("late_for_the_last_p_96", lens=(8192,) * 4, heads=96),
    Case("long_one_sm", lens=(20000, 3), num_sms=1),
    Case("mixed_16", lens=(4096, 1, 130, 9000, 64, 0, 777, 2048, 63, 65, 12000, 5, 300, 128, 127, 129)),
    *(Case(f"sms_{n}", lens=MIXED, num_sms=n) for n in (2, 3, 7, 44, 131)),
    # wide batches
    Case("batch_300", batch=300, max_len=200, heads=8),
    Case("batch_1000_page_16", batch=1000, max_len=90, heads=2, page_size=16, pool_pages=200),
    Case("batch_65535", batch=65535, max_len=2, heads=1, page_size=16, pool_pages=64),
    Case("batch_65536", batch=65536, max_len=3, heads=1, page_size=16, pool_pages=64),
    # page sizes over several blocks, in each model's dimensions
    *(Case(f"page_{p}_{a}_{b}", page_size=p, d_latent=a, d_rope=b, lens=(1000, 1, p, 2 * p + 1)) for p in PAGE_SIZES for a, b in MODELS),
    *(Case(f"page_{p}_{f}", page_size=p, kv_format=f, lens=(1000, 1, p)) for p in (1, 8, 32, 256) for f in ("e4m3_group", "e4m3_656")),
]


@pytest.mark.parametrize("case", [*ALL, *GPU_CASES], ids=lambda case: case.name)
def test_case(case: Case, seed: int, supported: Supported) -> None:
    """Guards against the public ETAP kernel's defect: results that a cosine test over all elements accepts and that change from call to
    call, because P^T reached WGMMA without a proxy fence. Every element is compared, every call repeated with equal bits."""
    supported(case)
    check_case(case, seed, "cuda")


@pytest.mark.parametrize("kv_format", ["bf16", "e4m3", "e4m3_group", "e4m3_656"])
@pytest.mark.parametrize("heads", [8, 16, 24, 32, 48, 64])
def test_uneven_lengths_take_single_ctas(heads: int, kv_format: str, seed: int, supported: Supported) -> None:
    """Guards the CTAs of pairs as workers of their own, which add up a unit that was cut among them without another kernel."""
    rng = random.Random(seed)
    lens = [*(rng.randint(1500, 6000) for _ in range(rng.randint(57, 63))), 0, 1, 17]  # as many as leave most pairs a sequence
    case = Case("uneven", heads=heads, kv_format=kv_format, lens=tuple(rng.sample(lens, len(lens))), page_size=rng.choice([1, 64]))
    supported(case)
    check_case(case, seed, "cuda")
    session = Session(make_inputs(case, seed, "cuda"))
    session.update()
    assert etap.query(session.problem).cluster_size == 2
    assert workers_are_single(session)


@pytest.mark.parametrize("power", [-85, -30, 24, 60])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("heads", [8, 32, 64])
def test_values_of_any_size_travel_as_fp16(heads: int, batch_invariant: bool, power: int, seed: int, supported: Supported) -> None:
    """Guards partial results that travel as FP16 between kernels: values of V far outside of its range."""
    case = Case(f"times_2^{power}", heads=heads, lens=(9000, 65, 3000), batch_invariant=batch_invariant)
    supported(case)
    check_values_times(power, case, seed, "cuda", force_cluster=1)


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("heads", [8, 16, 24, 32, 64])
def test_forced_cluster(heads: int, cluster: int, seed: int, supported: Supported) -> None:
    """The dispatcher's alternatives must be right too: it may choose them on another GPU."""
    case = Case(f"cluster_{cluster}_heads_{heads}", heads=heads, lens=MIXED)
    supported(case)
    _check_forced(case, seed, force_cluster=cluster)


@pytest.mark.parametrize("tile", range(8, 72, 8))
def test_forced_tile(tile: int, seed: int, supported: Supported) -> None:
    """Tiles smaller than the rows (several tiles a sequence) and larger (padding), with causal edges inside a tile."""
    case = Case(f"tile_{tile}", heads=10, query_len=4, lens=MIXED)
    supported(case)
    _check_forced(case, seed, force_tile=tile)


def _check_forced(case: Case, seed: int, **forced: int) -> None:
    try:
        check_case(case, seed, "cuda", **forced)
    except etap.EtapUnsupported as refusal:
        skip(refusal, case, **forced)


def random_case(seed: int) -> Case:
    """Any problem of a few thousand tokens."""
    r = random.Random(seed)
    d_latent, d_rope = r.choice(MODELS)
    q_dtype = r.choice(["bf16", "bf16", "fp16"])
    formats = [q_dtype, q_dtype, "e4m3", "e4m3_group"] + ["e4m3_656"] * ((d_latent, d_rope) == (512, 64))
    kv_format = r.choice(formats)
    batch = r.choice([1, 2, 3, 5, 9, 40])
    longest = r.choice([5, 70, 400, 3000]) if batch < 40 else 300
    lens = tuple(r.choice([0, 1, r.randint(0, longest), r.randint(0, longest), longest]) for _ in range(batch))
    case = Case(
        name="random",
        lens=lens,
        heads=r.choice([r.randint(1, 24), r.randint(1, 128), 8, 12, 16]),
        page_size=r.choice(PAGE_SIZES),
        d_latent=d_latent,
        d_rope=d_rope,
        q_dtype=q_dtype,
        kv_format=kv_format,
        out_dtype=r.choice(["", "", "bf16", "fp16", "fp32"]),
        query_len=r.choice([1, 1, 1, 2, 3, 4, 7]),
        causal=r.random() < 0.8,
        batch_invariant=r.random() < 0.2,
        num_sms=r.choice([0, 0, 0, 1, 5, 44, 100]),
        lse_base=r.choice("e2"),
        empty_lse=r.choice((-math.inf, math.inf)),
        q_layout=r.choice(["split", "fused", "transposed"]) if d_rope else "split",
        strided=r.random() < 0.4,
        row_gap=r.choice([0, 0, 16, 64]),
        page_gap=r.choice([0, 0, 64, 4096]),
        kv_scale_on_device=kv_format in ("e4m3", "e4m3_group") and r.random() < 0.5,
    )
    if r.random() < 0.3:
        counts = tuple(r.randint(0, 5) for _ in lens)
        if max(counts) > 0:
            case = replace(case, query_lens=counts, spare_rows=r.choice([0, 3]))
    return replace(case, tree_mask=r.choice(TREE_MASKS)) if r.random() < 0.2 else case


@pytest.mark.parametrize("index", range(60))
def test_random_problem(index: int, supported: Supported) -> None:
    """Combinations that nobody thought of. The same index and ETAP_TEST_SEED give the same problem."""
    seed = (SEED + 104_729 * index) % 2**31
    case = random_case(seed)
    print(case, f"seed {seed}")
    supported(case)
    check_case(case, seed, "cuda")
