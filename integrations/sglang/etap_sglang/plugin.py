"""Entry point of `sglang.srt.plugins`: SGLang calls `register` in each of its processes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from . import NAME, seams

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def register() -> None:
    """Make `--attention-backend etap` known.

    SGLang logs and swallows what a plugin raises, and then serves without it. So where this SGLang doesn't fit, the name is
    registered all the same, with a factory that refuses: the server stops at start-up and says why.
    """
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if problem := seams.missing():
        from sglang.srt.arg_groups.choices import add_attention_backend_choices

        logger.error(problem)
        add_attention_backend_choices([NAME])
        register_attention_backend(NAME)(_refuse)
        return
    seams.mend_command_line()
    register_attention_backend(NAME)(_create)


def _create(runner: ModelRunner) -> AttentionBackend:
    """The factory: raises EtapRefusal when libetap can't serve the model."""
    from .backend import EtapAttnBackend

    backend = EtapAttnBackend(runner)
    seams.mend_model_paths(prefill_is_delegated=backend.prefill is not None)
    return backend


def _refuse(runner: ModelRunner) -> AttentionBackend:
    from .refusals import EtapRefusal

    raise EtapRefusal(seams.missing())
