# SPDX-License-Identifier: Apache-2.0
"""Evaluator: accuracy of weights in a module, stopped early without changing any decision; diagnosis in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from zipfast.soups import Evaluator, advantages, barrier, diagnose, greedy_soup

X = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
TRUTH = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
Y = (X @ TRUTH.T).argmax(1)
BATCHES = list(zip(X.split(20), Y.split(20)))


def net() -> nn.Module:
    return nn.Linear(5, 3, bias=False)


def models(count: int, noise: float, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"weight": TRUTH + noise * torch.randn(3, 5, generator=generator)} for _ in range(count)]


class Counting:
    """Batches that count how many of them were read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self):
        for batch in BATCHES:
            self.read += 1
            yield batch


def test_accuracy_and_modes() -> None:
    module = net()
    module.train()
    evaluator = Evaluator(module, BATCHES)
    assert evaluator({"weight": TRUTH}) == 100.0 and module.training
    assert torch.equal(module.weight, TRUTH)
    assert evaluator.at_most({"weight": TRUTH}, 50.0, equal=False) == (100.0, True)


def test_early_stop_is_a_bound() -> None:
    data = Counting()
    evaluator = Evaluator(net(), data)
    state = models(1, 2.0)[0]
    whole = evaluator.at_most(state, 99.0, equal=False)  # the first pass learns how many labels there are
    assert whole == (evaluator(state), True) and data.read == 20
    data.read = 0
    most, exact = evaluator.at_most(state, 99.0, equal=False)
    assert not exact and whole[0] <= most <= 99.0 and data.read < 10
    same, exact = evaluator.at_most(state, whole[0], equal=True)  # reachable, so not stopped
    assert (same, exact) == whole


@pytest.mark.parametrize("accept", ["gt", "ge"])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_decides_alike_with_and_without(accept: str, seed: int, tmp_path: Path) -> None:
    ingredients = models(7, 1.0, seed)
    ingredients.append(ingredients[2])
    plain = greedy_soup(ingredients, lambda state: Evaluator(net(), BATCHES)(state), accept=accept)
    data = Counting()
    evaluator = Evaluator(net(), data)
    journal = tmp_path / "j.jsonl"
    fast = greedy_soup(ingredients, evaluator, accept=accept, journal=journal)
    assert fast.weights == plain.weights and fast.score == plain.score
    assert [t.accepted for t in fast.tried] == [t.accepted for t in plain.tried]
    for t, p in zip(fast.tried, plain.tried):
        assert t.score == p.score if t.exact else t.score >= p.score
    data.read = 0
    again = greedy_soup(ingredients, evaluator, accept=accept, journal=journal)
    assert (again.weights, again.tried) == (fast.weights, fast.tried)
    assert data.read == 0
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert any(entry.get("at_most") for entry in entries) == any(not t.exact for t in fast.tried)


def test_recalibration() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    state = {key: value.clone() for key, value in module.state_dict().items()}
    state["1.running_mean"] += 100
    Evaluator(module, BATCHES, recalibrate=BATCHES)(state)
    assert float(module[1].running_mean.abs().max()) < 10 < float(state["1.running_mean"].max())


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({}, "the weights must fit Linear, got ones that lack weight"),
        ({"weight": TRUTH, "bias": torch.zeros(3)}, "got ones that hold besides bias"),
        ({"weight": torch.zeros(2, 5)}, "got ones that hold in another shape weight"),
    ],
)
def test_weights_that_do_not_fit(state: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Evaluator(net(), BATCHES)(state)


def test_bad_batches() -> None:
    with pytest.raises(TypeError, match="'batches' must be readable more than once, got an iterator"):
        Evaluator(net(), iter(BATCHES))
    with pytest.raises(ValueError, match="'batches' must hold at least one sample, got none"):
        Evaluator(net(), []).at_most({"weight": TRUTH}, 1.0, equal=False)
    with pytest.raises(ValueError, match="'batches' must hold labels beside the inputs, got none"):
        Evaluator(net(), [X]).at_most({"weight": TRUTH}, 1.0, equal=False)


def test_a_tied_name_may_be_missing() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(5, 5, bias=False)
            self.two = nn.Linear(5, 5, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x))

    evaluator = Evaluator(Tied(), BATCHES)
    evaluator.load({"one.weight": torch.eye(5)})
    assert torch.equal(evaluator.model.two.weight, torch.eye(5))


# -------------------------------------------------------------------------------------------------------- diagnosis


def test_nothing_against_fine_tunes_of_one_start() -> None:
    found = diagnose(models(3, 0.1), base={"weight": TRUTH}, evaluate=Evaluator(net(), BATCHES))
    assert found.ok and found.geometry is not None and len(found.barriers) == 2
    assert "no reason against a soup was found" in str(found)


def test_what_is_wrong_is_named() -> None:
    near, far = models(2, 0.1), {"weight": -TRUTH}
    assert "look trained from different starts: the cosine of their weights is -" in diagnose([*near, far]).problems[0]
    other = {"weight": torch.zeros(3, 6)}
    assert diagnose([near[0], other]).problems[0].startswith("the models are of different architectures: ")
    broken = {"weight": near[0]["weight"].clone()}
    broken["weight"][1, 2] = torch.inf
    assert diagnose([near[0], broken]).problems == (
        "model 1 has NaN or infinity in 'weight' at flat index 7; leave it out",
    )
    assert any("counts twice" in note for note in diagnose([near[0], dict(near[0])]).notes)


def test_a_barrier_is_measured_below_the_line() -> None:
    def score(state: dict[str, torch.Tensor]) -> float:
        at = float(state["w"][0])
        return 60 + 30 * at - 40 * (0.2 < at < 0.8)

    a, b = {"w": torch.tensor([0.0, 10.0])}, {"w": torch.tensor([1.0, 10.0])}
    found = barrier(a, b, score, points=5)
    assert found.fall == pytest.approx(40) and found.height == pytest.approx(75 - 27.5) and found.advantage == -40
    problem = diagnose([a, b], evaluate=score).problems[0]
    assert problem.startswith("a barrier of 40.0 points lies between model 0 and model 1: ")
    straight = barrier(a, b, lambda state: 60 + 30 * float(state["w"][0]), points=5)
    assert straight.fall == 0 and diagnose([a, b], evaluate=lambda s: 60 + 30 * float(s["w"][0])).ok


def test_advantages_of_pairs() -> None:
    base = {"w": torch.zeros(2)}
    ends = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([3.0, 3.0])}]
    found = advantages(ends, base, lambda state: -float(state["w"].square().sum()))
    assert [(a.first, a.second) for a in found] == [(0, 1), (0, 2), (1, 2)]
    assert [a.angle for a in found] == pytest.approx([90, 45, 45])
    assert [a.advantage for a in found] == pytest.approx([1.25, (1 + 18) / 2 - 6.25, (4 + 18) / 2 - 8.5])
