"""Who computes: ETAP, or the wrapped library, by the environment, by a call, and by the dispatch's decision."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import etap_flash_attn_3
import etap_flashmla
import pytest
import test_flash_attn_3 as fa3
import test_flashinfer as flashinfer
import test_flashmla as flashmla
import torch
from cases import Case, Inputs, make_inputs
from etap_flashinfer import mla

import etap_py as etap
from etap_py import routing
from etap_py.routing import Peer


@dataclass
class FakeLibrary:
    """A module that notes its calls and returns what nobody else would."""

    name: str
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
        module = ModuleType(self.name)
        functions = ("flash_mla_with_kvcache", "get_mla_metadata", "flash_attn_with_kvcache", "get_scheduler_metadata")
        for function in (*functions, "BatchMLAPagedAttentionWrapper"):
            setattr(module, function, self.noting(function))
        monkeypatch.setitem(sys.modules, self.name, module)
        if "." in self.name:
            monkeypatch.setitem(sys.modules, self.name.partition(".")[0], ModuleType(self.name.partition(".")[0]))
        return self

    def noting(self, function: str) -> Callable[..., Any]:
        def note(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append((function, arguments, keywords))
            if function == "BatchMLAPagedAttentionWrapper":
                wrapper = ModuleType("wrapper")
                wrapper.plan, wrapper.run = self.noting("plan"), self.noting("run")  # type: ignore[attr-defined]
                return wrapper
            return f"{function} of {self.name}", "second"

        return note

    @property
    def called(self) -> list[str]:
        return [function for function, _, _ in self.calls]


def run_flashinfer(inputs: Inputs, **overrides: Any) -> Any:
    wrapper = flashinfer.wrapper_for(inputs)
    flashinfer.plan(wrapper, inputs)
    return flashinfer.run(wrapper, inputs, **overrides)


DROPINS: dict[str, tuple[Peer, Callable[..., Any], list[str]]] = {
    "flashmla": (etap_flashmla._PEER, flashmla.decode, ["get_mla_metadata", "flash_mla_with_kvcache"]),
    "flashinfer": (mla._PEER, run_flashinfer, ["BatchMLAPagedAttentionWrapper", "plan", "run"]),
    "flash_attn_3": (etap_flash_attn_3._PEER, fa3.decode, ["flash_attn_with_kvcache"]),
}


@pytest.mark.parametrize("name", DROPINS)
def test_route_of_the_environment(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ETAP_ROUTE=peer hands every call over as it came; the default hands none."""
    peer, decode, expected = DROPINS[name]
    library = FakeLibrary(peer.module).install(monkeypatch)
    inputs = make_inputs(Case("peer", lens=(70, 3)), seed)
    out, _ = decode(inputs)
    assert out.shape[-1] == 512
    assert library.calls == []
    monkeypatch.setenv("ETAP_ROUTE", "peer")
    assert decode(inputs) == (f"{expected[-1]} of {peer.module}", "second")
    assert library.called == expected
    _, arguments, keywords = library.calls[-1]
    assert any(argument is inputs.block_table for argument in (*arguments, *keywords.values())) or name == "flashinfer"
    assert "descale_k" not in keywords  # what was not given is not passed on: an older library may not know it


@pytest.mark.parametrize("name", DROPINS)
def test_route_of_a_call(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`use` outweighs the environment."""
    peer, decode, expected = DROPINS[name]
    library = FakeLibrary(peer.module).install(monkeypatch)
    monkeypatch.setenv("ETAP_ROUTE", "peer")
    inputs = make_inputs(Case("call", lens=(70, 3)), seed)
    routing.use("etap")
    assert decode(inputs)[0].shape[-1] == 512
    routing.use("peer")
    decode(inputs)
    assert library.called == expected


@pytest.mark.parametrize("name", DROPINS)
def test_auto_keeps_the_cpu(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers have no kernels for the CPU device, whatever the number of tiles."""
    peer, decode, _ = DROPINS[name]
    library = FakeLibrary(peer.module).install(monkeypatch)
    routing.use("auto")
    assert decode(make_inputs(Case("auto", lens=(70, 3), heads=128), seed))[0].shape[-1] == 512
    assert library.calls == []


@pytest.mark.parametrize(("tiles", "computes"), [(1, "ETAP"), (2, "FlashMLA")])
def test_auto_follows_the_dispatch(tiles: int, computes: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One tile for all rows of a sequence: ETAP. Several, each of which reads KV: the peer. Said once for each shape."""
    peer = etap_flashmla._PEER
    FakeLibrary(peer.module).install(monkeypatch)
    decision = etap.Decision("sm90_kernel", "because", 64, tiles, 1, 132, 8)
    monkeypatch.setattr(routing, "decide", lambda problem: decision)
    routing.use("auto")
    problems = [etap.Problem(num_heads=128, batch=batch, device="cuda:0") for batch in (4, 5)]
    with caplog.at_level(logging.INFO, logger="etap_py.routing"):
        for _ in range(3):
            for problem in problems:
                chosen = peer.chosen_for(problem)
                assert (chosen is None) == (computes == "ETAP")
    assert len(caplog.records) == 2
    assert all(record.getMessage().startswith(f"{computes} computes Problem(num_heads=128") for record in caplog.records)


def test_auto_without_the_library(seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """ETAP computes what it can, and its refusal says why nobody else was asked."""
    monkeypatch.setitem(sys.modules, "flash_mla", None)  # makes `import flash_mla` fail
    routing.use("auto")
    inputs = make_inputs(Case("alone", lens=(70, 3)), seed)
    with caplog.at_level(logging.INFO, logger="etap_py.routing"):
        assert flashmla.decode(inputs)[0].shape[-1] == 512
    assert "FlashMLA was not asked: flash_mla can't be imported" in caplog.text
    with pytest.raises(NotImplementedError, match=r"extra_k_cache is given; .* \(FlashMLA was not asked: flash_mla can't be imported: "):
        flashmla.decode(inputs, extra_k_cache=inputs.block_table)
    routing.use("peer")
    with pytest.raises(ImportError, match="the route is 'peer', but flash_mla can't be imported: "):
        flashmla.decode(inputs)


def test_auto_hands_over_what_etap_refuses(seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Arguments and shapes that ETAP does not have are the peer's, with the arguments of the metadata too."""
    library = FakeLibrary("flash_mla").install(monkeypatch)
    routing.use("auto")
    inputs = make_inputs(Case("extra", lens=(70, 3)), seed)
    step, _ = etap_flashmla.get_mla_metadata(inputs.cache_seqlens, 16, 1)
    with caplog.at_level(logging.INFO, logger="etap_py.routing"):
        for _ in range(2):
            flashmla.decode(inputs, extra_k_cache=inputs.block_table, tile_scheduler_metadata=step)
    assert library.called == ["get_mla_metadata", "flash_mla_with_kvcache", "flash_mla_with_kvcache"]
    assert library.calls[0][1] == (inputs.cache_seqlens, 16, 1)
    assert library.calls[1][1][-2:] == ("get_mla_metadata of flash_mla", "second")
    assert library.calls[1][2]["extra_k_cache"] is inputs.block_table
    assert len(caplog.records) == 1
    library.calls.clear()
    flashmla.decode(inputs, k_cache=inputs.kv_cache[:, :48].unsqueeze(2))
    assert library.called == ["get_mla_metadata", "flash_mla_with_kvcache"]


@pytest.mark.parametrize("name", ["flashmla", "flash_attn_3"])
def test_auto_hands_over_fp8_queries(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scale has no effect on ETAP's queries, but is the peer's."""
    peer, decode, expected = DROPINS[name]
    library = FakeLibrary(peer.module).install(monkeypatch)
    routing.use("auto")
    inputs = make_inputs(Case("fp8", lens=(70, 3)), seed)
    q, scale = (flashmla.fused_queries(inputs), "descale_q") if name == "flashmla" else (inputs.q_rope[:, None], "q_descale")
    assert decode(inputs, **{scale: inputs.q_rope})[0].shape[-1] == 512
    assert library.calls == []
    decode(inputs, q=q.to(torch.float8_e4m3fn), **{scale: inputs.q_rope})
    assert library.called == expected
    assert library.calls[-1][2][scale] is inputs.q_rope


@pytest.mark.parametrize("route", ["etap", "auto", "peer"])
def test_empty_steps_are_nobodys(route: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without query tokens is no reason to ask a peer, and does not decide who computes the next."""
    library = FakeLibrary("flashinfer.mla").install(monkeypatch)
    routing.use(route)
    inputs = make_inputs(Case("none", lens=(70, 3)), seed)
    wrapper = flashinfer.wrapper_for(inputs)
    for computes in (False, True, False):
        flashinfer.plan(wrapper, inputs, **({} if computes else {"qo_indptr": torch.zeros(3, dtype=torch.int32)}))
        rows = {} if computes else {"q_nope": inputs.q_nope[:0], "q_pe": inputs.q_rope[:0]}
        out, _ = flashinfer.run(wrapper, inputs, **rows)
        if not computes:
            assert out.shape == (0, 16, 512)
    assert library.called == (["BatchMLAPagedAttentionWrapper", "plan", "run"] if route == "peer" else [])


def test_unknown_routes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="route is 'fast'; allowed: 'etap', 'auto', 'peer'"):
        routing.use("fast")
    monkeypatch.setenv("ETAP_ROUTE", "flashmla")
    with pytest.raises(ValueError, match="ETAP_ROUTE is 'flashmla'; allowed: 'etap', 'auto', 'peer'"):
        routing.current_route()
