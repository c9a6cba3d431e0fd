"""A step's page table and lengths, written into static buffers from SGLang's request-to-token table.

Both ways of writing leave what lies beyond a sequence's last page as it was: libetap never reads it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def fill(
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extra_tokens: int,
    page_size: int,
    dcp_size: int = 1,
    dcp_rank: int = 0,
) -> None:
    """cache_seqlens[b] = seq_lens[b] + extra_tokens and block_table[b, p] = the page of its token p * page_size.

    block_table    int32 [batch, pages], rows may be strided; written up to each sequence's last page
    cache_seqlens  int32 [batch]
    req_to_token   int32 [requests, context]: the KV slot of each token; a page's slots are consecutive
    req_pool_indices, seq_lens  int32 or int64 [batch]
    dcp_size, dcp_rank  decode context parallelism: of each sequence this rank holds the tokens dcp_rank, dcp_rank + dcp_size, ..., and
                    cache_seqlens counts those. Slots are numbered over all ranks together: slot s is row s // dcp_size of one of them

    On CUDA one kernel without host work, which a graph can record.
    """
    if block_table.is_cuda:
        requests = req_to_token, req_pool_indices, seq_lens
        _launch(block_table, cache_seqlens, *requests, extra_tokens, page_size=page_size, dcp_size=dcp_size, dcp_rank=dcp_rank)
        return
    cache_seqlens.copy_((seq_lens + (extra_tokens + dcp_size - 1 - dcp_rank)) // dcp_size)
    pages = -(-int(cache_seqlens.max()) // page_size)
    span = page_size * dcp_size  # tokens of the sequence to a page of this rank
    slots = req_to_token[req_pool_indices.long(), : pages * span : span]
    torch.div(slots, span, rounding_mode="floor", out=block_table[:, :pages])


def fill_gathered(
    block_table: torch.Tensor, cache_seqlens: torch.Tensor, *, kv_indptr: torch.Tensor, kv_indices: torch.Tensor, seq_lens: torch.Tensor
) -> None:
    """The same for KV rows that lie apart, as pages of one token: those of sequence b are kv_indices[kv_indptr[b] : kv_indptr[b + 1]].

    block_table, cache_seqlens, seq_lens  as for `fill`
    kv_indptr, kv_indices  int32 [batch + 1] and [tokens]
    """
    tokens = kv_indptr[:-1, None] + torch.arange(block_table.shape[1], device=block_table.device)
    block_table.copy_(kv_indices[tokens.clamp(max=len(kv_indices) - 1)])
    cache_seqlens.copy_(seq_lens)


def fill_branches(
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    branches: int,
    branch_tokens: int,
    extra_tokens: int,
    page_size: int,
) -> None:
    """The same for the branches of a draft tree: each reads its request's tokens and `extra_tokens` of its own.

    block_table    int32 [batch * branches, pages], those of a request one after the other
    cache_seqlens  int32 [batch * branches]
    branch_tokens  slots that each branch has behind the request's tokens, on pages of its own where these begin within one: branch b has
                   those of the request's last page that is not full, whose tokens it holds again, b times as many pages further

    On CUDA the kernel of `fill`. Elsewhere no host work either, and shapes that the arguments' shapes give.
    """
    if block_table.is_cuda:
        requests = req_to_token, req_pool_indices, seq_lens
        _launch(block_table, cache_seqlens, *requests, extra_tokens, page_size=page_size, branches=branches, branch_tokens=branch_tokens)
        return
    lens = seq_lens.to(torch.int64)[:, None, None]
    page = torch.arange(block_table.shape[1], device=block_table.device)
    branch = torch.arange(branches, device=block_table.device)[:, None]
    full_pages, rest = lens // page_size, lens % page_size
    pages_of_branch = (rest + branch_tokens + page_size - 1) // page_size
    token = (page + (page >= full_pages) * branch * pages_of_branch) * page_size
    # Columns behind a branch's last page are not read, whatever they hold.
    slots = req_to_token[req_pool_indices.to(torch.int64)[:, None, None], token.clamp(max=req_to_token.shape[1] - 1)]
    block_table.copy_(slots.flatten(0, 1) // page_size)
    cache_seqlens.copy_((seq_lens + extra_tokens).repeat_interleave(branches))


_PAGES_PER_PROGRAM = 512


def _launch(
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extra_tokens: int,
    *,
    page_size: int,
    dcp_size: int = 1,
    dcp_rank: int = 0,
    branches: int = 1,
    branch_tokens: int = 0,
) -> None:
    grid = (block_table.shape[0], triton.cdiv(block_table.shape[1], _PAGES_PER_PROGRAM))
    fill_kernel[grid](
        block_table,
        cache_seqlens,
        req_to_token,
        req_pool_indices,
        seq_lens,
        block_table.stride(0),
        req_to_token.stride(0),
        block_table.shape[1],
        extra_tokens,
        dcp_rank,
        branch_tokens,
        PAGE_SIZE=page_size,
        DCP_SIZE=dcp_size,
        BRANCHES=branches,
        BLOCK=_PAGES_PER_PROGRAM,
    )


@triton.jit
def fill_kernel(
    block_table,
    cache_seqlens,
    req_to_token,
    req_pool_indices,
    seq_lens,
    table_stride,
    request_stride,
    table_pages,
    extra_tokens,
    dcp_rank,
    branch_tokens,
    PAGE_SIZE: tl.constexpr,
    DCP_SIZE: tl.constexpr,
    BRANCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    given = tl.load(seq_lens + row // BRANCHES).to(tl.int32)
    length = (given + extra_tokens + (DCP_SIZE - 1) - dcp_rank) // DCP_SIZE
    if tl.program_id(1) == 0:
        tl.store(cache_seqlens + row, length)
    pages = tl.minimum((length + PAGE_SIZE - 1) // PAGE_SIZE, table_pages)
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    request = tl.load(req_pool_indices + row // BRANCHES).to(tl.int64)
    span = PAGE_SIZE * DCP_SIZE  # tokens of the sequence to a page of this rank
    column = page.to(tl.int64)
    if BRANCHES > 1:
        of_branch = (given % PAGE_SIZE + branch_tokens + PAGE_SIZE - 1) // PAGE_SIZE
        column += tl.where(page >= given // PAGE_SIZE, row % BRANCHES * of_branch, 0)
    slot = tl.load(req_to_token + request * request_stride + column * span, mask=page < pages, other=0)
    tl.store(block_table + row * table_stride + page, slot // span, mask=page < pages)
