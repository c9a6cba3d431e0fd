"""SGLang's attention test kit for the backend `etap` on the CPU: extend, decode, and verification of draft chains."""

from __future__ import annotations

import pytest
import sglang_kit as kit
import torch
from etap_sglang.cpu_kv_pool import CpuMLATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import mla_attention
from sglang.test.kits.attention_unittest.runner_modes import cuda_graph_decode_runner as decode_graph
from sglang.test.kits.attention_unittest.runner_modes import speculative_draft_extend_runner as draft_extend
from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as verify

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has its own file: test_gpu_kit.py")


@pytest.fixture(autouse=True)
def _pool_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool that the CPU platform hands to a server."""
    monkeypatch.setattr(mla_attention, "MLATokenToKVPool", CpuMLATokenToKVPool)


@pytest.mark.parametrize("dims", kit.DIMENSIONS, ids=str)
@pytest.mark.parametrize("case", kit.EXTEND_AND_DECODE, ids=lambda case: case.name)
def test_extend_and_decode(case: mla_attention.MLAAttentionCase, dims: tuple[int, int]) -> None:
    """Guards the page table, the lengths and the query offsets of ragged prompts at the edges of pages."""
    kit.run(mla_attention.run_mla_attention_case, case, device="cpu", dims=dims)


@pytest.mark.parametrize("case", kit.EXTEND_AND_DECODE, ids=lambda case: case.name)
def test_fp8_cache(case: mla_attention.MLAAttentionCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the scale and the bytes of an FP8 cache, against a reference whose keys went through the same rounding."""
    kit.round_reference_keys(monkeypatch, torch.float8_e4m3fn)
    kit.run(mla_attention.run_mla_attention_case, case, device="cpu", fp8_kv_cache=True)


def test_extend_in_float16() -> None:
    """Guards against a dtype that is taken from the model's default instead of the runner."""
    kit.run(mla_attention.run_mla_attention_case, kit.EXTEND_AND_DECODE[0], device="cpu", dtype=torch.float16)


@pytest.mark.parametrize("num_heads", [1, 6, 16, 128])
@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
def test_decode_shapes(num_heads: int, page_size: int) -> None:
    """Guards head counts that fill no tile, and caches that end on, before and after a page's edge."""
    case = kit.case(ForwardMode.DECODE, (0, 1, 62, 63, 64, 99), page_size=page_size, num_heads=num_heads)
    kit.run(mla_attention.run_mla_attention_case, case, device="cpu", max_context_len=128)


@pytest.mark.parametrize("window", [1, 3, 4])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_verify_a_chain(window: int, page_size: int) -> None:
    """Guards the lengths of a verification (the batch's lengths don't count its draft tokens) and its causal end."""
    case = kit.case(ForwardMode.TARGET_VERIFY, (1, 15, 16, 61, 63, 64), window=window, page_size=page_size)
    kit.run(verify.run_mla_eagle_verify_case, case, device="cpu", topk=1, max_context_len=128)


@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_draft_extend(window: int, page_size: int) -> None:
    """Guards the lengths of a draft extension outside a graph, whose window the batch's lengths do count."""
    case = kit.case(ForwardMode.DRAFT_EXTEND_V2, (1, 15, 61, 64), window=window, page_size=page_size)
    kit.run(mla_attention.run_mla_attention_case, case, device="cpu", max_context_len=128)


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_decode_in_the_order_of_a_graph(page_size: int) -> None:
    """Guards metadata that is captured on dummy lengths and refreshed for others, with padded rows; nothing is recorded."""
    case = kit.case(ForwardMode.DECODE, (1, 15, 63), page_size=page_size)
    kit.run(decode_graph.run_mla_cuda_graph_decode_case, case, device="cpu", max_context_len=128)


@pytest.mark.parametrize("page_size", [1, 64])
def test_verify_in_the_order_of_a_graph(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the same for a verification."""
    kit.lay_out_contiguously(monkeypatch, verify)
    case = kit.case(ForwardMode.TARGET_VERIFY, (1, 15, 62), window=3, page_size=page_size)
    kit.run(verify.run_mla_eagle_verify_cuda_graph_case, case, device="cpu", topk=1, max_context_len=128)


@pytest.mark.parametrize("page_size", [1, 64])
def test_draft_extend_in_the_order_of_a_graph(page_size: int) -> None:
    """Guards the same for a draft extension."""
    case = kit.case(ForwardMode.DRAFT_EXTEND_V2, (2, 15, 61), window=3, page_size=page_size)
    kit.run(draft_extend.run_mla_draft_extend_v2_cuda_graph_case, case, device="cpu", max_context_len=128)
