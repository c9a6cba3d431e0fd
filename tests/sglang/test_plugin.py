"""The plugin without a server: the seams it finds, how it registers, and what it refuses in which words."""

from __future__ import annotations

import ast
import importlib.util
import re
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_kit as kit
import torch
from etap_sglang import NAME, backend, dispatch, plugin, refusals, seams
from etap_sglang.refusals import EtapRefusal
from sglang.srt import runtime_context, server_args
from sglang.srt.arg_groups import attention_hook, choices
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.test.kits.attention_unittest.attention_methods import mla_attention

import etap_py
from etap_py.errors import EtapInvalidArgument


def test_every_seam_is_found() -> None:
    """Guards against an SGLang that moved: each seam that is lost makes the server take another path in silence."""
    assert [(name, detail) for name, found, detail in seams.probe() if not found] == []
    assert seams.missing() == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"module": "sglang.srt.nowhere"}, "there is no module sglang.srt.nowhere"),
        ({"attribute": "Scheduler.elsewhere"}, "sglang.srt.managers.scheduler has no Scheduler.elsewhere"),
        ({"parameters": ("self", "renamed")}, "has no parameter renamed"),
    ],
)
def test_a_seam_that_moved_is_named(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str) -> None:
    """Guards the probe itself: a module, a function or a parameter that is gone is found out, with its effect."""
    known = seams.SEAMS[-1]
    moved = seams.Seam(**(vars(known) | change))
    monkeypatch.setattr(seams, "SEAMS", (*seams.SEAMS[:-1], moved))
    assert said in seams.missing()
    assert known.without in seams.missing()


def test_without_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards `etap doctor` on a machine that has no SGLang."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert seams.probe() == [("sglang", False, "sglang is not installed")]


def test_a_lost_seam_refuses_when_the_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against SGLang's way with plugins that raise: it logs, goes on without them, and serves something else."""
    known: list[str] = []
    monkeypatch.setattr(server_args, "add_attention_backend_choices", known.extend)
    monkeypatch.setitem(ATTENTION_BACKENDS, NAME, None)
    monkeypatch.setattr(seams, "missing", lambda: "the seam is gone")
    plugin.register()
    assert known == [NAME]
    with pytest.raises(EtapRefusal, match="the seam is gone"):
        ATTENTION_BACKENDS[NAME](SimpleNamespace())


def test_the_name_is_on_every_list() -> None:
    """Guards the command line: the three lists of names that an outside backend falls out of."""
    assert NAME in choices.ATTENTION_BACKEND_CHOICES
    assert NAME in choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES
    assert NAME in choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND
    assert NAME in ATTENTION_BACKENDS


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({"attention_backend": NAME}, 64),
        ({"decode_attention_backend": NAME}, 64),
        ({"attention_backend": NAME, "page_size": 1}, None),
        ({"attention_backend": NAME, "speculative_eagle_topk": 1}, 64),
        ({"attention_backend": NAME, "speculative_eagle_topk": 2}, None),
        ({"attention_backend": "triton"}, None),
    ],
)
def test_page_size(arguments: dict[str, Any], size: int | None) -> None:
    """Guards the default of 64 tokens a page, that a page size which was asked for stays, and trees of drafts, which SGLang refuses with
    pages of more than a token."""
    names = ("attention_backend", "decode_attention_backend", "prefill_attention_backend", "speculative_draft_attention_backend")
    view = SimpleNamespace(**(dict.fromkeys((*names, "page_size", "speculative_eagle_topk")) | arguments))
    assert attention_hook._mla_backend_page_constraints(view).get("page_size") == size


def test_the_cpu_platform_waits_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a GPU machine: the platform must not take over where nobody set the variable."""
    from etap_sglang import cpu_platform

    monkeypatch.delenv(cpu_platform.ENVIRONMENT_VARIABLE, raising=False)
    assert cpu_platform.activate() is None
    monkeypatch.setenv(cpu_platform.ENVIRONMENT_VARIABLE, "1")
    assert cpu_platform.activate() == "etap_sglang.cpu_platform:EtapCpuPlatform"


@pytest.mark.parametrize("loads", [True, False])
def test_torchvision_s_operators_are_defined_once(loads: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Guards a machine whose PyTorch and torchvision are PyPI's builds for CUDA: the platform had defined the operators, torchvision's
    library, which loads there, defined them again, and PyTorch ended the server."""
    from etap_sglang import cpu_platform

    (tmp_path / "_C.so").touch()
    operators, loaded = SimpleNamespace(), []

    def define(name: str, _schema: str) -> None:
        short = name.removeprefix("torchvision::")
        assert not hasattr(operators, short), f"{name} is defined twice"
        setattr(operators, short, None)

    def load(library: Path) -> None:
        if not loads:
            raise OSError("built for another PyTorch")
        if library not in loaded:
            loaded.append(library)
            for name in ("nms", "qnms"):
                define(name, "")

    ops = SimpleNamespace(load_library=load, torchvision=operators)
    monkeypatch.setattr(cpu_platform, "torch", SimpleNamespace(ops=ops, library=SimpleNamespace(define=define)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    cpu_platform._define_torchvision_schemas()
    if loads:
        load(tmp_path / "_C.so")  # as importing torchvision does
    assert vars(operators).keys() == {"nms", "qnms"}


@pytest.mark.parametrize(
    ("value", "device", "said"),
    [(None, "cpu", "auto"), ("", "cuda", "auto"), ("etap", "cpu", "etap"), ("triton", "cuda", "triton")],
)
def test_dispatch(monkeypatch: pytest.MonkeyPatch, value: str | None, device: str, said: str) -> None:
    """Guards the option that forces either backend, and its default."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
    assert dispatch.chosen(device) == said


@pytest.mark.parametrize(("value", "device"), [("fast", "cuda"), ("triton", "cpu")])
def test_dispatch_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch, value: str, device: str) -> None:
    """Guards against a misspelt choice that is taken for the default, and Triton's kernels on a machine that can't run them."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
    with pytest.raises(EtapRefusal, match=f"ETAP_SGLANG_DISPATCH is '{value}'; allowed with --device {device}: auto, etap"):
        dispatch.chosen(device)


def test_forced_triton_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the comparison: with ETAP_SGLANG_DISPATCH=triton SGLang's backend serves, and drafts come from its own table too."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    observability = SimpleNamespace(enable_metrics=False)
    monkeypatch.setattr(runtime_context, "get_observability", lambda: observability)
    monkeypatch.setattr(backend, "triton_backend", lambda runner: ("triton", runner))
    cuda = SimpleNamespace(device="cuda")
    assert plugin._create(cuda) == ("triton", cuda)
    seen = {}
    factory = SimpleNamespace(draft_model_runner=cuda)
    seams._add_draft_backend(lambda _, name, table, *rest: seen.update(table), factory, NAME, {"triton": lambda: ("triton", 1)}, "")
    assert seen[NAME]() == ("triton", 1)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def runner(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """A model runner that fits, but for the changes."""
    parallel = SimpleNamespace(attn_dcp_size=changes.pop("dcp_size", 1))
    spec = SimpleNamespace(speculative_eagle_topk=changes.pop("topk", None), speculative_algorithm=changes.pop("algorithm", None))
    monkeypatch.setattr(refusals, "get_parallel", lambda: parallel)
    monkeypatch.setattr(refusals, "get_spec", lambda: spec)
    config = SimpleNamespace(architectures=["SomeModel"], **{name: changes.pop(name, None) for name in ("llama_4_scaling", "index_topk")})
    fits = {
        "use_mla_backend": True,
        "is_draft_worker": False,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": torch.bfloat16,
        "kv_index_translator": SimpleNamespace(is_translating=changes.pop("unified_memory", False)),
        "model_config": SimpleNamespace(hf_config=config),
        "model": torch.nn.Identity(),
    }
    return SimpleNamespace(**(fits | changes))


def layer(**attributes: Any) -> torch.nn.Module:
    attention = RadixAttention(num_heads=16, head_dim=576, scaling=1.0, num_kv_heads=1, layer_id=0, v_head_dim=512)
    for name, value in attributes.items():
        setattr(attention, name, value)
    return torch.nn.Sequential(attention)


def test_a_runner_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against refusing what is supported, a k_scale of 1 among it."""
    refusals.check_runner(runner(monkeypatch, model=layer(k_scale=torch.ones(1), k_scale_float=1.0)))
    refusals.check_runner(runner(monkeypatch, dtype=torch.float16, kv_cache_dtype=torch.float8_e4m3fn, topk=1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_mla_backend": False}, "SomeModel is not one; choose another --attention-backend"),
        ({"use_mla_backend": False, "is_draft_worker": True}, "choose another --speculative-draft-attention-backend"),
        ({"dtype": torch.float32}, "--dtype is torch.float32"),
        ({"kv_cache_dtype": torch.float8_e5m2}, "can't read a KV cache of torch.float8_e5m2"),
        ({"unified_memory": True}, "--enable-unified-memory"),
        ({"dcp_size": 2, "algorithm": "EAGLE"}, "--dcp-size is 2"),
        ({"index_topk": 2048}, "dsa backend, which does not serve SomeModel (index_topk = 2048)"),
        ({"llama_4_scaling": {"beta": 0.1}}, "does not scale queries by position"),
        ({"model": layer(logit_cap=30.0)}, "layer 0 caps them at 30.0"),
        ({"model": layer(k_scale=torch.full((1,), 0.5), k_scale_float=0.5)}, "k_scale of 0.5"),
        ({"model": layer(learnable_sink_param=torch.zeros(16))}, "does not support attention sinks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str) -> None:
    """Guards against a wrong answer at the first request: each is refused before, in a sentence with the value that it had."""
    with pytest.raises(EtapRefusal) as refusal:
        refusals.check_runner(runner(monkeypatch, **changes))
    assert said in str(refusal.value)


def refuse_trees() -> None:
    raise EtapInvalidArgument(1, "ETAP_INVALID_ARGUMENT", "max_query_len is 300; allowed: 1 to 256 with ETAP_TREE_MASK")


@pytest.mark.parametrize(
    ("algorithm", "query", "said"),
    [
        ("NGRAM", lambda: None, "verifies the trees of EAGLE, EAGLE3, NEXTN, STANDALONE only, and --speculative-algorithm is NGRAM with 4"),
        ("EAGLE", refuse_trees, "--speculative-eagle-topk is 4; the only value allowed is 1: max_query_len is 300; allowed: 1 to 256 with"),
    ],
)
def test_trees_that_are_refused(monkeypatch: pytest.MonkeyPatch, algorithm: str, query: Any, said: str) -> None:
    """Guards masks in another layout, and trees that libetap does not take, which it says itself when the server starts."""
    runner(monkeypatch, topk=4, algorithm=algorithm)
    with pytest.raises(EtapRefusal) as refusal:
        refusals.check_trees(query)
    assert said in str(refusal.value)
    runner(monkeypatch, topk=4, algorithm="EAGLE")
    refusals.check_trees(lambda: None)


@pytest.mark.parametrize(
    ("dims", "page_size", "said"), [((32, 0), 16, "d_latent"), ((512, 128), 16, "d_rope"), ((512, 64), 3, "page_size is 3")]
)
def test_what_libetap_refuses(dims: tuple[int, int], page_size: int, said: str) -> None:
    """Guards dimensions, page sizes and cards: libetap's own sentence reaches whoever starts the server."""
    case = kit.case(ForwardMode.DECODE, (5,), page_size=page_size)
    with pytest.raises(EtapRefusal, match="can't serve this model here") as refusal:
        mla_attention.build_mla_attention_fixture(
            unittest.TestCase(),
            case,
            kv_lora_rank=dims[0],
            qk_rope_head_dim=dims[1],
            dtype=torch.bfloat16,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("sglang.srt.layers.attention.verify_mask", "VerifyMask"),
        ("sglang.srt.mem_cache.memory_pool", "KVWriteLoc"),
        ("sglang.srt.mem_cache.memory_pool", "KVWriteLoc.for_batch"),
        ("sglang.srt.runtime_context", "get_exec"),
        ("sglang.srt.model_executor.forward_batch_info", "build_inner_fb_view"),  # imported in a function
        ("sglang.srt.models.deepseek_common", "attention_backend_handler._dispatch_mla_subtype"),
        ("sglang.srt.distributed", "parallel_state.reg_reduce_scatter_tensor"),  # on the CPU platform
    ],
)
def test_imports_are_seams(module: str, attribute: str) -> None:
    """Guards against a probe that knows less than the plugin imports: doctor said yes to a plugin that could not be imported."""
    assert (module, attribute) in {(seam.module, seam.attribute) for seam in (*seams.SEAMS, *seams.CPU_SEAMS)}


def test_every_import_is_a_seam() -> None:
    """Guards the same for each import that Python would run, read otherwise than by the probe: from the lines of the source."""
    known = {f"{seam.module}.{seam.attribute}." for seam in (*seams.SEAMS, *seams.SPARSE_SEAMS, *seams.CPU_SEAMS)}
    count = 0
    for path in Path(plugin.__file__).parent.glob("*.py"):
        source = re.sub(r"if TYPE_CHECKING:\n(    .*\n)+", "", path.read_text(encoding="utf-8"))
        for module, names in re.findall(r"^ *from (sglang\S*) import \(?([^()#]+?)\)?(?: *#.*)?$", source, re.MULTILINE):
            for name in re.sub(r" as \w+", "", names).replace(",", " ").split():
                count += 1
                assert any(place.startswith(f"{module}.{name}.") for place in known), f"{path.name} imports {name} from {module}"
    assert count > 30


def test_the_cpu_platform_is_needed_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards GPU servers against a refusal for the sake of the CPU platform, and the CPU platform against none."""
    gone = seams.Seam("gone", "sglang.srt.nowhere", "gone", "the CPU platform can't start")
    monkeypatch.setattr(seams, "CPU_SEAMS", (gone,))
    monkeypatch.setenv("ETAP_SGLANG_CPU", "1")
    assert "the CPU platform can't start" in seams.missing()
    monkeypatch.setenv("ETAP_SGLANG_CPU", "0")
    assert seams.missing() == ""
    assert ("gone", False) in {(name, found) for name, found, _ in seams.probe()}


def test_names_only_public_python() -> None:
    """Guards the rooms: an integration knows nothing of etap_py but its public names, and the module that is made for integrations."""
    for path in Path(plugin.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ""
                assert module == "etap_py.seams" or not module.startswith("etap_py"), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "etap":
                assert node.attr in etap_py.__all__, f"{path.name}:{node.lineno} uses etap_py.{node.attr}"
