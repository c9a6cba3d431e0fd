"""Who computes the calls of a drop-in package: ETAP, or the peer, the library that the package stands in for.

The environment variable ETAP_ROUTE says it for the process, `use` from then on:

    etap    ETAP computes everything, and refuses what it can't (the default)
    auto    the peer computes where the transposition doesn't pay and what ETAP refuses, if it can be imported; ETAP the rest
    peer    the peer computes everything

The transposition pays while one tile holds all query rows (heads times query tokens) of a sequence: every KV row is read once. With more
rows ETAP reads KV once a tile, and kernels with the rows on the 64-row side of WGMMA pad little. On the CPU device ETAP always computes:
the peers have no kernels there.

The logger `etap_py.routing` tells, at level INFO, each decision once for each shape.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from types import ModuleType

from etap_py.errors import EtapError
from etap_py.problem import Problem, decide
from etap_py.tuning import tuned

_ROUTES = ("etap", "auto", "peer")
_log = logging.getLogger(__name__)
_used: str | None = None


def use(route: str) -> None:
    """Sets the route, "etap", "auto" or "peer", of the plans that are made from now on; ETAP_ROUTE no longer counts."""
    global _used
    _used = _known("route", route)


def current_route() -> str:
    """What `use` or else ETAP_ROUTE says."""
    return _used or _known("ETAP_ROUTE", os.environ.get("ETAP_ROUTE") or "etap")


def _known(name: str, route: str) -> str:
    if route not in _ROUTES:
        raise ValueError(f"{name} is {route!r}; allowed: {', '.join(repr(known) for known in _ROUTES)}")
    return route


@dataclass(frozen=True)
class Peer:
    """A library that a drop-in package stands in for."""

    name: str  # "FlashMLA"
    module: str  # what to import, "flash_mla"

    def chosen_for(self, problem: Problem) -> ModuleType | None:
        """The peer's module when it is to compute this problem; None: ETAP does.

        Raises EtapError with the library's sentence when ETAP can't and nobody else may; ImportError when the route is "peer" and it
        can't be imported.
        """
        return _chosen(self, tuned(problem), current_route())

    def instead(self, refusal: str) -> ModuleType:
        """The peer's module for a call that ETAP refuses with this sentence, on the routes "auto" and "peer".

        Raises NotImplementedError with the sentence when the route is "etap" or the peer can't be imported.
        """
        module, why_not = _import(self) if current_route() != "etap" else (None, "the route is etap")
        if module is None:
            raise NotImplementedError(f"{refusal} ({self.name} was not asked: {why_not})")
        _log_refusal(self, refusal)
        return module


@functools.cache
def _import(peer: Peer) -> tuple[ModuleType | None, str]:
    """The module, or None and why not."""
    try:
        return importlib.import_module(peer.module), ""
    except (ImportError, OSError) as failure:  # OSError: an extension whose libraries are missing
        return None, f"{peer.module} can't be imported: {failure}"


@functools.lru_cache(maxsize=1024)
def _chosen(peer: Peer, problem: Problem, route: str) -> ModuleType | None:
    """Cached, which also makes the log tell each decision once."""
    module, why_not = (None, "the route is etap") if route == "etap" else _import(peer)
    if route == "peer" and module is None:
        raise ImportError(f"the route is 'peer', but {why_not}")
    try:
        decision = decide(problem)
    except EtapError as refusal:
        if module is None:
            raise
        return _log_choice(peer, problem, module, f"ETAP refuses: {refusal}")
    if route == "peer":
        return _log_choice(peer, problem, module, "the route is peer")
    if module is None or problem.device == "cpu" or decision.num_tiles == 1:
        why = f"{decision.kernel}: {decision.reason}" + (f"; {peer.name} was not asked: {why_not}" if module is None else "")
        return _log_choice(peer, problem, None, why)
    rows = problem.num_heads * problem.max_query_len
    return _log_choice(peer, problem, module, f"{rows} query rows a sequence are {decision.num_tiles} tiles, each of which reads KV")


def _log_choice(peer: Peer, problem: Problem, module: ModuleType | None, why: str) -> ModuleType | None:
    _log.info("%s computes %s (%s)", "ETAP" if module is None else peer.name, problem, why)
    return module


@functools.lru_cache(maxsize=1024)
def _log_refusal(peer: Peer, refusal: str) -> None:
    _log.info("%s computes what ETAP refuses: %s", peer.name, refusal)
