"""Seams of a package that the tests make up."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from etap_py import seams
from etap_py.seams import Seam, imports, installed, probe

SEAM = Seam("registry", "framework.deep.registry", "Registry.add", "nothing is registered", ("name", "path"))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The module framework.deep.registry, which raises when it is imported."""
    (tmp_path / "framework/deep").mkdir(parents=True)
    (tmp_path / "framework/__init__.py").touch()
    (tmp_path / "framework/deep/__init__.py").write_text("from framework.deep.registry import Registry as Alias\n", encoding="utf-8")
    module = tmp_path / "framework/deep/registry.py"
    module.write_text(
        "raise RuntimeError('imported')\n"
        "LIST: list[str] = []\n"
        "class Registry:\n"
        "    flag = True\n"
        "    def add(self, name, *, path=None): ...\n"
        "def add(name): ...\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "framework", raising=False)
    return module


@pytest.mark.parametrize(
    ("module", "attribute", "line"),
    [
        ("framework.deep.registry", "Registry.add", 5),
        ("framework.deep.registry", "Registry.flag", 4),
        ("framework.deep.registry", "LIST", 2),
        ("framework.deep.registry", "add", 6),
        ("framework.deep", "Alias", 1),
    ],
)
def test_found(source: Path, module: str, attribute: str, line: int) -> None:
    """Guards functions, methods, classes, constants and imported names, without an import of the package."""
    (name, there, detail), found = probe("framework", "1.0", [Seam("x", module, attribute, "")])
    assert (name, there, detail) == ("framework", True, "version unknown; the plugin was written for 1.0")
    assert found == ("x", True, f"{module}:{line}")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", "framework.deep.registry:5"),
        (
            "def add(self, name, *, path=None)",
            "def add(self, name)",
            "framework.deep.registry.Registry.add has no parameter path, so nothing",
        ),
        ("def add(self", "def insert(self", "framework.deep.registry has no Registry.add, so nothing is registered"),
    ],
)
def test_moved(source: Path, old: str, new: str, said: str) -> None:
    """Guards against a framework that moved: what is gone is named, with its effect."""
    source.write_text(source.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    _, (name, found, detail) = probe("framework", "1.0", [SEAM])
    assert (name, found) == ("registry", not new)
    assert detail.startswith(said)


@pytest.mark.parametrize("distribution", ["framework", "framework-cpu"])
def test_version(source: Path, monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    """Guards a framework from a distribution of another name, whose version was unknown."""
    folder = source.parents[2] / f"{distribution.replace('-', '_')}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8")
    (folder / "top_level.txt").write_text("framework\n", encoding="utf-8")
    monkeypatch.setattr(seams, "_distributions", metadata.packages_distributions)
    assert probe("framework", "1.0", []) == [("framework", True, "version 1.0")]


def test_a_module_that_is_gone(source: Path) -> None:
    source.unlink()
    _, found = probe("framework", "1.0", [SEAM])
    assert found == ("registry", False, "there is no module framework.deep.registry, so nothing is registered")


# A plugin's file that names places of the framework in every way.
PLUGIN = """
from typing import TYPE_CHECKING
import json
from framework.deep import registry
from framework.deep.registry import Registry as R, add as add_one
import framework.deep.other as other
if TYPE_CHECKING:
    from framework.types import OnlyForTheChecker
SEAMS = (Seam("known", "framework.known", "Known.method", "nothing"),)
HOOK = "framework.hooks.Hooks.before"
def register():
    'Text that names framework.docs.of_a_function.'
    from framework.inner import late
    registry.LIST.append(R.flag)
    other.call(R.__members__, json.dumps)
    target = "framework.hooks.function"
"""


def test_imports_of_a_plugin(tmp_path: Path) -> None:
    """Guards against a probe that knows less than a plugin asks for: what is imported in functions, module.function, Class.MEMBER, and
    names in strings; and against one that asks for what only a type checker reads."""
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN, encoding="utf-8")
    known = [Seam("known", "framework.known", "Known.method", "nothing"), Seam("add", "framework.deep.registry", "add", "nothing")]
    assert {(seam.module, seam.attribute) for seam in imports("framework", [file], known)} == {
        ("framework.deep", "registry.LIST"),
        ("framework.deep.registry", "Registry"),
        ("framework.deep.registry", "Registry.flag"),
        ("framework.deep", "other"),
        ("framework.deep", "other.call"),
        ("framework.inner", "late"),
        ("framework.hooks", "Hooks.before"),
        ("framework.hooks", "function"),
    }


PACKAGE = {
    "__init__.py": "",
    "part/__init__.py": """
from typing import TYPE_CHECKING
from .module import Derived as Alias, Foreign
from .kinds import *
try:
    import numpy
except ImportError:
    pass
else:
    conditional = 1
if TYPE_CHECKING:
    from .module import for_checkers
def __getattr__(name):
    return {"lazy": 1}[name]
""",
    "part/module.py": """
import numpy
from abc import ABC
class Base(ABC):
    def inherited(self): ...
class Derived(Base): ...
class Foreign(numpy.ndarray): ...
def function(): ...
""",
    "part/kinds.py": """
import enum
from enum import Enum
starred = 1
class Kind(Enum):
    ONE = enum.auto()
""",
}


@pytest.mark.parametrize(
    ("attribute", "there"),
    [
        ("module.function", True),  # a submodule that nobody imports
        ("module.gone", False),
        ("gone", False),
        ("Alias", True),  # imported from elsewhere in the package, under another name
        ("Alias.inherited", True),
        ("Alias.register", True),  # abc.ABC has it
        ("Alias.gone", False),
        ("conditional", True),
        ("for_checkers", False),
        ("starred", True),
        ("lazy", True),
        ("Foreign.anything", True),  # whose base is another package's: the text can't tell
        ("Kind.ONE", True),
        ("Kind.TWO", False),
    ],
)
def test_what_the_text_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str, there: bool) -> None:
    """Guards against seams that are said to be lost where Python would find them, and the other way round."""
    for name, content in PACKAGE.items():
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "package", raising=False)
    _, (_, found, detail) = probe("package", "1.0", [Seam("x", "package.part", attribute, "it fails")])
    assert found is there, detail


def test_not_installed() -> None:
    """Guards `etap doctor` on a machine without the framework."""
    assert probe("no_such_framework", "1.0", [SEAM]) == [("no_such_framework", False, "no_such_framework is not installed")]


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a folder of that name on the path, such as tests/vllm, whose seams would all be missing."""
    (tmp_path / "folder_of_tests").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not installed("folder_of_tests")
    assert installed("etap_py")
