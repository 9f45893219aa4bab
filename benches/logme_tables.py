# SPDX-License-Identifier: Apache-2.0
"""Does a score of frozen features foretell accuracy after fine-tuning? Thirteen small extractors, four data sets.

``python benches/logme_tables.py [--splits 8]`` measures, ``--report`` writes docs/logme-results.md (benches/logme_page.py).

Data: scikit-learn's digits, breast cancer, wine (classes) and diabetes (regression); no download. Each split cuts the
samples into a source part (40 %), on which extractors are pre-trained to several qualities, a target part (15 %), on which
they are scored and then fine-tuned, and a test part (45 %). Extractors: the raw inputs, principal components, random-feature
networks of several widths and depths, an auto-encoder, and networks trained on source labels of which a part is random.
Fine-tuning trains all weights and a new head; the learning rate is chosen on a fifth of the target part. Accuracy is in per
cent, that of diabetes R² in per cent.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import bench_threads, commit, machine, results_folder, threads, write_json
from torch import Tensor, nn

import zipfast
from zipfast.ranking.metrics import FROM_FEATURES, FROM_SUMMARY

RESULTS = "logme_tables.json"
DATA = ("digits", "breast cancer", "wine", "diabetes")
RATES = (1e-3, 1e-2)
EPOCHS, BATCH = 40, 32
LOGME = ("logme exact", "logme corrected", "logme reference")


@dataclass(frozen=True)
class Data:
    """One split; inputs standardised by the source part."""

    name: str
    source: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def regression(self) -> bool:
        return self.source[1].is_floating_point()

    @property
    def outputs(self) -> int:
        return 1 if self.regression else int(self.source[1].max()) + 1


def load(name: str, split: int) -> Data:
    from sklearn import datasets

    found = getattr(datasets, f"load_{name.replace(' ', '_')}")()
    x, y = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    y = y.float() if name == "diabetes" else y.long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split))
    parts = order.tensor_split([int(0.4 * len(x)), int(0.55 * len(x))])
    mean, std = x[parts[0]].mean(0), x[parts[0]].std(0).clamp(min=1e-3)
    if y.is_floating_point():
        y = (y - y[parts[0]].mean()) / y[parts[0]].std()
    pairs = [((x[p] - mean) / std, y[p]) for p in parts]
    return Data(name, *pairs)


# ---------------------------------------------------------------------------------------------------------- extractors


def network(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers)


def components(x: Tensor, k: int) -> nn.Module:
    layer = nn.Linear(x.shape[1], k)
    _, _, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    with torch.no_grad():
        layer.weight.copy_(v[:k])
        layer.bias.zero_()
    return layer


def fit(model: nn.Module, x: Tensor, y: Tensor, rate: float, epochs: int, seed: int) -> None:
    """Adam on cross-entropy (whole numbers) or squared error; order fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, weight_decay=1e-4)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(BATCH):
            out = model(x[part])
            wanted = y[part]
            loss = F.mse_loss(out, wanted.reshape(out.shape)) if y.is_floating_point() else F.cross_entropy(out, wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def trained(data: Data, seed: int, noise: float, epochs: int) -> nn.Module:
    """A network trained on the source part, of whose labels a part was drawn anew."""
    x, y = data.source
    generator = torch.Generator().manual_seed(seed + 1)
    wrong = torch.rand(len(y), generator=generator) < noise
    y = torch.where(wrong, y[torch.randperm(len(y), generator=generator)], y)
    body = network(x.shape[1], 64, 32)
    fit(nn.Sequential(body, nn.Linear(32, data.outputs)), x, y, 3e-3, epochs, seed)
    return body


def autoencoder(data: Data, seed: int) -> nn.Module:
    x = data.source[0]
    body = network(x.shape[1], 64, 16)
    fit(nn.Sequential(body, nn.Linear(16, x.shape[1])), x, x, 3e-3, 40, seed)
    return body


def zoo(data: Data) -> dict[str, Callable[[int], nn.Module]]:
    """Name -> what makes the extractor; weights depend on the split's seed only."""
    size = data.source[0].shape[1]
    half, quarter = max(2, size // 2), max(1, size // 4)
    return {
        "raw inputs": lambda s: nn.Identity(),
        "PCA, half": lambda s: components(data.source[0], half),
        "PCA, quarter": lambda s: components(data.source[0], quarter),
        "random 16": lambda s: network(size, 16),
        "random 64": lambda s: network(size, 64),
        "random 256": lambda s: network(size, 256),
        "random 64x4 deep": lambda s: network(size, 64, 64, 64, 64),
        "auto-encoder 16": lambda s: autoencoder(data, s),
        "trained, 1 epoch": lambda s: trained(data, s, 0.0, 1),
        "trained, 30 epochs": lambda s: trained(data, s, 0.0, 30),
        "trained, 30 % noise": lambda s: trained(data, s, 0.3, 30),
        "trained, 60 % noise": lambda s: trained(data, s, 0.6, 30),
        "trained, random labels": lambda s: trained(data, s, 1.0, 30),
    }


# ----------------------------------------------------------------------------------------------------------- measuring


def quality(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        out = model(x)
    if y.is_floating_point():
        return float(100 * (1 - F.mse_loss(out[:, 0], y) / y.var(correction=0)))
    return float(100 * (out.argmax(1) == y).float().mean())


def fine_tuned(body: nn.Module, data: Data, seed: int) -> float:
    """Test quality after fine-tuning with the better learning rate; `body` stays as it is."""
    x, y = data.target
    held = len(x) // 5
    found = {}
    for rate in RATES:
        model = head_on(copy.deepcopy(body), x, data.outputs, seed)
        fit(model, x[held:], y[held:], rate, EPOCHS, seed)
        found[rate] = quality(model, x[:held], y[:held])
    model = head_on(copy.deepcopy(body), x, data.outputs, seed)
    fit(model, x, y, max(found, key=lambda r: found[r]), EPOCHS, seed)
    return quality(model, *data.test)


def head_on(body: nn.Module, x: Tensor, outputs: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(body, nn.Linear(body(x[:1]).shape[1], outputs))


def scores(features: Tensor, labels: Tensor, regression: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Each metric of one extractor, and the seconds that each took alone."""
    task = "regression" if regression else "classification"
    calls: dict[str, Callable[[], Any]] = {}
    for name in LOGME:
        mode = name.split()[1]
        calls[name] = lambda mode=mode: zipfast.logme(features, labels, task=task, mode=mode)
    if not regression:
        for name in FROM_SUMMARY:
            calls[name] = lambda name=name: zipfast.FeatureStats().update(features, labels).score(name)
        for name, metric in FROM_FEATURES.items():
            calls[name] = lambda metric=metric: metric(features, labels)
    found, spent = {}, {}
    for name, call in calls.items():
        begin = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[name] = float(call())
        spent[name] = time.perf_counter() - begin
    return found, spent


def measure(name: str, splits: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One data set: scores and quality of each extractor, means over the splits."""
    total: dict[str, dict[str, Any]] = {}
    seconds = {"extract": 0.0, "fine-tune": 0.0}
    spent: dict[str, float] = {}
    for split in range(splits):
        data = load(name, split)
        x, y = data.target
        for extractor, make in zoo(data).items():
            torch.manual_seed(1000 + split)
            body = make(split).eval()
            begin = time.perf_counter()
            with torch.no_grad():
                features = body(x)
            seconds["extract"] += time.perf_counter() - begin
            found, took = scores(features, y, data.regression)
            for metric, value in took.items():
                spent[metric] = spent.get(metric, 0.0) + value / splits
            begin = time.perf_counter()
            accuracy = fine_tuned(body, data, split)
            seconds["fine-tune"] += time.perf_counter() - begin
            row = total.setdefault(extractor, {"accuracy": [], "scores": {}, "features": features.shape[1]})
            row["parameters"] = sum(p.numel() for p in body.parameters())
            row["accuracy"].append(accuracy)
            for metric, value in found.items():
                row["scores"].setdefault(metric, []).append(value)
        say(f"{name}: split {split + 1} of {splits}")
    for row in total.values():
        row["accuracy"] = sum(row["accuracy"]) / splits
        row["scores"] = {metric: sum(v) / splits for metric, v in row["scores"].items()}
    truth = {extractor: row["accuracy"] for extractor, row in total.items()}
    columns = {m: {e: row["scores"][m] for e, row in total.items()} for m in next(iter(total.values()))["scores"]}
    columns["features D"] = {e: float(row["features"]) for e, row in total.items()}
    columns["parameters"] = {e: float(row["parameters"]) for e, row in total.items()}
    agreement = {m: vars(zipfast.ranking.agreement(c, truth)) for m, c in columns.items()}
    return {
        "name": name,
        "splits": splits,
        "target_samples": len(data.target[0]),
        "rows": total,
        "agreement": agreement,
        "seconds": {key: value / splits for key, value in seconds.items()} | {"score": spent},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=8)
    parser.add_argument("--report", action="store_true", help="write the page from the results")
    options = parser.parse_args()
    path = results_folder() / RESULTS
    if options.report:
        from logme_page import write

        write(path)
        return
    with threads(bench_threads()):
        sets = [measure(name, options.splits, lambda text: print(text, flush=True)) for name in DATA]
        write_json(path, {"machine": machine("cpu"), "commit": commit(), "sets": sets})


if __name__ == "__main__":
    main()
