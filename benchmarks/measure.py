"""Time and memory of several contestants that take turns, and the tables made of them."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import random
import statistics
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from torch.profiler import ProfilerActivity, profile

from .contestants import CONTESTANTS, Runner
from .workloads import Workload

SECONDS_PER_TURN = 0.2
"""A turn repeats the step until about this long has passed, so that the clock's grain does not matter."""
SLOW, FEW = 20.0, 3
"""A contestant that takes more than SLOW times what ordinary training takes has FEW turns of one step."""


@dataclass
class Row:
    """One contestant on one workload at one batch size; times in ms, ratios to ordinary training, quartiles beside.

    ``fails`` says why there are no figures.
    """

    workload: str
    batch_size: int
    contestant: str
    ms: float | None = None
    ms_quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    peak_mib: float | None = None
    rounds: int = 0
    fails: str | None = None


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Without what the profiler writes past Python's ``sys.stderr``."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_bytes(runner: Runner, attempts: int = 7) -> int:
    """The most that a step allocates on top of what is held between steps, as torch's CPU allocator sees it, and the
    most that Python and numpy do, added.

    The median of three steps: now and then dpkit looks again at how a loss is made, which takes as much as in its first
    step.
    """
    peaks: list[int] = []
    tracemalloc.start()
    batch = next(runner.batches)
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    runner.step(batch)
    beside = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    for _ in range(attempts):  # on a busy machine the profiler now and then comes back with nothing
        batch = next(runner.batches)
        with silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            runner.step(batch)
        held = peak = 0
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        for event in sorted(events, key=lambda e: e.start_ns()):  # the noise's thread reports apart
            held += event.nbytes()
            peak = max(peak, held)
        del profiler, events  # of a slow step they take gigabytes
        peaks += [peak] if peak else []
        if len(peaks) == 3:
            return int(statistics.median(peaks)) + beside
    raise RuntimeError(f"the profiler saw allocations in {len(peaks)} of {attempts} steps")


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def compare(
    workload: Workload,
    n: int,
    rounds: int,
    contestants: Mapping[str, Callable[[Workload, int], Runner]] = CONTESTANTS,
) -> list[Row]:
    """The contestants on one workload, taking turns; the first is what the others are compared with.

    In a process of its own, as a run has: what other workloads leave behind (the allocator's memory, compiled code,
    objects for the collector to visit) slows down the shortest steps most.
    """
    ours, end = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send, args=(end, workload, n, rounds, contestants))
    child.start()
    end.close()
    try:
        rows: list[Row] = ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"the process of {workload.name}, batch {n}, ended with {child.exitcode}") from None
    child.join()
    return rows


def _send(
    end: Connection,
    workload: Workload,
    n: int,
    rounds: int,
    contestants: Mapping[str, Callable[[Workload, int], Runner]],
) -> None:
    end.send(_compare(workload, n, rounds, contestants))


def _compare(
    workload: Workload, n: int, rounds: int, contestants: Mapping[str, Callable[[Workload, int], Runner]]
) -> list[Row]:
    gc.collect()
    rows = {name: Row(workload.name, n, name) for name in contestants}
    runners: dict[str, Runner] = {}
    plan: dict[str, tuple[int, int]] = {}  # turns, and steps in each
    basis = 0.0
    for name, prepare in contestants.items():
        try:
            runners[name] = runner = prepare(workload, n)
            runner.seconds(1)
            seconds = runner.seconds(1)
            if basis == 0.0 or seconds <= SLOW * basis:  # dpkit's checks of the first batch and its timing fall here
                runner.seconds(2)
                seconds = runner.seconds(2)
        except Exception as error:
            runners.pop(name, None)
            rows[name].fails = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            print(f"{workload.name:14} {n:4}  {name:18} fails: {rows[name].fails}", flush=True)
            continue
        basis = basis or seconds
        plan[name] = (FEW, 1) if seconds > SLOW * basis else (rounds, max(1, round(SECONDS_PER_TURN / seconds)))
    first = next(iter(contestants))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for k in range(rounds):
        taking = [name for name in runners if k < plan[name][0]]
        for name in random.sample(taking, len(taking)):
            times[name].append(runners[name].seconds(plan[name][1]))
    for name, runner in runners.items():
        row, own = rows[name], times[name]
        ratios = [mine / base for mine, base in zip(own, times[first], strict=False)]
        row.ms, row.ms_quartiles = 1e3 * statistics.median(own), _scaled(quartiles(own))
        row.ratio, row.ratio_quartiles = statistics.median(ratios), quartiles(ratios)
        row.peak_mib, row.rounds = peak_bytes(runner) / 2**20, len(own)
        print(
            f"{workload.name:14} {n:4}  {name:18} {row.ms:9.2f} ms  ×{row.ratio:<7.2f} {row.peak_mib:8.1f} MiB",
            flush=True,
        )
    return list(rows.values())


def _scaled(pair: tuple[float, float]) -> tuple[float, float]:
    return 1e3 * pair[0], 1e3 * pair[1]


# --- tables ---


def table(rows: list[Row]) -> list[str]:
    """The rows as lines of a Markdown table."""
    lines = ["| workload | batch | contestant | ms per step | ratio | peak MiB |", "|---|---:|---|---:|---:|---:|"]
    for row in rows:
        start = f"| {row.workload} | {row.batch_size} | {row.contestant} "
        if row.ms is None or row.ms_quartiles is None or row.ratio_quartiles is None:
            lines.append(f"{start}| fails | | |")
            continue
        lines.append(
            f"{start}| {row.ms:.2f} [{row.ms_quartiles[0]:.2f}, {row.ms_quartiles[1]:.2f}] "
            f"| {row.ratio:.2f} [{row.ratio_quartiles[0]:.2f}, {row.ratio_quartiles[1]:.2f}] | {row.peak_mib:.1f} |"
        )
    failed = {f"{row.workload}, {row.batch_size}, {row.contestant}": row.fails for row in rows if row.fails}
    if failed:
        lines += ["", "Fails:", "", *(f"- {where}: {why}" for where, why in failed.items())]
    return lines


def summary(rows: list[Row]) -> list[str]:
    """How dpkit stands to ordinary training and to Opacus's best mode, over all rows but those of ``tiny``."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row.ms is not None:
            found.setdefault((row.workload, row.batch_size), {})[row.contestant] = row
    ours = {k: v["dpkit"] for k, v in found.items() if "dpkit" in v and k[0] != "tiny"}
    if not ours:
        return []
    best = {k: min((r.ratio for name, r in found[k].items() if name.startswith("Opacus")), default=None) for k in ours}
    ahead = {k: v / ours[k].ratio for k, v in best.items() if v is not None}  # type: ignore[operator]
    noise = "ordinary + noise"
    beyond = {k: r.ratio / found[k][noise].ratio for k, r in ours.items() if noise in found[k]}  # type: ignore[operator]
    memory = {k: r.peak_mib / found[k]["ordinary"].peak_mib for k, r in ours.items()}  # type: ignore[operator]
    ratios = {k: r.ratio for k, r in ours.items()}
    lines = ["| | geometric mean | from | to |", "|---|---:|---:|---:|"]
    for what, values in (
        ("time, dpkit / ordinary", ratios),
        ("time, dpkit / ordinary training that adds the noise", beyond),
        ("time, Opacus's best mode / dpkit", ahead),
        ("peak memory, dpkit / ordinary", memory),
    ):
        if values:
            low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
            mean = math.exp(statistics.fmean(math.log(v) for v in values.values()))  # type: ignore[arg-type]
            lines.append(
                f"| {what} | {mean:.2f} | {values[low]:.2f} ({low[0]}, {low[1]}) "
                f"| {values[high]:.2f} ({high[0]}, {high[1]}) |"
            )
    tiny = {k: v for k, v in found.items() if k[0] == "tiny" and "dpkit" in v}
    for (_, n), both in tiny.items():
        lines.append(
            f"| overhead of a step, tiny MLP, batch {n} | {both['dpkit'].ms - both['ordinary'].ms:.2f} ms | | |"
        )  # type: ignore[operator]
    return lines
