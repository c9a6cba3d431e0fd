"""The loop of `etap bench`: measures the rows that are not in the file yet, and writes the file after each."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import etap_py as etap
import torch
from etap_py import files
from etap_py.files import cant_write, check_writable

from etap_bench import inputs, results
from etap_bench.contenders import Ceiling, Skip, ceiling_of
from etap_bench.errors import Refused, check_device
from etap_bench.measure import Rounds, measure
from etap_bench.measurement import Measurement
from etap_bench.results import Device, Results, Row, Run
from etap_bench.shape import Shape
from etap_bench.timing import CudaTimer, Timer, timer_of
from etap_bench.work import Item, Work

_HOST_CACHE = 64 << 20  # at most; a virtual machine is told its host's whole cache and has a part of it
_PEER_PACKAGES = ("flash-mla", "flashinfer-python", "flash-attn-3", "sglang", "sgl-kernel")


@dataclass(frozen=True)
class Options:
    """How to measure.

    device: "cpu", "cuda" or "cuda:1"
    sustained_rows: how many rows, evenly spaced, are sustained too
    arguments: of `etap bench`, without those that choose the output or single rows: what a row's command begins with
    commit: what to call the source tree; "": as git does
    """

    device: str
    peers: Sequence[str]
    rounds: Rounds
    sustained_rows: int
    arguments: Sequence[str]
    commit: str = ""


class Bench:
    """Work on a device. Raises Refused when the device can't be used."""

    def __init__(self, work: Work, options: Options) -> None:
        self.work, self.options = work, options
        self.command = shlex.join(["etap", "bench", *options.arguments])
        self.timer = usable_timer(options.device)
        self.run = Run(
            rows=[item.name for item in work.items],
            device=device_of(self.timer),
            peers=list(options.peers),
            warm_up=options.rounds.warm_up,
            rounds=options.rounds.rounds,
            sustain=options.rounds.sustain,
            sustained_rows=options.sustained_rows,
            software=software(),
            commit=options.commit or tree(),
            workload=work.workload,
            workload_digest=work.digest,
        )
        self.ceiling: Ceiling | None = None
        self.no_ceiling = ""  # why there is none
        try:
            self.ceiling = ceiling_of(self.timer.device)
        except Skip as why:
            self.no_ceiling = str(why)

    def begin(self, path: Path | None, fresh: bool = False) -> Results:
        """The results so far: those of the file, when it is of the same run, else none. Raises Refused when it is of another run and
        `fresh` does not allow to replace it, when it is none of ours, and where it can't be written."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        new = Results(run=self.run, command=self.command, started=started, all_steps=self.work.all_steps)
        if path is None:
            return new
        try:
            check_writable(path)
        except OSError as failure:
            raise Refused(cant_write(failure)) from failure
        if not path.exists():
            return new
        if fresh:
            if not results.is_own(files.read(path)):
                raise Refused(
                    f"output is {path}, which `etap bench` did not write; allowed with --fresh: files that it wrote, to replace them"
                )
            return new
        old = results.read(path)
        if old.run != self.run:
            differ = [name for name in Run.__struct_fields__ if getattr(old.run, name) != getattr(self.run, name)]
            raise Refused(
                f"{path} holds results of another run ({', '.join(differ)} differ); choose another --output, or --fresh to replace it"
            )
        return old

    def fill(self, path: Path | None, done: Results, progress: Callable[[Row], None]) -> None:
        """Measures what `done` lacks, and writes it to `path` after every row. What was written stays when a row fails, the disk is full or
        the user interrupts."""
        order = {name: place for place, name in enumerate(self.run.rows)}
        have = {row.name for row in done.rows}
        for row in self.measure([item for item in self.work.items if item.name not in have]):
            written = list(done.rows)
            done.rows = sorted([*written, row], key=lambda row: order[row.name])
            try:
                if path is not None:
                    results.write(path, done)
            except BaseException:
                done.rows = written  # what the file holds
                raise
            progress(row)

    def measure(self, items: Sequence[Item]) -> Iterator[Row]:
        """Their rows. Those of one KV format come after one another, for they share the memory of its pages."""
        torch.manual_seed(self.work.seed)
        alike: dict[tuple[str, int, int], list[Item]] = {}
        for item in items:
            alike.setdefault((item.shape.kv_format, item.shape.d_latent, item.shape.d_rope), []).append(item)
        sustained = _spaced(self.options.sustained_rows, [item.name for item in self.work.items])
        for layout, members in alike.items():
            pools = {item.name: self.pools_of(item) for item in members}
            tokens = max(inputs.arena_tokens(item.shape, pools[item.name]) for item in members)
            arena = inputs.Arena(*layout, tokens, self.timer.device)
            for item in members:
                tensors = inputs.Inputs(item.shape, arena, pools[item.name])
                rounds = self.options.rounds
                if item.name not in sustained:
                    rounds = dataclasses.replace(rounds, sustain=0.0)
                measured = measure(tensors, self.timer, ceiling=self.ceiling, peer_names=self.options.peers, rounds=rounds)
                if self.no_ceiling:
                    measured.skipped["ceiling"] = self.no_ceiling
                yield self._row(item, measured)
            del arena

    def pools_of(self, item: Item) -> int:
        """Pools of pages that keep a row's calls out of the device's cache."""
        device = self.run.device
        return inputs.pools_of(item.shape, min(device.cache_bytes, _HOST_CACHE) if device.kind == "cpu" else device.cache_bytes)

    def _row(self, item: Item, measured: Measurement) -> Row:
        wrong = {}
        for name in measured.wrong:
            wrong[name] = f"a row of its result is off by {measured.worst_row_error[name]:.2g} of its norm"
            measured.without(name)
        only = f"--step {item.step.index}" if item.step else f"--filter {shlex.quote(f'^{item.name}$')}"
        return Row(
            name=item.name,
            shape=_stored(item.shape),
            distinct_kv_bytes=item.shape.distinct_kv_bytes,
            measured=measured,
            wrong=wrong,
            command=f"{self.command} {only}",
            step=item.step,
        )


def _stored(shape: Shape) -> Shape:
    return dataclasses.replace(shape, shared=())


def _spaced(count: int, among: Sequence[str]) -> set[str]:
    """`count` of them, evenly spaced, the ends left out; all of them where there are no more."""
    if count >= len(among):
        return set(among)
    return {among[(2 * i + 1) * len(among) // (2 * count)] for i in range(count)}


def usable_timer(device: str) -> Timer:
    """The timer of "cpu", "cuda" or "cuda:1", which becomes the current device. Raises Refused when it can't be used."""
    if device != "cpu":
        check_device(device)
        index = device.partition(":")[2]
        try:
            info = etap.device_info("cuda", int(index or 0))
        except etap.EtapError as error:  # no such index
            raise Refused(f"device is {device!r}, which can't be used: {error}") from error
        if not info.usable:
            raise Refused(f"device is {device!r}, which can't be used: {info.reason}")
        if not torch.cuda.is_available():
            raise Refused(f"device is {device!r}, but this PyTorch ({torch.__version__}) sees no CUDA device")
        device = f"cuda:{index or 0}"
        torch.cuda.set_device(device)
    return timer_of(device)


def device_of(timer: Timer) -> Device:
    kind: Literal["cpu", "cuda"] = "cuda" if isinstance(timer, CudaTimer) else "cpu"
    info = etap.device_info(kind, torch.device(timer.device).index or 0)
    nvml = timer.nvml if isinstance(timer, CudaTimer) else None
    return Device(
        kind=kind,
        name=info.name,
        num_sms=info.num_sms,
        cache_bytes=info.l2_bytes,
        processor=_processor() if kind == "cpu" else "",
        driver=nvml.driver() if nvml else "",
        power_limit_w=nvml.power_limit() if nvml else None,
    )


def _processor() -> str:
    """As Linux calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def software() -> dict[str, str]:
    versions = {
        "etap": etap.__version__,
        "libetap.so": f"sha256 {hashlib.sha256(etap.library_path().read_bytes()).hexdigest()[:16]}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in _PEER_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def tree() -> str:
    """The commit of the source tree that this is run from, marked where it has changes; "": it is installed, or there is no git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return described.stdout.strip()
