# SPDX-License-Identifier: Apache-2.0
"""The monitor: what is scored and when, when to stop, going on after a restart, a score that rises with training."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import zipfast
from zipfast import LogMEMonitor, zoo

X = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] * X[:, 1] > 0).long()
PROBE = [(X[:70], Y[:70]), (X[70:], Y[70:])]


def net(seed: int = 0, width: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    return zoo.mlp(6, [width], 2)


class Scripted(LogMEMonitor):
    """A monitor that is told its scores."""

    def __init__(self, scores: list[float], **options: Any) -> None:
        super().__init__(PROBE, **options)
        self.given = list(scores)

    def score(self, model: nn.Module) -> float:
        return self.given.pop(0)


def run(scores: list[float], **options: Any) -> Scripted:
    monitor = Scripted(scores, **options)
    while monitor.given:
        monitor.step(net())
    return monitor


# ------------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_the_pre_logits() -> None:
    model, monitor = net(), LogMEMonitor(PROBE)
    with torch.no_grad():
        want = zipfast.logme(model[:-1](X), Y)
    assert monitor.step(model) == pytest.approx(want, rel=1e-12) == monitor.score(model)
    assert monitor.history == [(0, monitor.best_score)] and monitor.calls == 1  # score() counts nothing


def test_features_layers_and_modes() -> None:
    model = net()
    with torch.no_grad():
        hidden, out = model[:2](X), model(X)
    assert LogMEMonitor(PROBE, layers=["1"]).score(model) == pytest.approx(zipfast.logme(hidden, Y), rel=1e-12)
    own = LogMEMonitor(PROBE, features=lambda m, x: m(x), mode="corrected")
    assert own.score(model) == pytest.approx(zipfast.logme(out, Y, mode="corrected"), rel=1e-12)
    values = LogMEMonitor([(X, X[:, :2] ** 2)], task="regression")
    with torch.no_grad():
        want = zipfast.logme(model[:-1](X), X[:, :2] ** 2, task="regression")
    assert values.score(model) == pytest.approx(want, rel=1e-12)


def test_batches_that_are_mappings() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.inner(pixels)

    model = Named()
    named = LogMEMonitor([{"pixels": X, "labels": Y}])
    assert named.score(model) == LogMEMonitor([(X, Y)]).score(model.inner)


@pytest.mark.parametrize("features", [None, lambda model, x: model(x)])
def test_the_model_is_left_as_it_was(features: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    monitor = LogMEMonitor(PROBE, features=features)
    assert monitor.step(model) == monitor.step(model)  # no dropout, no new statistics
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = net().train()
    monitor = LogMEMonitor([(X, Y), (X[:, :3], Y)])
    with pytest.raises(RuntimeError):
        monitor.step(model)
    assert model.training and monitor.history == []


# ------------------------------------------------------------------------------------------------- when


def test_history_names_the_steps() -> None:
    monitor = Scripted([1.0, 2.0, 3.0], every=3)
    found = [monitor.step(net()) for _ in range(7)]
    assert found == [1.0, None, None, 2.0, None, None, 3.0]
    assert monitor.history == [(0, 1.0), (3, 2.0), (6, 3.0)] and monitor.calls == 7
    monitor = Scripted([1.0, 2.0], every=2)
    for step in (100, 200, 300):
        monitor.step(net(), step)
    assert monitor.history == [(100, 1.0), (300, 2.0)] and monitor.best_step == 300


def test_patience() -> None:
    monitor = Scripted([1.0, 2.0, 1.5, 1.9, 1.0], patience=3)
    stops = []
    for _ in range(5):
        monitor.step(net())
        stops.append(monitor.should_stop)
    assert stops == [False, False, False, False, True]
    assert (monitor.best_score, monitor.best_step) == (2.0, 1)
    assert not run([1.0, 0.5, 0.5, 2.0, 1.0, 1.0], patience=3).should_stop  # a better one starts the count again


def test_min_delta() -> None:
    slow = [1.0, 1.05, 1.1, 1.15]
    assert run(slow, min_delta=0.1, patience=3).best_step == 3  # against the best, not the last
    assert run(slow, min_delta=0.2, patience=3).should_stop
    assert run(slow, min_delta=0.0, patience=1).waited == 0
    assert run([1.0, 1.0], min_delta=0.0, patience=1).should_stop  # equal is no better


def test_a_score_that_is_no_number_is_no_better() -> None:
    monitor = run([math.nan, 1.0, math.nan], patience=2)
    assert monitor.best_score == 1.0 and monitor.waited == 1


# ------------------------------------------------------------------------------------------------- going on


def test_state_goes_through_json_and_goes_on() -> None:
    scores = [1.0, 2.0, 1.5, 1.9, 1.8, 1.7]
    whole = run(scores, every=2, patience=2)
    first = Scripted(scores[:2], every=2, patience=2)
    for _ in range(3):
        first.step(net())
    state = first.state_dict()
    saved = json.loads(json.dumps(state))
    second = Scripted(scores[2:], every=2, patience=2)
    second.load_state_dict(saved)
    while second.given:
        second.step(net())
    for name in ("history", "best_score", "best_step", "waited", "should_stop"):
        assert getattr(second, name) == getattr(whole, name), name
    assert second.should_stop and all(isinstance(item, tuple) for item in second.history)


def test_state_is_a_snapshot() -> None:
    monitor = LogMEMonitor(PROBE)
    monitor.step(net())
    state = monitor.state_dict()
    monitor.step(net(1))
    assert len(state["history"]) == 1 and len(monitor.history) == 2
    again = LogMEMonitor(PROBE)
    again.load_state_dict(state)
    again.step(net(1))
    assert again.history == monitor.history and len(state["history"]) == 1


# ------------------------------------------------------------------------------------------------- training


def test_the_score_rises_while_a_net_trains_on_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    monitor = LogMEMonitor([(images[1200:], labels[1200:])], patience=3)
    torch.manual_seed(0)
    model = zoo.mlp(64, [48, 32], 10).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    monitor.step(model)
    for _ in range(6):
        for x, y in zip(images[:1200].split(50), labels[:1200].split(50)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        monitor.step(model)
    scores = [score for _, score in monitor.history]
    assert len(scores) == 7 and min(scores[1:]) > scores[0] and scores[-1] > scores[1] + 0.05
    assert monitor.best_step >= 3 and not monitor.should_stop and model.training


# ------------------------------------------------------------------------------------------------- errors


def test_batches_must_be_readable_again() -> None:
    for once in (iter(PROBE), (batch for batch in PROBE)):
        with pytest.raises(TypeError, match="LogMEMonitor: 'batches' must be readable more than once, got an iterator"):
            LogMEMonitor(once)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"every": 0}, "'every' must be at least 1, got 0"),
        ({"patience": 0}, "'patience' must be at least 1, got 0"),
        ({"min_delta": -0.1}, "'min_delta' must be at least 0, got -0.1"),
        ({"min_delta": math.nan}, "'min_delta' must be at least 0, got nan"),
        ({"task": "ranking"}, "'task' must be one of classification, regression, multilabel, got 'ranking'"),
        ({"mode": "best"}, "'mode' must be one of reference, corrected, exact, got 'best'"),
    ],
)
def test_options_that_do_not_fit(options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"LogMEMonitor: {sentence}"):
        LogMEMonitor(PROBE, **options)


def test_probes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="LogMEMonitor: at least one sample is needed, got no samples"):
        LogMEMonitor([]).step(net())
    with pytest.raises(ValueError, match="'batches' must hold labels beside the inputs, got none"):
        LogMEMonitor([X]).step(net())
    with pytest.raises(ValueError, match="extract: 'layers' must be a list of submodules"):
        LogMEMonitor(PROBE, layers=["nine"]).step(net())
    with pytest.raises(ValueError, match="LogMEMonitor: 'features' must be finite"):
        LogMEMonitor(PROBE, features=lambda model, x: x * math.nan).step(net())
