"""Which sequences read a prefix together (shared_prefixes.h), run on the host and compared with brute force."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

CAUSAL, TREE_MASK = 1, 8
TILE = 64
BLOCK = 64
COST = 17  # blocks that a group must save
many = settings(max_examples=400, deadline=None, print_blob=True)


@dataclass
class Batch:
    page_size: int
    flags: int
    heads: int
    lengths: list[int]
    query_counts: list[int]
    table: list[list[int]]  # of equal columns


@dataclass
class Group:
    tokens: int
    members: list[int]


@pytest.fixture(scope="module")
def library(sm90_host: ctypes.CDLL) -> ctypes.CDLL:
    ints = ctypes.POINTER(ctypes.c_int)
    sm90_host.shim_find_groups.argtypes = [ctypes.c_int] * 4 + [ints, ints, ctypes.c_int, ints, ctypes.c_int, ints]
    return sm90_host


def find_groups(library: Any, batch: Batch) -> list[Group]:
    count, columns = len(batch.lengths), len(batch.table[0])
    groups = (ctypes.c_int * (count * (2 + TILE)))()
    flat = (ctypes.c_int * max(1, count * columns))(*(page for row in batch.table for page in row))
    lengths, counts = (ctypes.c_int * count)(*batch.lengths), (ctypes.c_int * count)(*batch.query_counts)
    found = library.shim_find_groups(count, batch.page_size, TILE, batch.flags, lengths, counts, batch.heads, flat, columns, groups)
    rows = [groups[i * (2 + TILE) : (i + 1) * (2 + TILE)] for i in range(found)]
    return [Group(row[0], row[2 : 2 + row[1]]) for row in rows]


def shareable(batch: Batch, b: int) -> int:
    """Tokens at the beginning that all query tokens of a sequence see and that its table holds."""
    length, count = batch.lengths[b], batch.query_counts[b]
    if count <= 0 or length > len(batch.table[b]) * batch.page_size:
        return 0
    unseen = count if batch.flags & TREE_MASK else count - 1 if batch.flags & CAUSAL else 0
    return max(0, length - unseen)


def common(batch: Batch, x: int, y: int) -> int:
    """Tokens with which both begin, whole pages and blocks."""
    pages = 0
    while pages < len(batch.table[x]) and batch.table[x][pages] == batch.table[y][pages]:
        pages += 1
    step = max(BLOCK, batch.page_size)
    return min(pages * batch.page_size, shareable(batch, x), shareable(batch, y)) // step * step


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Pages are unique or anything; lengths are right or not."""
    page_size = draw(st.sampled_from([1, 16, 64, 256]))
    columns = draw(st.integers(1, 40)) * max(1, 64 // page_size)
    count = draw(st.integers(1, 24))
    few = draw(st.booleans())
    fresh = iter(range(10**6, 10**8))
    table: list[list[int]] = []
    for b in range(count):
        row = [draw(st.integers(0, 1)) for _ in range(4)] + [0] * columns if few else [next(fresh) for _ in range(columns)]
        row = row[:columns]
        if b and draw(st.integers(0, 9)):
            other, begin = draw(st.integers(0, b - 1)), draw(st.sampled_from([0, 0, 0, 1, columns // 2]))
            end = draw(st.sampled_from([columns, draw(st.integers(0, columns))]))
            row[begin:end] = table[other][begin:end]
        table.append(row)
    lengths = st.one_of(st.integers(-1, columns * page_size), st.just(columns * page_size), st.just(columns * page_size + 1))
    return Batch(
        page_size=page_size,
        flags=draw(st.sampled_from([0, CAUSAL, TREE_MASK])),
        heads=draw(st.sampled_from([1, 4, 8, 12, 16, 40])),
        lengths=[draw(lengths) for _ in range(count)],
        query_counts=[draw(st.sampled_from([1, 1, 1, 0, 2, 5, 70])) for _ in range(count)],
        table=table,
    )


@many
@given(batch=batches())
def test_groups_share_what_they_say(library: Any, batch: Batch) -> None:
    """Whatever the tables are: every member begins with those tokens and sees them, rows fit a tile, no sequence is in two groups, and the
    group saves more than it costs."""
    taken: set[int] = set()
    for group in find_groups(library, batch):
        first, *others = group.members
        assert all(common(batch, first, other) >= group.tokens for other in others), group
        assert group.tokens > 0
        assert group.tokens % max(BLOCK, batch.page_size) == 0
        assert all(group.tokens <= shareable(batch, member) for member in group.members), group
        assert sum(batch.query_counts[member] * batch.heads for member in group.members) <= TILE
        assert len(others) * (group.tokens // BLOCK) > COST
        assert not taken & set(group.members)
        assert len(set(group.members)) == len(group.members) > 1
        taken |= set(group.members)


@many
@given(batch=batches())
def test_a_prefix_that_pays_is_found(library: Any, batch: Batch) -> None:
    """A first sequence whose prefix another one shares, and has room for, is not left alone, nor is the other, where it pays: of two
    sequences, where there is no choice."""
    batch.lengths, batch.query_counts, batch.table = batch.lengths[:2], batch.query_counts[:2], batch.table[:2]
    if len(batch.lengths) < 2:
        return
    tokens = common(batch, 0, 1)
    pays = tokens // BLOCK > COST and sum(batch.query_counts) * batch.heads <= TILE
    assert find_groups(library, batch) == ([Group(tokens, [0, 1])] if pays else [])


@many
@given(members=st.lists(st.integers(0, 2), min_size=1, max_size=40), data=st.data())
def test_families(library: Any, members: list[int], data: st.DataObject) -> None:
    """Sequences of three conversations in any order, that begin with one prompt: as many full groups as there are, of what the members
    of a conversation have in common, which is more than the prompt."""
    columns, prompt, conversation = 60, 20, data.draw(st.integers(21, 60))
    fresh = iter(range(10**6, 10**8))
    stems = [[*range(prompt), *(1000 * (c + 1) + i for i in range(prompt, conversation))] for c in range(3)]
    table = [[*stems[c], *(next(fresh) for _ in range(columns - conversation))] for c in members]
    count = len(members)
    batch = Batch(64, CAUSAL, 16, [columns * 64] * count, [1] * count, table)
    groups = find_groups(library, batch)
    for c in range(3):
        full = [g for g in groups if len(g.members) == 4 and {members[b] for b in g.members} == {c}]
        assert len(full) >= members.count(c) // 4, groups
        assert all(group.tokens == conversation * 64 for group in full)
