"""What must not change the bits of a result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import Case
from invariance import LENS, check_batch_invariance, check_neighbours, check_pages

Supported = Callable[[Case], None]


@pytest.mark.parametrize("page_size", [1, 4, 16, 64, 256])
def test_physical_pages_do_not_matter(page_size: int, seed: int, supported: Supported) -> None:
    case = Case(f"pages_{page_size}", lens=LENS, page_size=page_size)
    supported(case)
    check_pages(case, seed, "cuda")


BATCH_INVARIANT = [
    Case("invariant", lens=LENS, batch_invariant=True),
    Case("invariant_heads_20", lens=LENS, heads=20, batch_invariant=True),
    Case("invariant_heads_128", lens=LENS, heads=128, batch_invariant=True),
    Case("invariant_tokens_3", lens=LENS, query_len=3, batch_invariant=True),
    Case("invariant_e4m3", lens=LENS, kv_format="e4m3", batch_invariant=True),
    Case("invariant_page_1", lens=LENS, page_size=1, batch_invariant=True),
]


@pytest.mark.parametrize("case", BATCH_INVARIANT, ids=lambda case: case.name)
def test_batch_invariant_mode(case: Case, seed: int, supported: Supported) -> None:
    """Without it, the same prompt gets other tokens depending on what else the server happens to run."""
    supported(case)
    check_batch_invariance(case, seed, "cuda")


def test_rows_do_not_depend_on_their_neighbours(seed: int, supported: Supported) -> None:
    """Rescaling is a column's own business."""
    case = Case("neighbours", lens=(700, 65, 3000), heads=12)
    supported(case)
    check_neighbours(case, seed, "cuda")
