"""Runs a case of `cases.py` through the public API on any device, with everything poisoned that a call must not rely on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from cases import Case, Expected, Inputs, check, make_inputs, reference
from torch import Tensor

import etap_py as etap

# The seed of a run: another one each time, unless the environment repeats one.
SEED = int(os.environ.get("ETAP_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))


def problem_of(case: Case, device: str, **overrides: Any) -> etap.Problem:
    fields: dict[str, Any] = {
        "num_heads": case.heads,
        "batch": case.num_seqs,
        "page_size": case.page_size,
        "d_latent": case.d_latent,
        "d_rope": case.d_rope,
        "q_dtype": case.q_dtype,
        "kv_format": case.kv,
        "out_dtype": case.out,
        "max_query_len": case.max_query_len,
        "total_q": case.rows if case.query_lens else 0,
        "causal": case.causal,
        "tree_mask": bool(case.tree_mask),
        "shared_prefixes": case.shared_prefixes,
        "batch_invariant": case.batch_invariant,
        "num_sms": case.num_sms,
        "device": device,
    }
    return etap.Problem(**{**fields, **overrides})


def poisoned_workspace(problem: etap.Problem, byte: int = 0xFF) -> Tensor:
    """What an earlier owner of the memory may have left: 0xFF makes NaNs, and counters of -1."""
    size = max(1, etap.workspace_size(problem))
    memory = torch.full((size + 256,), byte, dtype=torch.uint8, device=problem.device)
    start = -memory.data_ptr() % 256
    return memory[start : start + size]


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, for comparisons in which NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


@dataclass
class Guarded:
    """A view into poisoned storage that notices writes."""

    view: Tensor

    def __post_init__(self) -> None:
        self.storage = self.view.new_empty(0).set_(self.view.untyped_storage())
        self.before = self.storage.clone()

    def untouched_outside(self) -> bool:
        """Outside the view."""
        outside = torch.ones(self.storage.shape, dtype=torch.bool, device=self.storage.device)
        outside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(False)
        return same_bits(self.storage[outside], self.before[outside])

    def untouched(self) -> bool:
        """Anywhere."""
        return same_bits(self.storage, self.before)


class Session:
    """A case's plan with a workspace of its own."""

    def __init__(self, inputs: Inputs, workspace_byte: int = 0xFF, **overrides: Any) -> None:
        self.inputs = inputs
        self.problem = problem_of(inputs.case, str(inputs.device), **overrides)
        self.workspace = poisoned_workspace(self.problem, workspace_byte)
        self.plan = etap.Plan(self.problem, workspace=self.workspace)

    def update(self) -> None:
        table = self.inputs.block_table if self.problem.shared_prefixes else None
        self.plan.update(self.inputs.cache_seqlens, self.inputs.cu_seqlens_q, block_table=table)

    def run(self, out: Tensor, lse: Tensor | None, **overrides: Any) -> None:
        i = self.inputs
        fields: dict[str, Any] = {
            "q_nope": i.q_nope,
            "q_rope": i.q_rope,
            "kv_cache": i.kv_cache,
            "block_table": i.block_table,
            "tree_mask": i.tree_mask,
            "softmax_scale": i.softmax_scale,
            "kv_scale": i.kv_scale,
            "kv_group_scales": i.kv_group_scales,
            "out": out,
            "lse": lse,
            "return_lse": lse is not None,
            "lse_base": i.case.lse_base,
            "empty_lse": i.case.empty_lse,
        }
        self.plan.run(**{**fields, **overrides})

    def step(self, out: Tensor, lse: Tensor) -> None:
        self.update()
        self.run(out, lse)

    def solve(self) -> tuple[Tensor, Tensor]:
        """One plan update and one run into fresh poisoned outputs, whose surroundings must stay as they were."""
        out, lse = self.inputs.outputs()
        guards = Guarded(out), Guarded(lse)
        self.step(out, lse)
        assert all(guard.untouched_outside() for guard in guards), f"{self.inputs.case.name}: wrote outside of its outputs"
        return out, lse


def workers_are_single(session: Session) -> bool:
    """Did the last plan on the CUDA device take the CTAs of clusters for workers of their own? Its first record says so
    (libetap/src/sm90/schedule/planner.h)."""
    return bool(session.workspace[28:32].view(torch.int32).item() == 1)


def capture(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Of what has run once: to load kernels is not legal in a capture."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def solve(inputs: Inputs, **overrides: Any) -> tuple[Tensor, Tensor]:
    return Session(inputs, **overrides).solve()


def check_case(case: Case, seed: int, device: str, **overrides: Any) -> Expected:
    """Element-wise against FP64, and again with equal bits: same plan, new plan, and a workspace with other garbage in it."""
    inputs = make_inputs(case, seed, device)
    expected = reference(inputs)
    session = Session(inputs, **overrides)
    out, lse = session.solve()
    check(inputs, out, lse, expected)

    where = f"{case.name} (seed {seed})"
    again = inputs.outputs()
    session.run(*again)
    assert same_bits(out, again[0]) and same_bits(lse, again[1]), f"{where}: a second run has other bits"
    other = solve(inputs, workspace_byte=0x3C, **overrides)
    assert same_bits(out, other[0]) and same_bits(lse, other[1]), f"{where}: the bits depend on what was in the workspace"
    only_out, _ = inputs.outputs()
    session.run(only_out, None)
    assert same_bits(out, only_out), f"{where}: out has other bits when lse is not wanted"
    return expected


def check_values_times(power: int, case: Case, seed: int, device: str, **forced: int) -> None:
    """Values of V times 2^power, far outside of FP16's range, in which partial results travel: the results times that, and no others."""
    inputs = make_inputs(case, seed, device)
    want = reference(inputs)
    inputs.kv_cache.mul_(2.0**power)
    session = Session(replace(inputs, softmax_scale=inputs.softmax_scale * 2.0**-power), **forced)
    out, lse = session.solve()
    check(inputs, (out.double() * 2.0**-power).to(out.dtype), lse, want)
