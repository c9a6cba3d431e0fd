import sys
from etap_bench.contenders import Etap
from etap_bench.inputs import Arena, Inputs, arena_tokens, pools_of
from etap_bench.shape import Shape
import torch
for name in sys.argv[1:]:
    shape = Shape.parse(name); pools = 1
    ours = Etap(Inputs(shape, Arena(shape.kv_format, shape.d_latent, shape.d_rope, arena_tokens(shape, pools), "cuda"), pools))
    for i in range(3): ours.call(0)
    torch.cuda.synchronize()
