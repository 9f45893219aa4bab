# SPDX-License-Identifier: Apache-2.0
"""Claims of ZipIt! (Stoica et al. 2024) at a size where they run in seconds and can be stated exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zipfast import LogitEnsemble, find_spaces, match, match_permutation, merge, zoo

WIDTH, INPUTS, OUTPUTS = 16, 12, 4


def data(seed=9):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(400, INPUTS, generator=generator, dtype=torch.float64) for _ in range(2)]


def net(features, seed=0):
    """One hidden layer with the given weights [WIDTH, INPUTS], a random head and small random biases."""
    torch.manual_seed(seed)
    module = zoo.mlp(INPUTS, (WIDTH,), OUTPUTS).double()
    with torch.no_grad():
        module[1].weight.copy_(features)
        module[1].bias.zero_()
        module[3].weight.mul_(2)
    return module


def planted(shared, noise=0.0, seed=0):
    """Two models that share some features and have duplicates of their own in place of the rest, all in random order.

    Nothing is lost by merging the duplicates, which only a method that merges inside a model can do.
    """
    generator = torch.Generator().manual_seed(seed)

    def directions(count):
        return torch.randn(count, INPUTS, generator=generator, dtype=torch.float64)

    common, models = directions(shared), []
    for m in range(2):
        own = directions((WIDTH - shared) // 2)
        features = torch.cat([common, own, own])
        features = features + noise * torch.randn(features.shape, generator=generator, dtype=torch.float64)
        models.append(net(features[torch.randperm(WIDTH, generator=generator)], seed=seed + 10 * m))
    return models


def error(module, models, batches):
    """Mean squared distance from the ensemble's output, relative to its variance."""
    with torch.no_grad():
        x = torch.cat(batches)
        wanted = LogitEnsemble(models)(x)
        return float((module(x) - wanted).square().mean() / wanted.var())


def errors(models, methods=("zip", "permute", "average")):
    """On data that the merge has not seen."""
    return {m: error(merge(models, (data()[0],), data(), method=m).module, models, data(1)) for m in methods}


@pytest.mark.parametrize("shared", [8, 4, 0])
def test_merging_duplicates_is_exact(shared):
    """§4.1: with features to spare inside each model, zip equals the ensemble; a permutation cannot (§1)."""
    found = errors(planted(shared))
    assert found["zip"] < 1e-24
    assert found["permute"] > 1e-3
    assert found["average"] > 1e-3


def test_one_shared_and_one_duplicated_feature_per_group():
    models = planted(8)
    groups = merge(models, (data()[0],), data()).groups["1"]
    assert groups.count.tolist() == [2] * WIDTH
    assert groups.in_model_merges == [4, 4]
    assert groups.value.min() > 0.999


@pytest.mark.parametrize("noise", [0.03, 0.2])
def test_zip_beats_permute_beats_average(noise):
    """Figure 1 and Table 1: in error of the output against the ensemble, over several pairs of models."""
    total = {"zip": 0.0, "permute": 0.0, "average": 0.0}
    for seed in range(3):
        for method, value in errors(planted(8, noise, seed)).items():
            total[method] += value
    assert total["zip"] < total["permute"] < total["average"]


def test_error_grows_with_noise():
    found = [errors(planted(8, noise), methods=["zip"])["zip"] for noise in (0.0, 0.05, 0.2)]
    assert found[0] < found[1] < found[2]


def similarity(groups, sim):
    """Mean correlation over the pairs that share a group."""
    same = (groups.index[:, None] == groups.index[None, :]).triu(1)
    return float(sim[same].mean())


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_merged_features_are_more_alike(noise):
    """§4.1: zip pairs features of higher correlation than the best permutation, that one than feature k with k."""
    models = planted(8, noise)
    merged = {m: merge(models, (data()[0],), data(), method=m) for m in ("zip", "permute", "average")}
    sim = merged["zip"].similarities["1"]
    found = {m: similarity(result.groups["1"], sim) for m, result in merged.items()}
    assert found["zip"] > found["permute"] > found["average"]


def test_a_shuffled_copy_with_noise():
    """Where a permutation is the truth, zip finds it as well; the average is far off (Entezari et al. 2022)."""
    generator = torch.Generator().manual_seed(0)
    a = net(torch.randn(WIDTH, INPUTS, generator=generator, dtype=torch.float64))
    b, order = copy.deepcopy(a), torch.randperm(WIDTH, generator=generator)
    with torch.no_grad():
        noise = 0.02 * torch.randn(WIDTH, INPUTS, generator=generator, dtype=torch.float64)
        b[1].weight.copy_((a[1].weight + noise)[order])
        b[3].weight.copy_(a[3].weight[:, order])
    for method in ("zip", "permute"):
        assert merge([a, b], (data()[0],), data(), method=method).groups["1"].of_model(1).tolist() == order.tolist()
    found = errors([a, b])
    assert found["zip"] == found["permute"] < 1e-3 < found["average"]


@pytest.mark.parametrize("size", [1, 2, 7, 32, 65])
def test_beta_0_is_a_permutation(size):
    """§4.3: without merges inside a model, two models are matched one to one."""
    for seed in range(5):
        x = torch.randn(2 * size, 40, generator=torch.Generator().manual_seed(seed))
        sim = torch.corrcoef(x)
        groups = match(torch.triu(sim) + torch.triu(sim, 1).T, beta=0.0)
        assert groups.is_permutation and groups.lifted == 0
        assert torch.equal(groups.count, torch.full((size,), 2))
        across = groups.of_model(0).argsort()
        total = float(sim[:size, size:][across, groups.of_model(1).argsort()].sum())
        best = match_permutation(sim)
        optimum = float(sim[:size, size:][torch.arange(size), best.of_model(1).argsort()].sum())
        assert total <= optimum + 1e-5
        assert total > 0.7 * optimum or size < 7  # greedy is close to the assignment


def test_beta_interpolates():
    """§4.3: a larger budget allows more merges inside a model, and the planted duplicates need just half of it."""
    models = planted(8)
    inside = [max(merge(models, (data()[0],), data(), beta=b).groups["1"].in_model_merges) for b in (0, 0.25, 0.5, 1)]
    assert inside == [0, 2, 4, 4]


def test_alpha_limits_large_groups():
    """§4.3: a merged feature's similarities are scaled by alpha, so that groups stay small."""
    x = torch.randn(1, 400) + 0.3 * torch.randn(24, 400, generator=torch.Generator().manual_seed(0))
    sim = torch.corrcoef(x)
    sim = torch.triu(sim) + torch.triu(sim, 1).T
    assert match(sim, alpha=0.0).count.tolist() == [2] * 12
    assert int(match(sim, alpha=0.1).count.max()) == 2  # all features alike: 0.1 x 0.9 is below every unmerged pair


def test_three_models():
    """App. D: more than two models merge in one step; all but the shared features are duplicates three times over."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(7, INPUTS, generator=generator, dtype=torch.float64)
    models = []
    for m in range(3):
        own = torch.randn(3, INPUTS, generator=generator, dtype=torch.float64)
        features = torch.cat([common, own, own, own])
        models.append(net(features[torch.randperm(WIDTH, generator=generator)], seed=m))
    found = errors(models, ["zip", "permute"])
    assert found["zip"] < 1e-24 < found["permute"]


def test_equal_layers_are_enough():
    """§4.2: merging is exact through depth as well, each layer's U undoing the layer before."""
    torch.manual_seed(0)
    a = zoo.mlp(INPUTS, (10, 8, 6), OUTPUTS).double()
    plan = find_spaces(a, (data()[0],)).plan
    b = copy.deepcopy(a)
    with torch.no_grad():
        for layer in (m for m in a if isinstance(m, nn.Linear)):
            layer.bias.abs_()
        b.load_state_dict(a.state_dict())
        for k, space in zip((1, 3, 5), plan.mergeable):
            order = torch.randperm(space.size)
            b[k].weight.copy_(b[k].weight[order])
            b[k].bias.copy_(b[k].bias[order])
            b[k + 2].weight.copy_(b[k + 2].weight[:, order])
    assert errors([a, b], ["zip"])["zip"] < 1e-24
