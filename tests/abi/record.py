"""The binary interface of libetap as data: exported symbols, structs, enums and constants of etap.h.

    python tests/abi/record.py             prints what the header and build/libetap.so have now
    python tests/abi/record.py --write     makes that the record, tests/abi/abi.json

Within one ETAP_ABI_VERSION the record only grows: symbols are added, structs get fields at their ends.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "libetap" / "include" / "etap.h"
LIBRARY = ROOT / os.environ.get("ETAP_BUILD", "build") / "libetap.so"  # what make's knob BUILD says
RECORD = Path(__file__).with_name("abi.json")


def exported_symbols(library: Path = LIBRARY) -> list[str]:
    """Names with their versions, "etap_run@@ETAP_1"."""
    output = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    fields = [line.split() for line in output.splitlines()]
    return sorted(name for _, kind, name in fields if kind != "A")  # A: the version itself


def needed_libraries(library: Path = LIBRARY) -> list[str]:
    output = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    return sorted(re.findall(r"\(NEEDED\).*\[(.*)\]", output))


def soname(library: Path = LIBRARY) -> str:
    output = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(SONAME\).*\[(.*)\]", output)[0]


def header_layout() -> dict[str, Any]:
    """What a C compiler makes of etap.h: sizes and offsets of structs, values of enums and version macros."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    structs = {
        name: re.findall(r"(\w+)(?:\[\w+\])?;", body)
        for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", text, flags=re.DOTALL)
    }
    enums = re.findall(r"\b(ETAP_\w+) = ", text) + re.findall(r"^\s*X\((\w+), \d+", text, flags=re.MULTILINE)
    constants = [name if name.startswith("ETAP_") else f"ETAP_{name}" for name in enums]
    constants += re.findall(r"#define (ETAP_\w*VERSION\w*)", text)
    lines = []
    for struct, fields in structs.items():
        lines.append(f'printf("{struct} . %zu\\n", sizeof({struct}));')
        lines += [f'printf("{struct} {field} %zu\\n", offsetof({struct}, {field}));' for field in fields]
    lines += [f'printf("- {name} %d\\n", (int){name});' for name in constants if "##" not in name]
    program = '#include <stdio.h>\n#include "etap.h"\nint main(void) {\n' + "\n".join(lines) + "\nreturn 0;\n}\n"
    layout: dict[str, Any] = {"structs": {}, "constants": {}}
    for line in _compile_and_run(program).splitlines():
        struct, name, value = line.split()
        if struct == "-":
            layout["constants"][name] = int(value)
        elif name == ".":
            layout["structs"][struct] = {"size": int(value), "offsets": {}}
        else:
            layout["structs"][struct]["offsets"][name] = int(value)
    return layout


def _compile_and_run(program: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "layout.c"), Path(folder, "layout")
        source.write_text(program)
        compiler = os.environ.get("CC", "gcc")
        subprocess.run([compiler, "-std=c99", f"-I{HEADER.parent}", source, "-o", binary], check=True)
        return subprocess.run([binary], check=True, capture_output=True, text=True).stdout


def current() -> dict[str, Any]:
    return {"soname": soname(), "symbols": exported_symbols(), **header_layout()}


if __name__ == "__main__":
    text = json.dumps(current(), indent=2) + "\n"
    if "--write" in sys.argv[1:]:
        RECORD.write_text(text)
    else:
        print(text, end="")
