"""SGLang's MLA token pools for a device without Triton."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MLATokenToKVPool
from sglang.srt.runtime_context import get_parallel


class _CpuRows:
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


class CpuMLATokenToKVPool(_CpuRows, MLATokenToKVPool):
    """The pool of a dense model."""


class CpuDSATokenToKVPool(_CpuRows, DSATokenToKVPool):
    """The pool of a sparse model. Rows of an FP8 cache are packed by PyTorch, too."""

    def _write_mla_kv_buffer(
        self, dst_buffer: torch.Tensor, loc: torch.Tensor, cache_k_nope: torch.Tensor, cache_k_rope: torch.Tensor | None
    ) -> None:
        if self.dsa_kv_cache_store_fp8:
            self._scatter_mla_rows(dst_buffer, loc, packed(cache_k_nope, cache_k_rope), None)
        else:
            super()._write_mla_kv_buffer(dst_buffer, loc, cache_k_nope, cache_k_rope)


def packed(latent: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """Rows of bytes: E4M3 latent, an FP32 scale for each 128 of its values, BF16 rope.

    latent [tokens, 1, latent], rope [tokens, 1, rope] or None; uint8 [tokens, 1, latent + latent / 32 + 2 * rope]
    """
    groups = latent.float().unflatten(-1, (-1, DSATokenToKVPool.quant_block_size))
    scales = groups.abs().amax(-1, keepdim=True).clamp_min(1e-10) / torch.finfo(torch.float8_e4m3fn).max
    parts = [(groups / scales).to(torch.float8_e4m3fn).flatten(-2), scales.squeeze(-1), *([] if rope is None else [rope.bfloat16()])]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
