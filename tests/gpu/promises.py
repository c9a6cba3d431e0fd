"""What the README promises of the CUDA device, as data.

A case within these sets must be supported: a refusal is a failure. Any other case is tried too, and skipped with the library's
reason when it is refused.
"""

from __future__ import annotations

from cases import Case

SUPPORTED = {
    "dimensions": {(512, 64), (512, 0), (256, 64)},
    "q_dtype": {"bf16", "fp16"},
    "kv_format": {"bf16", "fp16", "e4m3", "e4m3_group", "e4m3_656"},
    "out_dtype": {"bf16", "fp16", "fp32"},
    "page_size": {1, 2, 4, 8, 16, 32, 64, 128, 256},
    "heads": set(range(1, 129)),
    "ragged": {False, True},
}


def promised(case: Case) -> bool:
    has = {
        "dimensions": (case.d_latent, case.d_rope),
        "q_dtype": case.q_dtype,
        "kv_format": case.kv,
        "out_dtype": case.out,
        "page_size": case.page_size,
        "heads": case.heads,
        "ragged": bool(case.query_lens),
    }
    if case.kv in ("e4m3_group", "e4m3_656") and (case.q_dtype, case.d_latent, case.d_rope) != ("bf16", 512, 64):
        return False
    return all(value in SUPPORTED[key] for key, value in has.items())
