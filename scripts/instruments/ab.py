"""Burst times of shapes with the library of ETAP_LIBRARY: `python scripts/ab.py [--sustain S] SHAPE..` prints name, us, fraction of the ceiling."""

from __future__ import annotations

import os
import statistics
import sys

from etap_bench.contenders import Etap
from etap_bench.inputs import Arena, Inputs, arena_tokens, pools_of
from etap_bench.shape import Shape
from etap_bench.timing import timer_of

sustain = float(sys.argv.pop(sys.argv.index("--sustain") + 1)) if "--sustain" in sys.argv else 0.0
import torch
X = torch.zeros(1024, device="cuda")
timer = timer_of("cuda")
keep = []  # graphs hold no tensors
arenas: dict[tuple, Arena] = {}
replays, calls = {}, {}
for name in [a for a in sys.argv[1:] if a != "--sustain"]:
    shape = Shape.parse(name.removesuffix("-even"))
    if name.endswith("-even"):
        import random, dataclasses
        r = random.Random(0); c = shape.context
        shape = dataclasses.replace(shape, lengths=tuple(r.randint(c // 4, c) for _ in shape.lengths))
    pools = min(4, pools_of(shape, 60 << 20))
    key = (shape.kv_format, shape.d_latent, shape.d_rope)
    if key not in arenas or arenas[key].tokens < arena_tokens(shape, pools):
        arenas[key] = Arena(*key, arena_tokens(shape, pools), "cuda")
    inputs = Inputs(shape, arenas[key], pools)
    if os.environ.get("AB_INVARIANT"):
        import dataclasses
        object.__setattr__(shape, "problem", lambda device, s=shape: dataclasses.replace(type(s).problem(s, device), batch_invariant=True))
    ours = Etap(inputs)
    keep.append(ours)
    error = ((ours.call(0).view_as(r := inputs.reference()).double() - r).norm() / r.norm()).item() if shape.tokens < 300_000 else float("nan")
    calls[name] = timer.calls(shape.kv_bytes, pools)
    call = ours.call
    if os.environ.get('AB_BETWEEN'): call = lambda i, c=ours.call: (X.add_(1), c(i))[1]
    replays[name] = timer.replay_of(call, pools, calls[name])
    print(f"{name}: {ours.decision.kernel} x {ours.decision.num_workers}/{ours.decision.cluster_size} error {error:.1e}", file=sys.stderr)
times, _ = timer.rounds(replays, 7, 2)
for name, samples in times.items():
    line = f"{name} {statistics.median(samples) / calls[name]:.1f}"
    if sustain:
        s = timer.sustain(replays[name], calls[name], sustain)
        line += f" sustained {s.us:.1f} {s.millijoules} mJ {s.sm_mhz} MHz" if s.us else ""
    print(line, flush=True)
