"""What `make dist` put into dist/: what is in it, which systems it is for, and that it works where there is no source tree."""

from __future__ import annotations

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
HEADER = (ROOT / "libetap" / "include" / "etap.h").read_text()
VERSION = ".".join(re.findall(r"^#define ETAP_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", HEADER, flags=re.MULTILINE))
# The packages beside etap-py, as etap_NAME in the folder.
_PACKAGES = [ROOT / "bench", *(path.parent for path in ROOT.glob("integrations/*/pyproject.toml"))]
FOLDERS = {folder.name: folder for folder in sorted(_PACKAGES)}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MIB = 2**20

pytestmark = pytest.mark.skipif(not DIST.is_dir(), reason="dist/ is not there: make dist")


def load_record() -> object:
    spec = importlib.util.spec_from_file_location("abi_record", ROOT / "tests" / "abi" / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def the_one(pattern: str) -> Path:
    (path,) = DIST.glob(pattern)
    return path


@pytest.fixture(scope="module")
def wheel() -> Path:
    return the_one("etap_py-*.whl")


@pytest.fixture(scope="module")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libetap.so out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("etap_py/libetap.so", tmp_path_factory.mktemp("library")))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(the_one("etap_py-*.tar.gz")) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # extractall's `filter` is as new as Python 3.11.4
        archive.extractall(folder)
    return folder / f"etap_py-{VERSION}"


def tracked(*patterns: str) -> set[str]:
    """Files of the source tree under version control; pytest.skip where there is none."""
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}


def run_outside(program: Path, *arguments: str) -> str:
    """In another folder, with nothing in the environment that leads back to the source tree."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ETAP_LIBRARY")}
    done = subprocess.run([program, *arguments], cwd=program.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- The wheels ----


def test_names() -> None:
    """One version for all; one wheel for every Python 3, and wheels of the integrations for every platform."""
    assert re.fullmatch(rf"etap_py-{re.escape(VERSION)}-py3-none-manylinux_2_28_\w+\.whl", the_one("etap_py-*.whl").name)
    expected = {f"etap_{name}-{VERSION}-py3-none-any.whl" for name in FOLDERS} | {f"etap_py-{VERSION}.tar.gz"}
    assert {path.name for path in DIST.iterdir()} == expected | {the_one("etap_py-*.whl").name}


def test_metadata_is_what_an_index_takes() -> None:
    """twine's check: fields, and a README that can be rendered."""
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, DIST.iterdir())], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_platform(wheel: Path) -> None:
    """auditwheel's judgement of the symbols agrees with the wheel's name: it needs glibc 2.28 or an older one."""
    done = subprocess.run([sys.executable, "-m", "auditwheel", "show", str(wheel)], capture_output=True, text=True, check=True)
    (minor,) = re.findall(r'platform tag:\s+"manylinux_2_(\d+)_\w+"', done.stdout)
    assert int(minor) <= 28, done.stdout


def test_symbols(library: Path) -> None:
    """What is exported is the ABI record. What is imported has a version of glibc, 2.28 at most: the library needed GLIBC_2.36 once, and
    a symbol without a version (one that this machine's static libstdc++ expects of its own glibc) fails on the older system only."""
    record = load_record()
    assert record.exported_symbols(library) == json.loads(record.RECORD.read_text())["symbols"]  # type: ignore[attr-defined]
    table = subprocess.run(["readelf", "--dyn-syms", "--wide", library], check=True, capture_output=True, text=True).stdout
    imported = re.findall(r"^ *\d+: 0+ +0 \w+ +GLOBAL +DEFAULT +UND (\S+)", table, flags=re.MULTILINE)
    versions = {name: re.search(r"@GLIBC_(\d+)\.(\d+)", name) for name in imported}
    assert len(versions) > 20
    too_new = [name for name, found in versions.items() if found is None or (int(found[1]), int(found[2])) > (2, 28)]
    assert too_new == []


def test_needed_libraries(library: Path) -> None:
    """Nothing but glibc: no C++ run-time, no CUDA run-time, no Python, no torch."""
    allowed = re.compile(r"(libc|libm|libdl|librt|libpthread|ld-linux.*)\.so\.\d+")
    assert [name for name in load_record().needed_libraries(library) if not allowed.fullmatch(name)] == []  # type: ignore[attr-defined]


def built_with_cuda() -> bool:
    return "sm90/device.o" in (ROOT / os.environ.get("ETAP_BUILD", "build") / "obj" / "objects").read_text()


def test_carries_cuda(library: Path) -> None:
    if not built_with_cuda():
        pytest.skip("built without CUDA: no nvcc, or CUDA=0")
    sections = subprocess.run(["readelf", "--section-headers", "--wide", library], check=True, capture_output=True, text=True).stdout
    (size,) = re.findall(r" \.nv_fatbin +PROGBITS +\w+ \w+ (\w+)", sections)
    assert int(size, 16) > MIB


def test_contents(wheel: Path) -> None:
    """The package's files, the library, its header, the type marker and the licence; nothing of tests or scripts."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {name.removeprefix("etap_py/") for name in names if name.startswith("etap_py/")}
    sources = [path for pattern in ("*.py", "*.toml", "*.json", "*.j2") for path in (ROOT / "etap_py").rglob(pattern)]
    probe = {"libetap_probe.so"} if built_with_cuda() else set()
    assert package == {str(path.relative_to(ROOT / "etap_py")) for path in sources} | {"py.typed", "libetap.so", "etap.h"} | probe
    assert {name.split("/")[0] for name in names} == {"etap_py", f"etap_py-{VERSION}.dist-info"}
    assert wheel.stat().st_size < 20 * MIB


@pytest.mark.parametrize("name", [*FOLDERS, "py"])
def test_licence_and_requirement(name: str) -> None:
    """Every wheel has the licence's text. The others require etap-py of exactly their own version: they are one tree."""
    with zipfile.ZipFile(the_one(f"etap_{name}-*.whl")) as archive:
        folder = f"etap_{name}-{VERSION}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        names = set(archive.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"
    if name != "py":
        requirement, *others = metadata.get_all("Requires-Dist", [])
        assert re.fullmatch(rf"etap-py(\[torch\])?=={re.escape(VERSION)}", requirement)
        assert bool(others) == (FOLDERS[name] / "requirements.txt").exists()
        package = {path for path in names if path.startswith(f"etap_{name}/")}
        folder = str(FOLDERS[name].relative_to(ROOT))
        assert package == {path.removeprefix(f"{folder}/") for path in tracked(f"{folder}/etap_{name}/*")}


# ---- In a fresh environment ----


def interpreter(version: str) -> Path | None:
    """A Python of this version on this machine: on PATH, or one of pyenv's."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")))
    for path in candidates:
        ask = [path, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        if path and subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() == version:
            return Path(path)
    return None


DECODE = """
import json, numpy as np, etap_py as etap
q, kv = np.ones((1, 16, 512), np.float16), np.ones((1, 64, 512), np.float16)
out, lse = etap.mla_decode(q, None, kv, np.zeros((1, 1), np.int32), np.array([8], np.int32), softmax_scale=0.0)
print(json.dumps([str(etap.library_path()), etap.__version__, float(out.min()), float(lse.max())]))
"""


@pytest.mark.parametrize("version", PYTHONS)
def test_decodes_in_a_fresh_environment(wheel: Path, version: str, tmp_path: Path) -> None:
    """As a user would: the wheel and what it requires, nothing else. Then a decode, the command, and the ctypes file alone."""
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    subprocess.run([python, "-m", "venv", tmp_path], check=True)
    programs = tmp_path / "bin"
    install = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    subprocess.run(install, check=True)
    path, found, value, lse = json.loads(run_outside(programs / "python", "-c", DECODE))
    assert Path(path).is_relative_to(tmp_path)
    assert found == VERSION
    assert value == 1.0
    assert lse == pytest.approx(2.0794415, rel=1e-6)  # log 8
    report = json.loads(run_outside(programs / "etap", "doctor", "--json"))
    assert report["packages"]["etap-py"] == VERSION
    (shim,) = tmp_path.glob("lib/python*/site-packages/etap_py/ctypes_shim.py")
    program = f"import sys; sys.path[:0] = [{str(shim.parent)!r}]; import ctypes_shim; print(ctypes_shim.load().etap_version())"
    major, minor, patch = map(int, VERSION.split("."))
    assert int(run_outside(programs / "python", "-c", program)) == major * 10_000 + minor * 100 + patch


# ---- The source distribution ----


def test_source_is_complete(source: Path) -> None:
    """Everything that make compiles, documents, examples, measured tables, licence."""
    folders = ("libetap", "etap_py", "bench", "docs", "examples", "benchmarks")
    wanted = tracked(*folders, "Makefile", "*.md", "LICENSE", "pyproject.toml", "setup.py")
    wanted = {name for name in wanted if not name.startswith((".", "integrations/", "tests/"))}
    there = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert sorted(wanted - there) == []
    assert not [name for name in there if name.endswith((".o", ".so"))]


def test_source_builds_without_cuda(source: Path, tmp_path: Path) -> None:
    """Where there is no nvcc: `pip install` of the source distribution makes a wheel whose library decodes. Unoptimised, for time."""
    environment = {**os.environ, "CUDA": "0", "OPT": "-O1", "MAKEFLAGS": ""}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, str(source)], env=environment, check=True)
    (path,) = tmp_path.glob("*.whl")
    assert re.fullmatch(rf"etap_py-{re.escape(VERSION)}-py3-none-linux_\w+\.whl", path.name)
    folder = tmp_path / "site"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    program = f"import sys; sys.path[:0] = [{str(folder)!r}]\n{DECODE}"
    found, _, value, _ = json.loads(run_outside(Path(sys.executable), "-c", program))
    assert Path(found).is_relative_to(folder)
    assert value == 1.0


def test_source_builds_with_cuda(source: Path) -> None:
    """Where there is nvcc: make finds a rule and a source for every object. (Compiling them takes minutes; CI compiles the same files.)"""
    plan = ["make", "--dry-run", "CUDA=1", "build/libetap.so"]
    if shutil.which(os.environ.get("NVCC", "nvcc")) is None:
        plan.insert(2, "NVCC_FROM_PYPI=1")
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    done = subprocess.run(plan, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = set(re.findall(r"-c (libetap/src/sm90/\S+\.cu)", done.stdout))
    assert compiled == {str(path.relative_to(ROOT)) for path in (ROOT / "libetap" / "src" / "sm90").rglob("*.cu")}


# ---- One place for everything ----


def test_one_place_for_the_version() -> None:
    """etap.h has it; no package repeats it."""
    files = {name for name in tracked("*.toml", "*.py", "*.txt", "*.sh", "Makefile") if not name.startswith("tests/")}
    assert [name for name in files if f'"{VERSION}"' in (ROOT / name).read_text()] == []


def test_one_place_for_each_requirement() -> None:
    """pyproject.toml has what libetap's own packages need, bench/requirements.txt what etap-bench does, requirements/ what SGLang takes
    on a machine without a GPU. Two packages are in ours and in theirs, each with its own reason: SGLang wants them too."""
    line = re.compile(r"^([\w-]+)", re.MULTILINE)
    ours = re.findall(r'^ *(?:\w+ = \[)?"([\w-]+)[>=<]', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    bench = line.findall((ROOT / "bench" / "requirements.txt").read_text())
    theirs = [name for path in ROOT.glob("requirements/*.txt") for name in line.findall(path.read_text())]
    assert {"numpy", "torch", "ziglang"} <= set(ours)
    assert "msgspec" in bench and not set(ours) & set(bench)
    assert len(theirs) == len(set(theirs)) > 20
    assert {*ours, *bench} & set(theirs) == {"msgspec", "torch"}
    seams = (ROOT / "integrations" / "sglang" / "etap_sglang" / "seams.py").read_text()
    (release,) = re.findall(r"^sglang==(\S+)", (ROOT / "requirements" / "sglang-nodeps.txt").read_text(), flags=re.MULTILINE)
    assert f'WRITTEN_FOR = "{release}"' in seams
