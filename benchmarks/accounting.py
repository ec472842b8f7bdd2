"""dpkit's accountant beside dp_accounting, Opacus PRV and prv_accountant: ratio to the truth, time, failures; one run.

    python -m benchmarks.accounting [--limit SECONDS]

Every library answers the settings of tests/accountants/truth.json in this one process, one after the other, under a
time limit each. Writes benchmarks/results/accounting.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TRUTH = HERE.parent / "tests" / "accountants" / "truth.json"
# one Poisson step in closed form; the table's converged grid lies 4e-6 above it
EXACT = {"onestep": 0.1994504477959124}
Steps = list[tuple[float, float, int]]


def dpkit_pld(steps: Steps, delta: float) -> float:
    from dpkit.accountants import PLDAccountant, dpsgd

    acc = PLDAccountant()
    for sigma, q, n in steps:
        acc.compose(dpsgd(sigma, q, n))
    return acc.epsilon(delta)


def google_pld(steps: Steps, delta: float) -> float:
    import dp_accounting
    from dp_accounting import pld

    acc = pld.PLDAccountant()
    for sigma, q, n in steps:
        event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
        acc.compose(dp_accounting.SelfComposedDpEvent(event, n))
    return float(acc.get_epsilon(delta))


def opacus_prv(steps: Steps, delta: float) -> float:
    from opacus.accountants import PRVAccountant

    acc = PRVAccountant()
    acc.history = [(sigma, q, n) for sigma, q, n in steps]
    return float(acc.get_epsilon(delta))


def microsoft_prv(steps: Steps, delta: float) -> float:
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    mechanisms = [PoissonSubsampledGaussianMechanism(noise_multiplier=s, sampling_probability=q) for s, q, _ in steps]
    counts = [n for _, _, n in steps]
    acc = PRVAccountant(prvs=mechanisms, max_self_compositions=counts, eps_error=0.01, delta_error=1e-3 * delta)
    return float(acc.compute_epsilon(delta=delta, num_self_compositions=counts)[2])


class _TimeUpError(Exception):
    pass


def _alarm(*_: Any) -> None:
    raise _TimeUpError


def measure(answer: Callable[[Steps, float], float], case: dict[str, Any], limit: int) -> dict[str, Any]:
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(limit)
    start, spent = time.perf_counter(), time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value: float | None = answer([tuple(step) for step in case["steps"]], case["delta"])
        reason = None if value is not None and math.isfinite(value) else f"answered {value}"
    except _TimeUpError:
        value, reason = None, f"over {limit} s"
    except ImportError:
        raise
    except Exception as error:  # a rival's failure is a result
        value, reason = None, f"{type(error).__name__}: {error}"[:120]
    finally:
        signal.alarm(0)
    truth = EXACT.get(case["id"], case["epsilon"])
    milliseconds, cpu_milliseconds = 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - spent)
    ratio = None if reason else value / truth  # type: ignore[operator]
    return {
        "id": case["id"],
        "epsilon": None if reason else value,
        "ratio": ratio,
        "ms": milliseconds,
        "cpu_ms": cpu_milliseconds,
        "failure": reason,
    }


FRESH = """
import sys, time
def peak():  # getrusage would start from the parent's peak
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
start, bare = time.process_time(), peak()
import numpy
with_numpy, numpy_mb = time.process_time() - start, peak()
from dpkit.accountants import PLDAccountant, dpsgd
imported = time.process_time() - start
import json
for case in json.load(open(sys.argv[1]))["cases"]:
    acc = PLDAccountant()
    for sigma, q, n in case["steps"]:
        acc.compose(dpsgd(sigma, q, n))
    acc.epsilon(case["delta"])
print(json.dumps({"import_s": imported, "of which numpy": with_numpy, "peak_mb": peak(), "numpy_mb": numpy_mb,
                  "python_mb": bare}))
"""


def uses(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """What dpkit costs beyond a first query: CPU time and memory."""
    from dpkit.accountants import Gaussian, PLDAccountant, PoissonSampled, dpsgd

    def spent(run: Callable[[], Any]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    again, other, delta = [], [], []
    for case in cases:
        acc = PLDAccountant()
        for sigma, q, n in case["steps"]:
            acc.compose(dpsgd(sigma, q, n))
        epsilon = acc.epsilon(case["delta"])
        again.append(spent(lambda acc=acc, case=case: acc.epsilon(case["delta"])))
        other.append(spent(lambda acc=acc, case=case: acc.epsilon(2.0 * case["delta"])))
        delta.append(spent(lambda acc=acc, epsilon=epsilon: acc.delta(1.02 * epsilon)))
    loops = {}
    for sigma, q in ((1.1, 0.01), (1.0, 1e-4), (0.8, 1e-3), (2.0, 0.1)):
        acc = PLDAccountant()

        def loop(acc: PLDAccountant = acc, sigma: float = sigma, q: float = q) -> None:
            for _ in range(1000):
                acc.compose(PoissonSampled(q, Gaussian(sigma))).epsilon(1e-5)

        loops[f"sigma {sigma:g}, q {q:g}"] = spent(loop)
    schedule = PLDAccountant()
    for i in range(50):
        schedule.compose(dpsgd(1.5 - 0.01 * i, 0.01, 100))
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH, str(TRUTH)], capture_output=True, text=True, check=True, cwd=HERE.parent
    )
    return {
        "same_question_ms": 1e3 * statistics.median(again),
        "other_delta_ms": 1e3 * statistics.median(other),
        "other_epsilon_ms": 1e3 * statistics.median(delta),
        "step_ms_of_1000": loops,
        "schedule_50_s": spent(lambda: schedule.epsilon(1e-5)),
        **json.loads(fresh.stdout),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit", type=int, default=30, help="seconds a setting and library may take")
    limit = parser.parse_args().limit
    cases = json.loads(TRUTH.read_text())["cases"]
    libraries: dict[str, Callable[[Steps, float], float]] = {
        "dpkit PLD": dpkit_pld,
        "dp_accounting PLD": google_pld,
        "Opacus PRV": opacus_prv,
        "prv_accountant": microsoft_prv,
    }
    warm = {"id": "warm", "steps": [[1.0, 0.1, 2]], "delta": 1e-5, "epsilon": 1.0}
    out: dict[str, Any] = {"machine": platform.platform(), "limit_s": limit, "libraries": {}}
    rows = []
    for name, answer in libraries.items():
        try:
            measure(answer, warm, limit)  # imports are not timed
        except ImportError as error:
            out["libraries"][name] = {"missing": str(error)}
            rows.append(f"| {name} | not installed | | | | | |")
            continue
        results = [measure(answer, case, limit) for case in cases]
        ratios = [r["ratio"] for r in results if r["ratio"] is not None]
        times = sorted(r["ms"] for r in results)
        summary = {
            "median_ratio": statistics.median(ratios),
            "worst_ratio": max(ratios),
            "below_truth": sum(ratio < 1.0 - 1e-9 for ratio in ratios),
            "failures": sum(r["failure"] is not None for r in results),
            "median_ms": statistics.median(times),
            "p95_ms": times[math.ceil(0.95 * len(times)) - 1],
            "max_ms": times[-1],
            "median_cpu_ms": statistics.median(r["cpu_ms"] for r in results),
            "max_cpu_ms": max(r["cpu_ms"] for r in results),
        }
        out["libraries"][name] = {"summary": summary, "results": results}
        rows.append(
            f"| {name} | {summary['median_ratio']:.6f} | {summary['worst_ratio']:.6f} | {summary['below_truth']} | "
            f"{summary['failures']} | {summary['median_ms']:.0f} | {summary['max_ms']:.0f} |"
        )
        print(rows[-1], flush=True)
    more = out["dpkit"] = uses(cases)
    table = [
        f"ε of {len(cases)} DP-SGD settings with a known truth, all libraries in one run, {limit} s limit each.",
        "",
        "| library | median ε/truth | worst ε/truth | below the truth | failed | median ms | max ms |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "dpkit beyond the first query, CPU time:",
        "",
        "| what | cost |",
        "|---|---|",
        f"| the same question again, median | {more['same_question_ms']:.2f} ms |",
        f"| another delta, median | {more['other_delta_ms']:.2f} ms |",
        f"| another epsilon, median | {more['other_epsilon_ms']:.2f} ms |",
        *(f"| epsilon after each of 1000 steps, {k} | {v:.2f} ms a step |" for k, v in more["step_ms_of_1000"].items()),
        f"| a schedule of 50 sigmas | {more['schedule_50_s']:.2f} s |",
        f"| import | {more['import_s']:.2f} s, of which numpy {more['of which numpy']:.2f} s |",
        f"| peak memory of all settings in a fresh process | {more['peak_mb']:.0f} MB, with numpy alone "
        f"{more['numpy_mb']:.0f} MB |",
        "",
        "Written by `python -m benchmarks.accounting`.",
    ]
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "accounting.json").write_text(json.dumps(out, indent=1) + "\n")
    (HERE / "results" / "accounting.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
