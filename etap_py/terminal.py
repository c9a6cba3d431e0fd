"""What the commands of `etap` print: tables, progress, sentences.

Tables are plain text everywhere: aligned columns without frames, which a terminal, a pipe and a log show alike. Words are never broken. A
terminal that is too narrow gets wrapped cells, and then fewer columns; a pipe gets each row on one line. COLUMNS sets the width of both.
Colours only mark, on a terminal and without NO_COLOR.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TypeVar

Item = TypeVar("Item")

_GAP = "  "
_NO_LIMIT = 1 << 20
_LONGEST = 1000  # characters of a sentence
_COLOURS = {"green": 32, "red": 31, "yellow": 33}


class OutputLost(Exception):
    """Standard output can't be written: closed by who read it (`| head`), or a disk is full. The cause is the OSError."""


@dataclass(frozen=True)
class Mark:
    """A cell that stands out: "green", "red" or "yellow"."""

    text: str
    colour: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Column:
    """right: for numbers; optional: left out first, the last such column before the others, where there is no room."""

    name: str
    right: bool = False
    optional: bool = False


def write(text: str) -> None:
    """A line, or several, on standard output, at once. Raises OutputLost."""
    if sys.stdout is None:
        raise OutputLost from OSError(errno.EBADF, os.strerror(errno.EBADF))
    try:
        print(text, flush=True)
    except OSError as failure:
        raise OutputLost from failure
    except UnicodeEncodeError:  # a terminal without our letters
        encoding = sys.stdout.encoding or "ascii"
        write(text.encode(encoding, "replace").decode(encoding))


def complain(text: str) -> None:
    """A sentence on standard error, if there is one, on one line and without the middle of one that no one would read."""
    if sys.stderr is None:
        return
    line = " ".join(text.split())
    if len(line) > _LONGEST:
        line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
    with contextlib.suppress(OSError):  # there is nobody left to tell
        print(line, file=sys.stderr)


def sentence(failure: BaseException) -> str:
    """What an exception says: its first line, or its name where it says nothing."""
    lines = str(failure).strip().splitlines()
    return lines[0] if lines else type(failure).__name__


def table(title: str, columns: Sequence[Column | str], rows: Iterable[Sequence[str | Mark]], note: str = "") -> None:
    """Prints a table, with `note` below it. Raises OutputLost."""
    write("\n".join(lines(title, columns, rows, note, width(), coloured())) + "\n")


def width() -> int:
    """Of standard output in characters: COLUMNS, or the terminal's; without limit for a pipe or a file."""
    if os.environ.get("COLUMNS", "").isdecimal() and int(os.environ["COLUMNS"]) > 0:
        return int(os.environ["COLUMNS"])
    return shutil.get_terminal_size().columns if _is_terminal(sys.stdout) else _NO_LIMIT


def coloured() -> bool:
    """https://no-color.org: NO_COLOR, when it is not empty, means none."""
    return _is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def say(text: str | Mark) -> None:
    """Prints a sentence, wrapped as tables are. Raises OutputLost."""
    wrapped = "\n".join(_wrap(str(text), width()))
    write(_painted(wrapped, text.colour) if isinstance(text, Mark) and coloured() else wrapped)


def _painted(text: str, colour: str) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def lines(
    title: str, columns: Sequence[Column | str], rows: Iterable[Sequence[str | Mark]], note: str, limit: int, colours: bool
) -> Iterator[str]:
    """The lines of a table of at most `limit` characters, unless a single word is longer."""
    every = [Column(column) if isinstance(column, str) else column for column in columns]
    cells = [list(row) for row in rows]
    shown = list(range(len(every)))
    least = [max(map(_longest_word, (column.name, *(str(row[i]) for row in cells)))) for i, column in enumerate(every)]
    for i in reversed([i for i in shown if every[i].optional]):
        if _total(least[i] for i in shown) <= limit:
            break
        shown.remove(i)
    wanted = {i: max(len(text) for text in (every[i].name, *(str(row[i]) for row in cells))) for i in shown}
    widths = {i: least[i] for i in shown}
    while _total(widths.values()) < limit and (growing := [i for i in shown if widths[i] < wanted[i]]):
        widths[min(growing, key=lambda i: wanted[i] - widths[i])] += 1  # who lacks least is served first

    def laid_out(texts: Sequence[str | Mark]) -> Iterator[str]:
        wrapped = {i: _wrap(str(texts[i]), widths[i]) for i in shown}
        for number in range(max(map(len, wrapped.values()), default=0)):
            parts = []
            for i in shown:
                text = wrapped[i][number] if number < len(wrapped[i]) else ""
                padding = " " * (widths[i] - len(text))
                mark = texts[i]
                if colours and isinstance(mark, Mark):
                    text = _painted(text, mark.colour)
                parts.append(padding + text if every[i].right else text + padding)
            yield _GAP.join(parts).rstrip()

    yield from _wrap(title, limit) if not colours else (f"\x1b[1m{line}\x1b[0m" for line in _wrap(title, limit))
    yield from laid_out([column.name for column in every])
    yield _GAP.join("-" * widths[i] for i in shown)
    for row in cells:
        yield from laid_out(row)
    if len(shown) < len(every):
        left_out = ", ".join(column.name for i, column in enumerate(every) if i not in shown)
        yield from _wrap(f"Not in {limit} columns: {left_out}; a wider terminal, a pipe and --json have them.", limit)
    for line in note.splitlines():
        yield from _wrap(line, limit)


def _total(widths: Iterable[int]) -> int:
    every = list(widths)
    return sum(every) + len(_GAP) * (len(every) - 1)


def _longest_word(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _wrap(text: str, limit: int) -> list[str]:
    """Lines of at most `limit` characters, unless a single word is longer."""
    return textwrap.wrap(text, limit, break_long_words=False, break_on_hyphens=False) or [""]


def _is_terminal(stream: IO[str] | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


class Progress:
    """A line on standard error that is written over: how much is done, what was said last, and how long the rest takes. Nothing where
    standard error is no terminal."""

    def __init__(self, title: str, total: int, done: int = 0, hidden: bool = False) -> None:
        self._title, self._total, self._done = title, total, done
        self._first, self._began = done, time.monotonic()
        self._shown = not hidden and _is_terminal(sys.stderr)

    def __enter__(self) -> Progress:
        self._print("")
        return self

    def __exit__(self, *_: object) -> None:
        self._replace("")

    def advance(self, last: str = "") -> None:
        self._done += 1
        self._print(last)

    def _print(self, last: str) -> None:
        made = self._done - self._first
        left = (time.monotonic() - self._began) / made * (self._total - self._done) if made else 0.0
        rest = f"{left // 60:.0f}:{left % 60:02.0f} left" if made else ""
        self._replace(_GAP.join(part for part in (self._title, f"{self._done}/{self._total}", last, rest) if part))

    def _replace(self, text: str) -> None:
        if not self._shown:
            return
        try:
            columns = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{text[: max(0, columns - 1)]}", end="", file=sys.stderr, flush=True)
        except OSError:
            self._shown = False


def track(items: Sequence[Item], title: str, hidden: bool = False) -> Iterator[Item]:
    """The items, with progress."""
    with Progress(title, len(items), hidden=hidden) as progress:
        for item in items:
            yield item
            progress.advance()
