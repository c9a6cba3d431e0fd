"""Sparse attention: lists of slots against FP64, through the plan, the one call, the operator and NumPy, and what is refused."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, check, make_inputs
from harness import Guarded, problem_of, same_bits
from sparse_cases import FORMATS, drawn, lists, options, reference, solve
from torch import Tensor

import etap_py as etap


@pytest.mark.parametrize("kv_format", FORMATS)
def test_lists_of_slots(kv_format: str, seed: int) -> None:
    """Holes anywhere, duplicates, empty lists, counts, far strides: against FP64, with equal bits from another workspace, and for a row
    alone in batch-invariant mode. What no list names is poison."""
    rng = random.Random(seed)
    for round_ in range(6):
        inputs = make_inputs(drawn(rng, kv_format=kv_format), seed + round_)
        slots = lists(rng, inputs, rng.choice([1, 7, 64, 200]))
        counts = None
        if rng.random() < 0.5:
            counts = torch.tensor([rng.randint(0, slots.shape[1]) for _ in slots], dtype=torch.int32)
            past = torch.arange(slots.shape[1]) >= counts[:, None]
            slots[past & (torch.rand(slots.shape) < 0.5)] = 2**31 - 1  # past the count nobody looks
        expected = reference(inputs, slots, counts)
        out, lse = solve(inputs, slots, counts)
        check(inputs, out, lse, expected)
        again = solve(inputs, slots, counts, byte=0x3C)
        assert same_bits(out, again[0]) and same_bits(lse, again[1])
        whole = solve(inputs, slots, counts, batch_invariant=True)
        row = rng.randrange(len(slots))
        one = etap.mla_decode_sparse(
            inputs.q_nope[row : row + 1],
            None if inputs.q_rope is None else inputs.q_rope[row : row + 1],
            inputs.kv_cache,
            slots[row : row + 1],
            None if counts is None else counts[row : row + 1],
            kv_format=inputs.case.kv,
            out_dtype=inputs.case.out,
            batch_invariant=True,
            **options(inputs),
        )
        assert one[1] is not None
        assert same_bits(whole[0][row], one[0][0]) and same_bits(whole[1][row], one[1][0])


def test_dense_is_a_list_of_everything(seed: int) -> None:
    """A list that names a sequence's tokens in order gives the bits of dense attention."""
    rng = random.Random(seed)
    inputs = make_inputs(drawn(rng, lens=(300, 300, 300), heads=16, page_size=rng.choice([1, 16, 64])), seed)
    case = inputs.case
    tokens = torch.arange(300)
    slots = (inputs.block_table[:, tokens // case.page_size] * case.page_size + tokens % case.page_size).int()
    dense = etap.Plan(problem_of(case, "cpu", batch_invariant=True))
    dense.update(inputs.cache_seqlens)
    want = dense.run(inputs.q_nope, inputs.q_rope, inputs.kv_cache, inputs.block_table, **options(inputs))
    got = solve(inputs, slots, None, batch_invariant=True)
    assert same_bits(want[0], got[0]) and same_bits(want[1], got[1])


def test_every_way_in(seed: int) -> None:
    """Plan, one call, operator, NumPy's bits, and queries with several tokens a sequence: one result."""
    rng = random.Random(seed)
    inputs = make_inputs(drawn(rng, lens=(70, 20, 90, 40), kv_format="bf16", strided=False, out_dtype="", lse_base="e"), seed)
    slots = lists(rng, inputs, 33)
    want, want_lse = solve(inputs, slots, None)
    given = options(inputs) | {"empty_lse": inputs.case.empty_lse}
    q_nope, q_rope, kv = inputs.q_nope, inputs.q_rope, inputs.kv_cache
    got = [etap.mla_decode_sparse(q_nope, q_rope, kv, slots, **given)]
    counts = torch.full((4,), 33, dtype=torch.int32)
    got.append(
        torch.ops.etap.mla_decode_sparse(
            q_nope, q_rope, kv, slots, counts, inputs.softmax_scale, lse_base="e", empty_lse=inputs.case.empty_lse
        )
    )
    pairs = [None if t is None else t.view(2, 2, *t.shape[1:]) for t in (q_nope, q_rope, slots, counts)]
    got.append(etap.mla_decode_sparse(pairs[0], pairs[1], kv, pairs[2], pairs[3], **given))
    bits = [None if t is None else t.contiguous().view(torch.int16).numpy().view(np.uint16) for t in (q_nope, q_rope, kv)]
    out, lse = etap.mla_decode_sparse(*bits, slots.numpy(), q_dtype="bf16", **given)
    got.append((torch.from_numpy(np.asarray(out).view(np.int16)).view(torch.bfloat16), torch.from_numpy(np.asarray(lse))))
    for out, lse in got:
        assert same_bits(out.reshape(want.shape), want) and same_bits(lse.reshape(want_lse.shape), want_lse)


def test_the_operator_is_known_to_torch(seed: int) -> None:
    inputs = make_inputs(Case("op", lens=(40, 9), causal=False), seed)
    slots = lists(random.Random(seed), inputs, 16)
    torch.library.opcheck(
        torch.ops.etap.mla_decode_sparse.default,
        (inputs.q_nope, inputs.q_rope, inputs.kv_cache, slots, None, inputs.softmax_scale),
        test_utils=("test_schema", "test_faketensor"),
    )


REFUSED = [
    ({"slots": 10**6}, "slots[1, 3] is 1000000; allowed: -1 for none, or 0 to below num_pages * page_size, which is"),
    ({"slots": -2}, "slots[1, 3] is -2; allowed: -1 for none"),
    ({"counts": 9}, "cache_seqlens[1] is 9; allowed: 0 to topk, which is 8"),
    ({"counts": -1}, "cache_seqlens[1] is -1; allowed: 0 to topk, which is 8"),
    ({"topk": 9}, "slots has shape [2, 8]; allowed: [2, 9]"),
    ({"topk": 65537}, "topk is 65537; allowed: 0 to 65536"),
    ({"page_size": 0}, "page_size is 0; allowed: 1 and more with topk"),
    ({"topk": -1}, "topk is -1; allowed: 0 to 65536"),
    ({"max_query_len": 2}, "max_query_len is 2; allowed: 1 with topk"),
    ({"total_q": 2}, "flags is 2; allowed: 0 or ETAP_BATCH_INVARIANT (4) with topk"),
    ({"block_table": True}, "block_table is given with topk 8; allowed: None, and slots"),
]


FIELDS = ("topk", "max_query_len", "total_q", "page_size")


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_refused(change: dict[str, Any], words: str, seed: int) -> None:
    """One sentence, and outputs stay as they were."""
    inputs = make_inputs(Case("refused", lens=(40, 9), causal=False), seed)
    slots = lists(random.Random(seed), inputs, 8)
    counts = torch.tensor([8, change.get("counts", 8)], dtype=torch.int32)
    slots[1, 3] = change.get("slots", slots[1, 3])
    out, lse = inputs.outputs()
    guards = Guarded(out), Guarded(lse)
    fields = {"topk": 8} | {name: value for name, value in change.items() if name in FIELDS}

    def call() -> None:
        plan = etap.Plan(problem_of(inputs.case, "cpu", **fields))
        plan.update(counts)
        table = inputs.block_table if "block_table" in change else None
        plan.run(inputs.q_nope, inputs.q_rope, inputs.kv_cache, table, slots=slots, out=out, lse=lse, **options(inputs))

    with pytest.raises(ValueError, match=re.escape(words)):
        call()
    assert all(guard.untouched() for guard in guards)


def test_what_belongs_to_dense_calls(seed: int) -> None:
    inputs = make_inputs(Case("dense", lens=(40, 9)), seed)
    plan = etap.Plan(problem_of(inputs.case, "cpu"))
    plan.update(inputs.cache_seqlens)
    with pytest.raises(ValueError, match="slots is given with topk 0; allowed: None, and block_table"):
        plan.run(inputs.q_nope, inputs.q_rope, inputs.kv_cache, None, slots=inputs.block_table, **options(inputs))
    with pytest.raises(ValueError, match=r"slots has shape \[2, 0\]; allowed: \[rows, topk\]"):
        etap.mla_decode_sparse(
            inputs.q_nope, inputs.q_rope, inputs.kv_cache, torch.zeros(2, 0, dtype=torch.int32), softmax_scale=inputs.softmax_scale
        )
    with pytest.raises(ValueError, match=r"\(d_latent, d_rope\) is \(512, 64\); allowed with ETAP_KV_E4M3_528: \(512, 0\)"):
        etap.query(etap.Problem(num_heads=16, batch=1, kv_format="e4m3_528"))


def test_shapes_of_lists_and_counts(seed: int) -> None:
    """Guards: lists and counts of another shape were taken where they were as many, so rows got those of others."""
    inputs = make_inputs(Case("shapes", lens=(40, 9, 9, 9, 9, 9), causal=False), seed)
    slots = lists(random.Random(seed), inputs, 8)
    q_nope, q_rope = inputs.q_nope.unflatten(0, (2, 3)), inputs.q_rope.unflatten(0, (2, 3))
    counts = torch.full((6,), 8, dtype=torch.int32)

    def call(slots: Tensor, counts: Tensor) -> None:
        etap.mla_decode_sparse(q_nope, q_rope, inputs.kv_cache, slots, counts, softmax_scale=inputs.softmax_scale)

    call(slots.view(2, 3, 8), counts.view(2, 3))
    call(slots, counts)
    for others, other_counts, words in (
        (slots.view(3, 2, 8), counts, "slots has shape [3, 2, 8]; allowed: [2, 3, any]"),
        (slots.view(2, 3, 8), counts.view(3, 2), "slot_counts has shape [3, 2]; allowed: [2, 3]"),
        (slots.view(2, 3, 8), counts.view(6, 1), "slot_counts has shape [6, 1]; allowed: [2, 3]"),
        (slots, counts.long(), "slot_counts has type int64; allowed: int32"),
        (slots, counts[0], "slot_counts has shape []; allowed: [6]"),
        (slots.view(2, 3, 8), counts.repeat(2).view(2, 6)[:, :3], "slot_counts has strides [6, 1]; allowed: [3, 1], contiguous"),
        (slots, counts + 1, "slot_counts[0] is 9; allowed: 0 to topk, which is 8"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call(others, other_counts)


def test_one_list_for_all(seed: int) -> None:
    """Lists are read only, so they may lie on each other: expanded ones were refused for their stride."""
    inputs = make_inputs(Case("one", lens=(40, 9, 9), causal=False), seed)
    slots = lists(random.Random(seed), inputs, 8)[:1].expand(3, 8)
    out, lse = solve(inputs, slots, None)
    check(inputs, out, lse, reference(inputs, slots, None))


def test_infinities_beside_holes(seed: int) -> None:
    """Guards: a piece whose only token has a logit of -inf was taken for empty, and whether 0 times its infinite V reached the row depended
    on the number of threads and on the token's place in the list."""
    rng = random.Random(seed)
    q = torch.ones(1, 1, 576, dtype=torch.bfloat16)
    kv = (torch.randn(4, 1000, 576) * 0.1).bfloat16()
    kv[0, 0, 5] = -math.inf
    slots = torch.full((1, 4000), -1, dtype=torch.int32)
    slots[0, rng.randrange(1000, 3000)] = 5
    for place in (0, 3999):
        slots[0, [0, 3999]] = -1
        slots[0, place] = 0
        for num_sms in (1, 2):
            out, lse = etap.mla_decode_sparse(q, None, kv, slots, softmax_scale=1.0, num_sms=num_sms)
            assert out[0, 0].isnan().nonzero().flatten().tolist() == [5]
            assert lse is not None and lse.isfinite().all()


def test_a_plan_that_was_not_made(seed: int) -> None:
    """Guards: a new plan got the memory of one that was deleted, and ran with its counts."""
    inputs = make_inputs(Case("stale", lens=(40, 9), causal=False), seed)
    slots = lists(random.Random(seed), inputs, 7)
    for _ in range(4):
        first = etap.Plan(problem_of(inputs.case, "cpu", topk=7))
        first.update(torch.ones(2, dtype=torch.int32))
        del first
        second = etap.Plan(problem_of(inputs.case, "cpu", topk=7))
        with pytest.raises(ValueError, match="workspace holds no plan; allowed: run after update"):
            second.run(inputs.q_nope, inputs.q_rope, inputs.kv_cache, None, slots=slots, **options(inputs))
