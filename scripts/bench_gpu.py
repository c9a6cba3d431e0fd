#!/usr/bin/env python3
"""Times etap_run on this GPU against the stream ceiling and against the peers that are installed.

The ceiling is libetap's probe (libetap/probe/stream.cu): it brings the same shuffled pages into shared memory and does
no arithmetic, so ceiling / kernel is the fraction of what the memory allows. Everything is timed in one process:

* CUDA-graph replays, several calls in each graph, each call on another set of pages, so that more than twice the L2
  lies between two uses of a page;
* shuffled block tables, random data;
* rounds that take turns over ceiling, etap and peers; the median over the rounds counts;
* every output row compared with a float64 reference of the same inputs.

    python scripts/bench_gpu.py                       # the whole table
    python scripts/bench_gpu.py --quick
    python scripts/bench_gpu.py --filter '^bf16-16x16K-h16$' --energy
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import peers  # noqa: E402

import etap_py as etap  # noqa: E402

GRAPH_US = 2000.0  # a graph holds calls for about this long: its launch is then a fraction of a percent
ASSUMED_TBS = 3.0  # only to decide how many calls that is
COPY_ROWS = (16, 64)  # copy sizes tried for the ceiling: the faster counts
PLAN_CALLS = 32
ENERGY_SECONDS = 2.0
ROW_ERROR_LIMIT = 2e-2  # of a row's norm: BF16 rounding gives 2e-3, a wrong row about 1
E4M3_MAX = 448.0
FP8_SCALE = 1 / 64
K = 1024


@dataclass(frozen=True)
class Shape:
    """One row of the table: `batch` sequences of `context` tokens (ragged: random lengths up to it)."""

    batch: int
    context: int
    heads: int
    query_len: int = 1
    kv_format: str = "bf16"
    page_size: int = 64
    num_sms: int = 0
    ragged: bool = False
    d_latent: int = 512
    d_rope: int = 64
    group: str = "own"  # "table": the published comparison, whose geometric mean is a target
    quick: bool = False

    @cached_property
    def name(self) -> str:
        context = f"{self.context // K}K" if self.context % K == 0 else str(self.context)
        parts = [self.kv_format, f"{self.batch}x{context}", f"h{self.heads}"]
        parts += [f"q{self.query_len}"] * (self.query_len > 1)
        parts += [f"p{self.page_size}"] * (self.page_size != 64)
        parts += [f"sm{self.num_sms}"] * (self.num_sms > 0)
        parts += [f"d{self.d_latent}_{self.d_rope}"] * ((self.d_latent, self.d_rope) != (512, 64))
        parts += ["ragged"] * self.ragged
        return "-".join(parts)

    @cached_property
    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.context] * self.batch
        # Few long and many short sequences, as a serving batch has; the same on every run.
        random = torch.rand(self.batch, generator=torch.Generator().manual_seed(self.batch * 7919 + self.context))
        return [max(self.query_len, int(self.context * x**3)) for x in random.tolist()]

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def row_bytes(self) -> int:
        if self.kv_format == "e4m3_656":
            return 656
        return (self.d_latent + self.d_rope) * (1 if self.kv_format.startswith("e4m3") else 2)

    @property
    def kv_bytes(self) -> int:
        return self.tokens * (self.row_bytes + (self.d_latent // 128 * 4 if self.kv_format == "e4m3_group" else 0))


def shapes() -> list[Shape]:
    table = [
        Shape(1, 4 * K, 16, quick=True),
        Shape(1, 64 * K, 16, quick=True),
        Shape(16, K, 16, quick=True),
        Shape(16, 4 * K, 16),
        Shape(16, 16 * K, 16, quick=True),
        Shape(16, 64 * K, 16, quick=True),
        Shape(64, 4 * K, 16),
        Shape(128, 2 * K, 16),
        Shape(16, 16 * K, 8),
        Shape(16, 16 * K, 32),
        Shape(16, 16 * K, 64),
        Shape(16, 16 * K, 128, quick=True),
        Shape(16, 16 * K, 16, query_len=2),
        Shape(16, 16 * K, 16, query_len=4, quick=True),
    ]
    own = [
        # small: fixed cost
        Shape(1, 512, 16),
        Shape(1, K, 8),
        Shape(1, 16 * K, 16),
        Shape(2, 2 * K, 16),
        Shape(4, 8 * K, 16),
        Shape(8, 512, 16),
        Shape(32, 512, 16),
        Shape(256, 256, 16),
        # ragged: the normal case
        Shape(16, 16 * K, 16, ragged=True, quick=True),
        Shape(64, 8 * K, 16, ragged=True),
        Shape(128, 4 * K, 8, ragged=True),
        # head counts between the tiles
        Shape(16, 16 * K, 4),
        Shape(16, 16 * K, 5),
        Shape(16, 16 * K, 12),
        Shape(16, 16 * K, 20),
        Shape(16, 16 * K, 24),
        Shape(16, 16 * K, 40),
        Shape(16, 16 * K, 48),
        Shape(4, 8 * K, 96),
        # several query tokens: speculative decoding
        Shape(16, 8 * K, 8, query_len=4),
        Shape(16, 8 * K, 12, query_len=3),
        Shape(8, 8 * K, 16, query_len=8),
        # the other dimensions in use
        Shape(16, 16 * K, 16, d_latent=512, d_rope=0),
        Shape(16, 16 * K, 16, d_latent=256, d_rope=64),
        # page sizes
        Shape(16, 16 * K, 16, page_size=1, quick=True),
        Shape(1, 64 * K, 16, page_size=1),
        Shape(16, 16 * K, 16, page_size=16),
        Shape(16, 16 * K, 16, page_size=32),
        Shape(16, 16 * K, 16, page_size=128),
        # an SM budget
        Shape(16, 16 * K, 16, num_sms=44, quick=True),
        Shape(16, 16 * K, 16, num_sms=66),
        # FP8
        Shape(1, 4 * K, 16, kv_format="e4m3"),
        Shape(1, 64 * K, 16, kv_format="e4m3"),
        Shape(16, K, 16, kv_format="e4m3"),
        Shape(16, 16 * K, 8, kv_format="e4m3"),
        Shape(16, 16 * K, 16, kv_format="e4m3", quick=True),
        Shape(16, 64 * K, 16, kv_format="e4m3", quick=True),
        Shape(16, 16 * K, 16, query_len=4, kv_format="e4m3"),
        Shape(16, 16 * K, 128, kv_format="e4m3"),
        Shape(16, 16 * K, 16, page_size=1, kv_format="e4m3"),
        Shape(64, 8 * K, 16, ragged=True, kv_format="e4m3"),
        Shape(16, 16 * K, 16, kv_format="e4m3_group"),
        Shape(16, 16 * K, 16, kv_format="e4m3_656"),
    ]
    return [Shape(**{**asdict(s), "group": "table"}) for s in table] + own


# ---- Inputs ---------------------------------------------------------------------------------------------------------


class Arena:
    """KV rows of one format on the GPU, drawn once and shared by all shapes of that format."""

    def __init__(self, kv_format: str, d_latent: int, d_rope: int, tokens: int) -> None:
        self.kv_format, self.d_latent, self.d_rope = kv_format, d_latent, d_rope
        self.tokens = -(-tokens // 256) * 256
        width = d_latent + d_rope
        self.group_scales: torch.Tensor | None = None
        self.kv_scale = FP8_SCALE if kv_format in ("e4m3", "e4m3_group") else None
        if kv_format in ("bf16", "fp16"):
            dtype = torch.bfloat16 if kv_format == "bf16" else torch.float16
            self.rows = torch.empty(self.tokens, width, dtype=dtype, device="cuda").normal_()
        elif kv_format in ("e4m3", "e4m3_group"):
            self.rows = self._random_e4m3(width)
            if kv_format == "e4m3_group":
                self.group_scales = torch.empty(self.tokens, d_latent // 128, device="cuda").uniform_(0.5, 1.5)
        else:
            self.rows = torch.empty(self.tokens, 656, dtype=torch.uint8, device="cuda")
            self.rows[:, :512] = self._random_e4m3(512).view(torch.uint8)
            scales = torch.empty(self.tokens, 4, device="cuda").uniform_(0.5, 1.5) * FP8_SCALE
            self.rows[:, 512:528] = scales.view(torch.uint8)
            rope = torch.empty(self.tokens, 64, dtype=torch.bfloat16, device="cuda").normal_()
            self.rows[:, 528:] = rope.view(torch.uint8)

    def _random_e4m3(self, width: int) -> torch.Tensor:
        rows = torch.empty(self.tokens, width, dtype=torch.float8_e4m3fn, device="cuda")
        for part in rows.split(1 << 17):
            values = torch.empty(part.shape, device="cuda").normal_(std=1 / FP8_SCALE)
            part.copy_(values.clamp_(-E4M3_MAX, E4M3_MAX))
        return rows

    def pages(self, page_size: int) -> torch.Tensor:
        return self.rows.view(-1, page_size, self.rows.shape[1])

    def dequantise(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of these token numbers as float64."""
        rows = self.rows[tokens]
        if self.kv_format == "e4m3_656":
            latent = rows[..., :512].contiguous().view(torch.float8_e4m3fn).double().unflatten(-1, (4, 128))
            scales = rows[..., 512:528].contiguous().view(torch.float32).double()
            rope = rows[..., 528:].contiguous().view(torch.bfloat16).double()
            return torch.cat([(latent * scales[..., None]).flatten(-2), rope], dim=-1)
        values = rows.double()
        if self.kv_scale is not None:
            values *= self.kv_scale
        if self.group_scales is not None:
            groups = values[..., : self.d_latent].unflatten(-1, (-1, 128))
            groups *= self.group_scales[tokens].double()[..., None]
        return values


class Workload:
    """A shape's tensors: queries, lengths and one block table for each pool of pages."""

    def __init__(self, shape: Shape, arena: Arena, pools: int) -> None:
        self.shape, self.arena, self.pools = shape, arena, pools
        self.scale = (128 + 64) ** -0.5
        rows = shape.batch * shape.query_len
        dtype = torch.float16 if shape.kv_format == "fp16" else torch.bfloat16
        self.q = torch.randn(rows, shape.heads, shape.d_latent + shape.d_rope, device="cuda").to(dtype)
        self.q_nope = self.q[..., : shape.d_latent]
        self.q_rope = self.q[..., shape.d_latent :] if shape.d_rope else None
        self.lengths = torch.tensor(shape.lengths, dtype=torch.int32, device="cuda")
        self.kv = arena.pages(shape.page_size)
        self.tables = self.shuffled_tables(shape.page_size)
        self.group_scales = None
        if arena.group_scales is not None:
            self.group_scales = arena.group_scales.view(-1, shape.page_size, arena.group_scales.shape[1])

    def shuffled_tables(self, page_size: int) -> torch.Tensor:
        """[pools, batch, pages] page numbers, all distinct, in random order; -1 past a sequence's end."""
        counts = [-(-length // page_size) for length in self.shape.lengths]
        used = torch.arange(max(counts), device="cuda") < torch.tensor(counts, device="cuda")[:, None]
        tables = torch.full((self.pools, *used.shape), -1, dtype=torch.int32, device="cuda")
        pages = torch.randperm(self.arena.tokens // page_size, device="cuda")[: self.pools * sum(counts)]
        tables[used.expand_as(tables)] = pages.int()
        return tables

    def reference(self) -> torch.Tensor:
        """out of pool 0 in float64, [batch, query_len, heads, d_latent]."""
        shape, page_size = self.shape, self.shape.page_size
        q = self.q.double().view(shape.batch, shape.query_len * shape.heads, -1)
        out = torch.empty(*q.shape[:2], shape.d_latent, dtype=torch.float64, device="cuda")
        at_a_time = max(1, (1 << 17) // max(shape.lengths))
        for first in range(0, shape.batch, at_a_time):
            some = slice(first, first + at_a_time)
            lengths = self.lengths[some, None].long()
            token = torch.arange(int(lengths.max()), device="cuda").expand(len(lengths), -1)
            pages = self.tables[0, some].long().clamp(min=0).gather(1, token // page_size)
            kv = self.arena.dequantise(pages * page_size + token % page_size)
            scores = q[some] @ kv.transpose(1, 2) * self.scale
            last = lengths - shape.query_len + torch.arange(shape.query_len, device="cuda")  # that a query token sees
            masked = token[:, None] > last[..., None]
            scores.masked_fill_(masked.repeat_interleave(shape.heads, dim=1), -math.inf)
            out[some] = torch.softmax(scores, dim=-1) @ kv[..., : shape.d_latent]
        return out.view(shape.batch, shape.query_len, shape.heads, shape.d_latent)


# ---- Contenders -----------------------------------------------------------------------------------------------------

Call = Callable[[int], "torch.Tensor | None"]  # enqueues one call on a pool of pages; returns its output


class Probe:
    """libetap's stream probe, built here when the Makefile has not."""

    PAGES, ROWS, ASYNC = 0, 1, 2

    def __init__(self) -> None:
        source, library = ROOT / "libetap/probe/stream.cu", ROOT / "build/libetap_probe.so"
        if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
            nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
            if nvcc is None:
                raise SystemExit("bench_gpu: nvcc is needed to build the stream probe; put it on PATH or set NVCC")
            library.parent.mkdir(exist_ok=True)
            flags = ["-gencode=arch=compute_90a,code=sm_90a", "-O3", "-std=c++17", "-shared"]
            flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
            subprocess.run([nvcc, *flags, str(source), "-o", str(library)], check=True)
        self.lib = ctypes.CDLL(str(library))
        i32, i64, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
        self.lib.etap_probe_error.restype = ctypes.c_char_p
        self.lib.etap_probe_plan_bytes.restype = i64
        self.lib.etap_probe_plan.argtypes = [pointer, i32, pointer, i32, pointer]
        self.lib.etap_probe_stream.argtypes = [
            *(i32, pointer, i64, i64, i32, i32, pointer, i64),
            *(pointer, pointer, i32, i32, pointer),
        ]

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"stream probe: {self.lib.etap_probe_error(status).decode()}")

    def prepare(self, load: Workload, mode: int, page_size: int, rows_per_copy: int = 0) -> Call:
        kv, tables, lengths = load.arena.pages(page_size), load.tables, load.lengths
        if page_size != load.shape.page_size:
            tables = load.shuffled_tables(page_size)
        ctas = load.shape.num_sms or torch.cuda.get_device_properties(0).multi_processor_count
        pieces = torch.empty(self.lib.etap_probe_plan_bytes(ctas), dtype=torch.uint8, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        self._check(self.lib.etap_probe_plan(lengths.data_ptr(), load.shape.batch, pieces.data_ptr(), ctas, stream))
        torch.cuda.synchronize()
        size, row_bytes = kv.element_size(), kv.shape[2] * kv.element_size()

        def call(pool: int) -> None:
            table = tables[pool]
            self._check(
                self.lib.etap_probe_stream(
                    mode,
                    kv.data_ptr(),
                    kv.stride(0) * size,
                    kv.stride(1) * size,
                    row_bytes,
                    page_size,
                    table.data_ptr(),
                    table.stride(0),
                    lengths.data_ptr(),
                    pieces.data_ptr(),
                    ctas,
                    rows_per_copy,
                    torch.cuda.current_stream().cuda_stream,
                )
            )

        return call

    def contenders(self, load: Workload) -> dict[str, Call]:
        page_size = load.shape.page_size if load.shape.page_size >= min(COPY_ROWS) else 64
        calls = {f"ceiling{rows}": self.prepare(load, self.PAGES, page_size, rows) for rows in COPY_ROWS if rows <= page_size}
        if page_size != load.shape.page_size:
            calls["gather-bulk"] = self.prepare(load, self.ROWS, load.shape.page_size)
            calls["gather-async"] = self.prepare(load, self.ASYNC, load.shape.page_size)
        return calls


class Etap:
    def __init__(self, load: Workload) -> None:
        shape = load.shape
        self.load = load
        self.problem = etap.Problem(
            num_heads=shape.heads,
            batch=shape.batch,
            page_size=shape.page_size,
            d_latent=shape.d_latent,
            d_rope=shape.d_rope,
            q_dtype="fp16" if shape.kv_format == "fp16" else "bf16",
            kv_format=shape.kv_format,
            out_dtype="fp16" if shape.kv_format == "fp16" else "bf16",
            max_query_len=shape.query_len,
            num_sms=shape.num_sms,
            device="cuda",
        )
        self.decision = etap.query(self.problem)
        self.plan = etap.Plan(self.problem)
        rows = shape.batch * shape.query_len
        self.out = torch.empty(rows, shape.heads, shape.d_latent, dtype=load.q.dtype, device="cuda")
        self.lse = torch.empty(rows, shape.heads, dtype=torch.float32, device="cuda")
        self.update()

    def update(self) -> None:
        self.plan.update(self.load.lengths)

    def call(self, pool: int) -> torch.Tensor:
        load = self.load
        self.plan.run(
            load.q_nope,
            load.q_rope,
            load.kv,
            load.tables[pool],
            softmax_scale=load.scale,
            kv_scale=load.arena.kv_scale,
            kv_group_scales=load.group_scales,
            out=self.out,
            lse=self.lse,
        )
        return self.out


# ---- Measuring ------------------------------------------------------------------------------------------------------


class Nvml:
    """Clock and energy through nvidia-ml-py; both are 0 where it is not installed."""

    def __init__(self) -> None:
        self.handle = None
        try:
            import pynvml
        except ImportError:
            print("no clock and no energy: nvidia-ml-py is not installed", file=sys.stderr)
            return
        self.nvml = pynvml
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(0).uuid).removeprefix("GPU-")
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            print(f"no clock and no energy: {error}", file=sys.stderr)

    def sm_clock(self) -> int:
        return self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM) if self.handle else 0

    def millijoules(self) -> int:
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) if self.handle else 0


def graph_of(call: Call, pools: int, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls that take turns over the pools of pages."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # torch.cuda.graph() would collect garbage each time
        graph.capture_begin()
        for i in range(calls):
            call(i % pools)
        graph.capture_end()
    return graph


def time_rounds(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int, nvml: Nvml) -> tuple[dict[str, list[float]], int]:
    """Microseconds of each replay, the graphs taking turns, and the SM clock (MHz; 0: not known) under that load."""
    for graph in graphs.values():
        graph.replay()
    names = list(graphs)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graphs[name].replay()
            end.record()
            events[name].append((begin, end))
    clock = nvml.sm_clock()
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) * 1e3 for begin, end in pairs] for name, pairs in events.items()}, clock


def energy_of(graph: torch.cuda.CUDAGraph, graph_us: float, nvml: Nvml) -> float:
    """Millijoules of one replay, over replays that keep the GPU busy for ENERGY_SECONDS after as long a warm-up."""
    replays = max(2, int(ENERGY_SECONDS * 1e6 / graph_us))
    for _ in range(replays // 2):
        graph.replay()
    torch.cuda.synchronize()
    before = nvml.millijoules()
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    return (nvml.millijoules() - before) / replays


@dataclass
class Row:
    """One line of the table. Times in microseconds."""

    shape: Shape
    calls: int = 0
    us: dict[str, float] = field(default_factory=dict)  # contender: median of a call
    spread: dict[str, float] = field(default_factory=dict)  # (p90 - p10) / median over the rounds
    error: dict[str, float] = field(default_factory=dict)  # norm of the difference / norm of the reference
    worst_row_error: dict[str, float] = field(default_factory=dict)
    millijoules: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # contender: why
    kernel: str = ""
    reason: str = ""
    plan_us: float = math.nan
    sm_mhz: int = 0

    @property
    def ceiling_us(self) -> float:
        return min(us for name, us in self.us.items() if name.startswith("ceiling"))

    @property
    def gather_us(self) -> float:
        return min((us for name, us in self.us.items() if name.startswith("gather")), default=math.nan)

    @property
    def etap_us(self) -> float:
        return self.us.get("etap", math.nan)

    @property
    def fraction(self) -> float:
        return self.ceiling_us / self.etap_us

    @property
    def best_peer(self) -> str | None:
        return min((name for name in self.us if name in peers.NAMES), key=self.us.__getitem__, default=None)

    def as_dict(self) -> dict[str, Any]:
        derived = {
            "name": self.shape.name,
            "ceiling_us": self.ceiling_us,
            "gather_us": self.gather_us,
            "etap_us": self.etap_us,
            "fraction": self.fraction,
            "terabytes_per_second": self.shape.kv_bytes / self.etap_us / 1e6,
            "best_peer": self.best_peer,
            "reproduce": f"python scripts/bench_gpu.py --filter '^{self.shape.name}$'",
        }
        # NaN is not JSON: what was not measured is null.
        clean = {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in derived.items()}
        return {**clean, **asdict(self), "plan_us": None if math.isnan(self.plan_us) else self.plan_us}


def measure(shape: Shape, arena: Arena, pools: int, args: argparse.Namespace, probe: Probe, nvml: Nvml) -> Row:
    row = Row(shape)
    load = Workload(shape, arena, pools)
    calls: dict[str, Call] = dict(probe.contenders(load))
    try:
        ours = Etap(load)
        calls["etap"] = ours.call
        row.kernel, row.reason = ours.decision.kernel, ours.decision.reason
        updates = {"plan": graph_of(lambda _: ours.update(), 1, PLAN_CALLS)}
        row.plan_us = statistics.median(time_rounds(updates, args.rounds, nvml)[0]["plan"]) / PLAN_CALLS
    except etap.EtapError as error:
        row.skipped["etap"] = str(error)
    for name in args.peers:
        try:
            calls[name] = peers.prepare(name, load)
        except peers.Skip as why:
            row.skipped[name] = str(why)

    reference = load.reference()
    graphs = {}
    estimate_us = 4 + shape.kv_bytes / ASSUMED_TBS / 1e6
    row.calls = pools * max(1, round(GRAPH_US / (pools * estimate_us)))
    for name, call in calls.items():
        try:
            out = call(0)
            if out is not None:
                difference = (out.view_as(reference).double() - reference).flatten(2)
                row_norms = reference.flatten(2).norm(dim=-1)
                row.error[name] = (difference.norm() / reference.norm()).item()
                row.worst_row_error[name] = (difference.norm(dim=-1) / row_norms).max().item()
            graphs[name] = graph_of(call, pools, row.calls)
        except Exception as error:
            if name not in peers.NAMES:
                raise
            row.skipped[name] = f"{type(error).__name__}: {error}"
    times, row.sm_mhz = time_rounds(graphs, args.rounds, nvml)
    for name, samples in times.items():
        median = statistics.median(samples)
        tenth = max(1, len(samples) // 10)
        ordered = sorted(samples)
        row.us[name] = median / row.calls
        row.spread[name] = (ordered[-tenth] - ordered[tenth - 1]) / median
    if args.energy and nvml.handle:
        for name, graph in graphs.items():
            row.millijoules[name] = energy_of(graph, row.us[name] * row.calls, nvml) / row.calls
    return row


# ---- Report ---------------------------------------------------------------------------------------------------------


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


HEADER = f"{'shape':<24}{'ceiling':>8}{'etap us':>9}{'TB/s':>6}{'frac':>6}{'plan':>6}{'rel err':>9}{'MHz':>6}{'mJ':>7}  best peer"


def line(row: Row) -> str:
    text = f"{row.shape.name:<24}{row.ceiling_us:>8.1f}"
    if "etap" not in row.us:
        return f"{text}   {row.skipped['etap']}"
    speed = row.shape.kv_bytes / row.etap_us / 1e6
    energy = f"{row.millijoules['etap']:.1f}" if row.millijoules else "-"
    text += f"{row.etap_us:>9.1f}{speed:>6.2f}{row.fraction:>6.2f}{row.plan_us:>6.1f}{row.error['etap']:>9.1e}"
    text += f"{row.sm_mhz:>6}{energy:>7}  "
    if row.best_peer:
        text += f"{row.best_peer} {row.us[row.best_peer]:.1f} ({row.us[row.best_peer] / row.etap_us:.2f}x)"
    elif not math.isnan(row.gather_us):
        text += f"(gather {row.gather_us:.1f})"
    return text


def summary(rows: list[Row]) -> list[str]:
    done = [row for row in rows if "etap" in row.us]
    lines = []
    for label, chosen in (("the table's shapes", "table"), ("our own shapes", "own")):
        fractions = [row.fraction for row in done if row.shape.group == chosen]
        if fractions:
            lines.append(
                f"{label}: geometric mean {geometric_mean(fractions):.3f} of the ceiling, "
                f"least {min(fractions):.2f}, {len(fractions)} shapes"
            )
    for name in peers.NAMES:
        reasons = [row.skipped[name] for row in rows if name in row.skipped]
        if reasons and all(name not in row.us for row in rows):
            lines.append(f"no {name}: {reasons[0]}")
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", metavar="REGEX", default="", help="only shapes whose name matches")
    parser.add_argument("--quick", action="store_true", help="a dozen shapes")
    parser.add_argument("--list", action="store_true", help="print the names of the shapes and stop")
    parser.add_argument("--rounds", type=int, default=15, help="replays of each contender (default: 15)")
    parser.add_argument("--sms", type=int, default=0, help="SM budget for every shape (default: the shape's own)")
    parser.add_argument("--energy", action="store_true", help="also energy a call; about 4 s a contender and shape")
    parser.add_argument("--peers", default=",".join(peers.NAMES), help="comma-separated; 'none': no peers")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name != "none"]
    unknown = set(args.peers) - set(peers.NAMES)
    if unknown:
        parser.error(f"unknown peers {sorted(unknown)}; known: {', '.join(peers.NAMES)}")
    return args


def chosen_shapes(args: argparse.Namespace) -> list[Shape]:
    chosen = [s for s in shapes() if re.search(args.filter, s.name) and (s.quick or not args.quick)]
    if args.sms:
        chosen = [Shape(**{**asdict(s), "num_sms": args.sms}) for s in chosen]
    return chosen


def main() -> int:
    args = parse_arguments()
    chosen = chosen_shapes(args)
    if args.list:
        print("\n".join(shape.name for shape in chosen))
        return 0
    if not torch.cuda.is_available():
        print("bench_gpu: torch sees no CUDA device; this benchmark needs an SM90 GPU", file=sys.stderr)
        return 2
    nvml = Nvml()
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, {device.multi_processor_count} SMs, etap {etap.__version__}, torch {torch.__version__}")
    started = time.monotonic()
    probe = Probe()
    pools = {shape: 2 * device.L2_cache_size // shape.kv_bytes + 1 for shape in chosen}
    by_rows: dict[tuple[str, int, int], list[Shape]] = {}
    for shape in chosen:
        by_rows.setdefault((shape.kv_format, shape.d_latent, shape.d_rope), []).append(shape)
    rows: list[Row] = []
    for key, members in by_rows.items():
        # A pool takes whole pages, so ragged sequences need a little more than their tokens.
        most = max(pools[s] * (s.tokens + s.batch * max(s.page_size, 64)) for s in members)
        arena = Arena(*key, tokens=most)
        for shape in members:
            rows.append(measure(shape, arena, pools[shape], args, probe, nvml))
            print(f"  {shape.name}: {rows[-1].us.get('etap', math.nan):.1f} us", file=sys.stderr)
        del arena
    if args.json:
        report = {
            "device": device.name,
            "num_sms": device.multi_processor_count,
            "etap": etap.__version__,
            "torch": torch.__version__,
            "rounds": args.rounds,
            "rows": [row.as_dict() for row in rows],
        }
        Path(args.json).write_text(json.dumps(report, indent=1))
    print("\n".join(summary(rows)))
    print(f"{time.monotonic() - started:.0f} s. One row again: python scripts/bench_gpu.py --filter '^SHAPE$'\n")
    print(HEADER)
    for row in rows:
        print(line(row))
    wrong = [row.shape.name for row in rows if not row.worst_row_error.get("etap", 0) < ROW_ERROR_LIMIT]
    if wrong:
        print(f"WRONG (a row is off by more than {ROW_ERROR_LIMIT:.0%} of its norm): {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
