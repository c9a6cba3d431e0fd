"""What a drop-in's call costs the host beyond `etap_py.Plan.run` of the same tensors:

    PYTHONPATH=.:integrations/flashmla:integrations/flashinfer:integrations/flash_attn_3 python tests/dropins/overhead.py

One sequence of length 0 on the CPU device: the library has nothing to compute, what remains is the host's work. Each figure is the
median over rounds in which all calls take turns, 200 calls of each at a time, so that all meet the same noise.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from etap_flash_attn_3 import flash_attn_with_kvcache, get_scheduler_metadata
from etap_flashinfer.mla import BatchMLAPagedAttentionWrapper
from etap_flashmla import flash_mla_with_kvcache, get_mla_metadata

import etap_py as etap

HEADS, PAGE_SIZE, SCALE = 16, 64, 192**-0.5
CALLS, ROUNDS = 200, 101


def calls() -> dict[str, tuple[Callable[[], object], str]]:
    """Each call, and the one of `Plan.run` to compare with."""
    q = torch.zeros(1, 1, HEADS, 576, dtype=torch.bfloat16)
    pool = torch.zeros(4, PAGE_SIZE, 1, 576, dtype=torch.bfloat16)
    table, lens = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    nope, rope, latent, k_rope = q[..., :512], q[..., 512:], pool[..., :512], pool[..., 512:]
    plan = etap.Plan(etap.Problem(num_heads=HEADS, batch=1, page_size=PAGE_SIZE))
    plan.update(lens)

    flashmla, _ = get_mla_metadata()
    fa3 = get_scheduler_metadata(1, 1, 4 * PAGE_SIZE, HEADS, 1, 64, lens, headdim_v=512, page_size=PAGE_SIZE)
    wrapper = BatchMLAPagedAttentionWrapper(torch.empty(1))
    ones = torch.arange(2, dtype=torch.int32)
    wrapper.plan(ones, 0 * ones, table[0], lens, HEADS, 512, 64, PAGE_SIZE, False, SCALE, q.dtype, q.dtype)
    rows = nope[0], rope[0], latent.squeeze(2), k_rope.squeeze(2)

    def run_fa3(return_softmax_lse: bool) -> object:
        return flash_attn_with_kvcache(
            rope,
            k_rope,
            latent,
            qv=nope,
            cache_seqlens=lens,
            page_table=table,
            softmax_scale=SCALE,
            scheduler_metadata=fa3,
            return_softmax_lse=return_softmax_lse,
        )

    one = "Plan.run(q_nope, q_rope, pool)"
    pair, pair_out = "Plan.run(q_nope, q_rope, (latent, rope))", "Plan.run(q_nope, q_rope, (latent, rope), return_lse=False)"
    return {
        one: (lambda: plan.run(nope, rope, pool, table, softmax_scale=SCALE), one),
        pair: (lambda: plan.run(nope, rope, (latent, k_rope), table, softmax_scale=SCALE), pair),
        pair_out: (lambda: plan.run(nope, rope, (latent, k_rope), table, softmax_scale=SCALE, return_lse=False), pair_out),
        "flash_mla_with_kvcache": (lambda: flash_mla_with_kvcache(q, pool, table, lens, 512, flashmla, None, SCALE), one),
        "BatchMLAPagedAttentionWrapper.run": (lambda: wrapper.run(*rows), pair_out),
        "BatchMLAPagedAttentionWrapper.run, return_lse": (lambda: wrapper.run(*rows, return_lse=True), pair),
        "flash_attn_with_kvcache": (lambda: run_fa3(False), pair_out),
        "flash_attn_with_kvcache, return_softmax_lse": (lambda: run_fa3(True), pair),
    }


def main() -> None:
    compared = calls()
    times: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(ROUNDS):
        for name, (call, _) in compared.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    for name, (_, base) in compared.items():
        beyond = statistics.median(mine - theirs for mine, theirs in zip(times[name], times[base], strict=True))
        print(f"{name:60} {statistics.median(times[name]):6.2f} us" + (f"  {beyond:+6.2f}" if name != base else ""))


if __name__ == "__main__":
    main()
