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
import json
import math
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from etap_bench import inputs, peers
from etap_bench.contenders import Probe, Skip
from etap_bench.measure import measure
from etap_bench.measurement import ROW_ERROR_LIMIT, Measurement
from etap_bench.shape import Shape
from etap_bench.timing import CudaTimer

import etap_py as etap

K = 1024


def ragged(batch: int, context: int, heads: int, kv_format: str = "bf16") -> Shape:
    """Few long and many short sequences, as a serving batch has; the same on every run."""
    random = torch.rand(batch, generator=torch.Generator().manual_seed(batch * 7919 + context))
    lengths = tuple(max(1, int(context * x**3)) for x in random.tolist())
    return Shape(batch, context, heads, kv_format=kv_format, lengths=lengths)


# The published comparison: the geometric mean of its fractions is a target.
TABLE = [
    Shape(1, 4 * K, 16),
    Shape(1, 64 * K, 16),
    Shape(16, K, 16),
    Shape(16, 4 * K, 16),
    Shape(16, 16 * K, 16),
    Shape(16, 64 * K, 16),
    Shape(64, 4 * K, 16),
    Shape(128, 2 * K, 16),
    Shape(16, 16 * K, 8),
    Shape(16, 16 * K, 32),
    Shape(16, 16 * K, 64),
    Shape(16, 16 * K, 128),
    Shape(16, 16 * K, 16, query_len=2),
    Shape(16, 16 * K, 16, query_len=4),
]
OWN = [
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
    ragged(16, 16 * K, 16),
    ragged(64, 8 * K, 16),
    ragged(128, 4 * K, 8),
    # head counts between the tiles
    *(Shape(16, 16 * K, heads) for heads in (4, 5, 12, 20, 24, 40, 48)),
    Shape(4, 8 * K, 96),
    # several query tokens: speculative decoding
    Shape(16, 8 * K, 8, query_len=4),
    Shape(16, 8 * K, 12, query_len=3),
    Shape(8, 8 * K, 16, query_len=8),
    # the other dimensions in use
    Shape(16, 16 * K, 16, d_latent=512, d_rope=0),
    Shape(16, 16 * K, 16, d_latent=256, d_rope=64),
    # page sizes
    Shape(16, 16 * K, 16, page_size=1),
    Shape(1, 64 * K, 16, page_size=1),
    *(Shape(16, 16 * K, 16, page_size=page_size) for page_size in (16, 32, 128)),
    # an SM budget
    Shape(16, 16 * K, 16, num_sms=44),
    Shape(16, 16 * K, 16, num_sms=66),
    # FP8
    Shape(1, 4 * K, 16, kv_format="e4m3"),
    Shape(1, 64 * K, 16, kv_format="e4m3"),
    Shape(16, K, 16, kv_format="e4m3"),
    Shape(16, 16 * K, 8, kv_format="e4m3"),
    Shape(16, 16 * K, 16, kv_format="e4m3"),
    Shape(16, 64 * K, 16, kv_format="e4m3"),
    Shape(16, 16 * K, 16, query_len=4, kv_format="e4m3"),
    Shape(16, 16 * K, 128, kv_format="e4m3"),
    Shape(16, 16 * K, 16, page_size=1, kv_format="e4m3"),
    ragged(64, 8 * K, 16, kv_format="e4m3"),
    Shape(16, 16 * K, 16, kv_format="e4m3_group"),
    Shape(16, 16 * K, 16, kv_format="e4m3_656"),
]
QUICK = (
    *("bf16-1x4K-h16", "bf16-1x64K-h16", "bf16-16x1K-h16", "bf16-16x16K-h16", "bf16-16x64K-h16", "bf16-16x16K-h128", "bf16-16x16K-h16-q4"),
    *("bf16-16x16K-h16-ragged", "bf16-16x16K-h16-p1", "bf16-16x16K-h16-sm44", "e4m3-16x16K-h16", "e4m3-16x64K-h16"),
)


# ---- Measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table. Times in microseconds."""

    shape: Shape
    measured: Measurement

    def as_dict(self) -> dict[str, Any]:
        row = self.measured
        return {
            "name": self.shape.name,
            "ceiling_us": row.ceiling_us,
            "gather_us": row.gather_us,
            "etap_us": row.etap_us,
            "fraction": row.fraction,
            "terabytes_per_second": self.shape.kv_bytes / row.etap_us / 1e6 if row.etap_us else None,
            "best_peer": row.best_peer,
            "reproduce": f"python scripts/bench_gpu.py --filter '^{self.shape.name}$'",
            "shape": asdict(self.shape),
            **asdict(row),
        }


# ---- Report ---------------------------------------------------------------------------------------------------------


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


HEADER = f"{'shape':<24}{'ceiling':>8}{'etap us':>9}{'TB/s':>6}{'frac':>6}{'plan':>6}{'rel err':>9}{'MHz':>6}{'mJ':>7}  best peer"


def line(row: Row) -> str:
    measured = row.measured
    text = f"{row.shape.name:<24}{measured.ceiling_us:>8.1f}"
    if measured.etap_us is None:
        return f"{text}   {measured.skipped['etap']}"
    speed = row.shape.kv_bytes / measured.etap_us / 1e6
    energy = f"{measured.millijoules['etap']:.1f}" if measured.millijoules else "-"
    text += f"{measured.etap_us:>9.1f}{speed:>6.2f}{measured.fraction:>6.2f}{measured.plan_us:>6.1f}{measured.error['etap']:>9.1e}"
    text += f"{measured.sm_mhz:>6}{energy:>7}  "
    if measured.best_peer:
        peer_us = measured.us[measured.best_peer]
        text += f"{measured.best_peer} {peer_us:.1f} ({peer_us / measured.etap_us:.2f}x)"
    elif measured.gather_us is not None:
        text += f"(gather {measured.gather_us:.1f})"
    return text


def summary(rows: list[Row]) -> list[str]:
    lines = []
    for label, chosen in (("the table's shapes", TABLE), ("our own shapes", OWN)):
        fractions = [row.measured.fraction for row in rows if row.shape in chosen and row.measured.fraction]
        if fractions:
            lines.append(
                f"{label}: geometric mean {geometric_mean(fractions):.3f} of the ceiling, "
                f"least {min(fractions):.2f}, {len(fractions)} shapes"
            )
    for name in peers.NAMES:
        reasons = [row.measured.skipped[name] for row in rows if name in row.measured.skipped]
        if reasons and all(name not in row.measured.us for row in rows):
            lines.append(f"no {name}: {reasons[0]}")
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--filter", metavar="REGEX", default="", help="only shapes whose name matches")
    parser.add_argument("--quick", action="store_true", help="a dozen shapes")
    parser.add_argument("--list", action="store_true", help="print the names of the shapes and stop")
    parser.add_argument("--rounds", type=int, default=15, help="replays of each contender (default: 15)")
    parser.add_argument("--sms", type=int, default=0, help="SM budget for every shape (default: the shape's own)")
    parser.add_argument("--energy", action="store_true", help="also energy a call; 1.3 s for etap and each peer")
    parser.add_argument("--peers", default=",".join(peers.KERNELS), help="comma-separated; 'none': no peers")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    args = parser.parse_args()
    args.peers = [name for name in args.peers.split(",") if name != "none"]
    unknown = set(args.peers) - set(peers.NAMES)
    if unknown:
        parser.error(f"unknown peers {sorted(unknown)}; known: {', '.join(peers.NAMES)}")
    return args


def chosen_shapes(args: argparse.Namespace) -> list[Shape]:
    chosen = [shape for shape in TABLE + OWN if re.search(args.filter, shape.name) and (shape.name in QUICK or not args.quick)]
    return [replace(shape, num_sms=args.sms) for shape in chosen] if args.sms else chosen


def main() -> int:
    args = parse_arguments()
    chosen = chosen_shapes(args)
    if args.list:
        print("\n".join(shape.name for shape in chosen))
        return 0
    if not torch.cuda.is_available():
        print("bench_gpu: torch sees no CUDA device; this benchmark needs an SM90 GPU", file=sys.stderr)
        return 2
    timer = CudaTimer("cuda:0")
    if timer.nvml.reason:
        print(f"no clock and no energy: {timer.nvml.reason}", file=sys.stderr)
    torch.manual_seed(0)
    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, {device.multi_processor_count} SMs, etap {etap.__version__}, torch {torch.__version__}")
    started = time.monotonic()
    try:
        probe = Probe()
    except Skip as why:
        print(f"bench_gpu: {why}", file=sys.stderr)
        return 2
    steps = {shape: inputs.Shape.of(shape) for shape in chosen}
    pools = {shape: step.pools(device.L2_cache_size) for shape, step in steps.items()}
    by_rows: dict[tuple[str, int, int], list[Shape]] = {}
    for shape in chosen:
        by_rows.setdefault((shape.kv_format, shape.d_latent, shape.d_rope), []).append(shape)
    rows: list[Row] = []
    for key, members in by_rows.items():
        most = max(steps[shape].arena_tokens(pools[shape]) for shape in members)
        arena = inputs.Arena(*key, tokens=most, device=timer.device)
        for shape in members:
            tensors = inputs.Inputs(steps[shape], arena, pools[shape])
            result = measure(tensors, timer, ceiling=probe, peer_names=args.peers, rounds=args.rounds, energy=args.energy)
            rows.append(Row(shape, result))
            print(f"  {shape.name}: {result.us.get('etap', math.nan):.1f} us", file=sys.stderr)
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
    wrong = [row.shape.name for row in rows if "etap" in row.measured.wrong]
    if wrong:
        print(f"WRONG (a row is off by more than {ROW_ERROR_LIMIT:.0%} of its norm): {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
