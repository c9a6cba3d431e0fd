"""The promise of etap.h: within one ABI version symbols are never removed or changed, and structs only grow."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest


def _load_record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("abi_record", Path(__file__).with_name("record.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record = _load_record()
HOW = "if that is meant, and only adds, `python tests/abi/record.py --write` renews the record"


@pytest.mark.parametrize("part", ["soname", "symbols", "structs", "constants"])
def test_record(part: str) -> None:
    """Guards: a symbol, field or value that changes under programs built before."""
    recorded = json.loads(record.RECORD.read_text())
    assert record.current()[part] == recorded[part], HOW


def test_only_etap_symbols() -> None:
    """Guards: symbols of the C++ or CUDA run-time that leak out and collide with another library's."""
    strangers = [name for name in record.exported_symbols() if not re.fullmatch(r"etap_\w+@@ETAP_\d+", name)]
    assert strangers == []


def test_needed_libraries() -> None:
    """Guards: a library that can't be loaded on a machine without a GPU driver, or with another C++ run-time."""
    allowed = re.compile(r"(libc|libm|libdl|librt|libpthread|ld-linux.*)\.so\.\d+")
    assert [name for name in record.needed_libraries() if not allowed.fullmatch(name)] == []


def test_first_released_sizes() -> None:
    """Guards: a `first_released` size of validate.h that is raised together with a struct, which would refuse programs
    built before. These numbers never change; a struct of the record may be larger."""
    source = (record.ROOT / "libetap" / "src" / "validate.h").read_text()
    sizes = dict(re.findall(r"struct first_released<(\w+)> \{\s*static constexpr uint32_t size = (\d+)", source))
    structs = json.loads(record.RECORD.read_text())["structs"]
    first = {"etap_device_info": 416, "etap_problem": 72, "etap_decision": 344}
    first |= {"etap_plan_args": 48, "etap_shared": 24, "etap_run_args": 224, "etap_merge_args": 160}
    assert {name: int(size) for name, size in sizes.items()} == first
    assert sorted(structs) == sorted(first)
    assert all(structs[name]["size"] >= size for name, size in first.items())
