"""The tensors of one decode step of one layer: random KV pages, shuffled block tables, queries, and the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch
from torch import Tensor

from etap_bench.shape import Shape, shared_pages

E4M3_MAX = 448.0
FP8_SCALE = 1 / 64
SOFTMAX_SCALE = (128 + 64) ** -0.5  # of DeepSeek-V2 and its successors: the head's dimensions before absorption


def pools_of(shape: Shape, cache_bytes: int) -> int:
    """Pools of pages that put more than twice the last-level cache between two uses of a page."""
    return 2 * cache_bytes // max(1, shape.distinct_kv_bytes) + 1


def arena_tokens(shape: Shape, pools: int) -> int:
    """Tokens that an arena needs: a pool takes whole pages, of 64 tokens where the ceiling copies such."""
    return pools * (shape.tokens + shape.batch * max(shape.page_size, 64))


class Arena:
    """KV rows of one format on the device, drawn once and shared by all shapes of that format."""

    def __init__(self, kv_format: str, d_latent: int, d_rope: int, tokens: int, device: str) -> None:
        self.kv_format, self.d_latent, self.d_rope, self.device = kv_format, d_latent, d_rope, device
        self.tokens = -(-tokens // 256) * 256
        width = d_latent + d_rope
        self.group_scales: Tensor | None = None
        self.kv_scale = FP8_SCALE if kv_format in ("e4m3", "e4m3_group") else None
        if kv_format in ("bf16", "fp16"):
            dtype = torch.bfloat16 if kv_format == "bf16" else torch.float16
            self.rows = torch.empty(self.tokens, width, dtype=dtype, device=device).normal_()
        elif kv_format in ("e4m3", "e4m3_group"):
            self.rows = self._random_e4m3(width)
            if kv_format == "e4m3_group":
                self.group_scales = torch.empty(self.tokens, d_latent // 128, device=device).uniform_(0.5, 1.5)
        else:
            self.rows = torch.empty(self.tokens, 528 + 2 * d_rope, dtype=torch.uint8, device=device)
            self.rows[:, :512] = self._random_e4m3(512).view(torch.uint8)
            scales = torch.empty(self.tokens, 4, device=device).uniform_(0.5, 1.5) * FP8_SCALE
            self.rows[:, 512:528] = scales.view(torch.uint8)
            rope = torch.empty(self.tokens, d_rope, dtype=torch.bfloat16, device=device).normal_()
            self.rows[:, 528:] = rope.view(torch.uint8)

    def _random_e4m3(self, width: int) -> Tensor:
        rows = torch.empty(self.tokens, width, dtype=torch.float8_e4m3fn, device=self.device)
        for part in rows.split(1 << 17):
            values = torch.empty(part.shape, device=self.device).normal_(std=1 / FP8_SCALE)
            part.copy_(values.clamp_(-E4M3_MAX, E4M3_MAX))
        return rows

    def pages(self, page_size: int) -> Tensor:
        return self.rows.view(-1, page_size, self.rows.shape[1])

    def dequantise(self, tokens: Tensor) -> Tensor:
        """The rows of these token numbers as float64."""
        if self.kv_format in ("bf16", "fp16"):
            return self.rows[tokens].double()
        raw = self.rows.view(torch.uint8)[tokens]  # PyTorch on the CPU can't index FP8 tensors
        if self.kv_format in ("e4m3_656", "e4m3_528"):
            latent = raw[..., :512].contiguous().view(torch.float8_e4m3fn).double().unflatten(-1, (4, 128))
            scales = raw[..., 512:528].contiguous().view(torch.float32).double()
            rope = raw[..., 528:].contiguous().view(torch.bfloat16).double()
            return torch.cat([(latent * scales[..., None]).flatten(-2), rope], dim=-1)
        values = raw.view(torch.float8_e4m3fn).double() * FP8_SCALE
        if self.group_scales is not None:
            groups = values[..., : self.d_latent].unflatten(-1, (-1, 128))
            groups *= self.group_scales[tokens].double()[..., None]
        return values


class Inputs:
    """A shape's tensors: queries, lengths and one block table, or one list of slots a query token, for each pool of pages.

    Pools hold other pages each, so that calls which take turns over them find nothing in the cache.
    """

    def __init__(self, shape: Shape, arena: Arena, pools: int) -> None:
        self.shape, self.arena, self.pools, self.device = shape, arena, pools, arena.device
        self.softmax_scale = SOFTMAX_SCALE
        dtype = torch.float16 if shape.kv_format == "fp16" else torch.bfloat16
        self.q = torch.randn(shape.query_tokens, shape.heads, shape.d_latent + shape.d_rope, device=self.device).to(dtype)
        self.q_nope = self.q[..., : shape.d_latent]
        self.q_rope = self.q[..., shape.d_latent :] if shape.d_rope else None
        self.cache_seqlens = torch.tensor(shape.lengths, dtype=torch.int32, device=self.device)
        sums = torch.tensor([0, *shape.query_lens]).cumsum(0)
        self.cu_seqlens_q = sums.to(torch.int32).to(self.device)
        self.kv_cache = arena.pages(shape.adjacent)  # what the tables count
        self.block_tables = self.shuffled_tables(shape.adjacent)
        self.kv_group_scales: Tensor | None = None
        if arena.group_scales is not None:
            self.kv_group_scales = arena.group_scales.view(-1, shape.page_size, arena.group_scales.shape[1])

    def shuffled_tables(self, page_size: int) -> Tensor:
        """[pools, batch, pages] page numbers in random order, no page in two pools; -1 past a sequence's end. Lists are as wide as they are
        said to be, even where none is full."""
        sequences, count = self._logical_pages(page_size)
        if self.shape.sparse:
            missing = max(0, self.shape.context // page_size - len(sequences[0]))
            sequences[0] = torch.nn.functional.pad(sequences[0], (0, missing), value=-1)
        logical = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=-1).to(self.device)
        physical = torch.randperm(self.arena.tokens // page_size, device=self.device)[: self.pools * count].view(self.pools, count)
        return torch.where(logical < 0, -1, physical[:, logical.clamp(min=0)]).int()

    def _logical_pages(self, page_size: int) -> tuple[list[Tensor], int]:
        """The pages of each sequence, numbered from 0 over the batch with shared ones counted once, and their number."""
        count = 0
        shared: dict[Hashable, int] = {}
        sequences = []
        for length, blocks in zip(self.shape.lengths, self.shape.shared or [()] * self.shape.batch, strict=True):
            leading = []
            for page in shared_pages(blocks, page_size):
                if page not in shared:
                    shared[page] = count
                    count += 1
                leading.append(shared[page])
            own = -(-length // page_size) - len(leading)
            sequences.append(torch.cat([torch.tensor(leading, dtype=torch.int64), torch.arange(count, count + own)]))
            count += own
        return sequences, count

    def token_numbers(self, sequence: int, pool: int) -> Tensor:
        """The rows of the arena that hold a sequence's tokens, in order."""
        token = torch.arange(self.shape.lengths[sequence], device=self.device)
        pages = self.block_tables[pool, sequence].long()
        return pages[token // self.shape.adjacent] * self.shape.adjacent + token % self.shape.adjacent

    def reference(self) -> Tensor:
        """out of pool 0 in float64, [rows, heads, d_latent]: softmax attention as etap.h defines it, causal at the sequence's end,
        and 0 for a query token that sees none."""
        shape = self.shape
        out = torch.empty(shape.query_tokens, shape.heads, shape.d_latent, dtype=torch.float64, device=self.device)
        first = 0
        for sequence, (length, count) in enumerate(zip(shape.lengths, shape.query_lens, strict=True)):
            kv = self.arena.dequantise(self.token_numbers(sequence, pool=0))
            scores = self.q[first : first + count].double() @ kv.T * self.softmax_scale  # [count, heads, length]
            last = length - count + torch.arange(count, device=self.device)  # the last token that a query token sees
            hidden = torch.arange(length, device=self.device) > last[:, None]
            scores.masked_fill_(hidden[:, None], -math.inf)
            weights = torch.softmax(scores, dim=-1).masked_fill_((last < 0)[:, None, None], 0.0)
            out[first : first + count] = weights @ kv[:, : shape.d_latent]
            first += count
        return out
