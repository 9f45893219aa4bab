# SPDX-License-Identifier: Apache-2.0
"""What a LogME score costs: the whole call, against the public code, and many label sets on one matrix.

Pairs, A B A B, float32 features, one thread, after both gave the same score. The public code takes part where ZIPFAST_LOGME
names its checkout (it needs numba); without it only our own times are measured. Memory is that of a process of its own.

``python benches/logme_cost.py`` writes logme_cost.json into the results; `report.py` puts it on the page.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peers
from harness import bench_threads, commit, machine, results_folder, spread, threads, write_json

import zipfast

# N, D, outputs, regression
CASES = (
    (5000, 512, 10, False),
    (10000, 1024, 100, False),
    (10000, 1024, 4, True),
    (5000, 2048, 200, False),
    (20000, 2048, 10, False),
    (1000, 2048, 10, False),
    (500, 8192, 10, False),
)
AGREE = {False: 1e-12, True: 1e-10}  # by N <= D; see docs/ranking.md
LABEL_SETS = 20


def problem(n: int, d: int, outputs: int, regression: bool) -> tuple[np.ndarray, np.ndarray]:
    """Features as after a ReLU, with some signal."""
    rng = np.random.default_rng(n + d)
    x = np.maximum(rng.standard_normal((n, d), dtype=np.float32), 0)
    if regression:
        return x, x[:, :outputs] + rng.normal(size=(n, outputs))
    y = np.arange(n) % outputs
    x[np.arange(n), y % d] += 1
    return x, y


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def quiet(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def measure(case: tuple[int, int, int, bool], pairs: int) -> dict[str, Any]:
    n, d, outputs, regression = case
    x, y = problem(*case)
    task = "regression" if regression else "classification"
    calls: dict[str, Callable[[], Any]] = {
        "reference": lambda: quiet(lambda: zipfast.logme(x, y, task=task, mode="reference")),
        "exact": lambda: quiet(lambda: zipfast.logme(x, y, task=task)),
        "exact, float32 products": lambda: quiet(lambda: zipfast.logme(x, y, task=task, precision="auto")),
    }
    public = peers.logme()
    row: dict[str, Any] = {"n": n, "d": d, "outputs": outputs, "regression": regression, "ours": {}, "ratio": {}}
    if public is not None:
        theirs = quiet(lambda: public(regression).fit(x, y))
        difference = abs(theirs - calls["reference"]())
        if not difference <= AGREE[n <= d]:
            raise AssertionError(f"logme {case}: ours and the public code disagree by {difference}")
    for name, call in calls.items():
        call()
        ours, ratio, other = [], [], []
        for _ in range(pairs):
            ours.append(seconds(call))
            if public is not None:
                other.append(seconds(lambda: quiet(lambda: public(regression).fit(x, y))))
                ratio.append(other[-1] / ours[-1])
        row["ours"][name] = spread(ours)[0]
        if ratio:
            row["ratio"][name] = spread(ratio)[0]
            row["public"] = spread(other)[0]
    return row


def label_sets(pairs: int) -> dict[str, float]:
    """20 label sets on one matrix: factored once, against 20 single scores."""
    x, _ = problem(5000, 1024, 10, False)
    rng = np.random.default_rng(0)
    sets = [rng.integers(0, 10, 5000) for _ in range(LABEL_SETS)]
    together, apart = [], []
    for _ in range(pairs):
        together.append(seconds(lambda: zipfast.Basis(x).score_many(sets)))
        apart.append(seconds(lambda: [zipfast.logme(x, y) for y in sets]))
    return {"together_s": spread(together)[0], "ratio": spread([a / t for a, t in zip(apart, together)])[0]}


def memory() -> dict[str, float]:
    """MB that 20 000 x 2048 streamed features take at the peak, beyond one batch."""
    stats = zipfast.FeatureStats()
    rng = np.random.default_rng(0)

    def peak() -> float:
        # not ru_maxrss, which a new process inherits from the one that started it
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    batch = rng.standard_normal((1000, 2048), dtype=np.float32)
    labels = np.arange(1000) % 10
    before = peak()
    for _ in range(20):
        stats.update(batch, labels)
    stats.score()
    return {"before_mb": before, "peak_mb": peak(), "features_mb": 20 * batch.nbytes / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="print the memory of this process alone")
    options = parser.parse_args()
    with threads(bench_threads()):
        if options.memory:
            print(json.dumps(memory()))
            return
        result: dict[str, Any] = {"what": "logme_cost", "machine": machine("cpu"), "commit": commit()}
        result["pairs"], result["rows"] = options.pairs, []
        for case in CASES:
            result["rows"].append(measure(case, options.pairs))
            print(json.dumps(result["rows"][-1]), flush=True)
        result["label_sets"] = label_sets(options.pairs)
        own = subprocess.run([sys.executable, __file__, "--memory"], capture_output=True, text=True, check=True)
        result["memory"] = json.loads(own.stdout.splitlines()[-1])
    write_json(results_folder() / "logme_cost.json", result)


if __name__ == "__main__":
    main()
