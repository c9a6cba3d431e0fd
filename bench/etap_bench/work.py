"""What is to be measured: the steps of a workload, or shapes. Without PyTorch and libetap."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from etap_bench import shape_lists, workload
from etap_bench.errors import Refused
from etap_bench.results import StepOf
from etap_bench.scheduler import Step, sample_steps
from etap_bench.shape import Shape
from etap_bench.workload import Workload


@dataclass(frozen=True)
class Item:
    """One row to be."""

    name: str
    shape: Shape
    step: StepOf | None = None


@dataclass
class Work:
    """name: for titles and files; note: what a person should know of the input; groups: rows by the list that they come from"""

    name: str
    items: list[Item]
    seed: int = 0
    workload: Workload | None = None
    digest: str = ""
    all_steps: int = 0
    note: str = ""
    groups: dict[str, list[str]] = field(default_factory=dict)


def of_workload(chosen: Workload) -> Work:
    """Its decode steps. Raises Refused, OSError."""
    trace = chosen.read()
    steps, every = sample_steps(chosen, trace.requests)
    items = [
        Item(f"step {index}", _shape(chosen, step), StepOf(index, step.number, step.seconds, step.new_tokens))
        for index, step in enumerate(steps)
    ]
    note = "; ".join(part for part in (trace.note if chosen.trace else "", chosen.note) if part)
    return Work(chosen.name, items, chosen.seed, chosen, trace.digest, every, note)


def _shape(chosen: Workload, step: Step) -> Shape:
    model = chosen.model
    try:
        every = Shape(
            lengths=step.lengths,
            heads=model.heads,
            query_lens=step.query_lens,
            kv_format=model.kv_format,
            page_size=model.page_size,
            d_latent=model.d_latent,
            d_rope=model.d_rope,
            shared=step.shared,
            shared_prefixes=model.shared_prefixes and not model.topk,
        )
        return _selected(every, max(1, model.topk // chosen.shrink)) if model.topk else every
    except ValueError as error:
        raise Refused(f"decode step {step.number} of workload {chosen.name} can't be computed: {error}") from error


def _selected(every: Shape, topk: int) -> Shape:
    """What the kernel is given of sparse attention, see workload.Model: each query token with as many KV tokens as the indexer may choose
    among those that it sees."""
    seen = (length - later for length, count in zip(every.lengths, every.query_lens, strict=True) for later in reversed(range(count)))
    return replace(every, lengths=tuple(min(topk, tokens) for tokens in seen), query_lens=(), context=topk, sparse=True, shared=())


def of_shapes(sources: Sequence[str], sweep: Sequence[str] = (), pattern: str = "", num_sms: int = 0) -> Work:
    """The shapes that the sources name (a shape, a shipped list, a file of one) and those of a sweep, each once, whose names match
    `pattern`. num_sms: SMs to use instead of what the names say; 0: as they say. Raises Refused, OSError."""
    try:
        matches = re.compile(pattern)
    except re.error as error:
        raise Refused(f"filter is {pattern!r}; allowed: regular expressions ({error})") from error
    found: dict[str, Shape] = {}
    groups: dict[str, list[str]] = {}
    listed = [(name, shape_lists.load(name)) for name in sources] + ([("sweep", shape_lists.sweep(sweep))] if sweep else [])
    for name, shapes in listed:
        chosen = [shape_lists.with_sms(shape, num_sms) if num_sms else shape for shape in shapes]
        chosen = [shape for shape in chosen if matches.search(shape.name)]
        for shape in chosen:
            if found.setdefault(shape.name, shape) != shape:
                raise Refused(f"shape {shape.name} is given twice with different lengths; allowed: once")
        if len(shapes) > 1:
            groups[Path(name).stem] = [shape.name for shape in chosen]
    if not found:
        raise Refused(f"filter is {pattern!r}, which no shape's name matches; --filter '' --list shows them")
    label = "-".join(Path(name).stem for name, _ in listed) if len(listed) <= 3 else f"{len(found)} shapes"
    return Work(label, [Item(name, shape) for name, shape in found.items()], groups=groups)


def of_arguments(sources: Sequence[str], settings: Sequence[str], sweep: Sequence[str], pattern: str, num_sms: int) -> Work:
    """One workload or any number of shapes, as a person names them. Raises Refused, OSError."""
    of_shape = [shape_lists.is_source(source) for source in sources]
    if sweep or (sources and all(of_shape)):
        if not all(of_shape):
            raise Refused(f"{sources[of_shape.index(False)]} is a workload; allowed with --sweep: shapes, and lists of them")
        if settings:
            raise Refused(f"setting is {settings[0]!r}; allowed: with a workload only, whose fields are set")
        return of_shapes(sources, sweep, pattern, num_sms)
    if len(sources) != 1:
        what = " and ".join(sources) or "nothing"
        raise Refused(f"the work is {what}; allowed: one workload ({', '.join(workload.shipped())}, a file or a trace), or shapes")
    if pattern or num_sms:
        raise Refused(f"{'filter' if pattern else 'sms'} is given with the workload {sources[0]}; allowed: with shapes")
    return of_workload(workload.load(sources[0], settings))
