"""The demo's model and what it is made of. The whole demo, on servers: tests/sglang/test_server.py and `make demo`."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from demo_lib.checkpoint import TOKENIZER, WEIGHTS, dequantised, quantised, write_random, write_trained
from demo_lib.corpus import _document_entries, source_entries
from demo_lib.model import TRAINED, LanguageModel, ModelConfig, untied
from demo_lib.prompts import prompts
from demo_lib.training import generate
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """The model of the checkpoint that the demo serves."""
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    write_trained(folder)
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    model = LanguageModel(ModelConfig(**{**vars(TRAINED), "tied": False}))
    model.load_state_dict(weights)
    return model


def test_answers_read_like_documentation(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """The first model of the demo answered "the same as a list of the same as a list of the same as ..." """
    (*alone, long), together = prompts()
    answers = [a for group in (alone, [long], together) for a in generate(model, tokenizer, group, tokens=96, device="cpu")]
    for prompt, answer in zip([*alone, long, *together], answers, strict=True):
        text, end, _ = answer.partition('"""')
        words = re.findall(r"\w+", text.lower())
        repeated = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        assert end, f"{prompt[-60:]!r}: no end in {answer!r}"
        assert text[0].isupper() and text.rstrip()[-1] in ".)", f"{prompt[-60:]!r}: no sentences in {answer!r}"
        assert len(words) >= 4, f"{prompt[-60:]!r}: too short: {answer!r}"
        assert max(repeated.values(), default=0) <= 2, f"{prompt[-60:]!r}: repeats itself: {answer!r}"


def test_every_prompt_fits_the_trained_window(tokenizer: Tokenizer) -> None:
    alone, together = prompts()
    for prompt in alone + together:
        assert len(tokenizer.encode(prompt).ids) + 96 <= 1024


def test_shipped_weights_are_small_and_say_where_they_come_from() -> None:
    assert WEIGHTS.stat().st_size <= 6e6
    with safe_open(WEIGHTS, "pt") as file:
        origin = file.metadata()
        names = set(file.keys())
    assert {name for name in names if not name.endswith(".scale")} == {name for name, _ in LanguageModel(TRAINED).named_parameters()}
    for name in ("command", "setting", "seed", "corpus_sha256", "parameters", "seconds", "device"):
        assert origin[name], name


def test_quantised_weights_are_within_half_a_step(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "matrix": torch.randn(64, 96, generator=generator) * torch.logspace(-4, 4, 64)[:, None],
        "zeros": torch.zeros(3, 5),
        "vector": torch.randn(32, generator=generator),
    }
    back = dequantised(quantised(weights))
    assert back.keys() == weights.keys()
    step = weights["matrix"].abs().amax(1, keepdim=True) / 127
    assert ((back["matrix"] - weights["matrix"]).abs() <= 0.5001 * step).all()
    assert torch.equal(back["zeros"], weights["zeros"])
    assert torch.equal(back["vector"], weights["vector"])


def test_a_tied_model_and_its_checkpoint_are_the_same_function(seed: int) -> None:
    """The two tables of a checkpoint differ by a factor: written without it, the server's model is another one."""
    torch.manual_seed(seed)
    small = ModelConfig(vocab_size=97, hidden_size=64, num_layers=1, max_positions=64, tied=True)
    tied, plain = LanguageModel(small), LanguageModel(ModelConfig(**{**vars(small), "tied": False}))
    plain.load_state_dict(untied(dict(tied.named_parameters()), small))
    tokens = torch.randint(97, (2, 33))
    assert torch.allclose(tied(tokens), plain(tokens), atol=1e-5)


def test_random_checkpoints_are_always_the_same(tmp_path: Path) -> None:
    config = ModelConfig(vocab_size=97, hidden_size=64, num_layers=1, max_positions=64)
    for name in ("a", "b"):
        write_random(tmp_path / name, config)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_tokens_give_the_text_back(tokenizer: Tokenizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(1, 0x3000, (200,), generator=generator).tolist()
    text = "".join(map(chr, points)) + ' def f(x):\n    """A <|end|'
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_source_file_becomes_signatures_with_documentation(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        'class A(B):\n    """Hold a ``value``."""\n    def f(self, x: int = 1) -> None:\n'
        '        """Return *x* and more.\n\n        A second paragraph of it.\n\n        >>> f(1)\n        """\n'
    )
    assert [entry.text for entry in source_entries(path)] == [
        'class A(B):\n    """Hold a value."""\n',
        'def f(self, x=1):\n    """Return x and more.\n\n    A second paragraph of it.\n    """\n',
    ]


def test_a_document_becomes_signatures_and_prose() -> None:
    document = """
Heading
=======

The :mod:`spam` module offers a number of high-level operations on *eggs*, and on ``ham``.

.. function:: spam.fry(eggs[, pan=None])

   Fry the *eggs* as :func:`~spam.boil` boils them.

   .. versionadded:: 3.1
"""
    entries = list(_document_entries(document))
    assert [(entry.name, entry.text) for entry in entries] == [
        ("", "The spam module offers a number of high-level operations on eggs, and on ham.\n"),
        ("fry", 'def fry(eggs, pan=None):\n    """Fry the eggs as boil boils them."""\n'),
    ]
