"""What the tests of this folder share. Imports no vLLM: a spawned process must start without it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import DTYPES, Case, Expected, Inputs, reference
from etap_vllm import decode, shapes
from torch import Tensor

import etap_py as etap


def asked(**changes: Any) -> dict[str, Any]:
    """What vLLM asks of a backend before it makes a layer: a DeepSeek-V3 on an H100, but for the changes."""
    fits = {
        "head_size": 576,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": None,
        "use_mla": True,
        "has_sink": False,
        "use_sparse": False,
        "capability": (9, 0),
    }
    return fits | changes


def answer_with_name(member: Any, answers: Any) -> None:
    """In a spawned process: what has become of a pickled member of vLLM's enumeration of backends."""
    answers.put((member.name, member.get_path()))


MAX_BATCH = 8
MAX_QUERY_LEN = 4
# libetap's names to those of vLLM's --kv-cache-dtype
KV_CACHE_DTYPES = {"bf16": "auto", "fp16": "auto", "e4m3": "fp8", "e4m3_656": "fp8_ds_mla", "e4m3_528": "fp8_ds_mla"}


def planner(case: Case, device: str = "cpu", topk: int = 0) -> decode.Planner:
    """What the metadata builder makes once."""
    problem = shapes.problem(
        num_heads=case.heads,
        kv_lora_rank=case.d_latent,
        qk_rope_head_dim=case.d_rope,
        dtype=DTYPES[case.q_dtype],
        kv_cache_dtype=KV_CACHE_DTYPES[case.kv],
        device=device,
        block_size=case.page_size,
        batch_invariant=case.batch_invariant,
        topk=topk,
        shared_prefixes=case.shared_prefixes,
    )
    return decode.Planner(problem, MAX_BATCH * MAX_QUERY_LEN, 1) if topk else decode.Planner(problem, MAX_BATCH, MAX_QUERY_LEN)


def query_start_loc(case: Case) -> Tensor:
    return torch.tensor([0, *case.query_counts]).cumsum(0).int()


def plan(made_by: decode.Planner, case: Case, seq_lens: Tensor, block_table: Tensor | None = None) -> etap.Plan | decode.EmptyPlan:
    """What the metadata builder does once a step."""
    step = made_by.plan(case.num_seqs, case.rows, case.max_query_len)
    decode.update(step, seq_lens, query_start_loc(case).to(seq_lens.device), block_table)
    return step


def attend(step: etap.Plan | decode.EmptyPlan, inputs: Inputs, *, return_lse: bool = True, **changes: Any) -> tuple[Tensor, Tensor | None]:
    """What a layer does. vLLM gives the layer's k_scale whatever the cache's type is."""
    rope = inputs.q_nope.new_empty((*inputs.q_nope.shape[:-1], 0)) if inputs.q_rope is None else inputs.q_rope
    k_scale = inputs.kv_scale if isinstance(inputs.kv_scale, Tensor) else inputs.cache_seqlens.new_ones((), dtype=torch.float32)
    given: dict[str, Any] = {"q": (inputs.q_nope, rope), "kv_cache": inputs.kv_cache, "block_table": inputs.block_table} | changes
    return decode.attend(step, **given, softmax_scale=inputs.softmax_scale, k_scale=k_scale, return_lse=return_lse)


# ---- Sparse attention ------------------------------------------------------------------------------------------------


def rows_of(kv_cache: Tensor, width: int) -> tuple[Tensor, int]:
    """As vLLM's flat_kv_row_view: [rows, width] of [blocks, block_size, ...], with what lies between blocks, and rows a block."""
    blocks, size = kv_cache.shape[:2]
    apart, rest = divmod(kv_cache.stride(0), width)
    assert rest == 0, "blocks are not whole rows apart"
    return kv_cache.as_strided(((blocks - 1) * apart + size, width), (width, 1)), apart


def requests_of(starts: Tensor, tokens: int) -> Tensor:
    """As vLLM's compute_token_to_req_indices: the sequence of each query token; the last one for what is past the end."""
    found = torch.searchsorted(starts[1:].contiguous(), torch.arange(tokens, dtype=torch.int32), right=True, out_int32=True)
    return found.clamp(max=starts.shape[0] - 2)


@dataclass
class Lists:
    """A step's query tokens with the lists that vLLM makes of an indexer's choice."""

    inputs: Inputs
    slots: Tensor  # int32 [query tokens, topk]: tokens at the beginning, -1 from there on
    counts: Tensor  # int32 [query tokens]: how many

    @property
    def rows(self) -> Tensor:
        """The cache as vLLM's view of its rows."""
        case = self.inputs.case
        return rows_of(self.inputs.kv_cache, 656 if case.kv == "e4m3_528" else self.inputs.kv_cache.shape[-1])[0]

    def expected(self) -> Expected:
        """In FP64: a list is the block table of a sequence of its own, whose blocks have one row."""
        i = self.inputs
        case = replace(i.case, lens=tuple(self.counts.tolist()), query_len=1, query_lens=(), spare_rows=0, page_size=1, causal=False)
        return reference(replace(i, case=case, kv_cache=self.kv_cache, block_table=self.slots, cache_seqlens=self.counts))

    @property
    def kv_cache(self) -> Tensor:
        return self.rows[:, None, : self.inputs.kv_cache.shape[-1]]


def choose(inputs: Inputs, topk: int, seed: int, *, fewer: bool = False, twice: bool = False) -> Lists:
    """What an indexer could choose: all tokens up to a query token, or any topk of them; where there are `fewer` than it could, for
    example because another rank has them, none at all in some rows; with the same one `twice`, or more often."""
    rng = random.Random(seed)
    case = inputs.case
    _, apart = rows_of(inputs.kv_cache, 656 if case.kv == "e4m3_528" else inputs.kv_cache.shape[-1])
    slots = torch.full((case.rows, topk), -1, dtype=torch.int32)
    counts = torch.zeros(case.rows, dtype=torch.int32)
    starts, table = query_start_loc(case).tolist(), inputs.block_table.cpu()
    for b, length in enumerate(inputs.cache_seqlens.tolist()):
        for row in range(starts[b], starts[b + 1]):
            seen = max(0, length - (starts[b + 1] - row) + 1)
            count = min(seen, topk)
            if fewer:
                count = rng.choice([0, rng.randint(0, count), count])
            tokens = torch.tensor(rng.choices(range(seen), k=count) if twice and seen else rng.sample(range(seen), count)).long()
            blocks = table[b, tokens // case.page_size].long()
            slots[row, :count] = (blocks * apart + tokens % case.page_size).int()
            counts[row] = count
    return Lists(inputs, slots.to(inputs.device), counts.to(inputs.device))


def plan_lists(made_by: decode.Planner, case: Case, seq_lens: Tensor, starts: Tensor | None = None) -> etap.Plan | decode.EmptyPlan:
    """What the sparse metadata builder does once a step."""
    starts = (query_start_loc(case) if starts is None else starts).to(seq_lens.device)
    step = made_by.plan(case.rows, case.rows, 1)
    requests = requests_of(starts.cpu(), case.rows).to(seq_lens.device)
    decode.update(step, decode.list_lengths(seq_lens, starts, requests, step.problem.topk), starts)
    return step


def attend_lists(step: etap.Plan | decode.EmptyPlan, lists: Lists, **changes: Any) -> tuple[Tensor, Tensor | None]:
    """What a sparse layer does."""
    given = {"kv_cache": lists.kv_cache, "block_table": None, "slots": lists.slots} | changes
    return attend(step, lists.inputs, **given)
