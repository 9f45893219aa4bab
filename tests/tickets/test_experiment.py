# SPDX-License-Identifier: Apache-2.0
"""Experiments: every level replays its definition from the files, runs resume and grow, folders of others are refused."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zipfast import checkpoint
from zipfast.tickets import Batches, Lottery, Masks, Task, connectivity, lottery, train
from zipfast.tickets.task import seed_of

X = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(5, 3, generator=torch.Generator().manual_seed(1))).argmax(1)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))


def task_of(build=perceptron, iterations: int = 20, rate: float = 0.01, **options) -> Task:
    return Task(
        build, Batches(X[:50], Y[:50], 8), Batches(X[50:70], Y[50:70], 20), Batches(X[70:], Y[70:], 20), iterations,
        lambda p: torch.optim.Adam(p, rate), **options,
    )  # fmt: skip


ALL = ("reinit", "random", "oneshot")
SMALL = {"levels": 3, "rates": 0.3, "every": 5}


def files(folder: Path) -> dict[str, object]:
    """All that two runs must have in common; seconds are not, nor the order of a header's metadata."""
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content: object = path.read_bytes()
        if path.name == "result.json":
            content = {k: repr(v) for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        elif path.suffix == ".safetensors":
            tensors = {k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in checkpoint.load(path).items()}
            content = tensors, checkpoint.read_metadata(path)
        found[str(path.relative_to(folder))] = content
    return found


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Lottery:
    out = tmp_path_factory.mktemp("small") / "out"
    return lottery(task_of(), out=out, controls=ALL, seeds=(0, 4), **SMALL)


# ------------------------------------------------------------------------------------------------------------- definition


def test_every_kind_and_level_is_there(small: Lottery) -> None:
    assert {(t.kind, t.seed, t.level) for t in small.trainings} == {
        *(("ticket", seed, level) for seed in (0, 4) for level in range(4)),
        *((kind, seed, level) for kind in ALL for seed in (0, 4) for level in (1, 2, 3)),
    }
    assert not list(small.folder.rglob("*.partial*")) and not list(small.folder.rglob("*.tmp"))
    assert small.settings["rates"] == {
        "0.weight": 0.3,
        "2.weight": 0.3,
        "4.weight": 0.15,
    }  # the output at half the rate


def test_each_level_replays(small: Lottery) -> None:
    """Prune what the level before ended with, put the survivors back, train: the same weights, to the bit."""
    task, folder = task_of(), small.folder
    for seed in (0, 4):
        start = small.start(seed=seed)
        assert equal(start, dict(task.network(seed).state_dict()))
        masks = Masks.ones(task.network(seed))
        for level in range(4):
            if level:
                masks = masks.prune(small.state(level - 1, seed=seed), small.settings["rates"], scope="layer")
            assert small.masks(level, seed=seed) == masks
            model = task.network(seed)
            masks.rewind_(model, start)
            options = {"every": 5, "sparse_below": small.settings["sparse_below"]}
            done = train(task, model, masks, seed=seed, **options)
            assert equal(dict(model.state_dict()), small.state(level, seed=seed))
            result = json.loads((folder / f"seed-{seed}/ticket/level-{level:02d}/result.json").read_text())
            assert result["early"] == done.early.iteration and result["end_test"] == done.end.test
            assert result["density"] == masks.density and result["trainer"] == "mlp"
        for one, two in pairwise(small.masks(level, seed=seed) for level in range(4)):
            assert two.within(one)
    assert not equal(small.start(seed=0), small.start(seed=4))


def test_controls(small: Lottery) -> None:
    task = task_of()
    for level in (1, 2, 3):
        ticket = small.masks(level)
        assert small.masks(level, kind="reinit") == ticket
        for kind in ("random", "oneshot"):
            assert small.masks(level, kind=kind).alive == ticket.alive
        assert small.masks(level, kind="random") == ticket.shuffled(seed_of(0, "random", level)) != ticket
        dense = small.state(0)
        for name, alive in small.masks(level, kind="oneshot").dense().items():
            kept, dropped = dense[name][alive].abs(), dense[name][~alive].abs()
            assert kept.min() >= dropped.max()
    assert small.masks(1, kind="oneshot") == small.masks(1)
    fresh = task.network(seed_of(0, "reinit", 2) % (1 << 63))
    masks = small.masks(2)
    masks.apply_(fresh)
    train(task, fresh, masks, seed=0, every=5, sparse_below=small.settings["sparse_below"])
    assert equal(dict(fresh.state_dict()), small.state(2, kind="reinit"))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_rewinding_puts_everything_back(scope: str, tmp_path: Path) -> None:
    task = task_of(normed, schedule=lambda i: min(1.0, (i + 1) / 10))
    found = lottery(task, out=tmp_path / "out", rewind=7, scope=scope, controls=("random", "oneshot"), **SMALL)
    early = task.network(0)
    kept: dict[str, Tensor] = {}
    masks = Masks.ones(early)
    if scope == "global":  # the output layer is left alone, and does not count
        assert list(found.masks(0)) == ["0.weight"] and found.trainings[0].density == 1
        masks = found.masks(0)
    train(
        task, early, masks, seed=0, every=5, keep_at=7,
        keep=lambda i, m: kept.update({k: v.clone() for k, v in m.state_dict().items()}),
    )  # fmt: skip
    assert equal(found.start(), kept) and kept["1.num_batches_tracked"] == 7
    for kind in ("ticket", "random", "oneshot"):
        model, masks = task.network(0), found.masks(2, kind=kind)
        masks.rewind_(model, kept)
        done = train(task, model, masks, seed=0, start=7, every=5)
        assert equal(dict(model.state_dict()), found.state(2, kind=kind))
        assert (
            [p["iteration"] for p in found.curve(2, kind=kind)] == [p.iteration for p in done.curve] == [7, 10, 15, 20]
        )


def test_forward_mode_ends_masked(tmp_path: Path) -> None:
    found = lottery(task_of(normed), out=tmp_path / "out", mode="forward", **SMALL)
    for name, alive in found.masks(3).dense().items():
        assert not found.state(3)[name][~alive].any()
    assert all(t.trainer == "torch" for t in found.trainings)


def test_rates_by_name(tmp_path: Path) -> None:
    found = lottery(task_of(), out=tmp_path / "out", rates={"0.weight": 0.5, r"2\..*": 0.0}, levels=2, every=5)
    assert list(found.masks(2)) == ["0.weight"] and found.masks(2).density == 0.25


# ----------------------------------------------------------------------------------------------------------------- resume


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 3, 4, 6, 9, 13, 21, 27])
def test_a_killed_run_ends_as_one_that_was_not(after: int, small: Lottery, tmp_path: Path) -> None:
    calls = []

    def mortal(*what: object) -> None:
        calls.append(what)
        if len(calls) > after:
            raise Killed

    out = tmp_path / "out"
    options = {"controls": ALL, "seeds": (0, 4), "checkpoint_seconds": 0.0, **SMALL}
    shutil.copytree(small.folder, out)
    for place in (out / "seed-0", out / "seed-4"):
        shutil.rmtree(place)
    with pytest.raises(Killed):
        lottery(task_of(), out=out, progress=mortal, **options)
    lottery(task_of(), out=out, **options)
    assert files(out) == files(small.folder)


def test_the_same_command_twice_does_nothing(small: Lottery) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.folder.rglob("*") if path.name != "settings.json"}
    calls: list[object] = []
    lottery(task_of(), out=small.folder, controls=ALL, seeds=(0, 4), progress=lambda *a: calls.append(a), **SMALL)
    after = {path: path.stat().st_mtime_ns for path in small.folder.rglob("*") if path.name != "settings.json"}
    assert not calls and {p: t for p, t in before.items() if p.is_file()} == {
        p: t for p, t in after.items() if p.is_file()
    }


def test_experiments_grow(small: Lottery, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = lottery(task_of(), out=out, **{**SMALL, "levels": 1})
    assert len(first.trainings) == 2
    settings = json.loads((out / "settings.json").read_text())
    settings["sparse_below"] = small.settings["sparse_below"]  # measured again, and perhaps another
    (out / "settings.json").write_text(json.dumps(settings))
    shutil.rmtree(out / "seed-0")
    lottery(task_of(), out=out, **{**SMALL, "levels": 1})
    grown = lottery(task_of(), out=out, controls=ALL, seeds=(0, 4), **SMALL)
    assert len(grown.trainings) == len(small.trainings)
    wanted = files(small.folder)
    assert {k: v for k, v in files(out).items() if k != "settings.json"} == {
        k: v for k, v in wanted.items() if k != "settings.json"
    }


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out).mkdir()
    lottery(task_of(), out=out, **{**SMALL, "levels": 0})
    left = out / "seed-0" / "ticket" / ".level-01.abc.tmp"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    lottery(task_of(), out=out, **SMALL)
    assert not left.exists()


# -------------------------------------------------------------------------------------------------------------- bad input


def test_a_folder_of_another_configuration(small: Lottery) -> None:
    for task, options, message in (
        (task_of(iterations=30), SMALL, "iterations was 20, is 30"),
        (task_of(rate=0.02), SMALL, "optimizer was .*is "),
        (task_of(normed), SMALL, "network was "),
        (task_of(schedule=lambda i: 0.5), SMALL, "schedule was "),
        (task_of(), {**SMALL, "rates": 0.2}, "rates was .*0.3.*, is .*0.2"),
        (task_of(), {**SMALL, "rewind": 3, "mode": "post"}, 'rewind was 0, is 3; mode was "grad", is "post"'),
        (task_of(), {**SMALL, "scope": "global", "output": 1.0}, 'scope was "layer", is "global"'),
    ):
        with pytest.raises(ValueError, match=f"must be of these settings, got another experiment .*{message}"):
            lottery(task, out=small.folder, **options)


def test_what_differs_beyond_the_first_look(tmp_path: Path) -> None:
    """Loaders, losses, further groups of parameters and activations of the same shapes are told apart, too."""
    data = [TensorDataset(X[a:b], Y[a:b]) for a, b in ((0, 50), (50, 70), (70, 90))]

    def task(size: int = 10, lr: float = 0.1, smoothing: float = 0.0, act: type[nn.Module] = nn.Tanh) -> Task:
        def optimizer(parameters):  # type: ignore[no-untyped-def]
            first, *rest = parameters
            return torch.optim.SGD([{"params": [first]}, {"params": rest, "lr": torch.tensor(lr)}], 0.1)

        loaders = [DataLoader(data[0], size, shuffle=True), DataLoader(data[1], 20), DataLoader(data[2], 20)]
        loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
        return Task(lambda: nn.Sequential(nn.Linear(5, 8), act(), nn.Linear(8, 3)), *loaders, 20, optimizer, loss=loss)

    out = tmp_path / "out"
    lottery(task(), out=out, **{**SMALL, "levels": 0})
    for other, what in (
        (task(size=5), "train"),
        (task(lr=0.2), "optimizer"),
        (task(smoothing=0.1), "loss"),
        (task(act=nn.Sigmoid), "modules"),
    ):
        with pytest.raises(ValueError, match=rf"got another experiment \({what} was "):
            lottery(other, out=out, **SMALL)
    lottery(task(), out=out, **{**SMALL, "levels": 1})


def test_levels_of_other_experiments(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    lottery(task_of(), out=one, **SMALL)
    lottery(task_of(rate=0.02), out=two, **SMALL)
    level = one / "seed-0/ticket/level-02"
    shutil.rmtree(level)
    shutil.copytree(two / "seed-0/ticket/level-02", level)
    with pytest.raises(ValueError, match="level-02 is a level of another experiment, seed or kind; delete it and run"):
        lottery(task_of(), out=one, **SMALL)
    shutil.rmtree(level)
    (level).mkdir()
    with pytest.raises(ValueError, match=r"level-02 is damaged \(FileNotFoundError.*delete it and run again"):
        lottery(task_of(), out=one, **SMALL)
    level.rmdir()
    other = one / "seed-0/ticket/level-03"
    shutil.copy(two / "seed-0/ticket/level-01/masks.safetensors", other / "masks.safetensors")
    with pytest.raises(
        ValueError, match="level-03 must be within the level before, got other masks; delete it and run"
    ):
        lottery(task_of(), out=one, **SMALL)
    Masks.ones(nn.Linear(2, 2)).save(other / "masks.safetensors")
    with pytest.raises(
        ValueError, match=r"level-03/masks.safetensors cannot be used .*delete .*level-03 and run again"
    ):
        lottery(task_of(), out=one, **SMALL)
    shutil.rmtree(other)
    assert equal(
        lottery(task_of(), out=one, **SMALL).state(3), lottery(task_of(), out=tmp_path / "three", **SMALL).state(3)
    )


def test_the_output_layer_is_the_networks(tmp_path: Path) -> None:
    found = lottery(task_of(), out=tmp_path / "out", ignore="4", **SMALL)
    assert found.settings["rates"] == {"0.weight": 0.3, "2.weight": 0.3}


def test_networks_that_are_not_fresh(tmp_path: Path) -> None:
    def fixed() -> nn.Module:
        torch.manual_seed(0)
        return perceptron()

    def noise() -> nn.Module:
        net = perceptron()
        net[0].weight.data.mul_(random.random())
        return net

    once = perceptron()
    for build, options, message in (
        (lambda: once, {}, "'build' must make a new network at each call"),
        (noise, {}, "with the same weights for the same seed"),
        (fixed, {"seeds": (0, 1)}, "'build' must draw its weights under torch's seed, got the same for two seeds"),
        (fixed, {"controls": ["reinit"]}, "'build' must draw its weights under torch's seed"),
    ):
        with pytest.raises(ValueError, match=message):
            lottery(task_of(build), out=tmp_path / "out", **SMALL, **options)
        assert not (tmp_path / "out").exists()
    lottery(task_of(fixed), out=tmp_path / "out", **{**SMALL, "levels": 0})


def test_optimisers_that_want_a_closure(tmp_path: Path) -> None:
    task = Task(perceptron, [(X, Y)], [(X, Y)], [(X, Y)], 3, torch.optim.LBFGS)
    with pytest.raises(ValueError, match="'optimizer' must step without a closure, got LBFGS"):
        lottery(task, out=tmp_path / "out", **SMALL)


def test_a_smaller_run_takes_nothing_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    lottery(task_of(), out=out, controls=["random"], **SMALL)
    found = lottery(task_of(), out=out, seeds=(2,), **{**SMALL, "levels": 1})
    assert found.settings["levels"] == 3 and found.settings["seeds"] == [0, 2]
    assert found.settings["controls"] == ["random"] and found.settings["control_levels"] == [1, 2, 3]


def test_bad_arguments(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for options, message in (
        ({"controls": ["ticket"]}, "'controls' must be of reinit, random, oneshot, got 'ticket'"),
        ({"levels": -1}, "'levels' must be 0 or more"),
        ({"seeds": ()}, "there must be a seed"),
        ({"rewind": 20}, r"'rewind' must be in \[0, 20\), got 20"),
        ({"trainer": "jax"}, "'trainer' must be one of auto, torch, mlp, got 'jax'"),
        ({"levels": 2, "control_levels": [3]}, r"'control_levels' must be in \[1, 2\], got \[3\]"),
        ({"rates": 1.5}, r"a fraction must be in \[0, 1\], got 1.5"),
        ({"rates": 0.0}, "a rate must be above 0 for one layer at least"),
        ({"rates": 0.5, "output": 3.0}, r"'output' times the rate must be in \[0, 1\]"),
        ({"rates": {"conv": 0.2}}, "'rates' must match a weight each, got 'conv'.*0.weight"),
        ({"rates": {"0.weight": 0.2}, "output": 0.5}, "'output' must be None where 'rates' names layers"),
        ({"only": "conv"}, "'only' must match a layer .*got 'conv'"),
        ({"scope": "row"}, "'scope' must be layer or global, got 'row'"),
    ):
        with pytest.raises(ValueError, match=message):
            lottery(task_of(), out=out, **options)
        assert not out.exists(), "nothing is made before all is checked"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="out must be empty or an experiment's folder, got other files"):
        lottery(task_of(), out=out, **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="it is a file; give a folder"):
        lottery(task_of(), out=tmp_path / "file", **SMALL)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    lottery(task_of(), out=out, **{**SMALL, "levels": 1})
    model = out / "seed-0/ticket/level-01/model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"level-01/model.safetensors cannot be read as plain tensors"):
        lottery(task_of(), out=out, **SMALL)
    model.write_bytes(whole)
    (out / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json must be the settings of an experiment, got a damaged file"):
        lottery(task_of(), out=out, **SMALL)


def test_weights_that_became_nan_are_named(tmp_path: Path) -> None:
    task = task_of(rate=1e38)
    with pytest.raises(ValueError, match=r"scores must be numbers, got NaN in '\d.weight' at flat index \d+"):
        lottery(task, out=tmp_path / "out", trainer="torch", **SMALL)


# ----------------------------------------------------------------------------------------------------------- connectivity


def test_lines_between_copies(small: Lottery) -> None:
    task = task_of()
    line = connectivity(task, small, 2, points=5)
    again = connectivity(task, small, 2, points=5)
    assert line == again and line.density == small.masks(2).density and len(line.barrier.scores) == 5
    assert line.accuracies == (line.barrier.scores[0], line.barrier.scores[-1])
    assert connectivity(task, small, 2, kind="reinit", points=5) != line
    with pytest.raises(FileNotFoundError, match="no level 9 of ticket, seed 0"):
        connectivity(task, small, 9)


def test_copies_of_a_frozen_start_are_one(tmp_path: Path) -> None:
    """Without a step of learning both ends are the start, and the line is flat."""
    task = task_of(rate=0.0)
    found = lottery(task, out=tmp_path / "out", **{**SMALL, "levels": 1})
    line = connectivity(task, found, 1, points=3)
    assert line.barrier.height == 0 and line.stable and len(set(line.barrier.scores)) == 1


def test_identity_is_in_the_files(small: Lottery) -> None:
    one = checkpoint.read_metadata(small.place(1) / "model.safetensors")["identity"]
    assert one == checkpoint.read_metadata(small.place(3, seed=4, kind="random") / "model.safetensors")["identity"]
    facts = small.masks(2).facts
    assert facts["level"] == 2 and facts["parent"] == small.masks(1).hash()
