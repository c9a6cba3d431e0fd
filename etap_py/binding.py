"""The C interface through cffi in ABI mode: `ffi`, `lib`, `new`, `check`. Importing this module loads the library and refuses one that
was built for another version of the interface."""

from __future__ import annotations

import functools
from typing import Any

import cffi

from etap_py.errors import error
from etap_py.header import declarations, header_path
from etap_py.library import check_whole, library_path

CData = Any  # cffi has no types of its own for the values it makes


def new(struct: str, **fields: Any) -> CData:
    """A pointer to a new struct with `size` filled in, the given fields set and all others 0."""
    pointer_type, size = _struct(struct)
    return ffi.new(pointer_type, {"size": size, **fields})


@functools.cache
def _struct(struct: str) -> tuple[Any, int]:
    return ffi.typeof(f"{struct} *"), ffi.sizeof(struct)


def text(chars: CData) -> str:
    """A C string, or a char array within a struct, as str."""
    return bytes(ffi.string(chars)).decode()


def check(status: int) -> None:
    """Raises the library's own message when `status` is not ETAP_OK."""
    if status:
        raise error(status, text(lib.etap_status_name(status)), text(lib.etap_last_message()))


def _handshake() -> None:
    """The header that the declarations come from and the library must speak the same version, with structs of the same sizes."""
    found, expected = _call("etap_abi_version"), lib.ETAP_ABI_VERSION
    if found != expected:
        raise ImportError(
            f"{path} was built for version {found} of the etap interface, this package for version {expected}: "
            "build the library from the same sources, or let ETAP_LIBRARY name another one"
        )
    problem = new("etap_problem", num_heads=1, d_latent=512, d_rope=64, page_size=1, batch=1, max_query_len=1)
    for struct, status in (
        ("etap_device_info", _call("etap_device_query", lib.ETAP_DEVICE_CPU, 0, new("etap_device_info"))),
        ("etap_problem or etap_decision", _call("etap_query", problem, new("etap_decision"))),
    ):
        if status == lib.ETAP_ABI_MISMATCH:
            raise ImportError(f"{path} does not know the size of {struct} in {header_path()}: {text(_call('etap_last_message'))}")
    for function in dir(lib):
        _function(function)


def _call(function: str, *arguments: Any) -> Any:
    return _function(function)(*arguments)


def _function(name: str) -> Any:
    """Of a library that may be another one."""
    try:
        return getattr(lib, name)
    except AttributeError as failure:
        raise ImportError(f"{path} is not libetap, or not of this package's release: it has no function {name}") from failure


ffi = cffi.FFI()
ffi.cdef(declarations(header_path().read_text()))
path = library_path()
try:
    check_whole(path)
    lib: Any = ffi.dlopen(str(path))
except OSError as failure:
    raise ImportError(f"{path} can't be loaded: {str(failure).partition('.  Additionally')[0]}") from failure
_handshake()
