# SPDX-License-Identifier: Apache-2.0
"""Eight fine-tunes of one network, mixed into one: is the soup better than the best of them?

A small VGG is trained on a few of scikit-learn's digits, then fine-tuned eight times on more, as a random search does. Runs
and soups are chosen on held-out digits and compared on test digits, clean and noisy. Less than a minute.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

import zipfast
from zipfast import demo, zoo
from zipfast.soups import Evaluator, accuracy_of, logit_ensemble


def train(model, images, labels, epochs, rate, noise=0.0):
    optimizer = torch.optim.Adam(model.train().parameters(), rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            x = images[batch] + noise * torch.randn_like(images[batch])
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for one epoch: shows that it runs, no more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for the checkpoints and the greedy soup")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    digits = demo.load_digits()
    x, y = digits.train, digits.train_labels
    model = zoo.VGG(((24,), (48,), (48,)), hidden=48, batch_norm=False)
    train(model, x[:400], y[:400], 1 if args.quick else 15, 2e-3)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    runs = []
    for run in range(8):
        model.load_state_dict(start)
        rate, epochs = 6e-3 * 10 ** -torch.rand(()).item(), 1 if args.quick else 4 + 4 * (run % 3)
        train(model, x[400:900], y[400:900], epochs, rate, noise=0.1 * (run % 2))
        runs.append(out / f"run-{run}.safetensors")
        zipfast.checkpoint.save(runs[-1], model.state_dict())

    noisy = digits.test + 0.3 * torch.randn_like(digits.test)
    parts = (x[900:], y[900:]), (digits.test, digits.test_labels), (noisy, digits.test_labels)
    measures = [Evaluator(model, [part]) for part in parts]
    greedy = zipfast.greedy_soup(runs, measures[0], out=out / "soup.safetensors")
    best = greedy.scores.index(max(greedy.scores))
    rows = {
        "before fine-tuning": start,
        "best run, by held-out digits": zipfast.checkpoint.load(runs[best]),
        "uniform soup of all eight": zipfast.uniform_soup(runs).state,
        f"greedy soup of {len(greedy.ingredients)}": zipfast.checkpoint.load(out / "soup.safetensors"),
    }
    print(f"accuracy in per cent, seed {args.seed}\n{'':<32}held out    test  test with noise")
    for name, state in rows.items():
        print(f"{name:<32}{measures[0](state):>8.1f}{measures[1](state):>8.1f}{measures[2](state):>17.1f}")
    logits = [[], [], []]
    for path in runs:
        model.load_state_dict(zipfast.checkpoint.load(path))
        with torch.no_grad():
            for answers, (images, _) in zip(logits, parts):
                answers.append(model(images))
    found = [accuracy_of(logit_ensemble(torch.stack(a)), labels) for a, (_, labels) in zip(logits, parts)]
    print(f"{'ensemble of all eight, 8x cost':<32}{found[0]:>8.1f}{found[1]:>8.1f}{found[2]:>17.1f}")


if __name__ == "__main__":
    main()
