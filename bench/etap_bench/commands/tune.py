"""The command `etap tune`: which tile and cluster are fastest on the device at hand for given shapes.

Every choice that the library accepts is timed beside the library's own, in turns, over rotated pages (CUDA-graph replays on a GPU). One is
stored only when it was at least as fast in every context that was measured, and faster on the whole by more than the noise.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etap_py import terminal
from etap_py.files import cant_write, check_regular, check_writable
from etap_py.options import whole
from etap_py.terminal import Column

if TYPE_CHECKING:
    from etap_py.problem import Problem
    from etap_py.tuning import Choice

    from etap_bench.measurement import Times
    from etap_bench.shape import Shape

_LIBRARY = (0, 0)  # (tile, cluster): the library decides
_FIRST_ROUNDS = 3  # for all candidates,
_FINALISTS = 4  # and the best go on
_LEAST_GAIN = 1.01  # below, the library's choice is kept whatever the noise

Candidate = tuple[int, int]
Samples = dict[Candidate, list[float]]  # microseconds of a call in each round
Measure = Callable[["Shape", str, list[Candidate], int], Samples]


def add_parser(commands: Any) -> None:
    """Adds `tune` to the subparsers of `etap`. Exit status: 0; 1 when the file can't be written; 2 for input that can't be used."""
    parser = commands.add_parser("tune", help="find the fastest tile and cluster for shapes, on this device", description=__doc__)
    add = parser.add_argument
    add(
        "shapes",
        nargs="+",
        metavar="SHAPE",
        help="like bf16-16x4K-h16, or a list; what differs in the context only is tuned together",
    )
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is a usable one)")
    add("--ragged", action="store_true", help="with lengths as serving has them: up to the context, many short and few long")
    add("--rounds", type=whole(0), default=15, help="turns of the finalists (default: 15)")
    add("--output", "-o", type=Path, metavar="FILE", help="default: what ETAP_TUNING names, or tuning.json in the configuration folder")
    add("--dry-run", action="store_true", help="measure, and store nothing")
    add("--json", action="store_true", help="JSON instead of tables")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Result:
    """A problem, and what was found. `choice` is None where the library's is kept."""

    problem: Problem
    contexts: tuple[int, ...]
    candidates: int
    library: tuple[Times, ...]  # of each context
    best: Candidate
    best_times: tuple[Times, ...]
    noise: float  # the largest relative uncertainty of a median
    choice: Choice | None
    why: str


def run(options: argparse.Namespace) -> int:
    from etap_py import tuning
    from etap_py.problem import device_info

    from etap_bench.errors import Refused, check_device
    from etap_bench.shape_lists import load

    try:
        if options.rounds < 6:  # fewer have no interval that holds the median for 95 %
            raise ValueError(f"--rounds is {options.rounds}; allowed: 6 and more")
        if options.device:
            check_device(options.device)
        device = options.device or ("cuda:0" if device_info("cuda").usable else "cpu")
        groups: dict[Problem, list[Shape]] = {}
        for shape in (shape for source in options.shapes for shape in load(source)):
            groups.setdefault(shape.problem(device), []).append(shape.ragged() if options.ragged else shape)
        target = options.output or tuning.file()
        if target is None:
            raise ValueError("ETAP_TUNING is empty; allowed: the path of a file, or --output")
        if not options.dry_run:
            (check_writable if options.output else check_regular)(target)  # the default's folder is made
        with tuning.ignored():
            results = [search(problem, shapes, options.rounds, progress=not options.json) for problem, shapes in groups.items()]
        found = {tuning.key(result.problem): result.choice for result in results if result.choice is not None}
        if found and not options.dry_run:
            tuning.store(target, tuning.card(results[0].problem), found)
    except (Refused, ValueError, RuntimeError) as refused:  # EtapError among them
        terminal.complain(f"etap tune: {terminal.sentence(refused)}")
        return 2
    except OSError as failure:
        terminal.complain(f"etap tune: {cant_write(failure)}")
        return 1
    if options.json:
        terminal.write(_json(results, device, str(target) if found and not options.dry_run else None))
    else:
        _print(results, f"stored in {target}" if found and not options.dry_run else "nothing stored: the library's choices stay")
    return 0


def candidates(problem: Problem) -> list[Candidate]:
    """The library's choice, and every tile and cluster that makes another decision and needs no more workspace."""
    from etap_py.errors import EtapError
    from etap_py.problem import decide
    from etap_py.tuning import fits

    def decision(tile: int, cluster: int) -> tuple[int, ...] | None:
        forced = _forced(problem, (tile, cluster))
        try:
            found = decide(forced)
        except EtapError:
            return None
        return (found.tile_rows, found.num_tiles, found.cluster_size, found.num_workers) if fits(problem, forced) else None

    decide(problem)  # raises what the library has against the problem itself
    kept, seen = [_LIBRARY], {decision(*_LIBRARY)}
    for tile in (0, *range(8, 65, 8)):
        for cluster in range(9):
            made = decision(tile, cluster)
            if made is not None and made not in seen:
                seen.add(made)
                kept.append((tile, cluster))
    return kept


def search(problem: Problem, shapes: list[Shape], rounds: int, progress: bool = False, measure: Measure | None = None) -> Result:
    """Times all candidates on all shapes (of one problem), first briefly, then the best thoroughly, and decides."""
    from etap_py.tuning import Choice

    from etap_bench.measurement import Times

    measure = measure or measure_shape
    contexts = tuple(shape.context for shape in shapes)
    everyone = candidates(problem)
    if len(everyone) == 1:
        return Result(problem, contexts, 1, (), _LIBRARY, (), 0.0, None, "the device has nothing to choose for it")

    def timed(chosen: list[Candidate], turns: int) -> dict[Candidate, list[Times]]:
        of: dict[Candidate, list[Times]] = {candidate: [] for candidate in chosen}
        for shape in terminal.track(shapes, f"{len(chosen)} choices", hidden=not progress):
            samples = measure(shape, problem.device, chosen, turns)
            for candidate in chosen:
                of[candidate].append(Times.of(samples[candidate]))
        return of

    def gain(of: dict[Candidate, list[Times]], candidate: Candidate) -> float:
        return statistics.geometric_mean(a.p50 / b.p50 for a, b in zip(of[_LIBRARY], of[candidate], strict=True))

    first = timed(everyone, _FIRST_ROUNDS)
    finalists = sorted(everyone[1:], key=lambda candidate: -gain(first, candidate))[:_FINALISTS]
    of = timed([_LIBRARY, *finalists], rounds)
    noise = max(times.uncertainty for every in of.values() for times in every)
    never_slower = [c for c in finalists if all(a.p50 >= b.p50 for a, b in zip(of[_LIBRARY], of[c], strict=True))]
    best = max(never_slower or finalists, key=lambda candidate: gain(of, candidate))
    speedup, needed = gain(of, best), max(_LEAST_GAIN, 1 + 2 * noise)
    choice, why = None, f"{speedup:.3f} times as fast, needed: {needed:.3f}"
    if not never_slower:
        why = "every other choice is slower in some context"
    elif speedup > needed:
        choice = Choice(*best, round(speedup, 4), contexts)
    return Result(problem, contexts, len(everyone), tuple(of[_LIBRARY]), best, tuple(of[best]), noise, choice, why)


def measure_shape(shape: Shape, device: str, chosen: list[Candidate], rounds: int) -> Samples:
    """Times of a call with each choice, in turns. Raises RuntimeError when one computes something else than the library's choice."""
    from etap_py.decode import Plan
    from etap_py.problem import device_info

    from etap_bench import inputs
    from etap_bench.contenders import Etap
    from etap_bench.timing import timer_of

    kind, _, index = device.partition(":")
    pools = inputs.pools_of(shape, device_info(kind, int(index or 0)).l2_bytes)
    arena = inputs.Arena(shape.kv_format, shape.d_latent, shape.d_rope, tokens=inputs.arena_tokens(shape, pools), device=device)
    library = Etap(inputs.Inputs(shape, arena, pools))
    expected = library.call(0).double()
    timer = timer_of(device)
    calls = timer.calls(shape.kv_bytes, pools)
    contenders, replays = [], {}  # graphs don't keep their plans' workspaces alive
    for candidate in chosen:
        contender = copy.copy(library)
        contender.plan = Plan(_forced(library.problem, candidate))
        contender.update()
        contenders.append(contender)
        difference = contender.call(0).double() - expected
        if not difference.norm() <= 1e-2 * expected.norm():  # BF16 rounding gives 2e-3
            raise RuntimeError(f"tile and cluster {candidate} compute something else than the library's choice for {shape.name}")
        replays[str(candidate)] = timer.replay_of(contender.call, pools, calls)
    times, _ = timer.rounds(replays, rounds, warm_up=1)
    return {candidate: [us / calls for us in times[str(candidate)]] for candidate in chosen}


def _forced(problem: Problem, candidate: Candidate) -> Problem:
    return dataclasses.replace(problem, force_tile=candidate[0], force_cluster=candidate[1])


def _json(results: list[Result], device: str, stored_in: str | None) -> str:
    """With what a file of `etap bench` says of device and software."""
    import msgspec
    from etap_py.tuning import key

    from etap_bench import runner, timing

    found = [{f.name: getattr(result, f.name) for f in dataclasses.fields(result)} | {"problem": key(result.problem)} for result in results]
    said = {
        "format": "etap-tune",
        "version": 1,
        "device": runner.device_of(timing.timer_of(device)),
        "software": runner.software(),
        "commit": runner.tree(),
        "stored_in": stored_in,
        "results": found,
    }
    return msgspec.json.encode(said).decode()


def _print(results: list[Result], note: str) -> None:
    columns = [Column("heads x tokens, batch"), Column("contexts"), Column("choices", right=True, optional=True)]
    columns += [Column("library us", right=True), Column("best us", right=True), Column("tile, cluster"), Column("outcome")]
    rows = []
    for r in results:
        p = r.problem
        rows.append(
            (
                f"{p.num_heads} x {p.max_query_len}, {p.batch}",
                ", ".join(map(str, r.contexts)),
                str(r.candidates),
                ", ".join(f"{times.p50:.1f}" for times in r.library),
                ", ".join(f"{times.p50:.1f}" for times in r.best_times),
                f"{r.best[0] or 'auto'}, {r.best[1] or 'auto'}" if r.best_times else "-",
                f"{'taken' if r.choice else 'default kept'}: {r.why}",
            )
        )
    terminal.table("Tuned", columns, rows, note)
