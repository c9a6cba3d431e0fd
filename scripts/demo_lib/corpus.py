"""Text that every machine with Python has: the documentation strings of its standard library."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def documentation_strings() -> list[str]:
    """Each documentation string of the standard library's modules, classes and functions, on one line, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (" ".join(text.split()) for path in sorted(root.rglob("*.py")) for text in _docstrings(path, root))
    texts = dict.fromkeys(found)
    return [text for text in texts if len(text) >= 40]


def _docstrings(path: Path, root: Path) -> Iterator[str]:
    if _SKIPPED & set(path.relative_to(root).parts):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files with invalid escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield text
        elif isinstance(node, ast.Assign) and path.name == "topics.py" and isinstance(node.value, ast.Dict):
            # pydoc's topics: the language reference, as a dictionary of strings
            yield from (v.value for v in node.value.values if isinstance(v, ast.Constant) and isinstance(v.value, str))
