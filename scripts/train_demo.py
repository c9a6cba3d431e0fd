#!/usr/bin/env python3
"""How the demo's weights came to be. Nothing runs this; `make demo` takes scripts/demo_lib/weights.safetensors.

1. On any machine, with Python's documentation as Debian packages it and a checkout of the PEPs:

    apt-get download python3.11-doc && dpkg -x python3.11-doc_*.deb doc && git clone https://github.com/python/peps
    python3.11 scripts/train_demo.py corpus doc/usr/share/doc/python3.11/html/_sources peps/peps CORPUS.json.gz

   reads these and the documentation strings of the running Python's standard library, and writes the corpus, and a
   tokenizer next to it.

2. On a machine with a GPU, within --seconds:

    python3 scripts/train_demo.py train CORPUS.json.gz --seconds 180 --out FOLDER

   trains one model a --setting and writes N-last.safetensors (int8, a scale a row), N-best.safetensors if the loss on
   functions held out was lower before the end, and N.json (losses, and samples to read and choose by). One of them
   becomes demo_lib/weights.safetensors; its header says how it was made.

The corpus of the weights in the tree: Python 3.11.7's library, python3.11-doc 3.11.2-6+deb12u9 (both under the PSF
licence, version 2), and those PEPs at ba4deeb7969588d937da609008d05bb83a47b1ab that are in the public domain. The weights
are 1-last of one run on an H200. Of its 46 samples 3 do not come to an end, of 1-best's 8, though 1-best's loss on the
functions held out is lower (2.83 nats a token, not 2.94); 0-last (3.38) copies more. The prompts in demo_lib/prompts.py
were chosen after the training, by the answers.
"""

from __future__ import annotations

import time

STARTED = time.monotonic()

import argparse  # noqa: E402
import gzip  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from dataclasses import asdict  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from demo_lib.checkpoint import END_OF_TEXT, TOKENIZER, quantised  # noqa: E402
from demo_lib.corpus import Entry, collect  # noqa: E402
from demo_lib.model import TRAINED  # noqa: E402
from demo_lib.prompts import CANDIDATES, opening  # noqa: E402
from demo_lib.training import SEED, Data, Setting, generate, held_out_loss, load_served, train  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

FINISHING = 10.0  # seconds kept for what comes after a training: samples and files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("corpus", help="collect the text and train the tokenizer")
    one.add_argument("documentation", type=Path, help="the _sources folder of Python's HTML documentation")
    one.add_argument("peps", type=Path, help="the peps folder of a checkout of github.com/python/peps")
    one.add_argument("corpus", type=Path, help="the file to write; its tokenizer.json is written beside it")
    one.set_defaults(run=write_corpus)
    two = commands.add_parser("train", help="train the model")
    two.add_argument("corpus", type=Path)
    two.add_argument("--seconds", type=float, required=True, help="for everything, from the start of this program")
    two.add_argument("--out", type=Path, required=True, help="an existing or new folder")
    two.add_argument("--setting", action="append", help="dropout,learning rate[,batch[,length]]; may be repeated")
    two.set_defaults(run=train_all)
    arguments = parser.parse_args()
    arguments.run(arguments)
    return 0


def write_corpus(arguments: argparse.Namespace) -> None:
    entries = collect(arguments.documentation, arguments.peps)
    tokenizer = Tokenizer(models.BPE())  # byte-level: every text has tokens, and tokens give the text back
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    functions = [entry.text for entry in entries if entry.name]
    # Functions three times: they are a fifth of the text, and what the model shall write.
    tokenizer.train_from_iterator([*(entry.text for entry in entries), *functions, *functions], trainer)
    arguments.corpus.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.corpus.with_name("tokenizer.json")), pretty=False)
    content = json.dumps([[entry.name, entry.text] for entry in entries], ensure_ascii=False)
    with arguments.corpus.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(content.encode())
    print(f"{len(functions):,} functions of {len(entries):,} pieces, {len(content):,} characters")


def train_all(arguments: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    packed = arguments.corpus.read_bytes()
    entries = [Entry(name, text) for name, text in json.loads(gzip.decompress(packed))]
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    data = Data(entries, tokenizer)
    everything = "\n".join(entry.text for entry in entries)
    print(f"{len(data):,} tokens, {len(data.held_out)} functions held out, {time.monotonic() - STARTED:.1f} s", flush=True)
    settings = [_setting(text) for text in arguments.setting or ["0.1,3e-3", "0.25,3e-3"]]
    for number, setting in enumerate(settings):
        left = arguments.seconds - (time.monotonic() - STARTED)
        seconds = left / (len(settings) - number) - FINISHING
        if seconds < 1.0:
            print(f"no time is left for setting {number}", file=sys.stderr)
            return
        model, weights, measured = train(data, TRAINED, setting, seconds=seconds, device=device)
        origin: dict[str, Any] = {
            "command": f"scripts/train_demo.py train {arguments.corpus.name} --seconds {arguments.seconds:g} --out FOLDER",
            "setting": asdict(setting),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seed": SEED,
            "corpus_sha256": hashlib.sha256(packed).hexdigest(),
            "corpus_tokens": len(data),
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "torch": torch.__version__,
            **measured,
        }
        header = {name: str(value) for name, value in origin.items() if name != "history"}
        for which, values in weights.items():
            save_file(quantised(values), arguments.out / f"{number}-{which}.safetensors", metadata=header | {"weights": which})
        for which, values in weights.items():
            load_served(model, values)
            answers = generate(model, tokenizer, [opening(signature) for signature in CANDIDATES], tokens=96, device=device)
            origin[which] = {
                "held_out_loss_quantised": round(held_out_loss(model, data.held_out_rows(160), device), 4),
                "samples": [
                    {"prompt": signature, "answer": answer, "copied": _copied(answer, everything)}
                    for signature, answer in zip(CANDIDATES, answers, strict=True)
                ],
            }
        (arguments.out / f"{number}.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
        print(f"setting {number}: {header}, {time.monotonic() - STARTED:.1f} s", flush=True)


def _setting(text: str) -> Setting:
    dropout, rate, *size = text.split(",")
    return Setting(float(dropout), float(rate), *map(int, size))


def _copied(answer: str, everything: str) -> float:
    """The share of the answer's sentences that the corpus has word for word."""
    sentences = [s.strip(' "\n') for s in answer.replace("\n", " ").split(". ")]
    sentences = [s for s in sentences if s]
    return round(sum(s.rstrip(".") in everything for s in sentences) / max(len(sentences), 1), 2)


if __name__ == "__main__":
    sys.exit(main())
