"""The command `etap`, also `python -m etap_py`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import etap_py
from etap_py import terminal
from etap_py.options import Parser
from etap_py.terminal import Column, Mark, OutputLost

if TYPE_CHECKING:
    from etap_py.doctor import Report

_OF_ETAP_BENCH = ("bench", "report", "history", "model", "tune")  # commands that another package has
# Where a package is called otherwise than its module.
_DISTRIBUTION = {"etap_bench": "etap-bench (in the source tree: pip install ./bench)", "pynvml": "nvidia-ml-py"}
_REQUIREMENTS = ("cuda", "sglang", "vllm")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when all is well; 1 when something was found wrong, the library can't be used or the output can't be written; 2 for
    a call that can't be understood or a package that is not installed; 130 when interrupted. Errors are one sentence on standard error;
    `python -X dev -m etap_py` shows the traceback of one that is a bug."""
    try:
        try:
            return _run(arguments)
        finally:  # also where the parser ends the program, after --help
            _flush()
    except OutputLost as lost:
        _abandon_output()
        cause = lost.__cause__
        if not isinstance(cause, BrokenPipeError):  # who closed it, as `head` does, has what they wanted
            terminal.complain(f"etap: standard output can't be written: {getattr(cause, 'strerror', cause)}")
        return 1
    except KeyboardInterrupt:
        terminal.complain("etap: interrupted")
        return 130


def _run(arguments: list[str] | None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        distribution = _DISTRIBUTION.get(package, package)
        terminal.complain(f"etap {options.command}: needs {package}, which is not installed: pip install {distribution}")
        return 2
    except ImportError as broken:  # libetap, or a package
        terminal.complain(f"etap {options.command}: {terminal.sentence(broken)}")
        return 1
    except OutputLost:
        raise
    except Exception as bug:
        if sys.flags.dev_mode:
            raise
        terminal.complain(f"etap {options.command}: {type(bug).__name__}: {terminal.sentence(bug)}")
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="etap", description="Decode attention for MLA models: what this machine makes of it.")
    parser.add_argument("--version", action="version", version=f"etap {etap_py.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="library, devices with a self-test, package versions, the seams of SGLang and vLLM")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    doctor.add_argument("--server", metavar="URL", help="of a running SGLang server: also show what it computed with libetap")
    doctor.add_argument(
        "--require", action="append", default=[], choices=_REQUIREMENTS, help="exit status 1 unless it works; may be repeated"
    )
    doctor.set_defaults(run=_doctor)
    try:
        from etap_bench.commands import add_parsers
    except ModuleNotFoundError as missing:  # the package, or one that it needs
        for name in _OF_ETAP_BENCH:
            # No prefix: whatever stands behind the command, options too, is taken.
            absent = commands.add_parser(name, help="needs the package etap-bench", add_help=False, prefix_chars="\0")
            absent.add_argument("arguments", nargs="*")
            absent.set_defaults(run=_absent, missing=missing)
    else:
        add_parsers(commands)
    return parser


def _absent(options: argparse.Namespace) -> int:
    missing: ModuleNotFoundError = options.missing
    raise missing


def _flush() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as failure:
        raise OutputLost from failure


def _abandon_output() -> None:
    """What is left in the buffer goes nowhere: Python would try to write it again at its end, and complain."""
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _doctor(options: argparse.Namespace) -> int:
    from etap_py.doctor import examine

    found = examine(options.server, options.require)
    if options.json:
        terminal.write(json.dumps(found.as_dict(), indent=2))
    else:
        _print_tables(found)
    return 0 if found.ok else 1


def _print_tables(found: Report) -> None:
    def mark(good: bool, words: str) -> Mark:
        return Mark(words, "green" if good else "red")

    if found.library_problem:
        library: Iterable[tuple[str, str | Mark]] = [("library", mark(False, f"broken, because {found.library_problem}"))]
    else:
        library = [("path", found.library), ("version", found.library_version), ("interface (ABI)", str(found.abi_version))]
    terminal.table("Library", ("libetap", "here"), library)
    if found.devices:
        states = [mark(True, "usable") if d.info.usable else f"not usable: {d.info.reason}" for d in found.devices]
        devices = [(d.device, d.info.name, state) for d, state in zip(found.devices, states, strict=True)]
        terminal.table("Devices", ("device", "name", "state"), devices)
        terminal.table("Tuning", ("device", "etap tune"), [(d.device, d.tuning) for d in found.devices if d.tuning])
        tests = [(d.device, d.self_test) for d in found.devices if d.self_test is not None]
        results = [(name, test.kernel, mark(test.passed, "passed" if test.passed else "FAILED"), test.detail) for name, test in tests]
        terminal.table("Self-test", ("device", "kernel", "result", "detail"), results)
    versions = {"python": found.python, **found.packages}
    terminal.table("Versions", ("package", "version"), [(name, version or "not installed") for name, version in versions.items()])
    for framework, state, seams in (("SGLang", found.sglang, found.seams), ("vLLM", found.vllm, found.vllm_seams)):
        if seams:
            rows = [(seam.name, mark(seam.found, "found" if seam.found else "MISSING"), seam.detail) for seam in seams]
            missing = "\n".join(f"{seam.name}: {seam.detail}" for seam in seams if not seam.found)
            terminal.table(f"{framework} seams", ("seam", "state", Column("detail", optional=True)), rows, missing)
        else:
            terminal.say(f"{framework}: {state}")
    if found.served:
        counted = [(str(call.process), call.step, call.kernel, f"{call.calls:,}") for call in found.served]
        terminal.table("Served", ("process", "step", "kernel", Column("calls", right=True)), counted)
    for warning in found.warnings:
        terminal.say(Mark(f"Warning: {warning}", "yellow"))
    for problem in (*([found.server_problem] if found.server_problem else []), *(f"Required: {why}" for why in found.missing)):
        terminal.say(mark(False, problem))
    well = f"It works, with {len(found.warnings)} warning{'s' * (len(found.warnings) > 1)}." if found.warnings else "All is well."
    terminal.say(mark(found.ok, well if found.ok else "Something is wrong: see above."))


if __name__ == "__main__":
    sys.exit(main())
