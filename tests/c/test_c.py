"""The C programs of this folder, as `make programs` and `make sanitizers` built them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("ETAP_BUILD", "build")  # what make's knob BUILD says
# Instruction sets, and what Linux calls the processor's features that each needs (libetap/src/cpu/isa.cc).
NEEDS = {"avx512_bf16": {"avx512_bf16", "avx512bw"}, "avx512": {"avx512f", "avx512bw"}, "avx2": {"avx2", "fma", "f16c"}, "portable": set()}
ISAS = list(NEEDS)
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


def run(program: Path, *arguments: object, **environment: str) -> str:
    """The program's output. Fails with all that it printed when it does not end with status 0."""
    if not program.exists():
        pytest.fail(f"{program} is not there; `make programs sanitizers` builds it")
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{command} with {environment} ended with status {done.returncode}:\n{output}"
    return output


def skip_without(isa: str) -> None:
    """Skips a test where the processor lacks an instruction set, as the kernel of the system tells. Where it has it, a refusal of the CPU
    device fails the test."""
    flags = re.findall(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    if not NEEDS[isa] <= set(flags[0].split() if flags else ()):
        pytest.skip(f"this processor has no {isa}")


@pytest.mark.parametrize("language", ["", "_cxx"])
def test_contract(seed: int, language: str) -> None:
    """Guards: a bad argument that is launched, that goes unexplained, or that leaves outputs half written; and the header
    as C99 (with -pedantic) and as C++."""
    run(BUILD / "tests" / f"test_contract{language}", seed)


@pytest.mark.parametrize("isa", ISAS)
def test_matrix(seed: int, isa: str) -> None:
    """Guards: wrong numbers of one instruction set's kernel, reads of unused pages and rows (they are NaN), writes between
    results, and bits that differ between two equal calls."""
    skip_without(isa)
    run(BUILD / "tests" / "test_matrix", seed, 150, ETAP_CPU_ISA=isa)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_matrix_threads(seed: int, threads: int) -> None:
    """Guards: wrong sums of pieces that different threads made, more threads than processors among them."""
    run(BUILD / "tests" / "test_matrix", seed, 100, ETAP_NUM_THREADS=str(threads))


@pytest.mark.parametrize("isa", ISAS)
def test_formats(isa: str) -> None:
    """Guards: a bit pattern that one conversion gets wrong (subnormals, NaN, the largest numbers), and roundings that are
    not to nearest, ties to even."""
    skip_without(isa)
    run(BUILD / "tests" / "test_formats", ETAP_CPU_ISA=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_exponent(seed: int, isa: str) -> None:
    """Guards: wrong weights far below the largest one, near 2^-126, of NaN and of infinity; and, under UBSan, integers that
    overflow in them."""
    skip_without(isa)
    run(BUILD / "tests" / "test_exponent", seed, ETAP_CPU_ISA=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_sparse(seed: int, isa: str) -> None:
    """Guards: holes in lists of slots that are read or counted, and lists, counts and slots that are launched though they can't be."""
    skip_without(isa)
    run(BUILD / "tests" / "test_sparse", seed, ETAP_CPU_ISA=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_tree(seed: int, isa: str) -> None:
    """Guards: wrong bits of a tree mask at the borders of its words and of blocks of tokens, a mask that hides what is before the drafts,
    one that is not what a causal mask is, and NaN in drafts that a row does not see."""
    skip_without(isa)
    run(BUILD / "tests" / "test_tree", seed, 24, ETAP_CPU_ISA=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_prefix(seed: int, isa: str) -> None:
    """Guards: rows of a prefix's tile that reach another sequence, a prefix that is read past its end, counted twice or not at all, and
    bits that differ between two equal calls."""
    skip_without(isa)
    run(BUILD / "tests" / "test_prefix", seed, 24, ETAP_CPU_ISA=isa)


def test_far(seed: int) -> None:
    """Guards: page number times stride in 32 bits, the most repeated bug of the field."""
    run(BUILD / "tests" / "test_far", seed)


def test_invariance(seed: int) -> None:
    """Guards: batch-invariant mode that isn't, and a caller's rounding mode or flush-to-zero that changes results."""
    run(BUILD / "tests" / "test_invariance", seed, 50, ETAP_NUM_THREADS="4")


def test_threads(seed: int) -> None:
    """Guards: two threads on one plan that disturb each other's results or messages."""
    run(BUILD / "tests" / "test_threads", seed, ETAP_NUM_THREADS="4")


def test_fork(seed: int) -> None:
    """Guards: a child of fork that waits for threads it does not have (PyTorch data loaders fork after import)."""
    run(BUILD / "tests" / "test_fork", seed, ETAP_NUM_THREADS="4")


def test_example() -> None:
    """Guards: an example that no longer does what it says."""
    assert "out[0] = 49.5 " in run(BUILD / "decode")


@pytest.mark.parametrize("standard", ["c99", "c11", "c17", "c++11", "c++14", "c++17", "c++20", "c++23"])
def test_initialiser(standard: str, tmp_path: Path) -> None:
    """Guards: ETAP_INIT that floods a build with -Wextra, in C or in C++, or that leaves a field unset."""
    structs = re.findall(r"typedef struct (\w+) \{", (ROOT / "libetap" / "include" / "etap.h").read_text())
    assert len(structs) == 7
    body = "".join(
        f"""  {{
    {name} made = ETAP_INIT({name});
    const {name} fixed = ETAP_INIT({name});
    static {name} kept = ETAP_INIT({name});
    {name} many[2] = {{ETAP_INIT({name}), ETAP_INIT({name})}};
    {name} zero;
    memset(&zero, 0, sizeof zero);
    zero.size = sizeof zero;
    wrong += memcmp(&made, &zero, sizeof zero) || memcmp(&fixed, &zero, sizeof zero) || memcmp(&kept, &zero, sizeof zero);
    wrong += memcmp(&many[1], &zero, sizeof zero) != 0;
  }}
"""
        for name in structs
    )
    cxx = standard.startswith("c++")
    source = tmp_path / ("program.cc" if cxx else "program.c")
    source.write_text(f'#include <string.h>\n#include "etap.h"\nint main(void) {{\n  int wrong = 0;\n{body}  return wrong;\n}}\n')
    warnings = ["-Wall", "-Wextra", "-pedantic", "-Werror", "-Wshadow", "-Wconversion"]
    compiler = os.environ.get("CXX", "g++") if cxx else os.environ.get("CC", "gcc")
    command = [compiler, f"-std={standard}", "-O1", *warnings, f"-I{ROOT}/libetap/include", source, "-o", tmp_path / "program"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run(tmp_path / "program")


@pytest.mark.skipif("MAKELEVEL" not in os.environ, reason="only under make: what it installs was built with its knobs")
@pytest.mark.parametrize("folder", ["plain", "with blanks", "with 'quotes' & more"])
def test_install(folder: str, tmp_path: Path) -> None:
    """Guards: an installation that programs can't be built with, through pkg-config where there is one; a prefix with blanks
    that ends in the middle, with folders of half its name."""
    prefix = tmp_path / folder
    knobs = [f"PREFIX={prefix}", f"BUILD={os.environ['ETAP_BUILD']}"]
    subprocess.run(["make", "-s", "install", *knobs], cwd=ROOT, check=True)
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    assert os.readlink(prefix / "lib" / "libetap.so") == "libetap.so.0"
    flags = [f"-I{prefix}/include", f"-L{prefix}/lib", "-letap"]
    if shutil.which("pkg-config"):
        environment = os.environ | {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
        command = ["pkg-config", "--cflags", "--libs", "etap"]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        assert shlex.split(output) == flags
    program = tmp_path / "decode"
    source = ROOT / "examples" / "decode.c"
    subprocess.run(["gcc", source, *flags, f"-Wl,-rpath,{prefix}/lib", "-lm", "-o", program], check=True)
    assert "out[0] = 49.5 " in run(program)


@pytest.mark.parametrize(("name", "value", "allowed"), [("ETAP_CPU_ISA", "mmx", "portable"), ("ETAP_NUM_THREADS", "many", "1 to 1024")])
def test_bad_environment(name: str, value: str, allowed: str) -> None:
    """Guards: a mistyped environment variable that is ignored. The device says that it can't be used, and why."""
    done = subprocess.run([BUILD / "decode"], env=os.environ | {name: value}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f'{name} is "{value}"; allowed' in done.stderr
    assert allowed in done.stderr


@pytest.mark.sanitizer
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(("contract", ()), ("contract_cxx", ()), ("matrix", (40,)), ("exponent", ()), ("sparse", ()), ("tree", (12,)), ("prefix", (12,))),
        *(("invariance", (10,)), ("threads", ()), ("fork", ())),
    ],
)
def test_address_sanitizer(seed: int, name: str, arguments: tuple[int, ...]) -> None:
    """Guards: accesses out of bounds or after free, leaks, and undefined behaviour (AddressSanitizer, UBSan)."""
    run(BUILD / "address" / "tests" / f"test_{name}", seed, *arguments, ETAP_NUM_THREADS="3", **SANITIZER_OPTIONS)


@pytest.mark.sanitizer
@pytest.mark.parametrize("isa", ISAS[1:])
def test_address_sanitizer_isa(seed: int, isa: str) -> None:
    """Guards: the same in the kernels that this processor would not choose."""
    skip_without(isa)
    run(BUILD / "address" / "tests" / "test_matrix", seed, 20, ETAP_CPU_ISA=isa, **SANITIZER_OPTIONS)
    run(BUILD / "address" / "tests" / "test_exponent", seed, ETAP_CPU_ISA=isa, **SANITIZER_OPTIONS)


@pytest.mark.sanitizer
@pytest.mark.parametrize(("name", "arguments"), [("threads", ()), ("matrix", (15,)), ("invariance", (5,)), ("prefix", (8,))])
def test_thread_sanitizer(seed: int, name: str, arguments: tuple[int, ...]) -> None:
    """Guards: data races between callers, and between the threads of the pool (ThreadSanitizer)."""
    run(BUILD / "thread" / "tests" / f"test_{name}", seed, *arguments, ETAP_NUM_THREADS="3")
