"""The command `etap`, also `python -m etap_py`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence

from etap_py import __version__, tune
from etap_py.bench import command as bench
from etap_py.doctor import Report, examine
from etap_py.model import command as model
from etap_py.report import command as report

# Modules with add_parser(subparsers), which sets `run`, a function from the parsed options to the exit status. They import what they need,
# rich among it, when they run.
_COMMANDS = (bench, report, model, tune)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when all is well, 1 when something was found wrong, 2 for a call that can't be understood or a package that is not
    installed."""
    parser = argparse.ArgumentParser(prog="etap", description="Decode attention for MLA models: what this machine makes of it.")
    parser.add_argument("--version", action="version", version=f"etap {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="library, devices with a self-test, package versions, the seams of SGLang and vLLM")
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    doctor.add_argument("--server", metavar="URL", help="of a running SGLang server: also show what it computed with libetap")
    doctor.set_defaults(run=_doctor)
    for command in _COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        extra = "torch" if package == "torch" else "bench"
        print(f"etap: {options.command} needs {package}, which is not installed: pip install 'etap-py[{extra}]'", file=sys.stderr)
        return 2
    return status


def _doctor(options: argparse.Namespace) -> int:
    if not options.json:
        try:
            import rich  # noqa: F401
        except ImportError:
            print("etap: the tables need rich: pip install 'etap-py[cli]', or use --json", file=sys.stderr)
            return 2
    try:
        found = examine(options.server)
    except ConnectionError as failure:
        print(f"etap: {failure}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _print_tables(found)
    return 0 if found.ok else 1


def _print_tables(found: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> None:
        made = Table(title=title, title_justify="left")
        for column in columns:
            made.add_column(column, overflow="fold")
        for row in rows:
            made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
        console.print(made)

    def mark(good: bool, words: str) -> Text:
        return Text(words, style="green" if good else "red")

    library = [("path", found.library), ("version", found.library_version), ("interface (ABI)", str(found.abi_version))]
    table("Library", ("libetap", "here"), library)
    devices = [(d.device, d.info.name, mark(True, "usable") if d.info.usable else f"not usable: {d.info.reason}") for d in found.devices]
    table("Devices", ("device", "name", "state"), devices)
    table("Tuning", ("device", "etap tune"), [(d.device, d.tuning) for d in found.devices if d.tuning])
    tests = [(d.device, d.self_test) for d in found.devices if d.self_test is not None]
    results = [(name, test.kernel, mark(test.passed, "passed" if test.passed else "FAILED"), test.detail) for name, test in tests]
    table("Self-test", ("device", "kernel", "result", "detail"), results)
    versions = {"python": found.python, **found.packages}
    table("Versions", ("package", "version"), [(name, version or "not installed") for name, version in versions.items()])
    for framework, state, seams in (("SGLang", found.sglang, found.seams), ("vLLM", found.vllm, found.vllm_seams)):
        if seams:
            states = [(seam.name, mark(seam.found, "found" if seam.found else "MISSING"), seam.detail) for seam in seams]
            table(f"{framework} seams", ("seam", "state", "detail"), states)
        else:
            console.print(f"{framework}: {state}", markup=False)
    if found.served:
        counted = [(str(call.process), call.step, call.kernel, f"{call.calls:,}") for call in found.served]
        table("Served", ("process", "step", "kernel", "calls"), counted)
    console.print(mark(found.ok, "All is well." if found.ok else "Something is wrong: see above."))


if __name__ == "__main__":
    sys.exit(main())
