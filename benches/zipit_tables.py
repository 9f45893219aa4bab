# SPDX-License-Identifier: Apache-2.0
"""ZipIt!'s tables on real data at toy size: each one command, medians over pairs of networks trained apart.

``python benches/zipit_tables.py two|four|cross|vgg|sweep [--pairs 5] [--epochs 15]``, then ``--report``.

two    two ResNet-20, digits 0-4 and 5-9, ten outputs each: every method, cuts, ensemble (the paper's Table 1).
four   four ResNet-20 with two or three digits each: merged in pairs and all at once (Table 4).
cross  one ResNet-20 on the digits, one on letters, with heads of 10 and 12 outputs (several data sets).
vgg    as two, with a VGG without batch norm, with and without REPAIR.
sweep  as two: joint accuracy over alpha and beta (§4.3's budget).

Each result goes into benches/results/zipit_tables.json, from which ``--report`` writes docs/zipit-results.md. Trained
networks are kept in build/zipit_tables, by a hash of all that determines them, so that a killed run goes on where it
stopped. Training takes about ten seconds a network on one thread, a row about two.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import inspect
import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import glyphs
import torch
import torch.nn.functional as F
from harness import ROOT, commit, results_folder, threads, write_json
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zipfast
from zipfast import checkpoint, demo, zoo
from zipfast.demo import BATCH, SIZE, Digits
from zipfast.merging.sweep import sweep as budget_sweep

CACHE = ROOT / "build" / "zipit_tables"
RESULTS = "zipit_tables.json"
PAIRS, EPOCHS = 5, 15
HALVES: tuple[tuple[int, ...], ...] = demo.TASKS
QUARTERS: tuple[tuple[int, ...], ...] = ((0, 1, 2), (3, 4), (5, 6), (7, 8, 9))
ALPHAS = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
BETAS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)

# Layers before each cut: of a ResNet-20 the first convolution and six per stage (shortcuts not counted), of the VGG its
# four convolutions.
LAYERS = {"stages.2": 19, "stages.1": 13, "stages.0": 7, "features": 4}


def resnet20(outputs: int) -> nn.Module:
    return zoo.resnet(3, classes=outputs)


def vgg(outputs: int) -> nn.Module:
    return zoo.VGG(((16,), (32,), (64, 64)), out_features=outputs, batch_norm=False)


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {"resnet20": resnet20, "vgg": vgg}


# ------------------------------------------------------------------------------------------------------------ networks


def train(architecture: str, images: Tensor, labels: Tensor, outputs: int, seed: int, epochs: int) -> nn.Module:
    """A network trained with cross-entropy, fixed by its seed; the ResNet-20 of ten outputs is that of the demo.

    Without batch norm SGD stays at chance for long, so the VGG gets Adam and twice the epochs.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURES[architecture](outputs)
    steps = len(images) // BATCH
    optimizer: torch.optim.Optimizer
    if architecture == "resnet20":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer, epochs = torch.optim.Adam(model.parameters(), lr=3e-3), 2 * epochs
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
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
    return model.eval()


@functools.cache
def data_of(source: str) -> Digits:
    return {"digits": demo.load_digits, "glyphs": glyphs.load_glyphs}[source]()


@dataclass(frozen=True)
class Recipe:
    """All that determines a trained network."""

    architecture: str
    source: str
    classes: tuple[int, ...]
    outputs: int
    seed: int
    epochs: int

    def train(self) -> nn.Module:
        data = data_of(self.source)
        own = torch.isin(data.train_labels, torch.tensor(self.classes))
        return train(self.architecture, data.train[own], data.train_labels[own], self.outputs, self.seed, self.epochs)

    def path(self, folder: Path) -> Path:
        key = hashlib.sha256(f"{self}|{torch.get_num_threads()}|{_code()}".encode()).hexdigest()[:16]
        classes = "".join(map(str, self.classes)) if len(self.classes) < 10 else "all"
        return folder / f"{self.architecture}-{self.source}-{classes}-seed{self.seed}-{key}.safetensors"

    def get(self, folder: Path | None = None) -> nn.Module:
        """The network, from the cache where it is there."""
        path = self.path(folder or CACHE)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(path, self.train().state_dict())
        model = ARCHITECTURES[self.architecture](self.outputs)
        model.load_state_dict(checkpoint.load(path))
        return model.eval()


@functools.cache
def _code() -> str:
    """What else a trained network depends on, besides the number of threads: the code that trains it, its data, torch."""
    parts = (train, resnet20, vgg, zoo, glyphs, demo.load_digits)
    return "|".join([torch.__version__, *(inspect.getsource(part) for part in parts)])


def networks(kind: str, seed: int, epochs: int) -> list[nn.Module]:
    """The networks of one pair (or four) of a table; no two tables or pairs share a seed within a data set."""
    if kind == "cross":
        recipes = [
            Recipe("resnet20", "digits", tuple(range(10)), 10, 2 * seed, epochs),
            Recipe("resnet20", "glyphs", tuple(range(len(glyphs.LETTERS))), len(glyphs.LETTERS), 2 * seed + 1, epochs),
        ]
    else:
        tasks = QUARTERS if kind == "four" else HALVES
        architecture = "vgg" if kind == "vgg" else "resnet20"
        recipes = [Recipe(architecture, "digits", c, 10, len(tasks) * seed + i, epochs) for i, c in enumerate(tasks)]
    return [recipe.get() for recipe in recipes]


# ------------------------------------------------------------------------------------------------------------ accuracy


class Ensemble(nn.Module):
    """All models, each run in full: a list of outputs, as a partly merged network gives."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [model(x) for model in self.models]


def heads(module: nn.Module, images: Tensor, count: int) -> list[Tensor]:
    """The logits of each task's head; a network with one head serves all tasks with it."""
    with torch.no_grad():
        found = module(images)
    return found if isinstance(found, list) else [found] * count


def percent(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> float:
    """Accuracy of the best of some classes on the images of these classes."""
    wanted = torch.tensor(classes)
    own = torch.isin(labels, wanted)
    return 100 * (wanted[logits[own][:, wanted].argmax(1)] == labels[own]).double().mean().item()


def score(module: nn.Module, data: Digits, tasks: Sequence[Sequence[int]]) -> dict[str, float]:
    """In per cent.

    joint: all tasks' classes at once, by the mean of the heads' logits. joint by head: the same, but each class by the
    logit of its own task's head. task A ...: the classes of one task among themselves, by its own head.
    """
    outputs = heads(module, data.test, len(tasks))
    classes = [c for task in tasks for c in task]
    joint = percent(torch.stack(outputs).mean(0), data.test_labels, classes)
    spliced = outputs[0].clone()
    for logits, task in zip(outputs, tasks):
        spliced[:, list(task)] = logits[:, list(task)]
    own = [percent(logits, data.test_labels, task) for logits, task in zip(outputs, tasks)]
    names = [f"task {letter}" for letter in "ABCD"[: len(tasks)]]
    by_head = percent(spliced, data.test_labels, classes)
    return {"joint": joint, "joint by head": by_head, **dict(zip(names, own)), "per task": sum(own) / len(own)}


def flops(module: nn.Module) -> int:
    """Of one image; a multiply and an add are two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 1, SIZE, SIZE))
    return int(counter.get_total_flops())


# ---------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One row of a table: a name, and what `zipfast.merge` is told, or which unmerged networks are meant."""

    name: str
    options: Mapping[str, Any] | None = None

    def build(self, models: Sequence[nn.Module], data: Sequence[Tensor]) -> nn.Module:
        if self.options is not None:
            return zipfast.merge(models, (data[0],), data, **self.options).module
        if self.name.startswith("model "):
            return models["ABCD".index(self.name[6])]
        if self.name == ENSEMBLE:
            return Ensemble(models)
        if self.name == APART:
            return side_by_side(models, data)
        assert self.name == ENSEMBLE_BN
        fresh = [copy.deepcopy(model) for model in models]
        for model in fresh:
            zipfast.reestimate_batchnorm(model, data)
        return Ensemble(fresh)

    def layers(self, depth: int) -> int | None:
        """How many of a network's layers are merged; None for networks that are not."""
        if self.options is None:
            return depth if self.name == APART else None
        stop = self.options.get("stop")
        return depth if stop is None else LAYERS[stop]


def side_by_side(models: Sequence[nn.Module], data: Sequence[Tensor]) -> nn.Module:
    """What ZipIt! (1, 1) gives if no feature may merge with one of another model: M networks, each of a share of the width.

    The control for how much of ZipIt!'s result comes from features that models share.
    """
    graph = zipfast.find_spaces(models[0], (data[0],))
    states = [model.state_dict() for model in models]
    similarities = zipfast.merging.gather_moments(graph, states, data).correlations(pair_dead=True)
    for name, similarity in similarities.items():
        model = torch.arange(len(similarity)) // (len(similarity) // len(models))
        similarities[name] = similarity.masked_fill(model[:, None] != model[None, :], -torch.inf)
    groups = zipfast.merging.match_spaces(graph.plan, similarities, len(models))
    module = copy.deepcopy(models[0])
    module.load_state_dict(zipfast.merging.apply_groups(graph.plan, groups, states))
    zipfast.reestimate_batchnorm(module.eval(), data)
    return module


ENSEMBLE, ENSEMBLE_BN = "ensemble", "ensemble, batch norm re-estimated on all tasks"
PAPER_BUDGET = {"alpha": 0.3, "beta": 0.125}
ZIP, ZIP_PAPER, PERMUTE = "ZipIt! (1, 1)", "ZipIt! (.3, .125)", "permute"
STALE, MIX = "ZipIt! (1, 1), stale batch norm", "ZipIt! (1, 1), half weights, half activations"
APART = "ZipIt! (1, 1) inside each model only"
REBASIN, OPTIMAL, KMEANS = "Git Re-Basin (permute by weights)", "optimal pairs", "k-means"
METHODS: dict[str, dict[str, Any]] = {ZIP: {}, ZIP_PAPER: PAPER_BUDGET, PERMUTE: {"method": "permute"}}


def cut(name: str, stop: str) -> str:
    """The name of a row whose method is applied up to a cut only."""
    return f"{name}, {LAYERS[stop]} of 20 layers"


def cuts(*methods: str, stops: Sequence[str] = ("stages.2", "stages.1", "stages.0")) -> list[Row]:
    return [Row(cut(name, stop), {**METHODS[name], "stop": stop}) for name in methods for stop in stops]


def repaired(name: str) -> str:
    return f"{name}, REPAIR"


def with_repair(name: str, options: Mapping[str, Any]) -> list[Row]:
    return [Row(name, options), Row(repaired(name), {**options, "repair": True})]


AVERAGE = Row("weight average", {"method": "average"})
TWO = [
    Row("model A"),
    Row("model B"),
    AVERAGE,
    Row(REBASIN, {"method": "permute", "similarity": "weights"}),
    Row(PERMUTE, METHODS[PERMUTE]),
    Row(ZIP_PAPER, PAPER_BUDGET),
    Row(ZIP, {}),
    Row(STALE, {"reestimate": False}),
    Row(APART),
    Row(MIX, {"similarity": "mix"}),
    Row(OPTIMAL, {"method": "optimal"}),
    Row(KMEANS, {"method": "kmeans"}),
    *cuts(PERMUTE, ZIP_PAPER, ZIP),
    Row(ENSEMBLE),
    Row(ENSEMBLE_BN),
]
FOUR = [
    AVERAGE,
    Row(PERMUTE, METHODS[PERMUTE]),
    Row(ZIP_PAPER, PAPER_BUDGET),
    Row(ZIP, {}),
    Row(APART),
    *cuts(ZIP),
    Row(ENSEMBLE),
]
# With heads of different size there is no whole merge: the last cut is behind the pooling, before the linear layer.
CROSS = [
    Row("weight average, 19 of 20 layers", {"method": "average", "stop": "stages.2"}),
    *cuts(PERMUTE, ZIP_PAPER, ZIP),
    Row(ENSEMBLE),
    Row(ENSEMBLE_BN),
]
VGG = [
    Row("model A"),
    Row("model B"),
    *with_repair(AVERAGE.name, {"method": "average"}),
    *with_repair(PERMUTE, METHODS[PERMUTE]),
    *with_repair(ZIP_PAPER, PAPER_BUDGET),
    *with_repair(ZIP, {}),
    *with_repair(f"{ZIP}, convolutions only", {"stop": "features"}),
    Row(ENSEMBLE),
]


Scored = tuple[dict[str, float], int]  # accuracies by column, FLOPs


def two(models: Sequence[nn.Module], row: Row) -> Scored:
    data = data_of("digits")
    module = row.build(models, data.batches())
    return score(module, data, HALVES), flops(module)


def four(models: Sequence[nn.Module], row: Row) -> Scored:
    """Means over the six pairs, each on its own classes alone, and all four at once."""
    data = data_of("digits")
    found = []
    for i, j in itertools.combinations(range(4), 2):
        part = only(data, QUARTERS[i] + QUARTERS[j])
        module = row.build([models[i], models[j]], part.batches())
        found.append(score(module, part, [QUARTERS[i], QUARTERS[j]]))
    module = row.build(models, data.batches())
    whole, columns = score(module, data, QUARTERS), ("joint", "joint by head", "per task")
    return {
        **{f"pairs, {name}": sum(s[name] for s in found) / len(found) for name in columns},
        **{f"all four, {name}": whole[name] for name in columns},
    }, flops(module)


def cross(models: Sequence[nn.Module], row: Row) -> Scored:
    """Each data set by its own head; every batch that merging reads holds images of both."""
    digits, letters = data_of("digits"), data_of("glyphs")
    mixed = [torch.cat(both) for both in zip(digits.train.split(50), letters.train.split(50))]
    module = row.build(models, mixed)
    found = []
    for m, data in enumerate((digits, letters)):
        logits = heads(module, data.test, 2)[m]
        found.append(percent(logits, data.test_labels, range(logits.shape[1])))
    return {"digits": found[0], "letters": found[1], "per task": sum(found) / 2}, flops(module)


def only(data: Digits, classes: Sequence[int]) -> Digits:
    wanted = torch.tensor(classes)
    train_, test = torch.isin(data.train_labels, wanted), torch.isin(data.test_labels, wanted)
    return Digits(data.train[train_], data.train_labels[train_], data.test[test], data.test_labels[test])


@dataclass(frozen=True)
class Table:
    rows: Sequence[Row]
    score: Callable[[Sequence[nn.Module], Row], Scored]
    depth: int = 20


TABLES = {"two": Table(TWO, two), "four": Table(FOUR, four), "cross": Table(CROSS, cross), "vgg": Table(VGG, two, 6)}


# ----------------------------------------------------------------------------------------------------------------- runs


def measure(name: str, pairs: int, epochs: int, rows: Sequence[Row] | None = None, tick: Any = lambda: None) -> dict:
    """A table: by row its layers, FLOPs and by column the accuracies of all pairs, in the order of the seeds."""
    table = TABLES[name]
    rows = table.rows if rows is None else rows
    values: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
    cost: dict[str, int] = {}
    for seed in range(pairs):
        models = networks(name, seed, epochs)
        tick()
        for row in rows:
            found, cost[row.name] = table.score(models, row)
            values[row.name].append(found)
            tick()
    one = flops(models[0])
    return {
        "rows": [
            {
                "row": row.name,
                "layers": row.layers(table.depth),
                "flops": cost[row.name],
                "relative": cost[row.name] / one,
                "values": {c: [round(v[c], 2) for v in values[row.name]] for c in values[row.name][0]},
            }
            for row in rows
        ]
    }


def sweep(pairs: int, epochs: int, tick: Any = lambda: None) -> dict:
    """Joint accuracy, and the share of merges inside a model, both [pairs, alphas, betas]."""
    data = data_of("digits")
    batches = data.batches()
    values, inside = [], []
    for seed in range(pairs):
        points = budget_sweep(
            networks("two", seed, epochs),
            (batches[0],),
            batches,
            lambda module: score(module, data, HALVES)["joint"],
            alphas=ALPHAS,
            betas=BETAS,
            progress=lambda stage, done: tick() if stage == "sweep" else None,
        )
        values.append(_grid([round(point.score, 2) for point in points]))
        inside.append(_grid([round(point.in_model, 4) for point in points]))
        tick()
    return {"alphas": ALPHAS, "betas": BETAS, "values": values, "in_model": inside}


def _grid(values: Sequence[float]) -> list[list[float]]:
    return [list(values[i : i + len(BETAS)]) for i in range(0, len(values), len(BETAS))]


def run(name: str, pairs: int, epochs: int, path: Path) -> None:
    """Measure one table and write it into the results, beside the others."""
    steps = len(ALPHAS) * len(BETAS) if name == "sweep" else len(TABLES[name].rows)
    with progress(pairs * (steps + 1), name) as tick:
        found = sweep(pairs, epochs, tick) if name == "sweep" else measure(name, pairs, epochs, tick=tick)
    facts = {
        "pairs": pairs,
        "epochs": epochs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    document = json.loads(path.read_text()) if path.exists() else {"schema": 1, "tables": {}}
    document["tables"][name] = {**facts, **found}
    write_json(path, document)


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[], None]]:
    """A bar if there is tqdm, else a line per tenth."""
    try:
        from tqdm import tqdm
    except ImportError:
        done = itertools.count(1)

        def tick() -> None:
            if (n := next(done)) % max(1, total // 10) == 0:
                print(f"{label}: {n}/{total}", file=sys.stderr, flush=True)

        yield tick
    else:
        with tqdm(total=total, desc=label) as bar:
            yield lambda: bar.update(1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="table", help=", ".join([*TABLES, "sweep"]))
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs (or fours) of networks, seeds 0, 1, ...")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=1, help="networks depend on it, bit by bit")
    parser.add_argument("--results", type=Path, default=results_folder() / RESULTS)
    parser.add_argument("--report", action="store_true", help="write docs/zipit-results.md from the results")
    options = parser.parse_args(arguments)
    # Not by `choices`, which Python before 3.12 also holds against an empty list.
    if unknown := [name for name in options.tables if name not in (*TABLES, "sweep")]:
        parser.error(f"table must be one of {', '.join([*TABLES, 'sweep'])}, got {unknown[0]!r}")
    if not options.tables and not options.report:
        parser.error("name a table, or --report")
    with threads(options.threads):
        for name in options.tables:
            run(name, options.pairs, options.epochs, options.results)
    if options.report:
        import zipit_page

        zipit_page.write(options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
