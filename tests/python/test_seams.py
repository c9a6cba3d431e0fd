"""Seams of a package that the tests make up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from etap_py.seams import Seam, installed, probe

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


def test_a_module_that_is_gone(source: Path) -> None:
    source.unlink()
    _, found = probe("framework", "1.0", [SEAM])
    assert found == ("registry", False, "there is no module framework.deep.registry, so nothing is registered")


def test_not_installed() -> None:
    """Guards `etap doctor` on a machine without the framework."""
    assert probe("no_such_framework", "1.0", [SEAM]) == [("no_such_framework", False, "no_such_framework is not installed")]


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a folder of that name on the path, such as tests/vllm, whose seams would all be missing."""
    (tmp_path / "folder_of_tests").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not installed("folder_of_tests")
    assert installed("etap_py")
