"""Times of plans, us: graph of 20 updates."""
import os, sys, dataclasses, torch
import etap_py as etap
from etap_bench.shape import Shape
for name in sys.argv[1:]:
    shape = Shape.parse(name)
    problem = shape.problem("cuda")
    if os.environ.get("AB_INVARIANT"): problem = dataclasses.replace(problem, batch_invariant=True)
    plan = etap.Plan(problem)
    lens = torch.tensor(shape.lengths, dtype=torch.int32, device="cuda")
    plan.update(lens); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(20): plan.update(lens)
    for _ in range(3): g.replay()
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record(); [g.replay() for _ in range(20)]; b.record(); torch.cuda.synchronize()
    print("plan", name, f"{a.elapsed_time(b) / 400 * 1000:.1f} us", etap.query(problem).num_workers, etap.query(problem).max_splits)
