"""What must not change the bits of a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from cases import Case, check, make_inputs, reference
from harness import Session
from invariance import LENS, check_batch_invariance, check_neighbours, check_pages

import etap_py as etap

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


# Up to 32 chunks of more than 16 blocks, and lengths around the ends of chunks.
MANY_CHUNKS = (40000, 0, 512, 513, 8192, 8193, 16384, 16385, 1)
CHUNKED = [
    *(Case(f"chunks_heads_{h}", lens=MANY_CHUNKS, heads=h) for h in (8, 16, 32, 64, 128)),
    *(Case(f"chunks_{f}_heads_{h}", lens=MANY_CHUNKS, heads=h, kv_format=f) for f in ("e4m3", "e4m3_656") for h in (16, 32, 64)),
    *(Case(f"chunks_page_1_heads_{h}", lens=MANY_CHUNKS, heads=h, page_size=1) for h in (16, 64)),
    Case("chunks_tokens_4", lens=MANY_CHUNKS, query_len=4),
    Case("chunks_ragged", lens=MANY_CHUNKS, query_lens=(1, 2, 3, 4, 0, 4, 2, 1, 3), spare_rows=2),
    Case("chunks_drafts", lens=MANY_CHUNKS, query_len=5, tree_mask="random"),
    Case("chunks_fp32", lens=MANY_CHUNKS, out_dtype="fp32"),
]


@pytest.mark.parametrize("case", CHUNKED, ids=lambda case: case.name)
def test_sequences_of_many_chunks(case: Case, seed: int, supported: Supported) -> None:
    """They are cut at places that their own length decides, and merged by another kernel: right, and with the same bits alone, in
    batches, and on other numbers of SMs."""
    case = replace(case, batch_invariant=True)
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    assert etap.query(session.problem).cluster_size == 1
    check(inputs, *session.solve(), reference(inputs))
    check_batch_invariance(case, seed, "cuda")


def test_rows_do_not_depend_on_their_neighbours(seed: int, supported: Supported) -> None:
    """Rescaling is a column's own business."""
    case = Case("neighbours", lens=(700, 65, 3000), heads=12)
    supported(case)
    check_neighbours(case, seed, "cuda")
