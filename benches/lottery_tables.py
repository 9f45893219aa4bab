# SPDX-License-Identifier: Apache-2.0
"""Lottery tickets on scikit-learn's digits: what iterative pruning finds, against its controls.

``python benches/lottery_tables.py [--seeds 8]`` measures (some minutes on one thread), ``--report`` writes
docs/lottery-results.md (benches/lottery_page.py). ``--only normalised`` or ``figure`` measures that alone, into the results
that are there.

levels        accuracy and early-stop iteration of tickets, re-initialised tickets, random masks and one-shot pruning.
rewound       tickets put back to the weights after REWIND iterations.
connectivity  barriers between two copies of one start that see the data in other orders.
normalised    accuracies again, with inputs of mean 0 and variance 1.
figure        how long benches/lottery_figure.py takes.

The network, the optimiser and the pruning are the first paper's LeNet-300-100, on 8x8 images and for fewer iterations. All
seeds share one split of the data; a seed decides the initial weights and the order of the data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from harness import bench_threads, commit, machine, results_folder, threads, write_json

from zipfast.tickets import PRESETS, Batches, Lottery, Task, connectivity, ladder, lottery

RESULTS = "lottery_tables.json"
PRESET = PRESETS["lenet-300-100"]
SIZES = {"train": 700, "validation": 300, "test": 797}
ITERATIONS, EVERY, LEVELS, REWIND, POINTS = 2500, 10, 21, 100, 31
CONTROLS = ("reinit", "random", "oneshot")
LINES = (7, 14, 18)  # levels whose connectivity is measured
SHOWN = (3, 6, 9, 12, 15, 18, 21)  # 51.6, 26.8, 13.9, 7.3, 3.9, 2.1 and 1.1 per cent
VALUES = ("early", "early_test", "end_test", "seconds")


@cache
def digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The 1797 digits in [0, 1], shuffled and cut."""
    from sklearn.datasets import load_digits

    plain = load_digits()
    order = torch.randperm(len(plain.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(plain.data, dtype=torch.float32)[order] / 16, torch.tensor(plain.target)[order]
    sizes = list(SIZES.values())
    return dict(zip(SIZES, zip(x.split(sizes), y.split(sizes))))


def task_of(iterations: int = ITERATIONS, *, normalised: bool = False) -> Task:
    """LeNet-300-100 on 8x8 images: 50 200 weights. Inputs are in [0, 1], or of mean 0 and variance 1 over all pixels."""
    data = digits()
    seen = data["train"][0]
    shift, scale = (float(seen.mean()), float(seen.std())) if normalised else (0.0, 1.0)
    train, validation, test = (
        Batches((x - shift) / scale, y, PRESET.batch_size if name == "train" else len(x))
        for name, (x, y) in data.items()
    )
    return Task(lambda: PRESET.build(image_size=8), train, validation, test, iterations, PRESET.optimizer_for)


def percent_left(level: int) -> float:
    """P_m of the ladder, before rounds are cut to whole weights."""
    return ladder(PRESET.build(image_size=8), PRESET, level)


def experiment(out: str | Path, seeds: Sequence[int], task: Task | None = None, **options: Any) -> Lottery:
    """All levels, layer-wise, a fifth of the survivors in each round and a tenth of the output layer's."""
    settings = {"levels": LEVELS, "every": EVERY, "trainer": "auto", **options}
    return lottery(task or task_of(), out=out, rates=0.2, scope="layer", seeds=list(seeds), **settings)


def by_level(found: Lottery, seeds: Sequence[int]) -> dict[str, Any]:
    """Kind -> level -> value -> one number per seed, in order."""
    kinds: dict[str, Any] = {}
    for t in found.trainings:
        level = kinds.setdefault(t.kind, {}).setdefault(str(t.level), {name: {} for name in VALUES})
        for name in VALUES:
            level[name][t.seed] = getattr(t, name)
    return {
        kind: {level: {name: [v[s] for s in seeds] for name, v in values.items()} for level, values in levels.items()}
        for kind, levels in kinds.items()
    }


def lines(found: Lottery, task: Task, seeds: Sequence[int], wanted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """ "kind level" -> heights of the barriers and means of both ends' accuracies, per seed."""
    rows: dict[str, Any] = {}
    for kind, level in wanted:
        pairs = [connectivity(task, found, level, seed=seed, kind=kind, points=POINTS) for seed in seeds]
        rows[f"{kind} {level}"] = {
            "height": [p.barrier.height for p in pairs], "ends": [sum(p.accuracies) / 2 for p in pairs]
        }  # fmt: skip
    return rows


def measure(
    seeds: Sequence[int],
    *,
    controls: Sequence[str] = CONTROLS,
    control_levels: Sequence[int] | None = None,
    rewound_levels: int = LEVELS,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Everything; with `rewound_levels` fewer, late rewinding is looked at for these levels only."""
    document: dict[str, Any] = {"seeds": list(seeds), "seconds": {}}
    task, begin = task_of(), time.perf_counter()

    def tell(name: str) -> None:
        nonlocal begin
        document["seconds"][name] = time.perf_counter() - begin
        say(f"{name}: {document['seconds'][name]:.0f} s")
        begin = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = experiment(place / "plain", seeds, task, controls=controls, control_levels=control_levels)
        document["density"] = {str(t.level): 100 * t.density for t in found.trainings if t.kind == "ticket"}
        document["levels"] = by_level(found, seeds)
        document["trainers"] = sorted({t.trainer for t in found.trainings})
        document["sparse_below"] = found.settings["sparse_below"]
        tell("levels")
        late = experiment(place / "late", seeds, task, rewind=REWIND, levels=rewound_levels)
        document["rewound"] = by_level(late, seeds)["ticket"]
        tell("rewound")
        at = [("ticket", 0), *((kind, level) for kind in ("ticket", "reinit", "random") for level in LINES)]
        plain = [(kind, level) for kind, level in at if str(level) in document["levels"].get(kind, {})]
        rewound = [("ticket", level) for level in (0, *LINES) if level <= rewound_levels]
        document["connectivity"] = {
            "0": lines(found, task, seeds, plain),
            str(REWIND): lines(late, task, seeds, rewound),
        }
        tell("connectivity")
    return document


def normalise(seeds: Sequence[int], **options: Any) -> dict[str, Any]:
    """As the levels, with controls at SHOWN, and early stops looked for at every hundredth iteration only."""
    options = {"controls": CONTROLS, "control_levels": SHOWN, "every": 100, **options}
    with tempfile.TemporaryDirectory() as folder:
        return by_level(experiment(Path(folder) / "out", seeds, task_of(normalised=True), **options), seeds)


def figure() -> float:
    """Seconds that benches/lottery_figure.py takes."""
    import lottery_figure

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        lottery_figure.draw(Path(folder) / "lottery-out")
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--only", choices=("normalised", "figure"), help="this alone, into the results that are there")
    parser.add_argument("--report", action="store_true", help="write the page from the results")
    options = parser.parse_args()
    path = results_folder() / RESULTS
    if options.report:
        from lottery_page import write

        write(path)
        return
    with threads(bench_threads()):
        if options.only:
            found = json.loads(path.read_text())
        else:
            found = measure(range(options.seeds), say=lambda line: print(line, flush=True))
            found = {"machine": machine("cpu"), "commit": commit(), **found}
        if options.only in (None, "normalised"):
            begin = time.perf_counter()
            found["normalised"] = normalise(found["seeds"])
            found["seconds"]["normalised"] = time.perf_counter() - begin
            write_json(path, found)
        if options.only in (None, "figure"):
            found["seconds"]["figure"] = figure()
            write_json(path, found)


if __name__ == "__main__":
    main()
