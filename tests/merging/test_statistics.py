# SPDX-License-Identifier: Apache-2.0
"""Statistics of a network: the laws they obey, what several places say together, and files that are never half."""

from __future__ import annotations

import os

import pytest
import torch
from hf_nets import case, others
from nets import build
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from zipfast import SpaceMoments, checkpoint
from zipfast.merging import Plan, Tapped, features, find_spaces, gather_moments, part_of
from zipfast.merging.plan import Space, Tap

LAW = 1e-12  # relative to the largest sum; double precision


def setting(name="vgg_bn_flatten", models=2, batches=4):
    nets = [build(name, seed)[0] for seed in range(models)]
    x = build(name)[1]
    generator = torch.Generator().manual_seed(7)
    data = [torch.randn(8 + i, *x.shape[1:], generator=generator, dtype=torch.float64) + i for i in range(batches)]
    return find_spaces(nets[0], (x,)), [net.state_dict() for net in nets], data


def agree(a, b, exact=False):
    assert list(a) == list(b) and (a.batches, a.models, a.taps) == (b.batches, b.models, b.taps)
    for x, y in zip(a.flat(), b.flat()):
        assert x.count == y.count
        if exact:
            assert all(torch.equal(s, t) for s, t in zip((x.shift, *x.sums()), (y.shift, *y.sums())))
        else:
            assert_close(x.mean(), y.mean(), rtol=LAW, atol=LAW * float(y.mean().abs().max()))
            assert_close(x.covariance(), y.covariance(), rtol=LAW, atol=LAW * float(y.covariance().abs().max()))


# ------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("taps", ["last", "all"])
def test_workers_and_batches_commute(taps):
    graph, states, data = setting()
    whole = gather_moments(graph, states, data, taps=taps)
    first = gather_moments(graph, states, data[:1], taps=taps)
    parts = [gather_moments(graph, states, [batch], taps=taps, resume=first.like()) for batch in data]
    (a, b, c, d) = parts
    for total in (a.merge(b).merge(c).merge(d), a.merge(b.merge(c.merge(d))), d.merge(b).merge(a).merge(c)):
        agree(total, whole)
    assert [part.batches for part in parts] == [1, 1, 1, 1] and whole.batches == 4
    for name in whole:
        assert_close(a.merge(b).merge(c).merge(d).correlation(name), whole.correlation(name), atol=1e-6, rtol=0)


def test_shifts_of_their_own_agree_too():
    graph, states, data = setting()
    whole = gather_moments(graph, states, data)
    parts = [gather_moments(graph, states, [batch]) for batch in data]
    total = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    for x, y in zip(total.flat(), whole.flat()):
        assert_close(x.covariance(), y.covariance(), rtol=1e-9, atol=1e-9 * float(y.covariance().abs().max()))


def test_like_is_empty_and_neutral():
    graph, states, data = setting()
    stats = gather_moments(graph, states, data, origin={"note": 1})
    empty = stats.like()
    assert empty.batches == 0 and empty.origin == {"note": 1} and list(empty) == list(stats)
    assert all(m.count == 0 and torch.equal(m.shift, o.shift) for m, o in zip(empty.flat(), stats.flat()))
    agree(stats.merge(empty), stats, exact=True)
    agree(empty.merge(stats), stats, exact=True)
    fresh = SpaceMoments(graph.plan, 2)  # without a shift
    agree(stats.merge(fresh), stats, exact=True)
    agree(fresh.merge(stats), stats, exact=True)


def test_merge_leaves_its_operands():
    graph, states, data = setting()
    a, b = (gather_moments(graph, states, part) for part in (data[:2], data[2:]))
    before = [s.clone() for m in (*a.flat(), *b.flat()) for s in m.sums()]
    a.merge(b)
    assert all(torch.equal(s, t) for s, t in zip((s for m in (*a.flat(), *b.flat()) for s in m.sums()), before))
    assert (a.batches, b.batches) == (2, 2)


@pytest.mark.parametrize(
    "other",
    [
        lambda graph, states, data: gather_moments(graph, states, data, taps="all"),
        lambda graph, states, data: gather_moments(graph, states * 2, data),
        lambda graph, states, data: gather_moments(graph, states, data, skip=["features.0"]),
    ],
)
def test_statistics_of_something_else_are_refused(other):
    graph, states, data = setting()
    stats, other = gather_moments(graph, states, data), other(graph, states, data)
    with pytest.raises(
        ValueError, match=r"SpaceMoments\.merge: 'other' must have the same spaces, taps and models, got"
    ):
        stats.merge(other)
    with pytest.raises(
        ValueError, match=r"gather_moments: 'resume' must hold statistics of the same spaces, taps and mod"
    ):
        gather_moments(graph, states, data, resume=other)


# ------------------------------------------------------------------------------------------ several places


def joined(graph, states, data, space):
    """Float64: the samples of each place, standardised, all of a place weighing as much as those of another."""
    program, rows = Tapped(graph, extra=True), []
    values = [[program.run(state, *batch[0], **batch[1])[1] for batch in data] for state in states]
    for tap in (*space.taps, *space.extra):
        stacked = []
        for of_model in values:
            read = [features(value[tap.node], tap) for value in of_model]
            stacked.append(torch.cat([t.movedim(axis, -1).reshape(-1, space.total) for t, axis in read]).double())
        place = torch.cat(stacked, 1)
        place = place - place.mean(0)
        length = place.norm(dim=0)
        rows.append(torch.where(length > 1e-9, place / length.clamp(min=1e-300), 0.0))
    rows = torch.cat(rows)
    rows = rows / rows.norm(dim=0).clamp(min=1e-300)
    return rows.T @ rows


@pytest.mark.parametrize("name", ["vgg_bn_flatten", "unet", "sequence_1d", "resnet_basic", "vit", "bert"])
@pytest.mark.parametrize("models", [2, 3])
def test_all_places_together(name, models):
    if models == 3 and name not in ("vgg_bn_flatten", "vit"):
        models = 1
    nets = [case(name, seed)[0] for seed in range(models)]
    _, args, kwargs = case(name)
    graph, states = find_spaces(nets[0], args, kwargs), [net.state_dict() for net in nets]
    data = [others(args, kwargs, 16, seed) for seed in range(2)]
    stats = gather_moments(graph, states, [a[0] if a else k for a, k in data], taps="all")
    several = 0
    for space in stats.spaces:
        assert len(stats[space.name]) == len(space.taps) + len(space.extra)
        several += len(stats[space.name]) > 1
        wanted = joined(graph, states, data, space)
        assert_close(stats.correlation(space.name).double(), wanted, atol=2e-6, rtol=0)
    assert several >= len(stats) / 2


class TwoPlaces(nn.Module):
    """Feature 0 is dead behind the ReLU, feature 1 is constant before it too, feature 2 is only alive behind it."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()
        with torch.no_grad():
            self.a.bias[0] = -100
            self.a.weight[1], self.a.bias[1] = 0, -1

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


def test_dead_here_alive_there_and_dead_everywhere():
    models = [TwoPlaces(0), TwoPlaces(1)]
    x = torch.randn(50, 4, dtype=torch.float64)
    graph, states = find_spaces(models[0], (x,)), [m.state_dict() for m in models]
    last, every = (gather_moments(graph, states, [x], taps=taps) for taps in ("last", "all"))
    with torch.no_grad():
        before = torch.cat([m.a(x) for m in models], 1)
    one, all_ = last.correlation("a"), every.correlation("a")
    for dead in (0, 1, 6, 7):
        assert (one[dead] == 0).all() and (one[:, dead] == 0).all()
    # Alive at one place of two: with a feature that is alive at both, 1 / sqrt(2) of the correlation there.
    wanted = torch.corrcoef(before[:, [0, 6]].T)[0, 1]
    assert_close(all_[0, 6].double(), wanted, atol=1e-6, rtol=0)
    assert_close(all_[0, 2].double(), torch.corrcoef(before[:, [0, 2]].T)[0, 1] / 2**0.5, atol=1e-6, rtol=0)
    assert all_[0, 0] == all_[2, 2] == 1
    assert (all_[1] == 0).all() and (all_[7] == 0).all()
    paired = every.correlation("a", pair_dead=True)
    assert paired[1, 7] == paired[7, 1] == 1 and paired[1, 1] == 0
    keep = [i for i in range(12) if i not in (1, 7)]
    assert torch.equal(paired[keep][:, keep], all_[keep][:, keep])
    paired = last.correlation("a", pair_dead=True)
    assert all(paired[i, j] == (i != j) for i in (0, 1, 6, 7) for j in (0, 1, 6, 7))


def test_every_place_dead_says_so():
    models = [TwoPlaces(0), TwoPlaces(1)]
    for m in models:
        with torch.no_grad():
            m.a.weight.zero_()
    x = torch.randn(50, 4, dtype=torch.float64)
    graph, states = find_spaces(models[0], (x,)), [m.state_dict() for m in models]
    for taps in ("last", "all"):
        stats = gather_moments(graph, states, [x], taps=taps)
        with pytest.raises(ValueError, match="at least one feature of space 'a' must vary, got 12 dead"):
            stats.correlation("a")


# ------------------------------------------------------------------------------------------ what is read


def test_nothing_behind_the_last_tap_is_run():
    ran = []

    class Explosive(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.c(F.relu(self.b(torch.ops.zipfast_test_statistics.explode(x))))

    def explode(x):
        ran.append(1)
        raise AssertionError("behind the cut")

    with torch.library._scoped_library("zipfast_test_statistics", "FRAGMENT") as library:
        library.define("explode(Tensor x) -> Tensor")
        library.impl("explode", explode, "CompositeExplicitAutograd")
        library.impl("explode", torch.empty_like, "Meta")
        torch.manual_seed(0)
        models, x = [Explosive(), Explosive()], torch.randn(20, 4)
        graph, states = find_spaces(models[0], (x,), unknown="freeze"), [m.state_dict() for m in models]
        assert [space.name for space in graph.plan.mergeable] == ["b"]  # what reaches the op is frozen
        with pytest.raises(AssertionError, match="behind the cut"):
            gather_moments(graph, states, [x])
        part = part_of(graph, stop="relu")
        for taps in ("last", "all"):
            stats = gather_moments(part, states, [x], taps=taps)
            assert list(stats) == ["a"]
    assert ran == [1]


def test_blocks_are_read_by_what_lies_inside_them():
    net, args, kwargs = case("bert")
    graph = find_spaces(net, args, kwargs)
    stats = SpaceMoments(graph.plan, 2)
    outer = {space.name for space in graph.plan.mergeable if graph.plan.children(space.name)}
    assert outer and not outer & set(stats)
    assert {space.name for space in graph.plan.mergeable} == outer | set(stats)


def test_skip_max_batches_and_progress():
    graph, states, data = setting()
    seen = []
    stats = gather_moments(
        graph, states, data, skip=["features.0"], max_batches=2, progress=lambda *call: seen.append(call)
    )
    assert "features.0" not in stats and len(stats) == 3 and stats.batches == 2
    assert seen == [("moments", 1), ("moments", 2)]
    agree(stats, gather_moments(graph, states, data[:2], skip=["features.0"]), exact=True)
    assert gather_moments(graph, states, data, max_batches=99).batches == 4


def test_empty_data():
    graph, states, _ = setting()
    for data in ([], iter([])):
        with pytest.raises(ValueError, match="merge: 'data' must hold at least one batch, got none"):
            gather_moments(graph, states, data)


def test_too_few_samples():
    graph, states, data = setting("mlp")
    stats = gather_moments(graph, states, [data[0][:1]])
    with pytest.raises(ValueError, match=r"space '1' must have seen at least 2 samples, got 1"):
        stats.correlations()
    with pytest.raises(ValueError, match=r"space '1' must have seen at least 2 samples, got 0"):
        SpaceMoments(graph.plan, 2).correlations()


def test_states_and_data_are_not_written():
    graph, states, data = setting("unet")  # works in place
    before = [{k: v.clone() for k, v in state.items()} for state in states], [batch.clone() for batch in data]
    gather_moments(graph, states, data, taps="all")
    assert all(torch.equal(v, b[k]) for state, b in zip(states, before[0]) for k, v in state.items())
    assert all(torch.equal(x, b) for x, b in zip(data, before[1]))


def test_two_runs_are_equal_to_the_bit():
    graph, states, data = setting("resnet_basic")
    agree(*(gather_moments(graph, states, data, taps="all") for _ in range(2)), exact=True)


def test_a_batch_more_or_larger_needs_no_more_memory(tmp_path):
    graph, states, data = setting("resnet_basic")
    for i, batches in enumerate((data[:1], data * 5, [torch.cat(data * 3)])):
        gather_moments(graph, states, batches).save(tmp_path / f"{i}.safetensors")
    small, *large = ((tmp_path / f"{i}.safetensors").stat().st_size for i in range(3))
    assert all(abs(size - small) < 500 for size in large)  # the counts have more digits


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("taps", ["last", "all"])
@pytest.mark.parametrize("name", ["vgg_bn_flatten", "vit"])
def test_round_trip(taps, name, tmp_path):
    nets = [case(name, seed)[0] for seed in range(2)]
    _, args, kwargs = case(name)
    graph, states = find_spaces(nets[0], args, kwargs), [net.state_dict() for net in nets]
    data = [others(args, kwargs, 8, seed)[0][0] for seed in range(2)]
    skip = [graph.plan.mergeable[-1].name]
    stats = gather_moments(graph, states, data, taps=taps, skip=skip, origin={"inputs": ["a", "b"]})
    stats.save(tmp_path / "s.safetensors")
    again = SpaceMoments.load(tmp_path / "s.safetensors")
    agree(again, stats, exact=True)
    assert again.plan == stats.plan and again.origin == stats.origin and again.spaces == stats.spaces
    for space, correlation in stats.correlations(pair_dead=True).items():
        assert torch.equal(again.correlation(space, pair_dead=True), correlation)
    agree(again.merge(stats), stats.merge(stats), exact=True)


def test_statistics_without_a_sample_round_trip(tmp_path):
    graph, states, data = setting()
    SpaceMoments(graph.plan, 2).save(tmp_path / "s.safetensors")
    again = SpaceMoments.load(tmp_path / "s.safetensors")
    assert again.batches == 0 and all(m.count == 0 and m.shift is None for m in again.flat())
    agree(gather_moments(graph, states, data, resume=again), gather_moments(graph, states, data), exact=True)


@pytest.mark.parametrize("done", [1, 3, 4])
@pytest.mark.parametrize("taps", ["last", "all"])
def test_resumed_is_one_run_to_the_bit(done, taps, tmp_path):
    graph, states, data = setting("resnet_basic")
    path = tmp_path / "s.safetensors"
    gather_moments(graph, states, data, taps=taps, max_batches=done, checkpoint_to=path)
    resumed = gather_moments(graph, states, data, taps=taps, resume=SpaceMoments.load(path), checkpoint_to=path)
    whole = gather_moments(graph, states, data, taps=taps)
    agree(resumed, whole, exact=True)
    agree(SpaceMoments.load(path), whole, exact=True)


def test_checkpoints_are_written_as_it_goes_and_at_the_end(tmp_path):
    graph, states, data = setting(batches=5)
    path, seen = tmp_path / "s.safetensors", []

    def progress(stage, done):  # called before the checkpoint of its batch is written
        seen.append(SpaceMoments.load(path).batches if path.exists() else 0)

    gather_moments(graph, states, data, checkpoint_to=path, checkpoint_every=2, progress=progress)
    assert seen == [0, 0, 2, 2, 4] and SpaceMoments.load(path).batches == 5
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_a_pass_that_fails_leaves_the_last_checkpoint(tmp_path):
    graph, states, data = setting()
    path = tmp_path / "s.safetensors"
    broken = [*data[:3], data[3] * torch.nan]
    with pytest.raises(ValueError, match=r"features of space '.*' must be finite, got NaN or infinity in model 0"):
        gather_moments(graph, states, broken, checkpoint_to=path, checkpoint_every=1)
    saved = SpaceMoments.load(path)
    assert saved.batches == 3
    agree(gather_moments(graph, states, data, resume=saved), gather_moments(graph, states, data), exact=True)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_killed_save_leaves_the_old_file(step, tmp_path, monkeypatch):
    graph, states, data = setting()
    path = tmp_path / "s.safetensors"
    gather_moments(graph, states, data[:1], checkpoint_to=path)
    before = path.read_bytes()

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, step, kill)
    with pytest.raises(KeyboardInterrupt):
        gather_moments(graph, states, data, checkpoint_to=path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["s.safetensors"]


def test_damaged_files_are_refused(tmp_path):
    graph, states, data = setting()
    path = tmp_path / "s.safetensors"
    gather_moments(graph, states, data, checkpoint_to=path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"s\.safetensors cannot be read"):
        SpaceMoments.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"s\.safetensors cannot be read"):
        SpaceMoments.load(path)


def test_other_choices_are_refused():
    plan = Plan((Space("a", 2, taps=(Tap("x", 1, 0, -1, ((-1,), (2,)), (1,)),)),), {})
    with pytest.raises(ValueError, match=r"SpaceMoments: 'taps' must be 'last' or 'all', got 'first'"):
        SpaceMoments(plan, 2, taps="first")
    assert SpaceMoments(plan, 2).taps_of(plan["a"]) == plan["a"].taps


def test_one_model_alone():
    graph, states, data = setting("mlp", models=1)
    stats = gather_moments(graph, states, data)
    assert [stats.correlation(name).shape[0] for name in stats] == [9, 7]
