"""The commands of `etap` that this package brings."""

from __future__ import annotations

from typing import Any

from etap_bench.commands import bench, history, model, report, tune


def add_parsers(commands: Any) -> None:
    """Adds each command to the subparsers of `etap`. A parser sets `run`, a function from the parsed options to the exit status. Commands
    import what they need, libetap and PyTorch among it, when they run."""
    for command in (bench, report, history, model, tune):
        command.add_parser(commands)
