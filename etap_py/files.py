"""Files of the commands: what can't be written is found out before the work, not after it, and no device is read to its end."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path

KINDS = {"HTML page": b"<!doctype html", "PNG": b"\x89png"}  # what each begins with, in small letters


def read(path: Path) -> bytes:
    """The content. Raises OSError, also for a device such as /dev/zero: some have no end."""
    if path.is_char_device() or path.is_block_device():
        raise OSError(errno.EINVAL, "it is a device", str(path))
    return path.read_bytes()


def check_writable(path: Path) -> None:
    """Raises OSError where a file beside `path` could not be made and take its place."""
    check_regular(path)
    draft = path.with_name(f"{path.name}.partial")
    try:
        draft.touch()
        draft.unlink()
    except OSError as failure:
        raise OSError(failure.errno, failure.strerror, str(path)) from failure


def check_regular(path: Path) -> None:
    """Raises OSError for a folder, and for /dev/full and its like, whose place a new file would take."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def check_replaceable(path: Path, kind: str) -> None:
    """Raises OSError, as check_regular does, also for a file with content of another kind than this of KINDS: it may be what someone
    measured."""
    check_regular(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        begin = file.read(len(KINDS[kind]))
    if begin and begin.lower() != KINDS[kind]:
        raise OSError(errno.EEXIST, f"it is there and is no {kind}; allowed: a new file, or an earlier one of this kind", str(path))


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Writes files that belong together: none takes its place before all are written whole. What was there stays when the disk is full, the
    process dies or one can't be written. Raises OSError, with the path's name."""
    drafts: dict[Path, Path] = {}
    path = Path()
    try:
        for path in contents:
            check_regular(path)
        for path, content in contents.items():
            drafts[path] = path.with_name(f"{path.name}.partial")
            drafts[path].write_bytes(content)
        for path, draft in drafts.items():
            draft.replace(path)
    except OSError as failure:  # of writing, it has no name
        raise OSError(failure.errno, failure.strerror, str(path)) from failure
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):  # it has taken its place, or could not be made
                draft.unlink()


def cant_write(failure: OSError) -> str:
    """The sentence about a file that could not be written."""
    why = failure.strerror or str(failure)
    return f"{failure.filename} can't be written: {why}" if failure.filename else why
