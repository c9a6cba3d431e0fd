"""Request traces: the public formats and one of our own, told apart by their column names.

| format | columns |
|---|---|
| ours, JSONL | arrival (s), prompt_tokens, answer_tokens; optional: prefix_id, prefix_tokens, speculative_tokens |
| Bailian (Qwen), JSONL (https://github.com/alibaba-edu/qwen-bailian-usagetraces-anon) | Mooncake's and chat_id; in s, blocks of 16 |
| Mooncake, JSONL (https://github.com/kvcache-ai/Mooncake) | timestamp (ms), input_length, output_length, hash_ids (blocks of 512 tokens) |
| Azure LLM inference, CSV (https://github.com/Azure/AzurePublicDataset) | TIMESTAMP (a date), ContextTokens, GeneratedTokens |
| BurstGPT, CSV (https://github.com/HPMLL/BurstGPT) | Timestamp (s), Request tokens, Response tokens |

Files are UTF-8, UTF-16 with a byte order mark or Latin-1, and may be compressed with gzip.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
from etap_py import files
from msgspec import Meta, Struct

from etap_bench.errors import Refused
from etap_bench.shape import Block

Count = Annotated[int, Meta(ge=0)]
PositiveCount = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
DraftTokens = Annotated[int, Meta(ge=0, le=32766)]  # one less than the query tokens that etap.h allows

STANDARD_INPUT = "-"
TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


class Request(Struct, frozen=True):
    """One request.

    arrival: seconds from the trace's first
    blocks: the blocks of KV cache that the prompt begins with and that other requests may share
    speculative_tokens: draft tokens verified in each step
    """

    arrival: float
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[Block, ...] = ()
    speculative_tokens: int = 0


@dataclass(frozen=True)
class Units:
    """What a trace counts in, where it is not what its format says.

    time: one of TIME_UNITS; "": the format's
    block_tokens: tokens of a block that hash_ids names; 0: the format's
    """

    time: str = ""
    block_tokens: int = 0


@dataclass(frozen=True)
class Trace:
    """What was read.

    requests: in order of arrival, the first at 0 s
    format: its name, and its units where they are not plain
    left_out: why requests were left out, and how many
    digest: SHA-256 of the file
    part: which of the file's requests they are, where not all as they came
    """

    requests: list[Request]
    format: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    digest: str = ""
    part: str = ""

    @property
    def note(self) -> str:
        """What a person should know of the reading."""
        span = self.requests[-1].arrival
        part = f"; {self.part}" if self.part else ""
        left_out = "".join(f"; left out: {count:,} {why}" for why, count in self.left_out.items())
        return f"{self.format}, {len(self.requests):,} request{'s' * (len(self.requests) != 1)} in {span:,.1f} s{part}{left_out}"

    def taken(self, skip: int = 0, limit: int = 0, time_scale: float = 1.0) -> Trace:
        """At most `limit` requests (0: all) after the first `skip`, whose arrivals begin at 0 s again and are multiplied by time_scale.
        Raises Refused where none is left."""
        count = len(self.requests)
        requests = self.requests[skip : skip + limit if limit else count]
        if not requests:
            raise Refused(f"trace_skip is {skip}; allowed: 0 to {count - 1}, for the trace has {count} requests with an answer")
        first = requests[0].arrival
        requests = [msgspec.structs.replace(request, arrival=(request.arrival - first) * time_scale) for request in requests]
        parts = [f"taken: {skip + 1:,} to {skip + len(requests):,} of {count:,}"] if len(requests) < count else []
        parts += [f"times multiplied by {time_scale:g}"] if time_scale != 1 else []
        return replace(self, requests=requests, part=", ".join(parts))


class _Line(Struct):
    """A line of a trace.

    fields: which tell the format from those that are tried after it; time_unit: the format's own, "" for dates
    """

    title: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]
    time_unit: ClassVar[str] = "s"

    def counts(self) -> tuple[int | None, int | None]:
        """Tokens of prompt and answer; None, as 0, where there are none: the request failed."""
        raise NotImplementedError

    def time(self) -> float:
        """In `time_unit`; of dates, seconds."""
        raise NotImplementedError


class _Ours(_Line, forbid_unknown_fields=True):
    title = "our format"
    fields = ("arrival",)
    arrival: Seconds
    prompt_tokens: Count
    answer_tokens: Count
    prefix_id: str = ""
    prefix_tokens: Count = 0
    speculative_tokens: DraftTokens = 0

    def counts(self) -> tuple[int | None, int | None]:
        return self.prompt_tokens, self.answer_tokens

    def time(self) -> float:
        return self.arrival

    def blocks(self) -> tuple[Block, ...]:
        if self.prefix_tokens > self.prompt_tokens:
            raise ValueError(f"prefix_tokens is {self.prefix_tokens}; allowed: 0 to {self.prompt_tokens}, the prompt_tokens")
        return ((self.prefix_id, self.prefix_tokens),) if self.prefix_tokens else ()


class _Hashed(_Line):
    """Prompts as blocks with names. block_tokens: the format's own"""

    block_tokens: ClassVar[int]
    timestamp: Seconds
    input_length: Count | None
    output_length: Count | None
    hash_ids: list[int] = []

    def counts(self) -> tuple[int | None, int | None]:
        return self.input_length, self.output_length

    def time(self) -> float:
        return self.timestamp


class _Bailian(_Hashed):
    title = "Bailian"
    fields = ("chat_id", "timestamp")
    block_tokens = 16


class _Mooncake(_Hashed):
    title = "Mooncake"
    fields = ("timestamp",)
    time_unit = "ms"
    block_tokens = 512

    def check(self, units: Units) -> None:
        """Other traces have Mooncake's field names and other units, which would go unnoticed."""
        if not units.time and self.timestamp % 1:
            raise ValueError(
                f"timestamp is {self.timestamp:g}, and Mooncake's are whole milliseconds; say what these are with "
                "--set trace_time_unit=s (or ms, us, ns)"
            )
        blocks, tokens = len(self.hash_ids), self.input_length
        if not units.block_tokens and tokens and blocks > -(-tokens // self.block_tokens):
            raise ValueError(
                f"hash_ids has {blocks} entries for {tokens} tokens, and Mooncake's blocks have {self.block_tokens}; say how many "
                "these have with --set trace_block_tokens=16 (or another number)"
            )


class _Azure(_Line):
    title = "Azure LLM inference"
    fields = ("TIMESTAMP",)
    time_unit = ""  # dates
    timestamp: str = msgspec.field(name="TIMESTAMP")
    prompt: Count | None = msgspec.field(name="ContextTokens")
    answer: Count | None = msgspec.field(name="GeneratedTokens")

    def counts(self) -> tuple[int | None, int | None]:
        return self.prompt, self.answer

    def time(self) -> float:
        moment = datetime.fromisoformat(self.timestamp)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.timestamp()


class _BurstGpt(_Line):
    title = "BurstGPT"
    fields = ("Timestamp",)
    timestamp: Seconds = msgspec.field(name="Timestamp")
    prompt: Count | None = msgspec.field(name="Request tokens")
    answer: Count | None = msgspec.field(name="Response tokens")

    def counts(self) -> tuple[int | None, int | None]:
        return self.prompt, self.answer

    def time(self) -> float:
        return self.timestamp


class _Chain:
    """Names of blocks such that equal names mean equal prefixes. A trace may name a block by its own content (Bailian's do): the first
    block that has a name keeps it, and one that follows another prefix gets another."""

    def __init__(self) -> None:
        self._before: dict[Hashable, Hashable] = {}

    def names(self, ids: Sequence[int]) -> Iterator[Hashable]:
        before: Hashable = None
        for name in ids:
            before = name if self._before.setdefault(name, before) == before else f"{hash((before, name)):x}"
            yield before


_JSON_FORMATS: tuple[type[_Line], ...] = (_Ours, _Bailian, _Mooncake)
_CSV_FORMATS: tuple[type[_Line], ...] = (_Azure, _BurstGpt)
SUFFIXES = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")
_MARKS = {  # the longer one first of two that begin alike
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")


def is_trace(source: str) -> bool:
    """A name that `load_trace` takes."""
    return source == STANDARD_INPUT or source.lower().endswith(SUFFIXES)


def load_trace(source: str, units: Units = Units()) -> Trace:
    """The trace in a file, or on standard input ("-"). Requests without prompt or answer tokens, which failed and never decode, are
    counted and left out.

    Raises Refused, naming the line, for one that does not have its format's fields or has impossible values; OSError when the file
    can't be read.
    """
    if not is_trace(source):
        allowed = ".jsonl or .csv, both also with .gz, and - for standard input"
        raise Refused(f"trace {source} ends in {Path(source).suffix!r}; allowed: {allowed}")
    name = "from standard input" if source == STANDARD_INPUT else source
    data = _standard_input() if source == STANDARD_INPUT else files.read(Path(source))
    if not data.strip():
        raise Refused(f"trace {name} is empty; allowed: one request or more")
    text = decoded(data, f"trace {name}")
    as_csv = not text.lstrip().startswith("{") if source == STANDARD_INPUT else source.lower().removesuffix(".gz").endswith(".csv")
    chain, left_out, requests = _Chain(), Counter[str](), []
    line_type: type[_Line] | None = None
    for number, shown, line in _csv_lines(name, text) if as_csv else _json_lines(name, text):
        try:
            line_type = type(line)
            prompt, answer = line.counts()
            if not prompt or not answer:
                left_out["without prompt tokens" if not prompt else "without answer tokens"] += 1
                continue
            blocks: tuple[Block, ...] = ()
            speculative_tokens = 0
            if isinstance(line, _Hashed):  # a last, incomplete block is not shared
                size = units.block_tokens or line.block_tokens
                blocks = tuple((block, size) for block in chain.names(line.hash_ids[: prompt // size]))
            elif isinstance(line, _Ours):
                blocks, speculative_tokens = line.blocks(), line.speculative_tokens
            requests.append(Request(_seconds(line, units), prompt, answer, blocks, speculative_tokens))
        except ValueError as error:
            raise _bad_line(name, number, shown, error) from error
    if not requests or line_type is None:
        counted = "".join(f" ({count:,} are {why})" for why, count in left_out.items())
        raise Refused(f"trace {name} holds no request with an answer{counted}; allowed: one or more")
    requests.sort(key=lambda request: request.arrival)
    first = requests[0].arrival
    requests = [msgspec.structs.replace(request, arrival=request.arrival - first) for request in requests]
    return Trace(requests, _title(line_type, units), dict(left_out), hashlib.sha256(data).hexdigest())


def _title(line_type: type[_Line], units: Units) -> str:
    """The format and its units, where another one has the same fields."""
    if not issubclass(line_type, _Hashed):
        return line_type.title
    return (
        f"{line_type.title} (times in {units.time or line_type.time_unit}, blocks of {units.block_tokens or line_type.block_tokens} tokens)"
    )


def _seconds(line: _Line, units: Units) -> float:
    if units.time and not line.time_unit:
        raise ValueError(f"trace_time_unit is {units.time!r}, but this format's times are dates")
    if units.block_tokens and not isinstance(line, _Hashed):
        raise ValueError(f"trace_block_tokens is {units.block_tokens}, but this format's prompts are not in blocks")
    if isinstance(line, _Mooncake):
        line.check(units)
    seconds = line.time() * (TIME_UNITS[units.time or line.time_unit] if line.time_unit else 1.0)
    if not math.isfinite(seconds):
        raise ValueError(f"the time is {seconds}; allowed: finite numbers")
    return seconds


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise Refused("the trace is to come from standard input, which is closed")
    return sys.stdin.buffer.read()


def decoded(data: bytes, name: str) -> str:
    """The text of a file that people wrote with whatever they have. Raises Refused, calling it `name`, for one that is no text."""
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise Refused(f"{name} is compressed and damaged: {error}") from error
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise Refused(f"{name} is damaged: {error}") from error
        text = data.decode("latin-1")  # every byte is a letter of it
    if _CONTROL.search(text):
        allowed = "UTF-8, UTF-16 with a byte order mark, Latin-1, all also with gzip"
        raise Refused(f"{name} is no text, but binary; allowed: {allowed}")
    return text


def _json_lines(name: str, text: str) -> Iterator[tuple[int, str, _Line]]:
    line_type: Any = None
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            if line_type is None:
                line_type = _format_of(name, msgspec.json.decode(line, type=dict[str, Any]), _JSON_FORMATS)
            yield number, line, msgspec.json.decode(line, type=line_type, strict=False)
        except (msgspec.DecodeError, RecursionError) as error:
            raise _bad_line(name, number, line, error) from error


def _csv_lines(name: str, text: str) -> Iterator[tuple[int, str, _Line]]:
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        header = [column.strip() for column in next(reader, [])]
        line_type = _format_of(name, header, _CSV_FORMATS)
        for cells in reader:
            if not any(cells):
                continue
            row = {column: cell.strip() or None for column, cell in zip(header, cells, strict=False)}
            try:
                if len(cells) > len(header):
                    raise ValueError(f"it has {len(cells)} values for {len(header)} columns")
                yield reader.line_num, ",".join(cells), msgspec.convert(row, type=line_type, strict=False)
            except ValueError as error:  # ValidationError among them
                raise _bad_line(name, reader.line_num, ",".join(cells), error) from error
    except csv.Error as error:
        raise Refused(f"trace {name} is no CSV: {error}") from error


def _format_of(trace: str, names: Any, formats: tuple[type[_Line], ...]) -> Any:
    for line_type in formats:
        if all(field in names for field in line_type.fields):
            return line_type
    if any("git-lfs" in str(name) for name in names):
        raise Refused(f"trace {trace} is a pointer of Git LFS, not the file itself: git lfs pull brings it")
    known = " or ".join(dict.fromkeys(repr(line_type.fields[-1]) for line_type in formats))
    fields = _printable(", ".join(names)) or "(none)"
    raise Refused(f"trace {trace} has the fields {fields}; allowed: a format with {known} (docs/bench.md lists them)")


def _bad_line(name: str, number: int, line: str, error: Exception) -> Refused:
    why = str(error) or "it is nested too deeply"
    why = why if why[:2].isupper() else f"{why[:1].lower()}{why[1:]}"  # "JSON is malformed"
    return Refused(f"line {number} of trace {name} can't be used ({_printable(line.strip())}): {_printable(why, 300)}")


def _printable(text: str, most: int = 120) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:most])
