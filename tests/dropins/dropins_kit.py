"""What the tests of the drop-in packages share: draws from the peers' test matrices, and a case's tensors in the peers' forms."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from torch import Tensor

# Query rows times KV tokens of one case: what the FP64 reference takes a tenth of a second for, on one CPU thread and on a GPU.
_WORK = {"cpu": 150_000, "cuda": 200_000_000}
_DRAWS = {"cpu": 4, "cuda": 3}
_DRAWN_TOKENS = 8192  # values are drawn on the CPU: as many tokens take it a tenth of a second


def draws(axes: Mapping[str, Sequence[Any]], seed: int, device: str) -> Iterator[dict[str, Any]]:
    """Points of a peer's test matrix, others each run."""
    rng = random.Random(seed)
    for _ in range(_DRAWS[device]):
        yield {name: rng.choice(values) for name, values in axes.items()}


def affordable(lens: Sequence[int], rows: int, device: str) -> tuple[int, ...]:
    """The lengths [batch], as many as the device solves in the time of a test with `rows` query rows each; one at least."""
    work, kept = 0, []
    for length in lens:
        work += length * max(rows, 64)  # to gather a token for few query rows takes as long as to attend to it
        if kept and work > _WORK[device]:
            break
        kept.append(length)
    return tuple(kept)


def shared_pages(lens: Sequence[int], page_size: int) -> int:
    """`Case.pool_pages` for these lengths: 0 where each sequence gets pages of its own, else how many all of them share."""
    return 0 if sum(lens) <= _DRAWN_TOKENS else _DRAWN_TOKENS // page_size


def fused_queries(inputs: Inputs) -> Tensor:
    """[batch, query tokens, heads, d_latent + d_rope]"""
    parts = [inputs.q_nope] if inputs.q_rope is None else [inputs.q_nope, inputs.q_rope]
    return torch.cat(parts, -1).unflatten(0, (inputs.case.num_seqs, -1))


def page_lists(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The block table in compressed form: kv_indptr [batch + 1] and kv_indices, int32."""
    size = inputs.case.page_size
    counts = (inputs.cache_seqlens.clamp(min=0) + size - 1) // size
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    rows = [inputs.block_table[b, :count] for b, count in enumerate(counts.tolist())]
    return starts, torch.cat(rows)


def cache_parts(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Latent and rope views of the pool."""
    latent = inputs.case.d_latent
    return inputs.kv_cache[..., :latent], inputs.kv_cache[..., latent:]


def with_lens(inputs: Inputs, lens: Sequence[int]) -> Inputs:
    """The same call with other lengths, in another tensor."""
    return replace(inputs, cache_seqlens=torch.tensor(lens, dtype=torch.int32, device=inputs.device))


# ---- What must not be read -------------------------------------------------------------------------------------------

OUTSIDE = ("a length", "page -1", "page num_pages")


def check_outside(what: str, run: Callable[[Inputs], tuple[Tensor, Tensor]], name: str, device: str, seed: int) -> None:
    """A length beyond the block table or a page number beyond the pool, in one sequence of three: the CPU device refuses the call by a
    sentence about `name`; on the CUDA device that sequence becomes NaN, and the others are as they would be without it.

    run: returns out [rows, heads, d_latent] and lse [rows, heads], base e
    """
    rng = random.Random(seed)
    lens, columns = [100, 128, 65], 2
    inputs = make_inputs(Case(what, lens=tuple(lens)), seed, device)
    inputs = replace(inputs, block_table=inputs.block_table[:, :columns].contiguous())
    at = rng.randrange(3)
    told = str(at)
    if what == "a length":
        lens[at] = columns * 64 + rng.randint(1, 64)
        told = str(lens[at])
    else:
        inputs.block_table[at, 1] = -1 if what == "page -1" else len(inputs.kv_cache)
    inputs = with_lens(inputs, lens)
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"{name}.*\b{told}\b"):
            run(inputs)
        return
    out, lse = run(inputs)
    assert out[at].isnan().all() and lse[at].isnan().all()
    lens[at], out[at], lse[at] = 0, 0, -math.inf
    without = with_lens(inputs, lens)
    check(without, out, lse, reference(without))


EMPTY = ("no pages", "no columns", "neither")


def empty_inputs(what: str, device: str, seed: int) -> Inputs:
    """Sequences of length 0 over a pool or a block table that has nothing in it."""
    inputs = make_inputs(Case(what, lens=(0, 0, 0), query_len=2), seed, device)
    pool = inputs.kv_cache if what == "no columns" else inputs.kv_cache[:0].clone()
    table = inputs.block_table if what == "no pages" else inputs.block_table[:, :0].clone()
    return replace(inputs, kv_cache=pool, block_table=table)
