#!/usr/bin/env python3
"""The main job: a real SGLang server answers prompts with its MLA attention computed by libetap.

    make demo                        or, in the environment that it makes:
    .venv/bin/python scripts/demo.py [--quick] [--device cpu]

Writes a small checkpoint of DeepSeek's architecture (trained for a minute or so on Python's documentation strings; kept in
.demo/ for the next time), serves it with `--attention-backend etap`, sends prompts over HTTP, streams the answers, and
asks SGLang's own attention for the same answers. Ends with status 0 when they agree.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from demo_lib.checkpoint import write_checkpoint
from demo_lib.compare import compare
from demo_lib.corpus import documentation_strings
from demo_lib.server import ROOT, Server, ServerFailed, on_cuda
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

console = Console(highlight=False)

SAMPLING = {"temperature": 0.0, "max_new_tokens": 48, "ignore_eos": True}  # greedy, so that the answers can be compared
ALONE = ("Return the number of", "If the file does not exist,", "This class provides a simple way to")
TOGETHER = ("Return the", "Raise an error if", "A subclass should", "The default value is", "This method is called", "See also")
LONG_PROMPT, SHARED_PREFIX = 4500, 900  # characters; SGLang's native attention on the CPU needs minutes for much more
TRAINING_STEPS = 1500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="random weights instead of a minute of training: no words come out")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch finds a GPU")
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="for the checkpoint and the servers' logs")
    parser.add_argument("--train-seconds", type=float, default=100.0, help="time limit of the training (default: 100)")
    parser.add_argument("--page-size", type=int, default=64, help="tokens a KV page (default: 64)")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs are started with it ignored
        signal.signal(number, _interrupt)
    started = time.monotonic()
    try:
        return run(arguments, started)
    except KeyboardInterrupt:
        console.print("\n[yellow]interrupted; every process of the server was ended")
        return 130
    except ServerFailed as failure:
        console.print(f"[red]{escape(str(failure))}")
        return 1


def run(arguments: argparse.Namespace, started: float) -> int:
    device = arguments.device or ("cuda" if on_cuda() else "cpu")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = make_checkpoint(folder, quick=arguments.quick, time_limit=arguments.train_seconds)
    long_text = " ".join(documentation_strings())[:LONG_PROMPT]
    alone = [*ALONE, long_text]
    together = [f"{long_text[:SHARED_PREFIX]}\n{text}" for text in TOGETHER]
    options = ("--page-size", str(arguments.page_size), "--mem-fraction-static", "0.3", "--max-total-tokens", "32768")
    options += ("--enable-fp32-lm-head",)  # BF16 logits are 1/64 apart: too many exact ties between candidates

    with Server(model, "etap", device=device, log=folder / "server-etap.log", options=options) as server:
        wait_for(server)
        answers = [stream_one(server, prompt) for prompt in alone] + stream_together(server, together)
        calls = server.etap_calls()

    native = "triton" if device == "cuda" else "torch_native"
    with Server(model, native, device=device, log=folder / f"server-{native}.log", options=options) as server:
        wait_for(server)
        with console.status(f"the same {len(answers)} prompts"):
            references = [server.generate(prompt, SAMPLING) for prompt in alone + together]

    agreed = show_comparison(alone + together, answers, references, native)
    served = show_calls(calls)
    verdict = "[green]done" if agreed and served else "[red]failed"
    console.print(f"{verdict} in {time.monotonic() - started:.0f} s")
    return 0 if agreed and served else 1


def make_checkpoint(folder: Path, *, quick: bool, time_limit: float) -> Path:
    model = folder / ("checkpoint-random" if quick else "checkpoint")
    if model.exists():
        console.print(f"[bold]checkpoint[/]  {model} (there already)")
        return model
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading Python's documentation strings", total=None)

        def progress(step: int, steps: int, spent: float, loss: float) -> None:
            done = max(step / steps, spent / time_limit)
            bar.update(task, description=f"training, step {step} of at most {steps}, loss {loss:.2f}", completed=done, total=1)

        measured = write_checkpoint(model, steps=0 if quick else TRAINING_STEPS, time_limit=time_limit, progress=progress)
    text = f"{measured['parameters'] / 1e6:.1f} M parameters, DeepSeek-V2 architecture, latent 512, rope 64"
    if not quick:
        text += f"; trained {measured['steps']:.0f} steps in {measured['seconds']:.0f} s, loss {measured['loss']:.2f} nats a token"
    console.print(f"[bold]checkpoint[/]  {text}")
    return model


def wait_for(server: Server) -> None:
    console.print(f"[bold]server[/]      python {escape(' '.join(server.command[1:]))}", soft_wrap=True)
    began = time.monotonic()
    with console.status("") as status:
        server.wait_until_ready(tick=lambda: status.update(f"starting, {time.monotonic() - began:.0f} s"))
    console.print(f"            ready after {time.monotonic() - began:.0f} s")


def stream_one(server: Server, prompt: str) -> dict[str, Any]:
    """Send a prompt and print the answer as it comes."""
    console.print(f"[bold]prompt[/]      [cyan]{escape(_short(prompt))}[/]", end="")
    began, event, printed = time.monotonic(), {}, 0
    for event in server.stream(prompt, SAMPLING):
        text = event["text"]
        console.print(escape(_line(text[printed:])), end="", soft_wrap=True)
        printed = len(text)
    meta = event["meta_info"]
    console.print(
        f"\n            [dim]{meta['prompt_tokens']} tokens in, {meta['completion_tokens']} out, {time.monotonic() - began:.1f} s[/]"
    )
    return event


def stream_together(server: Server, prompts: list[str]) -> list[dict[str, Any]]:
    """Send all prompts at once and show all answers as they come."""
    console.print(f"[bold]at once[/]     {len(prompts)} prompts that begin like the long one, and end so:")
    texts = [""] * len(prompts)

    def table() -> Table:
        grid = Table.grid(padding=(0, 2))
        for prompt, text in zip(prompts, texts, strict=True):
            grid.add_row("", f"[cyan]{escape(prompt.rpartition(chr(10))[2])}", escape(_line(text)))
        return grid

    def follow(index: int) -> dict[str, Any]:
        event: dict[str, Any] = {}
        for event in server.stream(prompts[index], SAMPLING):
            texts[index] = event["text"]
        return event

    began = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as pool, Live(console=console, get_renderable=table, refresh_per_second=8):
        answers = list(pool.map(follow, range(len(prompts))))
    if not console.is_terminal:
        console.print()  # there, Live leaves its last line open
    cached = sum(answer["meta_info"]["cached_tokens"] for answer in answers)
    tokens = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
    console.print(f"            [dim]{tokens} tokens out, {cached} prompt tokens from the cache, {time.monotonic() - began:.1f} s[/]")
    return answers


def show_comparison(prompts: list[str], answers: list[dict[str, Any]], references: list[dict[str, Any]], native: str) -> bool:
    table = Table(title=f"tokens of etap against SGLang's {native} attention, same checkpoint", title_justify="left")
    for column in ("prompt", "equal", "largest difference\nof log-probabilities", "result"):
        table.add_column(column)
    comparisons = [compare(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    for prompt, result in zip(prompts, comparisons, strict=True):
        mark = "[green]" if result.agrees else "[red]"
        table.add_row(escape(_short(prompt)), f"{result.equal}/{result.total}", f"{result.largest_difference:.4f}", mark + result.note)
    console.print(table)
    return all(result.agrees for result in comparisons)


def show_calls(calls: list[dict[str, Any]]) -> int:
    """Print the calls that libetap served (one is one layer of one step) and return their number."""
    table = Table(title="attention calls that etap served", title_justify="left")
    for column in ("step", "kernel", "calls"):
        table.add_column(column, justify="right" if column == "calls" else "left")
    for call in calls:
        table.add_row(call["step"], call["kernel"], f"{call['calls']:,}")
    console.print(table)
    return sum(call["calls"] for call in calls)


def _line(text: str) -> str:
    return " ".join(text.split("\n"))


def _short(prompt: str) -> str:
    return _line(prompt if len(prompt) < 60 else f"[{len(prompt):,} characters] ... {prompt[-28:]}")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
