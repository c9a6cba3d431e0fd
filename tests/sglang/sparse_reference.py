"""Sparse attention in FP64, and a check of every call of an engine's libetap against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import etap_py as etap


def attention(
    q: torch.Tensor, values: torch.Tensor, lists: torch.Tensor, counts: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [tokens, heads, 512], lse [tokens, heads] in base 2) in FP64, a token at a time.

    q [tokens, heads, row], values [slots, row]; lists [tokens, width]: slots or -1, of which the first counts[token] are seen
    """
    out, lse = [], []
    for query, slots, count in zip(q.double(), lists.long(), counts.tolist(), strict=True):
        seen = slots[:count]
        rows = values[seen[seen >= 0]].double()
        logits = query @ rows.T * scale
        out.append(torch.nan_to_num(logits.softmax(-1)) @ rows[:, :512])
        lse.append(logits.logsumexp(-1) / torch.tensor(2.0).log() if len(rows) else torch.full((len(query),), -torch.inf))
    return torch.stack(out), torch.stack(lse)


def row_values(rows: torch.Tensor) -> torch.Tensor:
    """The values of rows of a KV pool, FP64 [slots, 512 + rope]: BF16 [slots, row], or bytes with E4M3 values and scales."""
    if rows.dtype == torch.bfloat16:
        return rows.double()
    rows = rows.view(torch.uint8)
    scales = rows[:, 512:528].contiguous().view(torch.float32).double()
    latent = rows[:, :512].contiguous().view(torch.float8_e4m3fn).double().unflatten(1, (4, 128)) * scales[..., None]
    return torch.cat([latent.flatten(1), rows[:, 528:].contiguous().view(torch.bfloat16).double()], 1)


def watch(record: Path) -> None:
    """From now on each call of a sparse plan in this process and its forks is computed in FP64, too: raises where they differ, which ends
    an engine. Writes a line a call to `record`: the length of its longest list."""
    update, run = etap.Plan.update, etap.Plan.run

    def watched_update(plan: etap.Plan, counts: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        plan.watched_counts = counts
        update(plan, counts, *args, **kwargs)

    def watched_run(plan: etap.Plan, q_nope: Any, q_rope: Any, kv_cache: Any, block_table: Any, **options: Any) -> Any:
        out, lse = run(plan, q_nope, q_rope, kv_cache, block_table, **options)
        if plan.problem.topk:
            used, lists = torch.unique(options["slots"], return_inverse=True)
            lists = torch.where(options["slots"] < 0, -1, lists)
            values = row_values(kv_cache[used.clamp_min(0).long()].squeeze(1))
            q = torch.cat([q_nope, q_rope], -1)
            expected, _ = attention(q, values, lists, plan.watched_counts, options["softmax_scale"])
            torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
            assert ((lists >= 0).sum(1) == plan.watched_counts).all(), "a list has as many slots as its count says"
            assert all(len(set(row[row >= 0].tolist())) == (row >= 0).sum() for row in options["slots"]), "a token is listed twice"
            with record.open("a") as file:
                print(int(plan.watched_counts.max()), file=file)
        return out, lse

    etap.Plan.update, etap.Plan.run = watched_update, watched_run
