# SPDX-License-Identifier: Apache-2.0
"""Three and more models: the public rule's deadlock, merging again, shares, a sweep, accuracy by head."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import zipfast
from zipfast import zoo
from zipfast.evaluate import accuracy
from zipfast.merging import find_spaces, gather_moments, permute, random_permutations
from zipfast.merging.sweep import plot_sweep, sweep

DATA = [torch.randn(32, 1, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = zoo.resnet(1, width=0.5).train()
    with torch.no_grad():
        for x in DATA:
            net(x)
    return net.eval()


@pytest.fixture(scope="module")
def three() -> list[nn.Module]:
    return [resnet(seed) for seed in range(3)]


def copies(net: nn.Module, seeds) -> list[nn.Module]:
    plan = find_spaces(net, (DATA[0],)).plan
    found = []
    for seed in seeds:
        found.append(copy.deepcopy(net))
        found[-1].load_state_dict(permute(plan, random_permutations(plan, seed), net.state_dict()))
    return found


def test_where_the_public_rule_zeroes_features_the_default_goes_on(three):
    # Three ResNets at the public code's defaults: its budgets run out, after which it merges feature 0 with itself and
    # leaves groups without members.
    graph = find_spaces(three[0], (DATA[0],))
    stats = gather_moments(graph, [m.state_dict() for m in three], DATA)
    stuck = 0
    for name, similarity in stats.correlations().items():
        try:
            zipfast.compat.zipit.match_tensors_zipit({"cossim": similarity}, r=2 / 3)
        except ValueError as e:
            assert "the reference would merge feature 0 with itself and zero the rest" in str(e), name
            stuck += 1
    assert stuck >= 3
    with pytest.raises(ValueError, match="the reference would merge feature 0 with itself"):
        zipfast.merge(three, (DATA[0],), DATA, alpha=0.3, beta=0.125, compat=True)
    with pytest.warns(RuntimeWarning, match="the in-model budget had to be lifted") as seen:
        merged = zipfast.merge(three, (DATA[0],), DATA, alpha=0.3, beta=0.125)
    assert len([w for w in seen if w.category is RuntimeWarning]) == 1
    assert sum(g.lifted for g in merged.groups.values()) > 0
    for g in merged.groups.values():
        assert g.count.min() >= 1 and int(g.count.sum()) == 3 * g.size
    with torch.no_grad():
        assert torch.isfinite(merged.module(DATA[0])).all()


def test_four_permuted_copies_are_found_again(three):
    models = [three[0], *copies(three[0], (1, 2, 3))]
    for method in ("zip", "permute"):
        merged = zipfast.merge(models, (DATA[0],), DATA, beta=0.0, method=method, taps="all", reestimate=False)
        with torch.no_grad():
            torch.testing.assert_close(merged.module(DATA[1]), three[0](DATA[1]), atol=1e-5, rtol=1e-4)


def test_merging_a_merged_model_again(three):
    a, b, c = three[0], *copies(three[0], (1, 2))
    two = zipfast.merge([a, b], (DATA[0],), DATA, taps="all", reestimate=False).module
    again = zipfast.merge([two, c], (DATA[0],), DATA, taps="all", reestimate=False, weights=(2, 1)).module
    with torch.no_grad():
        torch.testing.assert_close(again(DATA[1]), a(DATA[1]), atol=1e-5, rtol=1e-4)


def test_shares_are_those_of_the_plain_mean(three):
    once = zipfast.merge(three, (DATA[0],), DATA, method="average", reestimate=False)
    two = zipfast.merge(three[:2], (DATA[0],), DATA, method="average", reestimate=False).module
    twice = zipfast.merge([two, three[2]], (DATA[0],), DATA, method="average", reestimate=False, weights=(2, 1))
    for key, value in once.state_dict.items():
        if value.is_floating_point():
            torch.testing.assert_close(twice.state_dict[key], value, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"merge: 'weights' must be one positive number for each of 3 models"):
        zipfast.merge(three, (DATA[0],), DATA, weights=(1, 0, 1))


def test_a_sweep_is_single_merges_on_statistics_gathered_once(three, tmp_path):
    models = three[:2]
    passes = []

    class Counting(list):
        def __iter__(self):
            passes.append(1)
            return list.__iter__(self)

    def score(module: nn.Module) -> float:
        with torch.no_grad():
            return float(module(DATA[0]).square().mean())

    points = sweep(models, (DATA[0],), Counting(DATA), score, alphas=(0.3, 1.0), betas=(0.0, 1.0))
    assert len(passes) == 1 + 4  # one for the moments, one each for batch norm
    for point in points:
        single = zipfast.merge(models, (DATA[0],), DATA, alpha=point.alpha, beta=point.beta)
        assert point.score == score(single.module)
    assert points[0].in_model == points[2].in_model == 0 < points[1].in_model
    plot_sweep(points, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="sweep: 'alphas' and 'betas' must not be empty"):
        sweep(models, (DATA[0],), DATA, score, alphas=())


class Fixed(nn.Module):
    """Answers with the same logits whatever comes in."""

    def __init__(self, *logits: list[float]) -> None:
        super().__init__()
        self.logits = [torch.tensor(row) for row in logits]

    def forward(self, x):
        found = [row.expand(len(x), -1) for row in self.logits]
        return found if len(found) > 1 else found[0]


def test_accuracy_by_hand():
    batches = [(torch.zeros(2, 1), torch.tensor([0, 1])), (torch.zeros(1, 1), torch.tensor([1]))]
    assert accuracy(Fixed([0.0, 1.0]), batches) == pytest.approx(200 / 3)
    heads = Fixed([3.0, 0.0], [0.0, 1.0])
    assert accuracy(heads, batches) == pytest.approx(100 / 3)  # the mean of the logits prefers class 0
    assert accuracy(heads, batches, head=1) == pytest.approx(200 / 3)
    uneven = Fixed([3.0, 0.0], [0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match=r"'head' must say which head the labels belong to, as they have 2, 3 classes"):
        accuracy(uneven, batches)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), the classes of head 0, got 0 to 2"):
        accuracy(uneven, [(torch.zeros(2, 1), torch.tensor([0, 2]))], head=0)
    with pytest.raises(ValueError, match="'batches' must hold labels beside the inputs"):
        accuracy(heads, [torch.zeros(2, 1)])
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy(heads, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accuracy(Fixed([0.0, 1.0]), batches, head=0) > 0
