"""Finds what the tests of this folder share."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # demo_lib: the small checkpoint, the comparison of answers
sys.path.append(str(Path(__file__).parent))
