"""What the tests of this folder share. Imports no vLLM: a spawned process must start without it."""

from __future__ import annotations

from typing import Any

import torch


def asked(**changes: Any) -> dict[str, Any]:
    """What vLLM asks of a backend before it makes a layer: a DeepSeek-V3 on an H100, but for the changes."""
    fits = {
        "head_size": 576,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": None,
        "use_mla": True,
        "has_sink": False,
        "use_sparse": False,
        "capability": (9, 0),
    }
    return fits | changes


def answer_with_name(member: Any, answers: Any) -> None:
    """In a spawned process: what has become of a pickled member of vLLM's enumeration of backends."""
    answers.put((member.name, member.get_path()))
