"""Drafts that are a tree, on the CUDA device: every tile and format against FP64, what named masks must equal, graphs whose masks change,
and NaN in drafts. The matrix has more (test_decode.py), compute-sanitizer sees the mask's end (sanitize.py)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import tree_cases
from cases import Case, check, make_inputs, reference
from harness import SEED, Session, capture, check_case, same_bits
from promises import skip

import etap_py as etap

Supported = Callable[[Case], None]
TILES = {"e4m3_528": (64,), **dict.fromkeys(("e4m3", "e4m3_group", "e4m3_656"), (8, 16, 24, 64))}


@pytest.mark.parametrize("index", range(60))
def test_random_problem(index: int, supported: Supported) -> None:
    """The same index and ETAP_TEST_SEED give the same problem."""
    seed = (SEED + 104_729 * index) % 2**31
    case = tree_cases.drawn(seed)
    print(f"seed {seed}")
    supported(case)
    check_case(case, seed, "cuda")


@pytest.mark.parametrize(("kv_format", "tile"), [(f, tile) for f in tree_cases.FORMATS for tile in TILES.get(f, range(8, 72, 8))])
@pytest.mark.parametrize("cluster", [0, 1, 4])
def test_every_kernel(kv_format: str, tile: int, cluster: int, seed: int) -> None:
    """Guards: one of the kernels, or one of its ways to copy, that masks another row or token than it should."""
    r = random.Random(seed)
    widths = {"d_latent": 512, "d_rope": 0 if kv_format == "e4m3_528" else 64}
    drafts = r.choice([7, 33, 70])
    case = tree_cases.drawn(
        seed,
        kv_format=kv_format,
        q_dtype="fp16" if kv_format == "fp16" else "bf16",
        query_len=drafts,
        query_lens=(),
        spare_rows=0,
        lens=(r.randint(1, drafts), 64, 64 + r.randint(1, drafts), r.randint(1000, 3000), 0),
        batch_invariant=False,
        **widths,
    )
    try:
        check_case(case, seed, "cuda", force_tile=tile, force_cluster=cluster)
    except etap.EtapUnsupported as refusal:
        skip(refusal, case, force_tile=tile, force_cluster=cluster)


@pytest.mark.parametrize(("kind", "causal"), tree_cases.NAMED)
@pytest.mark.parametrize("tile", [8, 16, 24, 32, 40, 48, 56, 64])
def test_masks_that_have_a_name(tile: int, kind: str, causal: bool, seed: int) -> None:
    tree_cases.check_named(kind, causal, tile, "bf16", "cuda", seed)


@pytest.mark.parametrize(("kind", "causal"), tree_cases.NAMED)
@pytest.mark.parametrize("tile", [8, 16, 24, 64])
@pytest.mark.parametrize("kv_format", ["e4m3", "e4m3_group", "e4m3_656"])
def test_masks_that_have_a_name_in_fp8(kv_format: str, tile: int, kind: str, causal: bool, seed: int) -> None:
    tree_cases.check_named(kind, causal, tile, kv_format, "cuda", seed)


@pytest.mark.parametrize("shared_prefixes", [False, True])
@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
@pytest.mark.parametrize("heads", [2, 16])
def test_a_graph_follows_the_mask(heads: int, kv_format: str, shared_prefixes: bool, seed: int) -> None:
    """Guards a mask, or a place in it, that is fixed when the graph is captured: captured on one, replayed with others."""
    drafts = 9 if heads == 2 else 2  # the rows of two sequences fit a tile
    lens = (1700, drafts, 1650, 1703, 64, 1)
    tables = "common" if shared_prefixes else "own"
    case = Case("graph", heads=heads, query_len=drafts, lens=lens, kv_format=kv_format, tree_mask="none", tables=tables)
    inputs = make_inputs(replace(case, shared_prefixes=shared_prefixes), seed, "cuda")
    session, (out, lse) = Session(inputs), inputs.outputs()
    session.step(out, lse)
    graph = capture(lambda: session.step(out, lse))
    assert inputs.tree_mask is not None
    for number in range(6):
        inputs.tree_mask.copy_(tree_cases.other_masks(inputs, seed + number).tree_mask)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        check(inputs, out, lse, reference(inputs))


@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
@pytest.mark.parametrize("tile", [16, 64])
def test_nan_in_drafts(tile: int, kv_format: str, seed: int) -> None:
    """A row that sees no token gets zeros whatever the drafts hold, and other sequences keep their bits."""
    case = Case("nan", heads=4, query_len=4, lens=(4, 300, 4), kv_format=kv_format, tree_mask="none", empty_lse=math.inf)
    inputs = make_inputs(case, seed, "cuda")
    out, lse = Session(inputs, force_tile=tile).solve()
    check(inputs, out, lse, reference(inputs))
    spoilt = make_inputs(case, seed, "cuda")
    page = int(spoilt.block_table[0, 0])
    kv = spoilt.kv_cache.view(torch.uint8) if kv_format == "e4m3" else spoilt.kv_cache
    kv[page, :4] = 0x7F if kv_format == "e4m3" else math.nan
    got = Session(spoilt, force_tile=tile).solve()
    assert all(map(same_bits, got, (out, lse)))
