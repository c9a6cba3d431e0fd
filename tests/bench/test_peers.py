"""The peers' adapters, as far as they need no GPU."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from etap_bench import peers
from etap_bench.inputs import Arena, Inputs, arena_tokens
from etap_bench.shape import Shape


@pytest.mark.parametrize("newer", [False, True])
def test_flash_mla_of_both_kinds(newer: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions that keep dense decoding among their legacy kernels raised "Sparse attention is required" for every shape of an H100 run;
    those before them do not know the argument that asks for it."""
    torch.manual_seed(seed)
    shape = Shape(lengths=(65, 130), query_lens=(1, 1), heads=16)
    inputs = Inputs(shape, Arena("bf16", 512, 64, arena_tokens(shape, 1), "cpu"), pools=1)
    inputs.device = "cuda:0"  # what the adapter asks for; the stand-in takes any tensor
    expected = torch.randn(2, 1, 16, 512)

    def older_decode(*tensors: Any, softmax_scale: float, causal: bool) -> tuple[torch.Tensor, None]:
        assert causal
        assert softmax_scale == inputs.softmax_scale
        assert tensors[2].min() >= 0  # FlashMLA takes valid page numbers only, past a sequence's end too
        return expected, None

    def newer_decode(*tensors: Any, softmax_scale: float, causal: bool, use_legacy: bool = False) -> tuple[torch.Tensor, None]:
        assert use_legacy, "Sparse attention is required"
        return older_decode(*tensors, softmax_scale=softmax_scale, causal=causal)

    stand_in = types.SimpleNamespace(
        get_mla_metadata=lambda *arguments: (None, None), flash_mla_with_kvcache=newer_decode if newer else older_decode
    )
    monkeypatch.setitem(sys.modules, "flash_mla", stand_in)
    assert peers.prepare("flashmla", inputs)(0) is expected
