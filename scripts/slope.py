"""Cycles a block and tile from the slope between two lengths, on few SMs: python slope.py FORMAT-HEADS SMS.."""
import statistics, sys
import etap_py as etap
from etap_bench.contenders import Etap
from etap_bench.inputs import Arena, Inputs, arena_tokens, pools_of
from etap_bench.shape import Shape
from etap_bench.timing import timer_of
timer = timer_of("cuda"); keep = []
for spec in sys.argv[1:]:
    fmt, h, sms = spec.split(",")
    n = int(sms) // 2 if int(h) == 128 else int(sms)
    names = [f"{fmt}-{n}x{c}-h{h}-sm{sms}" for c in (2048, 6144)]
    replays, calls = {}, {}
    arena = Arena(fmt, 512, 64, max(arena_tokens(Shape.parse(x), min(4, pools_of(Shape.parse(x), 60 << 20))) for x in names), "cuda")
    for name in names:
        shape = Shape.parse(name)
        pools = min(4, pools_of(shape, 60 << 20))
        ours = Etap(Inputs(shape, arena, pools)); keep.append(ours)
        calls[name] = timer.calls(shape.kv_bytes, pools)
        replays[name] = timer.replay_of(ours.call, pools, calls[name])
    times, _ = timer.rounds(replays, 5, 2)
    t = [statistics.median(times[x]) / calls[x] for x in names]
    print(spec, ours.decision.kernel, ours.decision.num_workers, f"{t[0]:.1f} {t[1]:.1f} us, {(t[1] - t[0]) / 64 * 1980:.0f} cycles a block at 1980 MHz", flush=True)
