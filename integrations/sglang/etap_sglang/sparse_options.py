"""Sparse attention, told from the command line: which models have it, and what SGLang's options must be for libetap to decode it.

A model with `index_topk` (DeepSeek-V3.2, GLM-5) is served by SGLang's backend `dsa`, on whose name and class much of SGLang hangs. So
`--attention-backend etap` means that backend with libetap's decode: inside SGLang the name is `dsa`, and `sparse.py` has the class.
"""

from __future__ import annotations

from typing import Any

from . import NAME, cpu_platform_is_asked_for
from .dispatch import Dispatch, chosen
from .refusals import EtapRefusal

INSIDE = "dsa"
"""SGLang's name of the backend that serves sparse models."""

METHOD = "fa3"
"""The method of that backend that gets queries as they are. `flashmla_kv` gets a copy, both parts joined and heads padded to 64."""

KNOWN_OPTIONS = frozenset(
    {
        "index_topk",
        "index_n_heads",
        "index_head_dim",
        "index_topk_freq",
        "index_topk_pattern",
        "index_skip_topk_offset",
        "index_share_for_mtp_iteration",
        "index_kpool",
        "index_kpool_compress",
        "index_kpool_always_select_tail",
        "index_k_norm_type",
        "index_init_tokens",
        "index_local_tokens",
        "indexer_types",
        "indexer_rope_interleave",
    }
)
"""The options of a model's indexer that SGLang's `dsa` backend reads."""

_CHOICES = ("attention_backend", "prefill_attention_backend", "decode_attention_backend", "speculative_draft_attention_backend")


def is_asked_for(server_args: Any) -> bool:
    """Whether libetap is to decode, if the model is sparse, by the command line as it was given: SGLang keeps that."""
    return _decode_backend(server_args) == NAME and chosen(_device(server_args)) is not Dispatch.TRITON


def resolve(server_args: Any, hf_config: Any) -> dict[str, str]:
    """A provider of SGLang's model overrides: {option: value} for a sparse model that is to be served by etap, else {}.

    Raises EtapRefusal where the options and the model's configuration, the Hugging Face one, leave no way.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.configs.model_config import is_deepseek_dsa

    asked = [choice for choice in _CHOICES if getattr(server_args, choice) == NAME]
    if not asked or not is_deepseek_dsa(hf_config):
        return {}
    resolved = dict.fromkeys(asked, INSIDE)
    if chosen(_device(server_args)) is Dispatch.TRITON:
        return resolved
    check_model(hf_config)
    _check_choices(server_args, asked[0])
    view = resolving_view(server_args)
    if view.enable_deterministic_inference:
        raise EtapRefusal(
            "the etap attention backend does not support --enable-deterministic-inference with sparse models: sums depend on the order of "
            "a token's list, and SGLang's top-k promises none"
        )
    if (topk := view.speculative_eagle_topk or 1) > 1:
        raise EtapRefusal(
            f"the etap attention backend verifies only chains of draft tokens with sparse models, and --speculative-eagle-topk is {topk}; "
            "the only value allowed is 1: the indexer would choose among the drafts of other branches, too"
        )
    if view.enable_hisparse:
        raise EtapRefusal("the etap attention backend does not support --enable-hisparse, which keeps a part of the KV cache on the host")
    methods = ["dsa_decode_backend"] + ["dsa_prefill_backend"] * computes_prompts(server_args)
    for method in methods:
        if (given := getattr(server_args, method)) not in (None, METHOD):
            raise EtapRefusal(f"{_option(method)} is {given}; with {_option(asked[0])} {NAME} libetap computes instead: leave it out")
    return resolved | {"attention_backend": INSIDE} | dict.fromkeys(methods, METHOD)


def computes_prompts(server_args: Any) -> bool:
    """Whether libetap computes prompts, too: where SGLang has no kernel, where it is told to, and where ranks that share a sequence merge
    their results by a log-sum-exp, which no other method of SGLang's backend returns on this card."""
    device = _device(server_args)
    return device == "cpu" or chosen(device) is Dispatch.ETAP or server_args.dcp_size > 1


def check_model(hf_config: Any) -> None:
    """Raise EtapRefusal for a sparse model that is not served right, by its Hugging Face configuration."""
    architecture = (getattr(hf_config, "architectures", None) or ["this model"])[0]
    text_config = getattr(hf_config, "text_config", None) or hf_config  # models with more than text keep theirs there
    options = {name for config in (hf_config, text_config) for name in vars(config) if name.startswith(("index_", "indexer_"))}
    if unknown := sorted(options - KNOWN_OPTIONS):
        raise EtapRefusal(
            f"the etap attention backend does not know what {architecture} means by {', '.join(unknown)}, options of its indexer; "
            f"known are {', '.join(sorted(KNOWN_OPTIONS))}"
        )
    if getattr(hf_config, "learnable_sink", False):
        raise EtapRefusal(
            f"the etap attention backend does not serve the attention sinks of {architecture}: SGLang hands them to its method "
            f"flashmla_sparse alone; use --attention-backend {INSIDE}"
        )


def _check_choices(server_args: Any, asked: str) -> None:
    """Decode and drafts go together: SGLang makes the backends of both from one class."""
    allowed = {"prefill_attention_backend": (None, NAME, INSIDE), "speculative_draft_attention_backend": (None, NAME)}
    chosen_ones = {"decode_attention_backend": _decode_backend(server_args)} | {name: getattr(server_args, name) for name in allowed}
    for choice, value in chosen_ones.items():
        values = allowed.get(choice, (NAME,))
        if value not in values:
            names = " or ".join(["leave it out"] * (None in values) + [name for name in values if name is not None])
            raise EtapRefusal(f"{_option(choice)} is {value}; allowed for a sparse model with {_option(asked)} {NAME}: {names}")


def _decode_backend(server_args: Any) -> str | None:
    choice: str | None = server_args.decode_attention_backend or server_args.attention_backend
    return choice


def _option(field: str) -> str:
    return "--" + field.replace("_", "-")


def _device(server_args: Any) -> str:
    return "cpu" if cpu_platform_is_asked_for() else server_args.device or "cuda"
