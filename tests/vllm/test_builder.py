"""vLLM's metadata builder and layer, taken out of an engine, in the order of calls of a CUDA graph. Needs vLLM built for the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference

pytest.importorskip("vllm.platforms", reason="vLLM is not installed (docs/vllm.md tells how these tests were run)")

from demo_lib.checkpoint import write_random
from etap_vllm import backend, decode, plugin
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the vLLM that is installed is not built for the CPU")

BATCH = 4
DRAFTS = 3
CONTEXT = 512
SEQUENCES = 2 * CONTEXT  # as many query tokens, which a dummy run takes for the length of each of them


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from vllm import LLM

    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    write_random(folder)
    speculation = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv(plugin.ENVIRONMENT_VARIABLE, "1")
        plugin.register()
        yield LLM(str(folder), enforce_eager=True, max_model_len=CONTEXT, max_num_seqs=SEQUENCES, speculative_config=speculation)


def model_runner(engine: Any) -> Any:
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner


class Layer:
    """The first layer of an engine, its metadata builder, and a batch in static buffers, as a model runner keeps them."""

    def __init__(self, engine: Any, query_len: int) -> None:
        runner = model_runner(engine)
        group = runner.attn_groups[0][0]
        self.builder = group.get_metadata_builder(0)
        self.layer = runner.vllm_config.compilation_config.static_forward_context[group.layer_names[0]]
        self.query_len = query_len
        self.seq_lens = torch.full((BATCH,), query_len, dtype=torch.int32)
        self.block_table = torch.zeros(BATCH, 64, dtype=torch.int32)

    def case(self, lens: tuple[int, ...]) -> Case:
        heads, page = self.layer.num_heads, self.builder.kv_cache_spec.block_size
        return Case("builder", lens=lens, heads=heads, page_size=page, query_len=self.query_len)

    def common(self) -> CommonAttentionMetadata:
        starts = torch.arange(BATCH + 1, dtype=torch.int32) * self.query_len
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=self.seq_lens,
            num_reqs=BATCH,
            num_actual_tokens=BATCH * self.query_len,
            max_query_len=self.query_len,
            max_seq_len=CONTEXT,
            block_table_tensor=self.block_table,
            slot_mapping=torch.zeros(BATCH * self.query_len, dtype=torch.int64),
        )

    def load(self, inputs: Inputs) -> None:
        self.seq_lens.copy_(inputs.cache_seqlens)
        self.block_table[:, : inputs.block_table.shape[1]] = inputs.block_table

    def attend(self, inputs: Inputs, metadata: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.layer.impl.scale = inputs.softmax_scale
        result: tuple[torch.Tensor, torch.Tensor | None] = self.layer.impl.forward_mqa(
            (inputs.q_nope, inputs.q_rope), inputs.kv_cache, metadata, self.layer
        )
        return result


@pytest.mark.parametrize("query_len", [1, 1 + DRAFTS])
def test_capture_and_replays(engine: Any, query_len: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards full CUDA graphs of vLLM's own builder: what was captured on dummy lengths is right after each later build."""
    layer = Layer(engine, query_len)
    monkeypatch.setattr(layer.layer.impl, "need_to_return_lse_for_decode", True)  # as with context parallelism
    captured = layer.builder.build_for_cudagraph_capture(layer.common())
    assert isinstance(captured.decode, backend.EtapMLADecodeMetadata)
    assert (captured.num_decodes, captured.num_prefills) == (BATCH, 0)
    for number, lens in enumerate([(130, 64, 9, 77), (400, 5, 0, 0), (0, 0, 0, 0)]):
        inputs = make_inputs(layer.case(lens), seed + number)
        layer.load(inputs)
        layer.builder.build(0, layer.common())
        out, lse = layer.attend(inputs, captured)
        check(inputs, out, lse, reference(inputs))


def test_draft_steps(engine: Any, seed: int) -> None:
    """Guards drafts of several steps in one CUDA graph: lengths grow, and vLLM asks for new metadata in place."""
    layer = Layer(engine, 1)
    assert layer.builder.supports_draft_decode_metadata_update
    inputs = make_inputs(layer.case((130, 64, 9, 77)), seed)
    layer.load(inputs)
    layer.seq_lens -= DRAFTS
    metadata = layer.builder.build_for_drafting(layer.common(), 0)
    for _ in range(DRAFTS):
        layer.seq_lens += 1
        layer.builder.update_draft_decode_metadata(metadata)
    out, lse = layer.attend(inputs, metadata)
    assert lse is None
    check(inputs, out, None, reference(inputs))


def test_mixed_batches(engine: Any) -> None:
    """Guards batches in which prompts follow decodes: only the decodes are planned, whatever their number of drafts."""
    layer = Layer(engine, 1)
    counts = torch.tensor([0, 1, 4, 2, 50]).cumsum(0).int()
    layer.seq_lens.copy_(torch.tensor([30, 40, 20, 50]))
    common = layer.common().replace(
        query_start_loc=counts,
        query_start_loc_cpu=counts,
        num_actual_tokens=int(counts[-1]),
        max_query_len=50,
        seq_lens_cpu_upper_bound=layer.seq_lens.clone(),
    )
    metadata = layer.builder.build(0, common)
    assert (metadata.num_decodes, metadata.num_decode_tokens, metadata.num_prefills) == (3, 7, 1)
    problem = metadata.decode.plan.problem
    assert (problem.batch, problem.total_q, problem.max_query_len) == (3, 7, 1 + DRAFTS)


@pytest.mark.parametrize("tokens", [1, SEQUENCES // 2, SEQUENCES])
def test_dummy_runs(engine: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards vLLM's dummy runs: each of their sequences is as long as all have query tokens, which may be beyond the block table, and the
    process ended (SIGSEGV). No layer may read outside of the table, nor hand on a NaN."""
    outputs: list[torch.Tensor] = []
    attend = decode.attend

    def kept(*arguments: Any, **named: Any) -> Any:
        out, lse = attend(*arguments, **named)
        outputs.append(out)
        return out, lse

    monkeypatch.setattr(decode, "attend", kept)
    model_runner(engine)._dummy_run(tokens, force_attention=True)
    assert {out.shape[0] for out in outputs} == {tokens}
    assert all(bool(out.isfinite().all()) for out in outputs)


def test_a_capture_beyond_the_table(engine: Any, seed: int) -> None:
    """Guards graphs that are captured on lengths beyond a narrow block table, and are replayed on those of requests."""
    layer = Layer(engine, 1 + DRAFTS)
    page = layer.builder.kv_cache_spec.block_size
    inputs = make_inputs(layer.case((page,) * BATCH), seed)
    layer.load(inputs)
    layer.seq_lens.fill_(1000 * page)
    narrow = layer.common().replace(block_table_tensor=layer.block_table[:, :1], max_seq_len=1000 * page)
    captured = layer.builder.build_for_cudagraph_capture(narrow)
    assert bool(layer.attend(inputs, captured)[0].isfinite().all())
    assert layer.seq_lens.tolist() == [1000 * page] * BATCH  # they are vLLM's
    layer.load(inputs)
    layer.builder.build(0, layer.common())
    out, _ = layer.attend(inputs, captured)
    check(inputs, out, None, reference(inputs))
