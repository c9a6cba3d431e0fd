"""Writes the demo's checkpoint: a tokenizer and a small MLA model trained on Python's own documentation strings."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional

from .corpus import documentation_strings
from .model import LanguageModel, ModelConfig

END_OF_TEXT = "<|end|>"
SEED = 20240501

Progress = Callable[[int, int, float, float], None]
"""Called with (steps done, steps at most, seconds spent, loss in nats a token)."""


def write_checkpoint(
    folder: Path,
    *,
    steps: int,
    time_limit: float,
    progress: Progress,
    config: ModelConfig | None = None,
) -> dict[str, float]:
    """Write tokenizer, configuration and weights to `folder`, whole or not at all.

    `steps` optimiser steps at most (0: random weights), ended early after `time_limit` seconds. The weights depend on the
    Python version's documentation and on how many steps were done, and on nothing else. Returns what was measured.
    """
    config = config or ModelConfig()
    texts = documentation_strings()
    tokenizer = train_tokenizer(texts, config.vocab_size)
    torch.manual_seed(SEED)
    model = LanguageModel(config)
    measured = {"parameters": float(sum(p.numel() for p in model.parameters()))}
    if steps:
        measured |= train(model, encode(texts, tokenizer), steps=steps, time_limit=time_limit, progress=progress)

    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tokenizer.save(str(unfinished / "tokenizer.json"))
    _write_json(unfinished / "tokenizer_config.json", tokenizer_config(config))
    _write_json(unfinished / "config.json", config.hugging_face())
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return measured


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every text has tokens, and tokens give the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


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


def encode(texts: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    """All texts as one row of token ids, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return torch.tensor([i for e in tokenizer.encode_batch(texts) for i in (*e.ids, end)], dtype=torch.long)


def train(
    model: LanguageModel,
    tokens: torch.Tensor,
    *,
    steps: int,
    time_limit: float,
    progress: Progress,
    batch: int = 8,
    length: int = 64,
    peak_rate: float = 4e-3,
) -> dict[str, float]:
    """AdamW on random windows of the corpus: small ones, because so early many steps count for more than large ones.

    The learning rate falls to zero by the last step or the time limit. Returns what was measured.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(SEED)
    offsets = torch.arange(length + 1)
    started, smooth, done, spent = time.monotonic(), float("nan"), 0, 0.0
    while done < steps and spent < time_limit:
        left = 1.0 - max(done / steps, spent / time_limit)
        for group in optimiser.param_groups:
            group["lr"] = peak_rate * min(1.0, (done + 1) / 20, left)
        starts = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
        window = tokens[starts + offsets]
        loss = functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        smooth = loss.item() if done == 0 else 0.95 * smooth + 0.05 * loss.item()
        done, spent = done + 1, time.monotonic() - started
        progress(done, steps, spent, smooth)
    return {"steps": float(done), "seconds": spent, "loss": smooth, "corpus_tokens": float(len(tokens))}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
