# SPDX-License-Identifier: Apache-2.0
"""Find a tenth of a network that trains as well as the whole, and check that it was not luck.

A perceptron on scikit-learn's digits is pruned in eight rounds; after each, the survivors go back to the weights that they
started from and are trained again. Controls at the same density: other initial weights, a random mask, pruning at once. Less
than a minute on two cores; with --out, a run that is stopped goes on where it was.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import zipfast
from zipfast import zoo
from zipfast.tickets import Batches, Task, rate_for


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few iterations: shows that it runs, no more")
    parser.add_argument("--seed", type=int, default=0, help="first of two")
    parser.add_argument("--out", type=Path, help="the folder of the experiment")
    args = parser.parse_args()

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    part = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split([900, 300, 597])
    train, validation, test = (Batches(x[rows], y[rows], 60) for rows in part)
    iterations = 60 if args.quick else 1500
    task = Task(lambda: zoo.mlp(64, (300, 100), 10), train, validation, test, iterations, torch.optim.Adam)

    levels, seeds = 8, (args.seed, args.seed + 1)
    found = zipfast.lottery(
        task,
        out=args.out or Path(tempfile.mkdtemp()) / "ticket",
        levels=levels,
        rates=rate_for(0.1, levels),
        output=1.0,
        controls=["reinit", "random", "oneshot"],
        control_levels=[levels],
        seeds=seeds,
    )
    print(found.table())
    print("P_m: weights that remain, %; accuracies on test digits, medians; early stop: iteration of the least loss\n")
    for name, points in (
        ("the whole network", found.paired(levels, "ticket", other_level=0)),
        ("other initial weights", found.paired(levels, "reinit")),
        ("a random mask", found.paired(levels, "random")),
        ("pruning at once", found.paired(levels, "oneshot")),
    ):
        print(
            f"a tenth of the weights minus {name}: {', '.join(f'{points[seed]:+.1f}' for seed in seeds)} points by seed"
        )


if __name__ == "__main__":
    main()
