"""Shapes by the list: those that are shipped, files of them, and sweeps."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from etap_py import files
from msgspec import Struct

from etap_bench.errors import Refused
from etap_bench.shape import Shape

MOST = 4096  # shapes of a sweep
_SWEPT = {"batch": 16, "context": 4096, "heads": 16, "query_len": 1, "page_size": 64, "num_sms": 0, "kv_format": "bf16"}


class ShapeList(Struct, forbid_unknown_fields=True):
    """A file of shapes.

    shapes: names, see Shape.parse
    lengths: of those whose names end in -ragged
    """

    shapes: list[str]
    description: str = ""
    lengths: dict[str, list[int]] = {}


def shipped() -> list[str]:
    """Names of the lists that come with the package."""
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def is_source(source: str) -> bool:
    """A shipped list, a TOML file of shapes, or a name that could be a shape's: what is no workload. Raises OSError."""
    if source in shipped():
        return True
    path = Path(source)
    if path.suffix == ".toml":
        try:
            return "shapes" in tomllib.loads(files.read(path).decode())
        except ValueError:  # no TOML, no text: whoever reads it as a workload says so
            return False
    return "-h" in source and not path.exists()


def load(source: str) -> list[Shape]:
    """The shapes of a shipped list or of a file, or the one of this name. Raises Refused."""
    try:
        if source in shipped():
            return _parsed(_folder().joinpath(f"{source}.toml").read_bytes())
        if Path(source).suffix == ".toml":
            return _parsed(files.read(Path(source)))
        return [Shape.parse(source)]
    except OSError as failure:
        raise Refused(f"{source} can't be read: {failure.strerror}") from failure
    except (msgspec.ValidationError, msgspec.DecodeError, ValueError) as error:
        raise Refused(f"{source}: {error}" if source.endswith(".toml") else str(error)) from error


def _parsed(text: bytes) -> list[Shape]:
    given = msgspec.toml.decode(text, type=ShapeList)
    if not given.shapes:
        raise ValueError("shapes is empty; allowed: one or more")
    if unused := [name for name in given.lengths if name not in given.shapes]:
        raise ValueError(f"lengths has {unused[0]!r}; allowed: the names in shapes")
    return [Shape.parse(name, tuple(given.lengths.get(name, ()))) for name in given.shapes]


def with_sms(shape: Shape, num_sms: int) -> Shape:
    return replace(shape, num_sms=num_sms)


def sweep(settings: Sequence[str]) -> list[Shape]:
    """Every combination: "heads=8,16,128", "batch=1..64" (doubling), "context=2K..64K", "kv_format=bf16,e4m3". Fields that are not named
    keep a default, DeepSeek-V3's on eight cards. Raises Refused."""
    values: dict[str, list[Any]] = {name: [value] for name, value in _SWEPT.items()}
    named = set[str]()
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in values:
            raise Refused(f"sweep has {setting!r}; allowed: NAME=VALUES with the names {', '.join(values)}")
        if name in named:
            raise Refused(f"sweep has {name} twice; allowed: once, with commas between its values")
        named.add(name)
        values[name] = [part for item in text.split(",") for part in _values(name, item)]
    combinations = list(itertools.islice(itertools.product(*values.values()), MOST + 1))
    if len(combinations) > MOST:
        raise Refused(f"sweep has more than {MOST} combinations; allowed: {MOST} and fewer")
    try:
        return [Shape.equal(**dict(zip(values, combination, strict=True))) for combination in combinations]
    except ValueError as error:
        raise Refused(f"sweep: {error}") from error


def _values(name: str, text: str) -> list[Any]:
    if name == "kv_format":
        return [text]
    first, dots, last = text.partition("..")
    begin = _number(name, first)
    if not dots:
        return [begin]
    end, found = _number(name, last), [begin]
    while 0 < found[-1] < end:
        found.append(2 * found[-1])
    if found[-1] != end:
        raise Refused(
            f"sweep has {text!r} for {name}; allowed: ranges that double from the first number to the last, like 1..64 and 3K..12K"
        )
    return found


def _number(name: str, text: str) -> int:
    digits = text.upper().removesuffix("K")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 10:
        raise Refused(f"sweep has {text!r} for {name}; allowed: numbers like 16 and 4K, and ranges that double, like 1..64")
    return int(digits) * (1024 if text.upper().endswith("K") else 1)


def _folder() -> Any:
    return resources.files("etap_bench") / "shapes"
