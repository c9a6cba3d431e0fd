"""The mask of a draft tree, as SGLang builds it and as libetap reads it."""

from __future__ import annotations

import torch


def pack(mask: torch.Tensor, bits: torch.Tensor) -> None:
    """Bit j % 32 of bits[r, j // 32] = mask[r, j].

    mask  bool [rows, drafts]
    bits  int32 [rows, words], enough words of 32 drafts

    No host work, and shapes that the arguments' shapes give: a graph can record it.
    """
    room = 32 * bits.shape[1] - mask.shape[1]
    flags = torch.nn.functional.pad(mask, (0, room)).unflatten(1, (-1, 32))
    powers = torch.ones(32, dtype=torch.int32, device=mask.device) << torch.arange(32, dtype=torch.int32, device=mask.device)
    bits.copy_((flags * powers).sum(-1, dtype=torch.int32))
