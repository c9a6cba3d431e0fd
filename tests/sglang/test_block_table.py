"""The page table of a step, against one written with Python loops: by PyTorch, and by the Triton kernel interpreted; and those of the
branches of a draft tree, against where SGLang puts them."""

from __future__ import annotations

import os
import random
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


def random_branches(seed: int, page_size: int) -> dict[str, Any]:
    """Requests with shuffled pages, of which some end with a page and most within one."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    requests, pages, batch = 5, 40 + 60 // page_size, 3
    slots = torch.randperm(requests * pages, generator=generator).view(requests, pages).repeat_interleave(page_size, 1) * page_size
    tokens = torch.arange(pages * page_size) % page_size
    most = pages * page_size - 4 * (8 + 2 * page_size)
    lengths = [rng.randint(1, most), rng.randint(1, most), rng.randint(1, max(1, most // page_size)) * page_size]
    return {
        "req_to_token": (slots + tokens).int(),
        "req_pool_indices": torch.randperm(requests, generator=generator)[:batch],
        "seq_lens": torch.tensor(lengths),
        "branches": rng.randint(2, 4),
        "branch_tokens": rng.randint(2, 6),
        "page_size": page_size,
    }


def slots_of_branch(step: dict[str, Any], request: int, branch: int, extra_tokens: int) -> list[int]:
    """Of each token that a branch reads: the request's, of whose last page that is not full the branch has a copy, and its own."""
    row = step["req_to_token"][int(step["req_pool_indices"][request])].tolist()
    length, size = int(step["seq_lens"][request]), step["page_size"]
    full = length - length % size
    pages = -(-(length % size + step["branch_tokens"]) // size)
    return row[:full] + [row[t + branch * pages * size] for t in range(full, length + extra_tokens)]


def fill_branches(step: dict[str, Any], extra_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(step["seq_lens"]) * step["branches"]
    longest = int(step["seq_lens"].max()) + extra_tokens
    table = torch.full((rows, -(-longest // step["page_size"])), -7, dtype=torch.int32)
    lengths = torch.full((rows,), -7, dtype=torch.int32)
    block_table.fill_branches(table, lengths, extra_tokens=extra_tokens, **step)
    return table, lengths


def slots_of(table: torch.Tensor, row: int, length: int, page_size: int) -> list[int]:
    return [int(table[row, t // page_size]) * page_size + t % page_size for t in range(length)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
def test_page_tables_of_branches(page_size: int, dtype: torch.dtype, seed: int) -> None:
    """Guards against drafts of another branch, and a last page of the request whose own drafts would be read by all branches."""
    for number in range(10):
        step = random_branches(seed + number, page_size)
        step |= {name: step[name].to(dtype) for name in ("req_pool_indices", "seq_lens")}
        for extra in range(1, step["branch_tokens"]):
            table, lengths = fill_branches(step, extra)
            assert lengths.tolist() == [int(n) + extra for n in step["seq_lens"] for _ in range(step["branches"])]
            for row in range(len(table)):
                wanted = slots_of_branch(step, *divmod(row, step["branches"]), extra)
                assert slots_of(table, row, len(wanted), page_size) == wanted


def test_kernel_in_the_interpreter(seed: int) -> None:
    """Guards the kernel that a CUDA graph records, on a machine without a GPU, which must not write beyond a sequence, and its branches,
    against PyTorch's; and the drafts of a branch, which are where the kernel finds them by which SGLang's own backends read."""
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
            0,
            PAGE_SIZE=page_size,
            DCP_SIZE=dcp_size,
            BRANCHES=1,
            BLOCK=32,
        )
        check(table, seqlens, step, untouched_beyond=True)


def _run_branches_interpreted() -> None:
    for page_size in (1, 16, 64):
        step = random_branches(int(os.environ["ETAP_TEST_BLOCK_TABLE_SEED"]), page_size)
        for extra in range(1, step["branch_tokens"]):
            by_pytorch, lengths = fill_branches(step, extra)
            table, seqlens = torch.full_like(by_pytorch, UNTOUCHED), torch.full_like(lengths, UNTOUCHED)
            block_table.fill_kernel[(len(table), -(-table.shape[1] // 32))](
                *(table, seqlens, *(step[name] for name in ("req_to_token", "req_pool_indices", "seq_lens")), table.stride(0)),
                *(step["req_to_token"].stride(0), table.shape[1], extra, 0, step["branch_tokens"]),
                PAGE_SIZE=page_size,
                DCP_SIZE=1,
                BRANCHES=step["branches"],
                BLOCK=32,
            )
            assert seqlens.tolist() == lengths.tolist()
            for row, wanted, length in zip(table.tolist(), by_pytorch.tolist(), lengths.tolist(), strict=True):
                pages = -(-length // page_size)
                assert row[:pages] == wanted[:pages]
                assert set(row[pages:]) <= {UNTOUCHED}


def _compare_with_sglang() -> None:
    from sglang.kernels.ops.speculative.cache_locs import generate_draft_decode_kv_indices

    for page_size in (1, 4, 16):
        step = random_branches(int(os.environ["ETAP_TEST_BLOCK_TABLE_SEED"]), page_size)
        batch, branches, steps = len(step["seq_lens"]), step["branches"], step["branch_tokens"]
        lens, table, width = step["seq_lens"], step["req_to_token"], 8192
        indices = torch.zeros(steps, width, dtype=torch.int64)
        starts = torch.zeros(steps, batch * branches + 1, dtype=torch.int32)
        positions = lens.repeat_interleave(branches)
        generate_draft_decode_kv_indices[(steps, batch, branches)](
            *(step["req_pool_indices"], table, lens, indices, starts, positions, table.stride(0), width, starts.shape[1]),
            *(4, 8, 16, page_size),
        )
        for extra in range(1, steps):
            ours, _ = fill_branches(step, extra)
            ends = (positions + extra).cumsum(0).tolist()
            for row, length in enumerate(positions.tolist()):
                theirs = indices[extra - 1, ends[row] - length - extra : ends[row]].tolist()
                mine = slots_of(ours, row, length + extra, page_size)
                full = length - length % page_size  # of what follows up to `length` SGLang reads the original, and libetap the copy
                assert mine[:full] == theirs[:full], (page_size, row)
                assert mine[length:] == theirs[length:], (page_size, row)


if __name__ == "__main__":
    _run_interpreted()
    _run_branches_interpreted()
    _compare_with_sglang()
