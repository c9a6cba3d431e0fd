"""The wheel: what is in it, and that it works where there is no source tree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import etap_py as etap
from etap_py import binding

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(build, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a throw-away environment's programs: the wheel, and beside it this environment's packages, which are not installed
    again."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)], check=True)
    return folder / "bin"


def run_outside(program: Path, *arguments: str) -> str:
    """In an empty folder, with nothing in the environment that leads back to the source tree."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ETAP_LIBRARY")}
    done = subprocess.run([program, *arguments], cwd=program.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_contents(wheel: Path) -> None:
    """One wheel for every Python 3 of this platform, with the library, its header and the type marker."""
    assert re.fullmatch(rf"etap_py-{re.escape(etap.__version__)}-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name.removeprefix("etap_py/") for name in names if name.startswith("etap_py/")}
    assert {"libetap.so", "etap.h", "py.typed", "ctypes_shim.py", "__main__.py"} <= package
    sources = [path for pattern in ("*.py", "*.toml", "*.json", "*.j2") for path in (ROOT / "etap_py").rglob(pattern)]
    assert package == {str(path.relative_to(ROOT / "etap_py")) for path in sources} | {"py.typed", "libetap.so", "etap.h"}
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]


def test_works_outside_the_source_tree(installed: Path) -> None:
    program = """
import json, numpy as np, etap_py as etap
q, kv = np.ones((1, 16, 512), np.float16), np.ones((1, 64, 512), np.float16)
out, lse = etap.mla_decode(q, None, kv, np.zeros((1, 1), np.int32), np.array([8], np.int32), softmax_scale=0.0)
print(json.dumps([str(etap.library_path()), etap.__version__, float(out.min()), float(lse.max())]))
"""
    path, version, value, lse = json.loads(run_outside(installed / "python", "-c", program))
    assert Path(path).is_relative_to(installed.parent)
    assert version == etap.__version__
    assert value == 1.0
    assert lse == pytest.approx(2.0794415, rel=1e-6)  # log 8


def test_command_and_shim_of_the_wheel(installed: Path) -> None:
    report = json.loads(run_outside(installed / "etap", "doctor", "--json"))
    assert report["packages"]["etap-py"] == etap.__version__
    assert Path(report["library"]).is_relative_to(installed.parent)
    (shim,) = installed.parent.glob("lib/python*/site-packages/etap_py/ctypes_shim.py")
    program = f"import sys; sys.path[:0] = [{str(shim.parent)!r}]; import ctypes_shim; print(ctypes_shim.load().etap_version())"
    assert run_outside(installed / "python", "-c", program) == f"{binding.lib.etap_version()}\n"
