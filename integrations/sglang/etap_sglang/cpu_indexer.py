"""What the indexer of a sparse model computes with GPU kernels, in PyTorch: index keys in FP8, logits, and the tokens that are chosen.

For each query token the tokens with the largest logits are chosen: sum over the index heads of weight * relu(query . key), in which
query and key are rounded to E4M3 with a scale a row (DeepSeek-V3.2-Exp, section 2.1).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.model_executor.forward_context import get_attn_backend, get_token_to_kv_pool
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

LARGEST = 448.0  # of E4M3


@functools.cache
def install() -> None:
    """From now on indexers compute with this module."""
    Indexer.forward_native = choose
    HookRegistry.register("sglang.srt.layers.attention.dsa_backend.seqlens_expand_triton", expanded_lengths, HookType.REPLACE)
    HookRegistry.apply_hooks()
    envs.SGLANG_OPT_USE_TOPK_V2.set(False)  # a kernel that would have to be planned for each step


def choose(
    indexer: Indexer,
    x: torch.Tensor,
    q_lora: torch.Tensor,
    positions: torch.Tensor,
    forward_batch: ForwardBatch,
    layer_id: int,
    return_indices: bool = True,
) -> torch.Tensor | None:
    """Store the index keys of the batch's tokens, and choose for each of them.

    x [tokens, hidden], q_lora [tokens, q_lora_rank], positions [tokens]
    Returns int32 [tokens, index_topk]: slots of the KV pool, -1 behind the last; None where nobody asks for them.
    """
    query, key = queries_and_keys(indexer, x, q_lora, positions)
    pool = get_token_to_kv_pool()
    keys, scales = index_keys(pool.get_index_k_with_scale_buffer(layer_id), pool.index_page_size, indexer.head_dim)
    where = forward_batch.out_cache_loc.long()
    place = where // pool.index_page_size, where % pool.index_page_size
    keys[place], scales[place] = rounded(key)
    if not return_indices:
        return None

    metadata = get_attn_backend().get_indexer_metadata(layer_id, forward_batch).attn_metadata
    table, lengths = metadata.page_table_1.long(), metadata.dsa_seqlens_expanded
    rows = metadata.token_to_batch_idx  # of the table; None: each query token has its own
    weights = indexer.weights_proj(x)[0].float() * (indexer.n_heads * indexer.head_dim) ** -0.5
    values, scale = rounded(query)
    query = values.float() * scale[..., None]
    chosen = torch.full((len(x), indexer.index_topk), -1, dtype=torch.int32)
    for row in range(len(table)):
        tokens = torch.tensor([row]) if rows is None else (rows == row).nonzero().flatten()
        if len(tokens) == 0 or (longest := int(lengths[tokens].max())) == 0:
            continue
        slots = table[row, :longest]
        place = slots // pool.index_page_size, slots % pool.index_page_size
        seen = keys[place].float() * scales[place][:, None]
        products = torch.einsum("thd,kd->thk", query[tokens], seen).relu()
        logits = torch.einsum("thk,th->tk", products, weights[tokens])
        indexer._mask_init_and_local_tokens(logits, lengths[tokens].long())
        logits.masked_fill_(torch.arange(longest) >= lengths[tokens, None], -torch.inf)
        best = logits.topk(min(indexer.index_topk, longest))
        chosen[tokens, : best.indices.shape[1]] = torch.where(best.values == -torch.inf, -1, slots[best.indices]).int()
    return chosen


def queries_and_keys(indexer: Indexer, x: torch.Tensor, q_lora: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(query [tokens, heads, width], key [tokens, width]), with their positions.

    SGLang rotates both by a Hadamard matrix besides, which spreads their values before they are rounded and changes no product; its
    fused kernels leave that out, too.
    """
    query = indexer.wq_b(q_lora)[0].unflatten(-1, (indexer.n_heads, indexer.head_dim))
    key = indexer.k_norm(indexer.wk(x)[0]).unsqueeze(1)
    cos, sin = indexer.rotary_emb.cos_sin_cache[positions].unsqueeze(1).chunk(2, -1)
    rope, pairs = indexer.rope_head_dim, (2, -1) if indexer.is_neox_style else (-1, 2)
    along = -2 if indexer.is_neox_style else -1
    for part in (query[..., :rope], key[..., :rope]):
        real, imaginary = part.float().unflatten(-1, pairs).unbind(along)
        part.copy_(torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), along).flatten(-2))
    return query, key.squeeze(1)


def expanded_lengths(extend_seq_lens: torch.Tensor, seq_lens: torch.Tensor, total_len: int, max_q_len: int) -> torch.Tensor:
    """How many tokens each of the last extend_seq_lens[b] tokens of a sequence of seq_lens[b] sees: int32 [total_len]."""
    starts = torch.repeat_interleave(seq_lens - extend_seq_lens - extend_seq_lens.cumsum(0) + extend_seq_lens, extend_seq_lens)
    return (starts + torch.arange(1, total_len + 1)).int().clamp_min(0)


def index_keys(buffer: torch.Tensor, page_size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(E4M3 [pages, page_size, width], FP32 [pages, page_size]): keys and scales of a layer's pages, as views of their bytes."""
    values, scales = buffer.split([page_size * width, page_size * 4], dim=1)
    return values.view(torch.float8_e4m3fn).unflatten(1, (page_size, width)), scales.view(torch.float32)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(E4M3 values of x's shape, FP32 scales without its last dimension): each row with a power of two for a scale."""
    largest = x.float().abs().amax(-1).clamp_min(1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(largest / LARGEST)))
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale
