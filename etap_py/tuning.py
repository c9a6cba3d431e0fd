"""What `etap tune` found on this machine: `tuned` gives a problem with the stored choice forced, which says all of it. Nothing else looks
at the file, and what is kept of a problem (its plan, a drop-in's route) is kept under the problem that `tuned` gives.

The file is JSON: for each card, the library version it was tuned with and, for each problem, the tile and cluster to take instead of the
library's own choice. A file that can't be read, or that has nothing for this card and library, is left alone with one warning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etap_py import files
from etap_py.binding import check, ffi, lib, new, text
from etap_py.problem import Problem

FORMAT = 1
# Sparse attention and trees are not tuned, and what follows a shared prefix is as without one.
_NOT_IN_KEY = ("device", "force_tile", "force_cluster", "topk", "tree_mask", "shared_prefixes")
_ignored = False


@dataclass(frozen=True)
class Choice:
    """What to force for a problem, and how much faster it was than the library's choice on the contexts that were measured."""

    tile: int  # query rows; 0: the library's
    cluster: int  # CTAs; 0: the library's
    speedup: float  # geometric mean
    contexts: tuple[int, ...]  # tokens a sequence


def file() -> Path | None:
    """The file that the environment variable ETAP_TUNING names (empty: none), else etap/tuning.json in the user's configuration folder."""
    return _file(os.environ.get("ETAP_TUNING"), os.environ.get("XDG_CONFIG_HOME"), os.environ.get("HOME"))


@functools.lru_cache(maxsize=16)
def _file(named: str | None, configuration: str | None, home: str | None) -> Path | None:
    if named is not None:
        return Path(named) if named else None
    return Path(configuration or Path(home or Path.home()) / ".config") / "etap" / "tuning.json"


def key(problem: Problem) -> str:
    """What a choice is stored under: every field of the problem but the device's number."""
    fields = (field.name for field in dataclasses.fields(problem) if field.name not in _NOT_IN_KEY)
    return " ".join(f"{name}={getattr(problem, name)}" for name in fields)


def card(problem: Problem) -> str:
    """The device's name and size, as "NVIDIA H100 80GB HBM3 (132)"."""
    c_problem = problem.to_c()
    return _card(c_problem.device_type, c_problem.device_index)


@functools.cache
def _card(device_type: int, device_index: int) -> str:
    info = new("etap_device_info")
    check(lib.etap_device_query(device_type, device_index, info))
    return f"{text(info.name)} ({info.num_sms})"


def tuned(problem: Problem) -> Problem:
    """The problem with the stored choice forced; itself where there is none, where a choice is forced already, for sparse attention and
    trees, and in batch-invariant mode, where the tile must be the same for every batch."""
    if _ignored or problem.force_tile or problem.force_cluster or problem.batch_invariant or problem.topk or problem.tree_mask:
        return problem
    source = file()
    return problem if source is None else _tuned(problem, source)


@functools.lru_cache(maxsize=1024)
def _tuned(problem: Problem, source: Path) -> Problem:
    try:
        choices = _choices(source, card(problem))
    except RuntimeError:  # no such device: the library says so itself
        return problem
    choice = choices.get(key(problem)) if choices else None
    if choice is None:
        return problem
    forced = dataclasses.replace(problem, force_tile=choice.tile, force_cluster=choice.cluster)
    return forced if fits(problem, forced) else problem


def fits(problem: Problem, forced: Problem) -> bool:
    """Is the forced problem supported, with no more workspace than the problem itself? Callers size one workspace for many problems."""
    sizes = []
    for candidate in (problem, forced):
        size = ffi.new("size_t *")
        if lib.etap_workspace_size(candidate.to_c(), size):
            return False
        sizes.append(int(size[0]))
    return sizes[1] <= sizes[0]


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Plans made within are the library's own, as `etap tune` needs them to compare with."""
    global _ignored
    _ignored = True
    try:
        yield
    finally:
        _ignored = False


@functools.lru_cache(maxsize=16)
def _choices(source: Path, of_card: str) -> dict[str, Choice]:
    try:
        return _read(source, of_card)
    except FileNotFoundError:
        if "ETAP_TUNING" not in os.environ:
            return {}
        problem = "there is no such file"
    except (OSError, ValueError) as failure:
        problem = str(failure)
    warnings.warn(f"the tuning file {source} is ignored: {problem}", stacklevel=2)
    return {}


def _read(source: Path, of_card: str) -> dict[str, Choice]:
    """Raises OSError, or ValueError with what is wrong."""
    cards = _cards(source)
    if of_card not in cards:
        raise ValueError(f"it is for {', '.join(cards) or 'no card'}, not for {of_card}")
    stored = cards[of_card]
    try:
        version, choices = stored["etap"], stored["choices"]
        if version != _version():
            raise ValueError(f"it was made with etap {version}; this is {_version()}: run 'etap tune' again")
        return {
            name: Choice(int(c["tile"]), int(c["cluster"]), float(c["speedup"]), tuple(map(int, c["contexts"])))
            for name, c in choices.items()
        }
    except (KeyError, TypeError, AttributeError) as failure:
        raise ValueError(f"it is damaged: {failure!r}") from failure


def _cards(source: Path) -> dict[str, Any]:
    content = json.loads(files.read(source))
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("cards"), dict):
        raise ValueError(f"it is no tuning file of format {FORMAT}")
    cards: dict[str, Any] = content["cards"]
    return cards


def _version() -> str:
    number = lib.etap_version()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def store(target: Path, of_card: str, choices: dict[str, Choice]) -> None:
    """Writes the choices for a card, whole or not at all. What the file holds for other cards, and for other problems of this card and
    library, stays."""
    cards: dict[str, Any] = {}
    kept: dict[str, Choice] = {}
    with contextlib.suppress(OSError, ValueError):
        cards = _cards(target)
        kept = _read(target, of_card)
    merged = {name: dataclasses.asdict(choice) for name, choice in sorted({**kept, **choices}.items())}
    content = {"format": FORMAT, "cards": {**cards, of_card: {"etap": _version(), "choices": merged}}}
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(target)
    forget()


def forget() -> None:
    """The files are read anew when the next plan is made. What was changed by another process counts only then."""
    _choices.cache_clear()
    _tuned.cache_clear()


def state(problem: Problem) -> str:
    """What `etap doctor` says about the device of a problem."""
    source = file()
    if source is None:
        return "ETAP_TUNING is empty: the library decides"
    try:
        choices = _read(source, card(problem))
    except FileNotFoundError:
        return "not tuned: the library decides"
    except (OSError, ValueError) as failure:
        return f"{source} is ignored: {failure}"
    return f"{len(choices)} choices in {source}"
