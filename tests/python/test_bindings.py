"""The two bindings of the C interface, by one suite."""

from __future__ import annotations

import ctypes.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, STRUCTS, Cffi, Ctypes
from cases import Case, check, make_inputs, reference

import etap_py
from etap_py import binding
from etap_py.header import declarations, header_path


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


def small_problem(backend: Any, **overrides: int) -> Any:
    fields = {"num_heads": 16, "d_latent": 512, "d_rope": 64, "page_size": 64, "batch": 3, "max_query_len": 1, "flags": 1}
    return backend.new("etap_problem", **{**fields, **overrides})


def test_functions_are_those_of_the_header(backend: Any) -> None:
    """Every function that etap.h declares, and no other."""
    declared = set(re.findall(r"\b(etap_\w+)\(", declarations(header_path().read_text())))
    assert len(declared) == 15
    assert all(callable(getattr(backend.lib, name)) for name in declared)
    assert set(Ctypes.shim.FUNCTIONS) == declared


@pytest.mark.parametrize("struct", STRUCTS)
def test_structs_agree(struct: str) -> None:
    """The shim repeats the header's structs, as it must work alone: names, order, offsets and sizes must be the header's."""
    assert Ctypes.layout(struct) == Cffi.layout(struct)


def test_constants_agree() -> None:
    """The shim's numbers are the header's, and none of the header's is missing."""
    enums = re.findall(r"\b(ETAP_\w+) = \w+", declarations(header_path().read_text()))
    names = [name for name in enums if name != "ETAP_STATUS_MAX"] + ["ETAP_ABI_VERSION"]
    assert len(names) > 25
    assert {name: Ctypes.constant(name) for name in names} == {name: Cffi.constant(name) for name in names}


def test_compiler_agrees_about_sizes(tmp_path: Path) -> None:
    """What the C compiler says about the header is what the declarations made from it say."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = "".join(f'printf("{s} %zu\\n", sizeof({s}));' for s in STRUCTS)
    source = tmp_path / "sizes.c"
    source.write_text(f'#include <stdio.h>\n#include "etap.h"\nint main(void) {{ {lines} return 0; }}\n')
    program = tmp_path / "sizes"
    subprocess.run([compiler, f"-I{header_path().parent}", source, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert dict(line.split() for line in printed.splitlines()) == {s: str(Cffi.layout(s)[0]) for s in STRUCTS}


def test_versions(backend: Any) -> None:
    assert backend.lib.etap_abi_version() == backend.constant("ETAP_ABI_VERSION")
    number = backend.lib.etap_version()
    assert etap_py.__version__ == f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def test_status_names(backend: Any) -> None:
    for name in ("ETAP_OK", "ETAP_UNSUPPORTED", "ETAP_INTERNAL_ERROR"):
        assert backend.text(backend.lib.etap_status_name(backend.constant(name))) == name
    assert backend.text(backend.lib.etap_status_name(12345)) == "ETAP_UNKNOWN"
    assert "never allowed" in backend.text(backend.lib.etap_status_message(1))


def test_query(backend: Any) -> None:
    decision = backend.new("etap_decision")
    backend.check(backend.lib.etap_query(small_problem(backend), decision))
    assert backend.text(decision.kernel).startswith("cpu_")
    assert backend.text(decision.reason)
    assert decision.max_splits >= 1


def test_check_raises_the_librarys_message(backend: Any) -> None:
    with pytest.raises(RuntimeError, match=r"num_heads is 129; allowed: 1 to 128 \(ETAP_INVALID_ARGUMENT\)"):
        backend.check(backend.lib.etap_query(small_problem(backend, num_heads=129), backend.null))


def test_wrong_struct_size_is_refused(backend: Any) -> None:
    """A size that no release had: a caller that forgot to fill it in, or filled it with garbage."""
    for size in (0, 4, 1 << 30):
        problem = small_problem(backend)
        problem.size = size
        with pytest.raises(RuntimeError, match=rf"etap_problem.size is {size}; .*ETAP_ABI_MISMATCH"):
            backend.check(backend.lib.etap_query(problem, backend.null))


@pytest.mark.parametrize("drafts", [0, 3])
def test_decode(backend: Any, drafts: int, seed: int) -> None:
    """A whole life of a call: size, plan, update, run, destroy. With drafts: of a tree."""
    case = Case("drafts", lens=(100, 0, 65), query_len=drafts, tree_mask="random") if drafts else Case("binding", lens=(100, 0, 65))
    inputs = make_inputs(case, seed)
    out, lse = inputs.outputs()
    flag = backend.constant("ETAP_TREE_MASK" if drafts else "ETAP_CAUSAL")
    problem = small_problem(backend, max_query_len=case.query_len, flags=flag)
    size = backend.size_out()
    backend.check(backend.lib.etap_workspace_size(problem, size))
    memory = torch.full((backend.read(size) + 256,), 0xFF, dtype=torch.uint8)
    workspace = {"workspace": backend.address(memory.data_ptr() + -memory.data_ptr() % 256), "workspace_bytes": backend.read(size)}
    plan = backend.plan_out()
    backend.check(backend.lib.etap_plan_create(problem, plan))
    keep = inputs.cache_seqlens
    lens = {"cache_seqlens": keep.data_ptr()} if backend is Ctypes else {"cache_seqlens": binding.ffi.cast("int32_t *", keep.data_ptr())}
    backend.check(backend.lib.etap_plan_update(backend.read(plan), backend.new("etap_plan_args", batch=3, **lens, **workspace)))

    def pointer(tensor: torch.Tensor, kind: str = "void") -> Any:
        return tensor.data_ptr() if backend is Ctypes else binding.ffi.cast(f"{kind} *", tensor.data_ptr())

    assert inputs.q_rope is not None
    mask: dict[str, Any] = {}
    if inputs.tree_mask is not None:
        mask = {"tree_mask": pointer(inputs.tree_mask, "uint32_t"), "tree_mask_stride": inputs.tree_mask.stride(0)}
    args = backend.new(
        "etap_run_args",
        batch=3,
        q_nope=pointer(inputs.q_nope),
        q_nope_row_stride=inputs.q_nope.stride(0),
        q_nope_head_stride=inputs.q_nope.stride(1),
        q_rope=pointer(inputs.q_rope),
        q_rope_row_stride=inputs.q_rope.stride(0),
        q_rope_head_stride=inputs.q_rope.stride(1),
        kv_cache=pointer(inputs.kv_cache),
        kv_page_stride=inputs.kv_cache.stride(0),
        kv_row_stride=inputs.kv_cache.stride(1),
        num_pages=len(inputs.kv_cache),
        block_table=pointer(inputs.block_table, "int32_t"),
        block_table_stride=inputs.block_table.stride(0),
        softmax_scale=inputs.softmax_scale,
        out=pointer(out),
        out_row_stride=out.stride(0),
        out_head_stride=out.stride(1),
        lse=pointer(lse, "float"),
        lse_row_stride=lse.stride(0),
        lse_head_stride=lse.stride(1),
        **mask,
        **workspace,
    )
    backend.check(backend.lib.etap_run(backend.read(plan), args))
    backend.lib.etap_plan_destroy(backend.read(plan))
    check(inputs, out, lse, reference(inputs))


def test_shim_works_alone(tmp_path: Path) -> None:
    """Copied somewhere else, in a process without site-packages, it loads the library and asks."""
    shutil.copy(Path(etap_py.__file__).with_name("ctypes_shim.py"), tmp_path / "etap_c.py")
    program = (
        f"import etap_c as c; etap = c.load({str(etap_py.library_path())!r}); info = c.new(c.etap_device_info);"
        "c.check(etap, etap.etap_device_query(c.ETAP_DEVICE_CPU, 0, info)); print(info.usable, info.name.decode())"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 cpu")


# ---- Handshake ----


def fake_library(folder: Path, abi_version: int, query_status: int = 0) -> Path:
    """A library that says it speaks `abi_version`, and answers etap_query with `query_status`."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = folder / "fake.c"
    source.write_text(
        f"int etap_abi_version(void) {{ return {abi_version}; }}\n"
        "int etap_version(void) { return 100; }\n"
        "int etap_device_query(int type, int index, void *info) { return 0; }\n"
        f"int etap_query(const void *problem, void *decision) {{ return {query_status}; }}\n"
        'const char *etap_last_message(void) { return "etap_problem.size is 72; allowed: 80"; }\n'
    )
    library = folder / f"libetap_{abi_version}.so"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    return library


def import_with(library: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import etap_py.binding"],
        env={"ETAP_LIBRARY": str(library), "PYTHONPATH": str(Path(etap_py.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )


def test_library_of_another_abi_version_is_refused(tmp_path: Path) -> None:
    """Guards against reading structs of another layout: memory corruption instead of a sentence."""
    library = fake_library(tmp_path, binding.lib.ETAP_ABI_VERSION + 1)
    done = import_with(library)
    assert done.returncode != 0
    assert f"ImportError: {library} was built for version 2 of the etap interface, this package for version 1" in done.stderr
    with pytest.raises(ImportError, match="was built for version 2 of the etap interface, this file for version 1"):
        Ctypes.shim.load(library)


def test_library_that_does_not_know_a_struct_is_refused(tmp_path: Path) -> None:
    done = import_with(fake_library(tmp_path, binding.lib.ETAP_ABI_VERSION, query_status=binding.lib.ETAP_ABI_MISMATCH))
    assert done.returncode != 0
    assert "does not know the size of etap_problem" in done.stderr
    assert "etap_problem.size is 72; allowed: 80" in done.stderr


def test_no_library_is_a_sentence(tmp_path: Path) -> None:
    nowhere = import_with(tmp_path / "missing.so")
    assert "ImportError: ETAP_LIBRARY names" in nowhere.stderr
    text = tmp_path / "text.so"
    text.write_text("not a library")
    assert f"ImportError: {text} can't be loaded: " in import_with(text).stderr
    with pytest.raises(ImportError, match="can't be loaded as libetap"):
        Ctypes.shim.load(text)


def test_shim_refuses_other_libraries() -> None:
    with pytest.raises(ImportError, match="can't be loaded as libetap"):
        Ctypes.shim.load(ctypes.util.find_library("c"))
