"""Requests to decode steps, as a server with continuous batching runs them.

First come, first served. A request joins at the first step after its arrival when the batch has a place and the cache has room for its
prompt and its whole answer (blocks that running requests share count once); so nothing is ever evicted. Its prompt is in the cache when
it joins: prefill happens elsewhere, or between the steps. In a step each request has 1 + speculative_tokens query tokens and gains
1 + acceptance · speculative_tokens, in its last step what its answer still lacks; steps take `step_ms`.

What is simulated is one attention group (workload.Server): of the whole server's requests, taken in order of arrival, it gets every dp-th.

A trace ends and a service does not: when the last request has joined, the run goes on only while at least half of the batch of that moment
is there, so that no long tail of a few last answers is measured.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
from msgspec import Struct

from etap_bench.errors import Refused
from etap_bench.shape import Block
from etap_bench.traces import Request
from etap_bench.workload import Scheduler, Workload


class Step(Struct, frozen=True):
    """One decode step of the simulated server.

    number: counted from 0 over all steps
    seconds: since the first arrival
    lengths, query_lens: KV tokens (new ones included) and query tokens of each sequence
    shared: blocks each sequence begins with, see shape.Shape
    new_tokens: answer tokens gained
    """

    number: int
    seconds: float
    lengths: tuple[int, ...]
    query_lens: tuple[int, ...]
    shared: tuple[tuple[Block, ...], ...]
    new_tokens: float


@dataclass
class _Running:
    request: Request
    gain: float  # answer tokens a step
    answered: float = 0.0

    @property
    def query_len(self) -> int:
        return 1 + self.request.speculative_tokens


def sample_steps(workload: Workload, of: Sequence[Request] | None = None) -> tuple[list[Step], int]:
    """`workload.steps` decode steps, evenly spaced over all that the workload takes (every one when there are fewer), and the number of
    all. `of`: the whole server's requests, when they have been read. Raises Refused for a request that is larger than the cache."""
    scheduler = _shrunk_scheduler(workload)
    served = workload.all_requests() if of is None else of
    requests = [_shrunk(request, workload.shrink) for request in served[:: workload.server.dp]]
    kept: list[Step] = []
    stride = total = 0
    for number, seconds, running in _simulate(requests, scheduler):
        total = number + 1
        stride = stride or 1
        if number % stride:
            continue
        kept.append(_snapshot(number, seconds, running))
        if len(kept) == 4 * workload.steps:  # thin out: memory stays bounded however long the trace is
            kept, stride = kept[::2], stride * 2
    count = min(workload.steps, len(kept))
    chosen = [kept[round(i * (len(kept) - 1) / max(1, count - 1))] for i in range(count)]
    return chosen, total


def _simulate(requests: Sequence[Request], scheduler: Scheduler) -> Iterator[tuple[int, float, list[_Running]]]:
    """(number, seconds, the requests of the batch) of each step. The list is only valid until the next one."""
    waiting = deque(requests)
    running: list[_Running] = []
    holders: Counter[Hashable] = Counter()  # running requests that hold a block
    used = 0
    seconds = 0.0
    number = 0
    least = 1  # requests in a batch that is worth a step
    while len(running) >= least or waiting:
        if not running:
            seconds = max(seconds, waiting[0].arrival)
        while waiting and waiting[0].arrival <= seconds and len(running) < scheduler.max_batch:
            request = waiting[0]
            room = _room(request) - sum(tokens for name, tokens in request.blocks if holders[name])
            if used + room > scheduler.kv_tokens:
                if not running:
                    raise Refused(
                        f"a request has {request.prompt_tokens} prompt and {request.answer_tokens} answer tokens; allowed: together "
                        f"{scheduler.kv_tokens}, which is scheduler.kv_tokens"
                    )
                break
            waiting.popleft()
            used += room
            holders.update(name for name, _ in request.blocks)
            running.append(_Running(request, 1 + scheduler.acceptance * request.speculative_tokens))
            least = 1 if waiting else -(-len(running) // 2)
        yield number, seconds, running
        number += 1
        seconds += scheduler.step_ms / 1e3
        still_running = []
        for sequence in running:
            sequence.answered += sequence.gain
            if sequence.answered < sequence.request.answer_tokens:
                still_running.append(sequence)
                continue
            blocks = sequence.request.blocks
            holders.subtract(name for name, _ in blocks)
            used -= _room(sequence.request) - sum(tokens for name, tokens in blocks if holders[name])
        running = still_running


def _room(request: Request) -> int:
    return request.prompt_tokens + request.answer_tokens + request.speculative_tokens


def _snapshot(number: int, seconds: float, running: Sequence[_Running]) -> Step:
    return Step(
        number=number,
        seconds=seconds,
        lengths=tuple(s.request.prompt_tokens + int(s.answered) + s.query_len for s in running),
        query_lens=tuple(s.query_len for s in running),
        shared=tuple(s.request.blocks for s in running),
        new_tokens=sum(min(s.gain, s.request.answer_tokens - s.answered) for s in running),
    )


def _shrunk(request: Request, factor: int) -> Request:
    return msgspec.structs.replace(
        request,
        prompt_tokens=-(-request.prompt_tokens // factor),
        answer_tokens=-(-request.answer_tokens // factor),
        blocks=_shrunk_blocks(request.blocks, factor),
    )


def _shrunk_blocks(blocks: tuple[Block, ...], factor: int) -> tuple[Block, ...]:
    """Each ends where it ended, divided: small blocks together keep their share of the prompt."""
    if factor == 1:
        return blocks
    ends = [0, *itertools.accumulate(tokens for _, tokens in blocks)]
    return tuple((name, end // factor - begin // factor) for (name, _), (begin, end) in zip(blocks, itertools.pairwise(ends), strict=True))


def _shrunk_scheduler(workload: Workload) -> Scheduler:
    scheduler, factor = workload.scheduler, workload.shrink
    return msgspec.structs.replace(
        scheduler, max_batch=max(1, scheduler.max_batch // factor), kv_tokens=max(1, scheduler.kv_tokens // factor)
    )
