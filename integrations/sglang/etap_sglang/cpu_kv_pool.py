"""SGLang's MLA token pool for a device without Triton."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool
from sglang.srt.runtime_context import get_parallel


class CpuMLATokenToKVPool(MLATokenToKVPool):
    """Rows of [latent | rope] scattered by PyTorch instead of by a Triton kernel."""

    def _scatter_mla_rows(
        self,
        dst_buffer: torch.Tensor,
        loc: torch.Tensor,
        cache_k_nope: torch.Tensor,
        cache_k_rope: torch.Tensor | None,
    ) -> None:
        """dst_buffer [slots, 1, latent + rope], loc [tokens], cache_k_nope [tokens, 1, latent], cache_k_rope [tokens, 1, rope]."""
        parallel = get_parallel()
        if parallel.attn_dcp_size > 1:  # slots are numbered over all ranks together; this one stores its own
            own = loc % parallel.attn_dcp_size == parallel.attn_dcp_rank
            loc, cache_k_nope = loc[own] // parallel.attn_dcp_size, cache_k_nope[own]
            cache_k_rope = None if cache_k_rope is None else cache_k_rope[own]
        latent = cache_k_nope.shape[-1]
        dst_buffer[loc, :, :latent] = cache_k_nope
        if cache_k_rope is not None and cache_k_rope.numel():
            dst_buffer[loc, :, latent:] = cache_k_rope
