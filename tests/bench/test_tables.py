"""scripts/tables.py: what README and docs say was measured is what is stored."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_history import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables() -> ModuleType:
    return load("tables")


@pytest.mark.parametrize("page", ["README.md", "docs/measured.md", "docs/theory.md"])
def test_pages_are_what_the_script_writes(tables: ModuleType, page: str) -> None:
    """Guards: a table that was edited by hand, or a run that was stored and not shown."""
    assert ROOT / page in tables.PAGES
    text = (ROOT / page).read_text()
    assert tables.TABLE.search(text)
    assert text == tables.written(text), "scripts/tables.py writes them again"


def store(tables: ModuleType, folder: Path, *runs: dict[str, Any]) -> None:
    for file, _ in tables.CARDS.values():
        (folder / file).write_text(json.dumps({"runs": runs}))
    tables.STORE = folder


def run(commit: str, us: float, *names: str) -> dict[str, Any]:
    row = {"etap_us": us, "ceiling_us": 10.0, "fraction": 10.0 / us, "terabytes_per_second": 1.0, "plan_us": 2.0, "error": 1e-3}
    return {"date": "2026-01-01", "commit": commit, "card": "NVIDIA X1", "rows": dict.fromkeys(names, row)}


def test_the_last_run_of_a_shape_counts(tables: ModuleType, tmp_path: Path) -> None:
    """A later run of some shapes replaces these only, and the table says which commit each part is of."""
    shapes = (*tables.COMPARED, *tables.FP8)
    store(tables, tmp_path, run("aaaaaaa", 20.0, *shapes), run("bbbbbbb", 12.5, *shapes[:2]))
    text = tables.written("<!-- table h200 -->\nold\n<!-- end of table -->\n<!-- table compared -->\n<!-- end of table -->")
    assert "old" not in text
    assert "kernels of aaaaaaa, 2026-01-01; 2 shapes: bbbbbbb, 2026-01-01" in text
    (first,) = re.findall(rf"^\| `{re.escape(shapes[0])}` .*", text, flags=re.MULTILINE)
    (third,) = re.findall(rf"^\| `{re.escape(shapes[2])}` .*", text, flags=re.MULTILINE)
    assert "12.5 | 1.00 | 0.80" in first
    assert "20.0 | 1.00 | 0.50" in third


def test_an_unknown_table_is_an_error(tables: ModuleType) -> None:
    with pytest.raises(KeyError, match="nothing"):
        tables.written("<!-- table nothing -->\n<!-- end of table -->")
