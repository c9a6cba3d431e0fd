"""scripts/tables.py: what README and docs say was measured is what is stored."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from etap_bench import results
from etap_bench.results import Results
from test_history import run_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/measured.md", "docs/theory.md"])
def test_pages_are_what_the_script_writes(tables: ModuleType, page: str) -> None:
    """Guards: a table that was edited by hand, or a run that was stored and not shown."""
    assert ROOT / page in tables.PAGES
    text = (ROOT / page).read_text()
    assert tables.TABLE.search(text)
    assert text == tables.written(text), "scripts/tables.py writes them again"


def store(tables: ModuleType, folder: Path, *runs: Results) -> None:
    for card, _ in tables.CARDS.values():
        (folder / card).mkdir()
        for number, one in enumerate(runs):
            results.write(folder / card / f"{number:03}-x.json", one)
    tables.STORE = folder


def run(commit: str, us: float, *names: str) -> Results:
    made = run_of(dict.fromkeys(names, us), commit=commit)
    for row in made.rows:
        row.measured.plan_us, row.measured.error = 2.0, {"etap": 1e-3}
    return made


def test_the_last_run_of_a_shape_counts(tables: ModuleType, tmp_path: Path) -> None:
    """A later run of some shapes replaces these only, and the table says which commit each part is of."""
    shapes = (*tables.COMPARED, *tables.FP8)
    store(tables, tmp_path, run("aaaaaaa", 20.0, *shapes), run("bbbbbbb", 12.5, *shapes[:2]))
    text = tables.written("<!-- table h200 -->\nold\n<!-- end of table -->\n<!-- table compared -->\n<!-- end of table -->")
    assert "old" not in text
    assert "kernels of aaaaaaa, 2026-01-02; 2 shapes: bbbbbbb, 2026-01-02" in text
    (first,) = re.findall(rf"^\| `{re.escape(shapes[0])}` .*", text, flags=re.MULTILINE)
    (third,) = re.findall(rf"^\| `{re.escape(shapes[2])}` .*", text, flags=re.MULTILINE)
    assert "12.5 | 0.38 | 0.80" in first
    assert "20.0 | 0.94 | 0.50" in third


def test_an_unknown_table_is_an_error(tables: ModuleType) -> None:
    with pytest.raises(KeyError, match="nothing"):
        tables.written("<!-- table nothing -->\n<!-- end of table -->")
