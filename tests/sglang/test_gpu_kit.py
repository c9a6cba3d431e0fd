"""SGLang's attention test kit for the backend `etap` on a GPU: eager and in CUDA graphs, decode, verification and drafts."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
    pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the GPU is not an SM90"),
]

pytest.importorskip("sglang", reason="sglang is not installed")
import sglang_kit as kit  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.test.kits.attention_unittest.attention_methods import mla_attention  # noqa: E402
from sglang.test.kits.attention_unittest.runner_modes import (  # noqa: E402
    cuda_graph_decode_runner,
    speculative_draft_extend_runner,
    speculative_draft_runner,
    speculative_target_verify_runner,
)

PAGE_SIZES = [1, 16, 64]
HEADS = [1, 8, 12, 16, 64, 128]


@pytest.mark.parametrize("dims", kit.DIMENSIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", kit.EXTEND_AND_DECODE, ids=lambda case: case.name)
def test_extend_and_decode(case: mla_attention.MLAAttentionCase, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Guards the hand-over between prompts, which SGLang's Triton backend computes, and decode, which libetap does."""
    kit.run(mla_attention.run_mla_attention_case, case, device="cuda", dims=dims, dtype=dtype)


@pytest.mark.parametrize("case", kit.EXTEND_AND_DECODE, ids=lambda case: case.name)
def test_fp8_cache(case: mla_attention.MLAAttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the scale and the bytes of an FP8 cache, against a reference whose keys went through the same rounding."""
    if case.forward_mode != ForwardMode.DECODE:
        pytest.skip("a prompt's own tokens reach the delegated backend before they are rounded")
    kit.round_reference_keys(monkeypatch, torch.float8_e4m3fn)
    kit.run(mla_attention.run_mla_attention_case, case, device="cuda", fp8_kv_cache=True)


@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_decode_graph(num_heads: int, page_size: int) -> None:
    """Guards a graph that is captured on dummy lengths and replayed on others, with padded rows."""
    case = kit.case(ForwardMode.DECODE, (1, 15, 63), page_size=page_size, num_heads=num_heads)
    kit.run(cuda_graph_decode_runner.run_mla_cuda_graph_decode_case, case, device="cuda", max_context_len=128)


@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("num_heads", [8, 12, 16])
def test_verify(window: int, page_size: int, num_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the lengths and the causal end of a verification, eager and in a graph."""
    kit.lay_out_contiguously(monkeypatch, speculative_target_verify_runner)
    case = kit.case(ForwardMode.TARGET_VERIFY, (1, 15, 62), window=window, page_size=page_size, num_heads=num_heads)
    options = {"device": "cuda", "topk": 1, "max_context_len": 128}
    kit.run(speculative_target_verify_runner.run_mla_eagle_verify_case, case, **options)
    kit.run(speculative_target_verify_runner.run_mla_eagle_verify_cuda_graph_case, case, **options)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_draft_extend(page_size: int) -> None:
    """Guards the lengths of a draft extension: in a graph the batch counts its window, outside it may not."""
    case = kit.case(ForwardMode.DRAFT_EXTEND_V2, (2, 15, 61), window=3, page_size=page_size)
    kit.run(mla_attention.run_mla_attention_case, case, device="cuda", max_context_len=128)
    kit.run(speculative_draft_extend_runner.run_mla_draft_extend_v2_cuda_graph_case, case, device="cuda", max_context_len=128)


def test_draft() -> None:
    """Guards the multi-step draft: SGLang's own draft runner, eager against its CUDA graph.

    Of two steps, one of which attends. With three and four the kit's own legs differ, with SGLang's Triton backend as well; those are
    guarded by whole engines, whose drafts from the same model must be accepted.
    """
    case = kit.case(ForwardMode.DECODE, (2, 5, 9), page_size=1)
    options = {"speculative_num_steps": 2, "speculative_num_draft_tokens": 2}
    kit.run(speculative_draft_runner.run_mla_eagle_draft_cuda_graph_runner_case, case, device="cuda", **options)


SPARSE_STEPS = [(ForwardMode.DECODE, 0), (ForwardMode.TARGET_VERIFY, 3), (ForwardMode.DRAFT_EXTEND_V2, 4)]


@pytest.mark.parametrize("fp8_kv_cache", [False, True], ids=["BF16", "FP8"])
@pytest.mark.parametrize(("mode", "window"), SPARSE_STEPS, ids=["decode", "verify", "draft_extend"])
@pytest.mark.parametrize("num_heads", [8, 16, 64, 128])
def test_sparse(num_heads: int, mode: ForwardMode, window: int, fp8_kv_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards models with sparse attention, whose lists are shorter than their width, as long, and chosen from more."""
    sizes = {"window": window, "num_heads": num_heads, "fp8_kv_cache": fp8_kv_cache}
    kit.check_sparse(kit.sparse_fixture(monkeypatch, mode, (3, 64, 127, 300), **sizes))


@pytest.mark.parametrize("fp8_kv_cache", [False, True], ids=["BF16", "FP8"])
@pytest.mark.parametrize(("mode", "window"), SPARSE_STEPS[:2], ids=["decode", "verify"])
@pytest.mark.parametrize("num_heads", [8, 64])
def test_sparse_graph(num_heads: int, mode: ForwardMode, window: int, fp8_kv_cache: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a graph of a sparse model: captured on length 1, replayed on the counts of the day, which its own plan reads."""
    fixture = kit.sparse_fixture(monkeypatch, mode, (40, 3, 150), window=window, num_heads=num_heads, fp8_kv_cache=fp8_kv_cache)
    kit.check_sparse_replay(fixture)
