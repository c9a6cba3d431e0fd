"""The page table of a step, against one written with Python loops: by PyTorch, and by the Triton kernel interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from etap_sglang import block_table

UNTOUCHED = -7


def random_step(seed: int, page_size: int, dcp_size: int = 1) -> dict[str, Any]:
    """Requests with shuffled pages, in a table that is larger than needed. With several ranks a page is one of each of them."""
    generator = torch.Generator().manual_seed(seed)
    span = page_size * dcp_size
    requests, context, batch = 6, 40 * span, 4
    pages = torch.randperm(requests * 40, generator=generator).view(requests, 40)
    slots = pages.repeat_interleave(span, 1) * span + torch.arange(context) % span
    return {
        "req_to_token": slots.to(torch.int32),
        "req_pool_indices": torch.randperm(requests, generator=generator)[:batch],
        "seq_lens": torch.randint(1, 30 * span, (batch,), generator=generator),
        "extra_tokens": int(torch.randint(0, 5, (), generator=generator)),
        "page_size": page_size,
        "dcp_size": dcp_size,
        "dcp_rank": int(torch.randint(0, dcp_size, (), generator=generator)),
    }


def buffers() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((4, 48), UNTOUCHED, dtype=torch.int32)[:, :40], torch.full((4,), UNTOUCHED, dtype=torch.int32)


def expected(step: dict[str, Any]) -> tuple[list[list[int]], list[int]]:
    rows = [step["req_to_token"][r].tolist() for r in step["req_pool_indices"].tolist()]
    size, ranks = step["page_size"], step["dcp_size"]
    # The slots of the tokens that this rank holds, as rows of its own pool.
    own = [row[step["dcp_rank"] : int(n) + step["extra_tokens"] : ranks] for row, n in zip(rows, step["seq_lens"], strict=True)]
    return [[slots[t] // ranks // size for t in range(0, len(slots), size)] for slots in own], [len(slots) for slots in own]


def check(table: torch.Tensor, seqlens: torch.Tensor, step: dict[str, Any], *, untouched_beyond: bool) -> None:
    pages, lengths = expected(step)
    assert seqlens.tolist() == lengths
    for row, wanted in zip(table.tolist(), pages, strict=True):
        assert row[: len(wanted)] == wanted
        if untouched_beyond:
            assert set(row[len(wanted) :]) == {UNTOUCHED}


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 256])
@pytest.mark.parametrize("dcp_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_with_pytorch(seed: int, page_size: int, dcp_size: int, dtype: torch.dtype) -> None:
    """Guards against slots that are taken for pages, a request's row that is taken for the batch's, and another rank's tokens."""
    step = random_step(seed, page_size, dcp_size)
    step |= {name: step[name].to(dtype) for name in ("req_pool_indices", "seq_lens")}
    table, seqlens = buffers()
    block_table.fill(table, seqlens, **step)
    check(table, seqlens, step, untouched_beyond=False)


def test_gathered_rows(seed: int) -> None:
    """Guards against rows of a neighbour's KV: lists of rows behind one another become a table of pages of one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (4,), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = torch.randperm(int(starts[-1]), generator=generator).int()
    table, seqlens = buffers()
    block_table.fill_gathered(table, seqlens, kv_indptr=starts.int(), kv_indices=rows, seq_lens=lengths)
    assert seqlens.tolist() == lengths.tolist()
    for row, start, end in zip(table.tolist(), starts, starts[1:], strict=False):
        assert row[: end - start] == rows[start:end].tolist()


def test_kernel_in_the_interpreter(seed: int) -> None:
    """Guards the kernel that a CUDA graph records, on a machine without a GPU; it must not write beyond a sequence."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "ETAP_TEST_BLOCK_TABLE_SEED": str(seed)}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _run_interpreted() -> None:
    for page_size, dcp_size in ((1, 1), (16, 1), (64, 1), (1, 2), (16, 3)):
        step = random_step(int(os.environ["ETAP_TEST_BLOCK_TABLE_SEED"]), page_size, dcp_size)
        table, seqlens = buffers()
        block_table.fill_kernel[(4, 2)](
            table,
            seqlens,
            step["req_to_token"],
            step["req_pool_indices"],
            step["seq_lens"],
            table.stride(0),
            step["req_to_token"].stride(0),
            table.shape[1],
            step["extra_tokens"],
            step["dcp_rank"],
            PAGE_SIZE=page_size,
            DCP_SIZE=dcp_size,
            BLOCK=32,
        )
        check(table, seqlens, step, untouched_beyond=True)


if __name__ == "__main__":
    _run_interpreted()
