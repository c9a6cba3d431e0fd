"""What the compiler made of the CUDA kernels: resources and instructions of every kernel of a library, read from its machine code.

    python tests/static/sass.py build/libetap.so        # the compile report

Needs `cuobjdump` and `nvdisasm`: from a CUDA toolkit on PATH, from the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm,
or the copies that Triton's package carries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The instructions that multiply matrices: warp-wide (the older path) and warpgroup-wide (WGMMA).
WARP_MATRIX = ("HMMA", "IMMA", "DMMA", "QMMA", "BMMA")
WARPGROUP_MATRIX = ("HGMMA", "IGMMA", "QGMMA", "BGMMA")


class NoDisassembler(Exception):
    """A tool is missing; the text says which."""


@dataclass(frozen=True)
class Kernel:
    name: str  # demangled, without parameters: "etap::sm90::token_split_kernel<etap::sm90::TokenSplit<__nv_bfloat16, 16, 512, 64> >"
    registers: int
    stack_bytes: int
    local_bytes: int
    opcodes: Counter[str]  # full mnemonics: {"HGMMA.64x16x16.F32.BF16": 36, ...}

    @property
    def tile(self) -> int | None:
        """The first integer among the template arguments: by convention the query rows of a tile."""
        found = re.search(r"[<,] *(\d+) *[,>]", self.name)
        return int(found[1]) if found else None

    @property
    def matrix_shapes(self) -> set[tuple[int, int, int]]:
        """(M, N, K) of the warpgroup matrix instructions."""
        found = (re.match(r"[A-Z]GMMA\.(\d+)x(\d+)x(\d+)", opcode) for opcode in self.opcodes)
        return {(int(m[1]), int(m[2]), int(m[3])) for m in found if m}

    def count(self, *stems: str) -> int:
        """Instructions of these kinds: count("LDL", "STL")."""
        return self.of(*stems).total()

    def of(self, *stems: str) -> Counter[str]:
        """The full mnemonics of these kinds, and how often each occurs."""
        return Counter({opcode: n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in stems})


def _tool_folders() -> Iterator[Path]:
    yield from (Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder)
    packages = Path(sysconfig.get_path("purelib"))
    yield from sorted(packages.glob("nvidia/cu*/bin"), reverse=True)
    yield packages / "triton/backends/nvidia/bin"


def _cuobjdump(*arguments: str) -> str:
    """Its output; "" for a file without device code."""
    for folder in _tool_folders():
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            env = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
            command = [str(folder / "cuobjdump"), *arguments]
            result = subprocess.run(command, env=env, capture_output=True, text=True)
            if result.returncode and "does not contain device code" not in result.stderr:
                raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
            return result.stdout
    raise NoDisassembler("cuobjdump and nvdisasm are neither on PATH nor in an installed package")


def _demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        raise NoDisassembler("c++filt (binutils) is not on PATH")
    return subprocess.run([tool, "-p"], input="\n".join(names), check=True, capture_output=True, text=True).stdout.splitlines()


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of the library, in the order of its file; an empty list when it carries no device code."""
    resources = {
        found[1]: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", found[2])}
        for found in re.finditer(r"^ Function (\S+):\n +(.*)$", _cuobjdump("-res-usage", str(library)), flags=re.MULTILINE)
    }
    opcodes: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in _cuobjdump("-sass", str(library)).splitlines():
        if "Function :" in line:
            current = opcodes.setdefault(line.split("Function :")[1].strip(), Counter())
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\S*)", line):
            current[found[1]] += 1
    names = list(opcodes)
    if not names:
        return []
    return [
        Kernel(
            name=re.sub(r"^(?:void|int) ", "", demangled),
            registers=resources[name]["REG"],
            stack_bytes=resources[name]["STACK"],
            local_bytes=resources[name]["LOCAL"],
            opcodes=opcodes[name],
        )
        for name, demangled in zip(names, _demangle(names), strict=True)
    ]


def report(found: list[Kernel]) -> str:
    lines = [f"{'registers':>9}{'stack':>7}{'local':>7}{'instructions':>14}  {'matrix instructions':<36}kernel"]
    for kernel in found:
        matrix = ", ".join(f"{n} {opcode}" for opcode, n in sorted(kernel.of(*WARP_MATRIX, *WARPGROUP_MATRIX).items()))
        lines.append(
            f"{kernel.registers:>9}{kernel.stack_bytes:>7}{kernel.local_bytes:>7}{kernel.opcodes.total():>14}  {matrix or '-':<36}"
            f"{kernel.name}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(kernels(Path(sys.argv[1]))))
