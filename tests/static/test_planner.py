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
        *((name, ctypes.c_int) for name in ("batch", "groups", "group_rows", "num_heads", "max_query_len", "teams", "least_piece")),
        ("id", ctypes.c_uint32),
        ("causal", ctypes.c_bool),
        ("invariant", ctypes.c_bool),
    ]


class TeamRecord(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("unit_begin", "block_begin", "unit_end", "block_end", "begin_is_cut", "end_is_cut")),
        ("id", ctypes.c_uint32),
        ("reserved", ctypes.c_int),
        ("first_sequence", ctypes.c_int * 4),
    ]


@pytest.fixture(scope="module")
def planner(sm90_host: ctypes.CDLL) -> ctypes.CDLL:
    lib = sm90_host
    shape, ints, records = ctypes.POINTER(PlanShape), ctypes.POINTER(ctypes.c_int), ctypes.POINTER(TeamRecord)
    lib.shim_records.argtypes = [shape, ints, ctypes.c_int, records]
    lib.shim_records.restype = ctypes.c_int64
    lib.shim_last_team.argtypes = [shape, records, ints, ctypes.c_int]
    lib.shim_piece.argtypes = [records, *[ctypes.c_int] * 4, ctypes.c_bool, ints]
    lib.shim_visible_tokens.argtypes = [ctypes.c_int] * 5 + [ctypes.c_bool]
    lib.shim_slots.argtypes = lib.shim_most_merge_tasks.argtypes = [shape]
    lib.shim_slots.restype = lib.shim_most_merge_tasks.restype = ctypes.c_int64
    return lib


@dataclass
class Piece:
    team: int
    begin: int
    end: int
    slot: int


@dataclass
class Plan:
    """The outcome of one candidate for one list of units."""

    longest: int
    pieces: list[list[Piece]]  # of each unit, in the order of their teams
    team_costs: list[int]
    last_teams: dict[int, int]  # of the units that are cut, as their first team finds it


def make_plan(lib: Any, shape: PlanShape, blocks: list[int], candidate: int) -> Plan:
    """What the plan kernel does with one candidate, and a decode kernel with its records."""
    counts = (ctypes.c_int * len(blocks))(*blocks)
    records = (TeamRecord * shape.teams)()
    ctypes.memset(records, 0xA5, ctypes.sizeof(records))  # the workspace is not cleared between steps
    longest = lib.shim_records(shape, counts, candidate, records)
    piece_cost = lib.shim_piece_cost()

    pieces: list[list[Piece]] = [[] for _ in blocks]
    team_costs, last_teams = [], {}
    for team, record in enumerate(records):
        assert record.id == shape.id
        used, unit, begin = 0, record.unit_begin, record.block_begin
        while unit <= record.unit_end:
            out = (ctypes.c_int * 4)()
            lib.shim_piece(records, team, unit, begin, blocks[unit], shape.invariant, out)
            pieces[unit].append(Piece(team, out[0], out[1], out[3]))
            used += out[1] - out[0] + (piece_cost if begin in (0, record.block_begin) else 0) if blocks[unit] else 1
            more = out[1] < out[2]
            begin = out[1] if more else 0
            unit += not more
        team_costs.append(used)
        if record.unit_begin <= record.unit_end and record.block_end < blocks[record.unit_end]:
            begins_it = record.unit_begin < record.unit_end or record.block_begin == 0
            if begins_it:
                last_teams[record.unit_end] = lib.shim_last_team(shape, records, counts, team)
    return Plan(longest, pieces, team_costs, last_teams)


def shape_of(blocks: list[int], teams: int, least_piece: int = 1, invariant: bool = False) -> PlanShape:
    return PlanShape(len(blocks), 1, 8, 8, 1, teams, least_piece, 4711, True, invariant)


block_counts = st.one_of(
    st.integers(0, 4),
    st.integers(0, 300),
    st.sampled_from([0, 1, 2, 64, 1024, 16384, 2**24]),
)
units = st.lists(block_counts, min_size=1, max_size=200)
teams = st.integers(1, 140)
least_pieces = st.sampled_from([1, 2])
candidates = st.integers(0, 15)
many = settings(max_examples=400, deadline=None, print_blob=True)


@many
@given(blocks=units, teams=teams, least_piece=least_pieces, invariant=st.booleans(), candidate=candidates)
def test_every_block_is_computed_exactly_once(
    planner: Any, blocks: list[int], teams: int, least_piece: int, invariant: bool, candidate: int
) -> None:
    """Guards against lost, repeated and reordered KV blocks, and against empty sequences whose rows nobody zeroes."""
    assert planner.shim_candidates() == 16
    plan = make_plan(planner, shape_of(blocks, teams, least_piece, invariant), blocks, candidate)
    for unit, (total, pieces) in enumerate(zip(blocks, plan.pieces, strict=True)):
        assert pieces, f"unit {unit} belongs to no team"
        ends = [0, *(piece.end for piece in pieces)]
        assert [piece.begin for piece in pieces] == ends[:-1], f"unit {unit}: a gap or an overlap in {pieces}"
        assert ends[-1] == total
        assert total == 0 or all(piece.end > piece.begin for piece in pieces), f"unit {unit}: an empty piece in {pieces}"
        assert total > 0 or len(pieces) == 1


@many
@given(blocks=units, teams=teams, least_piece=least_pieces, candidate=candidates)
def test_partial_results_have_slots_that_the_merge_finds(
    planner: Any, blocks: list[int], teams: int, least_piece: int, candidate: int
) -> None:
    """Guards against two partial results in one slot, and against a merge that adds up other slots than the pieces wrote."""
    shape = shape_of(blocks, teams, least_piece)
    plan = make_plan(planner, shape, blocks, candidate)
    taken: set[int] = set()
    cut = {unit for unit, pieces in enumerate(plan.pieces) if len(pieces) > 1}
    assert cut == set(plan.last_teams)
    for unit, pieces in enumerate(plan.pieces):
        if unit not in cut:
            assert pieces[0].slot == -1
            continue
        first = pieces[0].team
        assert [piece.team for piece in pieces] == list(range(first, plan.last_teams[unit] + 1)), f"unit {unit}: {pieces}"
        # MergeTask: the first slot is the first team's, the others are the following teams' first ones.
        assert pieces[0].slot in (2 * first, 2 * first + 1)
        assert [piece.slot for piece in pieces[1:]] == [2 * piece.team for piece in pieces[1:]]
        slots = {piece.slot for piece in pieces}
        assert len(slots) == len(pieces) and not slots & taken and max(slots) < planner.shim_slots(shape)
        taken |= slots


@many
@given(blocks=units, teams=teams, candidate=candidates, rows=st.integers(1, 64), d_latent=st.sampled_from([256, 512]))
def test_merge_tasks_have_room(planner: Any, blocks: list[int], teams: int, candidate: int, rows: int, d_latent: int) -> None:
    """Guards against a list of tasks that grows out of its part of the workspace."""
    for invariant in (False, True):
        shape = shape_of(blocks, teams, invariant=invariant)
        shape.group_rows = rows
        plan = make_plan(planner, shape, blocks, candidate)
        parts = [planner.shim_parts(n) for n in blocks] if invariant else [len(pieces) for pieces in plan.pieces]
        tasks = sum(planner.shim_merge_tasks(n, rows, d_latent) for n in parts if n > 1)
        assert tasks <= planner.shim_most_merge_tasks(shape)


@many
@given(blocks=units, teams=teams, least_piece=least_pieces)
def test_work_is_balanced(planner: Any, blocks: list[int], teams: int, least_piece: int) -> None:
    """The reported cost is that of the records, and the longest share of the best candidate exceeds an even one by no more than the fixed
    costs of two pieces and the roundings of two ends."""
    shape = shape_of(blocks, teams, least_piece)
    plans = [make_plan(planner, shape, blocks, candidate) for candidate in range(planner.shim_candidates())]
    for plan in plans:
        assert plan.longest == max(plan.team_costs)
    piece_cost = planner.shim_piece_cost()
    total = sum(n + piece_cost if n else 1 for n in blocks)
    even = -(-total // teams)
    longest = min(plan.longest for plan in plans)
    assert longest <= even + 2 * piece_cost + 2 * (least_piece + 1) + 2, f"{longest} against {even}; {plans[0].team_costs}"


@many
@given(blocks=st.integers(1, 2**25), others=units, teams=teams, candidate=candidates, before=st.booleans())
def test_batch_invariant_parts(planner: Any, blocks: int, others: list[int], teams: int, candidate: int, before: bool) -> None:
    """How a sequence is cut must not depend on what else is in the batch, and each part has a slot of its own."""
    batch = [*others, blocks] if before else [blocks, *others]
    unit = len(others) if before else 0
    part, parts = planner.shim_part_blocks(blocks), planner.shim_parts(blocks)
    assert 1 <= parts <= 32 and parts == -(-blocks // part)
    plan = make_plan(planner, shape_of(batch, teams, invariant=True), batch, candidate)
    ends = [min((i + 1) * part, blocks) for i in range(parts)]
    assert [piece.end for piece in plan.pieces[unit]] == ends
    slots = [unit * 32 + i for i in range(parts)] if parts > 1 else [-1]
    assert [piece.slot for piece in plan.pieces[unit]] == slots


@many
@given(
    length=st.one_of(st.integers(-3, 40), st.integers(0, 10**6), st.sampled_from([2**31 - 1, 2**31 - 64])),
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
        expected = max([0, *seen]) if length > 0 and rows else 0
        assert planner.shim_visible_tokens(length, q_len, tile * tile_rows, tile_rows, heads, causal) == expected
