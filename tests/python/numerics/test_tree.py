"""Tree masks: what they must equal, every way to give one, and what is refused. Against FP64 they are in the matrix (tests/matrix.py)."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, check, make_inputs, reference
from harness import Guarded, Session, problem_of, same_bits, solve

import etap_py as etap


def drawn(seed: int, tree_mask: str, **fields: Any) -> Case:
    rng = random.Random(seed)
    batch, most = rng.randint(1, 5), rng.choice([3, 8, 33, 70])
    counts = (*(rng.randint(0, most) for _ in range(batch - 1)), most)
    case = {
        "lens": tuple(rng.choice([rng.randint(0, most), rng.randint(0, 400)]) for _ in range(batch)),
        "heads": rng.choice([1, 3, 4, 16]),
        "page_size": rng.choice([1, 16, 64]),
        "kv_format": rng.choice(["bf16", "e4m3", "e4m3_group", "e4m3_656"]),
        "causal": False,
        "strided": rng.random() < 0.5,
        "batch_invariant": rng.random() < 0.5,
        "num_sms": rng.choice([0, 1]),
        **({"query_lens": counts, "spare_rows": rng.randint(0, 3)} if rng.random() < 0.5 else {"query_len": most}),
        **fields,
    }
    print(case)
    return Case("drawn", tree_mask=tree_mask, **case)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(("kind", "causal"), [("chain", True), ("all", False)])
def test_masks_that_have_a_name(kind: str, causal: bool, number: int, seed: int) -> None:
    """The lower triangle is a causal mask, all bits are none: equal bits, for lengths below the number of drafts too."""
    inputs = make_inputs(drawn(seed, kind), seed)
    plain = replace(inputs, case=replace(inputs.case, tree_mask="", causal=causal), tree_mask=None)
    for got, wanted in zip(solve(inputs), solve(plain), strict=True):
        assert same_bits(got, wanted)


@pytest.mark.parametrize("number", range(6))
def test_a_branch_alone(number: int, seed: int) -> None:
    """A draft sees what it would in a sequence of its own, of the tokens before the drafts, its ancestors and itself."""
    rng = random.Random(seed)
    case = drawn(seed, "tree", lens=(rng.randint(40, 200),), query_lens=(), query_len=7, page_size=1, batch_invariant=True)
    inputs = make_inputs(case, seed)
    out, lse = solve(inputs)
    row = rng.randrange(7)
    before = case.lens[0] - 7
    assert inputs.tree_mask is not None
    kept = [*range(before), *(before + j for j in range(7) if int(inputs.tree_mask[row, 0]) >> j & 1)]
    alone = replace(
        inputs,
        case=replace(case, tree_mask="", query_len=1, lens=(len(kept),)),
        tree_mask=None,
        q_nope=inputs.q_nope[row : row + 1],
        q_rope=None if inputs.q_rope is None else inputs.q_rope[row : row + 1],
        block_table=inputs.block_table[:, torch.tensor(kept)],
        cache_seqlens=torch.tensor([len(kept)], dtype=torch.int32),
    )
    check(alone, out[row : row + 1], lse[row : row + 1], reference(alone))


def test_every_way_in(seed: int) -> None:
    """Plan, one call, operator, NumPy's bits, and masks with a dimension of sequences: one result."""
    inputs = make_inputs(Case("ways", lens=(70, 20, 90), query_len=34, heads=4, tree_mask="random"), seed)
    want, want_lse = solve(inputs)
    tree = inputs.tree_mask
    assert tree is not None
    assert tree.shape == (102, 2)
    given = (inputs.q_nope, inputs.q_rope, inputs.kv_cache, inputs.block_table, inputs.cache_seqlens)
    scale = {"softmax_scale": inputs.softmax_scale}
    got = [etap.mla_decode(*given, tree_mask=tree, **scale), etap.mla_decode(*given, tree_mask=tree, causal=False, **scale)]
    got.append(torch.ops.etap.mla_decode(*given, **scale, tree_mask=tree))
    by_sequence = [t.unflatten(0, (3, 34)) for t in (inputs.q_nope, inputs.q_rope, tree)]
    got.append(etap.mla_decode(*by_sequence[:2], *given[2:], tree_mask=by_sequence[2], **scale))
    cu_seqlens_q = torch.arange(4, dtype=torch.int32) * 34
    got.append(etap.mla_decode(*given, tree_mask=tree, cu_seqlens_q=cu_seqlens_q, max_query_len=34, **scale))
    bits = [t.contiguous().view(torch.int16).numpy().view(np.uint16) for t in given[:3]]
    out, lse = etap.mla_decode(*bits, *(t.numpy() for t in given[3:]), tree_mask=tree.numpy(), q_dtype="bf16", **scale)
    got.append((torch.from_numpy(np.asarray(out).view(np.int16)).view(torch.bfloat16), torch.from_numpy(np.asarray(lse))))
    for out, lse in got:
        assert same_bits(out.reshape(want.shape), want)
        assert same_bits(lse.reshape(want_lse.shape), want_lse)


def test_a_plan_takes_other_masks(seed: int) -> None:
    """Guards a mask that is kept with the layout of a call's tensors, of which the plan remembers all but the addresses."""
    inputs = make_inputs(Case("masks", lens=(70, 20), query_len=9, heads=4, tree_mask="random"), seed)
    session = Session(inputs)
    session.solve()
    assert inputs.tree_mask is not None
    other = replace(inputs, tree_mask=inputs.tree_mask.roll(1, 0))
    out, lse = inputs.outputs()
    session.run(out, lse, tree_mask=other.tree_mask)
    check(other, out, lse, reference(other))


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"tree_mask": None}, "tree_mask is None and the problem's tree_mask is True; allowed: a mask and True, or neither"),
    ({"tree_mask": False}, {}, "tree_mask is given and the problem's tree_mask is False; allowed: a mask and True, or neither"),
    ({}, {"tree_mask": torch.zeros(6, 2, dtype=torch.int32)}, "tree_mask has shape [6, 2]; allowed: [6, 1]"),
    ({}, {"tree_mask": torch.zeros(3, 2, 1, dtype=torch.int32)[:2]}, "tree_mask has shape [4, 1]; allowed: [6, 1]"),
    ({}, {"tree_mask": torch.zeros(6, 1, dtype=torch.int64)}, "tree_mask has type int64; allowed: int32"),
    ({}, {"tree_mask": torch.zeros(6, 1, dtype=torch.bool)}, "tree_mask has type bool; allowed: int32"),
    ({"max_query_len": 257}, {}, "max_query_len is 257; allowed: 1 to 256 with ETAP_TREE_MASK"),
    ({"topk": 4, "max_query_len": 1, "batch": 6}, {}, "flags is 8; allowed: 0 or ETAP_BATCH_INVARIANT (4) with topk, whose lists say"),
]


@pytest.mark.parametrize(("fields", "arguments", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_refused(fields: dict[str, Any], arguments: dict[str, Any], words: str, seed: int) -> None:
    """One sentence, and outputs stay as they were."""
    inputs = make_inputs(Case("refused", lens=(40, 9, 2), query_len=2, tree_mask="tree"), seed)
    out, lse = inputs.outputs()
    guards = Guarded(out), Guarded(lse)

    def call() -> None:
        plan = etap.Plan(problem_of(inputs.case, "cpu", **fields))
        plan.update(inputs.cache_seqlens)
        given = {"tree_mask": inputs.tree_mask, "softmax_scale": inputs.softmax_scale, "out": out, "lse": lse, **arguments}
        plan.run(inputs.q_nope, inputs.q_rope, inputs.kv_cache, inputs.block_table, **given)

    with pytest.raises(ValueError, match=re.escape(words)):
        call()
    assert all(guard.untouched() for guard in guards)


def test_causal_and_mask_in_c() -> None:
    """In C the two exclude each other; in Python, where causal is the default, a mask says it all."""
    problem = etap.Problem(num_heads=4, batch=1, max_query_len=3, tree_mask=True)
    assert problem.to_c().flags == 8
    assert etap.query(problem).kernel == etap.query(replace(problem, tree_mask=False)).kernel
    assert [replace(problem, max_query_len=n).tree_mask_words for n in (1, 32, 33, 256)] == [1, 1, 2, 8]
