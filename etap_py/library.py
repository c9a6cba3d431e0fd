"""Where libetap.so is."""

from __future__ import annotations

import os
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
