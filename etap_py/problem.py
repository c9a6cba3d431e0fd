"""The problem, and the questions that can be asked about it and about devices."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from typing import Any

from etap_py.binding import CData, check, ffi, lib, new, text
from etap_py.tensors import dtype_name

_DTYPES = {"bf16": lib.ETAP_BF16, "fp16": lib.ETAP_FP16, "fp32": lib.ETAP_FP32}
_Q_DTYPES = {name: _DTYPES[name] for name in ("bf16", "fp16")}
_KV_FORMATS = {
    "bf16": lib.ETAP_KV_BF16,
    "fp16": lib.ETAP_KV_FP16,
    "e4m3": lib.ETAP_KV_E4M3,
    "e4m3_group": lib.ETAP_KV_E4M3_GROUP,
    "e4m3_656": lib.ETAP_KV_E4M3_656,
    "e4m3_528": lib.ETAP_KV_E4M3_528,
}
ROW_BYTES = {"e4m3_656": 656, "e4m3_528": 528}  # of formats whose rows are bytes, scales among them
FORMATS_OF_ROWS = {size: name for name, size in ROW_BYTES.items()}
_DEVICE_TYPES = {"cpu": lib.ETAP_DEVICE_CPU, "cuda": lib.ETAP_DEVICE_CUDA}
_LSE_BASES = {"e": lib.ETAP_LSE_BASE_E, "2": lib.ETAP_LSE_BASE_2}
_EMPTY_LSE = {-math.inf: lib.ETAP_EMPTY_LSE_MINUS_INF, math.inf: lib.ETAP_EMPTY_LSE_PLUS_INF}


def _choose(name: str, value: Any, allowed: dict[Any, int]) -> int:
    number = allowed.get(value)
    if number is None:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(repr(key) for key in allowed)}")
    return number


def lse_base_number(lse_base: str) -> int:
    """etap_lse_base of "e" or "2"."""
    return _choose("lse_base", lse_base, _LSE_BASES)


def empty_lse_number(empty_lse: float) -> int:
    """etap_empty_lse of -inf or +inf."""
    return _choose("empty_lse", empty_lse, _EMPTY_LSE)


def dtype_number(name: str, dtype: str) -> int:
    """etap_dtype of "bf16", "fp16" or "fp32", for an argument called `name`."""
    return _choose(name, dtype, _DTYPES)


def device_numbers(device: str) -> tuple[int, int]:
    """(device_type, device_index) of "cpu", "cuda" or "cuda:1"."""
    kind, _, index = device.partition(":")
    number = _choose("device", kind, _DEVICE_TYPES)
    if index and not index.isdecimal():
        raise ValueError(f"device is {device!r}; allowed: 'cpu', 'cuda', 'cuda:0', 'cuda:1', ...")
    return number, int(index or 0)


@dataclass(frozen=True)
class Problem:
    """A shape: everything a kernel is chosen by, nothing that changes from step to step (`etap_problem` in etap.h).

    num_heads: query heads on this device, 1 to 128
    batch: sequences, 1 to 65536; padded ones have length 0
    page_size: tokens a page, a power of two from 1 to 256; with topk any number from 1
    d_latent, d_rope: (512, 64), (512, 0) or (256, 64)
    q_dtype: "bf16" or "fp16"; a 16-bit KV cache has the same type
    kv_format: "bf16", "fp16", "e4m3", "e4m3_group" (and scales a token and 128 values), "e4m3_656" (656-byte rows) or "e4m3_528"
        (without rope values); default: q_dtype
    out_dtype: "bf16", "fp16" or "fp32"; default: q_dtype
    max_query_len: query tokens a sequence at most; exactly that many when total_q is 0
    total_q: rows of q when query counts differ (ragged), an upper bound of cu_seqlens_q[batch]; else 0
    causal: query token i of n sees the first L - n + i + 1 tokens
    batch_invariant: a sequence's bits don't depend on what else is in the batch, nor on num_sms ("Invariance" in etap.h); force_cluster
        is not looked at then
    num_sms: multiprocessors (threads on the CPU device) to use at most; 0: all
    device: "cpu", "cuda" (torch's current device) or "cuda:1"
    force_tile, force_cluster: experiments; 0: the library decides, or what `etap tune` stored for the problem
    topk: sparse attention: slots in the list of each query token, 1 to 65536; 0: dense. Then batch counts query tokens, and causal means
        nothing: the lists say what a token sees. The CPU device computes it
    tree_mask: query tokens are drafts, 256 a sequence at most, and a mask says which of them each sees ("Trees" in etap.h). Then causal
        means nothing. The CPU device computes it
    shared_prefixes: KV pages with which several sequences begin are read once for them, if that saves time ("Prefixes" in etap.h);
        `Plan.update` then takes the block table. Not with topk or batch_invariant

    dtypes may also be torch's or NumPy's, device a torch.device. Raises ValueError for a name that is not listed; numbers are the
    library's to judge (`query`).
    """

    num_heads: int
    batch: int
    page_size: int = 64
    d_latent: int = 512
    d_rope: int = 64
    q_dtype: str = "bf16"
    kv_format: str = ""
    out_dtype: str = ""
    max_query_len: int = 1
    total_q: int = 0
    causal: bool = True
    batch_invariant: bool = False
    num_sms: int = 0
    device: str = "cpu"
    force_tile: int = 0
    force_cluster: int = 0
    topk: int = 0
    tree_mask: bool = False
    shared_prefixes: bool = False

    def __post_init__(self) -> None:
        def settle(name: str, value: str) -> None:
            object.__setattr__(self, name, value)

        settle("q_dtype", dtype_name(self.q_dtype))
        settle("kv_format", dtype_name(self.kv_format or self.q_dtype))
        settle("out_dtype", dtype_name(self.out_dtype or self.q_dtype))
        device = str(self.device)
        settle("device", f"cuda:{_current_cuda_device()}" if device == "cuda" else device)
        _choose("q_dtype", self.q_dtype, _Q_DTYPES)
        _choose("kv_format", self.kv_format, _KV_FORMATS)
        _choose("out_dtype", self.out_dtype, _DTYPES)
        device_numbers(self.device)

    @property
    def rows(self) -> int:
        """Rows of q and of the results."""
        return self.total_q or self.batch * self.max_query_len

    @property
    def kv_width(self) -> int:
        """Elements of a KV row."""
        return ROW_BYTES.get(self.kv_format, self.d_latent + self.d_rope)

    @property
    def tree_mask_words(self) -> int:
        """Words of a row's tree mask: a bit for each of max_query_len drafts."""
        return -(-self.max_query_len // 32)

    def to_c(self) -> CData:
        """The `etap_problem`."""
        device_type, device_index = device_numbers(self.device)
        flags = lib.ETAP_CAUSAL * (self.causal and not self.topk and not self.tree_mask) | lib.ETAP_RAGGED * (self.total_q > 0)
        flags |= lib.ETAP_BATCH_INVARIANT * self.batch_invariant | lib.ETAP_TREE_MASK * self.tree_mask
        flags |= lib.ETAP_SHARED_PREFIXES * self.shared_prefixes
        return new(
            "etap_problem",
            device_type=device_type,
            device_index=device_index,
            num_heads=self.num_heads,
            d_latent=self.d_latent,
            d_rope=self.d_rope,
            page_size=self.page_size,
            q_dtype=_DTYPES[self.q_dtype],
            kv_format=_KV_FORMATS[self.kv_format],
            out_dtype=_DTYPES[self.out_dtype],
            batch=self.batch,
            max_query_len=self.max_query_len,
            total_q=self.total_q,
            flags=flags,
            num_sms=self.num_sms,
            force_tile=self.force_tile,
            force_cluster=self.force_cluster,
            topk=self.topk,
        )


def _current_cuda_device() -> int:
    torch = sys.modules.get("torch")
    return int(torch.cuda.current_device()) if torch is not None and torch.cuda.is_initialized() else 0


@dataclass(frozen=True)
class Decision:
    """What the library decided for a problem (`etap_decision` in etap.h)."""

    kernel: str  # "sm90_bf16_token_split_n16", "cpu_avx512_bf16"
    reason: str  # a sentence
    tile_rows: int  # query rows (heads * query tokens) a tile
    num_tiles: int  # tiles that cover the rows of one sequence
    cluster_size: int  # CTAs that share one piece of a sequence; where lengths differ the plan may give each its own (etap.h)
    num_workers: int  # clusters (threads on the CPU device) launched
    max_splits: int  # the most pieces that one sequence can be cut into
    max_sharers: int = 0  # with shared_prefixes: sequences that read a common prefix together, at most; 1: none do; else 0


@dataclass(frozen=True)
class Shared:
    """What a plan's last update found to share (`etap_shared` in etap.h)."""

    groups: int  # prefixes that several sequences read together
    sequences: int  # that read one of them
    tokens: int  # KV tokens that are not read because another sequence of the group reads them


@dataclass(frozen=True)
class DeviceInfo:
    """A device (`etap_device_info` in etap.h)."""

    name: str
    usable: bool
    reason: str  # why it is not usable; "" when it is
    num_sms: int  # multiprocessors; on the CPU device, threads
    compute_capability: tuple[int, int]  # (0, 0) on the CPU device
    l2_bytes: int  # last-level cache


def device_count(device_type: str) -> int:
    """Devices of type "cuda" or "cpu" that this process sees."""
    count: int = lib.etap_device_count(_choose("device_type", device_type, _DEVICE_TYPES))
    return count


def device_info(device_type: str, index: int = 0) -> DeviceInfo:
    """What is known about a device. Index 0 of a type of which there is none: usable is False and reason says why."""
    info = new("etap_device_info")
    check(lib.etap_device_query(_choose("device_type", device_type, _DEVICE_TYPES), index, info))
    return DeviceInfo(
        name=text(info.name),
        usable=bool(info.usable),
        reason=text(info.reason),
        num_sms=info.num_sms,
        compute_capability=(info.compute_major, info.compute_minor),
        l2_bytes=info.l2_bytes,
    )


def decide(problem: Problem) -> Decision:
    """What the library makes of exactly this problem; `etap_py.query` takes what `etap tune` stored into account."""
    decision = new("etap_decision")
    check(lib.etap_query(problem.to_c(), decision))
    return Decision(
        kernel=text(decision.kernel),
        reason=text(decision.reason),
        tile_rows=decision.tile_rows,
        num_tiles=decision.num_tiles,
        cluster_size=decision.cluster_size,
        num_workers=decision.num_workers,
        max_splits=decision.max_splits,
        max_sharers=decision.max_sharers,
    )


@functools.lru_cache(maxsize=256)
def workspace_size(problem: Problem) -> int:
    """Bytes of workspace that a plan for this problem needs. Never shrinks when batch, total_q or num_sms grows."""
    size = ffi.new("size_t *")
    check(lib.etap_workspace_size(problem.to_c(), size))
    return int(size[0])
