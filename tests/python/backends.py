"""One face for the two bindings, so that one suite tests both: cffi (`etap_py.binding`) and ctypes (`etap_py/ctypes_shim.py`, loaded
as the lone file that it is)."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import etap_py
from etap_py import binding

STRUCTS = ("etap_device_info", "etap_problem", "etap_decision", "etap_plan_args", "etap_shared", "etap_run_args", "etap_merge_args")


def load_shim(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ctypes_shim_alone", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Cffi:
    name = "cffi"
    lib = binding.lib
    null = binding.ffi.NULL
    check = staticmethod(binding.check)
    new = staticmethod(binding.new)

    @staticmethod
    def text(value: Any) -> str:
        return binding.text(value)

    @staticmethod
    def address(value: int) -> Any:
        return binding.ffi.cast("void *", value)

    @staticmethod
    def size_out() -> Any:
        return binding.ffi.new("size_t *")

    @staticmethod
    def plan_out() -> Any:
        return binding.ffi.new("etap_plan **")

    @staticmethod
    def read(out: Any) -> Any:
        return out[0]

    @staticmethod
    def layout(struct: str) -> tuple[int, dict[str, tuple[int, int]]]:
        fields = {name: (field.offset, binding.ffi.sizeof(field.type)) for name, field in binding.ffi.typeof(struct).fields}
        return binding.ffi.sizeof(struct), fields

    @staticmethod
    def constant(name: str) -> int:
        return int(getattr(binding.lib, name))


class Ctypes:
    name = "ctypes"
    shim = load_shim(Path(etap_py.__file__).with_name("ctypes_shim.py"))
    lib = shim.load(etap_py.library_path())
    null = None

    @classmethod
    def check(cls, status: int) -> None:
        cls.shim.check(cls.lib, status)

    @classmethod
    def new(cls, struct: str, **fields: Any) -> Any:
        return cls.shim.new(getattr(cls.shim, struct), **fields)

    @staticmethod
    def text(value: bytes) -> str:
        return value.decode()

    @staticmethod
    def address(value: int) -> int:
        return value

    @staticmethod
    def size_out() -> Any:
        return ctypes.c_size_t()

    @staticmethod
    def plan_out() -> Any:
        return ctypes.c_void_p()

    @staticmethod
    def read(out: Any) -> Any:
        return out.value

    @classmethod
    def layout(cls, struct: str) -> tuple[int, dict[str, tuple[int, int]]]:
        kind = getattr(cls.shim, struct)
        return ctypes.sizeof(kind), {name: (getattr(kind, name).offset, getattr(kind, name).size) for name, _ in kind._fields_}

    @classmethod
    def constant(cls, name: str) -> int:
        return int(getattr(cls.shim, name))


BACKENDS = (Cffi, Ctypes)
