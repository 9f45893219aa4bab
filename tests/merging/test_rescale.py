# SPDX-License-Identifier: Apache-2.0
"""REPAIR of layers without batch norm: merged features get the mean and spread of their parents, and nothing else changes.

The reference is `apply_groups` itself: put the parents' feature means (or standard deviations) in the place of a layer's
bias, and the merged bias is what the merged features should have.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hf_nets import case, others
from nets import permute_state, random_permutations
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from zipfast import distributed, find_spaces, merge, reestimate_batchnorm, zoo
from zipfast.merging import MultiHead, Tapped, apply_groups
from zipfast.merging.common import common_graph
from zipfast.merging.rescale import rescale

# net -> layers rescaled: those with a bias, no batch norm behind them, and outputs that are merged
LAYERS = {
    "mlp": 2,
    "vgg": 4,
    "vgg_bn_flatten": 1,
    "resnet_basic": 0,
    "unet": 1,  # a transposed convolution
    "separable": 2,  # one of them depthwise
    "sequence_1d": 3,
    "volume": 3,  # one of them grouped
    "encoder_layer": 2,  # query, key and value in one
    "vit": 13,
    "gpt2": 8,  # addmm, weights [in, out]
    "bert": 13,
}


class Case:
    """Two nets, data, their merge without repair, and what `rescale` needs."""

    def __init__(self, models, args, data, kwargs=None, **options):
        self.models, self.data = models, data
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # lifted budgets
            merged = merge(models, args, data, example_kwargs=kwargs, reestimate=False, **options)
        self.module, self.groups = merged.module, merged.groups
        cut = {key: options.get(key) for key in ("start", "stop")}
        self.common = common_graph(models, args, kwargs, **cut)
        self.graph = self.common.graph
        self.states = [dict(model.state_dict()) for model in models]
        self.weights = options.get("weights")
        self.before = copy.deepcopy(self.module.state_dict())

    def rescale(self, data=None, **options):
        data = self.data if data is None else data
        return rescale(self.module, self.common, self.groups, self.states, data, self.weights, **options)

    def changed(self):
        return [key for key, value in self.module.state_dict().items() if not torch.equal(value, self.before[key])]

    def statistics(self, state, biases):
        """By bias name, mean and standard deviation of the layer's outputs over all data, in a model of one state."""
        nodes, program = {}, self.graph.program
        placeholders = [node for node in self.graph.exported.nodes if node.op == "placeholder"]
        for node, spec in zip(placeholders, program.graph_signature.input_specs):
            if spec.target in biases:
                (nodes[spec.target],) = node.users
        tapped, kept = Tapped(self.graph, also=[node.name for node in nodes.values()]), []
        for batch in self.data:
            inputs = ((), batch) if isinstance(batch, dict) else ((batch,), {})
            kept.append(tapped.values(state, *inputs[0], **inputs[1]))
        found = {}
        for name, node in nodes.items():
            axis = 1 - state[name.removesuffix("bias") + "weight"].dim() if name.endswith(".bias") else -1
            values = torch.cat([each[node.name].double().movedim(axis, -1).flatten(0, -2) for each in kept])
            found[name] = values.mean(0), values.std(0, correction=0)
        return found

    def targets(self, biases):
        """By bias name, the mean and standard deviation that the parents say."""
        own = [self.statistics(state, biases) for state in self.states]
        wanted = [
            apply_groups(
                self.graph.plan,
                self.groups,
                [
                    {key: s[key][i] if key in biases else state[key] for key in self.graph.plan.shapes}
                    for state, s in zip(self.states, own)
                ],
                weights=self.weights,
            )
            for i in (0, 1)
        ]
        return {name: tuple(state[name] for state in wanted) for name in biases}

    def errors(self):
        """Worst error of a mean, in units of its target spread, and of a spread, as a part of it; features that vary."""
        biases = [key for key in self.changed() if key.endswith("bias")]
        got, want = self.statistics(self.module.state_dict(), biases), self.targets(biases)
        means, stds = [], []
        for name in biases:
            (mean, std), (mean_, std_) = got[name], want[name]
            alive = std > 1e-9
            assert alive.double().mean() > 0.5
            means.append((mean - mean_)[alive].abs() / std_[alive])
            stds.append(std[alive] / std_[alive] - 1)
        return float(torch.cat(means).max()), float(torch.cat(stds).abs().max())


def images(count, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 1, 8, 8, generator=generator, dtype=dtype) for _ in range(count)]


def two(name, batches=4, size=32, **options):
    """Two nets with other seeds and their merge."""
    a, args, kwargs = case(name, 0)
    b = case(name, 1)[0]
    data = [others(args, kwargs, size, seed) for seed in range(batches)]
    return Case([a, b], args, [k or x[0] for x, k in data], kwargs, **options)


def mlps(hidden=(9, 7), count=2, **options):
    """Small nets and their merge; made once, everything that a test may change is its own."""
    net = copy.copy(_mlps(hidden, count, **options))
    net.module, net.states = copy.deepcopy((net.module, net.states))
    return net


@functools.cache
def _mlps(hidden, count, **options):
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(zoo.mlp(64, hidden, 5).double().eval())
    data = images(3, 40)
    return Case(models, (data[0],), data, **options)


# ------------------------------------------------------------------------------------------ the statistics


@pytest.mark.parametrize("method", ["average", "permute", "zip"])
def test_one_hidden_layer_is_exact_over_all_batches(method):
    net = mlps((9,), method=method)
    assert net.rescale() == 1
    assert sorted(net.changed()) == ["1.bias", "1.weight"]
    assert max(net.errors()) < 1e-12


@pytest.mark.parametrize("name", LAYERS)
def test_all_layers_are_exact_on_one_batch(name):
    net = two(name, batches=1)
    assert net.rescale() == LAYERS[name]
    assert len([key for key in net.changed() if key.endswith("bias")]) == LAYERS[name]
    reestimate_batchnorm(net.module, net.data)
    if LAYERS[name]:
        # Where norms are re-estimated, features are not quite those of eval mode: variances of n samples and of n - 1.
        norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.module.modules())
        assert max(net.errors()) < (5e-3 if norms else 1e-11)  # 2.7e-3: vgg_bn_flatten; 5e-14: volume


@pytest.mark.parametrize(
    ("name", "size", "method"),
    [
        ("mlp", 64, "average"),
        ("mlp", 1, "average"),
        ("mlp", 1, "zip"),
        ("vgg", 64, "average"),
        ("vgg", 4, "zip"),
        ("vit", 16, "zip"),
        ("gpt2", 16, "average"),
    ],
)
def test_deep_nets_come_close_over_many_batches(name, size, method):
    net = two(name, batches=max(4, 200 // size), size=size, method=method)
    shrunk = copy.deepcopy(net.before)
    assert net.rescale() == LAYERS[name]
    mean, std = net.errors()
    assert mean < 0.25 and std < 0.1  # 0.19 and 0.058: gpt2
    net.before = copy.deepcopy(net.module.state_dict())
    net.module.load_state_dict(shrunk)
    assert net.errors()[1] > 0.5  # without repair, of the same layers


def test_weights_are_shares():
    net = mlps((9,), method="zip", weights=(2, 1))
    net.rescale()
    assert max(net.errors()) < 1e-12
    net.weights = None
    assert max(net.errors()) > 0.01
    with pytest.raises(ValueError, match="rescale: 'weights' must be one positive number for each of 2 models, got"):
        rescale(net.module, net.common, net.groups, net.states, net.data, (1,))


def test_three_models():
    net = mlps((9,), count=3)
    assert net.rescale() == 1 and max(net.errors()) < 1e-12


def test_spread_is_restored_between_trained_nets():
    """Digits 0-4 and 5-9: averaging nets of different seeds shrinks the spread layer by layer; repair brings it back."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net, own = zoo.VGG(((8,), (16, 16)), hidden=16, batch_norm=False), y // 5 == seed
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(60):
            pick = torch.randint(int(own.sum()), (64,))
            optimizer.zero_grad()
            F.cross_entropy(net(x[own][pick]), y[own][pick]).backward()
            optimizer.step()
        models.append(net.eval())
    data = list(x.split(100))
    for method in ("average", "permute"):
        net = Case(models, (data[0],), data, method=method)
        biases = [key for key in net.before if key.endswith("bias")][:-1]
        want = net.targets(biases)

        def ratios(net=net, biases=biases, want=want):
            got = net.statistics(net.module.state_dict(), biases)
            return torch.stack([got[name][1].mean() / want[name][1].mean() for name in biases])

        shrunk = ratios()
        assert net.rescale() == 4
        restored = ratios()
        assert (shrunk < 0.95).all() and shrunk[-1] < 0.75
        assert ((restored - 1).abs() < 0.02).all()


# ------------------------------------------------------------------------------------------ what must not change


@pytest.mark.parametrize("name", ["mlp", "vgg"])
def test_a_model_merged_with_itself_stays_the_same(name):
    a, args, kwargs = case(name, 0)
    data = [k or x[0] for x, k in (others(args, kwargs, 8, seed) for seed in range(4))]
    net = Case([a, copy.deepcopy(a)], args, data, kwargs, method="average")
    assert net.rescale() == LAYERS[name]
    for key, value in net.module.state_dict().items():
        assert_close(value, net.before[key], atol=1e-6, rtol=1e-6)
        assert_close(value, a.state_dict()[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "vgg"])
def test_a_model_merged_with_its_permuted_self_stays_the_same(name):
    a, args, _ = case(name, 0)
    with torch.no_grad():
        for key, value in a.named_parameters():
            value.abs_() if key.endswith("bias") else None  # no dead units, which cannot be told apart
    plan = find_spaces(a, args).plan
    b = copy.deepcopy(a)
    b.load_state_dict(permute_state(a.state_dict(), plan, random_permutations(plan)))
    net = Case([a, b], args, images(3, 64), method="zip")
    assert net.rescale() == LAYERS[name]
    with torch.no_grad():
        for x in net.data:
            assert_close(net.module(x), a(x), atol=1e-6, rtol=1e-6)


def test_norms_that_stay_as_they_are_leave_a_model_the_same():
    a, args, _ = case("vgg_bn_flatten", 0)
    net = Case([a, copy.deepcopy(a)], args, images(3, 32), method="average")
    assert net.rescale(reestimate=False) == 1
    for key, value in net.module.state_dict().items():
        assert_close(value, net.before[key], atol=1e-6, rtol=1e-6)
    net.rescale()
    assert (net.module.classifier[0].weight - a.classifier[0].weight).abs().max() > 1e-3


def test_parents_data_and_modes_are_left_alone():
    net = mlps()
    net.module.train()
    net.module[1].eval()
    modes = [m.training for m in net.module.modules()]
    states, data = copy.deepcopy((net.states, net.data))
    net.rescale()
    assert [m.training for m in net.module.modules()] == modes
    assert all(torch.equal(value, old[key]) for state, old in zip(net.states, states) for key, value in state.items())
    assert all(torch.equal(x, old) for x, old in zip(net.data, data))
    assert all(p.grad is None and p.requires_grad for p in net.module.parameters())


class Shared(nn.Module):
    """A layer that runs twice, two tied ones, one without bias, one with a computed weight, and two plain ones."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.bare = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.made, self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.alias = self.last

    def forward(self, x):
        x = F.relu(self.again(F.relu(self.again(F.relu(self.first(x))))))
        x = F.relu(self.other(F.relu(self.one(F.relu(self.bare(x))))))
        x = F.relu(F.linear(x, self.made.weight * 2, self.made.bias))
        return self.head(F.relu(self.last(x)))


def test_shared_and_computed_weights_are_left_alone():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Shared().double())
    data = [torch.randn(50, 6, dtype=torch.float64)]
    net = Case(models, (data[0],), data, method="average")
    assert net.rescale() == 2
    names = {"first.weight", "first.bias", "last.weight", "last.bias", "alias.weight", "alias.bias"}
    assert set(net.changed()) == names and net.module.alias is net.module.last
    net = Case(models, (data[0],), data, method="average", stop="last")
    assert net.rescale() == 2  # of two names a part keeps the first
    assert set(net.changed()) == {"trunk.first.weight", "trunk.first.bias", "trunk.last.weight", "trunk.last.bias"}


def test_dead_features_are_shifted_only():
    net = mlps((9,), method="average")
    for state in net.states:
        state["1.weight"][2] = 0
        state["1.bias"][2] = 3
    with torch.no_grad():
        net.module[1].weight[2] = 0
        net.module[1].bias[2] = 5
    assert net.rescale() == 1
    assert_close(net.module[1].bias[2].item(), 3.0) and not net.module[1].weight[2].any()
    assert all(bool(value.isfinite().all()) for value in net.module.state_dict().values())


def test_other_dtypes():
    net = mlps((9,), method="average")
    half = [copy.deepcopy(model).bfloat16() for model in net.models]
    data = [x.bfloat16() for x in net.data]
    low = Case(half, (data[0],), data, method="average")
    assert low.rescale() == net.rescale() == 1
    for key, value in low.module.state_dict().items():
        assert value.dtype is torch.bfloat16
        assert_close(value.double(), net.module.state_dict()[key], atol=0.02, rtol=0.02)


def test_transposed_convolution_in_groups():
    def build(seed):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), nn.ReLU()]
        return nn.Sequential(*layers, nn.Conv2d(6, 2, 1)).double()

    data = images(1, 20)
    net = Case([build(0), build(1)], (data[0],), data, method="average")
    assert net.rescale() == 1 and sorted(net.changed()) == ["2.bias", "2.weight"]
    assert max(net.errors()) < 1e-10


# ------------------------------------------------------------------------------------------ parts, and all of `merge`


def trunk_of(net):
    """The parts' statistics by the names of the whole: what is not in the trunk does not matter to them."""
    own = {key.removeprefix("trunk."): value for key, value in net.module.state_dict().items() if "trunk." in key}
    return {**net.states[0], **own}


def test_a_trunk_with_heads():
    torch.manual_seed(0)
    models = [zoo.mlp(64, (12, 9, 7), classes).double() for classes in (5, 3)]
    data = images(1, 60)
    net = Case(models, (data[0],), data, stop="linear_1")
    assert isinstance(net.module, MultiHead) and net.rescale() == 2
    assert sorted(net.changed()) == ["trunk.1.bias", "trunk.1.weight", "trunk.3.bias", "trunk.3.weight"]
    biases = ["1.bias", "3.bias"]
    got, want = net.statistics(trunk_of(net), biases), net.targets(biases)
    for name in biases:
        assert_close(torch.stack(got[name]), torch.stack(want[name]), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("start", "weights"), [("features.2", None), ("features.0", (3.0, 1.0))])
def test_a_late_start(start, weights):
    """Also before an activation that works in place."""
    torch.manual_seed(0)
    models = [zoo.VGG(((5,), (6, 8)), hidden=7, batch_norm=False).double() for _ in range(2)]
    data = images(1, 30)
    net = Case(models, (data[0],), data, start=start, stop="classifier.1", weights=weights)
    biases = ["features.3.bias", "features.5.bias", "classifier.0.bias"]
    assert net.rescale() == 3 and [key[6:] for key in net.changed() if key.endswith("bias")] == biases
    want, trunk = net.targets(biases), net.module.trunk
    found = {}
    for name in ("conv2d_1", "conv2d_2", "linear"):  # values in the trunk itself, which gets the merged stems' features
        node = next(node for node in trunk.graph.nodes if node.name == name)
        interpreter = torch.fx.Interpreter(trunk)
        run = interpreter.run_node

        def keep(n, run=run, node=node, name=name):
            value = run(n)
            if n is node:
                found[name] = value.clone().transpose(0, 1).flatten(1)
            return value

        interpreter.run_node = keep
        with torch.no_grad():
            interpreter.run(net.module.entry(*(stem(data[0]) for stem in net.module.stems)))
    for value, name in zip(found.values(), biases):
        assert_close(torch.stack([value.mean(1), value.std(1, correction=0)]), torch.stack(want[name]))


def test_tied_weights_in_a_trunk_keep_one_name():
    net = two("gpt2", batches=1, stop="transformer.h.0")
    assert net.rescale() == 4
    assert {key.split(".")[0] for key in net.changed()} == {"trunk"} and len(net.changed()) == 8


def test_merge_with_repair():
    plain, seen = mlps(method="zip"), []
    options = {"method": "zip", "repair": True}
    merged = merge(plain.models, (plain.data[0],), plain.data, **options, progress=lambda *step: seen.append(step))
    plain.rescale()
    for key, value in merged.state_dict.items():
        assert torch.equal(value, plain.module.state_dict()[key])
    assert merged.options["repair"] is True and ("repair", len(plain.data)) in seen


def test_merge_of_a_net_with_norms_repairs_what_is_behind_them():
    a, b = (case("vgg_bn_flatten", seed)[0] for seed in (0, 1))
    data = images(4, 64)
    net = Case([a, b], (data[0],), data)
    net.module = merge([a, b], (data[0],), data, repair=True).module
    got = net.statistics(net.module.state_dict(), ["classifier.0.bias"])["classifier.0.bias"]
    want = net.targets(["classifier.0.bias"])["classifier.0.bias"]
    assert_close(got[1] / want[1], torch.ones_like(got[1]), atol=0.02, rtol=0)
    assert ((got[0] - want[0]).abs() < 0.02 * want[1]).all()


@pytest.mark.parametrize("shares", [((0, 2), (1,)), ((0, 1, 2), ())])
def test_workers_fold_the_numbers_of_all(shares, monkeypatch):
    """Two threads, each with its share of the batches, that add up their tensors as processes do."""
    seen, barrier, local = {}, threading.Barrier(2, timeout=30), threading.local()

    def sum_(tensor):
        seen[local.rank] = tensor.clone()
        barrier.wait()
        total = seen[0] + seen[1]
        barrier.wait()
        return tensor.copy_(total)

    def work(net, rank):
        local.rank = rank
        return net.rescale([net.data[i] for i in shares[rank]])

    alone, *nets = (mlps((9,), method="average") for _ in range(3))
    alone.rescale()
    monkeypatch.setattr(distributed, "sum_", sum_)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, nets, range(2))) == [1, 1]
    for key, value in alone.module.state_dict().items():
        first, second = (net.module.state_dict()[key] for net in nets)
        assert torch.equal(first, second)
        assert_close(first, value, atol=1e-12, rtol=1e-12)


# ------------------------------------------------------------------------------------------ failures


def never():
    raise AssertionError("a batch was read")
    yield


def test_without_such_layers_no_batch_is_read():
    net = two("resnet_basic", batches=1, size=4)
    assert net.rescale(never()) == 0 and net.changed() == []
    net = mlps(method="average")
    net.groups = {}  # nothing was merged
    assert net.rescale(never()) == 0 and net.changed() == []


@pytest.mark.parametrize("kind", ["empty", "no samples", "text", "shape", "nan"])
def test_a_failing_pass_changes_nothing(kind):
    net = mlps()
    bad, error, match = {
        "empty": ([], ValueError, "rescale: 'data' must hold at least one batch, got none"),
        "no samples": ([net.data[0][:0]], ValueError, "rescale: 'data' must hold at least one batch, got none"),
        "text": ([net.data[0], "text"], TypeError, "a tuple that starts with one, got str"),
        "shape": ([net.data[0], torch.ones(2, 3).double()], RuntimeError, "shapes cannot be multiplied"),
        "nan": (
            [net.data[0], net.data[1] * float("nan")],
            ValueError,
            "rescale: 'data' must give finite features in all models, got others at 'linear' of model 0, feature 0",
        ),
    }[kind]
    modes = [m.training for m in net.module.modules()]
    with pytest.raises(error, match=match):
        net.rescale(bad)
    assert net.changed() == [] and [m.training for m in net.module.modules()] == modes


def test_features_that_are_not_finite_in_the_merged_model_are_named():
    net = mlps()
    with torch.no_grad():
        net.module[3].bias[4] = float("inf")
    with pytest.raises(ValueError, match="got others at 'linear_1' of the merged model, feature 4"):
        net.rescale()
