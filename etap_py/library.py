"""Where libetap.so is."""

from __future__ import annotations

import os
import struct
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def library_path() -> Path:
    """The file that `import etap_py` loads: the one that the environment variable ETAP_LIBRARY names, else the one in the package (an
    installed wheel), else the one that `make` built in the source tree."""
    named = os.environ.get("ETAP_LIBRARY")
    if named:
        path = Path(named)
        try:
            found = path.is_file()
        except OSError as failure:  # a folder that may not be searched, a name that is too long
            raise ImportError(f"ETAP_LIBRARY names {named}: {failure.strerror}") from failure
        if not found:
            raise ImportError(f"ETAP_LIBRARY names {named}, which is not a file")
        return path
    candidates = (_PACKAGE / "libetap.so", _PACKAGE.parent / "build" / "libetap.so")
    for path in candidates:
        if path.is_file():
            return path
    raise ImportError(
        f"libetap.so is neither {candidates[0]} nor {candidates[1]}: run 'make' in the source tree, or let ETAP_LIBRARY name the file"
    )


def check_whole(path: Path) -> None:
    """Raises ImportError for a 64-bit ELF file that was cut off, by a copy that was interrupted or a full disk: loading it can kill the
    process. What else is wrong with a file, the loader says."""
    with path.open("rb") as file:
        header = file.read(64)
        size = file.seek(0, os.SEEK_END)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return
    order = "<" if header[5] == 1 else ">"
    (sections,) = struct.unpack_from(f"{order}Q", header, 0x28)  # their table is at the file's end
    entry_size, count = struct.unpack_from(f"{order}HH", header, 0x3A)
    if size < sections + entry_size * count:
        raise ImportError(f"{path} is cut off: it has {size} bytes of {sections + entry_size * count}; build or copy it again")
