"""What importing the package costs and brings, and that its modules can be imported in every order."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import etap_bench
import pytest

import etap_py

PACKAGES = tuple(Path(package.__file__).parent for package in (etap_py, etap_bench))


def module_name(path: Path, package: Path) -> str:
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path, package): path for package in PACKAGES for path in package.rglob("*.py")}


def imported_at_the_top(path: Path) -> set[str]:
    """Modules of the package that a module imports when it is imported itself, or for its annotations (under TYPE_CHECKING)."""
    found = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += ast.iter_child_nodes(node)
    return {name for name in found if name in MODULES and name not in ("etap_py", "etap_bench")}


def test_no_circle() -> None:
    """Guards: a module that needs one that needs it: which of the two works depends on who is imported first."""
    needs = {name: imported_at_the_top(path) - {name} for name, path in MODULES.items() if name not in ("etap_py", "etap_bench")}
    assert not [name for name, needed in needs.items() if name.startswith("etap_py") and any(n.startswith("etap_bench") for n in needed)]
    assert "etap_py.problem" in needs["etap_py.tuning"]
    assert "etap_py.tuning" in needs["etap_py.decode"]
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as circle:
        pytest.fail(" needs ".join(circle.args[1]))


def in_a_new_process(program: str) -> str:
    environment = {"PYTHONPATH": str(PACKAGES[0].parent), "ETAP_LIBRARY": str(etap_py.library_path())}
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_not_imported_until_it_is_needed() -> None:
    """Guards: seconds of `import etap_py`, and hundreds of megabytes, for programs that decode with NumPy."""
    program = (
        "import sys, numpy as np, etap_py\n"
        "q, kv = np.zeros((1, 16, 576), np.uint16), np.zeros((1, 64, 576), np.uint16)\n"
        "table, lens = np.zeros((1, 1), np.int32), np.array([3], np.int32)\n"
        "etap_py.mla_decode(q, None, kv, table, lens, softmax_scale=1, q_dtype='bf16')\n"
        "assert 'torch' not in sys.modules\n"
    )
    in_a_new_process(program)


@pytest.mark.parametrize("imports", ["import etap_py, torch", "import torch, etap_py", "import etap_py.torch_ops, torch"])
def test_the_operator_is_there_in_every_order(imports: str) -> None:
    """Guards: torch.ops.etap.mla_decode that is only there when torch was imported first; an import hook that stays; a search for torch
    that is taken for its import."""
    program = (
        "import sys, importlib.util\n"
        "assert importlib.util.find_spec('torch') and 'torch' not in sys.modules\n"
        f"{imports}\n"
        "assert torch.ops.etap.mla_decode\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith('etap_py')]\n"
    )
    in_a_new_process(program)


def test_a_search_is_no_import() -> None:
    """Guards: a hook that is used up by somebody who only asks whether torch is installed."""
    in_a_new_process("import etap_py, importlib.util; importlib.util.find_spec('torch'); import torch; torch.ops.etap.mla_decode")
