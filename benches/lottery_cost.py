# SPDX-License-Identifier: Apache-2.0
"""What 22 levels of a lottery-ticket experiment cost beside the best plain torch loop that does the same.

LeNet-300-100 on scikit-learn's digits, 2500 iterations of 60 a level, a look at the validation data every 10, at the test
data where the validation loss is a new minimum, files written and synced. The loop is torch's own best: tensors on the CPU,
``torch.optim.Adam(fused=True)``, masks multiplied in by one ``torch._foreach_mul_``, magnitudes ranked by ``kthvalue``; on
one thread or two, whichever takes less time for 300 iterations. Levels alternate A B, and both must keep as many survivors.

``python benches/lottery_cost.py`` writes lottery_cost.json into the results; `report.py` puts it on the page.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from harness import commit, machine, results_folder, threads, write_json
from torch import Tensor, nn
from torch.nn import functional as F

from zipfast import checkpoint
from zipfast.tickets import PRESETS, Batches, Task, lottery

LEVELS, ITERATIONS, EVERY, BATCH = 21, 2500, 10, 60
SPLIT = (0, 700, 1000, 1797)


def data() -> list[tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    return [(x[a:b].contiguous(), y[a:b].contiguous()) for a, b in pairwise(SPLIT)]


Parts = list[tuple[Tensor, Tensor]]  # training, validation and test data


def network() -> nn.Module:
    return PRESETS["lenet-300-100"].build(image_size=8)


class Ours:
    """zipfast.lottery, a level more at each call."""

    def __init__(self, folder: Path, parts: Parts | None = None, iterations: int = ITERATIONS) -> None:
        train, validation, test = parts or data()
        self.folder = folder
        batches = Batches(*train, BATCH), Batches(*validation, len(validation[0])), Batches(*test, len(test[0]))
        self.task = Task(network, *batches, iterations, lambda p: torch.optim.Adam(p, 1.2e-3))

    def level(self, level: int) -> tuple[int, float]:
        found = lottery(self.task, out=self.folder, levels=level, every=EVERY)
        return sum(found.masks(level).alive.values()), found.trainings[-1].end_test


class Loop:
    """What a careful user writes."""

    def __init__(self, folder: Path, parts: Parts | None = None) -> None:
        self.folder = folder
        self.train, self.validation, self.test = parts or data()
        torch.manual_seed(0)
        self.model = network()
        self.start = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.weights = [m.weight for m in self.model if isinstance(m, nn.Linear)]
        self.masks = [torch.ones_like(w) for w in self.weights]

    def prune(self) -> None:
        with torch.no_grad():
            for weight, mask, rate in zip(self.weights, self.masks, (0.2, 0.2, 0.1)):
                alive = mask.bool()
                count = round(rate * int(alive.sum()))
                bound = weight[alive].abs().kthvalue(count).values
                mask.mul_(weight.abs() > bound)

    def level(self, level: int, iterations: int = ITERATIONS) -> tuple[int, float]:
        if level:
            self.prune()
        self.model.load_state_dict(self.start)
        with torch.no_grad():
            torch._foreach_mul_(self.weights, self.masks)
        optimizer = torch.optim.Adam(self.model.parameters(), 1.2e-3, fused=True)
        (x, y), best, generator = self.train, float("inf"), torch.Generator().manual_seed(1)
        order = torch.randperm(len(x), generator=generator).split(BATCH)
        accuracy = 0.0
        for iteration in range(iterations + 1):
            if iteration % EVERY == 0 or iteration == iterations:
                with torch.no_grad():
                    loss = float(F.cross_entropy(self.model(self.validation[0]), self.validation[1]))
                    if loss < best or iteration == iterations:
                        best = min(best, loss)
                        answer = self.model(self.test[0]).argmax(1)
                        accuracy = 100 * float((answer == self.test[1]).float().mean())
            if iteration == iterations:
                break
            at = iteration % len(order)
            if at == 0:
                order = torch.randperm(len(x), generator=generator).split(BATCH)
            optimizer.zero_grad()
            F.cross_entropy(self.model(x[order[at]]), y[order[at]]).backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_mul_(self.weights, self.masks)
        masks = {str(i): mask for i, mask in enumerate(self.masks)}
        checkpoint.save(self.folder / f"{level}.safetensors", {**self.model.state_dict(), **masks})
        return int(sum(mask.sum() for mask in self.masks)), accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=LEVELS)
    options = parser.parse_args()
    result: dict[str, Any] = {"what": "lottery_cost", "machine": machine("cpu"), "commit": commit(), "rows": []}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "torch").mkdir()
        loop, first = Loop(folder / "torch"), {}
        for count in (1, 2):
            with threads(count):
                begin = time.perf_counter()
                loop.level(0, 300)
                first[count] = time.perf_counter() - begin
        best = min(first, key=lambda count: first[count])
        result |= {"torch_threads": best, "torch_300_iterations": first}
        name = f"torch, {best} thread" + "s" * (best > 1)
        runs = {"ours, 1 thread": (1, Ours(folder / "ours")), name: (best, Loop(folder / "torch"))}
        for level in range(options.levels + 1):
            row: dict[str, Any] = {"level": level}
            for name, (count, run) in runs.items():
                with threads(count):
                    begin = time.perf_counter()
                    alive, accuracy = run.level(level)
                row[name] = time.perf_counter() - begin
                if row.setdefault("alive", alive) != alive:
                    raise SystemExit(f"level {level}: {name} has {alive} survivors, ours {row['alive']}")
                row[f"accuracy, {name}"] = accuracy
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
    result["seconds"] = {name: sum(row[name] for row in result["rows"]) for name in runs}
    write_json(results_folder() / "lottery_cost.json", result)
    print(json.dumps(result["seconds"], indent=1))


if __name__ == "__main__":
    main()
