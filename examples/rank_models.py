# SPDX-License-Identifier: Apache-2.0
"""Which of these networks should be fine-tuned? LogME's answer in one pass each, then the truth: all of them fine-tuned.

The networks were trained on the digits 0 to 4; the new task is to tell 5 to 9 apart, with 150 labelled images.
scikit-learn's digits; less than a minute on two cores.
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import zipfast
from zipfast import demo, zoo
from zipfast.evaluate import accuracy

ZOO = {
    "perceptron 32": partial(zoo.mlp, 256, (32,), 5),
    "perceptron 256": partial(zoo.mlp, 256, (256,), 5),
    "perceptron 64-64-64": partial(zoo.mlp, 256, (64, 64, 64), 5),
    "VGG 8-16": partial(zoo.VGG, ((8,), (16,)), out_features=5),
    "VGG 16-32-64": partial(zoo.VGG, ((16,), (32,), (64,)), out_features=5),
    "ResNet-8, a quarter as wide": partial(zoo.resnet, 1, width=0.25, classes=5),
    "ResNet-8": partial(zoo.resnet, 1, classes=5),
}


def train(model, images, labels, epochs, rate):
    optimizer = torch.optim.Adam(model.train().parameters(), rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def fine_tuned(model, images, labels, epochs):
    """A copy with a new head in place of the last linear layer, whose input LogME has scored; trained as a whole."""
    model = copy.deepcopy(model)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    head.reset_parameters()
    return train(model, images, labels, epochs, 1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for one epoch: shows that it runs, no more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for the journal: a second run does not score again")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    digits = demo.load_digits()
    old, new, models = digits.train_labels < 5, digits.train_labels >= 5, {}
    for name, build in {**ZOO, "ResNet-8, not trained": ZOO["ResNet-8"]}.items():
        epochs = 0 if "not trained" in name else 1 if args.quick else 6
        models[name] = train(build(), digits.train[old], digits.train_labels[old], epochs, 2e-3)

    few, labels = digits.train[new][:150], digits.train_labels[new][:150] - 5
    ranking = zipfast.rank(models, list(zip(few.split(50), labels.split(50))), out=args.out, seed=args.seed)

    test = digits.test_labels >= 5
    held_out = [(digits.test[test], digits.test_labels[test] - 5)]
    tuned = {name: fine_tuned(model, few, labels, 1 if args.quick else 6) for name, model in models.items()}
    truth = {name: accuracy(model, held_out) for name, model in tuned.items()}
    print(f"{'':<30}{'LogME':>8}{'first in':>10}{'test accuracy when fine-tuned':>32}")
    for row in ranking.rows:
        print(f"{row.name:<30}{row.scores['logme']:>8.3f}{row.first:>10.0%}{truth[row.name]:>32.1f}")
    for name, found in ranking.agreement(truth).items():
        print(f"weighted Kendall tau of {name} with the accuracies: {found.tau:.2f}")


if __name__ == "__main__":
    main()
