"""Who computes what: libetap, or SGLang's Triton backend. The environment variable ETAP_SGLANG_DISPATCH says:

auto    On CUDA, Triton computes prompts: prefill is bound by arithmetic and best done unabsorbed, which is not what libetap is
        for. Everything else - decode, verification and drafts - is libetap's, with the kernel that its dispatch picks for each shape.
        On the CPU platform, libetap computes prompts too. The default.
etap    libetap computes prompts on CUDA too, with absorbed weights.
triton  SGLang's Triton backend computes everything, as with --attention-backend triton: to compare, or to rule libetap out. Of a sparse
        model its `dsa` backend does, as with --attention-backend dsa.
"""

from __future__ import annotations

import os
from enum import StrEnum

from .refusals import EtapRefusal

ENVIRONMENT_VARIABLE = "ETAP_SGLANG_DISPATCH"


SHARED_PREFIXES_VARIABLE = "ETAP_SGLANG_SHARED_PREFIXES"
"""Set to 1: requests whose pages begin alike read them together, in decode, verification and drafts."""


def prefixes_are_shared() -> bool:
    return os.environ.get(SHARED_PREFIXES_VARIABLE, "0") not in ("", "0")


class Dispatch(StrEnum):
    AUTO = "auto"
    ETAP = "etap"
    TRITON = "triton"


def chosen(device: str) -> Dispatch:
    """What the environment asks for on "cuda" or "cpu". Raises EtapRefusal for a value that is not allowed there."""
    allowed = [choice.value for choice in Dispatch if choice is not Dispatch.TRITON or device.startswith("cuda")]
    value = os.environ.get(ENVIRONMENT_VARIABLE) or Dispatch.AUTO
    if value not in allowed:
        raise EtapRefusal(f"{ENVIRONMENT_VARIABLE} is {value!r}; allowed with --device {device}: {', '.join(allowed)}")
    return Dispatch(value)
