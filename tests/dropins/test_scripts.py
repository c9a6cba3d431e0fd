"""The programs in docs/from-*.md run as they stand, and with their import line as it was before ETAP."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import etap_flash_attn_3
import etap_flashmla
import pytest
from etap_flashinfer import mla

DOCS = Path(__file__).resolve().parents[2] / "docs"
PEERS = {
    "from-flashmla.md": ("flash_mla", etap_flashmla),
    "from-flashinfer.md": ("flashinfer.mla", mla),
    "from-flash-attention-3.md": ("flash_attn_interface", etap_flash_attn_3),
}


@pytest.mark.parametrize("page", PEERS)
def test_program(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says that one line changes. Here the peer's module is ETAP's under the peer's name."""
    text = (DOCS / page).read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    before, after = re.findall(r"^[-+](from .*)$", text, flags=re.MULTILINE)
    name, module = PEERS[page]
    assert before == after.replace(module.__name__, name)
    assert program.count(after) == 1
    exec(compile(program, page, "exec"), {})
    if "." in name:
        monkeypatch.setitem(sys.modules, name.partition(".")[0], sys.modules["etap_flashinfer"])
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(program.replace(after, before), page, "exec"), {})


@pytest.mark.parametrize("page", PEERS)
def test_every_argument_is_in_the_tables(page: str) -> None:
    """A parameter that the tables forget is one of which nobody knows whether it counts."""
    functions = {
        "from-flashmla.md": [etap_flashmla.flash_mla_with_kvcache],
        "from-flashinfer.md": [
            mla.BatchMLAPagedAttentionWrapper,
            mla.BatchMLAPagedAttentionWrapper.plan,
            mla.BatchMLAPagedAttentionWrapper.run,
        ],
        "from-flash-attention-3.md": [etap_flash_attn_3.flash_attn_with_kvcache],
    }[page]
    tables = "\n".join(line for line in (DOCS / page).read_text().splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([a-z0-9_]+)", tables))
    for function in functions:
        missing = set(inspect.signature(function).parameters) - named - {"self"}
        assert not missing, f"{page} says nothing of {sorted(missing)}"
