"""What the tests of the drop-in packages share: draws from the peers' test matrices, and a case's tensors in the peers' forms."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from cases import Inputs
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
