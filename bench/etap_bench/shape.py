"""What is computed: the shape of a decode-attention call, and the bytes and FLOP that any kernel needs for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

BLOCK_TOKENS = 64  # KV tokens that a kernel works on at a time

_NAME = re.compile(
    r"(?P<kv_format>\w+)-(?P<batch>\d+)x(?P<context>\d+)(?P<k>k?)-h(?P<heads>\d+)"
    r"(?:-q(?P<query_len>\d+))?(?:-p(?P<page_size>\d+))?(?:-sm(?P<num_sms>\d+))?(?:-d(?P<d_latent>\d+)_(?P<d_rope>\d+))?"
    r"(?P<ragged>-ragged)?"
)
_DIMENSIONS = ((512, 64), (512, 0), (256, 64))  # d_latent, d_rope
_LARGEST = {"batch": 65536, "context": 2**31 - 1, "num_heads": 128, "query_len": 32767}  # as etap.h allows
_ROW_BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1, "e4m3_group": 1}  # a value; e4m3_656 has rows of its own


def check_layer(kv_format: str, page_size: int, d_latent: int, d_rope: int) -> None:
    """Raises ValueError for a KV cache that libetap does not know (etap.h)."""
    formats = (*_ROW_BYTES, "e4m3_656")
    if kv_format not in formats:
        raise ValueError(f"kv_format is {kv_format!r}; allowed: {', '.join(formats)}")
    if not 1 <= page_size <= 256 or page_size & (page_size - 1):
        raise ValueError(f"page_size is {page_size}; allowed: powers of two from 1 to 256")
    allowed = _DIMENSIONS[:1] if kv_format == "e4m3_656" else _DIMENSIONS
    if (d_latent, d_rope) not in allowed:
        raise ValueError(f"(d_latent, d_rope) is ({d_latent}, {d_rope}); allowed with {kv_format}: {', '.join(map(str, allowed))}")


@dataclass(frozen=True)
class Shape:
    """One call. `batch` sequences of `context` KV tokens each, or, when `lengths` is given, of those lengths, up to `context`.

    kv_format: as in etap_py.Problem
    num_sms: SMs to use at most; 0: all
    """

    batch: int
    context: int
    heads: int
    query_len: int = 1
    kv_format: str = "bf16"
    page_size: int = 64
    num_sms: int = 0
    d_latent: int = 512
    d_rope: int = 64
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("context", self.context), ("num_heads", self.heads), ("query_len", self.query_len)):
            if not 1 <= value <= _LARGEST[name]:
                raise ValueError(f"{name} is {value}; allowed: 1 to {_LARGEST[name]}")
        if self.num_sms < 0:
            raise ValueError(f"num_sms is {self.num_sms}; allowed: 0 and more")
        check_layer(self.kv_format, self.page_size, self.d_latent, self.d_rope)
        if self.lengths and (len(self.lengths) != self.batch or min(self.lengths) < 0 or max(self.lengths) > self.context):
            raise ValueError(f"lengths has {len(self.lengths)} entries up to {max(self.lengths)}; allowed: batch many from 0 to context")

    @classmethod
    def parse(cls, name: str, lengths: tuple[int, ...] = ()) -> Shape:
        """The shape of a name like "bf16-16x4K-h16-q2": format, batch x context, heads, then what differs from the defaults (q: query
        tokens, p: page size, sm: SMs, d: d_latent_d_rope). "-ragged" at the end says that `lengths` are needed too."""
        found = _NAME.fullmatch(name.lower())
        if found is None:
            raise ValueError(f"shape is {name!r}; allowed: names like 'bf16-16x4K-h16', with -q2, -p16, -sm66, -d512_0 for what differs")
        if bool(found["ragged"]) != bool(lengths):
            raise ValueError(f"shape is {name!r} with {len(lengths)} lengths; allowed: lengths for names that end in -ragged only")
        given: dict[str, Any] = {key: value for key, value in found.groupdict().items() if value is not None and key not in ("k", "ragged")}
        given = {key: value if key == "kv_format" else int(value) for key, value in given.items()}
        given["context"] *= 1024 if found["k"] else 1
        return cls(**given, lengths=lengths)

    @cached_property
    def name(self) -> str:
        context = f"{self.context // 1024}K" if self.context % 1024 == 0 else str(self.context)
        text = f"{self.kv_format}-{self.batch}x{context}-h{self.heads}"
        text += f"-q{self.query_len}" * (self.query_len != 1) + f"-p{self.page_size}" * (self.page_size != 64)
        text += f"-sm{self.num_sms}" * (self.num_sms != 0)
        text += f"-d{self.d_latent}_{self.d_rope}" * ((self.d_latent, self.d_rope) != (512, 64))
        return text + "-ragged" * bool(self.lengths)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """KV blocks of each sequence."""
        lengths = self.lengths or (self.context,) * self.batch
        return tuple(-(-length // BLOCK_TOKENS) for length in lengths)

    @property
    def fp8(self) -> bool:
        return self.kv_format.startswith("e4m3")

    @property
    def rows(self) -> int:
        """Query rows that share a sequence's KV rows."""
        return self.heads * self.query_len

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.lengths else self.batch * self.context

    @property
    def d_qk(self) -> int:
        return self.d_latent + self.d_rope

    @property
    def token_bytes(self) -> int:
        """Bytes of the KV cache for one token."""
        if self.kv_format == "e4m3_656":
            return 656
        return self.d_qk * _ROW_BYTES[self.kv_format] + (self.d_latent // 128 * 4 if self.kv_format == "e4m3_group" else 0)

    @property
    def kv_bytes(self) -> int:
        """What has to come from memory: every KV row once. Queries and output are less than a row each."""
        return self.tokens * self.token_bytes

    @property
    def flop(self) -> int:
        """Useful work: QK^T over d_latent + d_rope, PV over d_latent, two FLOP a multiplication."""
        return 2 * self.tokens * self.rows * (self.d_qk + self.d_latent)
