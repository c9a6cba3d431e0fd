"""Where the time of a decode-attention call goes: HBM, the SM's pipes, and what every call costs.

An SM works on blocks of 64 KV tokens. `block_cycles` counts what one block takes of its pipes for a tile of N query rows, `schedule` how
many blocks the busiest SM gets, and `predict` puts them together:

    time = fixed + merges + overlap(bytes / bandwidth, blocks * cycles / clock)

docs/theory.md derives every term. What can't be derived (latencies, fixed costs) is a field of `Kernel`, fitted to measurements by
`etap_bench.model.calibration`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import msgspec

from etap_bench.model.gpu import Gpu
from etap_bench.shape import BLOCK_TOKENS, Shape

WGMMA_ROWS = 64  # M of every WGMMA instruction
WGMMA_DEPTH = 16  # k of one on 16-bit values
SHARED_BYTES_PER_CYCLE = 128  # what an SM's shared memory delivers or takes
PREFIX_ROWS = 64  # of sequences that read a prefix together: those of a tile
REGISTER_CYCLES = 13.1  # the least that a WGMMA takes whose A is in registers; measured on H100 and H200 at N = 8 and 16


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A kernel as the model sees it. Fields in the second half are fitted."""

    name: str
    layout: Literal["exact", "padded"]  # query rows on WGMMA's N, in steps of 8; or always on its M, padded to 64
    fp8: bool = False  # of an FP8 cache; one name may stand for two kernels, one for each kind of cache
    kv_operand: Literal["shared memory", "registers"] = "shared memory"  # where WGMMA takes KV from (exact only)
    max_tile_rows: int = 64  # query rows that one tile takes at most
    max_cluster: int = 1  # CTAs that may share a sequence's blocks and merge in the kernel,
    max_many_cluster: int = 8  # where there are more tiles than clusters of that size,
    max_tiles_cluster: int = 8  # and where in addition a sequence has several of them
    busy_tile_rows: int = 65  # tiles from here on are cut in two rather than leave SMs idle
    piece_blocks: float = 5.0  # what the planner charges for an SM's going on to another sequence, in blocks
    cut_blocks: float = 0.0  # and for cutting sequences at all

    fixed_us: float = 10.0  # a call with next to no KV: launch, queries, one block, output
    split_us: float = 0.0  # merging partial results, once any sequence is cut
    part_us: float = 0.0  # and for each part of the sequence that has most
    latency_cycles: float = 1000.0  # of a block beyond the pipes: barriers, softmax, issue
    on_m_latency_cycles: float | None = None  # likewise with query rows on M, where the library has them there; None: the kernel never has
    row_cycles: float = 0.0  # likewise, for each row of the tile
    convert_cycles: float = 0.0  # what converting a block of FP8 to 16 bits adds, by the warps that multiply too
    overlap_loss: float = 0.0  # 0: memory and SM work at the same time, 1: one after the other


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a kernel that only copies pages into shared memory needs: latency + bytes / bandwidth."""

    latency_us: float
    tbs: float

    def stream_us(self, kv_bytes: float) -> float:
        return self.latency_us + kv_bytes / (self.tbs * 1e6)


@dataclass(frozen=True)
class BlockCycles:
    """Clock cycles that one block of 64 KV tokens takes of one SM, for one tile of query rows."""

    tensor: float  # tensor cores alone
    wgmma: float  # WGMMA instructions, each as slow as the slower of tensor cores and shared memory
    shared_memory: float  # operands read by WGMMA, and the block written
    latency: float
    convert: float

    @property
    def pipe(self) -> float:
        return max(self.wgmma, self.shared_memory)

    @property
    def total(self) -> float:
        return self.pipe + self.latency + self.convert

    @property
    def limit(self) -> str:
        if self.convert > self.pipe:
            return "conversion"
        return "tensor cores" if self.tensor >= self.shared_memory else "shared memory"


def rows_on_m(shape: Shape, gpu: Gpu) -> bool:
    """Whether the library puts the query rows on M: its dispatch compares the cycles of a block (libetap/src/sm90/dispatch.cc, whose
    numbers these are)."""
    fill = shape.d_qk * 2 * BLOCK_TOKENS // SHARED_BYTES_PER_CYCLE
    on_m = max(_tensor(shape, gpu, WGMMA_ROWS), shape.d_qk // 16 * 32 + shape.d_latent + fill) + 600
    tiles = -(-shape.rows // WGMMA_ROWS)
    if shape.fp8:
        return tiles * max(E4M3_ON_M_CYCLES, on_m) < _e4m3_tile(shape, gpu)[0]
    tile, _ = _exact_tile(shape, WGMMA_ROWS)
    if shape.rows <= 32 or tile == WGMMA_ROWS:
        return tile == WGMMA_ROWS
    instructions = (shape.d_qk + shape.d_latent) // 16
    return on_m < max(_tensor(shape, gpu, tile), instructions * (16 + tile // 4) + fill) + 1300


def _tensor(shape: Shape, gpu: Gpu, rows: int) -> int:
    return 2 * BLOCK_TOKENS * (shape.d_qk + shape.d_latent) * rows // gpu.flop_per_cycle


E4M3_TILES = (8, 16, 24, 32, 48)  # that the library has for an E4M3 cache with KV on M, those of 528-byte rows from 32 on
E4M3_ON_M_CYCLES = 4100


def _e4m3_tile(shape: Shape, gpu: Gpu) -> tuple[int, int]:
    """(cycles, rows) of the tile whose blocks cost least, the larger of two alike."""

    def cycles(tile: int) -> int:
        return -(-shape.rows // tile) * max(_tensor(shape, gpu, tile), 2176 + 4 * tile if tile <= 24 else 2150 + 43 * tile // 2)

    tiles = [tile for tile in E4M3_TILES if tile >= 32 or shape.kv_format != "e4m3_528"]
    return min(((cycles(tile), tile) for tile in tiles), key=lambda found: (found[0], -found[1]))


def _padded(kernel: Kernel, shape: Shape, gpu: Gpu) -> bool:
    return kernel.layout == "padded" or (kernel.on_m_latency_cycles is not None and rows_on_m(shape, gpu))


def tile_of(kernel: Kernel, shape: Shape, gpu: Gpu) -> tuple[int, int]:
    """(rows of a tile, tiles of a sequence): padded tiles have 64 rows, exact ones share the rows evenly, in steps of 8, but the library's
    for FP8, which are of five sizes."""
    if _padded(kernel, shape, gpu):
        return WGMMA_ROWS, -(-shape.rows // WGMMA_ROWS)
    if kernel.fp8 and kernel.on_m_latency_cycles is not None:
        _, tile = _e4m3_tile(shape, gpu)
        return tile, -(-shape.rows // tile)
    return _exact_tile(shape, kernel.max_tile_rows)


def _exact_tile(shape: Shape, most: int) -> tuple[int, int]:
    tiles = -(-shape.rows // most)
    rows = -(-shape.rows // tiles)
    return -(-rows // 8) * 8, tiles


@dataclass(frozen=True)
class _Wgmma:
    """`count` instructions [64, 16] x [16, n]."""

    count: float
    n: int
    a_in_registers: bool

    def tensor(self, gpu: Gpu) -> float:
        return self.count * 2 * WGMMA_ROWS * WGMMA_DEPTH * self.n / gpu.flop_per_cycle

    @property
    def operands(self) -> float:
        """Cycles of shared memory: 2 KB of A, unless it is in registers, and 32 n bytes of B."""
        return self.count * (WGMMA_ROWS * (not self.a_in_registers) + self.n) * WGMMA_DEPTH * 2 / SHARED_BYTES_PER_CYCLE

    def cycles(self, gpu: Gpu) -> float:
        return max(self.tensor(gpu), self.operands, self.count * REGISTER_CYCLES * self.a_in_registers)


def block_cycles(kernel: Kernel, shape: Shape, gpu: Gpu) -> BlockCycles:
    """Cycles of a block of 64 KV tokens for one tile."""
    tile, _ = tile_of(kernel, shape, gpu)
    padded = _padded(kernel, shape, gpu)
    qk_steps, pv_steps = shape.d_qk / WGMMA_DEPTH, BLOCK_TOKENS / WGMMA_DEPTH
    in_registers = kernel.kv_operand == "registers" and not padded
    if padded:  # S = Q K^T, then O += P V with P in registers, V in slices of 256 columns
        work = [_Wgmma(qk_steps, BLOCK_TOKENS, False), _Wgmma(pv_steps * shape.d_latent / 256, 256, True)]
    else:  # S^T = K Q^T, then O^T += V^T P^T, V in slices of 64 dims
        work = [
            _Wgmma(qk_steps, tile, in_registers),
            _Wgmma(pv_steps * shape.d_latent / WGMMA_ROWS, tile, in_registers),
        ]
    # The block is written once, with 16 bits a value where it is multiplied from there; read again where registers hold KV.
    arrives = shape.token_bytes if in_registers else shape.d_qk * 2
    fill = BLOCK_TOKENS * arrives * (1 + in_registers) / SHARED_BYTES_PER_CYCLE
    latency = kernel.latency_cycles + kernel.row_cycles * tile
    if padded and kernel.on_m_latency_cycles is not None:
        latency = kernel.on_m_latency_cycles
    return BlockCycles(
        tensor=sum(part.tensor(gpu) for part in work),
        wgmma=sum(part.cycles(gpu) for part in work),
        shared_memory=sum(part.operands for part in work) + fill,
        latency=latency,
        convert=0.0 if padded and shape.fp8 else kernel.convert_cycles * shape.d_qk / 576,
    )


@dataclass(frozen=True)
class Schedule:
    """How a call is laid out over the SMs."""

    tile_rows: int
    tiles: int  # of a sequence
    cluster: int  # CTAs (one an SM) that share a sequence's blocks
    workers: int  # clusters
    parts: int  # workers that share a sequence; 1: none is cut
    blocks: float  # that the busiest SM computes, with those that further pieces cost


def schedule(kernel: Kernel, shape: Shape, gpu: Gpu) -> Schedule:
    """Tiles and sequences over workers, the cheapest of three plans for its busiest SM: whole sequences; sequences cut into equally many
    parts; even shares that go on from one sequence to the next. The library's planner tries shares in between."""
    tile, tiles = tile_of(kernel, shape, gpu)
    sms = min(shape.num_sms or gpu.num_sms, gpu.num_sms)
    units = len(shape.blocks) * tiles
    cluster = _cluster(kernel, gpu, units, tiles, sms, tile)
    workers = max(1, gpu.clusters(cluster, sms))
    longest = -(-max(shape.blocks) // cluster)
    charge, rounds = kernel.piece_blocks, -(-units // workers)
    whole = rounds * longest + (rounds - 1) * charge
    parts = -(-longest // (workers // units)) if rounds == 1 else whole
    even = -(-(sum(shape.blocks) * tiles / cluster + charge * units) // workers)
    share = min(parts, even)
    if share + kernel.cut_blocks >= whole:
        return Schedule(tile, tiles, cluster, workers, 1, whole)
    return Schedule(tile, tiles, cluster, workers, math.ceil(longest / share), share)


def _cluster(kernel: Kernel, gpu: Gpu, units: int, tiles: int, sms: int, tile: int) -> int:
    """The largest cluster that leaves one for each unit. With tiles that keep the SM busier than the memory, one that leaves two for each
    when more SMs find work so. On half of a card or less single CTAs, where that is what the library takes."""
    if kernel.on_m_latency_cycles is not None and not kernel.fp8 and 2 * sms <= gpu.num_sms:
        return 1
    most = kernel.max_cluster
    if units > gpu.clusters(most, sms):
        most = min(most, kernel.max_many_cluster, kernel.max_tiles_cluster if tiles > 1 else most)
    cluster = next((size for size in range(most, 1, -1) if gpu.clusters(size, sms) >= units), 1)
    if tile < kernel.busy_tile_rows:
        return cluster
    return max(range(cluster, 0, -1), key=lambda size: size * min(gpu.clusters(size, sms) // units, 2))


@dataclass(frozen=True)
class Prediction:
    """What the model says of a call. Times in microseconds."""

    us: float
    memory_us: float  # bytes / bandwidth
    sm_us: float  # the busiest SM's blocks
    fixed_us: float  # what does not grow with the context
    limit: str  # "HBM", "tensor cores", "shared memory", "conversion", "fixed cost": the largest part
    cycles: BlockCycles
    schedule: Schedule


def overlap(first: float, second: float, loss: float) -> float:
    """Time of two kinds of work that overlap but for `loss`: the maximum for 0, the sum for 1, a p-norm (p = 1 / loss) between."""
    longer, shorter = max(first, second), min(first, second)
    if longer == 0 or loss < 1e-3:
        return longer
    return float(longer * (1 + (shorter / longer) ** (1 / loss)) ** loss)


def predict(kernel: Kernel, memory: Memory, shape: Shape, gpu: Gpu, sm_mhz: float, distinct_kv_bytes: int = 0) -> Prediction:
    """Time and limit of a call of `kernel` on `gpu`. With shape.shared_prefixes what sequences share counts once, in bytes and blocks, if
    the rows of two fit a tile, and the merge and an idle kernel cost about a call's fixed part again.

    distinct_kv_bytes: of a shape from a file, which does not say what it shares; 0: the shape's
    """
    plan = schedule(kernel, shape, gpu)
    cycles = block_cycles(kernel, shape, gpu)
    shares = shape.shared_prefixes and 2 * shape.rows <= PREFIX_ROWS
    read = (distinct_kv_bytes or shape.distinct_kv_bytes) if shares else shape.kv_bytes
    fixed_parts = 1 if read == shape.kv_bytes else 2
    memory_us = read / (memory.tbs * 1e6)
    sm_us = plan.blocks * (read / shape.kv_bytes) * cycles.total / sm_mhz
    fixed_us = fixed_parts * kernel.fixed_us + (plan.parts > 1) * (kernel.split_us + plan.parts * kernel.part_us)
    parts = {"HBM": memory_us, cycles.limit: sm_us, "fixed cost": fixed_us}
    return Prediction(
        us=fixed_us + overlap(memory_us, sm_us, kernel.overlap_loss),
        memory_us=memory_us,
        sm_us=sm_us,
        fixed_us=fixed_us,
        limit=max(parts, key=parts.__getitem__),
        cycles=cycles,
        schedule=plan,
    )
