"""A tile size, a KV format and a pair of widths that the library doesn't have (`one_more.h`) against FP64: `test_emulator.py` runs this
file in processes of their own where libetap is the emulator's, and where it is the CPU device with the same lists."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import sparse_cases
import torch
from cases import Case, Inputs, _strided, check, make_inputs, reference
from harness import Session, problem_of

import etap_py as etap
from etap_py import decode, problem

MIXED = (500, 65, 0, 1, 128)
SM90 = "SM90" in etap.device_info("cpu").name
FORMAT, ROW_BYTES = "e4m3_592", 592


@pytest.fixture(autouse=True)
def known_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(problem._KV_FORMATS, FORMAT, len(problem._KV_FORMATS))
    monkeypatch.setitem(problem.ROW_BYTES, FORMAT, ROW_BYTES)
    monkeypatch.setitem(decode._KV_STORAGE, FORMAT, "uint8")


def with_scales_at_the_end(inputs: Inputs) -> Inputs:
    """The same values, scales and poison in rows of 592 bytes."""
    assert inputs.kv_group_scales is not None
    rows = torch.cat([inputs.kv_cache.contiguous().view(torch.uint8), inputs.kv_group_scales.contiguous().view(torch.uint8)], -1)
    assert rows.shape[-1] == ROW_BYTES
    case = replace(inputs.case, kv_format=FORMAT)
    cache = _strided(tuple(rows.shape), torch.uint8, "cpu", case.page_gap, case.row_gap).copy_(rows)
    return replace(inputs, case=case, kv_cache=cache, kv_group_scales=None)


def solve_and_check(case: Case, seed: int, kernel: str = "", **forced: int) -> None:
    inputs = make_inputs(case, seed)
    session = Session(inputs, **(forced if SM90 else {}))
    assert not SM90 or kernel in etap.query(session.problem).kernel
    check(inputs, *session.solve(), reference(inputs))


@pytest.mark.skipif(not SM90, reason="a tile is a matter of the kernels")
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("kv_format", ["e4m3", "e4m3_group", "e4m3_656"])
def test_tile(kv_format: str, page_size: int, cluster: int, seed: int) -> None:
    case = Case("tile_40", heads=37, lens=MIXED, kv_format=kv_format, page_size=page_size)
    solve_and_check(case, seed, "e4m3_dv_split_n40", force_tile=40, force_cluster=cluster)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(("page_size", "gap"), [(1, 0), (1, 16), (64, 0), (128, 48)])
@pytest.mark.parametrize("heads", [16, 64])
def test_format(heads: int, page_size: int, gap: int, cluster: int, seed: int) -> None:
    content = random.Random(seed).choice(["normal", "far_scales"])
    case = Case(FORMAT, heads=heads, lens=MIXED, kv_format="e4m3_group", page_size=page_size, row_gap=gap, page_gap=gap, content=content)
    inputs = make_inputs(case, seed)
    session = Session(with_scales_at_the_end(inputs), **({"force_cluster": cluster} if SM90 else {}))
    check(inputs, *session.solve(), reference(inputs))


@pytest.mark.parametrize("gap", [0, 16])
@pytest.mark.parametrize("heads", [16, 64])
def test_format_with_lists_of_slots(heads: int, gap: int, seed: int) -> None:
    rng = random.Random(seed)
    case = sparse_cases.drawn(rng, kv_format="e4m3_group", heads=heads)
    inputs = make_inputs(replace(case, d_latent=512, d_rope=64, page_gap=gap), seed)
    slots = sparse_cases.lists(rng, inputs, 100)
    solved = sparse_cases.solve(with_scales_at_the_end(inputs), slots, None)
    check(inputs, *solved, sparse_cases.reference(inputs, slots, None))


def test_format_has_no_scales_beside(seed: int) -> None:
    inputs = make_inputs(Case(FORMAT, kv_format="e4m3_group", lens=MIXED), seed)
    session = Session(with_scales_at_the_end(inputs))
    session.update()
    with pytest.raises(ValueError, match="kv_group_scales"):
        session.run(*inputs.outputs(), kv_group_scales=inputs.kv_group_scales)


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize(("heads", "kernel"), [(8, "token_split_n8"), (16, "split_n16"), (40, "dv_split_n40"), (64, "rows_on_m_n64")])
@pytest.mark.parametrize("kv_format", ["bf16", "fp16", "e4m3"])
def test_widths(kv_format: str, heads: int, kernel: str, page_size: int, seed: int) -> None:
    if kv_format == "e4m3" and heads in (8, 40):
        heads, kernel = (24, "e4m3_split_n24") if heads == 8 else (40, "e4m3_dv_split_n40")
    q_dtype = "fp16" if kv_format == "fp16" else "bf16"
    case = Case("256_0", heads=heads, lens=MIXED, kv_format=kv_format, q_dtype=q_dtype, d_latent=256, d_rope=0, page_size=page_size)
    solve_and_check(case, seed, kernel, **({"force_tile": 40} if heads == 40 else {}), force_cluster=random.Random(seed).choice([1, 2]))


@pytest.mark.parametrize("d_rope", [32, 128])
def test_other_widths_are_refused(d_rope: int) -> None:
    """The sentence names the pair that was added."""
    with pytest.raises(ValueError, match=rf"\(256, {d_rope}\); allowed: \(512, 64\), \(512, 0\), \(256, 64\), \(256, 0\)"):
        etap.query(problem_of(Case("refused", d_latent=256, d_rope=d_rope, lens=(1,)), "cpu"))
