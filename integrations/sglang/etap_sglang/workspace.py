"""Memory for libetap's plans."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_ALIGNMENT = 256  # of a workspace, as etap.h asks; PyTorch aligns host memory to 64 only


@dataclass
class Workspace:
    """A workspace that grows. A graph holds its address: once static, it is never replaced."""

    device: torch.device
    static: bool = False
    memory: torch.Tensor = field(init=False)  # uint8

    def __post_init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8, device=self.device)

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes, keeping what is large enough already."""
        if size <= self.memory.numel():
            return
        self.check_growth()
        room = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=self.device)
        self.memory = room[-room.data_ptr() % _ALIGNMENT :][:size]

    def check_growth(self) -> None:
        assert not self.static, "a CUDA graph was given a larger batch than init_cuda_graph_state announced"
