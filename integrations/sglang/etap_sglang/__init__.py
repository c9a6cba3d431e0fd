"""The `etap` attention backend for SGLang: MLA attention computed by libetap.

SGLang finds this package through its entry points (`plugin.register`, `cpu_platform.activate`); nothing needs to be
imported. `seams.probe()` tells which places of the installed SGLang it hooks into, `calls.snapshot()` what it served.
"""

import os

NAME = "etap"
"""The backend's name on SGLang's command line: `--attention-backend etap`."""

CPU_VARIABLE = "ETAP_SGLANG_CPU"
"""The environment variable that asks for `cpu_platform`, in every process that imports sglang."""


def cpu_platform_is_asked_for() -> bool:
    return os.environ.get(CPU_VARIABLE, "0") not in ("", "0")
