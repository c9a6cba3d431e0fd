"""Is an SM's speed its own? Loop-over times by SM over calls (trace.so)."""
import ctypes, statistics, sys
import etap_py as etap, torch
from etap_bench.contenders import Etap
from etap_bench.inputs import Arena, Inputs, arena_tokens, pools_of
from etap_bench.shape import Shape
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
    by_sm, by_cta = {}, {}
    for _ in range(20):
        memory.zero_(); torch.cuda.synchronize(); g.replay(); torch.cuda.synchronize()
        m = memory.view(16, 144, 16, 2).cpu()
        for c in range(3, 15):
            t = m[c, :, :, 0].double(); used = (t[:, 5] > 0)
            base = t[used, 1].min()
            end = (t[used, 5] - base) / 1000
            mean = end.mean()
            for cta, sm, e in zip(used.nonzero()[:, 0].tolist(), t[used, 15].long().tolist(), (end - mean).tolist()):
                by_sm.setdefault(sm - 1, []).append(e); by_cta.setdefault(cta, []).append(e)
    pointer.value = None
    def describe(d, label):
        means = {k: statistics.mean(v) for k, v in d.items()}
        within = statistics.mean(statistics.pstdev(v) for v in d.values() if len(v) > 3)
        print(f"   {label}: spread of means {statistics.pstdev(means.values()):.2f} us (min {min(means.values()):.2f} max {max(means.values()):.2f}), within one {within:.2f} us")
        return means
    print(f"== {name}: {ours.decision.kernel}, {ours.decision.num_workers} workers of {ours.decision.cluster_size}")
    means = describe(by_sm, "by SM"); describe(by_cta, "by CTA")
    print("   ", " ".join(f"{k}:{means[k]:.1f}" for k in sorted(means)), flush=True)
    del g, arena, inputs, ours
