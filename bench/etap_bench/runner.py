"""The loop of `etap bench`: measures the steps that are not in the file yet, and writes the file after each."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import etap_py as etap
import torch
from etap_py.files import cant_write, check_writable

from etap_bench import results
from etap_bench.contenders import Ceiling, Skip, ceiling_of
from etap_bench.errors import Refused, check_device
from etap_bench.inputs import Arena, Inputs, Shape
from etap_bench.measure import measure
from etap_bench.measurement import Measurement
from etap_bench.results import Device, Results, Row, Run
from etap_bench.scheduler import Step, sample_steps
from etap_bench.timing import CudaTimer, Timer, timer_of
from etap_bench.workload import Workload

_HOST_CACHE = 64 << 20  # at most; a virtual machine is told its host's whole cache and has a part of it
_PEER_PACKAGES = ("flash-mla", "flashinfer-python", "flash-attn-3", "sglang", "sgl-kernel")


@dataclass(frozen=True)
class Options:
    """How to measure.

    device: "cpu", "cuda" or "cuda:1"
    energy: the number of steps, evenly spaced, whose energy is measured too
    arguments: of `etap bench`, without those that choose the output or single steps: what a row's command begins with
    """

    device: str
    peers: Sequence[str]
    rounds: int
    energy: int
    arguments: Sequence[str]


class Bench:
    """A workload on a device. Raises Refused when the workload or the device can't be used."""

    def __init__(self, workload: Workload, options: Options) -> None:
        self.workload, self.options = workload, options
        self.command = shlex.join(["etap", "bench", *options.arguments])
        trace = workload.read()
        self.note = trace.note if workload.trace else ""  # what a person should know of the trace
        self.steps, self.all_steps = sample_steps(workload, trace.requests)
        self.timer = usable_timer(options.device)
        self.run = Run(
            workload=workload,
            workload_digest=trace.digest,
            device=_device(self.timer),
            peers=list(options.peers),
            rounds=options.rounds,
            software=_software(),
        )
        self.ceiling: Ceiling | None = None
        self.no_ceiling = ""  # why there is none
        try:
            self.ceiling = ceiling_of(self.timer.device)
        except Skip as why:
            self.no_ceiling = str(why)

    def begin(self, path: Path, fresh: bool = False) -> Results:
        """The results so far: those of the file, when it is of the same run, else none. Raises Refused when it is of another run and
        `fresh` does not allow to replace it, and where it can't be written."""
        try:
            check_writable(path)
        except OSError as failure:
            raise Refused(cant_write(failure)) from failure
        started = datetime.now(UTC).isoformat(timespec="seconds")
        new = Results(run=self.run, command=self.command, started=started, steps=len(self.steps), all_steps=self.all_steps)
        if fresh or not path.exists():
            return new
        old = results.read(path)
        if old.run != self.run:
            differ = [name for name in Run.__struct_fields__ if getattr(old.run, name) != getattr(self.run, name)]
            raise Refused(
                f"{path} holds results of another run ({', '.join(differ)} differ); choose another --output, or --fresh to replace it"
            )
        return old

    def fill(self, path: Path, done: Results, progress: Callable[[Row], None]) -> None:
        """Measures what `done` lacks, and writes it to `path` after every step. What was written stays when a step fails, the disk is
        full or the user interrupts."""
        have = {row.index for row in done.rows}
        missing = [index for index in range(len(self.steps)) if index not in have]
        for row in self.measure(missing):
            written = list(done.rows)
            done.rows = sorted([*written, row], key=lambda row: row.index)
            try:
                results.write(path, done)
            except BaseException:
                done.rows = written  # what the file holds
                raise
            progress(row)

    def measure(self, indices: Sequence[int]) -> Iterator[Row]:
        """The rows of these steps, in turn."""
        shapes = {index: _shape(self.workload, self.steps[index]) for index in indices}
        if not shapes:
            return
        torch.manual_seed(self.workload.seed)
        device = self.run.device
        cache = min(device.cache_bytes, _HOST_CACHE) if device.kind == "cpu" else device.cache_bytes
        pools = {index: shape.pools(cache) for index, shape in shapes.items()}
        tokens = max(shape.arena_tokens(pools[index]) for index, shape in shapes.items())
        model = self.workload.model
        arena = Arena(model.kv_format, model.d_latent, model.d_rope, tokens, self.timer.device)
        with_energy = _spaced(self.options.energy, len(self.steps))
        for index, shape in shapes.items():
            measured = measure(
                Inputs(shape, arena, pools[index]),
                self.timer,
                ceiling=self.ceiling,
                peer_names=self.options.peers,
                rounds=self.options.rounds,
                energy=index in with_energy,
            )
            if self.no_ceiling:
                measured.skipped["ceiling"] = self.no_ceiling
            yield self._row(index, shape, measured)

    def _row(self, index: int, shape: Shape, measured: Measurement) -> Row:
        wrong = {}
        for name in measured.wrong:
            wrong[name] = f"a row of its result is off by {measured.worst_row_error[name]:.2g} of its norm"
            for by_name in (measured.us, measured.spread, measured.error, measured.worst_row_error, measured.millijoules):
                by_name.pop(name, None)
        step = self.steps[index]
        return Row(
            index=index,
            number=step.number,
            seconds=step.seconds,
            lengths=list(step.lengths),
            query_lens=list(step.query_lens),
            new_tokens=step.new_tokens,
            kv_bytes=shape.kv_bytes,
            distinct_kv_bytes=shape.distinct_kv_bytes,
            flop=shape.flop,
            measured=measured,
            wrong=wrong,
            command=f"{self.command} --step {index}",
        )


def _shape(workload: Workload, step: Step) -> Shape:
    model = workload.model
    return Shape(
        lengths=step.lengths,
        query_lens=step.query_lens,
        heads=model.heads,
        kv_format=model.kv_format,
        page_size=model.page_size,
        d_latent=model.d_latent,
        d_rope=model.d_rope,
        shared=step.shared,
    )


def _spaced(count: int, among: int) -> set[int]:
    """`count` numbers below `among`, evenly spaced, the ends left out."""
    return {(2 * i + 1) * among // (2 * count) for i in range(count)}


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


def _device(timer: Timer) -> Device:
    kind: Literal["cpu", "cuda"] = "cuda" if isinstance(timer, CudaTimer) else "cpu"
    info = etap.device_info(kind, torch.device(timer.device).index or 0)
    nvml = timer.nvml if isinstance(timer, CudaTimer) else None
    return Device(
        kind=kind,
        name=info.name,
        num_sms=info.num_sms,
        cache_bytes=info.l2_bytes,
        driver=nvml.driver() if nvml else "",
        power_limit_w=nvml.power_limit() if nvml else None,
    )


def _software() -> dict[str, str]:
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
