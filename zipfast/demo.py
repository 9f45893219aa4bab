# SPDX-License-Identifier: Apache-2.0
"""The demo: two ResNet-20 trained apart on halves of scikit-learn's digits, merged into one without training.

Model A sees the digits 0 to 4, model B 5 to 9; both have ten outputs, one per class (a shared target space), and start
from different seeds. They are merged by weight average, by permutation and by ZipIt!, with batch-norm statistics
re-estimated; ZipIt! once without. The ensemble of both is the upper bound, at twice the cost.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import available, backend, checkpoint, zoo
from .merging import LogitEnsemble, Merged, gather_moments, match, merge
from .merging.spaces import find_spaces

SIZE, TRAIN, BATCH = 16, 1300, 64
TASKS: tuple[tuple[int, ...], tuple[int, ...]] = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 handwritten digits, resized to SIZE x SIZE, in a fixed random order: 1300 train, 497 test."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    def batches(self) -> list[Tensor]:
        """The training images of all ten classes, without labels: what merging and batch-norm re-estimation read."""
        return list(self.train.split(100))


@dataclass(frozen=True)
class Accuracy:
    """Per cent on the test digits. joint: over all ten classes. task_a, task_b: each half among its own five classes."""

    joint: float
    task_a: float
    task_b: float

    @property
    def per_task(self) -> float:
        return (self.task_a + self.task_b) / 2


def load_digits() -> Digits:
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as e:
        raise ImportError("demo: scikit-learn must be installed for its digits; pip install 'zipfast[demo]'") from e
    data = read()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images[order], size=SIZE, mode="bilinear")
    labels = labels[order]
    return Digits(images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:])


def train(
    digits: Digits, classes: Sequence[int], seed: int, epochs: int, progress: Callable[[], None] = lambda: None
) -> nn.Module:
    """A ResNet-20 trained with cross-entropy over ten outputs on the digits of some classes; fixed by its seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = zoo.resnet(3, classes=10)
    own = torch.isin(digits.train_labels, torch.tensor(classes))
    images, labels = digits.train[own], digits.train_labels[own]
    steps = len(images) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for i in range(steps):
            batch = order[i * BATCH : (i + 1) * BATCH]
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress()
    return model.eval()


def evaluate(model: nn.Module, digits: Digits) -> Accuracy:
    with torch.no_grad():
        logits = model(digits.test)
    parts = []
    for classes in TASKS:
        own = torch.isin(digits.test_labels, torch.tensor(classes))
        guess = logits[own][:, list(classes)].argmax(1) + classes[0]
        parts.append(100 * (guess == digits.test_labels[own]).float().mean().item())
    joint = 100 * (logits.argmax(1) == digits.test_labels).float().mean().item()
    return Accuracy(joint, *parts)


def compare(
    digits: Digits, seed: int, epochs: int, progress: Any = None
) -> tuple[dict[str, Accuracy], Merged, list[Any]]:
    """Train one pair and evaluate everything: accuracies by row, the ZipIt! merge, the two models."""
    tick = progress or (lambda: None)
    models = [train(digits, classes, 2 * seed + i, epochs, tick) for i, classes in enumerate(TASKS)]
    data = digits.batches()
    merged = {m: merge(models, (data[0],), data, method=m) for m in ("average", "permute", "zip")}
    stale = merge(models, (data[0],), data, reestimate=False)
    rows: dict[str, nn.Module] = {
        "model A (0-4)": models[0],
        "model B (5-9)": models[1],
        "weight average": merged["average"].module,
        "permutation": merged["permute"].module,
        "ZipIt!": merged["zip"].module,
        "ZipIt!, stale batch norm": stale.module,
        "ensemble (2x cost)": LogitEnsemble(models),
    }
    return {name: evaluate(model, digits) for name, model in rows.items()}, merged["zip"], models


def run(out: str | Path, *, seed: int = 0, epochs: int = 15, as_json: bool = False) -> dict[str, Any]:
    """Do the demo; writes merged.safetensors, demo.png and demo.json into ``out`` and returns what demo.json holds."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.check_writable(folder / "merged.safetensors")
    started = time.perf_counter()
    digits = load_digits()
    with _bar(2 * epochs, "training two ResNet-20") as bar:
        accuracies, merged, models = compare(digits, seed, epochs, lambda: bar.update(1))
    merged.save(folder / "merged.safetensors")
    reloaded = _reload(folder / "merged.safetensors")
    if evaluate(reloaded, digits) != accuracies["ZipIt!"]:
        raise RuntimeError("demo: the reloaded model does not behave as the merged one")
    timing = _time_against_torch(models, digits)
    result = {
        "seed": seed,
        "epochs": epochs,
        "accuracy": {name: asdict(a) | {"per_task": a.per_task} for name, a in accuracies.items()},
        "seconds": dict(merged.seconds),
        "against the torch reference": timing,
        "total seconds": time.perf_counter() - started,
    }
    _plot(folder / "demo.png", accuracies, merged)
    with checkpoint.atomic_write(folder / "demo.json", "w") as file:
        json.dump(result, file, indent=1)
    print(json.dumps(result, indent=1) if as_json else _tables(accuracies, merged, timing, folder, result))
    return result


def _reload(path: Path) -> nn.Module:
    model = zoo.resnet(3, classes=10)
    model.load_state_dict(checkpoint.load(path))
    return model.eval()


def _time_against_torch(models: Sequence[nn.Module], digits: Digits) -> dict[str, dict[str, float]]:
    """Seconds of moments (with the forward passes) and of matching, by the automatic backend and by plain torch."""
    data = digits.batches()
    graph = find_spaces(models[0], (data[0],))
    states = [m.state_dict() for m in models]
    timing: dict[str, dict[str, float]] = {"moments": {}, "matching": {}}
    for name in ("automatic", "torch"):
        with backend("torch" if name == "torch" else None):
            start = time.perf_counter()
            moments = gather_moments(graph, states, data)
            timing["moments"][name] = time.perf_counter() - start
            correlations = list(moments.correlations().values())
            start = time.perf_counter()
            match(correlations)
            timing["matching"][name] = time.perf_counter() - start
    return timing


def _tables(
    accuracies: dict[str, Accuracy], merged: Merged, timing: dict[str, Any], folder: Path, result: dict[str, Any]
) -> str:
    lines = [
        "",
        f"Digits 0-4 and 5-9, two ResNet-20, test accuracy in per cent (seed {result['seed']})",
        f"{'':<26}{'joint (10 classes)':>20}{'task A':>9}{'task B':>9}{'per task':>10}",
    ]
    for name, a in accuracies.items():
        lines.append(f"{name:<26}{a.joint:>20.1f}{a.task_a:>9.1f}{a.task_b:>9.1f}{a.per_task:>10.1f}")
    lines += ["", "Stages of the ZipIt! merge: " + ", ".join(f"{k} {v:.2f} s" for k, v in merged.seconds.items())]
    used = "C++" if available("cpu") else "pure torch (no compiled kernels here)"
    for stage, seconds in timing.items():
        ratio = seconds["torch"] / seconds["automatic"]
        lines.append(
            f"{stage}: {used} {seconds['automatic']:.3f} s, torch reference {seconds['torch']:.3f} s ({ratio:.1f}x)"
        )
    lines += [
        "",
        f"Written to {folder}: merged.safetensors (reloaded and checked), demo.png, demo.json; "
        f"{result['total seconds']:.0f} s in all",
    ]
    return "\n".join(lines)


def _plot(path: Path, accuracies: dict[str, Accuracy], merged: Merged) -> None:
    try:
        import matplotlib
    except ImportError as e:
        raise ImportError("demo: matplotlib must be installed for the picture; pip install 'zipfast[demo]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1.35, 1), layout="constrained")
    names = list(accuracies)
    where = range(len(names))
    left.barh([i - 0.2 for i in where], [accuracies[n].joint for n in names], 0.4, label="joint, 10 classes")
    left.barh([i + 0.2 for i in where], [accuracies[n].per_task for n in names], 0.4, label="per task, 5 classes each")
    left.axvline(10, color="grey", linewidth=0.8, linestyle=":")
    left.axvline(20, color="grey", linewidth=0.8, linestyle=":")
    left.set_yticks(list(where), names)
    left.invert_yaxis()
    left.set_xlim(0, 100)
    left.set_xlabel("test accuracy, % (dotted: chance)")
    left.set_title("Two networks, one merged network")
    left.legend(loc="upper right", fontsize=8)

    name = next(iter(merged.groups))
    groups, size = merged.groups[name], merged.groups[name].size
    image = right.imshow(merged.similarities[name], cmap="RdBu_r", vmin=-1, vmax=1)
    together = (groups.index[:, None] == groups.index[None, :]).fill_diagonal_(False).nonzero()
    right.scatter(together[:, 1], together[:, 0], s=14, facecolors="none", edgecolors="black", linewidths=0.8)
    right.axhline(size - 0.5, color="black", linewidth=0.8)
    right.axvline(size - 0.5, color="black", linewidth=0.8)
    right.set_xticks([size / 2, 3 * size / 2], ["A", "B"])
    right.set_yticks([size / 2, 3 * size / 2], ["A", "B"])
    right.set_title(f"Correlations of space '{name}'; circles: merged")
    figure.colorbar(image, ax=right, shrink=0.8)
    with checkpoint.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


class _PlainBar:
    """Progress for those who have no tqdm: one line per tenth."""

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label, self.done = total, label, 0

    def __enter__(self) -> _PlainBar:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def update(self, n: int) -> None:
        self.done += n
        if self.done % max(1, self.total // 10) == 0:
            print(f"{self.label}: {self.done}/{self.total}", file=sys.stderr, flush=True)


def _bar(total: int, label: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return _PlainBar(total, label)
    return tqdm(total=total, desc=label, unit="epoch")
