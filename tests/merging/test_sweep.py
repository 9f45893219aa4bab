# SPDX-License-Identifier: Apache-2.0
"""The budget study: each point is the merge it stands for, on statistics that are gathered once."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from torch import nn

import zipfast
from zipfast.merging import find_spaces, gather_moments
from zipfast.merging.sweep import Point, plot_sweep, sweep

GENERATOR = torch.Generator().manual_seed(0)
DATA = [torch.randn(48, 8, generator=GENERATOR) for _ in range(3)]
X = DATA[0]


def net(seed: int, out: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, out)
    )


class Counting(list):
    """Data that knows how often it was read."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def keep(modules: list[nn.Module]):
    """A score that keeps what it is given: the modules, in order."""

    def score(module: nn.Module) -> float:
        modules.append(module)
        with torch.no_grad():
            output = module(X)
        return float((output if isinstance(output, torch.Tensor) else output[0]).square().mean())

    return score


def same(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stop": "4"},
        {"start": "2", "stop": "4"},
        {"weights": (3, 1), "skip": ["0"], "taps": "all"},
        {"compat": True, "max_batches": 2},
        {"reestimate": False},
        {"repair": True},
    ],
    ids=str,
)
def test_points_are_single_merges(options):
    models, modules = [net(0), net(1)], []
    points = sweep(models, (X,), DATA, keep(modules), alphas=(0.3, 1.0), betas=(0.5, 1.0), **options)
    assert [(p.alpha, p.beta) for p in points] == [(0.3, 0.5), (0.3, 1.0), (1.0, 0.5), (1.0, 1.0)]
    assert len({p.score for p in points}) > 1  # else the test is not one
    for point, module in zip(points, modules):
        want = zipfast.merge(models, (X,), DATA, alpha=point.alpha, beta=point.beta, **options)
        same(module, want.module)
        assert point.score == keep([])(want.module)
        merges = sum(g.models * g.size - g.keep for g in want.groups.values())
        assert point.in_model == sum(sum(g.in_model_merges) for g in want.groups.values()) / merges
        assert point.lifted == sum(g.lifted for g in want.groups.values())


def test_lifted_budgets_are_counted():
    models = [net(seed) for seed in range(3)]
    with pytest.warns(RuntimeWarning, match="budget had to be lifted") as seen:
        points = sweep(models, (X,), DATA, lambda module: 0.0, alphas=(1.0,), betas=(0.0, 1.0))
    assert points[0].lifted > 0 and points[1].lifted == 0
    assert len(seen) == 1 and f"lifted for {points[0].lifted} of" in str(seen[0].message)


def test_keyword_arguments_and_unknown_operators():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 3)
            self.other = nn.Linear(8, 5)

        def forward(self, pixels):
            return self.last(self.first(pixels).relu()) + self.other(pixels).sort(-1).values.sum(-1, keepdim=True)

    torch.manual_seed(0)
    models, data = [Named(), Named()], [{"pixels": x} for x in DATA]
    modules = []

    def score(module):
        modules.append(module)
        return 0.0

    with pytest.raises(ValueError, match="sort"):
        sweep(models, (), data, score, example_kwargs=data[0])
    sweep(models, (), data, score, example_kwargs=data[0], alphas=(1.0,), betas=(0.5,), unknown="freeze")
    want = zipfast.merge(models, (), data, example_kwargs=data[0], beta=0.5, unknown="freeze")
    same(modules[0], want.module)


def test_heads_of_their_own():
    modules = []
    points = sweep([net(0), net(1, 4)], (X,), DATA, keep(modules), alphas=(1.0,), betas=(0.0, 1.0))
    assert len(points) == 2
    for module in modules:
        assert [tuple(output.shape) for output in module(X)] == [(48, 3), (48, 4)]


def test_statistics_are_gathered_once():
    data, seen = Counting(DATA), []
    points = sweep(
        [net(0), net(1)],
        (X,),
        data,
        lambda m: 0.0,
        alphas=(0.5, 1.0),
        betas=(0.0, 1.0),
        progress=lambda *c: seen.append(c),
    )
    assert len(points) == 4
    assert data.passes == 1 + 4  # the statistics, and batch norm at each point
    assert seen == [*(("moments", i) for i in (1, 2, 3)), *(("sweep", i) for i in (1, 2, 3, 4))]
    data = Counting(DATA)
    sweep([net(0), net(1)], (X,), data, lambda m: 0.0, alphas=(1.0,), betas=(0.0, 1.0), reestimate=False)
    assert data.passes == 1


def test_statistics_that_are_there_already():
    models, modules, other = [net(0), net(1)], [], [3 * x.abs() for x in DATA]
    graph = find_spaces(models[0], (X,))
    stats = gather_moments(graph, [m.state_dict() for m in models], other)
    data = Counting(DATA)
    sweep(models, (X,), data, keep(modules), alphas=(1.0,), betas=(1.0,), statistics=stats, reestimate=False)
    assert data.passes == 0
    same(modules[0], zipfast.merge(models, (X,), other, reestimate=False).module)
    before = zipfast.merge(models, (X,), DATA, reestimate=False).state_dict
    assert any(not torch.equal(value, before[name]) for name, value in modules[0].state_dict().items())


def test_models_and_points_stay_as_they_are():
    models = [net(0).train(), net(1)]
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    points = sweep(models, (X,), DATA, lambda module: module.training, alphas=(1,), betas=(1,))
    assert points[0].score == 0.0 and isinstance(points[0].score, float)
    assert models[0].training
    assert all(torch.equal(v, m.state_dict()[k]) for m, s in zip(models, states) for k, v in s.items())
    with pytest.raises(dataclasses.FrozenInstanceError):
        points[0].score = 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alphas": ()}, r"sweep: 'alphas' and 'betas' must not be empty, got \[\] and \[0.0, 0.125, 0.5, 1.0\]"),
        ({"betas": []}, r"sweep: 'alphas' and 'betas' must not be empty, got \[0.0, 0.1, 0.3, 0.5, 1.0\] and \[\]"),
        ({"alphas": (0.5, 1.5)}, r"sweep: 'alphas' must be in \[0, 1\], got \[0.5, 1.5\]"),
        ({"betas": (float("nan"),)}, r"sweep: 'betas' must be in \[0, 1\], got \[nan\]"),
        ({"betas": (-0.1, 0.5)}, r"sweep: 'betas' must be in \[0, 1\], got \[-0.1, 0.5\]"),
        ({"stop": "9"}, "merge: 'stop' must be a module's path or a graph node, got '9'"),
        ({"skip": ["9"]}, "merge: 'skip' must name mergeable spaces, got '9'"),
        ({"max_batches": 0}, "sweep: 'max_batches' must be at least 1 or None, got 0"),
    ],
    ids=str,
)
def test_errors_come_before_the_data_are_read(options, message):
    data = Counting(DATA)
    with pytest.raises(ValueError, match=message):
        sweep([net(0), net(1)], (X,), data, lambda module: 0.0, **options)
    assert data.passes == 0


def test_data_that_can_be_read_once():
    with pytest.raises(
        TypeError, match="sweep: 'data' must be batches that can be read more than once, got an iterator"
    ):
        sweep([net(0), net(1)], (X,), iter(DATA), lambda module: 0.0)


def test_an_error_of_the_score_is_the_user_s():
    def fail(module):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        sweep([net(0), net(1)], (X,), DATA, fail)


# ------------------------------------------------------------------------------------------ the picture

POINTS = [Point(a, b, 100 * a * b, b, 0) for a in (0.1, 0.5, 1.0) for b in (0.0, 1.0)]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plot_sweep(POINTS, tmp_path / "sweep.png", "accuracy")
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "sweep.png") as opened:
        opened.load()  # all of it is there
        assert min(opened.size) > 100
    assert os.listdir(tmp_path) == ["sweep.png"]
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


def test_scores_are_where_they_belong(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn = []
    real = axes.Axes.imshow
    monkeypatch.setattr(axes.Axes, "imshow", lambda self, grid, **how: drawn.append(grid) or real(self, grid, **how))
    plot_sweep(POINTS[::-1], tmp_path / "sweep.png")
    assert drawn == [[[100.0, 0.0], [50.0, 0.0], [10.0, 0.0]]]  # a row per alpha, in the order of the points


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "sweep.png"
    path.write_text("old")

    def die(self, file, **how):
        file.write(b"\x89PNG half")
        raise OSError("disk full")

    monkeypatch.setattr(figure.Figure, "savefig", die)
    with pytest.raises(OSError, match="disk full"):
        plot_sweep(POINTS, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["sweep.png"]
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"cannot write .*; choose a folder that exists"):
        plot_sweep(POINTS, tmp_path / "no" / "sweep.png")


def test_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match="sweep: matplotlib must be installed for the picture; pip install"):
        plot_sweep(POINTS, tmp_path / "sweep.png")
    assert os.listdir(tmp_path) == []
