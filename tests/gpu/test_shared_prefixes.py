"""Prefixes that sequences share, on the CUDA device: random problems against FP64, the groups that the CPU device finds too, graphs, and
tables that lie. The matrix has more (test_decode.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import prefix_cases
import pytest
import torch
from cases import Case, check, make_inputs, reference
from harness import SEED, Session, capture, check_case, same_bits, solve
from matrix import MATRIX, TABLES

import etap_py as etap

Supported = Callable[[Case], None]


@pytest.mark.parametrize("index", range(60))
def test_random_problem(index: int, supported: Supported) -> None:
    """The same index and ETAP_TEST_SEED give the same problem."""
    seed = (SEED + 104_729 * index) % 2**31
    case = prefix_cases.drawn(seed)
    print(case, f"seed {seed}")
    supported(case)
    check_case(case, seed, "cuda")


@pytest.mark.parametrize("case", MATRIX["prefix"], ids=lambda case: case.name)
def test_on_few_sms(case: Case, seed: int, supported: Supported) -> None:
    """The matrix again (test_decode.py has it on the whole card, where batches as small as these share nothing)."""
    few = replace(case, num_sms=case.num_sms or 2)
    supported(few)
    check_case(few, seed, "cuda")


@pytest.mark.parametrize("batch", [2, 64, 128, 512])
@pytest.mark.parametrize("tables", TABLES)
def test_groups_are_those_of_the_cpu_device(tables: str, batch: int, seed: int) -> None:
    """Both have tiles of 64 rows, and one search, whether a thread or a CTA makes it. The card takes those that pay on it, so none of
    a small batch and some of a large one. On the emulator, where all do, they are the same."""
    for page_size in (1, 64):
        cpu, cuda = (prefix_cases.planned(device, tables, batch, page_size, seed) for device in ("cpu", "cuda"))
        assert cuda.groups <= cpu.groups, f"page_size {page_size}"
        assert cuda.tokens <= cpu.tokens, f"page_size {page_size}"
        assert cuda.groups == 0 or batch > 2
        assert cuda.groups > 0 or tables != "common" or batch < 512


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_many_sequences_of_one_prompt(heads: int, seed: int) -> None:
    """The case that it is made for, at its size: cut prefixes, cut suffixes, groups of all sizes."""
    batch = 40 if heads < 32 else 80  # pairs save less
    case = Case("prompt", tables="common", heads=heads, lens=(4500, *(4200 + 3 * b for b in range(batch))), shared_prefixes=True)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    solved = session.solve()
    check(inputs, *solved, reference(inputs))
    assert session.plan.shared().groups == batch * heads // 64
    assert all(map(same_bits, solved, session.solve()))


def test_nothing_in_common_changes_no_bits(seed: int) -> None:
    inputs = make_inputs(Case("own", heads=16, lens=(1500, 3, 0, 700, 3000), shared_prefixes=True), seed, "cuda")
    plain = replace(inputs, case=replace(inputs.case, shared_prefixes=False))
    assert all(same_bits(x, y) for x, y in zip(solve(inputs), solve(plain), strict=True))


@pytest.mark.parametrize("kv_format", ["bf16", "e4m3"])
@pytest.mark.parametrize("page_size", [1, 64])
def test_a_graph_follows_the_table(page_size: int, kv_format: str, seed: int) -> None:
    """Captured on tables that share nothing, replayed on others: groups form, change and vanish without the host."""
    case = Case(
        "graph", heads=16, lens=(6000,) * 8, page_size=page_size, num_sms=2, kv_format=kv_format, kv_scale=0.5, shared_prefixes=True
    )
    inputs = make_inputs(replace(case, tables="own"), seed, "cuda")
    session, (out, lse) = Session(inputs), inputs.outputs()
    session.step(out, lse)
    graph = capture(lambda: session.step(out, lse))
    own = inputs.block_table.clone()
    for tables in ("common", "families", "own", "twice", "middle", "common"):
        table = own.clone()
        if tables != "own":
            first = {"common": [0] * 8, "families": [0, 0, 0, 0, 4, 4, 4, 4], "twice": [0, 0, 2, 2, 4, 4, 6, 6], "middle": [0] * 8}[tables]
            begin, end = (1, None) if tables == "middle" else (0, 5800 // page_size)
            table[:, begin:end] = own[first, begin:end]
        inputs.block_table.copy_(table)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        check(inputs, out, lse, reference(inputs))
        # Two sequences alone don't pay with an FP8 cache, which tiles of 64 rows take twice as long for.
        pays = ("common", "families") if kv_format == "e4m3" else ("common", "families", "twice")
        assert (session.plan.shared().groups > 0) == (tables in pays)


def test_a_captured_stream_is_not_waited_for(seed: int) -> None:
    session = Session(make_inputs(Case("captured", heads=16, lens=(100, 100), shared_prefixes=True), seed, "cuda"))
    session.update()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(etap.EtapUnsupported, match="is being captured; allowed"):
        session.plan.shared()


def test_tables_that_lie(seed: int) -> None:
    prefix_cases.check_liars("cuda", seed)
