"""The `etap` attention backend for SGLang: MLA attention computed by libetap.

SGLang finds this package through its entry points (`plugin.register`, `cpu_platform.activate`); nothing needs to be
imported. `seams.probe()` tells which places of the installed SGLang it hooks into, `calls.snapshot()` what it served.
"""

NAME = "etap"
"""The backend's name on SGLang's command line: `--attention-backend etap`."""
