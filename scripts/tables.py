#!/usr/bin/env python3
"""Writes the measured tables of README.md and docs/ from what is stored: runs in benchmarks/, calibrations in
bench/etap_bench/model.

    python scripts/tables.py            # after etap history store
    python scripts/tables.py --check    # exit status 1, and the names, where a file is not what would be written

A table stands between `<!-- table NAME -->` and `<!-- end of table -->`; what is between is replaced. A shape's numbers are those of the
last stored run of its card that measured it, and the table names the commits.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from etap_bench import history  # noqa: E402
from etap_bench.model.calibration import Calibration, packaged_calibrations, residuals, rms  # noqa: E402
from etap_bench.results import Row  # noqa: E402
from etap_bench.shape import Shape  # noqa: E402
from etap_bench.table import markdown  # noqa: E402

STORE = ROOT / "benchmarks"
PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md", ROOT / "docs" / "theory.md")
CARDS = {"H200": ("nvidia-h200", "h200-peers"), "H100": ("nvidia-h100-80gb-hbm3", "h100-sxm-peers")}
TIMES = "\u00d7"
TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end of table -->)", flags=re.DOTALL)

# The published comparison, for which the peers were measured too (the list "published" of etap bench), and two FP8 shapes.
COMPARED = (
    *("bf16-1x4K-h16", "bf16-1x64K-h16", "bf16-16x1K-h16", "bf16-16x4K-h16", "bf16-16x16K-h16", "bf16-16x64K-h16", "bf16-64x4K-h16"),
    *("bf16-128x2K-h16", "bf16-16x16K-h8", "bf16-16x16K-h32", "bf16-16x16K-h64", "bf16-16x16K-h128", "bf16-16x16K-h16-q2"),
    "bf16-16x16K-h16-q4",
)
FP8 = ("e4m3-16x16K-h16", "e4m3-16x64K-h16")


def latest(folder: str) -> dict[str, tuple[Row, str]]:
    """Shape: (its row, "commit, date") of the last run that measured it; in the order of the largest run."""
    runs = history.runs(STORE / folder)
    order = dict.fromkeys(row.name for run in sorted(runs, key=lambda run: -len(run.rows)) for row in run.rows)
    found = {row.name: (row, run.source) for run in runs for row in run.rows if row.measured.fraction}
    return {name: found[name] for name in order if name in found}


def sources(rows: Iterable[tuple[Row, str]]) -> str:
    """The commits of these rows; those of fewer rows with their number."""
    counts: dict[str, int] = {}
    for _, source in rows:
        counts[source] = counts.get(source, 0) + 1
    ordered = sorted(counts, key=lambda source: -counts[source])
    others = "".join(f"; {counts[source]} shapes: {source}" if counts[source] > 1 else f"; 1 shape: {source}" for source in ordered[1:])
    return f"kernels of {ordered[0]}{others}"


def peers(calibration: str) -> dict[str, float]:
    """Shape: the best peer's fraction of the ceiling, on a card of this kind."""
    stored = packaged_calibrations()[calibration]
    (measured,) = stored.kernels
    return {name: stored.streams[name] / us for name, us in measured.calls.items()}


def described(name: str) -> tuple[str, str]:
    """(batch and context, heads) of a shape's name, as a person would say them."""
    shape = Shape.parse(name)
    queries = f", {shape.query_len} query tokens" if shape.query_len > 1 else ""
    return f"{shape.batch} {TIMES} {shape.context // 1024}K{', FP8' if shape.fp8 else ''}", f"{shape.heads}{queries}"


def compared() -> str:
    """ETAP and the best peer of each card, the larger fraction in bold."""
    cards = {card: (latest(file), peers(calibration)) for card, (file, calibration) in CARDS.items()}
    shapes = (*COMPARED, *FP8)
    rows = []
    for name in shapes:
        cells = [*described(name)]
        for ours, theirs in cards.values():
            row, _ = ours[name]
            fractions = [f"{row.measured.fraction:.2f}", f"{theirs[name]:.2f}" if name in theirs else ""]
            cells += [
                f"{row.measured.etap_us:.1f}",
                *(f"**{one}**" if name in theirs and one == max(fractions) else one for one in fractions),
            ]
        rows.append(cells)
    head = [
        f"batch {TIMES} context",
        "heads",
        *itertools.chain.from_iterable((f"{card} µs", "of the ceiling", "best peer") for card in CARDS),
    ]
    notes = []
    for card, (ours, theirs) in cards.items():
        mean = geometric_mean(ours[name][0].measured.fraction or 0 for name in COMPARED)
        other = geometric_mean(theirs[name] for name in COMPARED)
        notes.append(f"{card}: geometric mean of the first {len(COMPARED)} rows {mean:.2f}, best peers {other:.2f}; ")
        notes[-1] += f"{sources(ours[name] for name in shapes)}."
    return markdown(head, rows, text=head[:2]) + "\n\n" + "\n".join(notes)


def measured(card: str) -> str:
    """Every shape of a card."""
    head = ("shape", "ceiling µs", "ETAP µs", "TB/s", "of the ceiling", "plan µs", "relative error")
    rows = latest(CARDS[card][0])
    cells = []
    for name, (row, _) in rows.items():
        found = row.measured
        numbers = (found.ceiling_us, found.etap_us, row.shape.kv_bytes / (found.etap_us or 1) / 1e6, found.fraction, found.plan_us)
        how = (".1f", ".1f", ".2f", ".2f", ".1f")
        texts = ["" if number is None else format(number, one) for number, one in zip(numbers, how, strict=True)]
        cells.append((f"`{name}`", *texts, f"{found.error['etap']:.1e}"))
    return f"Measured: {sources(rows.values())}.\n\n{markdown(head, cells, text=('shape',))}"


def fit() -> str:
    """`etap model validate`: how far the model is from what it was fitted to."""
    rows = []
    for calibration in packaged_calibrations().values():
        for one in calibration.kernels:
            rows.append(fit_row(calibration, one))
    return markdown(("card, kernel", "calls", "fitted numbers", "rms", "worst, long", "worst, short"), rows, text=("card, kernel",))


def fit_row(calibration: Calibration, one: Any) -> tuple[str, ...]:
    found = residuals(calibration, one)

    def worst(long: bool) -> str:
        of_length = [residual for residual in found if residual.long == long]
        if not of_length:
            return ""
        residual = max(of_length, key=lambda residual: abs(residual.error))
        return f"{residual.error:+.1%} (`{residual.shape.name}`)"

    kernel = f"{one.kernel.name}{', FP8' if one.kernel.fp8 else ''}"
    error = rms([residual.error for residual in found])
    return (
        f"{calibration.gpu}, {kernel} ({calibration.date})",
        str(len(found)),
        str(len(one.fitted)),
        f"{error:.1%}",
        worst(True),
        worst(False),
    )


TABLES: dict[str, Callable[[], str]] = {
    "compared": compared,
    "h200": lambda: measured("H200"),
    "h100": lambda: measured("H100"),
    "fit": fit,
}


def written(text: str) -> str:
    """A page with its tables renewed. Raises KeyError for a table that there is not."""
    return TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; say which files would change")
    options = parser.parse_args(arguments)
    changed = [page for page in PAGES if page.is_file() and written(page.read_text()) != page.read_text()]
    for page in changed:
        print(f"{page.relative_to(ROOT)} {'is not what the stored runs say' if options.check else 'written'}")
        if not options.check:
            page.write_text(written(page.read_text()))
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
