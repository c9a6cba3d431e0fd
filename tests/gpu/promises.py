"""Which refusals of the CUDA device are allowed, as data. The README promises the rest: there a refusal is a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest
from cases import SCALED_ROWS, Case

import etap_py as etap

# How the sentence begins, and which cases (with what is forced: force_tile, force_cluster) it may meet.
ALLOWED: list[tuple[str, Callable[[Case, dict[str, int]], bool]]] = [
    (
        "kv_format has group scales; the CUDA device takes it with",
        lambda case, _: (
            case.kv in ("e4m3_group", *SCALED_ROWS)
            and (case.q_dtype, case.d_latent, case.d_rope) != ("bf16", 512, 0 if case.kv == "e4m3_528" else 64)
        ),
    ),
    (
        "force_tile is none of the tiles that there are",
        lambda case, forced: (
            case.kv.startswith("e4m3") and forced.get("force_tile") not in ((None, 64) if case.kv == "e4m3_528" else (None, 8, 16, 24, 64))
        ),
    ),
]


def allowed(refusal: etap.EtapUnsupported, case: Case, **forced: int) -> bool:
    return any(str(refusal).startswith(words) and meets(case, forced) for words, meets in ALLOWED)


def skip(refusal: etap.EtapUnsupported, case: Case, **forced: int) -> NoReturn:
    """Skips the test, or fails it where the refusal is not on the list."""
    assert allowed(refusal, case, **forced), f"the README promises {case} {forced or ''}, but: {refusal}"
    pytest.skip(f"not supported: {refusal}")
