"""The CUDA device's planner, run on the host and compared with a model that lists every KV block of every unit."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


class PlanShape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("batch", "tiles", "tile_rows", "num_heads", "max_query_len", "workers", "cluster")),
        ("causal", ctypes.c_bool),
        ("chunks_log2", ctypes.c_int),
        ("topk", ctypes.c_int),
        ("singles", ctypes.c_int),
    ]


class Work(ctypes.Structure):
    _fields_ = [("blocks", ctypes.c_int64), *((name, ctypes.c_int) for name in ("units", "empty", "largest"))]


class WorkerRecord(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("unit_begin", "block_begin", "unit_end", "block_end", "begin_first", "begin_last", "end_last", "single")
    ] + [("numbers_log2", ctypes.c_int), ("_padding", ctypes.c_int * 3), ("first_sequence", ctypes.c_int * 4)]


@pytest.fixture(scope="module")
def planner(sm90_host: ctypes.CDLL) -> ctypes.CDLL:
    lib = sm90_host
    shape, ints, records = ctypes.POINTER(PlanShape), ctypes.POINTER(ctypes.c_int), ctypes.POINTER(WorkerRecord)
    work = ctypes.POINTER(Work)
    lib.shim_assign.argtypes = [shape, ints, ctypes.c_int64, records]
    lib.shim_assign.restype = ctypes.c_int64
    lib.shim_walks_agree.argtypes = [shape, ints, ctypes.c_int64]
    lib.shim_walks_agree.restype = ctypes.c_bool
    lib.shim_each_has_a_worker.argtypes = [shape, work]
    lib.shim_each_has_a_worker.restype = ctypes.c_bool
    lib.shim_cuts.argtypes = [shape, ints, ctypes.c_int64, ints]
    lib.shim_candidate_budget.argtypes = [shape, work, ctypes.c_int, ctypes.c_int]
    lib.shim_candidate_budget.restype = ctypes.c_int64
    lib.shim_cost_of_singles.argtypes = [shape, work, ctypes.c_int64, ctypes.c_int64]
    lib.shim_cost_of_singles.restype = ctypes.c_int64
    lib.shim_piece.argtypes = [records, ctypes.c_int, ctypes.c_int, ctypes.c_int, ints]
    lib.shim_chunk.argtypes = [ctypes.c_int] * 4 + [ints]
    lib.shim_chunk_records.argtypes = [shape, ints, ctypes.c_int, records]
    lib.shim_visible_tokens.argtypes = [ctypes.c_int] * 5 + [ctypes.c_bool]
    lib.shim_costs.argtypes = [ctypes.c_int, ints]
    return lib


@dataclass
class Piece:
    worker: int
    begin: int
    end: int
    first_worker: int
    last_worker: int
    slot: int


@dataclass
class Plan:
    """The outcome of the planner for one list of units."""

    cost: int
    candidates: list[int]
    even: int  # the first candidate's budget
    pieces: list[list[Piece]]  # of each unit, in the order of their workers
    cuts: list[tuple[int, int, int]]  # units that are merged: unit, first and last worker
    worker_costs: list[int]
    piece_cost: int
    min_piece: int
    split_cost: int


def shape_of(blocks: list[int], workers: int, cluster: int, singles: int = 0, chunks_log2: int = -1) -> PlanShape:
    return PlanShape(len(blocks), 1, 8, 8, 1, workers, cluster, True, chunks_log2, 0, singles)


def work_of(blocks: list[int]) -> Work:
    return Work(sum(blocks), sum(n > 0 for n in blocks), blocks.count(0), max(blocks))


def try_budgets(lib: Any, blocks: list[int], shape: PlanShape, count: int) -> tuple[list[int], list[int]]:
    """The candidates, and what each comes to."""
    budgets = [lib.shim_candidate_budget(shape, work_of(blocks), i, count) for i in range(count)]
    return budgets, [lib.shim_assign(shape, (ctypes.c_int * len(blocks))(*blocks), budget, None) for budget in budgets]


def make_plan(lib: Any, blocks: list[int], workers: int, cluster: int) -> Plan:
    """What the plan kernel does: tries every candidate budget, keeps the first of the cheapest, reads the records back."""
    shape = shape_of(blocks, workers, cluster)
    costs = (ctypes.c_int * 3)()
    lib.shim_costs(cluster, costs)
    piece_cost, min_piece, split_cost = costs
    counts = (ctypes.c_int * len(blocks))(*blocks)
    budgets, candidates = try_budgets(lib, blocks, shape, lib.shim_candidates())
    best = min(range(len(budgets)), key=candidates.__getitem__)
    records = (WorkerRecord * workers)()
    ctypes.memset(records, 0xA5, ctypes.sizeof(records))  # the workspace is not cleared between steps
    cost = lib.shim_assign(shape, counts, budgets[best], records)

    pieces: list[list[Piece]] = [[] for _ in blocks]
    worker_costs = []
    for worker, record in enumerate(records):
        used = 0
        for unit in range(record.unit_begin, record.unit_end + 1):
            out = (ctypes.c_int * 5)()
            lib.shim_piece(records, worker, unit, blocks[unit], out)
            pieces[unit].append(Piece(worker, *out))
            used += out[1] - out[0] + piece_cost if blocks[unit] else 1
        worker_costs.append(used)
    flat = (ctypes.c_int * (3 * workers))()
    cuts = [tuple(flat[3 * i : 3 * i + 3]) for i in range(lib.shim_cuts(shape, counts, budgets[best], flat))]
    return Plan(cost, candidates, budgets[0], pieces, cuts, worker_costs, piece_cost, min_piece, split_cost)


block_counts = st.one_of(
    st.integers(0, 4),
    st.integers(0, 300),
    st.sampled_from([0, 1, 2, 64, 1024, 16384]),
)
units = st.lists(block_counts, min_size=1, max_size=200)
clusters = st.sampled_from([1, 2, 4, 8])
workers = st.integers(1, 140)
many = settings(max_examples=400, deadline=None, print_blob=True)


@many
@given(blocks=units, workers=workers, cluster=clusters)
def test_every_block_is_computed_exactly_once(planner: Any, blocks: list[int], workers: int, cluster: int) -> None:
    """Guards against lost, repeated and reordered KV blocks, and against empty sequences whose rows nobody zeroes."""
    plan = make_plan(planner, blocks, workers, cluster)
    for unit, (total, pieces) in enumerate(zip(blocks, plan.pieces, strict=True)):
        assert pieces, f"unit {unit} belongs to no worker"
        ends = [0, *(piece.end for piece in pieces)]
        assert [piece.begin for piece in pieces] == ends[:-1], f"unit {unit}: a gap or an overlap in {pieces}"
        assert ends[-1] == total
        assert total == 0 or all(piece.end > piece.begin for piece in pieces), f"unit {unit}: an empty piece in {pieces}"
        assert total > 0 or len(pieces) == 1


@many
@given(blocks=units, workers=workers, cluster=clusters, candidate=st.integers(0, 31))
def test_long_units_end_where_steps_would(planner: Any, blocks: list[int], workers: int, cluster: int, candidate: int) -> None:
    """Guards the division that stands for the steps of a unit that fills many workers."""
    shape = shape_of(blocks, workers, cluster)
    budget = planner.shim_candidate_budget(shape, work_of(blocks), candidate, planner.shim_candidates())
    assert planner.shim_walks_agree(shape, (ctypes.c_int * len(blocks))(*blocks), budget)


@many
@given(
    blocks=st.one_of(units, st.tuples(st.integers(1, 140), st.integers(0, 300)).map(lambda pair: [pair[1]] * pair[0])),
    workers=workers,
    cluster=clusters,
    singles=st.booleans(),
)
def test_no_budget_beats_a_worker_for_each(planner: Any, blocks: list[int], workers: int, cluster: int, singles: bool) -> None:
    """Guards what the plan is spared: where each unit gets a worker of its own without a walk, none would have found anything better,
    nor would single CTAs."""
    plan, work = make_plan(planner, blocks, workers, cluster), work_of(blocks)
    shape = shape_of(blocks, workers, cluster, singles * workers * cluster)
    if planner.shim_each_has_a_worker(shape, work):
        cost = max(blocks) + plan.piece_cost if max(blocks) else 1
        assert len(blocks) <= workers
        assert plan.cost >= cost
        if singles:
            alone = shape_of(blocks, workers * cluster, 1)
            costs = [planner.shim_cost_of_singles(shape, work, c, b) for b, c in zip(*try_budgets(planner, blocks, alone, 16), strict=True)]
            assert min(costs) >= cost, (costs, cost)
    elif not singles:
        assert len(blocks) > workers or max(blocks) > plan.even - plan.piece_cost


@many
@given(blocks=units, workers=workers, cluster=clusters)
def test_partial_results_have_slots_of_their_own(planner: Any, blocks: list[int], workers: int, cluster: int) -> None:
    """Guards against two partial results in one slot, against a combine that waits for the wrong workers, and against slivers: a cut
    leaves at least the smallest piece on both sides."""
    plan = make_plan(planner, blocks, workers, cluster)
    taken: dict[int, tuple[int, int]] = {}
    for unit, pieces in enumerate(plan.pieces):
        sharing = [piece.worker for piece in pieces]
        assert sharing == list(range(sharing[0], sharing[-1] + 1))
        for piece in pieces:
            assert (piece.first_worker, piece.last_worker) == (sharing[0], sharing[-1]), f"unit {unit}: {pieces}"
            if len(pieces) > 1:
                assert piece.end - piece.begin >= plan.min_piece, f"unit {unit}: {pieces}"
                assert 0 <= piece.slot < 2 * workers
                assert piece.slot not in taken, f"slot {piece.slot}: {taken[piece.slot]} and {(unit, piece.worker)}"
                taken[piece.slot] = (unit, piece.worker)


@many
@given(blocks=units, workers=workers, cluster=clusters)
def test_cut_units_are_listed_once(planner: Any, blocks: list[int], workers: int, cluster: int) -> None:
    """Guards against rows that nobody merges, or that are merged twice, or from the wrong workers' pieces."""
    plan = make_plan(planner, blocks, workers, cluster)
    cut = [(unit, pieces[0].worker, pieces[-1].worker) for unit, pieces in enumerate(plan.pieces) if len(pieces) > 1]
    assert plan.cuts == cut


@many
@given(blocks=units, workers=workers, cluster=clusters)
def test_work_is_balanced(planner: Any, blocks: list[int], workers: int, cluster: int) -> None:
    """The reported cost is that of the records, no candidate was cheaper, and the longest worker exceeds an even share by no more than
    the fixed costs of two cuts and one step of the candidates."""
    plan = make_plan(planner, blocks, workers, cluster)
    cut = any(len(pieces) > 1 for pieces in plan.pieces)
    assert plan.cost == max(plan.worker_costs) + (plan.split_cost if cut else 0)
    assert plan.cost == min(plan.candidates)
    slack = 2 * (plan.piece_cost + plan.min_piece) + plan.split_cost + max(1, plan.even // 48)
    assert plan.cost <= plan.even + slack, f"{plan.cost} against an even share of {plan.even}; workers {plan.worker_costs}"


# ---- Batch-invariant mode: chunks -------------------------------------------------------------------------------------

MOST_BLOCKS = 2**25  # of a length below 2^31
chunked_counts = st.one_of(block_counts, st.integers(0, MOST_BLOCKS), st.sampled_from([8, 9, 128, 129, 512, 513, MOST_BLOCKS]))
chunked = st.lists(chunked_counts, min_size=1, max_size=200)
chunks_logs = st.integers(0, 5)


def chunks_of_unit(blocks: int, most: int) -> list[tuple[int, int]]:
    """As the model has them: of 8 blocks, of 16 from 128 blocks on, and of more where `most` chunks would not be enough."""
    size = max(-(-blocks // most), min(max(-(-blocks // 8), 8), 16))
    return [(begin, min(begin + size, blocks)) for begin in range(0, blocks, size)] or [(0, 0)]


@many
@given(blocks=chunked_counts, log2=chunks_logs, more=st.integers(0, 5), unit=st.integers(0, 2**20))
def test_chunks_depend_on_the_length_alone(planner: Any, blocks: int, log2: int, more: int, unit: int) -> None:
    """Guards batch invariance: where a unit is cut, that its chunks are all of it, that short ones are not merged, and who has a slot."""
    most = 1 << log2
    want = chunks_of_unit(blocks, most)
    assert len(want) <= most
    assert planner.shim_chunks(blocks, log2) == (len(want) if blocks else 0)
    numbers_log2 = min((len(want) - 1).bit_length() + more, log2)  # as many numbers as some other unit needs
    for chunk in range(1 << numbers_log2):
        out = (ctypes.c_int * 4)()
        planner.shim_chunk((unit << numbers_log2) + chunk, blocks, log2, numbers_log2, out)
        begin, end, slot, several = out
        if chunk < len(want):
            assert (begin, end) == want[chunk]
            assert slot == (unit << numbers_log2) + chunk
            assert several == (len(want) > 1) == (blocks > max(8, -(-blocks // most)))
        else:
            assert begin > 0 and begin >= end, "a chunk that the unit does not have is not empty"


@many
@given(blocks=chunked, workers=workers, log2=chunks_logs, threads=st.sampled_from([1, 2, 32, 512]))
def test_every_chunk_has_one_worker(planner: Any, blocks: list[int], workers: int, log2: int, threads: int) -> None:
    """Guards against chunks that are lost or computed twice, empty sequences that nobody zeroes, sums that overflow, and workers that
    are longer than an even share and one chunk."""
    shape, most = shape_of(blocks, workers, 1, chunks_log2=log2), 1 << log2
    records = (WorkerRecord * workers)()
    planner.shim_chunk_records(shape, (ctypes.c_int * len(blocks))(*blocks), threads, records)
    numbers = 1 << (max(len(chunks_of_unit(n, most)) for n in blocks) - 1).bit_length()
    want = {unit * numbers + c: end - begin for unit, n in enumerate(blocks) for c, (begin, end) in enumerate(chunks_of_unit(n, most))}
    assert all(1 << r.numbers_log2 == numbers for r in records)
    costs = {number: size + 7 if size else 1 for number, size in want.items()}
    assert sum(costs.values()) == sum(planner.shim_cost_of_chunks(n, log2) for n in blocks)
    walked = [[n for n in range(r.unit_begin, r.unit_end + 1) if n in want] for r in records]
    assert [number for share in walked for number in share] == list(want)
    assert all(share[-1] == r.unit_end for share, r in zip(walked, records, strict=True) if share), "a worker ends with empty chunks"
    if log2 == 0:  # which the kernels take for units like any other
        for worker, number in ((w, n) for w, share in enumerate(walked) for n in share):
            out = (ctypes.c_int * 5)()
            planner.shim_piece(records, worker, number, blocks[number], out)
            assert list(out[:4]) == [0, blocks[number], worker, worker]
    longest = max(sum(costs[number] for number in share) for share in walked)
    assert longest <= sum(costs.values()) / workers + max(costs.values())


@many
@given(
    length=st.one_of(st.integers(-3, 40), st.integers(0, 10**6)),
    q_len=st.integers(0, 9),
    heads=st.integers(1, 128),
    tile_rows=st.sampled_from(range(8, 72, 8)),
    causal=st.booleans(),
)
def test_a_tile_walks_the_tokens_its_rows_can_see(planner: Any, length: int, q_len: int, heads: int, tile_rows: int, causal: bool) -> None:
    """Guards against causal edges: query token i of n sees the first length - n + i + 1 tokens, and none when that is negative."""
    for tile in range(-(-9 * heads // tile_rows)):
        rows = range(tile * tile_rows, min((tile + 1) * tile_rows, q_len * heads))
        seen = [length - q_len + row // heads + 1 if causal else length for row in rows]
        expected = max([0, *seen]) if length > 0 else 0
        assert planner.shim_visible_tokens(length, q_len, tile, tile_rows, heads, causal) == expected
