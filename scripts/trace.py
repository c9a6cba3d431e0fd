"""Merged chronological list of one CTA's events."""
import ctypes, statistics, sys
from collections import defaultdict
import etap_py as etap, torch
from etap_bench.contenders import Etap
from etap_bench.inputs import Arena, Inputs, arena_tokens, pools_of
from etap_bench.shape import Shape
NAMES = {1: "roles", 2: "context", 3: "queries", 10: "QK begins", 13: "S done", 14: "P stored", 16: "own PV done",
         17: "begin other", 18: "P of other", 19: "other PV done", 30: "loop over", 31: "rows left", 32: "finished", 33: "ring free", 34: "end",
         40: "context", 41: "first loads", 50: "block", 51: "part empty", 52: "issued", 53: "prefetched", 54: "armed", **{60 + i: f"box {i}" for i in range(9)}}
ROLES = ("L", "R", "p0", "p1", "p2", "p3")
library = ctypes.CDLL(str(etap.library_path()))
pointer = ctypes.c_void_p.in_dll(library, "etap_trace_buffer")
memory = torch.zeros(145 * 6 * 512, dtype=torch.int64, device="cuda")
first = -memory.data_ptr() // 8 % 512
buffer = memory[first : first + 144 * 6 * 512].view(144, 6, 512)
for name in sys.argv[1:]:
    shape = Shape.parse(name)
    pools = min(4, pools_of(shape, 60 << 20))
    arena = Arena(shape.kv_format, shape.d_latent, shape.d_rope, arena_tokens(shape, pools), "cuda")
    inputs = Inputs(shape, arena, pools)
    pointer.value = buffer.data_ptr()
    ours = Etap(inputs)
    for i in range(6):
        buffer.zero_(); torch.cuda.synchronize(); ours.call(i % pools)
    torch.cuda.synchronize()
    ctas = buffer.cpu().tolist()
    print(f"== {name}: {ours.decision.kernel}, {ours.decision.num_workers} workers of {ours.decision.cluster_size}")
    lats = defaultdict(list); periods = []
    shown = False
    for n, cta in enumerate(ctas):
        ev = [[(v >> 8, v & 255) for v in role if v] for role in cta]
        if not ev[0] or not ev[1]: continue
        qk = [c for c, e in ev[0] if e == 10]
        if len(qk) < 9: continue
        periods.append((qk[-2] - qk[2]) / (len(qk) - 4))
        if n == 40 or (not shown and n > 40):
            shown = True
            lo, hi = qk[4], qk[6]
            for c, e, r in sorted((c, e, r) for r, role in enumerate(ev) for c, e in role if lo <= c <= hi):
                print(f"{c - lo:6} {'    ' * r}{ROLES[r]} {NAMES.get(e, e)}")
    print("period of two blocks", statistics.mean(periods), flush=True)
    pointer.value = None
    del arena, inputs, ours
