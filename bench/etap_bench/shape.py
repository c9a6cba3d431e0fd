"""What is computed: the shape of a decode-attention call, and the bytes and FLOP that any kernel needs for it."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etap_py.problem import Problem

BLOCK_TOKENS = 64  # KV tokens that a kernel works on at a time

Block = tuple[Any, int]  # the name of a block of KV tokens, which is hashable and stands for all before it too, and their number

_NAME = re.compile(
    r"(?P<kv_format>\w+)-(?P<batch>\d+)x(?P<context>\d+)(?P<k>k?)-h(?P<heads>\d+)"
    r"(?:-q(?P<query_len>\d+))?(?:-p(?P<page_size>\d+))?(?:-sm(?P<num_sms>\d+))?(?:-d(?P<d_latent>\d+)_(?P<d_rope>\d+))?"
    r"(?P<sparse>-sparse)?(?P<ragged>-ragged)?"
)
_DIMENSIONS = ((512, 64), (512, 0), (256, 64))  # d_latent, d_rope
_LARGEST = {"batch": 65536, "context": 2**31 - 1, "num_heads": 128, "query_len": 32767}  # as etap.h allows
_WIDEST = 65536  # list of slots, as etap.h allows
_VALUE_BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1, "e4m3_group": 1}
_ROWS = {"e4m3_656": (656, (512, 64)), "e4m3_528": (528, (512, 0))}  # formats with rows of their own: bytes, dimensions


def check_layer(kv_format: str, page_size: int, d_latent: int, d_rope: int) -> None:
    """Raises ValueError for a KV cache that libetap does not know (etap.h)."""
    formats = (*_VALUE_BYTES, *_ROWS)
    if kv_format not in formats:
        raise ValueError(f"kv_format is {kv_format!r}; allowed: {', '.join(formats)}")
    if not 1 <= page_size <= 256 or page_size & (page_size - 1):
        raise ValueError(f"page_size is {page_size}; allowed: powers of two from 1 to 256")
    allowed = (_ROWS[kv_format][1],) if kv_format in _ROWS else _DIMENSIONS
    if (d_latent, d_rope) not in allowed:
        raise ValueError(f"(d_latent, d_rope) is ({d_latent}, {d_rope}); allowed with {kv_format}: {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class Shape:
    """One layer's call.

    lengths: KV tokens of each sequence, the new ones included
    query_lens: query tokens of each sequence; (): one each
    kv_format: as in etap_py.Problem
    num_sms: SMs to use at most; 0: all
    context: what the lengths go up to; 0: the longest
    sparse: each query token, counted by batch, has a list of slots anywhere in the pool. lengths says how many of its slots count, and
        context how wide a list is
    shared: the blocks each sequence begins with; sequences with a block of the same name share the whole pages up to its end. (): none
        share
    """

    lengths: tuple[int, ...]
    heads: int
    query_lens: tuple[int, ...] = ()
    kv_format: str = "bf16"
    page_size: int = 64
    num_sms: int = 0
    d_latent: int = 512
    d_rope: int = 64
    context: int = 0
    sparse: bool = False
    shared: tuple[tuple[Block, ...], ...] = ()
    shared_prefixes: bool = False  # ETAP reads what sequences begin with once for several of them

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_lens", self.query_lens or (1,) * self.batch)
        object.__setattr__(self, "context", self.context or max(self.lengths, default=0))
        numbers = {"batch": self.batch, "context": self.context, "num_heads": self.heads, "query_len": self.query_len}
        for name, value in numbers.items():
            if not 1 <= value <= _LARGEST[name]:
                raise ValueError(f"{name} is {value}; allowed: 1 to {_LARGEST[name]}")
        if self.num_sms < 0:
            raise ValueError(f"num_sms is {self.num_sms}; allowed: 0 and more")
        check_layer(self.kv_format, self.page_size, self.d_latent, self.d_rope)
        least, most = min(self.lengths), max(self.lengths)
        if least < 0 or most > self.context:
            raise ValueError(f"lengths has entries from {least} to {most}; allowed: 0 to {self.context}, the context")
        if most == 0:
            raise ValueError(f"lengths has {self.batch} zeros only; allowed: one entry or more above 0")
        if len(self.query_lens) != self.batch:
            raise ValueError(f"query_lens has {len(self.query_lens)} entries; allowed: {self.batch}, as lengths has")
        if self.sparse and (self.query_len, self.context > _WIDEST) != (1, False):
            raise ValueError(
                f"query_len is {self.query_len} and context {self.context}; allowed with lists: 1, and widths from 1 to {_WIDEST}"
            )

    @classmethod
    def equal(cls, batch: int, context: int, heads: int, query_len: int = 1, **others: Any) -> Shape:
        """`batch` sequences of the same length with the same number of query tokens. Raises ValueError for what libetap does not take."""
        if not 1 <= batch <= _LARGEST["batch"]:
            raise ValueError(f"batch is {batch}; allowed: 1 to {_LARGEST['batch']}")
        return cls((context,) * batch, heads, (query_len,) * batch, **others)

    @classmethod
    def parse(cls, name: str, lengths: tuple[int, ...] = ()) -> Shape:
        """The shape of a name like "bf16-16x4K-h16-q2": format, batch x context, heads, then what differs from the defaults (q: query
        tokens, p: page size, sm: SMs, d: d_latent_d_rope; "-sparse": query tokens x slots of a list). "-ragged" at the end says that
        `lengths` are needed too. Raises ValueError."""
        found = _NAME.fullmatch(name.lower())
        if found is None:
            raise ValueError(
                f"shape is {name!r}; allowed: names like 'bf16-16x4K-h16', with -q2, -p16, -sm66, -d512_0, -sparse for what differs"
            )
        if bool(found["ragged"]) != bool(lengths):
            raise ValueError(f"shape is {name!r} with {len(lengths)} lengths; allowed: lengths for names that end in -ragged only")
        given: dict[str, Any] = {
            key: value for key, value in found.groupdict().items() if value is not None and key not in ("k", "sparse", "ragged")
        }
        given = {key: value if key == "kv_format" else int(value) for key, value in given.items()}
        given["context"] *= 1024 if found["k"] else 1
        given["sparse"] = found["sparse"] is not None
        if not lengths:
            return cls.equal(**given)
        batch, query_len = given.pop("batch"), given.pop("query_len", 1)
        if len(lengths) != batch:
            raise ValueError(f"shape is {name!r} with {len(lengths)} lengths; allowed: {batch}, its batch")
        return cls(lengths, query_lens=(query_len,) * batch, **given)

    def ragged(self) -> Shape:
        """The same batch with lengths as serving has them, many short and few long: the context times the squares of 1 / batch .. 1, in a
        fixed random order. Raises ValueError for lists, whose widths don't differ."""
        if self.sparse:
            raise ValueError(f"shape is {self.name!r}; allowed where lengths are to differ: shapes without -sparse")
        lengths = [max(1, round(self.context * ((i + 1) / self.batch) ** 2)) for i in range(self.batch)]
        random.Random(0).shuffle(lengths)
        return replace(self, lengths=tuple(lengths))

    @cached_property
    def name(self) -> str:
        """What `parse` reads; with query tokens that differ it says the most."""
        context = f"{self.context // 1024}K" if self.context % 1024 == 0 else str(self.context)
        text = f"{self.kv_format}-{self.batch}x{context}-h{self.heads}"
        text += f"-q{self.query_len}" * (self.query_len != 1) + f"-p{self.page_size}" * (self.page_size != 64)
        text += f"-sm{self.num_sms}" * (self.num_sms != 0)
        text += f"-d{self.d_latent}_{self.d_rope}" * ((self.d_latent, self.d_rope) != (512, 64))
        return text + "-sparse" * self.sparse + "-ragged" * (set(self.lengths) != {self.context})

    def problem(self, device: str) -> Problem:
        """What libetap is asked: "cpu", "cuda" or "cuda:1"."""
        from etap_py.problem import Problem

        return Problem(
            num_heads=self.heads,
            batch=self.batch,
            page_size=self.page_size,
            d_latent=self.d_latent,
            d_rope=self.d_rope,
            q_dtype="fp16" if self.kv_format == "fp16" else "bf16",
            kv_format=self.kv_format,
            max_query_len=self.query_len,
            total_q=0 if self.equal_query_lens else self.query_tokens,
            num_sms=self.num_sms,
            topk=self.context if self.sparse else 0,
            shared_prefixes=self.shared_prefixes,
            device=device,
        )

    @property
    def adjacent(self) -> int:
        """KV tokens that lie together: those of a page, or one of a list."""
        return 1 if self.sparse else self.page_size

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @cached_property
    def query_len(self) -> int:
        """The most query tokens of a sequence."""
        return max(self.query_lens, default=0)

    @cached_property
    def equal_query_lens(self) -> bool:
        return len(set(self.query_lens)) == 1

    @cached_property
    def query_tokens(self) -> int:
        """Of all sequences."""
        return sum(self.query_lens)

    @property
    def rows(self) -> int:
        """Query rows that share a sequence's KV rows: heads times the most query tokens."""
        return self.heads * self.query_len

    @cached_property
    def tokens(self) -> int:
        """KV tokens of all sequences."""
        return sum(self.lengths)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """KV blocks of each sequence."""
        return tuple(-(-length // BLOCK_TOKENS) for length in self.lengths)

    @property
    def fp8(self) -> bool:
        return self.kv_format.startswith("e4m3")

    @property
    def d_qk(self) -> int:
        return self.d_latent + self.d_rope

    @property
    def token_bytes(self) -> int:
        """Bytes of the KV cache for one token, scales included."""
        if self.kv_format in _ROWS:
            return _ROWS[self.kv_format][0]
        return self.d_qk * _VALUE_BYTES[self.kv_format] + (self.d_latent // 128 * 4 if self.kv_format == "e4m3_group" else 0)

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache that a layer reads, each sequence for itself. Queries and output are less than a row each."""
        return self.tokens * self.token_bytes

    @cached_property
    def distinct_kv_bytes(self) -> int:
        """Bytes of KV cache that a layer reads when what sequences share is counted once."""
        pages = [page for blocks in self.shared for page in shared_pages(blocks, self.page_size)]
        repeated = (len(pages) - len(set(pages))) * self.page_size
        return (self.tokens - repeated) * self.token_bytes

    @property
    def flop(self) -> int:
        """2 · (2 d_latent + d_rope) for every query token, head and KV token; what the causal mask hides is counted too."""
        pairs = sum(length * count for length, count in zip(self.lengths, self.query_lens, strict=True))
        return 2 * (self.d_qk + self.d_latent) * self.heads * pairs


def shared_pages(blocks: tuple[Block, ...], page_size: int) -> Iterator[Hashable]:
    """Names of the whole pages that a prompt's blocks fill: the block that a page ends in, whose name stands for all before it, and where
    in it. Blocks may be larger or smaller than pages."""
    begin, page_end = 0, page_size
    for name, tokens in blocks:
        while page_end <= begin + tokens:
            yield name, page_end - begin
            page_end += page_size
        begin += tokens
