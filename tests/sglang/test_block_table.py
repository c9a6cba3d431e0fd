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


def random_step(seed: int, page_size: int) -> dict[str, Any]:
    """Requests with shuffled pages, in a table that is larger than needed."""
    generator = torch.Generator().manual_seed(seed)
    requests, context, batch = 6, 40 * page_size, 4
    pages = torch.randperm(requests * 40, generator=generator).view(requests, 40)
    slots = pages.repeat_interleave(page_size, 1) * page_size + torch.arange(context) % page_size
    return {
        "req_to_token": slots.to(torch.int32),
        "req_pool_indices": torch.randperm(requests, generator=generator)[:batch],
        "seq_lens": torch.randint(1, 30 * page_size, (batch,), generator=generator),
        "extra_tokens": int(torch.randint(0, 5, (), generator=generator)),
        "page_size": page_size,
    }


def buffers() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((4, 48), UNTOUCHED, dtype=torch.int32)[:, :40], torch.full((4,), UNTOUCHED, dtype=torch.int32)


def expected(step: dict[str, Any]) -> tuple[list[list[int]], list[int]]:
    lengths = [int(n) + step["extra_tokens"] for n in step["seq_lens"]]
    size = step["page_size"]
    rows = [step["req_to_token"][r].tolist() for r in step["req_pool_indices"].tolist()]
    return [[row[t] // size for t in range(0, n, size)] for row, n in zip(rows, lengths, strict=True)], lengths


def check(table: torch.Tensor, seqlens: torch.Tensor, step: dict[str, Any], *, untouched_beyond: bool) -> None:
    pages, lengths = expected(step)
    assert seqlens.tolist() == lengths
    for row, wanted in zip(table.tolist(), pages, strict=True):
        assert row[: len(wanted)] == wanted
        if untouched_beyond:
            assert set(row[len(wanted) :]) == {UNTOUCHED}


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 256])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_with_pytorch(seed: int, page_size: int, dtype: torch.dtype) -> None:
    """Guards against slots that are taken for pages, and a request's row that is taken for the batch's."""
    step = random_step(seed, page_size)
    step |= {name: step[name].to(dtype) for name in ("req_pool_indices", "seq_lens")}
    table, seqlens = buffers()
    block_table.fill(table, seqlens, **step)
    check(table, seqlens, step, untouched_beyond=False)


def test_kernel_in_the_interpreter(seed: int) -> None:
    """Guards the kernel that a CUDA graph records, on a machine without a GPU; it must not write beyond a sequence."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "ETAP_TEST_BLOCK_TABLE_SEED": str(seed)}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _run_interpreted() -> None:
    for page_size in (1, 16, 64):
        step = random_step(int(os.environ["ETAP_TEST_BLOCK_TABLE_SEED"]), page_size)
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
            PAGE_SIZE=page_size,
            BLOCK=32,
        )
        check(table, seqlens, step, untouched_beyond=True)


if __name__ == "__main__":
    _run_interpreted()
