"""Request traces: the public formats and one of our own, told apart by their column names.

| format | columns |
|---|---|
| ours, JSONL | arrival (s), prompt_tokens, answer_tokens; optional: prefix_id, prefix_tokens, speculative_tokens |
| Mooncake, JSONL (https://github.com/kvcache-ai/Mooncake) | timestamp (ms), input_length, output_length, hash_ids (blocks of 512 tokens) |
| Azure LLM inference, CSV (https://github.com/Azure/AzurePublicDataset) | TIMESTAMP (a date), ContextTokens, GeneratedTokens |
| BurstGPT, CSV (https://github.com/HPMLL/BurstGPT) | Timestamp (s), Request tokens, Response tokens |
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta, Struct, field

from etap_py.bench.blocks import Block
from etap_py.bench.errors import Refused

Count = Annotated[int, Meta(ge=0)]
PositiveCount = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]

_MOONCAKE_BLOCK = 512


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


class _Ours(Struct, forbid_unknown_fields=True):
    key: ClassVar[str] = "arrival"
    arrival: Seconds
    prompt_tokens: PositiveCount
    answer_tokens: Count
    prefix_id: str = ""
    prefix_tokens: Count = 0
    speculative_tokens: Count = 0

    def request(self) -> Request:
        if self.prefix_tokens > self.prompt_tokens:
            raise ValueError(f"prefix_tokens is {self.prefix_tokens}; allowed: 0 to {self.prompt_tokens}, the prompt_tokens")
        blocks = ((self.prefix_id, self.prefix_tokens),) if self.prefix_tokens else ()
        return Request(self.arrival, self.prompt_tokens, self.answer_tokens, blocks, self.speculative_tokens)


class _Mooncake(Struct):
    key: ClassVar[str] = "timestamp"
    timestamp: Seconds  # milliseconds
    input_length: PositiveCount
    output_length: Count
    hash_ids: list[int] = []

    def request(self) -> Request:
        whole = self.hash_ids[: self.input_length // _MOONCAKE_BLOCK]
        blocks = tuple((block, _MOONCAKE_BLOCK) for block in whole)
        return Request(self.timestamp / 1e3, self.input_length, self.output_length, blocks)


class _Azure(Struct):
    key: ClassVar[str] = "TIMESTAMP"
    timestamp: str = field(name="TIMESTAMP")
    prompt: PositiveCount = field(name="ContextTokens")
    answer: Count = field(name="GeneratedTokens")

    def request(self) -> Request:
        moment = datetime.fromisoformat(self.timestamp)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return Request(moment.timestamp(), self.prompt, self.answer)


class _BurstGpt(Struct):
    key: ClassVar[str] = "Timestamp"
    timestamp: Seconds = field(name="Timestamp")
    prompt: PositiveCount = field(name="Request tokens")
    answer: Count = field(name="Response tokens")

    def request(self) -> Request:
        return Request(self.timestamp, self.prompt, self.answer)


_JSON_FORMATS = (_Ours, _Mooncake)
_CSV_FORMATS = (_Azure, _BurstGpt)
SUFFIXES = (".jsonl", ".csv")


def read_trace(path: Path) -> list[Request]:
    """The requests in order of arrival, the first at 0 s. Requests with an empty answer, which never decode, are left out.

    Raises Refused, naming the line, for one that does not have its format's fields or has impossible values; OSError when the file
    can't be read.
    """
    if path.suffix not in SUFFIXES:
        raise Refused(f"trace {path} ends in {path.suffix!r}; allowed: {' or '.join(SUFFIXES)}")
    requests = list(_csv_requests(path) if path.suffix == ".csv" else _json_requests(path))
    requests = sorted((r for r in requests if r.answer_tokens), key=lambda r: r.arrival)
    if not requests:
        raise Refused(f"trace {path} holds no request with an answer; allowed: one or more")
    first = requests[0].arrival
    return [msgspec.structs.replace(request, arrival=request.arrival - first) for request in requests]


def _json_requests(path: Path) -> Iterator[Request]:
    line_type: Any = None
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                if line_type is None:
                    line_type = _format_of(path, msgspec.json.decode(line, type=dict[str, Any]), _JSON_FORMATS)
                yield msgspec.json.decode(line, type=line_type).request()
            except (msgspec.DecodeError, ValueError) as error:
                raise _bad_line(path, number, line, error) from error


def _csv_requests(path: Path) -> Iterator[Request]:
    with path.open(newline="") as lines:
        reader = csv.DictReader(lines)
        line_type = _format_of(path, reader.fieldnames or (), _CSV_FORMATS)
        for row in reader:
            try:
                yield msgspec.convert(row, type=line_type, strict=False).request()
            except (msgspec.ValidationError, ValueError) as error:
                raise _bad_line(path, reader.line_num, ",".join(map(str, row.values())), error) from error


def _format_of(path: Path, names: Any, formats: tuple[Any, ...]) -> Any:
    for line_type in formats:
        if line_type.key in names:
            return line_type
    known = " or ".join(repr(line_type.key) for line_type in formats)
    raise Refused(f"trace {path} has the fields {', '.join(names) or '(none)'}; allowed: a format with {known} (docs/bench.md lists them)")


def _bad_line(path: Path, number: int, line: str, error: Exception) -> Refused:
    return Refused(f"line {number} of trace {path} can't be used ({line.strip()[:120]}): {str(error)[:1].lower()}{str(error)[1:]}")
