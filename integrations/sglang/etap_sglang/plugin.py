"""Entry point of `sglang.srt.plugins`: SGLang calls `register` in each of its processes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from . import NAME, cpu_platform_is_asked_for, seams

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
        from sglang.srt.server_args import add_attention_backend_choices  # here in every release since 0.5.17

        logger.error(problem)
        add_attention_backend_choices([NAME])
        register_attention_backend(NAME)(_refuse)
        return
    seams.mend_command_line()
    if not seams.missing_for_sparse():
        seams.mend_sparse_models()
    if cpu_platform_is_asked_for():
        from . import cpu_platform

        cpu_platform.admit_context_parallelism()
        cpu_platform.admit_sparse_models()
    register_attention_backend(NAME)(_create)


def prepare(runner: ModelRunner) -> None:
    """Before a backend is made in the scheduler's process: the counters, and a line in the log."""
    import etap_py as etap
    from sglang.srt.runtime_context import get_observability

    from . import calls
    from .dispatch import chosen

    if get_observability().enable_metrics:
        calls.publish()
    library = etap.library_path()
    logger.info("etap %s: libetap at %s; %s; dispatch %s", etap.__version__, library, seams.found(), chosen(runner.device))


def _create(runner: ModelRunner) -> AttentionBackend:
    """The factory: raises EtapRefusal when libetap can't serve the model."""
    from .backend import EtapAttnBackend, triton_backend
    from .dispatch import Dispatch, chosen

    prepare(runner)
    if chosen(runner.device) is Dispatch.TRITON:
        seams.mend_draft_paths()
        return triton_backend(runner)
    backend = EtapAttnBackend(runner)
    seams.mend_model_paths(backend)
    return backend


def _refuse(runner: ModelRunner) -> AttentionBackend:
    from .refusals import EtapRefusal

    raise EtapRefusal(seams.missing())
