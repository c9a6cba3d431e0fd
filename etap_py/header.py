"""From `etap.h` to declarations that cffi can read: the header is the only place where the interface is written down."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def header_path() -> Path:
    """`etap.h` beside this file (an installed wheel), or in the source tree."""
    for path in (_PACKAGE / "etap.h", _PACKAGE.parent / "libetap" / "include" / "etap.h"):
        if path.is_file():
            return path
    raise ImportError(f"etap.h is neither in {_PACKAGE} nor in the source tree around it; install the package again")


def version() -> str:
    """The library's version as the header has it, MAJOR.MINOR.PATCH: that of the package, whichever library is loaded."""
    parts = re.findall(r"^#define ETAP_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", header_path().read_text(), flags=re.MULTILINE)
    return ".".join(parts)


def declarations(header: str) -> str:
    """The header's constants, types and functions as plain C.

    Kept: integer macros, typedefs, functions. Dropped: comments, every other directive, `extern "C"`, ETAP_API. The status list, an
    X-macro, is expanded into its enum, the only place of the header that uses it.
    """
    text = header.replace("\\\n", " ")
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r"^#ifdef __cplusplus$.*?^#endif$", "", text, flags=re.DOTALL | re.MULTILINE)

    status_list = re.search(r"^#define ETAP_STATUS_LIST\(X\)(.*)$", text, flags=re.MULTILINE)
    if status_list is None:
        raise ImportError("etap.h has no ETAP_STATUS_LIST: this is not the header of this package")
    statuses = re.findall(r"X\((\w+), *(\d+),", status_list[1])
    text = text.replace("ETAP_STATUS_LIST(ETAP_STATUS_ENUM)", "".join(f"ETAP_{name} = {value}, " for name, value in statuses))

    text = re.sub(r"^#(?!define \w+ \d+ *$).*$", "", text, flags=re.MULTILINE)
    return text.replace("ETAP_API", "")
