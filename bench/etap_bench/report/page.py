"""Fills the template; draws nothing and computes nothing."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from etap_py.files import check_regular
from matplotlib.figure import Figure

from etap_bench.report.figures import figures
from etap_bench.report.limits import Limits, limits
from etap_bench.report.summary import NOISE, Prices, buckets, contender_names, contenders, verdict
from etap_bench.results import Results


def write(results: Results, prices: Prices, output: Path) -> list[Path]:
    """Writes `output`, an HTML file that refers to nothing outside itself, and a PNG of each figure beside it, into a folder that is made
    where there is none. Returns all paths.

    Raises Refused when nothing was measured, OSError when a file can't be written.
    """
    bounds = limits(results)
    all_contenders = contenders(results, prices)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_regular(output)
    drawn = figures(results, all_contenders, bounds, prices.rest_ms)
    loader = jinja2.PackageLoader("etap_bench.report", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    html = environment.get_template("page.html.j2").render(
        results=results,
        run=results.run,
        prices=prices,
        noise=f"{NOISE - 1:.0%}",
        verdict=verdict(results, all_contenders),
        contenders=all_contenders,
        names=contender_names(results),
        by_context=buckets(results, bounds.of_row, "context"),
        by_batch=buckets(results, bounds.of_row, "batch"),
        limits=bounds,
        limit_counts=_counts(bounds),
        left_out=_left_out(results),
        figures={name: _data_uri(figure) for name, figure in drawn.items()},
    )
    written = []
    for name, figure in drawn.items():
        written.append(output.with_name(f"{output.stem}-{name}.png"))
        figure.savefig(written[-1], dpi=200)
    output.write_text(html, encoding="utf-8")
    return [output, *written]


def _data_uri(figure: Figure) -> str:
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.getvalue()).decode()}"


def _counts(bounds: Limits) -> list[tuple[str, int]]:
    words = sorted(set(bounds.of_row))
    return sorted(((word, bounds.of_row.count(word)) for word in words), key=lambda pair: -pair[1])


def _left_out(results: Results) -> list[tuple[str, int, str]]:
    """Contenders that were missing in steps: name, in how many, the first reason."""
    reasons: dict[str, list[str]] = {}
    for row in results.rows:
        for name, why in {**row.measured.skipped, **row.wrong}.items():
            reasons.setdefault(name, []).append(why)
    return [(name, len(whys), whys[0]) for name, whys in reasons.items()]
