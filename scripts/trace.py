"""Where a call's time goes inside a CTA: `python scripts/trace.py SHAPE..` with a libetap of this branch (experiment).

Each role's lane writes its clock and an event; see the trace(..) calls. Prints, a shape: when a CTA's events come for the first time, and the mean
times between events of a block in the middle of a piece, over all CTAs.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
from collections import defaultdict

import etap_py as etap
import torch
from etap_bench.contenders import Etap
from etap_bench.inputs import Arena, Inputs, arena_tokens, pools_of
from etap_bench.shape import Shape

NAMES = {1: "roles", 2: "context", 3: "queries", 10: "QK begins", 11: "first boxes", 13: "S done", 14: "P stored", 16: "own PV done",
         17: "begin other", 18: "P of other", 19: "other PV done", 30: "loop over", 31: "rows left", 32: "finished", 33: "ring free", 34: "end",
         40: "context", 41: "first loads", 50: "block", 51: "part empty"}
ROLES = ("L", "R", "producer")


def main(names: list[str]) -> None:
    library = ctypes.CDLL(str(etap.library_path()))
    pointer = ctypes.c_void_p.in_dll(library, "etap_trace_buffer")
    memory = torch.zeros(145 * 3 * 512, dtype=torch.int64, device="cuda")
    first = -memory.data_ptr() // 8 % 512  # aligned to 4096 bytes
    buffer = memory[first : first + 144 * 3 * 512].view(144, 3, 512)
    for name in names:
        shape = Shape.parse(name)
        pools = min(4, pools_of(shape, 60 << 20))
        arena = Arena(shape.kv_format, shape.d_latent, shape.d_rope, arena_tokens(shape, pools), "cuda")
        inputs = Inputs(shape, arena, pools)
        pointer.value = buffer.data_ptr()
        ours = Etap(inputs)
        for i in range(6):
            buffer.zero_()
            torch.cuda.synchronize()
            ours.call(i % pools)
        torch.cuda.synchronize()
        print(f"== {name}: {ours.decision.kernel}, {ours.decision.num_workers} workers of {ours.decision.cluster_size}")
        report(buffer.cpu().tolist())
        pointer.value = None


def report(ctas: list[list[list[int]]]) -> None:
    firsts: dict[tuple[str, int], list[int]] = defaultdict(list)
    steps: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    periods: dict[str, list[float]] = defaultdict(list)
    totals: list[int] = []
    for cta in ctas:
        roles = [[(v >> 8, v & 255) for v in role if v] for role in cta]
        if not all(roles):
            continue
        start = min(role[0][0] for role in roles)
        totals.append(max(role[-1][0] for role in roles) - start)
        for name, role in zip(ROLES, roles, strict=True):
            seen = set()
            for clock, event in role:
                if event not in seen:
                    seen.add(event)
                    firsts[name, event].append(clock - start)
            begins = [clock for clock, event in role if event == (50 if name == "producer" else 10)]
            if len(begins) > 6:
                per = 1 if name == "producer" else 2
                periods[name].append((begins[-2] - begins[2]) / (len(begins) - 4) / per)
                middle = [(c, e) for c, e in role if begins[2] <= c <= begins[-2]]
                for (c0, e0), (c1, e1) in zip(middle, middle[1:]):
                    steps[name, e0, e1].append(c1 - c0)
    print(f"  CTAs {len(totals)}, cycles median {statistics.median(totals):.0f} max {max(totals)}; block: "
          + ", ".join(f"{n} {statistics.mean(v):.0f}" for n, v in periods.items()))
    for name in ROLES:
        line = [(statistics.median(v), e) for (n, e), v in firsts.items() if n == name]
        print(f"  {name:8} first: " + ", ".join(f"{NAMES.get(e, e)} {t:.0f}" for t, e in sorted(line)))
    for name in ROLES:
        parts = [(len(v), f"{NAMES.get(a, a)} > {NAMES.get(b, b)} {statistics.mean(v):.0f}") for (n, a, b), v in steps.items() if n == name]
        print(f"  {name:8} step: " + "; ".join(text for count, text in parts if count > 20))


main(sys.argv[1:])
