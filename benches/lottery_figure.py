# SPDX-License-Identifier: Apache-2.0
"""``make lottery``: the first lottery-ticket paper's figures for LeNet, on scikit-learn's digits, in a few minutes.

``python benches/lottery_figure.py [--out lottery-out] [--seeds 3] [--levels 21]``: an experiment's folder, pictures and a
table. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from harness import bench_threads, threads
from lottery_tables import CONTROLS, LEVELS, LINES, experiment, task_of

from zipfast.tickets import Lottery, connectivity
from zipfast.tickets.plots import plot_layers, plot_levels, plot_lines, plot_overlap

SEEDS = 3


def draw(out: Path, seeds: int = SEEDS, levels: int = LEVELS, *, iterations: int | None = None) -> Lottery:
    """The experiment in out/experiment, the pictures beside it."""
    out.mkdir(parents=True, exist_ok=True)
    task = task_of() if iterations is None else task_of(iterations)
    found = experiment(out / "experiment", range(seeds), task, levels=levels, controls=CONTROLS)
    plot_levels(found, out / "levels.png")
    plot_layers(found, out / "layers.png")
    plot_overlap(found, levels, out / "overlap.png")
    last = min(LINES[-1], levels)
    at = [("ticket", 0), *((kind, last) for kind in ("ticket", "reinit", "random") if last)]
    plot_lines([connectivity(task, found, level, kind=kind) for kind, level in at], out / "lines.png")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lottery-out"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--levels", type=int, default=LEVELS)
    options = parser.parse_args()
    begin = time.perf_counter()
    with threads(bench_threads()):
        found = draw(options.out, options.seeds, options.levels)
    print(found.table())
    names = ", ".join(path.name for path in sorted(options.out.glob("*.png")))
    print(f"\n{options.out}: {names}; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
