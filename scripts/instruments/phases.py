"""Where a call's time goes, from stamps of each CTA (trace.so)."""
import ctypes, statistics, sys
import etap_py as etap, torch
from etap_bench.contenders import Etap
from etap_bench.inputs import Arena, Inputs, arena_tokens, pools_of
from etap_bench.shape import Shape
NAMES = ["start", "previous over", "context", "queries", "first S", "loop over", "finish begins", "parts ready", "merged 1", "finished", "narrowed", "merge waited", "merge done"]
lib = ctypes.CDLL(str(etap.library_path()))
pointer = ctypes.c_void_p.in_dll(lib, "etap_trace_buffer"); calls = ctypes.c_int.in_dll(lib, "etap_trace_calls")
memory = torch.zeros(16 * 144 * 16 * 2, dtype=torch.int64, device="cuda")
for name in sys.argv[1:]:
    shape = Shape.parse(name)
    pools = min(4, pools_of(shape, 60 << 20))
    arena = Arena(shape.kv_format, shape.d_latent, shape.d_rope, arena_tokens(shape, pools), "cuda")
    inputs = Inputs(shape, arena, pools)
    ours = Etap(inputs)
    pointer.value = None
    for i in range(3): ours.call(i % pools)
    torch.cuda.synchronize()
    pointer.value = memory.data_ptr(); calls.value = 0
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for i in range(16): ours.call(i % pools)
    for _ in range(3):
        memory.zero_(); torch.cuda.synchronize(); g.replay(); torch.cuda.synchronize()
    m = memory.view(16, 144, 16, 2).cpu()
    pointer.value = None
    print(f"== {name}: {ours.decision.kernel}, {ours.decision.num_workers} workers of {ours.decision.cluster_size}")
    # relative to the earliest "previous over" of the call; averages over calls 4..14
    rows = {}
    spans = []
    for c in range(4, 15):
        t = m[c, :, :, 0].double()
        used = t[:, 1] > 0
        base = t[used, 1].min()
        nxt = m[c + 1, :, 1, 0].double(); nb = nxt[nxt > 0].min()
        spans.append((nb - base).item() / 1000)
        for s in (0,1,2,3,4,5,6,10,7,8,9,11,12):
            v = t[used, s]; v = v[v > 0]
            if len(v): rows.setdefault(s, []).append(((v.min() - base).item() / 1000, ((v.mean()) - base).item() / 1000, (v.max() - base).item() / 1000, len(v)))
    print(f"   call to call {statistics.mean(spans):.2f} us")
    for s, v in rows.items():
        print(f"   {NAMES[s]:14} min {statistics.mean(x[0] for x in v):7.2f} mean {statistics.mean(x[1] for x in v):7.2f} max {statistics.mean(x[2] for x in v):7.2f}  ({v[0][3]} CTAs)")
    # clock rate
    t = m[8, :, :, :]; used = (t[:, 5, 0] > 0) & (t[:, 3, 0] > 0)
    if used.any():
        dt = (t[used, 5, 0] - t[used, 3, 0]).double(); dc = (t[used, 5, 1] - t[used, 3, 1]).double()
        print(f"   clock in the loop {1000 * (dc.sum() / dt.sum()).item():.0f} MHz", flush=True)
    del g, arena, inputs, ours
