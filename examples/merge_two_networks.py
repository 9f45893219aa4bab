# SPDX-License-Identifier: Apache-2.0
"""Merge a network that knows the digits 0 to 4 with one that knows 5 to 9, without training (ZipIt!).

Both are ResNet-8 with ten outputs, trained apart from different starts. They are merged as a whole, and up to a cut: one
trunk with two heads. scikit-learn's digits; less than a minute on two cores.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import zipfast
from zipfast import demo, zoo


def train(images, labels, seed, epochs):
    torch.manual_seed(seed)
    model = zoo.resnet(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * -(-len(images) // 50))
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def measure(outputs, labels):
    """Per cent right among all ten classes, and, for each half, among its own five; outputs: one per half."""
    found = [100 * (sum(outputs).argmax(1) == labels).float().mean().item()]
    for output, classes in zip(outputs, demo.TASKS):
        own = torch.isin(labels, torch.tensor(classes))
        answers = output[own][:, list(classes)].argmax(1) + classes[0]
        found.append(100 * (answers == labels[own]).float().mean().item())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one epoch: shows that it runs, no more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for the merged networks")
    args = parser.parse_args()

    digits = demo.load_digits()
    models = []
    for half, classes in enumerate(demo.TASKS):
        own = torch.isin(digits.train_labels, torch.tensor(classes))
        epochs = 1 if args.quick else 12
        models.append(train(digits.train[own], digits.train_labels[own], 2 * args.seed + half, epochs))
    data = digits.batches()  # training images of all ten classes, without labels

    rows = {"model A (0 to 4)": models[0], "model B (5 to 9)": models[1]}
    for name, method in {"average of the weights": "average", "permutation": "permute", "ZipIt!, whole": "zip"}.items():
        merged = zipfast.merge(models, (data[0],), data, method=method)
        rows[name] = merged.module
    partial = zipfast.merge(models, (data[0],), data, stop="stages.1")
    rows |= {"ZipIt! up to stage 2, two heads": partial.module, "ensemble of both": zipfast.LogitEnsemble(models)}

    print(f"test accuracy in per cent, seed {args.seed}\n{'':<32}  joint  0 to 4  5 to 9  parameters")
    for name, model in rows.items():
        with torch.no_grad():
            found = model(digits.test)
        outputs = found if isinstance(found, (list, tuple)) else [found, found]
        joint, low, high = measure(outputs, digits.test_labels)
        print(f"{name:<32}{joint:>7.1f}{low:>8.1f}{high:>8.1f}{sum(p.numel() for p in model.parameters()):>12}")
    if args.out:
        args.out.mkdir(exist_ok=True)
        merged.save(args.out / "whole.safetensors")
        partial.save(args.out / "two-heads")


if __name__ == "__main__":
    main()
