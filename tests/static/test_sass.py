"""The machine code of build/libetap.so, checked without a GPU. A kernel added to the library is checked with no change here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sass

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "build" / "libetap.so"
CATALOG = re.findall(r"^KERNEL\((\w+), (\d+)\)$", (ROOT / "libetap/src/sm90/catalog.def").read_text(), flags=re.MULTILINE)
TILES = {int(rows) for family, rows in CATALOG if family != "rows_on_m"}


@pytest.fixture(scope="module")
def kernels() -> list[sass.Kernel]:
    if not LIBRARY.exists():
        pytest.skip("build/libetap.so is not there: run make")
    try:
        found = [kernel for kernel in sass.kernels(LIBRARY) if kernel.name.startswith(("etap", "etap::"))]
    except sass.NoDisassembler as missing:
        pytest.skip(str(missing))
    if not found:
        pytest.skip("build/libetap.so was built without CUDA: make found no nvcc")
    print("\n" + sass.report(found))
    return found


def test_no_kernel_touches_local_memory(kernels: list[sass.Kernel]) -> None:
    """Guards against register spills and run-time indexed register arrays: each such access is a trip to L1 in the inner loop."""
    offenders = {k.name: k for k in kernels if k.count("LDL", "STL") or k.stack_bytes or k.local_bytes}
    assert not offenders, "\n" + sass.report(list(offenders.values()))


def test_only_warpgroup_matrix_instructions(kernels: list[sass.Kernel]) -> None:
    """Guards against falling back to the older, slower warp-wide matrix path."""
    offenders = {k.name: dict(k.of(*sass.WARP_MATRIX)) for k in kernels if k.count(*sass.WARP_MATRIX)}
    assert not offenders


def test_matrix_instructions_have_the_width_of_the_tile(kernels: list[sass.Kernel]) -> None:
    """Exact N is the point of the transposition: a kernel for tiles of 16 rows whose WGMMAs are 64 wide pays for the padding. With rows on
    M the widths are a block's tokens and half of V's dims; beside eight producer warps 128 dims are the most (C7602)."""
    for kernel in kernels:
        widths = {n for _, n, _ in kernel.matrix_shapes}
        if "rows_on_m" in kernel.name:
            most = 128 if re.search(r"KvCopy\)[234]", kernel.name) else 256
            assert kernel.tile is not None and widths == {64, min(kernel.tile // 2, most)}, f"{kernel.name}: WGMMA widths {sorted(widths)}"
            continue
        assert not widths or widths == {kernel.tile}, f"{kernel.name}: tile {kernel.tile}, WGMMA widths {sorted(widths)}"


def test_every_tile_multiplies_matrices(kernels: list[sass.Kernel]) -> None:
    """A tile that was left out of the build, or whose products the compiler turned into scalar code, would pass the tests above."""
    assert {8, 16, 24, 32} <= TILES
    tiles = {k.tile for k in kernels if k.matrix_shapes and "rows_on_m" not in k.name}
    assert any("rows_on_m" in k.name for k in kernels)
    assert tiles >= TILES, f"no kernel with matrix instructions for tiles of {sorted(TILES - tiles)} rows"
    idle = [k.name for k in kernels if k.tile in TILES and not k.matrix_shapes]
    assert not idle
