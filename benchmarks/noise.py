"""Time of secure noise beside plain noise, per entry of the gradient.

    python -m benchmarks.noise [--rounds 21] [--quick]

Both live in one process and take turns; what is compared is the ratio within a round. Times are the process's own
processor time, so that what else the machine does counts little. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import RESULTS, conditions, sentence
from dpkit.noise import NoiseSource, Source
from dpkit.secure import SecureNoise

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
ENTRIES_PER_TURN = 500_000


@dataclass
class Row:
    """One size: nanoseconds an entry, and the ratio's quartiles."""

    entries: int
    dtype: str
    plain_ns: float
    secure_ns: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def nanoseconds(source: Source, s: Tensor) -> float:
    """Processor time of one release, per entry."""
    repeats = max(1, ENTRIES_PER_TURN // s.numel())
    start = time.process_time()
    for _ in range(repeats):
        source.add_to([s], 1.0)
    return 1e9 * (time.process_time() - start) / repeats / s.numel()


def compare(entries: int, dtype: torch.dtype, rounds: int) -> Row:
    """Plain and secure noise on a gradient of so many entries, taking turns."""
    s = torch.zeros(entries, dtype=dtype)
    plain, secure = NoiseSource(), SecureNoise()
    nanoseconds(plain, s), nanoseconds(secure, s)  # warm-up
    pairs = [(nanoseconds(plain, s), nanoseconds(secure, s)) for _ in range(rounds)]
    ratios = [b / a for a, b in pairs]
    first, middle, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return Row(
        entries,
        str(dtype).removeprefix("torch."),
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        middle,
        (first, third),
    )


def markdown(about: dict[str, Any], rows: list[Row]) -> str:
    """The table, with its conditions above it."""
    lines = [
        "# Secure noise beside plain noise",
        "",
        sentence(about),
        f"Medians over {about['rounds']} rounds of processor time, the ratio's quartiles in brackets.",
        "",
        "| entries | dtype | plain, ns an entry | secure, ns an entry | ratio |",
        "|---:|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r.entries:,} | {r.dtype} | {r.plain_ns:.2f} | {r.secure_ns:.2f} "
        f"| {r.ratio:.2f} [{r.ratio_quartiles[0]:.2f}, {r.ratio_quartiles[1]:.2f}] |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the comparison and writes results/noise.json and results/noise.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="3 rounds, up to a million entries; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = SIZES[:3] if args.quick else SIZES
    rounds = 3 if args.quick else args.rounds
    rows = [compare(n, dtype, rounds) for dtype in (torch.float32, torch.float64) for n in sizes]
    about = {**conditions("benchmarks.noise"), "rounds": rounds}
    table = markdown(about, rows)
    print(table)
    if not args.quick:
        (RESULTS / "noise.md").write_text(table)
        (RESULTS / "noise.json").write_text(
            json.dumps({"conditions": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
