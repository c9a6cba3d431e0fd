"""A wheel that carries libetap: `make` builds it, and the package gets the library, its stream probe and its header beside the Python
files.

Nothing is compiled against Python, so one wheel serves every Python version. The Makefile's knobs are environment variables here:
CUDA=0 pip install .

A wheel for other machines than this one is asked for by its platform (`make wheels` does); make links a library for that one:
python setup.py bdist_wheel --plat-name manylinux_2_28_x86_64
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
HEADER = ROOT / "libetap" / "include" / "etap.h"
BUILD = Path(os.environ.get("BUILD", "build"))  # make's, relative to ROOT as make wants it; setuptools gets a folder within


def version() -> str:
    found = re.findall(r"^#define ETAP_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", HEADER.read_text(), flags=re.MULTILINE)
    return ".".join(found)


class BuildWithLibrary(build_py):
    def run(self) -> None:
        super().run()
        library, knobs = BUILD / "libetap.so", [f"BUILD={BUILD}"]
        platform = self.get_finalized_command("bdist_wheel").plat_name
        if other := re.fullmatch(r"manylinux_\d+_\d+_(\w+)", platform):
            library, knobs = BUILD / platform / "libetap.so", [*knobs, f"ARCH={other[1]}"]
        subprocess.run(["make", f"-j{os.cpu_count()}", *knobs, str(library)], cwd=ROOT, check=True)
        if self.editable_mode:  # the package finds header and library in the source tree
            return
        package = Path(self.build_lib) / "etap_py"
        shutil.copy(HEADER, package)
        shutil.copy(ROOT / library, package)
        if (probe := ROOT / library.with_name("libetap_probe.so")).exists():  # where the library has CUDA
            shutil.copy(probe, package)


class WithBinaries(Distribution):
    def has_ext_modules(self) -> bool:
        return True  # a wheel of this platform, although no extension module is compiled


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


BUILD.mkdir(parents=True, exist_ok=True)
setup(
    version=version(),
    distclass=WithBinaries,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": AnyPythonWheel},
    options={"build": {"build_base": str(BUILD / "wheel")}, "egg_info": {"egg_base": str(BUILD)}},
)
