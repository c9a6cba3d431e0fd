"""SGLang's own attention test kit, which comes in its wheel, made to run with a backend from outside."""

from __future__ import annotations

import functools
import unittest
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from etap_sglang import calls, cpu_indexer, sparse_options
from etap_sglang.cpu_kv_pool import CpuDSATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.plugins import load_plugins
from sglang.test.kits.attention_unittest.attention_methods import dsa_attention, mla_attention

load_plugins()

DIMENSIONS = [(512, 64), (512, 0), (256, 64)]
EXTEND_AND_DECODE = mla_attention.make_mla_cases("etap")


def case(
    mode: ForwardMode, prefix_lens: tuple[int, ...], *, window: int = 0, page_size: int = 64, num_heads: int = 4
) -> mla_attention.MLAAttentionCase:
    """`window` query tokens for each of the requests, whose caches hold `prefix_lens` tokens."""
    return mla_attention.MLAAttentionCase(
        name=f"{mode.name.lower()}_{page_size}_{num_heads}_{'_'.join(map(str, prefix_lens))}",
        backend="etap",
        forward_mode=mode,
        num_heads=num_heads,
        page_size=page_size,
        prefix_lens=prefix_lens,
        extend_lens=(window,) * len(prefix_lens) if window else (),
    )


def run(function: Any, *args: Any, device: str, dims: tuple[int, int] = (512, 64), **options: Any) -> None:
    """One of the kit's run_..._case functions. It compares with its own reference and raises where they differ."""
    options.setdefault("dtype", torch.bfloat16)
    function(unittest.TestCase(), *args, kv_lora_rank=dims[0], qk_rope_head_dim=dims[1], device=device, **options)


def lay_out_contiguously(monkeypatch: pytest.MonkeyPatch, runner_mode: ModuleType) -> None:
    """For the kit's run_..._cuda_graph_case: its eager leg fills the cache contiguously, however the batch's pages lie."""
    fixture = functools.partial(mla_attention.build_mla_attention_fixture, loc_layout="contiguous")
    monkeypatch.setattr(runner_mode, "build_mla_attention_fixture", fixture)


def round_reference_keys(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Make the kit's reference see its keys as a cache of `dtype` holds them."""
    original = mla_attention.ReferenceDeepseekMLAAttention.project_latent_qk

    def rounded(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, q_rope, k_rope = original(self, hidden_states)
        return q, k.to(dtype).to(k.dtype), q_rope, k_rope.to(dtype).to(k.dtype)

    monkeypatch.setattr(mla_attention.ReferenceDeepseekMLAAttention, "project_latent_qk", rounded)


def sparse_fixture(
    monkeypatch: pytest.MonkeyPatch,
    mode: ForwardMode,
    prefix_lens: tuple[int, ...],
    *,
    window: int = 0,
    index_topk: int = 128,
    num_heads: int = 4,
    fp8_kv_cache: bool = False,
) -> Any:
    """The kit's fixture of a sparse model: SGLang's `dsa` backend as a server with `--attention-backend etap` gets it.

    Its lists (index_topk of the kit's "head_tail") hold slots of the pool, as SGLang's fused top-k gives them.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        cpu_indexer.install()
        monkeypatch.setattr(dsa_attention, "DSATokenToKVPool", CpuDSATokenToKVPool)
    monkeypatch.setattr(sparse_options, "is_asked_for", lambda _: True)
    fixture = dsa_attention.build_dsa_sparse_attention_fixture(
        unittest.TestCase(),
        dsa_attention.DSAAttentionCase(
            name=f"{mode.name.lower()}_{prefix_lens}",
            backend="dsa",
            forward_mode=mode,
            num_heads=num_heads,
            num_kv_heads=1,
            page_size=dsa_attention.DSA_PAGE_SIZE,
            prefix_lens=prefix_lens,
            extend_lens=(window,) * len(prefix_lens) if window else (),
        ),
        device=device,
        dsa_prefill_backend=sparse_options.METHOD,
        dsa_decode_backend=sparse_options.METHOD,
        fp8_kv_cache=fp8_kv_cache,
        index_topk=index_topk,
        index_pattern="head_tail",
    )
    batch = fixture.forward_batch
    requests = torch.repeat_interleave(batch.req_pool_indices, torch.tensor(fixture.case.input_lens, device=device))
    slots = fixture.runner.req_to_token_pool.req_to_token[requests].gather(1, fixture.topk_indices.long().clamp_min(0)).int()
    fixture.topk_indices = torch.where(fixture.topk_indices < 0, -1, slots)
    return fixture


def check_sparse(fixture: Any) -> None:
    """Compare what the fixture's backend computes with the kit's reference."""
    expect_sparse(fixture, dsa_attention.run_dsa_sparse_fixture_eager(fixture, unittest.TestCase()))


def expect_sparse(fixture: Any, out: torch.Tensor) -> None:
    """The kit's own limits are 0.16, and 0.2 for FP8 caches."""
    limit = 6e-2 if fixture.backend.dsa_kv_cache_store_fp8 else 1.5e-2
    torch.testing.assert_close(out, dsa_attention.expected_dsa_sparse_fixture_output(fixture), atol=limit, rtol=limit)


def sparse_forward(fixture: Any) -> torch.Tensor:
    """What a graph records: the beginning of the step, then its layers."""
    module, backend = fixture.actual_module, fixture.backend
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=backend)):
        backend.init_forward_metadata_in_graph(fixture.forward_batch)
        q_nope, q_rope = module.project_q(fixture.input_hidden)
        k_nope, k_rope = module.project_k(fixture.input_hidden)
        out = module.attn(q_nope, k_nope, k_nope, fixture.forward_batch, k_rope=k_rope, q_rope=q_rope, topk_indices=fixture.topk_indices)
        return module.o_proj(out.reshape(len(out), -1))


def check_sparse_replay(fixture: Any) -> None:
    """Capture the fixture's step on length 1 and replay it on its own lengths; without a GPU, in the same order. A plan is made once for a
    graph, updated where the graph records it, and its memory never moves."""
    backend, batch = fixture.backend, fixture.forward_batch
    rows = len(fixture.topk_indices)
    backend.init_cuda_graph_state(max_bs=batch.batch_size, max_num_tokens=rows)
    lengths = batch.seq_lens.clone()
    batch.seq_lens.fill_(backend.get_cuda_graph_seq_len_fill_value())
    batch.seq_lens_cpu = batch.seq_lens.cpu()
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    replay = captured(lambda: sparse_forward(fixture))
    step = backend._graph_steps[backend._kind(), rows]
    batch.seq_lens.copy_(lengths)
    batch.seq_lens_cpu = batch.seq_lens.cpu()
    before = calls_of(backend._kind())
    backend.init_forward_metadata_out_graph(batch)
    assert calls_of(backend._kind()) == before + backend.token_to_kv_pool.layer_num, "a replay counts its layers"
    out = replay()
    assert torch.cuda.is_available() or backend._step is step  # a graph's replay passes by Python
    assert step.plan.workspace.data_ptr() == backend._graph.memory.data_ptr()
    expect_sparse(fixture, out)


def captured(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A CUDA graph of `forward`, after a trial as SGLang makes it; without a GPU `forward` itself, called once."""
    forward()
    if not torch.cuda.is_available():
        return forward
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def calls_of(step: str) -> int:
    """How many libetap has served in this process."""
    return sum(int(call["calls"]) for call in calls.snapshot() if call["step"] == step)
