"""What the packages of this folder share: each one's setup.py runs this file in its own folder.

The version is libetap's, as that of etap-py is, and etap-py of the same version is required: ETAP_PY, with the extras that the package
wants. More requirements stand in a package's requirements.txt. etap-bench, in ../bench, does the same.
"""

import re
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parents[1]
HEADER = (ROOT / "libetap" / "include" / "etap.h").read_text()
VERSION = ".".join(re.findall(r"^#define ETAP_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", HEADER, flags=re.MULTILINE))

shutil.copy(ROOT / "LICENSE", "LICENSE")  # setuptools takes no file from outside the package's folder
lines = Path("requirements.txt").read_text().splitlines() if Path("requirements.txt").exists() else []
others = [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]
setup(version=VERSION, install_requires=[f"{ETAP_PY}=={VERSION}", *others])  # noqa: F821 (setup.py gives it)
