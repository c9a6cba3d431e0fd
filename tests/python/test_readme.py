"""The Python examples of the README run, in order, as a reader would type them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def examples() -> list[str]:
    readme = ROOT / "README.md"
    return re.findall(r"^```python\n(.*?)^```$", readme.read_text(), flags=re.DOTALL | re.MULTILINE) if readme.is_file() else []


@pytest.mark.parametrize("code", examples(), ids=lambda code: code.splitlines()[0][:40])
def test_example(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_c_example_is_the_program() -> None:
    """The C program in the README is the one that tests/c builds and runs, word for word."""
    shown = re.findall(r"^```c\n(.*?)^```$", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert shown == [(ROOT / "examples" / "decode.c").read_text()]
