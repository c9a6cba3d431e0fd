"""Prefixes that sequences share: random cases, and what the SM90 kernels must do with tables that lie, on a GPU and on the emulator."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from cases import Case, Inputs, make_inputs, share_pages
from harness import Session
from matrix import KV_FORMATS, PAGE_SIZES, TABLES
from torch import Tensor

import etap_py as etap


def drawn(seed: int, **fields: Any) -> Case:
    """Groups of any size among sequences that share nothing."""
    rng = random.Random(seed)
    batch, query_len = rng.randint(2, 12), rng.choice([1, 1, 1, 2, 4])
    counts = tuple(rng.randint(0, query_len) for _ in range(batch))
    ragged = any(counts) and rng.random() < 0.4
    case = Case(
        "drawn",
        lens=tuple(rng.choice([0, rng.randint(1, 200), rng.randint(1000, 2000), rng.randint(1280, 1290)]) for _ in range(batch)),
        heads=rng.choice([1, 2, 4, 8, 12, 16]),
        page_size=rng.choice(PAGE_SIZES),
        kv_format=rng.choice(KV_FORMATS),
        out_dtype=rng.choice(["", "fp32"]),
        query_len=1 if ragged else query_len,
        query_lens=counts if ragged else (),
        spare_rows=rng.randint(0, 2) if ragged else 0,
        tables=rng.choice(TABLES),
        tree_mask=rng.choice(["", "", "", "random"]),
        causal=rng.random() < 0.7,
        strided=rng.random() < 0.3,
        num_sms=rng.choice([0, 1, 2, 3]),  # on a large card a small batch shares nothing, as it would not pay
        shared_prefixes=True,
    )
    case = replace(case, **fields)
    print(case)
    return case


def planned(device: str, tables: str, batch: int, page_size: int, seed: int) -> etap.Shared:
    """What a plan of sequences of a few thousand tokens shares. There is no cache behind it."""
    lens = [1200 + 37 * b % 2900 for b in range(batch)]
    pages_of = [-(-length // page_size) for length in lens]
    table = torch.arange(batch * max(pages_of), dtype=torch.int32).view(batch, -1)
    share_pages(tables, table, pages_of, seed)
    plan = etap.Plan(etap.Problem(num_heads=16, batch=batch, page_size=page_size, device=device, shared_prefixes=True))
    plan.update(torch.tensor(lens, dtype=torch.int32, device=device), block_table=table.to(device))
    return plan.shared()


def _solved(inputs: Inputs) -> tuple[Tensor, Tensor]:
    session = Session(inputs)
    out, lse = session.solve()
    assert session.plan.shared().groups > 0
    return out, lse


def check_liars(device: str, seed: int) -> None:
    """A page that does not exist is NaN for all who share it, one behind the prefix for its sequence; a sequence longer than the table is
    of no group. The others are what they were: one SM cuts nothing."""
    lens = (1400,) * 4 + (1500,) * 4
    case = Case("liars", tables="common", heads=16, lens=lens, num_sms=1, shared_prefixes=True, out_dtype="fp32")

    def fresh() -> Inputs:
        return make_inputs(case, seed, device)

    honest = fresh()
    out, lse = _solved(honest)
    assert out.isfinite().all()
    assert lse.isfinite().all()

    behind = fresh()  # the last page of a member
    behind.block_table[2, 1399 // case.page_size] = 2**30
    rows = _solved(behind)
    for got, was in zip(rows, (out, lse), strict=True):
        assert got[2].isnan().all()
        others = [0, 1, 3, 4, 5, 6, 7]
        torch.testing.assert_close(got[others], was[others], atol=1e-5, rtol=1e-5)

    shared = fresh()
    shared.block_table[:, 1] = -1
    for got in _solved(shared):
        assert got.isnan().all()

    longer = fresh()
    longer.cache_seqlens[1] = longer.block_table.shape[1] * case.page_size + 1
    for got, was in zip(_solved(longer), (out, lse), strict=True):
        assert got[1].isnan().all()
        others = [0, *range(2, 8)]
        torch.testing.assert_close(got[others], was[others], atol=1e-5, rtol=1e-5)
