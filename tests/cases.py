"""Decode problems as data, and what they should give: the inputs and the FP64 reference of every numerics test.

`Case` names a problem, `make_inputs(case, seed, device)` builds its tensors, `reference(inputs)` computes the result in FP64 on the
same device, `check(inputs, out, lse, expected)` compares. Nothing here but the tolerance knows the library, so the CPU and the GPU
tests share it.

Whatever a decode call must not read is poison: NaN and infinities in page 0, in pages that no sequence owns, in the tail of each
sequence's last page, in the gaps of strided storage; -1 and INT_MAX in the block table past a sequence's end. Outputs start as poison.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import etap_py as etap

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUP = 128  # latent values that share one scale
INT_MAX = 2**31 - 1
FP8_MAX = 448.0
SCALED_ROWS = ("e4m3_656", "e4m3_528")  # formats whose rows hold their scales

# Values of KV are drawn with this spread, that of the inputs for which FlashMLA's absolute tolerance was made.
VALUE_RMS = 0.1


@dataclass(frozen=True)
class Case:
    """One decode problem. Fields that the C interface has too mean the same here."""

    name: str
    lens: tuple[int, ...] = ()  # KV tokens of each sequence; empty: `batch` lengths drawn from 0 to max_len
    batch: int = 4
    max_len: int = 512
    heads: int = 16
    page_size: int = 64
    d_latent: int = 512
    d_rope: int = 64
    q_dtype: str = "bf16"
    kv_format: str = ""  # "": that of q_dtype
    out_dtype: str = ""  # "": that of q_dtype
    query_len: int = 1
    query_lens: tuple[int, ...] = ()  # ragged query counts
    spare_rows: int = 0  # ragged: total_q is that much larger than the query tokens there are
    causal: bool = True
    tables: str = "own"  # whose pages sequences begin with, see share_pages
    shared_prefixes: bool = False
    tree_mask: str = ""  # what each draft sees of the others, see _tree_mask; "": query tokens are none
    batch_invariant: bool = False
    num_sms: int = 0
    lse_base: str = "e"
    empty_lse: float = -math.inf
    content: str = "normal"  # see _contents
    q_layout: str = "split"  # "split", "fused" (one tensor), "transposed" (heads outermost)
    strided: bool = False  # gaps of poison in queries, outputs and the block table
    row_gap: int = 0  # elements between KV rows
    page_gap: int = 0  # elements between KV pages
    pool_pages: int = 0  # > 0: sequences draw (and share) pages from a pool of that many, whose rows are all valid
    kv_scale: float | None = None  # None: drawn, for the E4M3 formats that have one
    kv_scale_on_device: bool = False

    @property
    def kv(self) -> str:
        return self.kv_format or self.q_dtype

    @property
    def out(self) -> str:
        return self.out_dtype or self.q_dtype

    @property
    def num_seqs(self) -> int:
        return len(self.lens) or self.batch

    @property
    def query_counts(self) -> tuple[int, ...]:
        """Query tokens of each sequence."""
        return self.query_lens or (self.query_len,) * self.num_seqs

    def rows_of(self, sequence: int) -> slice:
        """Its rows of q."""
        first = sum(self.query_counts[:sequence])
        return slice(first, first + self.query_counts[sequence])

    @property
    def max_query_len(self) -> int:
        return max(self.query_lens) if self.query_lens else self.query_len

    @property
    def rows(self) -> int:
        return sum(self.query_lens) + self.spare_rows if self.query_lens else self.num_seqs * self.query_len


@dataclass
class Inputs:
    """The tensors of one call, on one device, as views into poisoned storage."""

    case: Case
    seed: int
    q_nope: Tensor  # [rows, heads, d_latent]
    q_rope: Tensor | None  # [rows, heads, d_rope]
    kv_cache: Tensor  # [num_pages, page_size, row]
    block_table: Tensor  # int32 [batch, pages of the longest sequence + 2]
    cache_seqlens: Tensor  # int32 [batch]
    cu_seqlens_q: Tensor | None  # int32 [batch + 1]
    tree_mask: Tensor | None  # int32 [rows, words of 32 drafts]
    kv_scale: float | Tensor | None
    kv_group_scales: Tensor | None  # FP32 [num_pages, page_size, d_latent / 128]
    softmax_scale: float

    @property
    def device(self) -> torch.device:
        return self.q_nope.device

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Fresh out [rows, heads, d_latent] and lse [rows, heads], full of poison."""
        case = self.case
        gap = 24 if case.strided else 0
        out = _strided((case.rows, case.heads, case.d_latent), DTYPES[case.out], self.device, gap)
        lse = _strided((case.rows, case.heads), torch.float32, self.device, gap)
        return out, lse


@dataclass
class Expected:
    """FP64 results. Rows beyond the query tokens there are (ragged, spare_rows) are not part of it."""

    out: Tensor  # [query tokens, heads, d_latent]
    lse: Tensor  # [query tokens, heads], in the case's base
    logit_size: Tensor  # [query tokens, heads]: the largest sum of |terms| among the row's dot products
    value_rms: float


# ---- Storage ---------------------------------------------------------------------------------------------------------


def poison_(tensor: Tensor) -> Tensor:
    """Fills a contiguous tensor with NaN and, where the type has them, infinities of both signs (-1 and INT_MAX for integers)."""
    flat = tensor.view(-1)
    if tensor.dtype == torch.int32:
        flat.fill_(-1)
        flat[1::2] = INT_MAX
        return tensor
    flat.view(torch.uint8).fill_(0xFF)  # NaN in BF16, FP16, FP32 and E4M3
    if tensor.dtype in (torch.bfloat16, torch.float16, torch.float32):
        flat[1::3] = math.inf
        flat[2::3] = -math.inf
    return tensor


def _strided(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, *gaps: int) -> Tensor:
    """A poisoned tensor whose dimension i is `gaps[i]` elements further apart than it needs to be. Storage beyond 1 GiB stays
    unwritten, so that far pages cost address space only."""
    strides = [1]
    for dim in reversed(range(1, len(shape))):
        strides.insert(0, strides[0] * shape[dim] + (gaps[dim - 1] if dim - 1 < len(gaps) else 0))
    size = max(1, shape[0] * strides[0])
    storage = torch.empty(size, dtype=dtype, device=device)
    if storage.nbytes <= 2**30:
        poison_(storage)
    return storage.as_strided(shape, strides)


def _filled(values: Tensor, dtype: torch.dtype, device: torch.device | str, *gaps: int) -> Tensor:
    view = _strided(tuple(values.shape), dtype, device, *gaps)
    view.copy_(values.to(dtype))
    return view


# ---- Inputs ----------------------------------------------------------------------------------------------------------


def make_inputs(case: Case, seed: int, device: torch.device | str = "cpu") -> Inputs:
    """The same values for the same seed on every device (drawn on the CPU)."""
    rng = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=rng)

    lens = torch.tensor(case.lens) if case.lens else randint(0, case.max_len + 1, case.batch)
    batch, page = len(lens), case.page_size
    pages_of = (lens.clamp(min=0) + page - 1) // page
    columns = int(pages_of.max())

    table = _strided((batch, columns + 2), torch.int32, "cpu", 3 if case.strided else 0)
    used = torch.arange(columns)[None, :] < pages_of[:, None]
    needed = int(used.sum())
    if case.pool_pages:
        num_pages = 1 + case.pool_pages
        table[:, :columns][used] = randint(1, num_pages, needed).int()
        live = torch.ones(num_pages, page, dtype=torch.bool)
        live[0] = False
    else:
        num_pages = 1 + needed + needed // 4 + 1
        table[:, :columns][used] = (1 + torch.randperm(num_pages - 1, generator=rng)[:needed]).int()
        share_pages(case.tables, table, pages_of.tolist(), seed)
        tokens_in = (lens[:, None] - torch.arange(columns)[None, :] * page).clamp(0, page)
        reached = np.zeros(num_pages, np.int64)  # tokens of each page, by the longest of its sequences
        np.maximum.at(reached, table[:, :columns][used].numpy(), tokens_in[used].numpy())
        live = torch.arange(page)[None, :] < torch.from_numpy(reached)[:, None]

    kv, q_nope, q_rope, scale = _contents(case, rng, lens, table, live)

    kv_cache, kv_scale, group_scales = _store_kv(case, rng, kv, live, device)
    gap = 24 if case.strided else 0
    dtype = DTYPES[case.q_dtype]
    rope: Tensor | None
    if case.q_layout == "fused":
        fused = _filled(torch.cat([q_nope, q_rope], -1), dtype, device, gap, gap)
        nope, rope = fused[..., : case.d_latent], fused[..., case.d_latent :]
    elif case.q_layout == "transposed":
        nope = _filled(q_nope.transpose(0, 1), dtype, device, gap, gap).transpose(0, 1)
        rope = _filled(q_rope.transpose(0, 1), dtype, device, gap, gap).transpose(0, 1)
    else:
        nope, rope = _filled(q_nope, dtype, device, gap, gap), _filled(q_rope, dtype, device, gap, gap)

    cu_seqlens_q = None
    if case.query_lens:
        cu_seqlens_q = torch.tensor([0, *case.query_lens]).cumsum(0).int().to(device)
    block_table = _strided(tuple(table.shape), torch.int32, device, 3 if case.strided else 0)
    block_table.copy_(table)
    return Inputs(
        case=case,
        seed=seed,
        q_nope=nope,
        q_rope=rope if case.d_rope else None,
        kv_cache=kv_cache,
        block_table=block_table,
        cache_seqlens=lens.int().to(device),
        cu_seqlens_q=cu_seqlens_q,
        tree_mask=_tree_mask(case, rng, device) if case.tree_mask else None,
        kv_scale=kv_scale,
        kv_group_scales=group_scales,
        softmax_scale=scale,
    )


def share_pages(kind: str, table: Tensor, pages_of: list[int], seed: int) -> None:
    """Lets sequences begin with the pages of others, for `case.tables`:

    own        none does
    common     all begin as the first one does, but for the last page of the shortest that is more than half as long as the longest
    families   each begins as one before it does, for some pages or for all that it has: a tree of conversations
    twice      every other sequence is the one before it, as far as it goes
    middle     pages of others in the middle, or at the beginning and again after a page of its own
    """
    rng = random.Random(seed)
    for b in range(1, len(pages_of)):
        if kind == "common":
            count = min(min((n for n in pages_of if 2 * n > max(pages_of)), default=1) - 1, pages_of[0], pages_of[b])
            table[b, :count] = table[0, :count]
        elif kind == "families" and rng.random() < 0.9:
            other = rng.randrange(b)
            most = min(pages_of[b], pages_of[other])
            count = rng.choice([most, rng.randint(0, most)])
            table[b, :count] = table[other, :count]
        elif kind == "twice" and b % 2:
            count = min(pages_of[b], pages_of[b - 1])
            table[b, :count] = table[b - 1, :count]
        elif kind == "middle":
            other = rng.randrange(b)
            most = min(pages_of[b], pages_of[other])
            hole = rng.randint(0, max(0, most - 1))
            own = table[b, hole].clone()
            table[b, :most] = table[other, :most]
            if most:
                table[b, hole] = own


def _contents(case: Case, rng: torch.Generator, lens: Tensor, table: Tensor, live: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """KV values of the live rows [live rows, d], q_nope, q_rope, all FP32, and the softmax scale, for `case.content`:

    normal        logits with a spread of about 1.5
    one_hot       each query row asks for one KV row, all rows in turn
    huge_logits   every logit is 2^17 or -2^17 (by head) plus a small one, all exact in FP32
    equal_logits  every logit of a row is the same
    rope, latent  one part of the dot product outweighs the other 100 times
    subnormal     queries that are subnormal in FP16, KV that is subnormal in the cache's type among ordinary values
    saturated     KV at the largest finite values of E4M3
    far_scales    group scales of either sign over 26 powers of two, a third of them zero
    zero_kv       KV of zeros
    live_nan      one NaN in a row that is attended to
    """
    width = case.d_latent + case.d_rope
    num_live = int(live.sum())
    kv = torch.randn(num_live, width, generator=rng) * VALUE_RMS
    q = torch.randn(case.rows, case.heads, width, generator=rng) * (1.5 / VALUE_RMS)
    scale = width**-0.5
    index_of = torch.full(live.shape, -1)  # [page, row] -> live row
    index_of[live] = torch.arange(num_live)

    if case.content == "one_hot":
        # q = the KV row it asks for: its logit is |row|^2 * scale = 100, the others have a spread of 100 / sqrt(width).
        scale = 100.0 / (width * VALUE_RMS**2)
        kv = kv.to(DTYPES["bf16"]).float()
        for b, length in enumerate(lens.tolist()):
            if length > 0:
                t = (torch.arange(case.heads) + b * case.heads) % length
                rows = index_of[table[b, t // case.page_size].long(), t % case.page_size]
                q[b] = kv[rows]
    elif case.content == "huge_logits":
        scale = 1.0
        kv[:, :8] = torch.randint(-2, 3, (num_live, 8), generator=rng) * 0.0625
        kv[:, case.d_latent :] = 0.0
        kv[:, case.d_latent] = 256.0
        q.zero_()
        q[..., :8] = torch.randint(0, 2, (case.rows, case.heads, 8), generator=rng) * 16.0 - 8.0
        q[..., case.d_latent] = 512.0
        q[:, 1::2, case.d_latent] = -512.0
    elif case.content == "equal_logits":
        kv[:, case.d_latent :] = kv[:1, case.d_latent :]
        q[..., : case.d_latent] = 0.0
    elif case.content in ("rope", "latent"):
        part = slice(0, case.d_latent) if case.content == "rope" else slice(case.d_latent, None)
        q[..., part] *= 0.01
    elif case.content == "subnormal":
        q *= 2.0**-14 * VALUE_RMS / 4  # most are below 2^-14, FP16's smallest normal number
        scale *= 2.0**14 * 4 / VALUE_RMS
        smallest = {"bf16": 2.0**-133, "fp16": 2.0**-24}.get(case.kv, 0.0)
        tiny = torch.rand(kv.shape, generator=rng) < 0.25
        kv[tiny] = torch.randint(-3, 4, (int(tiny.sum()),), generator=rng) * smallest
    elif case.content == "saturated":
        kv = torch.where(torch.rand(kv.shape, generator=rng) < 0.5, -FP8_MAX, FP8_MAX)
        q *= VALUE_RMS / FP8_MAX
    elif case.content == "zero_kv":
        kv.zero_()
    elif case.content == "live_nan":
        b = int(lens.argmax())
        t = int(lens[b]) // 2
        kv[index_of[table[b, t // case.page_size].long(), t % case.page_size], case.d_latent // 3] = math.nan
    elif case.content not in ("normal", "far_scales"):
        raise ValueError(f"content is {case.content!r}")
    return kv, q[..., : case.d_latent], q[..., case.d_latent :], scale


def _tree_mask(case: Case, rng: torch.Generator, device: torch.device | str) -> Tensor:
    """Bits of the drafts that each query token sees, for `case.tree_mask`; those past a sequence's drafts are random.

    tree    itself, and what one of the drafts before it sees
    random  any
    cycle   itself and the one after it; the last one, the first
    none    not even itself
    all     all
    chain   itself and all before it: causal
    """
    width = case.max_query_len
    sees = torch.rand(case.rows, -(-width // 32) * 32, generator=rng) < 0.5
    row = 0
    for count in case.query_counts:
        mine = sees[row : row + count, :count]
        if case.tree_mask == "tree":
            mine[:] = torch.eye(count, dtype=torch.bool)
            for i in range(1, count):
                mine[i] |= mine[int(torch.randint(i, (), generator=rng))]
        elif case.tree_mask == "cycle":
            mine[:] = torch.eye(count, dtype=torch.bool) | torch.eye(count, dtype=torch.bool).roll(1, dims=1)
        elif case.tree_mask == "chain":
            mine[:] = torch.ones(count, count, dtype=torch.bool).tril()
        elif case.tree_mask != "random":
            mine[:] = {"none": False, "all": True}[case.tree_mask]
        row += count
    words = torch.from_numpy(np.packbits(sees.numpy(), axis=1, bitorder="little").view(np.int32))
    mask = _strided(tuple(words.shape), torch.int32, device, 3 if case.strided else 0)
    return mask.copy_(words)


def _store_kv(
    case: Case, rng: torch.Generator, kv: Tensor, live: Tensor, device: torch.device | str
) -> tuple[Tensor, float | Tensor | None, Tensor | None]:
    """The cache in the case's format with `kv` [live rows, d] in its live rows and poison elsewhere, and its scales."""
    num_pages, page = live.shape
    live = live.to(device)

    def store(rows: Tensor, dtype: torch.dtype, row_gap: int, page_gap: int) -> Tensor:
        view = _strided((num_pages, page, rows.shape[-1]), dtype, device, page_gap, row_gap)
        if dtype == torch.float8_e4m3fn:  # not every operation on FP8 tensors exists: write bytes
            view.view(torch.uint8)[live] = rows.to(dtype).view(torch.uint8).to(device)
        else:
            view[live] = rows.to(dtype).to(device)
        return view

    if case.kv in DTYPES:
        return store(kv, DTYPES[case.kv], case.row_gap, case.page_gap), None, None

    scale = case.kv_scale
    if scale is None and case.kv not in SCALED_ROWS:
        scale = float(torch.rand((), generator=rng)) * 0.1 + 0.02  # E4M3 values of about 1 to 5, steps of 2^-3 of them
    if case.content == "saturated":
        scale = 1.0
    latent, rope = kv[:, : case.d_latent], kv[:, case.d_latent :]
    groups = case.d_latent // GROUP
    divisor = scale if scale else 0.05

    def quantise(values: Tensor) -> Tensor:
        return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)

    if case.kv == "e4m3":
        cache = store(quantise(kv / divisor), torch.float8_e4m3fn, case.row_gap, case.page_gap)
        group_scales = None
    else:
        group = torch.rand(len(kv), groups, generator=rng) * 1.5 + 0.5
        if case.content == "far_scales":
            group *= torch.exp2(torch.randint(-24, 2, group.shape, generator=rng))
            group *= torch.randint(-1, 2, group.shape, generator=rng)
        if case.kv in SCALED_ROWS:
            group, divisor = group * 0.05, 1.0
        spread = group.repeat_interleave(GROUP, dim=1)
        latent8 = quantise(latent / (divisor * spread))
        if case.kv in SCALED_ROWS:
            parts = [latent8.view(torch.uint8), group.view(torch.uint8), rope.to(torch.bfloat16).contiguous().view(torch.uint8)]
            cache = store(torch.cat(parts, -1), torch.uint8, case.row_gap, case.page_gap)
            return cache, None, None
        both = torch.cat([latent8.view(torch.uint8), quantise(rope / divisor).view(torch.uint8)], -1)
        cache = store(both.view(torch.float8_e4m3fn), torch.float8_e4m3fn, case.row_gap, case.page_gap)
        group_scales = store(group, torch.float32, 0, 8 if case.strided else 0)
    on_device: float | Tensor | None = scale
    if case.kv_scale_on_device:
        on_device = torch.tensor([scale], dtype=torch.float32, device=device)
    return cache, on_device, group_scales


# ---- Reference -------------------------------------------------------------------------------------------------------


def dequantise(inputs: Inputs, pages: Tensor, rows: Tensor) -> Tensor:
    """FP64 values [n, d] of the cache's tokens (pages[i], rows[i])."""
    case = inputs.case
    if case.kv in DTYPES:
        return inputs.kv_cache[pages, rows].double()
    if case.kv in SCALED_ROWS:
        raw = inputs.kv_cache[pages, rows]
        latent = raw[:, :512].contiguous().view(torch.float8_e4m3fn).double()
        group = raw[:, 512:528].contiguous().view(torch.float32).double()
        rope = raw[:, 528:].contiguous().view(torch.bfloat16).double()
        return torch.cat([latent * group.repeat_interleave(GROUP, dim=1), rope], -1)
    scale = inputs.kv_scale.double() if isinstance(inputs.kv_scale, Tensor) else inputs.kv_scale
    # FP8 on the CPU has no indexing of its own: gather bytes
    values = inputs.kv_cache.view(torch.uint8)[pages, rows].view(torch.float8_e4m3fn).double()
    if inputs.kv_group_scales is not None:
        group = inputs.kv_group_scales[pages, rows].double()
        values[:, : case.d_latent] *= group.repeat_interleave(GROUP, dim=1)
    return values * scale


def reference(inputs: Inputs) -> Expected:
    """Softmax attention as etap.h defines it, in FP64, from the very storage that the library reads."""
    case = inputs.case
    device = inputs.device
    lens = inputs.cache_seqlens.tolist()
    counts = list(case.query_lens) if case.query_lens else [case.query_len] * len(lens)
    first_row = [0]
    for count in counts:
        first_row.append(first_row[-1] + count)
    q = inputs.q_nope if inputs.q_rope is None else torch.cat([inputs.q_nope, inputs.q_rope], -1)
    out = torch.zeros(first_row[-1], case.heads, case.d_latent, dtype=torch.float64, device=device)
    lse = torch.full((first_row[-1], case.heads), -math.inf, dtype=torch.float64, device=device)
    size = torch.zeros_like(lse)
    squares, num_values = 0.0, 0

    # Sequences of equal length and query count go through one batched product.
    same: dict[tuple[int, int], list[int]] = {}
    for b, (length, count) in enumerate(zip(lens, counts, strict=True)):
        if length > 0 and count > 0:
            same.setdefault((length, count), []).append(b)
    for (length, count), members in same.items():
        step = max(1, 2**26 // (length * (case.d_latent + case.d_rope)))
        for start in range(0, len(members), step):
            seqs = members[start : start + step]
            tokens = torch.arange(length, device=device)
            index = torch.tensor(seqs, device=device)
            pages = inputs.block_table[index][:, tokens // case.page_size].long()
            rows = (tokens % case.page_size).expand(len(seqs), -1)
            kv = dequantise(inputs, pages.reshape(-1), rows.reshape(-1)).view(len(seqs), length, -1)
            squares += float(kv[..., : case.d_latent].square().sum())
            num_values += kv[..., : case.d_latent].numel()

            q_rows = torch.tensor([[first_row[b] + i for i in range(count)] for b in seqs], device=device)
            queries = q[q_rows].double().flatten(1, 2)  # [sequences, count * heads, d]
            logits = queries @ kv.transpose(1, 2) * inputs.softmax_scale
            sizes = queries.abs() @ kv.abs().transpose(1, 2) * abs(inputs.softmax_scale)
            if inputs.tree_mask is not None:
                draft = (tokens - (length - count)).clamp(min=0)
                bits = inputs.tree_mask[q_rows][..., draft // 32] >> draft % 32 & 1
                hidden = ((bits == 0) & (tokens >= length - count)).repeat_interleave(case.heads, dim=1)
                logits = logits.masked_fill(hidden, -math.inf)
                sizes = sizes.masked_fill(hidden, 0.0)
            elif case.causal:
                visible = length - count + 1 + torch.arange(count, device=device)
                hidden = tokens[None, :] >= visible.repeat_interleave(case.heads)[:, None]
                logits = logits.masked_fill(hidden, -math.inf)
                sizes = sizes.masked_fill(hidden, 0.0)
            row_lse = logits.logsumexp(-1, keepdim=True)
            weights = torch.where(row_lse == -math.inf, 0.0, (logits - row_lse).exp())
            shape = (len(seqs), count, case.heads)
            out[q_rows] = (weights @ kv[..., : case.d_latent]).view(*shape, -1)
            lse[q_rows] = row_lse.view(shape)
            size[q_rows] = sizes.amax(-1).view(shape)
    if case.lse_base == "2":
        lse = lse / math.log(2)
    lse = torch.where(lse == -math.inf, case.empty_lse, lse)
    return Expected(out, lse, size, math.sqrt(squares / max(1, num_values)))


# ---- Comparison ------------------------------------------------------------------------------------------------------

# (absolute at values of VALUE_RMS, relative): FlashMLA's for BF16, FlashInfer's for FP16. An element is right when either holds.
OUT_TOLERANCE = {"bf16": (8e-4, 2.01 / 128), "fp16": (1e-3, 1e-3)}
COSINE_TOLERANCE = 5e-6
LSE_TOLERANCE = (1e-6, 8.01 / 65536)


def check(inputs: Inputs, out: Tensor, lse: Tensor | None, expected: Expected, *, device: str = "") -> None:
    """Element-wise comparison: NaN and infinities in the same places; absolute or relative error of each element; cosine difference of
    all rows and of each. The absolute tolerance of out follows the size of the values and of the logits, that of lse the
    latter. device: that computed, where it is not the inputs'."""
    case = inputs.case
    tokens = expected.out.shape[0]
    where = f"{case.name} (seed {inputs.seed})"
    absolute, relative = OUT_TOLERANCE["fp16" if "fp16" == case.q_dtype == case.out else "bf16"]
    value_rms = expected.value_rms if math.isfinite(expected.value_rms) else VALUE_RMS
    absolute *= max(1.0, value_rms / VALUE_RMS)
    # FP32 knows a logit of size s to s * 2^-24, and so a weight to that relative error: a hundredth where logits are 2^17. SM90 kernels
    # round a value times its group scale to FP16 where rows are on M: up to 2^-10 of each term.
    rounded = case.kv in ("e4m3_group", "e4m3_656", "e4m3_528") and "cpu (" not in etap.device_info(device or inputs.device.type).name
    logit_error = 2.0**-12 if rounded else 2.0**-24
    size = expected.logit_size.nan_to_num(1.0).clamp(min=1.0)
    of_weights = size[..., None] * (logit_error * value_rms)
    _check_elements(f"out of {where}", out[:tokens].double(), expected.out, absolute + of_weights.expand_as(expected.out), relative)
    if lse is not None:
        _check_elements(f"lse of {where}", lse[:tokens].double(), expected.lse, max(LSE_TOLERANCE[0], logit_error) * size, LSE_TOLERANCE[1])

    assert not out[tokens:].any(), f"out of {where}: rows past the last query token are not 0"
    if lse is not None:
        assert (lse[tokens:] == case.empty_lse).all(), f"lse of {where}: rows past the last query token are not {case.empty_lse}"

    got, want = out[:tokens].double().flatten(0, 1), expected.out.flatten(0, 1)
    judged = want.isfinite().all(-1) & (want != 0).any(-1)
    got, want = got[judged], want[judged]
    if len(got) == 0:
        return
    # Relative errors of e of the weights turn a vector by e^2 / 2, which matters for logits beyond 1e4 only.
    turn = (expected.logit_size.flatten()[judged] * logit_error).square() / 2
    of_all = 1 - 2 * float((got * want).sum()) / float((got.square() + want.square()).sum())
    allowed = COSINE_TOLERANCE + float(turn.mean())
    assert of_all <= allowed, f"out of {where}: cosine difference {of_all:.3g} > {allowed:.3g}"
    # A single row may be one whose values nearly cancel, which leaves more of the rounding.
    of_rows = 1 - 2 * (got * want).sum(-1) / (got.square() + want.square()).sum(-1)
    excess = float((of_rows - turn).max())
    assert excess <= 10 * COSINE_TOLERANCE, f"out of {where}: cosine difference of one row {excess:.3g} > {10 * COSINE_TOLERANCE}"


def _check_elements(what: str, got: Tensor, want: Tensor, absolute: Tensor, relative: float) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    for kind, mask in (("NaN", torch.isnan), ("+inf", lambda t: t == math.inf), ("-inf", lambda t: t == -math.inf)):
        differ = mask(got) != mask(want)
        assert not differ.any(), f"{what}: {kind} in other places, first at {differ.nonzero()[0].tolist()}, {int(differ.sum())} in all"
    finite = want.isfinite()
    error = torch.where(finite, (got - want).abs(), 0.0)
    wrong = finite & (error > absolute) & (error > relative * want.abs())
    if wrong.any():
        at = tuple(int(i) for i in torch.unravel_index((error * wrong).argmax(), error.shape))
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ; worst at {list(at)}: {float(got[at])} instead of "
            f"{float(want[at])} (absolute tolerance {float(absolute[at]):.3g}, relative {relative:.3g})"
        )
