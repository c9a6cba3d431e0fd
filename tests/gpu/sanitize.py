"""A reduced matrix for compute-sanitizer: decode and merge, compared with FP64 on the CPU. test_sanitizer.py runs it under each tool.

    compute-sanitizer --tool racecheck python tests/gpu/sanitize.py [SEED]

Tensors are made on the CPU and copied, so that no kernels but the library's run and every byte counts as initialised only where it was
written. Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1: each tensor is then an allocation of its own, and memcheck sees its end.
"""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from cases import Case, Inputs, check, make_inputs, reference  # noqa: E402
from harness import problem_of  # noqa: E402

import etap_py as etap  # noqa: E402

CASES = [
    Case("one_tile", lens=(300, 0, 65)),
    Case("heads_8", lens=(130, 1), heads=8),
    Case("heads_20_strided", lens=(70, 129), heads=20, strided=True, row_gap=8),
    Case("heads_40", lens=(200,), heads=40),
    Case("heads_64", lens=(200,), heads=64),
    Case("heads_128", lens=(100, 3), heads=128),
    Case("split", lens=(1500,), num_sms=12),
    Case("split_tokens_3", lens=(700, 2), query_len=3, num_sms=8),
    Case("ragged", lens=(130, 64, 5), query_lens=(2, 0, 3)),
    Case("page_1", lens=(140, 3), page_size=1),
    Case("page_16", lens=(140, 3), page_size=16),
    Case("page_256", lens=(300, 3), page_size=256),
    Case("fp16", lens=(140,), q_dtype="fp16", out_dtype="fp32"),
    Case("d_256", lens=(140,), d_latent=256),
    Case("d_512_0", lens=(140,), d_rope=0),
    Case("e4m3", lens=(300, 65), kv_format="e4m3", kv_scale_on_device=True),
    Case("e4m3_page_1", lens=(140, 3), kv_format="e4m3", page_size=1),
    Case("e4m3_group", lens=(140, 3), kv_format="e4m3_group"),
    Case("e4m3_656", lens=(140, 3), kv_format="e4m3_656"),
    Case("e4m3_heads_32", lens=(300, 65), heads=32, kv_format="e4m3"),
    Case("e4m3_group_heads_48", lens=(140, 3), heads=48, kv_format="e4m3_group"),
    Case("e4m3_656_heads_40_page_1", lens=(140, 3), heads=40, kv_format="e4m3_656", page_size=1),
    Case("chunks", lens=(1300, 64, 0), batch_invariant=True),
    Case("chunks_heads_64", lens=(1100, 3), heads=64, batch_invariant=True),
    Case("chunks_e4m3_fp32", lens=(1100, 3), kv_format="e4m3", out_dtype="fp32", batch_invariant=True),
    Case("tree", lens=(300, 20, 64), query_len=33, heads=2, tree_mask="random"),
    Case("tree_heads_8", lens=(300, 5), query_len=9, heads=8, tree_mask="tree"),
    Case("tree_e4m3_page_1", lens=(70, 5), query_len=5, heads=4, tree_mask="random", kv_format="e4m3", page_size=1),
    # Groups that pay, on few SMs; and tables that are looked through for nothing.
    Case("prefix", lens=(3000, 2900, 3, 2950), tables="common", heads=8, num_sms=2, shared_prefixes=True),
    Case("prefix_page_1", lens=(3000, 2900, 3, 2950), tables="common", heads=8, page_size=1, num_sms=2, shared_prefixes=True),
    Case("no_prefix", lens=(700, 640, 3, 700), tables="families", page_size=1, shared_prefixes=True),
]


def to_gpu(value: object) -> object:
    """A tensor with its whole storage, gaps and poison included, copied to the GPU; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    raw = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).cuda()
    return raw.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())


def solve(case: Case, seed: int) -> None:
    on_cpu = make_inputs(case, seed, "cpu")
    inputs = Inputs(**{field.name: to_gpu(getattr(on_cpu, field.name)) for field in fields(Inputs)})
    problem = problem_of(case, "cuda")
    # Uninitialised on purpose: initcheck reports what is read before it was written.
    workspace = torch.empty(etap.workspace_size(problem), dtype=torch.uint8, device="cuda")
    plan = etap.Plan(problem, workspace=workspace)
    out, lse = (to_gpu(tensor) for tensor in on_cpu.outputs())
    table = inputs.block_table if case.shared_prefixes else None
    plan.update(inputs.cache_seqlens, cu_seqlens_q=inputs.cu_seqlens_q, block_table=table)
    for _ in range(2):  # the second run finds the workspace as the first left it
        plan.run(
            inputs.q_nope,
            inputs.q_rope,
            inputs.kv_cache,
            inputs.block_table,
            tree_mask=inputs.tree_mask,
            softmax_scale=inputs.softmax_scale,
            kv_scale=inputs.kv_scale,
            kv_group_scales=inputs.kv_group_scales,
            out=out,
            lse=lse,
            lse_base=case.lse_base,
            empty_lse=case.empty_lse,
        )
    check(on_cpu, out.cpu(), lse.cpu(), reference(on_cpu), device="cuda")


def merge(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    parts, parts_lse = torch.randn(3, 5, 4, 512, generator=rng), torch.randn(3, 5, 4, generator=rng)
    out, lse = to_gpu(torch.zeros(5, 4, 512)), to_gpu(torch.zeros(5, 4))
    etap.merge(to_gpu(parts), to_gpu(parts_lse), out=out, lse=lse)
    weights = torch.softmax(parts_lse.double(), dim=0)
    torch.testing.assert_close(out.cpu().double(), (weights[..., None] * parts).sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), parts_lse.double().logsumexp(0), rtol=1e-5, atol=1e-5)


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    for case in CASES:
        solve(replace(case, name=f"sanitize-{case.name}"), seed)
    merge(seed)
    print(f"{len(CASES)} cases and a merge are right")


if __name__ == "__main__":
    main()
