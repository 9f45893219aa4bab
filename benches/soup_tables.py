# SPDX-License-Identifier: Apache-2.0
"""Model soups on small data: is an average of fine-tuned models better than the best of them, and when does it fail?

``python benches/soup_tables.py [--seeds 4]`` measures (about five minutes on one thread), ``--report`` writes
docs/soup-results.md (benches/soup_page.py).

images   scikit-learn's digits: a VGG without batch norm, pre-trained, fine-tuned eight times, mixed by every recipe.
text     sentences of a toy grammar: the same with a transformer of one layer.
starts   two ResNet-8 that share their start, the first steps or nothing: soups, barriers, angles, and ZipIt!.

Fine-tuning draws its hyper-parameters as a random search does. Models are chosen, added and mixed on held-out samples;
test samples are for the report alone. Values are per cent, one per seed.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import bench_threads, commit, machine, results_folder, threads, write_json
from torch import Tensor, nn

import zipfast
from zipfast import demo, soups, zoo
from zipfast.soups import accuracy_of, ece

RESULTS = "soup_tables.json"
MODELS, BATCH, BINS = 8, 32, 15
PRETRAIN, FINETUNE, HELD = 400, 500, 400  # of the demo's 1300 training digits
EPOCHS, LARGEST = (6, 12, 18), 6e-3  # learning rates over the decade below the largest
Pair = tuple[Tensor, Tensor]
Change = Callable[[Tensor, torch.Generator], Tensor]
State = dict[str, Tensor]

BEST, MEAN, START = "best single, by held-out", "mean single", "pre-trained start"
UNIFORM, GREEDY, GREEDY_GE, RANDOM = "uniform soup", "greedy soup", "greedy soup, ge", "greedy soup, random order"
LOSS, LEARNED, LEARNED_T = "greedy soup, by loss", "learned soup, per model", "learned soup, per tensor"
ENSEMBLE, GREEDY_E = "logit ensemble (8x cost)", "greedy ensemble (up to 8x cost)"
DIFFERENT, ALL = "different", "pre-training"
PARTS = ("images", "text", "starts")
STEPS = {"0": 0.0, "some": 0.1, ALL: 0.5}  # part of all steps that a pair shares


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


PAIR_EPOCHS, PAIR_BATCH, PEAK, POINTS = 8, 64, 0.1, 7
digits = cache(demo.load_digits)
resnet8 = partial(zoo.resnet, 1)


def vgg() -> nn.Module:
    return zoo.VGG(((24,), (48,), (48,)), hidden=48, batch_norm=False)


def moved(x: Tensor, g: torch.Generator) -> Tensor:
    """Each image shifted by up to one of sixteen pixels; what comes in is black."""
    wide, line = F.pad(x, (1, 1, 1, 1)), torch.arange(x.shape[-1])
    rows, columns = (line + torch.randint(3, (len(x), 1), generator=g) for _ in range(2))
    return wide[torch.arange(len(x))[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def noisy(x: Tensor, g: torch.Generator, sigma: float = 0.1) -> Tensor:
    return x + sigma * torch.randn(x.shape, generator=g)


def rotated(x: Tensor, degrees: float = 15) -> Tensor:
    a = math.radians(degrees)
    turn = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]])
    grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def blurred(x: Tensor, sigma: float = 2.0) -> Tensor:
    line = torch.exp(-(torch.arange(-4.0, 5) ** 2) / (2 * sigma**2))
    kernel = torch.outer(line, line)
    return F.conv2d(x, (kernel / kernel.sum())[None, None], padding=4)


def image_data(seed: int) -> tuple[Pair, Pair, Pair, dict[str, Pair]]:
    """Pre-training, fine-tuning, held-out, and tests by name; the seed cuts the demo's training images."""
    d = digits()
    order = torch.randperm(len(d.train), generator=seeded(seed)).tensor_split([PRETRAIN, PRETRAIN + FINETUNE])
    pre, fine, held = ((d.train[o], d.train_labels[o]) for o in order)
    x, y = d.test, d.test_labels
    tests = {"test": x, "rotation 15°": rotated(x), "noise σ = .4": noisy(x, seeded(0), 0.4), "blur": blurred(x)}
    return pre, fine, held, {name: (value, y) for name, value in tests.items()}


NOUNS, WORDS, FILLERS = 12, 16, 40  # nouns of a topic, adjectives of a polarity, words without meaning
SHORT, LENGTH, LONG = 7, 10, 20
NOT, FIRST = 1, 2  # 0 pads
ADJECTIVES = FIRST + 2 * NOUNS
FILLER = ADJECTIVES + 2 * WORDS
UNKNOWN = FILLER + FILLERS  # words that no training has seen
VOCABULARY = UNKNOWN + FILLERS


def sentences(count: int, seed: int, *, longest: int = LENGTH, part: Any = (0, 1), unknown: float = 0.0) -> Pair:
    """Sentences of a toy grammar, int64 [count, LONG], and their classes: 2 · topic + polarity.

    A sentence has one noun, which tells its topic, and one adjective, which tells its polarity, unless a *not* stands before
    it; a *not* elsewhere means nothing. All else are fillers, the share `unknown` of them words of their own. `part` of a
    topic's nouns and of a polarity's adjectives is in use.
    """
    g = seeded(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    x, y = torch.zeros(count, LONG, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    nouns, words = ([round(n * p) for p in part] for n in (NOUNS, WORDS))
    for i in range(count):
        size = draw(max(5, longest // 2), longest + 1)
        new = torch.rand(size, generator=g) < unknown
        fillers = torch.randint(FILLERS, (size,), generator=g)
        x[i, :size] = torch.where(new, UNKNOWN, FILLER) + fillers
        topic, polarity = draw(0, 2), draw(0, 2)
        negated, idle = draw(0, 4) == 0, draw(0, 4) == 0
        noun, adjective = (p + 1 for p in torch.randperm(size - 1, generator=g)[:2].tolist())
        x[i, noun] = FIRST + topic * NOUNS + draw(*nouns)
        x[i, adjective] = ADJECTIVES + polarity * WORDS + draw(*words)
        free = [p for p in range(size) if p not in (noun, adjective, adjective - 1)]
        if negated and noun != adjective - 1:
            x[i, adjective - 1] = NOT
            polarity = 1 - polarity
        if idle and free:
            x[i, free[draw(0, len(free))]] = NOT
        y[i] = 2 * topic + polarity
    return x, y


class Reader(nn.Module):
    """Embeddings of words and places, one attention block, the mean over words, a linear head."""

    def __init__(self, wide: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.words, self.places = nn.Embedding(VOCABULARY, wide), nn.Embedding(LONG, wide)
        self.before, self.after = nn.LayerNorm(wide), nn.LayerNorm(wide)
        self.attention, self.out = nn.Linear(wide, 3 * wide), nn.Linear(wide, wide)
        self.hidden = nn.Sequential(nn.Linear(wide, 2 * wide), nn.GELU(), nn.Linear(2 * wide, wide))
        self.head = nn.Linear(wide, 4)

    def forward(self, x: Tensor) -> Tensor:
        there = x != 0
        h = self.words(x) + self.places.weight
        q, k, v = self.attention(self.before(h)).unflatten(2, (3 * self.heads, -1)).transpose(1, 2).chunk(3, 1)
        seen = F.scaled_dot_product_attention(q, k, v, there[:, None, None, :])
        h = h + self.out(seen.transpose(1, 2).flatten(2))
        h = self.after(h + self.hidden(h)) * there[..., None]
        return self.head(h.sum(1) / there.sum(1, keepdim=True))


def dropped(x: Tensor, g: torch.Generator) -> Tensor:
    """A tenth of the words become fillers."""
    other = FILLER + torch.randint(FILLERS, x.shape, generator=g)
    return torch.where((torch.rand(x.shape, generator=g) < 0.1) & (x != 0), other, x)


def text_data(seed: int) -> tuple[Pair, Pair, Pair, dict[str, Pair]]:
    """As `image_data`. Pre-training has short sentences; fine-tuning half of the nouns and adjectives only."""
    first, second, s = (0, 0.5), (0.5, 1), 1000 * seed
    tests = {
        "test": sentences(1000, s + 1, part=first),
        "longer": sentences(1000, s + 2, part=first, longest=LONG),
        "other words": sentences(1000, s + 3, part=second),
        "unknown fillers": sentences(1000, s + 4, part=first, unknown=0.5),
    }
    fine, held = sentences(1000, s + 6, part=first), sentences(HELD, s + 7, part=first)
    return sentences(4000, s + 5, longest=SHORT), fine, held, tests


def fit(
    model: nn.Module, data: Pair, rate: float, epochs: int, seed: int, change: Change | None = None, smooth: float = 0.0
) -> nn.Module:
    """Adam, the learning rate falling to 0; order and augmentation fixed by the seed."""
    x, y = data
    g = seeded(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs * math.ceil(len(x) / BATCH))
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=g).split(BATCH):
            loss = F.cross_entropy(
                model(x[part] if change is None else change(x[part], g)), y[part], label_smoothing=smooth
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def searched(start: nn.Module, data: Pair, changes: Sequence[Change | None], seed: int) -> list[State]:
    """Fine-tuned models with drawn hyper-parameters; no two of a sweep share a seed."""
    g = seeded(seed + 77)
    states = []
    for i in range(MODELS):
        rate = LARGEST * 10 ** -float(torch.rand((), generator=g))
        epochs, which, smooth = (int(torch.randint(n, (), generator=g)) for n in (len(EPOCHS), len(changes), 2))
        model = fit(copy.deepcopy(start), data, rate, EPOCHS[epochs], MODELS * seed + i, changes[which], 0.1 * smooth)
        states.append(model.state_dict())
    return states


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def columns(logits: Mapping[str, Tensor], sets: Mapping[str, Pair], beta: float = 1.0) -> dict[str, float]:
    found = {name: accuracy_of(values, sets[name][1]) for name, values in logits.items()}
    shifts = [value for name, value in found.items() if name not in ("held-out", "test")]
    found["mean of shifts"] = sum(shifts) / len(shifts)
    found["ECE"] = 100 * ece(logits["test"], sets["test"][1], bins=BINS)
    found["ECE, β"] = 100 * ece(beta * logits["test"], sets["test"][1], bins=BINS)
    return found


def recipes(start: nn.Module, states: list[State], held: Pair, tests: dict[str, Pair], seed: int) -> dict[str, Any]:
    """Every row of a table, and what else one asks of the models."""
    sets = {"held-out": held, **tests}
    live = copy.deepcopy(start)

    def logits(state: State) -> dict[str, Tensor]:
        live.load_state_dict(state)
        return {name: outputs(live, x) for name, (x, _) in sets.items()}

    def evaluate(state: State) -> float:
        live.load_state_dict(state)
        return accuracy_of(outputs(live, held[0]), held[1])

    def less_loss(state: State) -> float:
        live.load_state_dict(state)
        return -float(F.cross_entropy(outputs(live, held[0]), held[1]))

    singles = [logits(state) for state in states]
    alone = [columns(one, sets) for one in singles]
    scores = [one["held-out"] for one in alone]
    rows = {START: columns(logits(start.state_dict()), sets)}
    rows[MEAN] = {name: sum(one[name] for one in alone) / MODELS for name in alone[0]}
    rows[BEST] = alone[max(range(MODELS), key=lambda i: (scores[i], -i))]
    made = {
        UNIFORM: soups.uniform_soup(states),
        GREEDY: soups.greedy_soup(states, evaluate, scores=scores),
        GREEDY_GE: soups.greedy_soup(states, evaluate, scores=scores, accept="ge"),
        RANDOM: soups.greedy_soup(states, evaluate, scores=scores, order="random", seed=seed),
        LOSS: soups.greedy_soup(states, less_loss),
    }
    beta = dict.fromkeys(made, 1.0)
    batches = list(zip(held[0].split(BATCH), held[1].split(BATCH)))
    for name, granularity, epochs in ((LEARNED, "model", 3), (LEARNED_T, "tensor", 5)):
        learner = soups.LearnedSoup(copy.deepcopy(start), states, granularity=granularity)
        learner.fit(batches, epochs=epochs)
        made[name], beta[name] = learner.soup(), float(learner.beta.detach())
    for name, soup in made.items():
        assert soup.state is not None
        rows[name] = columns(logits(soup.state), sets, beta[name])
    stacks = {name: torch.stack([one[name] for one in singles]) for name in sets}
    rows[ENSEMBLE] = columns({name: soups.logit_ensemble(stack) for name, stack in stacks.items()}, sets)
    members = list(soups.greedy_ensemble(stacks["held-out"], held[1]).members)
    rows[GREEDY_E] = columns({name: soups.logit_ensemble(stack[members]) for name, stack in stacks.items()}, sets)
    lie = soups.geometry(states, start.state_dict())
    apart = lie.cosines[~torch.eye(MODELS, dtype=torch.bool)]
    facts = {"cosine": float(apart.mean()), "lowest held-out": min(scores)}
    facts |= {f"members of {name}": float(len(made[name].ingredients)) for name in (GREEDY, GREEDY_GE, RANDOM, LOSS)}
    facts |= {f"members of {GREEDY_E}": float(len(members)), "β": beta[LEARNED]}
    return {"rows": rows, "facts": facts}


def sweep(name: str, seed: int) -> dict[str, Any]:
    """One seed of the images or the text: pre-train, fine-tune eight times, mix."""
    image = name == "images"
    pre, fine, held, tests = (image_data if image else text_data)(seed)
    start = built(vgg if image else Reader, seed)
    fit(start, pre, 3e-3 if image else 5e-3, 30 if image else 10, seed)
    states = searched(start, fine, (None, moved, noisy) if image else (None, dropped), seed)
    return recipes(start, states, held, tests, seed)


def trained(model: nn.Module, seed: int, begin: int, end: int, total: int) -> nn.Module:
    """Steps [begin, end) of SGD, whose learning rate falls from PEAK to 0 over all steps; the momentum begins at 0."""
    d, g = digits(), seeded(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK, momentum=0.9, weight_decay=5e-4)
    order: list[Tensor] = []
    model.train()
    for step in range(begin, end):
        order = order or list(torch.randperm(len(d.train), generator=g).split(PAIR_BATCH))
        part = order.pop()
        optimizer.param_groups[0]["lr"] = PEAK * (1 - step / total)
        loss = F.cross_entropy(model(moved(d.train[part], g)), d.train_labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def starts(seed: int) -> dict[str, Any]:
    """Two networks with all ten classes, for each number of steps that they share; and from different starts."""
    d = digits()
    data, live = d.batches(), resnet8().eval()
    total = PAIR_EPOCHS * math.ceil(len(d.train) / PAIR_BATCH)

    def accuracy(module: nn.Module) -> float:
        return accuracy_of(outputs(module, d.test), d.test_labels)

    def stale(state: State) -> float:
        live.load_state_dict(state)
        return accuracy(live)

    def renewed(state: State) -> float:
        live.load_state_dict(state)
        zipfast.reestimate_batchnorm(live, data)
        return accuracy(live)

    forks: dict[str, tuple[list[nn.Module], int]] = {}
    for name, part in STEPS.items():
        shared = round(part * total)
        start = trained(built(resnet8, 2 * seed), 4 * seed, 0, shared, total)
        forks[name] = [start, start], shared
    forks[DIFFERENT] = [built(resnet8, 2 * seed), built(resnet8, 2 * seed + 1)], 0
    rows: dict[str, dict[str, float]] = {}
    for name, (begun, shared) in forks.items():
        pair = [trained(copy.deepcopy(b), 4 * seed + 1 + i, shared, total, total) for i, b in enumerate(begun)]
        a, b = (model.state_dict() for model in pair)
        moves = [
            {k: v - b.state_dict()[k] for k, v in m.state_dict().items() if v.is_floating_point()}
            for m, b in zip(pair, begun)
        ]
        soup = soups.uniform_soup([a, b]).state
        assert soup is not None
        lie = soups.geometry([a, b], exclude="running_")
        row = {"steps": float(shared), "A": accuracy(pair[0]), "B": accuracy(pair[1])}
        row |= {"soup": stale(soup), "soup, new statistics": renewed(soup)}
        row["barrier"] = soups.barrier(a, b, stale, points=POINTS).height
        row["barrier, new statistics"] = soups.barrier(a, b, renewed, points=POINTS).height
        row |= {"cosine of weights": float(lie.cosines[0, 1]), "distance": float(lie.distances[0, 1])}
        row["cosine of updates"] = float(soups.geometry(moves, exclude="running_").cosines[0, 1])
        row["ensemble"] = accuracy(zipfast.LogitEnsemble(pair))
        if name == DIFFERENT:
            for method in ("permute", "zip"):
                row[method] = accuracy(zipfast.merge(pair, (data[0],), data, method=method).module)
        rows[name] = row
    return {"rows": rows, "facts": {}}


def together(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of the seeds -> lists, one value per seed, in order."""
    rows = {row: {c: [f["rows"][row][c] for f in found] for c in found[0]["rows"][row]} for row in found[0]["rows"]}
    return {"rows": rows, "facts": {name: [f["facts"][name] for f in found] for name in found[0]["facts"]}}


def measure(seeds: Sequence[int], parts: Sequence[str] = PARTS, say: Callable[[str], None] = print) -> dict[str, Any]:
    document: dict[str, Any] = {"seeds": list(seeds), "parts": {}, "seconds": {}}
    for name in parts:
        begin = time.perf_counter()
        found = []
        for seed in seeds:
            found.append(starts(seed) if name == "starts" else sweep(name, seed))
            say(f"{name}: seed {seed}, {time.perf_counter() - begin:.0f} s")
        document["parts"][name] = together(found)
        document["seconds"][name] = time.perf_counter() - begin
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--report", action="store_true", help="write the page from the results")
    options = parser.parse_args()
    path = results_folder() / RESULTS
    if options.report:
        from soup_page import write

        write(path)
        return
    with threads(bench_threads()):
        found = measure(range(options.seeds), say=lambda line: print(line, flush=True))
        write_json(path, {"machine": machine("cpu"), "commit": commit(), **found})


if __name__ == "__main__":
    main()
