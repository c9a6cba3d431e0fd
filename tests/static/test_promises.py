"""The list of allowed refusals that the GPU suite skips by (tests/gpu/promises.py)."""

from __future__ import annotations

import promises
import pytest
from cases import Case

from etap_py.errors import EtapUnsupported

NO_SUCH_TILE = "force_tile is none of the tiles that there are: the CUDA device has 8 to 64 rows in steps of 8"
TREE = "flags has ETAP_TREE_MASK; the CUDA device has no tree masks yet, the CPU device has"
GROUPS = "kv_format has group scales; the CUDA device takes it with q_dtype ETAP_BF16 and (d_latent, d_rope) = (512, 64) only"


@pytest.mark.parametrize(
    ("sentence", "case", "forced"),
    [
        (NO_SUCH_TILE, Case("fp8", kv_format="e4m3"), {"force_tile": 40}),
        (GROUPS, Case("group", kv_format="e4m3_group", d_latent=256), {}),
        (GROUPS, Case("rows of 656 bytes", kv_format="e4m3_656", q_dtype="fp16"), {}),
    ],
)
def test_what_is_on_the_list_is_skipped(sentence: str, case: Case, forced: dict[str, int]) -> None:
    with pytest.raises(pytest.skip.Exception, match="not supported"):
        promises.skip(EtapUnsupported(2, "ETAP_UNSUPPORTED", sentence), case, **forced)


@pytest.mark.parametrize(
    ("sentence", "case", "forced"),
    [
        (NO_SUCH_TILE, Case("bf16"), {"force_tile": 40}),
        (NO_SUCH_TILE, Case("fp8, a tile that fits", kv_format="e4m3"), {"force_tile": 24}),
        (NO_SUCH_TILE, Case("nothing forced", kv_format="e4m3"), {}),
        (GROUPS, Case("group", kv_format="e4m3_group"), {}),
        (TREE, Case("drafts", tree_mask="tree", query_len=4), {}),
        (GROUPS, Case("one scale", kv_format="e4m3", d_latent=256), {}),
        ("page_size is 4; the CUDA device takes 64", Case("small pages", page_size=4), {}),
        ("force_cluster is 4; no such cluster", Case("cluster"), {"force_cluster": 4}),
    ],
)
def test_what_is_not_fails(sentence: str, case: Case, forced: dict[str, int]) -> None:
    """Guards: a dispatch that refuses every forced tile, or all small pages, once passed the suite: every such test was skipped."""
    with pytest.raises(AssertionError, match="the README promises"):
        promises.skip(EtapUnsupported(2, "ETAP_UNSUPPORTED", sentence), case, **forced)
