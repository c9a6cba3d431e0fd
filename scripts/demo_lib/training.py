"""The training behind the demo's weights (see `scripts/train_demo.py`)."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional

from .checkpoint import END_OF_TEXT, dequantised, quantised
from .corpus import Entry
from .model import LanguageModel, ModelConfig

Weights = dict[str, torch.Tensor]

SEED = 20240501
SHARES = ((0.0, (0.8, 0.1, 0.1)), (0.6, (0.4, 0.3, 0.3)))
"""From which part of the training on which shares of a batch are prose, functions in their order, functions shuffled."""


@dataclass(frozen=True)
class Setting:
    dropout: float
    peak_rate: float
    batch: int = 32
    length: int = 1024


class Data:
    """The corpus as token ids. Functions of one name, wherever they come from, are held out together."""

    def __init__(self, entries: list[Entry], tokenizer: Tokenizer) -> None:
        end = tokenizer.token_to_id(END_OF_TEXT)
        tokens = [np.array([*e.ids, end]) for e in tokenizer.encode_batch([entry.text for entry in entries])]
        pairs = list(zip(entries, tokens, strict=True))
        self.prose = np.concatenate([ids for entry, ids in pairs if not entry.name])
        self.functions = [ids for entry, ids in pairs if entry.name and not held_out(entry)]
        self.held_out = [ids for entry, ids in pairs if held_out(entry)]
        self.generator = np.random.default_rng(SEED)
        self.in_order = self._stream(self.functions)
        self.shuffled = self.in_order

    def __len__(self) -> int:
        return len(self.prose) + len(self.in_order[0])

    def _stream(self, pieces: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The pieces one after another, and where each begins."""
        lengths = np.array([len(piece) for piece in pieces])
        return np.concatenate(pieces), np.cumsum(lengths) - lengths

    def shuffle(self) -> None:
        self.shuffled = self._stream([self.functions[i] for i in self.generator.permutation(len(self.functions))])

    def batch(self, shares: tuple[float, float, float], batch: int, length: int) -> torch.Tensor:
        """[batch, length + 1]: windows anywhere in the prose, and windows that begin where a function does."""
        counts = self.generator.multinomial(batch, shares)
        rows = [self.prose[start : start + length + 1] for start in self._starts(len(self.prose) - length - 1, counts[0])]
        for (stream, begins), count in zip((self.in_order, self.shuffled), counts[1:], strict=True):
            inside = begins[: np.searchsorted(begins, len(stream) - length - 1)]
            rows += [stream[inside[i] : inside[i] + length + 1] for i in self._starts(len(inside), count)]
        return torch.from_numpy(np.stack(rows))

    def _starts(self, end: int, count: int) -> np.ndarray:
        return self.generator.integers(end, size=count)

    def held_out_rows(self, length: int) -> torch.Tensor:
        """[rows, length + 1]: the functions held out, one a row, cut to `length`; -1 fills the rest."""
        rows = torch.full((len(self.held_out), length + 1), -1)
        for row, ids in zip(rows, self.held_out, strict=True):
            row[: len(ids)] = torch.from_numpy(ids[: length + 1])
        return rows


def held_out(entry: Entry) -> bool:
    return bool(entry.name) and zlib.crc32(entry.name.strip("_").lower().encode()) % 30 == 0


def train(
    data: Data, config: ModelConfig, setting: Setting, *, seconds: float, device: str
) -> tuple[LanguageModel, dict[str, Weights], dict[str, Any]]:
    """AdamW for `seconds`, the learning rate falling to zero by then.

    Returns the model, its weights by name ("last", and "best" if the loss on what was held out was lower before), and what
    was measured: losses in nats a token.
    """
    began = time.monotonic()
    torch.manual_seed(SEED)
    data.generator = np.random.default_rng(SEED)
    model = LanguageModel(config).to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = setting.dropout
    tables = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=setting.peak_rate, betas=(0.9, 0.95), fused=device == "cuda")
    rows = data.held_out_rows(160)
    best: dict[str, torch.Tensor] = {}
    lowest, step, running, history = float("inf"), 0, 0.0, []
    evaluations, evaluated = 16, 0
    while True:
        part = (time.monotonic() - began) / seconds
        if part >= (evaluated + 1) / evaluations or part >= 1.0:
            loss = round(held_out_loss(model, rows, device), 4)
            trained = float(running)
            history.append({"part": round(part, 3), "step": step, "train": round(trained, 4), "held_out": loss})
            print(history[-1], flush=True)
            evaluated = int(part * evaluations)
            if loss < lowest:
                lowest, best = loss, {name: p.detach().clone() for name, p in model.named_parameters()}
            if part >= 1.0:
                break
        if step % 16 == 0:
            data.shuffle()
        shares = next(s for begin, s in reversed(SHARES) if part >= begin)
        for group in optimiser.param_groups:
            group["lr"] = setting.peak_rate * min(1.0, (step + 1) / 100) * (1.0 - part)
        window = data.batch(shares, setting.batch, setting.length).to(device, non_blocking=True)
        model.train()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(window[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        running = loss.detach() if step == 0 else 0.98 * running + 0.02 * loss.detach()
        step += 1
        if step % 8 == 0 and device == "cuda":
            torch.cuda.synchronize()  # or the clock runs ahead of the device
    last = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = {"last": last} if lowest == history[-1]["held_out"] else {"last": last, "best": best}
    measured = {
        "steps": step,
        "tokens": step * setting.batch * setting.length,
        "seconds": round(time.monotonic() - began, 1),
        "history": history,
    }
    return model, weights, measured


@torch.no_grad()
def load_served(model: LanguageModel, weights: Weights) -> None:
    """Give `model` the weights as a server will have them: quantised, and back to BF16."""
    values = dequantised(quantised(weights))
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name].to(torch.bfloat16))


@torch.no_grad()
def held_out_loss(model: LanguageModel, rows: torch.Tensor, device: str) -> float:
    """Nats a token."""
    model.eval()
    total = count = 0.0
    for part in rows.split(128):
        part = part.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(part[:, :-1].clamp_min(0))
        total += functional.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), ignore_index=-1, reduction="sum").item()
        count += (part[:, 1:] >= 0).sum().item()
    return total / count


@torch.no_grad()
def generate(model: LanguageModel, tokenizer: Tokenizer, prompts: list[str], *, tokens: int, device: str) -> list[str]:
    """The most likely answers, up to the end of text."""
    model.eval()
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [e.ids for e in tokenizer.encode_batch(prompts)]
    length = torch.tensor([len(i) for i in ids], device=device)
    rows = torch.full((len(ids), int(length.max()) + tokens), end, device=device)
    for row, i in zip(rows, ids, strict=True):
        row[: len(i)] = torch.tensor(i)
    unended = torch.arange(len(ids), device=device)
    for done in range(tokens):
        at = length[unended] + done
        logits = model(rows[unended, : int(at.max())])[torch.arange(len(at), device=device), at - 1]
        rows[unended, at] = logits.argmax(-1)
        unended = unended[rows[unended, at] != end]
        if len(unended) == 0:
            break
    answers = []
    for row, begin in zip(rows.tolist(), length.tolist(), strict=True):
        answer = row[begin : begin + tokens]
        answers.append(tokenizer.decode(answer[: answer.index(end)] if end in answer else answer))
    return answers
