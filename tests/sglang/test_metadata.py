"""What the backend prepares for a step: in the order that a CUDA graph has it, for drafts, and when there is nothing to do."""

from __future__ import annotations

import unittest
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_kit as kit
import torch
from etap_sglang import backend as backend_module
from etap_sglang import calls
from etap_sglang.cpu_kv_pool import CpuMLATokenToKVPool
from etap_sglang.draft import EtapMultiStepDraftBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.test.kits.attention_unittest.attention_methods import mla_attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has its own file: test_gpu_kit.py")


def make(monkeypatch: pytest.MonkeyPatch, mode: ForwardMode, prefix_lens: tuple[int, ...], window: int = 0) -> Any:
    monkeypatch.setattr(mla_attention, "MLATokenToKVPool", CpuMLATokenToKVPool)
    return mla_attention.build_mla_attention_fixture(
        unittest.TestCase(),
        kit.case(mode, prefix_lens, window=window, page_size=16),
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        max_context_len=128,
        dtype=torch.bfloat16,
        device="cpu",
    )


@pytest.mark.parametrize(("mode", "window"), [(ForwardMode.DECODE, 0), (ForwardMode.DRAFT_EXTEND_V2, 3)], ids=["decode", "draft_extend"])
def test_replay_reads_the_lengths_of_the_day(monkeypatch: pytest.MonkeyPatch, mode: ForwardMode, window: int) -> None:
    """Guards against lengths or pages that are fixed when the graph is captured: captured on length 1, replayed on others."""
    fixture = make(monkeypatch, mode, (40, 3, 17), window)
    backend, batch = fixture.backend, fixture.forward_batch
    backend.init_cuda_graph_state(max_bs=4, max_num_tokens=16)
    lengths = batch.seq_lens.clone()
    batch.seq_lens.fill_(backend.get_cuda_graph_seq_len_fill_value() + window)
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    captured = backend.forward_metadata
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=backend)):
        backend.init_forward_metadata_in_graph(batch)
        fixture.actual_module(fixture.input_hidden, batch)
        batch.seq_lens.copy_(lengths)
        backend.init_forward_metadata_out_graph(batch)
        assert backend.forward_metadata.plan is captured.plan
        assert backend.forward_metadata.block_table.data_ptr() == captured.block_table.data_ptr()
        backend.init_forward_metadata_in_graph(batch)
        out = fixture.actual_module(fixture.input_hidden, batch)
    torch.testing.assert_close(out, mla_attention.expected_mla_fixture_output(fixture), atol=3e-2, rtol=3e-2)


def test_a_replay_counts_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the counters: no Python runs in a replay, so they are advanced when it is prepared, and not at the capture."""
    fixture = make(monkeypatch, ForwardMode.DECODE, (5, 6))
    backend, batch = fixture.backend, fixture.forward_batch
    backend.init_cuda_graph_state(max_bs=2, max_num_tokens=2)
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    before = sum(entry["calls"] for entry in calls.snapshot())
    backend.init_forward_metadata_out_graph(batch)
    assert sum(entry["calls"] for entry in calls.snapshot()) - before == backend.token_to_kv_pool.layer_num


def test_a_graph_never_moves_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a captured graph whose workspace was freed under it by a larger batch."""
    fixture = make(monkeypatch, ForwardMode.DECODE, (5, 6))
    fixture.backend.init_cuda_graph_state(max_bs=1, max_num_tokens=1)
    with pytest.raises(AssertionError, match="larger batch"):
        fixture.backend.init_forward_metadata_out_graph(fixture.forward_batch, in_capture=True)


def test_draft_steps_read_one_token_more_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the lengths of EAGLE's draft: step i reads the verified tokens and i + 1 of its own."""
    fixture = make(monkeypatch, ForwardMode.DECODE, (14, 30))
    container = EtapMultiStepDraftBackend(fixture.runner, 1, 4)
    batch = SimpleNamespace(**vars(fixture.forward_batch))
    container.init_forward_metadata(batch)
    seen = [backend._eager.seqlens.tolist() for backend in container.attn_backends]
    assert seen == [[length + step + 1 for length in batch.seq_lens.tolist()] for step in range(3)]


def radix_layer(fixture: Any) -> RadixAttention:
    return next(module for module in fixture.actual_module.modules() if isinstance(module, RadixAttention))


EMPTY_STEPS = {
    "idle": (ForwardMode.IDLE, []),
    "decode": (ForwardMode.DECODE, []),
    "prompts, none": (ForwardMode.EXTEND, []),
    "an empty prompt": (ForwardMode.EXTEND, [0]),
    "empty prompts beside finished ones": (ForwardMode.MIXED, [0, 0]),
    "a part of a prompt": (ForwardMode.SPLIT_PREFILL, [0]),
    "verification": (ForwardMode.TARGET_VERIFY, []),
    "draft extension": (ForwardMode.DRAFT_EXTEND_V2, []),
}


@pytest.mark.parametrize("delegates", [False, True], ids=["libetap computes prompts", "prompts are delegated"])
@pytest.mark.parametrize("rows", [0, 2], ids=["no rows", "rows of padding"])
@pytest.mark.parametrize("step", EMPTY_STEPS)
def test_steps_without_query_tokens(monkeypatch: pytest.MonkeyPatch, step: str, rows: int, delegates: bool) -> None:
    """Guards POST /generate {"text": ""}, which ended the process ("max_query_len is 0"), and its like in every kind of step: nothing is
    planned, written or handed to another backend, and rows that pad the batch come out as zeros."""
    mode, counts = EMPTY_STEPS[step]
    fixture = make(monkeypatch, ForwardMode.TARGET_VERIFY, (5, 40), 3)
    backend, layer = fixture.backend, radix_layer(fixture)
    backend.prefill = SimpleNamespace() if delegates else None  # which has no method that could be called
    lens = torch.tensor(counts, dtype=torch.int64)
    batch = SimpleNamespace(
        forward_mode=mode,
        batch_size=len(counts),
        seq_lens=lens,
        seq_lens_cpu=lens,
        req_pool_indices=lens,
        extend_seq_lens=lens,
        extend_seq_lens_cpu=counts,
    )
    pool = backend.token_to_kv_pool.get_key_buffer(layer.layer_id).clone()
    q, q_rope, k, k_rope = (torch.ones(rows, heads, width).bfloat16() for heads in (layer.tp_q_head_num, 1) for width in (512, 64))
    backend.init_forward_metadata(batch)
    for forward in (backend.forward_extend, backend.forward_decode):
        out = forward(q, k, k, layer, batch, q_rope=q_rope, k_rope=k_rope)
        assert torch.equal(out, torch.zeros(rows, layer.tp_q_head_num * 512, dtype=torch.bfloat16))
    assert torch.equal(backend.token_to_kv_pool.get_key_buffer(layer.layer_id), pool)
    monkeypatch.setattr(backend, "dcp_size", 2)
    out = backend.forward_extend(q, k, k, layer, batch, q_rope=q_rope, k_rope=k_rope)
    if mode.is_extend_without_speculative():
        assert isinstance(out, torch.Tensor)
    else:
        assert torch.equal(out[1], torch.full((rows, layer.tp_q_head_num), -torch.inf))


def test_drafts_without_query_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the same for drafts of several steps, eager and in a graph, and for the step that follows one."""
    fixture = make(monkeypatch, ForwardMode.DECODE, (14, 30))
    container = EtapMultiStepDraftBackend(fixture.runner, 1, 3)
    container.init_cuda_graph_state(max_bs=2, max_num_tokens=2)
    none = torch.empty(0, dtype=torch.int64)
    batch = SimpleNamespace(**vars(fixture.forward_batch))
    batch.batch_size, batch.seq_lens, batch.req_pool_indices = 0, none, none
    container.init_forward_metadata(batch)
    for backend in container.attn_backends:
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        backend.init_forward_metadata_in_graph(batch)
        assert backend.forward_metadata is None
    container.init_forward_metadata(fixture.forward_batch)
    lens = fixture.forward_batch.seq_lens
    assert [backend._eager.seqlens.tolist() for backend in container.attn_backends] == [(lens + step).tolist() for step in (1, 2)]


def test_an_empty_prompt_among_others(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards batches in which some prompts are empty: the others' rows are theirs."""
    generator = torch.Generator().manual_seed(seed)
    fixture = make(monkeypatch, ForwardMode.EXTEND, (5, 20), 3)
    backend, batch, layer = fixture.backend, fixture.forward_batch, radix_layer(fixture)
    heads = layer.tp_q_head_num
    q, q_rope = torch.randn(6, heads, 512, generator=generator).bfloat16(), torch.randn(6, heads, 64, generator=generator).bfloat16()
    pool = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
    pool.copy_(torch.randn(pool.shape, generator=generator))
    backend.init_forward_metadata(batch)
    both = backend.forward_extend(q, None, None, layer, batch, save_kv_cache=False, q_rope=q_rope)
    batch.extend_seq_lens_cpu, batch.extend_seq_lens = [0, 3], torch.tensor([0, 3])
    batch.seq_lens = batch.seq_lens * torch.tensor([0, 1])
    backend.init_forward_metadata(batch)
    one = backend.forward_extend(q[3:], None, None, layer, batch, save_kv_cache=False, q_rope=q_rope[3:])
    torch.testing.assert_close(one, both[3:])


def test_an_idle_batch_needs_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards data-parallel attention: a rank without requests still enters each forward pass."""
    fixture = make(monkeypatch, ForwardMode.DECODE, (5,))
    fixture.backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.IDLE, batch_size=0))
    assert fixture.backend.forward_metadata is None


@pytest.mark.parametrize("deterministic", [True, False])
def test_prefixes_are_shared_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    """Guards ETAP_SGLANG_SHARED_PREFIXES: decode plans take the page table, but not in batch-invariant mode, and prompts have none."""
    monkeypatch.setenv("ETAP_SGLANG_SHARED_PREFIXES", "1")
    mode = SimpleNamespace(enable_deterministic_inference=deterministic)
    monkeypatch.setattr(backend_module, "get_exec", lambda: SimpleNamespace(deterministic=mode))
    fixture = make(monkeypatch, ForwardMode.DECODE, (5, 40))
    assert fixture.backend._problem(batch=2, query_len=1).shared_prefixes is not deterministic
    assert not fixture.backend._problem(batch=2, query_len=3, total_q=5).shared_prefixes
    out = mla_attention.run_mla_fixture_eager(fixture)
    torch.testing.assert_close(out, mla_attention.expected_mla_fixture_output(fixture), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("enabled", [True, False])
def test_deterministic_inference_plans_invariantly(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    """Guards --enable-deterministic-inference: every plan must be made batch-invariant, and none without the flag."""
    deterministic = SimpleNamespace(enable_deterministic_inference=enabled)
    monkeypatch.setattr(backend_module, "get_exec", lambda: SimpleNamespace(deterministic=deterministic))
    fixture = make(monkeypatch, ForwardMode.DECODE, (5, 40))
    assert fixture.backend._problem(batch=2, query_len=1).batch_invariant is enabled
    out = mla_attention.run_mla_fixture_eager(fixture)
    torch.testing.assert_close(out, mla_attention.expected_mla_fixture_output(fixture), atol=3e-2, rtol=3e-2)
