"""The one format of results: what `etap bench` and `make bench` write, and what `etap report`, `etap history` and `etap model calibrate`
read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec
from etap_py import files
from msgspec import Struct

from etap_bench.errors import Refused
from etap_bench.measurement import Measurement
from etap_bench.shape import Shape
from etap_bench.workload import Workload

VERSION = 2
_OWN = re.compile(rb'"format"\s*:\s*"etap-bench"')


class Device(Struct, frozen=True, omit_defaults=True):
    """What it ran on.

    processor: the host's, of a CPU device
    cache_bytes: the last-level cache; 0: not known
    power_limit_w: None: not known
    """

    kind: Literal["cpu", "cuda"]
    name: str
    num_sms: int  # threads on the CPU
    cache_bytes: int
    processor: str = ""
    driver: str = ""
    power_limit_w: float | None = None

    @property
    def title(self) -> str:
        """What tells it from others: the name of a CPU device is its instructions, which many processors have."""
        return f"{self.name} {self.processor}".strip()


class Run(Struct, frozen=True, omit_defaults=True):
    """What makes results comparable: a file holds rows of one run only.

    rows: names of the rows that are wanted
    commit: of the source tree; "": not known
    software: versions by name
    warm_up, rounds, sustain, sustained_rows: how often and how long, see etap bench --help; rounds 0: not known
    workload, workload_digest: whose steps they are, and of the trace's contents; None and "" for shapes
    """

    rows: list[str]
    device: Device
    peers: list[str]
    warm_up: int
    rounds: int
    sustain: float
    sustained_rows: int
    software: dict[str, str]
    commit: str = ""
    workload: Workload | None = None
    workload_digest: str = ""


class StepOf(Struct, frozen=True):
    """Where a row is in its workload: see scheduler.Step."""

    index: int
    number: int
    seconds: float
    new_tokens: float


class Row(Struct, omit_defaults=True):
    """One shape, or one decode step. Times are microseconds of one layer's call.

    shape: without the names of shared blocks, for which distinct_kv_bytes stands
    wrong: contenders whose result was off, and by how much; they have no time
    command: measures this row again
    """

    name: str
    shape: Shape
    distinct_kv_bytes: int
    measured: Measurement
    wrong: dict[str, str] = {}
    command: str = ""
    step: StepOf | None = None


class Results(Struct):
    """rows: those measured so far, in order; all_steps: decode steps that the workload takes, of which run.rows were chosen."""

    run: Run
    command: str
    started: str  # ISO 8601, UTC
    all_steps: int = 0
    format: Literal["etap-bench"] = "etap-bench"
    version: int = VERSION
    rows: list[Row] = []

    @property
    def complete(self) -> bool:
        return len(self.rows) == len(self.run.rows)

    @property
    def title(self) -> str:
        """Of the work."""
        if self.run.workload is not None:
            return self.run.workload.name
        return self.run.rows[0] if len(self.run.rows) == 1 else f"{len(self.run.rows)} shapes"

    @property
    def source(self) -> str:
        """The tree that was measured and its day."""
        return f"{self.run.commit or 'etap ' + self.run.software.get('etap', 'of an unknown version')}, {self.started[:10]}"


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


def is_own(text: bytes) -> bool:
    """Did `etap bench` write it? Also in another version, and where it is damaged."""
    return _OWN.search(text) is not None


def encoded(results: Results) -> bytes:
    """JSON with a line for each row, so that a diff reads like a table."""
    fields = {name: getattr(results, name) for name in ("format", "version", "command", "started", "all_steps", "run")}
    head = b",\n".join(msgspec.json.encode(name) + b": " + msgspec.json.encode(value) for name, value in fields.items())
    rows = b",\n".join(msgspec.json.encode(row) for row in results.rows)
    return b"{\n" + head + b',\n"rows": [\n' + rows + b"\n]}\n"


def write(path: Path, results: Results) -> None:
    """The file is replaced at once: what was there stays whole when the disk is full or the process dies."""
    files.write_all({path: encoded(results)})
