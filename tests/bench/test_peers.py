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


@pytest.mark.parametrize(("heads", "filled"), [(16, 64), (64, 64), (66, 128)])
def test_flash_mla_of_lists(heads: int, filled: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sparse decoding takes 64 or 128 heads: others are filled up, and the results of those that were there come back."""
    torch.manual_seed(seed)
    shape = Shape(lengths=(128, 70), heads=heads, kv_format="e4m3_656", context=128, sparse=True)
    inputs = Inputs(shape, Arena("e4m3_656", 512, 64, arena_tokens(shape, 2), "cpu"), pools=2)
    inputs.device = "cuda:0"  # what the adapter asks for; the stand-in takes any tensor
    expected = torch.randn(2, 1, filled, 512)

    def decode(q: torch.Tensor, kv: torch.Tensor, *others: Any, indices: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        assert q.shape == (2, 1, filled, 576) and torch.equal(q[:, 0, :heads], inputs.q)
        assert kv.shape[1:] == (64, 1, 656) and others == (None, None, 512, "schedule", None)
        assert indices.shape == (2, 1, 128)
        assert options == {"softmax_scale": inputs.softmax_scale, "is_fp8_kvcache": True, "topk_length": inputs.cache_seqlens}
        return expected, None

    stand_in = types.SimpleNamespace(get_mla_metadata=lambda: ("schedule", None), flash_mla_with_kvcache=decode)
    monkeypatch.setitem(sys.modules, "flash_mla", stand_in)
    assert torch.equal(peers.prepare("flashmla", inputs)(1), expected[:, 0, :heads])
