"""Imports a module of ours as soon as the process has imported PyTorch, which takes seconds and which not everybody needs."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def run(module: str) -> None:
    """Imports `module`, which itself imports torch: now when torch is there, else right after torch."""
    if sys.modules.get("torch") is not None:
        _import(module)
    else:
        sys.meta_path.insert(0, _Finder(module))


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError:
        pass  # the library can't be loaded, which the first use of it says
    except Exception as failure:  # of ours: torch itself is all right
        warnings.warn(f"{module} can't be imported: {failure!r}", stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and adds a step to the execution of torch."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target)) is not None), None)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _import(self.module)

            loader.exec_module = exec_module
        return spec
