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
) -> None:
    """cache_seqlens[b] = seq_lens[b] + extra_tokens and block_table[b, p] = the page of its token p * page_size.

    block_table    int32 [batch, pages], rows may be strided; written up to each sequence's last page
    cache_seqlens  int32 [batch]
    req_to_token   int32 [requests, context]: the KV slot of each token; a page's slots are consecutive
    req_pool_indices, seq_lens  int32 or int64 [batch]

    On CUDA one kernel without host work, which a graph can record.
    """
    if block_table.is_cuda:
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
            PAGE_SIZE=page_size,
            BLOCK=_PAGES_PER_PROGRAM,
        )
        return
    torch.add(seq_lens, extra_tokens, out=cache_seqlens)
    pages = -(-int(cache_seqlens.max()) // page_size)
    slots = req_to_token[req_pool_indices.long(), : pages * page_size : page_size]
    torch.div(slots, page_size, rounding_mode="floor", out=block_table[:, :pages])


_PAGES_PER_PROGRAM = 512


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
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(seq_lens + row).to(tl.int32) + extra_tokens
    if tl.program_id(1) == 0:
        tl.store(cache_seqlens + row, length)
    pages = tl.minimum((length + PAGE_SIZE - 1) // PAGE_SIZE, table_pages)
    page = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    request = tl.load(req_pool_indices + row).to(tl.int64)
    slot = tl.load(req_to_token + request * request_stride + page.to(tl.int64) * PAGE_SIZE, mask=page < pages, other=0)
    tl.store(block_table + row * table_stride + page, slot // PAGE_SIZE, mask=page < pages)
