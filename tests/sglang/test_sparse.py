"""Models with sparse attention without a server: SGLang's `dsa` backend with libetap's decode, by SGLang's kit and against FP64."""

from __future__ import annotations

import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
import sglang_kit as kit
import torch
from etap_sglang import NAME, calls, cpu_indexer, cpu_kv_pool, dispatch, refusals, seams, sparse, sparse_options
from etap_sglang.refusals import EtapRefusal
from sglang.srt.layers.attention import dsa_backend
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.dsa.dsa_indexer import Indexer
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import dsa_attention
from sparse_reference import attention, row_values

import etap_py as etap

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has its own file: test_gpu_kit.py")


def run(fixture: Any) -> torch.Tensor:
    return dsa_attention.run_dsa_sparse_fixture_eager(fixture, unittest.TestCase())


# ---- SGLang's kit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8_kv_cache", [False, True], ids=["BF16", "FP8"])
@pytest.mark.parametrize(
    ("mode", "window", "kind"),
    [
        (ForwardMode.EXTEND, 5, "extend"),
        (ForwardMode.DECODE, 0, "decode"),
        (ForwardMode.TARGET_VERIFY, 3, "verify"),
        (ForwardMode.DRAFT_EXTEND_V2, 4, "draft_extend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_kit(monkeypatch: pytest.MonkeyPatch, mode: ForwardMode, window: int, kind: str, fp8_kv_cache: bool) -> None:
    """Guards every kind of step: lists shorter than their width, as long, and chosen from more; and that libetap computes it."""
    fixture = kit.sparse_fixture(monkeypatch, mode, (3, 63, 64, 127, 128, 300), window=window, fp8_kv_cache=fp8_kv_cache)
    assert type(fixture.backend) is sparse.EtapSparseAttnBackend
    before = kit.calls_of(kind)
    kit.check_sparse(fixture)
    assert kit.calls_of(kind) == before + 1


@pytest.mark.parametrize("padding", [1, 3])
def test_rows_of_padding(monkeypatch: pytest.MonkeyPatch, padding: int) -> None:
    """Guards graphs and data-parallel attention, whose batches have more rows than tokens: the rows that pad see nothing, and cost the
    others nothing. Their lists are all -1, and there may be no count for them."""
    fixture = kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (5, 200))
    alone = run(fixture)
    q = torch.randn(2 + padding, 4, 512 + 64).bfloat16()
    fixture.backend.init_forward_metadata(fixture.forward_batch)
    arguments = {"q_nope": q[..., :512], "q_rope": q[..., 512:], "page_table": padded(fixture.topk_indices, padding)}
    out = call(fixture, **arguments)
    assert torch.equal(out[2:], torch.zeros_like(out[2:]))
    counts = torch.cat([fixture.backend.forward_metadata.dsa_cache_seqlens_int32, torch.zeros(padding + 2, dtype=torch.int32)])
    fixture.backend.init_forward_metadata(fixture.forward_batch)
    assert torch.equal(call(fixture, **arguments, cache_seqlens=counts), out)
    torch.testing.assert_close(run(fixture), alone, atol=0, rtol=0)


def padded(lists: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([lists, lists.new_full((rows, lists.shape[1]), -1)])


def call(fixture: Any, **arguments: Any) -> Any:
    """The method that is libetap's, as SGLang calls it."""
    metadata = fixture.backend.forward_metadata
    given = {
        "kv_cache": fixture.backend.token_to_kv_pool.get_key_buffer(0),
        "v_head_dim": 512,
        "cache_seqlens": metadata.dsa_cache_seqlens_int32,
        "cu_seqlens_q": metadata.dsa_cu_seqlens_q,
        "cu_seqlens_k": metadata.dsa_cu_seqlens_k,
        "max_seqlen_q": 1,
        "sm_scale": 576**-0.5,
        "logit_cap": 0.0,
        "page_size": 1,
    }
    return fixture.backend._forward_fa3(**(given | arguments))


# ---- Against FP64 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [64, 0], ids=["rope", "no rope"])
@pytest.mark.parametrize("fp8_kv_cache", [False, True], ids=["BF16", "FP8"])
def test_against_fp64(monkeypatch: pytest.MonkeyPatch, seed: int, fp8_kv_cache: bool, rope: int) -> None:
    """Guards the values: lists in any order with -1 anywhere, a slot twice, the pool's last slot, a count of 0, queries as the model
    hands them over (a transposed product, a slice), and rows of 1152, 1024, 656 and 528 bytes."""
    generator = torch.Generator().manual_seed(seed)
    heads, tokens, width = 12, 7, 40
    fixture = kit.sparse_fixture(
        monkeypatch, ForwardMode.DECODE, (5,) * tokens, index_topk=width, num_heads=heads, fp8_kv_cache=fp8_kv_cache
    )
    backend, slots_in_pool = fixture.backend, len(fixture.backend.token_to_kv_pool.get_key_buffer(0))
    latent = torch.randn(slots_in_pool, 1, 512, generator=generator).bfloat16()
    k_rope = torch.randn(slots_in_pool, 1, rope, generator=generator).bfloat16()
    if rope == 0:
        monkeypatch.setattr(backend, "qk_rope_head_dim", 0)
        monkeypatch.setattr(backend, "_kv_format", "e4m3_528" if fp8_kv_cache else "bf16")
    pool, values = torch.cat([latent, k_rope], -1), torch.cat([latent, k_rope], -1).double().squeeze(1)
    if fp8_kv_cache:
        pool = cpu_kv_pool.packed(latent, k_rope).view(torch.float8_e4m3fn)
        values = row_values(pool.squeeze(1))
    lists = torch.randint(-1, slots_in_pool, (tokens, width), generator=generator, dtype=torch.int32)
    lists[torch.rand(lists.shape, generator=generator) < 0.2] = -1
    lists[0, 3] = lists[0, 5] = slots_in_pool - 1
    counts = torch.tensor([width, 0, 1, 7, width, width - 1, 13], dtype=torch.int32)
    lists[4] = -1
    q_nope = torch.randn(heads, tokens, 512, generator=generator).bfloat16().transpose(0, 1)
    q_rope = torch.randn(tokens, heads, 32 + rope, generator=generator).bfloat16()[..., 32:]
    backend.init_forward_metadata(fixture.forward_batch)
    scale = 0.1
    out = call(fixture, q_nope=q_nope, q_rope=q_rope, kv_cache=pool, page_table=lists, cache_seqlens=counts, sm_scale=scale)
    expected, _ = attention(torch.cat([q_nope, q_rope], -1), values, lists, counts, scale)
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)
    assert torch.equal(out[[1, 4]], torch.zeros_like(out[[1, 4]])), "tokens that see nothing"


def test_shares_of_ranks(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Guards decode context parallelism: each rank attends to its own of a list's slots, and their results merge by a log-sum-exp in
    base 2, which is what SGLang takes `dsa` to return."""
    generator = torch.Generator().manual_seed(seed)
    fixture = kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (5,) * 6, index_topk=24, num_heads=8)
    backend, ranks = fixture.backend, 3
    values = torch.randn(192, 576, generator=generator).bfloat16()
    lists = torch.randint(-1, 192, (6, 24), generator=generator, dtype=torch.int32)
    lists[0] = lists[0] // ranks * ranks  # all of them the first rank's
    counts = torch.tensor([24, 24, 0, 3, 23, 24], dtype=torch.int32)
    q = torch.randn(6, 8, 576, generator=generator).bfloat16()
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(backend, "dcp_size", ranks)
        monkeypatch.setattr(backend, "dcp_rank", rank)
        backend.init_forward_metadata(fixture.forward_batch)
        own = values[rank::ranks].unsqueeze(1).contiguous()
        parts.append(call(fixture, q_nope=q[..., :512], q_rope=q[..., 512:], kv_cache=own, page_table=lists, cache_seqlens=counts))
    out, lse = etap.merge(torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]), "2")
    expected, expected_lse = attention(q, values.double(), lists, counts, 576**-0.5)
    torch.testing.assert_close(out.double(), expected, atol=1.5e-2, rtol=1.5e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=2e-3)


# ---- Steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "window"),
    [(ForwardMode.DECODE, 0), (ForwardMode.TARGET_VERIFY, 3)],
    ids=["decode", "verify"],
)
def test_replay_reads_the_counts_of_the_day(monkeypatch: pytest.MonkeyPatch, mode: ForwardMode, window: int) -> None:
    """Guards against counts that are fixed when a graph is captured, and against a plan beside the graph's."""
    kit.check_sparse_replay(kit.sparse_fixture(monkeypatch, mode, (40, 3, 150), window=window))


def test_a_graph_never_moves_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a captured graph whose workspace was freed under it by a larger batch."""
    size = etap.workspace_size
    monkeypatch.setattr(etap, "workspace_size", lambda problem: size(problem) + 1024 * problem.batch)  # the CPU device's does not grow
    fixture = kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (5,) * 4)
    fixture.backend.init_cuda_graph_state(max_bs=1, max_num_tokens=1)
    fixture.backend.init_forward_metadata_out_graph(fixture.forward_batch, in_capture=True)
    with pytest.raises(AssertionError, match="larger batch"):
        kit.sparse_forward(fixture)


def test_a_step_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the host's and the device's time: the first layer of a step plans, the others run. A step after it plans anew."""
    fixture = kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (40, 3))
    updates = []
    update = etap.Plan.update
    monkeypatch.setattr(etap.Plan, "update", lambda plan, *args, **kwargs: updates.append(plan) or update(plan, *args, **kwargs))
    q = torch.randn(2, 4, 576).bfloat16()
    for _ in range(2):
        fixture.backend.init_forward_metadata(fixture.forward_batch)
        for _layer in range(3):
            call(fixture, q_nope=q[..., :512], q_rope=q[..., 512:], page_table=fixture.topk_indices)
    assert len(updates) == 2


def test_a_graph_records_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the capture: SGLang tries what it records before it records it, and a plan made in the trial alone is not in the graph."""
    fixture = kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (40, 3))
    updates = []
    update = etap.Plan.update
    monkeypatch.setattr(etap.Plan, "update", lambda plan, *args, **kwargs: updates.append(plan) or update(plan, *args, **kwargs))
    fixture.backend.init_cuda_graph_state(max_bs=2, max_num_tokens=2)
    fixture.backend.init_forward_metadata_out_graph(fixture.forward_batch, in_capture=True)
    for passes in (1, 2, 3):
        kit.sparse_forward(fixture)
        assert len(updates) == passes
    assert len(set(map(id, updates))) == 1


@pytest.mark.parametrize("fp8_kv_cache", [False, True], ids=["BF16", "FP8"])
def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch, fp8_kv_cache: bool) -> None:
    """Guards the way into the backend: SGLang's FP8 method joins the parts of a query and fills heads up to 64 before it calls a kernel.
    libetap gets the model's own queries, with their strides and heads, and the pool itself."""
    fixture = kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (40, 3), num_heads=3, fp8_kv_cache=fp8_kv_cache)
    seen: list[torch.Tensor] = []
    run_plan = etap.Plan.run
    monkeypatch.setattr(etap.Plan, "run", lambda plan, *args, **kwargs: seen.extend(args[:3]) or run_plan(plan, *args, **kwargs))
    q_nope, q_rope = torch.randn(3, 2, 512).bfloat16().transpose(0, 1), torch.randn(2, 3, 128).bfloat16()[..., 64:]
    batch, layer = fixture.forward_batch, fixture.actual_module.attn
    fixture.backend.init_forward_metadata(batch)
    fixture.backend.forward_decode(q_nope, None, None, layer, batch, q_rope=q_rope, topk_indices=fixture.topk_indices)
    for got, given in zip(seen, (q_nope, q_rope, fixture.runner.token_to_kv_pool.kv_buffer[0]), strict=True):
        assert (got.data_ptr(), got.shape, got.stride()) == (given.data_ptr(), given.shape, given.stride())


def test_nothing_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a rank of data-parallel attention without requests: no plan, and results of no rows."""
    fixture = kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (40, 3))
    fixture.backend.init_forward_metadata(fixture.forward_batch)
    q, none = torch.zeros(0, 4, 576).bfloat16(), torch.zeros(0, 128, dtype=torch.int32)
    assert call(fixture, q_nope=q[..., :512], q_rope=q[..., 512:], page_table=none).shape == (0, 4, 512)
    assert fixture.backend._step is None


def test_prompts_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards prompts that SGLang sends to the same method (--dsa-prefill-backend fa3, pooled indexers): they are not libetap's."""
    fixture = kit.sparse_fixture(monkeypatch, ForwardMode.EXTEND, (5, 20), window=3)
    monkeypatch.setattr(fixture.backend, "_computes_prompts", False)
    native = []
    original = sparse.EtapSparseAttnBackend.__mro__[1]
    monkeypatch.setattr(original, "_forward_fa3", lambda _, **given: native.append(given) or given["q_nope"])
    before = kit.calls_of("extend")
    run(fixture)
    assert len(native) == 1
    assert kit.calls_of("extend") == before + 1
    assert {"step": "extend", "kernel": "fa3"}.items() <= next(call for call in calls.snapshot() if call["kernel"] == "fa3").items()


def test_drafts_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards EAGLE's draft: SGLang makes its backends itself, from the classes of its module; and their replays are counted."""
    fixture = kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (40, 3))
    fixture.runner.is_draft_worker = True
    container = dsa_backend.DeepseekSparseAttnMultiStepBackend(fixture.runner, 1, 3)
    assert isinstance(container, sparse.EtapSparseMultiStepBackend)
    assert {type(backend) for backend in container.attn_backends} == {sparse.EtapSparseAttnBackend}
    assert dsa_backend.DeepseekSparseAttnBackend is sparse.EtapSparseAttnBackend, "what SGLang's isinstance checks ask for"
    container.init_cuda_graph_state(max_bs=2, max_num_tokens=2)
    container.init_forward_metadata_out_graph(fixture.forward_batch, in_capture=True)
    container.init_forward_metadata_in_graph(fixture.forward_batch)
    q = torch.randn(2, 4, 576).bfloat16()
    for backend in container.attn_backends:
        fixture.backend = backend
        call(fixture, q_nope=q[..., :512], q_rope=q[..., 512:], page_table=fixture.topk_indices)
    original = sparse.EtapSparseMultiStepBackend.__mro__[1]
    monkeypatch.setattr(original, "init_forward_metadata_out_graph", lambda *_, **__: None)
    before = kit.calls_of("draft")
    container.init_forward_metadata_out_graph(fixture.forward_batch)
    assert kit.calls_of("draft") == before + 2


# ---- Options and refusals ------------------------------------------------------------------------------------------------


def arguments(**changes: Any) -> Any:
    given = dict.fromkeys(
        (
            "prefill_attention_backend",
            "decode_attention_backend",
            "speculative_draft_attention_backend",
            "speculative_eagle_topk",
            "dsa_prefill_backend",
            "dsa_decode_backend",
        )
    )
    options = {"enable_hisparse": False, "enable_deterministic_inference": False}
    return SimpleNamespace(**(given | {"attention_backend": NAME, "device": "cuda", "dcp_size": 1} | options | changes))


def configuration(**changes: Any) -> Any:
    given = {"architectures": ["DeepseekV32ForCausalLM"], "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}
    return SimpleNamespace(**(given | changes))


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_options, "cpu_platform_is_asked_for", lambda: False)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({}, {"attention_backend": "dsa", "dsa_decode_backend": "fa3"}),
        ({"dcp_size": 2}, {"attention_backend": "dsa", "dsa_decode_backend": "fa3", "dsa_prefill_backend": "fa3"}),
        (
            {"attention_backend": None, "decode_attention_backend": NAME, "prefill_attention_backend": "dsa"},
            {"attention_backend": "dsa", "decode_attention_backend": "dsa", "dsa_decode_backend": "fa3"},
        ),
        (
            {"attention_backend": None, "decode_attention_backend": NAME, "speculative_draft_attention_backend": NAME},
            {
                "attention_backend": "dsa",
                "decode_attention_backend": "dsa",
                "speculative_draft_attention_backend": "dsa",
                "dsa_decode_backend": "fa3",
            },
        ),
        ({"dsa_prefill_backend": "flashmla_sparse"}, {"attention_backend": "dsa", "dsa_decode_backend": "fa3"}),
        ({"attention_backend": "dsa"}, {}),
        ({"attention_backend": None}, {}),
    ],
)
def test_options(given: dict[str, Any], resolved: dict[str, str]) -> None:
    """Guards what the flag means for a sparse model, and that without it nothing changes."""
    assert sparse_options.resolve(arguments(**given), configuration()) == resolved


@pytest.mark.usefixtures("_on_a_gpu")
def test_options_of_dense_models() -> None:
    """Guards dense models, which the same provider is asked about."""
    assert sparse_options.resolve(arguments(), configuration(index_topk=None)) == {}
    assert sparse_options.resolve(arguments(), configuration(architectures=["SomeModel"])) == {}


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("value", "decode", "options"),
    [("triton", False, {}), ("etap", True, {"dsa_decode_backend": "fa3", "dsa_prefill_backend": "fa3"})],
)
def test_dispatch_of_sparse_models(monkeypatch: pytest.MonkeyPatch, value: str, decode: bool, options: dict[str, str]) -> None:
    """Guards the variable that turns libetap off, or has it compute prompts, too."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
    assert sparse_options.is_asked_for(arguments()) is decode
    assert sparse_options.resolve(arguments(), configuration()) == {"attention_backend": "dsa"} | options


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("given", "model", "said"),
    [
        ({"dsa_decode_backend": "flashmla_kv"}, {}, "--dsa-decode-backend is flashmla_kv"),
        ({"dsa_prefill_backend": "trtllm", "dcp_size": 2}, {}, "--dsa-prefill-backend is trtllm"),
        (
            {"prefill_attention_backend": "fa3"},
            {},
            "--prefill-attention-backend is fa3; allowed for a sparse model with",
        ),
        ({"decode_attention_backend": "dsa"}, {}, "--decode-attention-backend is dsa"),
        ({"attention_backend": None, "prefill_attention_backend": NAME}, {}, "--decode-attention-backend is None; allowed"),
        ({"speculative_draft_attention_backend": "dsa"}, {}, "--speculative-draft-attention-backend is dsa"),
        ({"enable_hisparse": True}, {}, "--enable-hisparse"),
        ({"speculative_eagle_topk": 2}, {}, "only chains of draft tokens with sparse models, and --speculative-eagle-topk is 2"),
        ({"enable_deterministic_inference": True}, {}, "--enable-deterministic-inference"),
        ({}, {"index_dilation": 2, "indexer_flavour": "x"}, "DeepseekV32ForCausalLM means by index_dilation, indexer_flavour"),
        ({}, {"text_config": SimpleNamespace(index_dilation=2)}, "means by index_dilation"),
        ({}, {"learnable_sink": True}, "the attention sinks of DeepseekV32ForCausalLM"),
    ],
)
def test_options_that_are_refused(given: dict[str, Any], model: dict[str, Any], said: str) -> None:
    """Guards against another kernel than was asked for, and against a model that is read wrong: a sentence before anything is loaded."""
    with pytest.raises(EtapRefusal) as refusal:
        sparse_options.resolve(arguments(**given), configuration(**model))
    assert said in str(refusal.value)


def test_known_options_are_real() -> None:
    """Guards the list of indexer options against names that SGLang does not read: a model with one would be served wrong."""
    text = "".join(path.read_text() for path in sources())
    assert [name for name in sorted(sparse_options.KNOWN_OPTIONS) if name not in text] == []


def sources() -> list[Path]:
    root = Path(sglang.__file__).parent / "srt"
    return [root / "configs/model_config.py", root / "models/deepseek_v2.py", root / "speculative/eagle_worker_v2.py",
            *sorted((root / "layers/attention/dsa").glob("*.py")), *sorted((root / "arg_groups").rglob("*.py"))]  # fmt: skip


def test_a_device_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards devices that don't take such lists: libetap's own sentence reaches whoever starts the server, with the way out."""
    query = etap.query

    def refusing(problem: etap.Problem) -> Any:
        if problem.topk:
            raise etap.EtapUnsupported(3, "ETAP_UNSUPPORTED", "topk is 128; the CUDA device does not support it")
        return query(problem)

    monkeypatch.setattr(etap, "query", refusing)
    with pytest.raises(EtapRefusal, match="topk is 128; the CUDA device does not support it.*; --attention-backend dsa serves it"):
        kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (5,))


def test_a_cache_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against rows that would be read wrong: FP8 without scales, as --dsa-prefill-backend trtllm keeps them."""
    monkeypatch.setattr(sparse, "PACKED_ROWS", {528: "e4m3_528"})
    with pytest.raises(EtapRefusal, match="with 656 values a token; allowed: bfloat16, and FP8 in rows of 528 bytes"):
        kit.sparse_fixture(monkeypatch, ForwardMode.DECODE, (5,), fp8_kv_cache=True)


def test_other_servers_get_sglangs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards servers with `--attention-backend dsa`: the plugin is installed, and stays out."""
    monkeypatch.setattr(sparse_options, "is_asked_for", lambda _: False)
    made = []
    assert seams._create_sparse(lambda runner: made.append(runner) or "native", SimpleNamespace(server_args=None)) == "native"
    assert len(made) == 1
    assert "dsa" in ATTENTION_BACKENDS


def test_without_the_sparse_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards releases of SGLang that fit dense models alone: those are served, sparse ones refused with the seams' names."""
    gone = seams.Seam("sparse decode", "sglang.srt.nowhere", "gone", "SGLang's own kernels decode sparse models")
    monkeypatch.setattr(seams, "SPARSE_SEAMS", (gone,))
    assert seams.missing() == ""
    assert "can't serve sparse models with this SGLang" in seams.missing_for_sparse()
    parallel, spec = SimpleNamespace(attn_dcp_size=1), SimpleNamespace(speculative_algorithm=None, speculative_eagle_topk=None)
    monkeypatch.setattr(refusals, "get_parallel", lambda: parallel)
    monkeypatch.setattr(refusals, "get_spec", lambda: spec)
    fits = {"use_mla_backend": True, "dtype": torch.bfloat16, "kv_cache_dtype": torch.bfloat16}
    with pytest.raises(EtapRefusal, match="sparse decode"):
        refusals.check_runner(SimpleNamespace(model_config=SimpleNamespace(hf_config=configuration()), **fits))


# ---- The CPU platform's indexer --------------------------------------------------------------------------------------------


def test_rounded_keys(seed: int) -> None:
    """Guards the index cache's format: a power of two for a scale, the largest value within E4M3, and no division by zero."""
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-6, 4, 50)[:, None]
    x[0] = 0
    values, scale = cpu_indexer.rounded(x.bfloat16())
    assert torch.equal(scale, torch.exp2(scale.log2().round()))
    assert torch.isfinite(values.float()).all()
    # Half a unit of E4M3's last place, down to its smallest step, 2^-9, and what BF16 rounds before.
    allowed = torch.maximum(x.abs() * 2**-4, scale[:, None] * 2**-10) + x.abs() * 2**-8
    assert ((values.float() * scale[:, None] - x).abs() <= allowed).all()
    buffer = torch.zeros(3, 64 * 132, dtype=torch.uint8)
    keys, scales = cpu_indexer.index_keys(buffer, 64, 128)
    keys[2, 63], scales[2, 63] = values[7], scale[7]
    assert torch.equal(buffer[2, 63 * 128 : 64 * 128], values[7].view(torch.uint8)), "all keys of a page, then all its scales"
    assert torch.equal(buffer[2, -4:].view(torch.float32), scale[7:8])


def test_expanded_lengths(seed: int) -> None:
    """Guards the lengths that verification and draft extension hand to the indexer, against the definition."""
    generator = torch.Generator().manual_seed(seed)
    extend = torch.randint(1, 5, (9,), generator=generator, dtype=torch.int32)
    lens = extend + torch.randint(0, 50, (9,), generator=generator, dtype=torch.int32)
    expected = [length - count + i + 1 for length, count in zip(lens.tolist(), extend.tolist(), strict=True) for i in range(count)]
    assert cpu_indexer.expanded_lengths(extend, lens, len(expected), 5).tolist() == expected
    assert dsa_backend.seqlens_expand_triton(extend, lens, len(expected), 5).tolist() == expected, "which SGLang calls by this name"


@pytest.mark.parametrize("is_neox_style", [True, False], ids=["halves", "pairs"])
def test_the_chosen_have_the_largest_logits(monkeypatch: pytest.MonkeyPatch, seed: int, is_neox_style: bool) -> None:
    """Guards the indexer: for each token of a prompt and of a decode step, the best of what it sees, none twice and none that it does
    not see; against the formula in FP64, from the keys as they are stored."""
    generator = torch.Generator().manual_seed(seed)
    heads, hidden, lora, topk = 3, 32, 24, 6
    lens, new = [9, 40], [9, 4]
    linear = [torch.randn(shape, generator=generator).bfloat16() for shape in ((heads * 128, lora), (128, hidden), (heads, hidden))]
    angles = torch.outer(torch.arange(64.0), 10000 ** -(torch.arange(32) / 32))
    indexer = SimpleNamespace(
        n_heads=heads, head_dim=128, index_topk=topk, rope_head_dim=64, is_neox_style=is_neox_style,
        wq_b=lambda x: (x @ linear[0].T, None), wk=lambda x: (x @ linear[1].T, None), weights_proj=lambda x: (x @ linear[2].T, None),
        k_norm=lambda x: torch.nn.functional.layer_norm(x, (128,)), num_init_tokens=0, num_local_tokens=0,
        rotary_emb=SimpleNamespace(cos_sin_cache=torch.cat([angles.cos(), angles.sin()], -1)),
    )  # fmt: skip
    indexer._mask_init_and_local_tokens = lambda logits, lengths: Indexer._mask_init_and_local_tokens(indexer, logits, lengths)
    buffer = torch.zeros(4, 64 * 132, dtype=torch.uint8)
    slots = (torch.randperm(255, generator=generator)[:80] + 1).view(2, 40)
    pool = SimpleNamespace(get_index_k_with_scale_buffer=lambda _: buffer, index_page_size=64)
    metadata = SimpleNamespace(page_table_1=slots.int())
    backend = SimpleNamespace(get_indexer_metadata=lambda *_: SimpleNamespace(attn_metadata=metadata))
    monkeypatch.setattr(cpu_indexer, "get_token_to_kv_pool", lambda: pool)
    monkeypatch.setattr(cpu_indexer, "get_attn_backend", lambda: backend)

    def step(rows: torch.Tensor | None, requests: list[int], positions: list[int]) -> None:
        x, q_lora = (torch.randn(len(positions), width, generator=generator).bfloat16() for width in (hidden, lora))
        at = torch.tensor(positions)
        batch = SimpleNamespace(out_cache_loc=slots[requests, positions])
        metadata.token_to_batch_idx, metadata.dsa_seqlens_expanded = rows, (at + 1).int()
        chosen = cpu_indexer.choose(indexer, x, q_lora, at, batch, 0)
        query, _ = cpu_indexer.queries_and_keys(indexer, x, q_lora, at)
        values, scale = cpu_indexer.rounded(query)
        keys, scales = cpu_indexer.index_keys(buffer, 64, 128)
        weights = (x @ linear[2].T).double()
        for i, (request, position) in enumerate(zip(requests, positions, strict=True)):
            seen = slots[request, : position + 1]
            stored = keys[seen // 64, seen % 64].double() * scales[seen // 64, seen % 64, None].double()
            logits = ((values[i].double() * scale[i, :, None].double()) @ stored.T).relu().T @ weights[i]
            got = chosen[i][chosen[i] >= 0].long()
            assert len(got) == len(set(got.tolist())) == min(topk, position + 1)
            assert set(got.tolist()) <= set(seen.tolist())
            assert (chosen[i, len(got) :] == -1).all()
            worst = logits[torch.isin(seen, got)].min()
            left_out = logits[~torch.isin(seen, got)]
            assert len(left_out) == 0 or left_out.max() <= worst + 1e-4 * logits.abs().max()

    past = [(1, position) for position in range(lens[1] - new[1])]
    step(torch.tensor([row for row, _ in past]), [row for row, _ in past], [position for _, position in past])
    prompt = [(row, lens[row] - new[row] + i) for row in range(2) for i in range(new[row])]
    step(torch.tensor([row for row, _ in prompt]), [row for row, _ in prompt], [position for _, position in prompt])
    step(None, [0, 1], [lens[0] - 1, lens[1] - 1])


def test_rope_of_index_keys(seed: int) -> None:
    """Guards the position of queries and keys: a product depends on their distance alone."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.outer(torch.arange(64.0), 10000 ** -(torch.arange(32) / 32))
    for is_neox_style in (True, False):
        indexer = SimpleNamespace(
            n_heads=1, head_dim=128, rope_head_dim=64, is_neox_style=is_neox_style, k_norm=lambda x: x,
            wq_b=lambda x: (x.clone(), None), wk=lambda x: (x.clone(), None),
            rotary_emb=SimpleNamespace(cos_sin_cache=torch.cat([angles.cos(), angles.sin()], -1)),
        )  # fmt: skip
        x, y = torch.randn(2, 1, 128, generator=generator)
        near, far = (
            [cpu_indexer.queries_and_keys(indexer, y, x, torch.tensor([at]))[part] for part, at in ((0, start + 5), (1, start))]
            for start in (3, 40)
        )
        torch.testing.assert_close((near[0][0] * near[1]).sum(), (far[0][0] * far[1]).sum(), atol=1e-3, rtol=1e-3)
        assert not torch.equal(near[1], far[1])
