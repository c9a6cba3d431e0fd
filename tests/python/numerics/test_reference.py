"""The reference and the comparison themselves: a wrong oracle, or one that accepts everything, would make all other tests worthless."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import Case, Inputs, check, dequantise, make_inputs, reference
from matrix import random_case


def sees(inputs: Inputs, row: int, i: int, draft: int) -> bool:
    """Does query token i of a sequence, in `row` of q, see the token that is its query token number `draft`? Below 0: one before them."""
    if inputs.tree_mask is not None:
        return draft < 0 or bool(inputs.tree_mask[row, draft // 32] >> draft % 32 & 1)
    return draft <= i or not inputs.case.causal


def by_torch(inputs: Inputs) -> torch.Tensor:
    """The same through PyTorch's own attention in FP64, one query row at a time."""
    case = inputs.case
    rows = []
    for b, count in enumerate(case.query_counts):
        length = int(inputs.cache_seqlens[b])
        for i in range(count):
            q = inputs.q_nope[len(rows)] if inputs.q_rope is None else torch.cat([inputs.q_nope[len(rows)], inputs.q_rope[len(rows)]], -1)
            seen = torch.tensor([t for t in range(length) if sees(inputs, len(rows), i, t - (length - count))], dtype=torch.long)
            if len(seen) == 0:
                rows.append(torch.zeros(case.heads, case.d_latent, dtype=torch.float64))
                continue
            kv = dequantise(inputs, inputs.block_table[b, seen // case.page_size].long(), seen % case.page_size)
            values = kv[:, : case.d_latent]
            attended = torch.nn.functional.scaled_dot_product_attention(
                q.double()[None, :, None],
                kv.expand(1, case.heads, -1, -1),
                values.expand(1, case.heads, -1, -1),
                scale=inputs.softmax_scale,
            )
            rows.append(attended[0, :, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("number", range(8))
def test_reference_agrees_with_torch(number: int, seed: int) -> None:
    case = random_case(seed)
    case = replace(case, lens=tuple(max(n, 8) for n in case.lens))  # every row sees something
    inputs = make_inputs(case, seed)
    torch.testing.assert_close(reference(inputs).out, by_torch(inputs), rtol=1e-9, atol=1e-12)


def test_reference_by_hand() -> None:
    """Two tokens, logits 0 and ln 3: weights 1/4 and 3/4, lse = ln 4."""
    inputs = make_inputs(Case("hand", lens=(2,), heads=1, page_size=1, content="zero_kv"), seed=0)
    first, second = (int(page) for page in inputs.block_table[0, :2])
    inputs.q_nope.zero_()[..., 0] = 1.0
    inputs.q_rope.zero_()
    inputs.kv_cache[second, 0, 0] = 2.0
    inputs.kv_cache[first, 0, 1] = 8.0
    inputs = replace(inputs, softmax_scale=math.log(3) / 2)
    expected = reference(inputs)
    assert expected.out[0, 0, :3].tolist() == pytest.approx([1.5, 2.0, 0.0])
    assert float(expected.lse) == pytest.approx(math.log(4))


def _ruin_element(out: torch.Tensor, lse: torch.Tensor) -> None:
    out[1, 3, 200] += 0.02


def _ruin_swap(out: torch.Tensor, lse: torch.Tensor) -> None:
    at = int(out[0, 0].diff().abs().argmax())  # of all neighbours: two that are as good as equal may be swapped
    out[0, 0, [at, at + 1]] = out[0, 0, [at + 1, at]]


def _ruin_nan(out: torch.Tensor, lse: torch.Tensor) -> None:
    out[0, 0, 0] = math.nan


def _ruin_lse(out: torch.Tensor, lse: torch.Tensor) -> None:
    lse[1, 5] *= 1.001


def _ruin_empty_lse(out: torch.Tensor, lse: torch.Tensor) -> None:
    lse[2, 0] = -1e30


def _ruin_scale(out: torch.Tensor, lse: torch.Tensor) -> None:
    out *= 1.004


@pytest.mark.parametrize("ruin", [_ruin_element, _ruin_swap, _ruin_nan, _ruin_lse, _ruin_empty_lse, _ruin_scale])
def test_comparison_rejects(ruin: object, seed: int) -> None:
    """Guards against the loose cosine test that passed a kernel with wrong elements for 15 months."""
    inputs = make_inputs(Case("sound", lens=(300, 40, 0), out_dtype="fp32"), seed)
    expected = reference(inputs)
    check(inputs, expected.out.float(), expected.lse.float(), expected)
    out, lse = expected.out.float(), expected.lse.float()
    ruin(out, lse)
    with pytest.raises(AssertionError):
        check(inputs, out, lse, expected)


def test_inputs_are_poisoned(seed: int) -> None:
    """Every storage has NaN outside of what a call may read, and the same seed gives the same inputs."""
    case = Case("poison", lens=(70, 0, 5), strided=True, row_gap=8, page_gap=64)
    inputs = make_inputs(case, seed)
    for tensor in (inputs.q_nope, inputs.kv_cache):
        storage = tensor.new_empty(0).set_(tensor.untyped_storage())
        assert storage.isnan().any()
        assert storage.isinf().any()
    assert inputs.kv_cache[0].isnan().any()
    last_page = int(inputs.block_table[0, 1])
    assert inputs.kv_cache[last_page, :6].isfinite().all()
    assert not inputs.kv_cache[last_page, 6:].isfinite().any()
    assert set(inputs.block_table[1].tolist()) == {-1, 2**31 - 1}
    again = make_inputs(case, seed)
    assert torch.equal(inputs.q_nope, again.q_nope)
    assert torch.equal(inputs.block_table, again.block_table)
