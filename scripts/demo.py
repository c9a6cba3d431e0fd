#!/usr/bin/env python3
"""The main job: a real SGLang server answers prompts with its MLA attention computed by libetap.

    make demo                        or, in the environment that it makes:
    .venv/bin/python scripts/demo.py [--device cpu]

Serves a small model of DeepSeek's architecture, which writes the documentation of a Python function from its signature,
with `--attention-backend etap`; sends signatures over HTTP, streams the answers, and asks SGLang's own attention for the
same answers. Ends with status 0 when they agree. (The model was trained once: scripts/train_demo.py.)
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import psutil
from demo_lib.checkpoint import END_OF_TEXT, write_trained
from demo_lib.compare import compare
from demo_lib.prompts import prompts
from demo_lib.server import ROOT, Server, ServerFailed, on_cuda
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

console = Console(highlight=False)

SAMPLING = {"temperature": 0.0, "max_new_tokens": 96}  # greedy, so that the answers can be compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where PyTorch finds a GPU")
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="for the checkpoint and the servers' logs")
    parser.add_argument("--page-size", type=int, default=64, help="tokens a KV page (default: 64)")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's background jobs are started with it ignored
        signal.signal(number, _interrupt)
    started = psutil.Process().create_time()  # the imports above take their time as well
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
    model = make_checkpoint(folder)
    alone, together = prompts()
    options = ("--page-size", str(arguments.page_size), "--mem-fraction-static", "0.3", "--max-total-tokens", "32768")
    options += ("--enable-fp32-lm-head",)  # BF16 logits are 1/64 apart: too many exact ties between candidates

    native = "triton" if device == "cuda" else "torch_native"
    ours = Server(model, "etap", device=device, log=folder / "server-etap.log", options=options)
    theirs = Server(model, native, device=device, log=folder / f"server-{native}.log", options=options)

    with ours:
        wait_for(ours)
        with theirs:  # starts beside the conversation
            answers = [stream_one(ours, prompt) for prompt in alone] + stream_together(ours, together)
            calls = ours.etap_calls()
            ours.stop()
            wait_for(theirs)
            with console.status(f"the same {len(answers)} prompts"):
                references = [theirs.generate(prompt, SAMPLING) for prompt in alone + together]

    agreed = show_comparison(alone + together, answers, references, native)
    served = show_calls(calls)
    verdict = "[green]done" if agreed and served else "[red]failed"
    console.print(f"{verdict} in {time.time() - started:.0f} s")
    return 0 if agreed and served else 1


def make_checkpoint(folder: Path) -> Path:
    model = folder / "checkpoint"
    origin = write_trained(model)
    console.print(
        f"[bold]checkpoint[/]  {float(origin['parameters']) / 1e6:.1f} M parameters, DeepSeek-V2 architecture, trained for "
        f"{float(origin['seconds']):.0f} s on {escape(origin['device'])}: it documents Python functions",
        soft_wrap=True,
    )
    return model


def wait_for(server: Server) -> None:
    console.print(f"[bold]server[/]      python {escape(' '.join(server.command[1:]))}", soft_wrap=True)
    began = time.monotonic()
    with console.status("") as status:
        server.wait_until_ready(tick=lambda: status.update(f"starting, {time.monotonic() - began:.0f} s"))
    console.print(f"            ready after {time.monotonic() - began:.0f} s")


def stream_one(server: Server, prompt: str) -> dict[str, Any]:
    """Send a prompt and print the answer as it comes."""
    console.print(f"[bold]prompt[/]      [cyan]{escape(_indented(_short(prompt)))}[/]", end="", soft_wrap=True)
    began, event, printed = time.monotonic(), {}, 0
    for event in server.stream(prompt, SAMPLING):
        text = event["text"].rstrip("\n")
        console.print(escape(_indented(text[printed:])), end="", soft_wrap=True)
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
            grid.add_row("", f"[cyan]{escape(_signature(prompt))}", escape(_line(text).removesuffix('"""')))
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
        table.add_row(escape(_signature(prompt)), f"{result.equal}/{result.total}", f"{result.largest_difference:.4f}", mark + result.note)
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
    return " ".join(text.split())


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + 12 * " ")


def _signature(prompt: str) -> str:
    """The question at the end of a prompt."""
    return prompt.rpartition(':\n    """')[0].rpartition(END_OF_TEXT)[2]


def _short(prompt: str) -> str:
    before, end, question = prompt.rpartition(END_OF_TEXT)
    return f"[{len(before):,} characters of documentation]\n{question}" if end else prompt


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
