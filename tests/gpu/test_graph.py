"""CUDA graphs: captured once, replayed while lengths, tables and queries change on the device."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import Case, Inputs, check, make_inputs, reference
from harness import Session, bits, capture
from torch import Tensor

Supported = Callable[[Case], None]

LONGEST = 3000
CASES = [
    Case("graph", lens=(LONGEST,) * 6),
    Case("graph_heads_8_page_1", lens=(LONGEST,) * 4, heads=8, page_size=1),
    Case("graph_tokens_4", lens=(LONGEST,) * 5, query_len=4),
    Case("graph_heads_128", lens=(LONGEST,) * 3, heads=128),
    Case("graph_e4m3", lens=(LONGEST,) * 6, kv_format="e4m3", kv_scale_on_device=True),
    Case("graph_batch_invariant", lens=(LONGEST,) * 4, batch_invariant=True),
    Case("graph_tree", lens=(LONGEST,) * 5, query_len=9, heads=4, tree_mask="random"),
    Case("graph_ragged", lens=(LONGEST,) * 5, query_lens=(1, 3, 2, 4, 1)),
]


class Step:
    """A step as an engine captures it: one plan update and two layers, over static buffers, captured on dummy lengths of 1."""

    LAYERS = 2

    def __init__(self, case: Case, seed: int) -> None:
        self.inputs = make_inputs(case, seed, "cuda")
        self.longest_kv = self.inputs.kv_cache.clone()
        self.session = Session(self.inputs)
        self.outputs = [self.inputs.outputs() for _ in range(self.LAYERS)]
        self.inputs.cache_seqlens.fill_(1)
        self._work()  # loads the kernels: not legal in a capture
        self.graph = capture(self._work)

    def _work(self) -> None:
        self.session.update()
        for out, lse in self.outputs:
            self.session.run(out, lse)

    def set_lengths(self, lens: list[int]) -> None:
        """Changes the lengths on the device, and poisons the KV rows and table entries that fell out of use."""
        inputs, page = self.inputs, self.inputs.case.page_size
        lengths = torch.tensor(lens, dtype=torch.int32, device="cuda")
        inputs.cache_seqlens.copy_(lengths)
        inputs.kv_cache.copy_(self.longest_kv)
        for b, length in enumerate(lens):
            unused = torch.arange(length, LONGEST, device="cuda")
            pages = inputs.block_table[b, unused // page].long()
            kv = inputs.kv_cache.view(torch.uint8) if inputs.kv_cache.element_size() == 1 else inputs.kv_cache
            kv[pages, unused % page] = 0x7F if inputs.kv_cache.element_size() == 1 else torch.nan

    def expected_of(self) -> Inputs:
        case = replace(self.inputs.case, lens=tuple(self.inputs.cache_seqlens.tolist()))
        return replace(self.inputs, case=case)

    def poison_outputs(self) -> None:
        for tensor in (t for pair in self.outputs for t in pair):
            tensor.fill_(torch.nan)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_replay_after_lengths_changed(case: Case, seed: int, supported: Supported) -> None:
    """Guards against schedules or launch shapes fixed at capture: lengths grow, shrink, become 0 (padded rows), all at once."""
    supported(case)
    step = Step(case, seed)
    r = random.Random(seed)
    batch = case.num_seqs
    plans = [
        [1] * batch,
        [LONGEST] * batch,
        [5] * batch,
        [0] * batch,
        [LONGEST] + [0] * (batch - 1),
        [0] * (batch - 1) + [LONGEST - 1],
        *([r.randint(0, LONGEST) for _ in range(batch)] for _ in range(4)),
    ]
    for lens in plans:
        step.set_lengths(lens)
        step.poison_outputs()
        step.graph.replay()
        inputs = step.expected_of()
        expected = reference(inputs)
        for out, lse in step.outputs:
            check(inputs, out, lse, expected)


def count_differences(step: Step, first: list[Tensor], differences: Tensor) -> None:
    """Adds to `differences`, on the device, the outputs of the last replay that differ from the first one's."""
    for tensor, before in zip((t for pair in step.outputs for t in pair), first, strict=True):
        differences += (bits(tensor) != before).any()


@pytest.mark.parametrize("case", CASES[:4], ids=lambda case: case.name)
def test_1000_replays_have_equal_bits(case: Case, seed: int, supported: Supported) -> None:
    """Guards against races that show once in a few hundred calls, and against counters in the workspace that are not put back."""
    supported(case)
    step = Step(case, seed)
    r = random.Random(seed)
    step.set_lengths([r.randint(0, LONGEST) for _ in range(case.num_seqs)])
    step.graph.replay()
    first = [bits(t).clone() for pair in step.outputs for t in pair]
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        step.poison_outputs()
        step.graph.replay()
        count_differences(step, first, differences)
    assert int(differences) == 0


def test_two_graphs_at_once(seed: int, supported: Supported) -> None:
    """Guards against state that is not in the workspace: two graphs with workspaces of their own replay on two streams."""
    cases = CASES[0], CASES[1]
    for case in cases:
        supported(case)
    steps = [Step(case, seed + i) for i, case in enumerate(cases)]
    r = random.Random(seed)
    for step in steps:
        step.set_lengths([r.randint(0, LONGEST) for _ in range(step.inputs.case.num_seqs)])
        step.graph.replay()
    torch.cuda.synchronize()
    first = [[bits(t).clone() for pair in step.outputs for t in pair] for step in steps]
    streams = [torch.cuda.Stream() for _ in steps]
    differences = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in steps]
    torch.cuda.synchronize()
    for _ in range(200):
        for step, stream, before, count in zip(steps, streams, first, differences, strict=True):
            with torch.cuda.stream(stream):
                step.poison_outputs()
                step.graph.replay()
                count_differences(step, before, count)
    torch.cuda.synchronize()
    assert [int(count) for count in differences] == [0, 0]
    for step in steps:
        inputs = step.expected_of()
        expected = reference(inputs)
        for out, lse in step.outputs:
            check(inputs, out, lse, expected)


def test_update_and_run_in_separate_graphs(seed: int, supported: Supported) -> None:
    """The plan may be made in one graph and used by the next: an engine captures the layers of a step piece by piece."""
    case = CASES[0]
    supported(case)
    inputs = make_inputs(case, seed, "cuda")
    session = Session(inputs)
    out, lse = inputs.outputs()
    session.update()
    session.run(out, lse)
    graphs = [capture(session.update), capture(lambda: session.run(out, lse))]
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
    session.workspace.fill_(0xFF)
    for graph in graphs:
        graph.replay()
    check(inputs, out, lse, reference(inputs))
