"""Burst times of shapes with every cluster size, which the dispatch chooses among: `python scripts/clusters.py SHAPE..` (experiment)."""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace

import etap_py as etap
from etap_bench import contenders
from etap_bench.inputs import Arena, Inputs, arena_tokens, pools_of
from etap_bench.shape import Shape
from etap_bench.timing import timer_of

timer = timer_of("cuda")
keep = []  # graphs hold no tensors
arenas: dict[tuple, Arena] = {}


class Forced(contenders.Etap):
    """With clusters of this size; 0: the dispatch's."""

    def __init__(self, inputs: Inputs, cluster: int) -> None:
        given = inputs.shape.problem
        problem = given(inputs.device)
        object.__setattr__(inputs.shape, "problem", lambda _: replace(problem, force_cluster=cluster))
        try:
            super().__init__(inputs)
        finally:
            object.__delattr__(inputs.shape, "problem")


for name in sys.argv[1:]:
    shape = Shape.parse(name)
    pools = min(4, pools_of(shape, 60 << 20))
    key = (shape.kv_format, shape.d_latent, shape.d_rope)
    if key not in arenas or arenas[key].tokens < arena_tokens(shape, pools):
        arenas[key] = Arena(*key, arena_tokens(shape, pools), "cuda")
    inputs = Inputs(shape, arenas[key], pools)
    calls = timer.calls(shape.kv_bytes, pools)
    replays, chosen = {}, ""
    for cluster in (0, 1, 2, 3, 4, 6, 8):
        try:
            ours = Forced(inputs, cluster)
            keep.append(ours)
            replays[cluster] = timer.replay_of(ours.call, pools, calls)
        except etap.EtapError as error:
            print(cluster, error, file=sys.stderr)
            continue
        if cluster == 0:
            chosen = f"{ours.decision.kernel} {ours.decision.num_workers} x {ours.decision.cluster_size}"
    times, _ = timer.rounds({str(c): r for c, r in replays.items()}, 7, 2)
    print(name, chosen, " ".join(f"{c}:{statistics.median(t) / calls:.1f}" for c, t in times.items()), flush=True)
