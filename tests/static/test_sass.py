"""The machine code of build/libetap.so, checked without a GPU. A kernel added to the library is checked with no change here."""

from __future__ import annotations

from pathlib import Path

import pytest
import sass

LIBRARY = Path(__file__).resolve().parents[2] / "build" / "libetap.so"
EXACT_TILES = {8, 16, 24, 32, 40, 48, 56, 64}


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
    """Exact N is the point of the transposition: a kernel for tiles of 16 rows whose WGMMAs are 64 wide pays for the padding."""
    for kernel in kernels:
        widths = {n for _, n, _ in kernel.matrix_shapes}
        assert widths <= {kernel.tile}, f"{kernel.name}: tile {kernel.tile}, WGMMA widths {sorted(widths)}"


def test_decode_kernels_use_the_tensor_cores(kernels: list[sass.Kernel]) -> None:
    """A decode kernel (one named for a tile) whose matrix products the compiler dropped or scalarised would pass the tests above."""
    named_for_a_tile = [k for k in kernels if k.tile in EXACT_TILES and "split" in k.name]
    assert named_for_a_tile, "no decode kernel found: names changed?"
    idle = [k.name for k in named_for_a_tile if not k.matrix_shapes]
    assert not idle


def test_every_tile_has_a_kernel(kernels: list[sass.Kernel]) -> None:
    """Rows are padded to the next multiple of 8, so a missing tile means padding that the library promises not to do."""
    tiles = {k.tile for k in kernels if k.matrix_shapes}
    assert tiles >= EXACT_TILES, f"no kernel for tiles of {sorted(EXACT_TILES - tiles)} rows"
