"""vLLM's sparse MLA layer and metadata builder with the backend, without an engine. Needs vLLM on its CPU platform, compiled or not.

vLLM's Triton kernels, which number the query tokens' requests and translate lists into rows, run here where Triton can (in its
interpreter: `CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1`); elsewhere a few lines of PyTorch stand in for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Inputs, check, make_inputs
from torch import Tensor
from vllm_kit import Lists, choose, query_start_loc, requests_of

pytest.importorskip("vllm.platforms", reason="vLLM is not installed (docs/vllm.md tells how these tests were run)")

from etap_vllm import SPARSE_NAME, decode, seams, shapes, sparse_backend
from vllm import distributed
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import mla_attention, sparse_mla_attention
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.ops import metadata as metadata_ops

import etap_py as etap

pytestmark = [
    pytest.mark.skipif(not current_platform.is_cpu(), reason="vLLM is not on its CPU platform"),
    pytest.mark.skipif(bool(seams.missing(SPARSE_NAME)), reason="this vLLM has other seams for sparse models"),
]

TOPK = 128
HEADS = 16
DRAFTS = 3
MAX_TOKENS = 64
MODEL = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_topk": TOPK,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
}


def convert(req_id: Tensor, block_table: Tensor, token_indices: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    """In place of vLLM's kernel: rows of the cache, the valid ones first, and their count."""
    size, apart = named["BLOCK_SIZE"], named["BLOCK_STRIDE_ROWS"]
    tokens = token_indices.long().clamp(min=0)
    blocks = block_table[req_id.long()[:, None], tokens // size]
    rows = torch.where(token_indices >= 0, blocks * apart + tokens % size, -1).int()
    order = (rows < 0).int().argsort(dim=1, stable=True)
    return rows.gather(1, order), (rows >= 0).sum(1).int()


def convert_share(req_id: Tensor, block_table: Tensor, token_indices: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
    """In place of vLLM's kernel: of the tokens that this rank of context parallelism has."""
    ranks, rank, together = named["dcp_size"], named["dcp_rank"], named["cp_kv_cache_interleave_size"]
    mine = (token_indices >= 0) & (token_indices // together % ranks == rank)
    local = token_indices // (ranks * together) * together + token_indices % together
    return convert(req_id, block_table, torch.where(mine, local, -1), **named)


def number_requests(query_start_loc: Tensor, out: Tensor, num_mapped_tokens: int, num_tokens: int) -> Tensor:
    """In place of vLLM's kernel."""
    out[:num_tokens] = requests_of(query_start_loc, num_tokens)
    out[num_mapped_tokens:num_tokens] = 0
    return out[:num_tokens]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        if not HAS_TRITON:
            patch.setattr(sparse_mla_attention, "triton_convert_req_index_to_global_index", convert)
            patch.setattr(sparse_mla_attention, "triton_filter_and_convert_dcp_index", convert_share)
            patch.setattr(metadata_ops, "compute_token_to_req_indices", number_requests)
            patch.setattr(sparse_backend, "compute_token_to_req_indices", number_requests)
        limits = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": MAX_TOKENS, "enable_chunked_prefill": True}
        drafts = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_max": 2}
        arguments = EngineArgs(model=str(folder), skip_tokenizer_init=True, enforce_eager=True, speculative_config=drafts, **limits)
        made = arguments.create_engine_config()
        with set_current_vllm_config(made):
            distributed.init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
            distributed.initialize_model_parallel(1)
            yield made
            distributed.destroy_model_parallel()
            distributed.destroy_distributed_environment()


class Layer:
    """A sparse MLA layer, its metadata builder, and a batch in static buffers, as a model runner keeps them."""

    def __init__(self, config: VllmConfig, case: Case, kv_cache_dtype: str = "auto", **impl_args: Any) -> None:
        self.case = case
        self.lists = torch.full((MAX_TOKENS, TOPK), -1, dtype=torch.int32)
        config.compilation_config.static_forward_context.clear()
        config.cache_config.cache_dtype = kv_cache_dtype
        config.model_config.hf_text_config.qk_rope_head_dim = case.d_rope
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            self.layer = mla_attention.MLAAttention(
                num_heads=HEADS,
                scale=0.1,
                qk_nope_head_dim=128,
                qk_rope_head_dim=case.d_rope,
                v_head_dim=128,
                q_lora_rank=64,
                kv_lora_rank=512,
                kv_b_proj=ColumnParallelLinear(512, HEADS * 256, bias=False, prefix="kv_b_proj"),
                cache_config=config.cache_config,
                prefix="layer",
                attn_backend=sparse_backend.EtapMLASparseBackend,
                use_sparse=True,
                topk_indices_buffer=self.lists,
                **impl_args,
            )
        finally:
            torch.set_default_dtype(default)
        spec = self.layer.get_kv_cache_spec(config).copy_with_new_block_size(case.page_size)
        spec = sparse_backend.EtapMLASparseBackend.customize_spec(spec)
        self.builder = sparse_backend.EtapMLASparseBackend.get_builder_cls()(spec, ["layer"], config, torch.device("cpu"))
        self.seq_lens = torch.zeros(case.num_seqs, dtype=torch.int32)
        self.block_table = torch.zeros(case.num_seqs, 64, dtype=torch.int32)

    def common(self, case: Case | None = None) -> CommonAttentionMetadata:
        case = case or self.case
        starts = query_start_loc(case)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=self.seq_lens[: case.num_seqs],
            num_reqs=case.num_seqs,
            num_actual_tokens=case.rows,
            max_query_len=case.max_query_len,
            max_seq_len=512,
            block_table_tensor=self.block_table[: case.num_seqs],
            slot_mapping=torch.zeros(case.rows, dtype=torch.int64),
            seq_lens_cpu_upper_bound=self.seq_lens[: case.num_seqs].clone(),
        )

    def load(self, inputs: Inputs, seed: int) -> Lists:
        """A batch, and an indexer's choice: numbers of tokens within their sequences, the -1 anywhere."""
        case = inputs.case
        self.seq_lens[: case.num_seqs] = inputs.cache_seqlens
        self.block_table[: case.num_seqs, : inputs.block_table.shape[1]] = inputs.block_table
        lists = choose(inputs, TOPK, seed)
        self.lists.fill_(-1)
        generator = torch.Generator().manual_seed(seed)
        of_row = torch.full((int(lists.rows.shape[0]) + 1,), -1)
        apart = inputs.kv_cache.stride(0) // lists.rows.shape[1]
        for b, length in enumerate(inputs.cache_seqlens.tolist()):
            t = torch.arange(length)
            of_row[inputs.block_table[b, t // case.page_size].long() * apart + t % case.page_size] = t
        for row, slots in enumerate(lists.slots):
            self.lists[row, torch.randperm(TOPK, generator=generator)] = of_row[slots.long()].int()
        return lists

    def attend(self, inputs: Inputs, metadata: Any) -> tuple[Tensor, Tensor | None]:
        self.layer.impl.scale = inputs.softmax_scale
        rope = inputs.q_nope[..., :0] if inputs.q_rope is None else inputs.q_rope
        kv_cache = inputs.kv_cache
        if inputs.case.kv == "e4m3_528":
            kv_cache = kv_cache.as_strided((*kv_cache.shape[:2], 656), kv_cache.stride())
        result: tuple[Tensor, Tensor | None] = self.layer.impl.forward_mqa((inputs.q_nope, rope), kv_cache, metadata, self.layer)
        return result


@pytest.mark.parametrize(
    ("kv_cache_dtype", "form"),
    [
        ("auto", Case("bf16", page_gap=2 * 576)),
        ("auto", Case("blocks of 16", page_size=16)),
        ("fp8_ds_mla", Case("fp8_ds_mla", kv_format="e4m3_656", page_gap=656)),
        ("auto", Case("no rope", d_rope=0)),
        ("fp8_ds_mla", Case("no rope, fp8_ds_mla", d_rope=0, kv_format="e4m3_528", row_gap=656 - 528, page_gap=656)),
        ("fp8", Case("fp8, scale 1", kv_format="e4m3", kv_scale=1.0)),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
@pytest.mark.parametrize(
    "step", [{"lens": (200, 64, 9, 77)}, {"lens": (64, 9, 200, 77), "query_lens": (4, 1, 9, 2)}, {"lens": (200, 64, 0, 0)}], ids=str
)
def test_a_layer(config: VllmConfig, kv_cache_dtype: str, form: Case, step: dict[str, Any], seed: int) -> None:
    """Guards the whole way from an indexer's choice to a layer's result: vLLM's metadata, its translation of lists, its view of rows."""
    case = replace(form, **step)
    layer = Layer(config, case, kv_cache_dtype)
    assert layer.layer.impl.supports_dense_mha_prefill is (case.kv != "e4m3_528")  # it would read 576 values a row
    inputs = make_inputs(case, seed)
    lists = layer.load(inputs, seed)
    out, lse = layer.attend(inputs, layer.builder.build(0, layer.common()))
    assert lse is None
    check(inputs, out, None, lists.expected())


@pytest.mark.parametrize("query_len", [1, 1 + DRAFTS])
def test_capture_and_replays(config: VllmConfig, query_len: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards full CUDA graphs of vLLM's own builder: what was captured on dummy lengths is right after each later build."""
    case = Case("capture", lens=(0,) * 4, query_len=query_len)
    layer = Layer(config, case)
    monkeypatch.setattr(layer.layer.impl, "need_to_return_lse_for_decode", True)  # as with context parallelism
    captured = layer.builder.build_for_cudagraph_capture(layer.common())
    for number, lens in enumerate([(200, 64, 9, 77), (400, 5, 0, 0), (0, 0, 0, 0)]):
        inputs = make_inputs(replace(case, lens=lens), seed + number)
        lists = layer.load(inputs, seed + number)
        layer.builder.build(0, layer.common())
        out, lse = layer.attend(inputs, captured)
        check(inputs, out, lse, lists.expected())


def test_draft_steps(config: VllmConfig, seed: int) -> None:
    """Guards drafts of several steps in one CUDA graph: lengths grow, and vLLM asks for new metadata in place."""
    layer = Layer(config, Case("draft", lens=(200, 64, 9, 77)))
    assert layer.builder.supports_draft_decode_metadata_update
    inputs = make_inputs(layer.case, seed)
    lists = layer.load(inputs, seed)
    layer.seq_lens -= 3
    metadata = layer.builder.build_for_drafting(layer.common(), 0)
    for _ in range(3):
        layer.seq_lens += 1
        layer.builder.update_draft_decode_metadata(metadata)
    out, _ = layer.attend(inputs, metadata)
    check(inputs, out, None, lists.expected())


@pytest.mark.parametrize("to_prefill", [False, True])
def test_prompts(config: VllmConfig, to_prefill: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards batches with prompts: the plan has the query tokens that the layer computes by lists, all of them or the decodes."""
    layer = Layer(config, Case("mixed", lens=(200, 64, 40), query_lens=(1, 1, 20)))
    monkeypatch.setattr(layer.layer, "_use_sparse_mha", lambda metadata: to_prefill)
    inputs = make_inputs(layer.case, seed)
    lists = layer.load(inputs, seed)
    metadata = layer.builder.build(0, layer.common())
    assert (metadata.num_decodes, metadata.num_prefills) == (2, 1)
    rows = 2 if to_prefill else 22
    assert metadata.plan.problem.batch == rows
    mine = replace(inputs, q_nope=inputs.q_nope[:rows], q_rope=inputs.q_rope[:rows])
    out, _ = layer.attend(mine, metadata)
    expected = lists.expected()
    expected = replace(expected, out=expected.out[:rows], lse=expected.lse[:rows], logit_size=expected.logit_size[:rows])
    check(inputs, out, None, expected)


def test_decode_context_parallelism(config: VllmConfig, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards ranks that have every other token of the cache: queries in one tensor, a share of each list, and the log-sum-exp with which
    vLLM joins the results. The ranks take turns here."""
    ranks = 2
    case = Case("dcp", lens=(200, 64, 1, 77), page_size=16)
    layer = Layer(config, case)
    impl = layer.layer.impl
    inputs = make_inputs(case, seed)
    lists = layer.load(inputs, seed)
    monkeypatch.setattr(impl, "scale", inputs.softmax_scale)
    monkeypatch.setattr(impl, "dcp_world_size", ranks)
    monkeypatch.setattr(impl, "need_to_return_lse_for_decode", True)
    q = torch.cat([inputs.q_nope, inputs.q_rope], dim=-1)
    layer.block_table.copy_(torch.arange(layer.block_table.numel()).view_as(layer.block_table))
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(impl, "dcp_rank", rank)
        cache = torch.full((layer.block_table.numel(), 16, 576), float("nan"), dtype=torch.bfloat16)
        for b, length in enumerate(case.lens):
            for local, t in enumerate(range(rank, length, ranks)):
                page = inputs.block_table[b, t // 16]
                cache[layer.block_table[b, local // 16], local % 16] = inputs.kv_cache[page, t % 16]
        parts.append(impl.forward_mqa(q, cache, layer.builder.build(0, layer.common()), layer.layer))
    assert parts[1][1][2].isinf().all()  # the second rank has no token of the sequence of one
    out, lse = etap.merge(torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts]), "e")
    check(inputs, out, lse, lists.expected())


def test_a_whole_layer(config: VllmConfig, seed: int) -> None:
    """Guards what vLLM does around the backend: absorbing the queries, and bringing the results to the model's width."""
    case = Case("layer", lens=(200, 64, 9, 77))
    layer = Layer(config, case)
    generator = torch.Generator().manual_seed(seed)
    weight = layer.layer.kv_b_proj.weight
    weight.data.copy_((torch.randn(weight.shape, generator=generator) * 512**-0.5).to(weight.dtype))
    layer.layer.process_weights_after_loading(torch.bfloat16)
    inputs = make_inputs(case, seed)
    lists = layer.load(inputs, seed)
    layer.layer.impl.scale = inputs.softmax_scale
    q = (torch.randn(4, HEADS, 192, generator=generator) * 4).bfloat16()
    output = torch.empty(4, HEADS * 128, dtype=torch.bfloat16)
    new = inputs.q_nope.new_zeros(4, 512), inputs.q_nope.new_zeros(4, 1, 64)  # are in the cache already
    layer.layer.forward_impl(q, *new, inputs.kv_cache, layer.builder.build(0, layer.common()), output)

    w_uk, w_uv = weight.double().view(HEADS, 256, 512).split(128, dim=1)
    absorbed = torch.einsum("tnp,npl->tnl", q[..., :128].double(), w_uk)
    expected = replace(lists, inputs=replace(inputs, q_nope=absorbed, q_rope=q[..., 128:].double())).expected()
    want = torch.einsum("tnl,nvl->tnv", expected.out, w_uv).reshape(4, -1)
    difference = (output.double() - want).norm() / want.norm()
    assert difference < 0.01, f"relative difference {difference:.4f}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sliding_window": 128}, "ETAP_MLA_SPARSE: a layer has a sliding window, which libetap does not compute"),
        ({"kv_cache_dtype": "float16"}, "ETAP_MLA_SPARSE: q_dtype is 0 and kv_format is 1"),
        ({"hisparse": True}, "ETAP_MLA_SPARSE: HiSparse"),
        ({"max_tokens": 131072}, "--max-num-batched-tokens is 131072; allowed: up to 65536"),
    ],
    ids=str,
)
def test_layers_that_are_refused(config: VllmConfig, change: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards refusals before the weights are loaded, in a sentence that begins with the name that the user gave."""
    change = dict(change)
    if change.pop("hisparse", False):
        monkeypatch.setattr(config.attention_config, "hisparse_config", object())
    if tokens := change.pop("max_tokens", 0):
        monkeypatch.setattr(config.scheduler_config, "max_num_batched_tokens", tokens)
    with pytest.raises(shapes.EtapRefusal) as refused:
        Layer(config, Case("refused", lens=(5,)), **change)
    assert said in str(refused.value)


@pytest.mark.skipif(not HAS_TRITON, reason="vLLM has no Triton here")
def test_lists_end_with_none(seed: int) -> None:
    """Guards what the plan relies on: vLLM's translation has the tokens of a list at its beginning and -1 from there on."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-40, 64, (5, TOPK), generator=generator, dtype=torch.int32).clamp(min=-1)
    table = torch.randperm(40, generator=generator).int().view(5, 8)
    numbers = torch.arange(5, dtype=torch.int32)
    given = {"BLOCK_SIZE": 8, "BLOCK_STRIDE_ROWS": 11, "NUM_TOPK_TOKENS": TOPK, "return_valid_counts": True}
    rows, counts = sparse_mla_attention.triton_convert_req_index_to_global_index(numbers, table, tokens, **given)
    want, want_counts = convert(numbers, table, tokens, **given)
    assert torch.equal(counts, want_counts)
    for row, wanted, count in zip(rows, want, counts.tolist(), strict=True):
        assert (row[count:] == -1).all()
        assert sorted(row[:count].tolist()) == sorted(wanted[:count].tolist())


def test_the_plan_is_the_step_s(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against planning in every layer, which takes as long as computing it: a step is planned once, whatever its layers."""
    layer = Layer(config, Case("once", lens=(200, 64)))
    planned = []
    update = decode.update
    monkeypatch.setattr(decode, "update", lambda *given: (planned.append(given), update(*given)))
    inputs = make_inputs(layer.case, 1)
    layer.load(inputs, 1)
    metadata = layer.builder.build(0, layer.common())
    for _ in range(3):
        layer.attend(inputs, metadata)
    assert len(planned) == 1
