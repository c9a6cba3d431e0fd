"""Writes checkpoints that SGLang and vLLM load: the demo's, whose trained weights are in this folder, and random ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .model import TRAINED, LanguageModel, ModelConfig, untied

END_OF_TEXT = "<|end|>"
SEED = 20240501
WEIGHTS = Path(__file__).with_name("weights.safetensors")  # of model.TRAINED, by scripts/train_demo.py
TOKENIZER = Path(__file__).with_name("tokenizer.json")


def write_trained(folder: Path) -> dict[str, str]:
    """Write the demo's checkpoint to `folder`, whole or not at all. Returns how its weights were made."""
    with safe_open(WEIGHTS, "pt") as file:
        origin = file.metadata()
    _write(folder, TRAINED, untied(dequantised(load_file(WEIGHTS)), TRAINED))
    return origin


def write_random(folder: Path, config: ModelConfig | None = None) -> None:
    """Write a checkpoint with random weights to `folder`, whole or not at all: always the same ones."""
    torch.manual_seed(SEED)
    model = LanguageModel(config or ModelConfig())
    _write(folder, model.config, {name: p.detach() for name, p in model.named_parameters()})


def quantised(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each matrix as int8 with a float32 scale a row (`NAME.scale`); vectors stay."""
    stored = {}
    for name, weight in weights.items():
        weight = weight.detach().float().cpu()
        if weight.ndim == 2:
            scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
            stored[name + ".scale"] = scale
            weight = (weight / scale).round().to(torch.int8)
        stored[name] = weight.contiguous()
    return stored


def dequantised(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `quantised`, in float32."""
    return {n: w.float() * stored.get(n + ".scale", 1.0) for n, w in stored.items() if not n.endswith(".scale")}


def _write(folder: Path, config: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    shutil.copy(TOKENIZER, unfinished / "tokenizer.json")
    _write_json(unfinished / "tokenizer_config.json", tokenizer_config(config))
    _write_json(unfinished / "config.json", config.hugging_face())
    weights = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def tokenizer_config(config: ModelConfig) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_positions,
        # Not a chat model: a conversation is simply written out one message after another.
        "chat_template": "{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}",
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
