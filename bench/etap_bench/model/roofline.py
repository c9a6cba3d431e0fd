"""What no kernel can beat: bytes over the memory's specified bandwidth, and the SM's pipes, for rows on N and for rows padded to 64.

Nothing here is fitted; latencies and fixed costs are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from etap_bench.model.gpu import Gpu
from etap_bench.model.kernel import WGMMA_ROWS, Kernel, block_cycles, tile_of
from etap_bench.shape import BLOCK_TOKENS, Shape


def _free(name: str, layout: Literal["exact", "padded"]) -> Kernel:
    return Kernel(name=name, layout=layout, fixed_us=0.0, latency_cycles=0.0, piece_blocks=0.0)


PADDED = _free("padded", "padded")
EXACT = _free("exact", "exact")
EXACT_FP8 = msgspec.structs.replace(EXACT, fp8=True, kv_operand="registers")  # expanded in registers on the way


@dataclass(frozen=True)
class Roof:
    """Clock cycles of an SM for 64 KV tokens of a sequence, all of its query rows."""

    tile_rows: int
    tiles: int
    hbm: float  # its share of the specified bandwidth
    tensor: float
    shared_memory: float  # or, where KV is in registers, the least time of the instructions that read them
    flop_per_byte: float  # useful FLOP, so without the padding

    @property
    def cycles(self) -> float:
        return max(self.hbm, self.tensor, self.shared_memory)

    @property
    def limit(self) -> str:
        parts = {"HBM": self.hbm, "tensor cores": self.tensor, "shared memory": self.shared_memory}
        return max(parts, key=parts.__getitem__)


def roof(kernel: Kernel, shape: Shape, gpu: Gpu) -> Roof:
    """The bounds of a kernel, for a block of the shape."""
    rows, tiles = tile_of(kernel, shape, gpu)
    block = block_cycles(kernel, shape, gpu)
    return Roof(
        tile_rows=rows,
        tiles=tiles,
        hbm=BLOCK_TOKENS * shape.token_bytes * gpu.num_sms * gpu.sm_mhz / (gpu.hbm_tbs * 1e6),
        tensor=tiles * block.tensor,
        shared_memory=tiles * (block.pipe if block.pipe > block.tensor else block.shared_memory),
        flop_per_byte=shape.flop / shape.kv_bytes,
    )


def exact(shape: Shape) -> Kernel:
    """Rows on N: KV from shared memory, or, FP8, from registers."""
    return EXACT_FP8 if shape.fp8 else EXACT


def tflops(bounds: Roof, shape: Shape, gpu: Gpu) -> float:
    """Useful TFLOP/s of the whole GPU at these bounds."""
    flop = 2 * BLOCK_TOKENS * shape.rows * (shape.d_qk + shape.d_latent)
    return flop / bounds.cycles * gpu.sm_mhz * gpu.num_sms / 1e6


def least_rows_without_gain(kv_format: str, gpu: Gpu) -> int:
    """The least number of query rows, in steps of 8, for which rows on N and rows padded to 64 have the same bounds."""
    for rows in range(8, WGMMA_ROWS, 8):
        shape = Shape.equal(batch=1, context=BLOCK_TOKENS, heads=rows, kv_format=kv_format)
        if roof(exact(shape), shape, gpu).cycles >= roof(PADDED, shape, gpu).cycles:
            return rows
    return WGMMA_ROWS
