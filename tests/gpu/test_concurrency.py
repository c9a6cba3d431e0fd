"""Streams, threads and repeated calls."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from cases import Case, check, make_inputs, reference
from harness import Session, bits, same_bits, solve

Supported = Callable[[Case], None]

SPLIT = Case("split", lens=(5000, 3, 700, 0), heads=16)
MANY = Case("many", batch=60, max_len=300, heads=12, query_len=2)


def test_100_equal_calls(seed: int, supported: Supported) -> None:
    """Guards against nondeterminism: unordered sums of partial results, missing fences, stale shared memory."""
    for case in (SPLIT, MANY):
        supported(case)
        inputs = make_inputs(case, seed, "cuda")
        session = Session(inputs)
        out, lse = session.solve()
        differences = torch.zeros((), dtype=torch.int64, device="cuda")
        again = inputs.outputs()
        for _ in range(100):
            for tensor in again:
                tensor.fill_(torch.nan)
            session.update()
            session.run(*again)
            differences += (bits(out) != bits(again[0])).any()
            differences += (bits(lse) != bits(again[1])).any()
        assert int(differences) == 0, f"{case.name} (seed {seed})"


def test_two_streams(seed: int, supported: Supported) -> None:
    """Calls in flight at the same time on two streams, with workspaces and outputs of their own, are independent."""
    cases = SPLIT, MANY
    for case in cases:
        supported(case)
    sessions = [Session(make_inputs(case, seed, "cuda")) for case in cases]
    alone = [session.solve() for session in sessions]
    streams = [torch.cuda.Stream() for _ in sessions]
    outputs = [session.inputs.outputs() for session in sessions]
    differences = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in sessions]
    torch.cuda.synchronize()
    for _ in range(100):
        for session, stream, result, before, count in zip(sessions, streams, outputs, alone, differences, strict=True):
            with torch.cuda.stream(stream):
                session.update()
                session.run(*result)
                count += (bits(result[0]) != bits(before[0])).any()
                count += (bits(result[1]) != bits(before[1])).any()
    torch.cuda.synchronize()
    assert [int(count) for count in differences] == [0, 0]
    for session, result in zip(sessions, alone, strict=True):
        check(session.inputs, *result, reference(session.inputs))


def test_two_threads(seed: int, supported: Supported) -> None:
    """Guards against a last message, a handle or a cache that threads share without a lock."""
    supported(SPLIT)
    inputs = make_inputs(SPLIT, seed, "cuda")
    out, lse = solve(inputs)
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(name: str) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    mine = solve(inputs)
                    torch.cuda.current_stream().synchronize()
                    if not (same_bits(out, mine[0]) and same_bits(lse, mine[1])):
                        failures.append(f"{name}: other bits")
        except Exception as error:
            failures.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=work, args=(f"thread {i}",)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
