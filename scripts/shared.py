import statistics, sys
from dataclasses import replace
from etap_bench.contenders import Etap
from etap_bench.inputs import Arena, Inputs, arena_tokens, pools_of
from etap_bench.shape import Shape
from etap_bench.timing import timer_of
timer = timer_of("cuda")
keep = []  # graphs hold no tensors
fmts = ("bf16", "e4m3")
rows = [(64, 16384, 1024), (16, 8192, 8192), (32, 4096, 1024), (128, 0, 2048), (64,4096,4096)]
for fmt in fmts:
    arena = None
    shapes = {}
    for n, c, o in rows:
        common = (("p", c),) if c else ()
        s = Shape((c + o,) * n, 16, kv_format=fmt, shared=tuple(common + ((f"s{i}", o),) for i in range(n)))
        for flag in (False, True):
            shapes[f"{fmt} {n}x({c}+{o}) {'flag' if flag else 'none'}"] = replace(s, shared_prefixes=flag)
    arena = Arena(fmt, 512, 64, max(arena_tokens(s, min(4, pools_of(s, 60 << 20))) for s in shapes.values()), "cuda")
    replays, calls, told = {}, {}, {}
    for name, shape in shapes.items():
        pools = min(4, pools_of(shape, 60 << 20))
        inputs = Inputs(shape, arena, pools)
        ours = Etap(inputs)
        keep.append(ours)
        d = ours.decision; told[name] = f"{d.kernel[10:]} {d.num_workers}x{d.cluster_size} {ours.plan.shared() if 'flag' in name else ''}"
        calls[name] = timer.calls(shape.kv_bytes, pools)
        replays[name] = timer.replay_of(ours.call, pools, calls[name])
    times, _ = timer.rounds(replays, 7, 2)
    for name, t in times.items():
        print(name, f"{statistics.median(t) / calls[name]:.1f}", told[name], flush=True)
