"""Workload files: a model, a server, a scheduler, and requests, drawn from distributions or read from a trace."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from etap_py import files
from msgspec import Meta, Struct

from etap_bench import presets
from etap_bench.errors import Refused
from etap_bench.shape import check_layer
from etap_bench.traces import (
    STANDARD_INPUT,
    TIME_UNITS,
    Count,
    PositiveCount,
    Request,
    Seconds,
    Trace,
    Units,
    decoded,
    is_trace,
    load_trace,
)

Fraction = Annotated[float, Meta(ge=0, le=1)]


class Lengths(Struct, forbid_unknown_fields=True):
    """Token counts: log-normal around the median, cut off at both ends. spread 0: always the median."""

    median: PositiveCount
    spread: Annotated[float, Meta(ge=0)] = 0.0  # standard deviation of the logarithm
    least: PositiveCount = 1
    most: PositiveCount = 2**20

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError(f"least is {self.least}; allowed: 1 to {self.most}, the most")

    def draw(self, rng: np.random.Generator) -> int:
        grown = self.spread * rng.standard_normal()  # of the logarithm
        if grown >= math.log(self.most / self.median):
            return max(self.most, self.least)
        return max(round(self.median * float(np.exp(grown))), self.least)


class RequestClass(Struct, forbid_unknown_fields=True):
    """Requests of one kind.

    rate: arrivals a second, a Poisson process that begins at `start`; 0: all arrive at `start`
    prefix_tokens: tokens at the beginning of the prompt that requests with the same prefix share
    prefixes: how many different prefixes there are
    speculative_tokens: draft tokens verified in each step
    """

    count: PositiveCount
    prompt: Lengths
    answer: Lengths
    name: str = "requests"
    start: Seconds = 0.0
    rate: Annotated[float, Meta(ge=0)] = 0.0
    prefix_tokens: Count = 0
    prefixes: PositiveCount = 1
    speculative_tokens: Count = 0

    def draw(self, rng: np.random.Generator) -> Iterator[Request]:
        arrival = self.start
        for _ in range(self.count):
            arrival += float(rng.exponential(1 / self.rate)) if self.rate else 0.0
            prompt = self.prefix_tokens + self.prompt.draw(rng)
            blocks = ((f"{self.name} {rng.integers(self.prefixes)}", self.prefix_tokens),) if self.prefix_tokens else ()
            yield Request(arrival, prompt, self.answer.draw(rng), blocks, self.speculative_tokens)


class Model(Struct, forbid_unknown_fields=True):
    """What attention a layer does on this device. Defaults: DeepSeek-V3 on eight devices with tensor parallelism.

    layers: those with MLA
    topk: KV tokens that each query token attends to; 0: all. What the kernel is given is then the indexer's choice: every query token is a
        sequence of its own, with a list of topk slots anywhere in the pool, none of them in two lists. Indexer and selection are not part
        of the kernel, nor of its time.
    shared_prefixes: ETAP reads the pages with which requests begin once for several of them, where their query rows fit one tile: heads
        times query tokens, so no more than 64 for two. Peers read them for each
    """

    heads: Annotated[int, Meta(ge=1, le=128)] = 16
    layers: PositiveCount = 61
    kv_format: str = "bf16"
    page_size: PositiveCount = 64
    d_latent: PositiveCount = 512
    d_rope: Count = 64
    topk: Count = 0
    shared_prefixes: bool = False

    def __post_init__(self) -> None:
        check_layer(self.kv_format, self.page_size, self.d_latent, self.d_rope)


class Server(Struct, forbid_unknown_fields=True):
    """The cards that serve one copy of the model, counted as SGLang does.

    tp: all of them (--tp)
    dp: attention groups among them (--dp). The workload's requests are the whole server's, of which a group gets every dp-th; what is
        measured is one card of one group, so `model.heads` is what it holds, and `scheduler` describes its group.
    preset: the model whose heads, layers and widths `model` has, by its name in presets.py; "": they are given there
    """

    tp: PositiveCount = 1
    dp: PositiveCount = 1
    preset: str = ""

    def __post_init__(self) -> None:
        if self.tp % self.dp:
            raise ValueError(f"dp is {self.dp}; allowed: divisors of tp, which is {self.tp}")

    @property
    def cards(self) -> int:
        """Of an attention group."""
        return self.tp // self.dp


class Scheduler(Struct, forbid_unknown_fields=True):
    """How requests become decode steps (scheduler.py), in one attention group.

    max_batch: requests that it decodes at a time
    kv_tokens: what the KV cache of each of its devices holds, which is the same on all
    step_ms: time of one decode step of the whole model, which decides how many requests meet
    acceptance: share of the draft tokens that are accepted
    """

    max_batch: PositiveCount = 128
    kv_tokens: PositiveCount = 1 << 20
    step_ms: Annotated[float, Meta(gt=0, le=1e9)] = 25.0
    acceptance: Fraction = 0.7


class Workload(Struct, forbid_unknown_fields=True):
    """A workload file. `requests` or `trace` (a path, relative to the file) is given; `steps` of the decode steps are measured.

    trace_time_unit: "s", "ms", "us" or "ns" where the trace's times are not in its format's unit
    trace_block_tokens: tokens of a block of hash_ids where they are not its format's
    trace_skip, trace_limit: requests to leave out, and then to take (0: all); trace_time_scale: what arrivals are multiplied by
    """

    name: str = ""
    description: str = ""
    seed: Count = 0
    steps: PositiveCount = 48
    trace: str = ""
    trace_time_unit: str = ""
    trace_block_tokens: Count = 0
    trace_skip: Count = 0
    trace_limit: Count = 0
    trace_time_scale: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    shrink: PositiveCount = 1  # divides every length, the batch and the cache: to try things out on a small machine
    model: Model = msgspec.field(default_factory=Model)
    server: Server = msgspec.field(default_factory=Server)
    scheduler: Scheduler = msgspec.field(default_factory=Scheduler)
    requests: list[RequestClass] = []

    def __post_init__(self) -> None:
        if self.trace_time_unit and self.trace_time_unit not in TIME_UNITS:
            raise ValueError(f"trace_time_unit is {self.trace_time_unit!r}; allowed: {', '.join(TIME_UNITS)}")

    def read(self) -> Trace:
        """The requests of the whole server in order of arrival, before `shrink`: those taken from the trace, or drawn ones. A trace that
        comes from standard input can be read once."""
        if self.trace:
            trace = load_trace(self.trace, Units(self.trace_time_unit, self.trace_block_tokens))
            return trace.taken(self.trace_skip, self.trace_limit, self.trace_time_scale)
        rng = np.random.default_rng(self.seed)
        drawn = [request for kind in self.requests for request in kind.draw(rng)]
        return Trace(sorted(drawn, key=lambda request: request.arrival))

    def all_requests(self) -> list[Request]:
        """Those of `read`."""
        return self.read().requests

    @property
    def served(self) -> str:
        """Model and cards in words: "kimi-k2, tp 16, dp 16, 64 heads a card"."""
        server = self.server
        cards = f"tp {server.tp}, dp {server.dp}" if server.preset or server.tp > 1 else ""
        return ", ".join(part for part in (server.preset, cards, f"{self.model.heads} heads a card") if part)

    @property
    def note(self) -> str:
        """What a person should know of what is measured and what is not; "": nothing."""
        notes = []
        if self.server.dp > 1:
            notes.append(f"one of {self.server.dp} attention groups, which gets one request in {self.server.dp}")
        if self.model.topk:
            notes.append(f"each query token attends to {self.model.topk:,} tokens, whose choice by the indexer is not in the time")
        return "; ".join(notes)


def shipped() -> list[str]:
    """Names of the workloads that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _shipped_folder().iterdir() if entry.name.endswith(".toml"))


def load(source: str, settings: Sequence[str] = ()) -> Workload:
    """source: the name of a shipped workload, a workload file (.toml) or a trace (.jsonl, .csv, both also with .gz; "-": standard input).

    settings: "scheduler.max_batch=64", dotted names of this module's fields with TOML values, over those of the source. A preset that
    they name replaces what the source says of the same fields of the model; a file that names one may say otherwise. Raises Refused for
    what is unknown or has an impossible value, OSError when a file can't be read.
    """
    path = Path(source)
    folder = Path()
    if is_trace(source):
        stem = "standard-input" if source == STANDARD_INPUT else path.name.removesuffix(".gz").rpartition(".")[0]
        values: dict[str, Any] = {"name": stem, "trace": source}
    elif path.suffix == ".toml":
        values, folder = _parse(decoded(files.read(path), f"workload {source}"), source), path.parent
        values.setdefault("name", path.stem)
    elif source in shipped():
        values = _parse(_shipped_folder().joinpath(f"{source}.toml").read_text(encoding="utf-8"), source)
        values.setdefault("name", source)
    else:
        raise Refused(
            f"workload is {source!r}; allowed: {', '.join(shipped())}, a workload file (.toml) or a trace "
            "(.jsonl, .csv, both also with .gz, or - for standard input)"
        )
    of_server = [setting for setting in settings if setting.startswith("server.")]
    named = _table(values, "server").get("preset")
    for setting in of_server:
        _apply(values, setting)
    try:
        server = msgspec.convert(_table(values, "server"), Server)
        if server.preset:
            fields, model = presets.load(server.preset).of_card(server.cards), _table(values, "model")
            values["model"] = fields | model if server.preset == named else model | fields
        elif of_server:
            raise Refused(f"setting is {of_server[0]!r} without a model; allowed: with one (--model), whose heads the cards share")
        for setting in settings:
            _apply(values, setting)
        workload = msgspec.convert(values, Workload)
    except msgspec.ValidationError as error:
        raise Refused(f"workload {source}: {error}") from error
    if bool(workload.trace) == bool(workload.requests):
        raise Refused(f"workload {source} has {'both' if workload.trace else 'neither'} requests and a trace; allowed: one of them")
    if workload.server.preset:
        workload.server.preset = presets.name_of(workload.server.preset)
    of_trace = [name for name in values if name.startswith("trace_")]
    if of_trace and not workload.trace:
        raise Refused(f"{of_trace[0]} is {values[of_trace[0]]} for workload {source}, whose requests are drawn; allowed: with a trace")
    if workload.trace and source != STANDARD_INPUT:
        workload.trace = str(folder / workload.trace)
    return workload


def _shipped_folder() -> Any:
    return resources.files("etap_bench") / "workloads"


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, and numbers or tables that Python does not take
        raise Refused(f"workload {source} is not TOML: {error}") from error


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    table = values.get(name, {})
    if not isinstance(table, dict):
        raise Refused(f"{name} is {table!r}; allowed: a table of fields")
    return table


def _apply(values: dict[str, Any], setting: str) -> None:
    matched = re.fullmatch(r"([\w.]+)=(.+)", setting)
    if not matched:
        raise Refused(f"setting is {setting!r}; allowed: NAME=VALUE, as in scheduler.max_batch=64")
    *tables, name = matched[1].split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise Refused(f"setting is {setting!r}, but {table} has no fields of its own")
    try:
        values[name] = tomllib.loads(f"value = {matched[2]}")["value"]
    except (ValueError, RecursionError):  # TOMLDecodeError among them
        values[name] = matched[2]  # a word without quotes
