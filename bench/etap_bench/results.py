"""The file that `etap bench` writes and `etap report` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
from etap_py import files
from msgspec import Struct

from etap_bench.errors import Refused
from etap_bench.measurement import Measurement
from etap_bench.workload import Workload

VERSION = 1


class Device(Struct, frozen=True):
    """What it ran on. cache_bytes: the last-level cache; power_limit_w: None when it is not known."""

    kind: Literal["cpu", "cuda"]
    name: str
    num_sms: int  # threads on the CPU
    cache_bytes: int
    driver: str = ""
    power_limit_w: float | None = None


class Run(Struct, frozen=True):
    """What makes results comparable: a file holds rows of one run only.

    workload_digest: of the trace's contents; "" without a trace
    software: versions by name
    """

    workload: Workload
    workload_digest: str
    device: Device
    peers: list[str]
    rounds: int
    software: dict[str, str]


class Row(Struct):
    """One decode step. Bytes and FLOP are one layer's, times microseconds of one layer's call.

    number, seconds, lengths, query_lens, new_tokens: see scheduler.Step
    wrong: contenders whose result was off, and by how much; they have no time
    command: measures this row again
    """

    index: int
    number: int
    seconds: float
    lengths: list[int]
    query_lens: list[int]
    new_tokens: float
    kv_bytes: int
    distinct_kv_bytes: int
    flop: int
    measured: Measurement
    wrong: dict[str, str]
    command: str


class Results(Struct):
    """steps: decode steps chosen, of all_steps that the workload takes; rows: those measured so far, in order."""

    run: Run
    command: str
    started: str  # ISO 8601, UTC
    steps: int
    all_steps: int
    rows: list[Row] = []
    format: Literal["etap-bench"] = "etap-bench"
    version: int = VERSION

    @property
    def complete(self) -> bool:
        return len(self.rows) == self.steps


class _Header(Struct):
    format: str = ""
    version: int = 0


def read(path: Path) -> Results:
    """Raises Refused for a file that is something else, of another version or damaged; OSError when it can't be read."""
    text = files.read(path)
    try:
        header = msgspec.json.decode(text, type=_Header)
        if header.format != "etap-bench":
            raise Refused(f"{path} has the format {header.format or 'unknown'!r}; allowed: a file that `etap bench` wrote")
        if header.version != VERSION:
            raise Refused(f"{path} is of version {header.version}; allowed: {VERSION}, which this etap writes (measure it again)")
        return msgspec.json.decode(text, type=Results)
    except msgspec.DecodeError as error:
        raise Refused(f"{path} is damaged: {error}") from error


def write(path: Path, results: Results) -> None:
    """The file is replaced at once: what was there stays whole when the disk is full or the process dies."""
    text = msgspec.json.format(msgspec.json.encode(results), indent=1)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
