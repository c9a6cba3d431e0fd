from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
LIBETAP = HERE.parents[1] / "libetap"


@pytest.fixture(scope="session")
def sm90_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Dispatch and planner of the CUDA device, which need no CUDA, built with UBSan to abort on overflow."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("sm90") / "sm90_host.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover", "-shared", "-fPIC"]
    sources = [HERE / "sm90_shim.cc", LIBETAP / "src" / "error.cc", LIBETAP / "src" / "sm90" / "dispatch.cc"]
    includes = [f"-I{LIBETAP / 'include'}", f"-I{LIBETAP / 'src'}"]
    subprocess.run([compiler, *flags, *includes, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
