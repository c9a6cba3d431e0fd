"""Processes that come from a fork after the library was loaded and used."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch
from cases import Case, make_inputs
from harness import same_bits, solve

CASE = Case("fork", lens=(2000, 64, 5))


def child(seed: int, answer: Connection) -> None:
    out, lse = solve(make_inputs(CASE, seed))
    answer.send_bytes(out.view(torch.uint8).numpy().tobytes() + lse.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use(seed: int) -> None:
    """Guards against a child that waits forever for threads which exist in its parent only. Data loaders and servers fork."""
    out, lse = solve(make_inputs(CASE, seed))
    want = out.view(torch.uint8).numpy().tobytes() + lse.contiguous().view(torch.uint8).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(seed, sending))
    process.start()
    try:
        assert receiving.poll(60), "the child did not answer within a minute"
        assert receiving.recv_bytes() == want
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
    again, _ = solve(make_inputs(CASE, seed))
    assert same_bits(out, again)
