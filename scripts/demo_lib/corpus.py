"""Text for the demo's model: what Python's standard library and its documentation say about functions, and prose around it.

Every piece is under the PSF licence (standard library, documentation) or in the public domain (PEPs).
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
_LONGEST = 480  # characters of a documentation string; paragraphs beyond are left out


@dataclass(frozen=True)
class Entry:
    """A piece of the corpus. Neighbours come from the same file."""

    name: str
    """Of the function or class; empty for prose."""
    text: str


def definition(signature: str, documentation: str) -> str:
    """A function or class as the model reads and writes it: `signature` is "def name(...)" or "class Name", without colon."""
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", documentation.strip())]
    body = "\n\n    ".join(paragraphs) + ("\n    " if len(paragraphs) > 1 else "")
    return f'{signature}:\n    """{body}"""\n'


def collect(documentation: Path, peps: Path) -> list[Entry]:
    """The whole corpus, in a fixed order.

    documentation  the `_sources` folder of Python's HTML documentation (Debian's python3.11-doc has it)
    peps           the `peps` folder of a checkout of github.com/python/peps
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    entries: list[Entry] = []
    for path in sorted(library.rglob("*.py")):
        if not _SKIPPED & set(path.relative_to(library).parts):
            entries += source_entries(path)
    entries += _extension_entries()
    for path in sorted(documentation.rglob("*.rst.txt")):
        entries += _document_entries(path.read_text(encoding="utf-8"))
    for path in sorted(peps.glob("pep-*.rst")):
        text = path.read_text(encoding="utf-8")
        if "public domain" in text[-800:].lower():
            entries += [entry for entry in _document_entries(text) if not entry.name]
    return list(_distinct(entries))


def _distinct(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Each piece once; the same documentation under different names (`__repr__` in fifty classes) three times."""
    pieces: set[Entry] = set()
    times: Counter[str] = Counter()
    for entry in entries:
        if entry not in pieces:
            pieces.add(entry)
            documentation = entry.text.partition(":\n")[2] if entry.name else entry.text
            times[documentation] += 1
            if times[documentation] <= 3:
                yield entry


def source_entries(path: Path) -> list[Entry]:
    """The documented functions and classes of a Python file, in its order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files with invalid escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return []
    entries = []
    for node in _in_order(tree):
        text = _tidied(ast.get_docstring(node) or "")
        if not text:
            continue
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            signature = f"class {node.name}({bases})" if bases else f"class {node.name}"
        else:
            arguments = ast.unparse(_without_annotations(node.args))
            signature = f"def {node.name}({arguments})"
        if len(signature) <= 120:
            entries.append(Entry(node.name, definition(signature, text)))
    return entries


def _in_order(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        yield from _in_order(child)


def _without_annotations(arguments: ast.arguments) -> ast.arguments:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return arguments


def _extension_entries() -> Iterator[Entry]:
    """Built-in and extension modules: their documentation exists at run time only."""
    for name in sorted(sys.stdlib_module_names):
        spec = None if name.startswith(("_test", "_xx", "xx")) else importlib.util.find_spec(name)
        loader = spec.loader if spec else None
        if loader is importlib.machinery.BuiltinImporter or isinstance(loader, importlib.machinery.ExtensionFileLoader):
            module = importlib.import_module(name)
            for member, value in sorted(vars(module).items()):
                yield from _runtime_entries(member, value)
                if inspect.isclass(value) and value.__module__ in (name, name.lstrip("_")):
                    for method, inner in sorted(vars(value).items()):
                        yield from _runtime_entries(method, inner)


def _runtime_entries(name: str, value: object) -> Iterator[Entry]:
    text = getattr(value, "__doc__", None)
    text = _tidied(inspect.cleandoc(text)) if isinstance(text, str) else ""
    if inspect.isclass(value):
        if text:
            yield Entry(name, definition(f"class {name}", text))
    elif inspect.isroutine(value) and text and getattr(value, "__text_signature__", None):
        arguments = re.sub(r"\$", "", str(value.__text_signature__)).replace(", /", "")  # type: ignore[attr-defined]
        if len(arguments) <= 100:
            yield Entry(name, definition(f"def {name}{arguments}", text))


def _document_entries(text: str) -> Iterator[Entry]:
    """Descriptions of functions and classes in a reStructuredText document, and its paragraphs of prose."""
    lines = text.expandtabs().splitlines()
    index = 0
    prose: list[str] = []
    while index < len(lines):
        found = re.match(r"( *)\.\. (?:py:)?(function|method|class|classmethod|staticmethod|exception|decorator):: (.+)", lines[index])
        if not found:
            prose.append(lines[index])
            index += 1
            continue
        indent, kind, signature = len(found[1]), found[2], found[3].rstrip("\\ ")
        body, end = [], index + 1
        while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
            body.append(lines[end])
            end += 1
        described = "\n".join(body)
        inner = re.search(r"^ *\.\. ", described, re.MULTILINE)
        description = _tidied(_plain(inspect.cleandoc(described[: inner.start()] if inner else described)))
        if description and (entry := _described(kind, signature, description)):
            yield from _paragraphs(prose)
            prose = []
            yield entry
            # What follows inside (methods of a class, notes) is looked at for its own sake.
            index += 1 + (described[: inner.start()].count("\n") if inner else len(body))
        else:
            index += 1
    yield from _paragraphs(prose)


def _described(kind: str, signature: str, description: str) -> Entry | None:
    found = re.match(r"(?:[\w.]*\.)?(\w+)\s*(?:\((.*)\))?$", re.sub(r"[\[\]]", "", signature))
    if not found:
        return None
    name, arguments = found[1], (found[2] or "").replace(", /", "").strip(", ")
    arguments = re.sub(r"\s*,\s*", ", ", arguments)
    if kind in ("class", "exception"):
        return Entry(name, definition(f"class {name}", description))
    if kind in ("method", "classmethod"):
        arguments = ", ".join(filter(None, ("self" if kind == "method" else "cls", arguments)))
    if len(arguments) > 100:
        return None
    return Entry(name, definition(f"def {name}({arguments})", description))


def _paragraphs(lines: list[str]) -> Iterator[Entry]:
    """Whole sentences only: no headings, code, tables or directives."""
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        if re.match(r"\s*(\.\. |>>>|:\w|[-=~^#*+|]{3})", block):
            continue
        text = " ".join(_plain(block).split())
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(text) >= 60 and text[0].isupper() and text[-1] in ".:" and letters > 0.9 * len(text):
            yield Entry("", text + "\n")


def _tidied(text: str) -> str:
    """The first paragraphs of a documentation string, if they are sentences; without doctests and other code."""
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        plain = _plain(" ".join(paragraph.split()))
        prose = re.match(r"[A-Z\"'`_a-z]", plain) and ">>>" not in plain and plain[-1] in ".:)" and "--" not in plain
        if not prose or (kept and sum(map(len, kept)) + len(plain) > _LONGEST):
            break
        if not kept and len(plain) > _LONGEST:
            plain = plain[:_LONGEST].rpartition(". ")[0] + "."
        if len(plain) < 12 or sum(c.isalpha() or c == " " for c in plain) < 0.85 * len(plain):
            break
        kept.append(plain)
    if kept and kept[-1].endswith(":"):  # announces what was left out
        kept.pop()
    return "\n\n".join(kept)


def _plain(text: str) -> str:
    """Without reStructuredText's markup."""
    text = re.sub(r":[\w:]+:`(?:[^`<]*<([^`>]*)>|!?([^`]*))`", lambda m: _last(m[1] or m[2]), text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"``(.+?)``", r"\1", text)
    text = re.sub(r"`([^`]+)`_*", r"\1", text)
    text = re.sub(r"\|(\w+)\|", r"\1", text)
    text = re.sub(r"\*\*(\w[^*]*)\*\*", r"\1", text)
    text = re.sub(r"(?<![\w*])\*(\w[^*\n]*)\*(?![\w*])", r"\1", text)
    text = re.sub(r"(\w)_(?=[\s,.:])", r"\1", text)
    text = re.sub(r" ?\[\w+\]_", "", text)
    return text.replace("\\ ", "").replace("::", ":").replace("\u201c", '"').replace("\u201d", '"').replace("\u2019", "'")


def _last(target: str) -> str:
    return target.rpartition(".")[2] if target.startswith("~") else target


def join(entries: Iterable[Entry]) -> str:
    return "".join(entry.text for entry in entries)
