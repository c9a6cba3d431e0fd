"""Files with a schema: read into a msgspec Struct, or refused in one sentence."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeVar

import msgspec
from etap_py.files import read as read_bytes

Schema = TypeVar("Schema", bound=msgspec.Struct)


class FileError(ValueError):
    """A file that can't be read as what it should be; the message names it and says why."""


def read(file: Path | Traversable, schema: type[Schema]) -> Schema:
    """The content of a .toml or .json file. Raises FileError when there is no such file or it does not fit the schema."""
    try:
        text = read_bytes(file) if isinstance(file, Path) else file.read_bytes()
        return msgspec.toml.decode(text, type=schema) if file.name.endswith(".toml") else msgspec.json.decode(text, type=schema)
    except OSError as failure:
        raise FileError(f"{file} can't be read: {failure.strerror}") from failure
    except (msgspec.DecodeError, UnicodeDecodeError) as failure:
        raise FileError(f"{file} is no {schema.__name__.lower()} file: {failure}") from failure


def packaged(folder: str, suffix: str) -> dict[str, Traversable]:
    """The files of a folder of this package, by name without suffix, in alphabetical order."""
    files = (resources.files(__package__) / folder).iterdir()
    return {file.name.removesuffix(suffix): file for file in sorted(files, key=lambda file: file.name) if file.name.endswith(suffix)}
