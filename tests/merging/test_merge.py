# SPDX-License-Identifier: Apache-2.0
"""`merge` end to end: permuted copies merge back exactly; data forms, messages, saving, and what stays unchanged."""

from __future__ import annotations

import copy
import functools
import os
import warnings

import pytest
import torch
from nets import UNet, build, permute_state, random_permutations, randomise
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import zipfast
from zipfast import Merged, checkpoint, find_spaces, merge, reestimate_batchnorm, zoo
from zipfast.merging import Plan, UnknownOpError, gather_moments

WIDE = {
    "mlp": (lambda: zoo.mlp(64, (9, 7), 5), (1, 8, 8)),
    "vgg_flatten": (lambda: zoo.VGG(((4,), (6, 5)), hidden=7, grid=2), (1, 8, 8)),
    "resnet": (lambda: zoo.resnet(1, width=0.5, classes=5), (1, 8, 8)),
    "unet": (UNet, (1, 8, 8)),
}


def batches(shape, count=3, size=64, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator, dtype=dtype) for _ in range(count)]


def mlp(seed=0, hidden=(6, 5), dtype=torch.float64):
    torch.manual_seed(seed)
    return zoo.mlp(8, hidden, 3).to(dtype)


def normed():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()


DATA = batches((8,))


def alive(net, data):
    """Norms that fit the data and no negative bias, so that no unit is dead: dead ones cannot be told apart."""
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith("bias"):
                value.abs_()
    reestimate_batchnorm(net, data)
    return net


@functools.cache
def pair(name):
    """A net, a copy with every space permuted, the orders, and data."""
    constructor, shape = WIDE[name]
    torch.manual_seed(1)
    data = batches(shape)
    a = alive(randomise(constructor().double().eval()), data)
    plan = find_spaces(a, (data[0],)).plan
    orders = random_permutations(plan)
    b = copy.deepcopy(a)
    b.load_state_dict(permute_state(a.state_dict(), plan, orders))
    with torch.no_grad():
        assert_close(a(data[0]), b(data[0]), atol=1e-10, rtol=1e-10)
    return a, b, orders, data


def worst(a, b, data):
    with torch.no_grad():
        return max(float((a(x) - b(x)).abs().max()) for x in data)


# ------------------------------------------------------------------------------------------ exact merges


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("method", ["zip", "permute"])
def test_a_permuted_copy_merges_back(name, method):
    a, b, orders, data = pair(name)
    merged = merge([a, b], (data[0],), data, method=method, reestimate=False)
    for name, permutation in orders.items():
        order = permutation.index.argsort()
        size = len(order)
        assert merged.similarities[name].diagonal().min() > 0.99  # else the test is not one
        assert merged.groups[name].index.tolist() == [*range(size), *order.tolist()], name
        assert merged.groups[name].is_permutation
    assert worst(merged.module, a, data) < 1e-9
    assert worst(merged.module, a, batches(data[0].shape[1:], seed=9)) < 1e-9
    for name, value in a.state_dict().items():
        assert_close(merged.state_dict[name], value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "vgg_flatten", "unet"])
def test_the_average_of_a_permuted_copy_does_not(name):
    a, b, _, data = pair(name)
    merged = merge([a, b], (data[0],), data, method="average", reestimate=False)
    assert worst(merged.module, a, data) > 1e-2
    assert merged.similarities == {}


@pytest.mark.parametrize("method", ["zip", "permute", "average"])
def test_with_itself(method):
    a, _, _, data = pair("vgg_flatten")
    merged = merge([a, a], (data[0],), data, method=method, reestimate=False)
    assert all(torch.equal(v, a.state_dict()[k]) for k, v in merged.state_dict.items())


@pytest.mark.parametrize("method", ["permute", "zip"])
def test_with_itself_and_dead_features(method):
    a = mlp(0)
    with torch.no_grad():
        a[1].bias[:3], a[1].weight[:3] = -1, 0
    merged = merge([a, a], (DATA[0],), DATA, method=method)
    assert worst(merged.module, a, DATA) < 1e-9


def test_batch_norm_is_reestimated():
    a, b, _, data = pair("unet")
    other = [3 * x + 1 for x in data]
    merged = merge([a, b], (data[0],), other)
    own = copy.deepcopy(a)
    reestimate_batchnorm(own, other)
    assert worst(merged.module, own, other) < 1e-9
    assert worst(merged.module, a, other) > 1e-3


def test_three_permuted_models():
    a, _, _, data = pair("mlp")
    x = data[0]
    plan = find_spaces(a, (x,)).plan
    models = [a]
    for seed in (1, 2):
        models.append(copy.deepcopy(a))
        models[-1].load_state_dict(permute_state(a.state_dict(), plan, random_permutations(plan, seed)))
    for options in ({"beta": 0.0}, {"method": "permute"}):
        merged = merge(models, (x,), data, reestimate=False, **options)
        assert worst(merged.module, a, data) < 1e-9
        for seed in (1, 2):
            for name, permutation in random_permutations(plan, seed).items():
                assert merged.groups[name].of_model(seed).tolist() == permutation.index.argsort().tolist()


def test_different_models_make_a_model():
    models = [mlp(0), mlp(1), mlp(2)]
    merged = merge(models, (DATA[0],), DATA)
    assert merged.module(DATA[0]).shape == (64, 3)
    assert {n: g.keep for n, g in merged.groups.items()} == {"1": 6, "3": 5}
    for name, g in merged.groups.items():
        assert torch.equal(g.index, zipfast.match(merged.similarities[name], 3).index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    a = mlp(0, dtype=dtype)
    data = batches((8,), dtype=dtype)
    plan = find_spaces(a, (data[0],)).plan
    b = copy.deepcopy(a)
    b.load_state_dict(permute_state(a.state_dict(), plan, random_permutations(plan)))
    merged = merge([a, b], (data[0],), data)
    assert all(v.dtype == dtype for v in merged.state_dict.values())
    assert worst(merged.module, a, data) < (1e-5 if dtype == torch.float32 else 0.05)


def test_deterministic():
    models = [mlp(0), mlp(1)]
    first, second = (merge(models, (DATA[0],), DATA) for _ in range(2))
    for name, value in first.state_dict.items():
        assert torch.equal(value, second.state_dict[name])
    assert first.options == second.options


def test_alpha_beta_compat_reach_the_matching():
    models = [mlp(0), mlp(1)]
    free = merge(models, (DATA[0],), DATA)
    none = merge(models, (DATA[0],), DATA, beta=0.0)
    assert all(g.is_permutation for g in none.groups.values())
    assert not all(g.is_permutation for g in free.groups.values())
    reference = merge(models, (DATA[0],), DATA, alpha=0.3, beta=0.5, compat=True)
    for name, g in reference.groups.items():
        wanted = zipfast.match(reference.similarities[name], 2, alpha=0.3, beta=0.5, compat=True)
        assert torch.equal(g.index, wanted.index)


def test_flagged_spaces_are_only_permuted():
    """A layer norm mixes the features, so that two of one model must not become one."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)).double() for _ in range(2)]
    merged = merge(models, (DATA[0],), DATA)
    (space,) = merged.plan.mergeable
    assert space.flags
    assert merged.groups[space.name].is_permutation


# ------------------------------------------------------------------------------------------ what stays as it is


def test_models_and_data_are_unchanged():
    a, x = build("unet", 0)
    b, _ = build("unet", 1)
    a.train()
    a.stem.eval()
    b.out.weight.requires_grad_(False)
    data = batches(x.shape[1:], 2, 16)
    modes = [m.training for net in (a, b) for m in net.modules()]
    states = [{k: v.clone() for k, v in net.state_dict().items()} for net in (a, b)]
    copies = [d.clone() for d in data]
    merged = merge([a, b], (x,), data)
    assert [m.training for net in (a, b) for m in net.modules()] == modes
    for net, state in zip((a, b), states):
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in b.parameters()].count(False) == 1
    assert all(torch.equal(d, c) for d, c in zip(data, copies))
    assert not any(m.training for m in merged.module.modules())
    assert type(merged.module) is type(a)
    ours = {v.data_ptr() for v in merged.state_dict.values()}
    assert not ours & {v.data_ptr() for net in (a, b) for v in net.state_dict().values()}


def test_modes_are_restored_after_an_error():
    models = [mlp(0).train(), mlp(1).train()]
    with pytest.raises(ValueError, match="finite"):
        merge(models, (DATA[0],), [DATA[0] * torch.nan])
    assert all(m.training for net in models for m in net.modules())


# ------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "nested", "loader", "pairs"])
def test_forms_of_data(form):
    models = [mlp(0), mlp(1)]
    labels = torch.zeros(64, dtype=torch.int64)
    data = {
        "tensor": DATA,
        "tuple": [(x, labels) for x in DATA],
        "list": [[x, labels] for x in DATA],
        "nested": [((x, labels), labels) for x in DATA],
        "loader": DataLoader(TensorDataset(torch.cat(DATA)), batch_size=64),
        "pairs": DataLoader(TensorDataset(torch.cat(DATA), torch.zeros(192)), batch_size=64),
    }[form]
    wanted = merge(models, (DATA[0],), DATA).state_dict
    got = merge(models, (DATA[0],), data).state_dict
    assert all(torch.equal(got[k], v) for k, v in wanted.items())


def test_last_batch_may_be_smaller():
    models = [mlp(0), mlp(1)]
    data = DataLoader(TensorDataset(torch.cat(DATA)), batch_size=100)
    wanted, got = merge(models, (DATA[0],), DATA), merge(models, (DATA[0],), data)
    for name in wanted.groups:
        assert_close(got.similarities[name], wanted.similarities[name], atol=1e-6, rtol=0)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, pixels):
        return self.second(torch.relu(self.first(pixels)))


def test_mappings_of_keyword_arguments():
    torch.manual_seed(0)
    models = [Keyword().double(), Keyword().double()]
    wanted = merge(models, (DATA[0],), DATA).state_dict
    got = merge(models, (), [{"pixels": x} for x in DATA], example_kwargs={"pixels": DATA[0]}).state_dict
    assert all(torch.equal(got[k], v) for k, v in wanted.items())


class Counting:
    """Data that knows how many batches were asked for."""

    def __init__(self, data):
        self.data, self.passes, self.read = data, 0, 0

    def __iter__(self):
        self.passes += 1
        for x in self.data:
            self.read += 1
            yield x


@pytest.mark.parametrize("most, read", [(1, 1), (2, 2), (3, 3), (50, 3), (None, 3)])
def test_max_batches(most, read):
    torch.manual_seed(0)
    models = [normed(), normed()]
    data = Counting(DATA)
    merged = merge(models, (DATA[0],), data, max_batches=most)
    assert (data.passes, data.read) == (2, 2 * read)
    wanted = merge(models, (DATA[0],), DATA[:read])
    assert all(torch.equal(merged.state_dict[k], v) for k, v in wanted.state_dict.items())


def test_average_reads_data_for_batch_norm_only():
    data = Counting(DATA)
    merge([mlp(0), mlp(1)], (DATA[0],), data, method="average")
    assert data.read == 0


def test_a_loader_is_not_started_to_see_what_it_is():
    """Starting one starts its workers and draws from the global generator."""
    models, data = [mlp(0), mlp(1)], DataLoader(TensorDataset(torch.cat(DATA)), batch_size=64)
    starts, start = [], DataLoader.__iter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataLoader, "__iter__", lambda self: starts.append(1) or start(self))
        merge(models, (DATA[0],), data)
    assert len(starts) == 1  # the pass over the features


@pytest.mark.parametrize(
    ("data", "seen"),
    [(iter(DATA), "an iterator"), (zip(DATA, DATA), "an iterator"), (DATA[0], "one tensor")],
)
def test_what_is_no_list_of_batches_is_refused(data, seen):
    with pytest.raises(TypeError, match=f"merge: 'data' must be batches .*, got {seen}; pass a DataLoader or a list"):
        merge([mlp(0), mlp(1)], (DATA[0],), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "merge: 'data' must hold at least one batch, got none"),
        ({"data": DATA, "max_batches": 0}, "merge: 'max_batches' must be at least 1 or None, got 0"),
    ],
)
def test_empty_data(options, message):
    with pytest.raises(ValueError, match=message):
        merge([mlp(0), mlp(1)], (DATA[0],), **options)


def test_empty_data_for_batch_norm():
    a, x = normed(), DATA[0]
    with pytest.raises(ValueError, match="'batches' must hold at least one batch"):
        merge([a, a], (x,), [], method="average")


def test_batches_of_another_kind():
    with pytest.raises(
        TypeError,
        match="each batch must be a tensor, a mapping of keyword arguments, or a tuple that starts with one, got str",
    ):
        merge([mlp(0), mlp(1)], (DATA[0],), ["text"])


def test_nan_in_data_names_model_and_space():
    data = [DATA[0], DATA[1].clone()]
    data[1][5, 2] = torch.nan
    with pytest.raises(
        ValueError, match="features of space '1' must be finite, got NaN or infinity in model 0, feature 0"
    ):
        merge([mlp(0), mlp(1)], (DATA[0],), data)
    b = mlp(1)
    with torch.no_grad():
        b[3].weight[2] = torch.inf
    with pytest.raises(
        ValueError, match="features of space '3' must be finite, got NaN or infinity in model 1, feature 2"
    ):
        merge([mlp(0), b], (DATA[0],), DATA)


def test_dead_features():
    """Some dead features do no harm; a space of dead ones is named."""
    models = [mlp(0), mlp(1)]
    with torch.no_grad():
        models[0][1].weight[:3], models[0][1].bias[:3] = 0, -1
    merged = merge(models, (DATA[0],), DATA)
    correlation, index = merged.similarities["1"], merged.groups["1"].index
    assert (correlation[:3, 3:] == 0).all()
    assert (correlation[:3, :3] == 1 - torch.eye(3)).all()  # always 0, all three: nothing is lost when they are merged
    assert index[:3].unique().numel() == 1
    for net in models:
        with torch.no_grad():
            net[1].weight.zero_()
            net[1].bias.fill_(-1)
    with pytest.raises(ValueError, match="at least one feature of space '1' must vary"):
        merge(models, (DATA[0],), DATA)


# ------------------------------------------------------------------------------------------ models that do not fit


def test_too_few_models_and_unknown_method():
    for models in ([], [mlp(0)]):
        with pytest.raises(ValueError, match=f"'models' must hold at least two models, got {len(models)}"):
            merge(models, (DATA[0],), DATA)
    with pytest.raises(ValueError, match="'method' must be one of zip, permute, optimal, kmeans, average, got 'mean'"):
        merge([mlp(0), mlp(1)], (DATA[0],), DATA, method="mean")


@pytest.mark.parametrize(
    "hidden, difference",
    [
        ((6, 4), r"node 'linear_1' \(module 3\) gives \['batch', 5\] in one and \['batch', 4\] in the other"),
        ((6,), r"node 'linear_1' \(module 3\) gives \['batch', 5\] in one and \['batch', 3\] in the other"),
    ],
)
def test_models_that_differ(hidden, difference):
    with pytest.raises(ValueError, match=f"merge: models 0 and 2 must have one structure, but {difference}"):
        merge([mlp(0), mlp(1), mlp(2, hidden)], (DATA[0],), DATA)


def test_heads_may_differ_in_structure():
    # All up to the last cut of the first model agrees; what lies behind is each model's own.
    models = [mlp(0), mlp(1), mlp(2, (6, 5, 4))]
    merged = merge(models, (DATA[0],), DATA)
    assert isinstance(merged.module, zipfast.MultiHead) and merged.options["stop"] == "relu_1"
    assert [tuple(output.shape) for output in merged.module(DATA[0])] == [(64, 3)] * 3


class Branching(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if bool((x.sum() > 0).item()) else x


class Exotic(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.middle(torch.relu(self.first(x))))
        return self.last(torch.sort(x, -1).values)


def test_model_that_cannot_be_captured():
    models = [Branching(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double() for _ in range(2)]
    with pytest.raises(ValueError, match=r"torch.export cannot capture Branching"):
        merge(models, (DATA[0],), DATA)


def test_unknown_op():
    torch.manual_seed(0)
    models = [Exotic().double(), Exotic().double()]
    with pytest.raises(UnknownOpError, match="sort"):
        merge(models, (DATA[0],), DATA)
    merged = merge(models, (DATA[0],), DATA, unknown="freeze")
    assert len(merged.groups) == 1 and len(merged.plan.mergeable) == 1
    assert_close(merged.module.last.weight, (models[0].last.weight + models[1].last.weight) / 2)


def test_nothing_to_merge():
    """One linear layer has no hidden features: the average is all there is."""
    models = [nn.Linear(8, 3).double() for _ in range(2)]
    try:
        merged = merge(models, (DATA[0],), DATA)
    except ValueError as error:
        assert "space" in str(error)
    else:
        assert merged.groups == {}
        assert_close(merged.module.weight, (models[0].weight + models[1].weight) / 2)


# ------------------------------------------------------------------------------------------ results


@pytest.fixture(scope="module")
def result():
    a, x = build("vgg_bn_flatten", 0)
    b, _ = build("vgg_bn_flatten", 1)
    data = batches(x.shape[1:], 2, 32)
    return [a, b], data, merge([a, b], (x,), data, alpha=0.5, beta=0.75)


def test_fields(result):
    models, _, merged = result
    assert isinstance(merged, Merged)
    assert list(merged.groups) == list(merged.similarities) == [s.name for s in merged.plan.mergeable]
    for name, s in merged.similarities.items():
        assert s.shape == (2 * merged.plan[name].size,) * 2 and s.dtype == torch.float32
    assert list(merged.seconds) == ["export", "moments", "match", "apply", "batch norm"]
    assert all(s >= 0 for s in merged.seconds.values())
    assert merged.options["alpha"] == 0.5 and merged.options["beta"] == 0.75
    assert merged.options["method"] == "zip"
    assert merged.options["inputs"] == [checkpoint.state_hash(m.state_dict()) for m in models]


def test_options_hold_all_that_determined_the_result():
    merged = merge([mlp(0), mlp(1)], (DATA[0],), DATA, max_batches=2, unknown="freeze")
    assert merged.options["max_batches"] == 2
    assert merged.options["unknown"] == "freeze"


def test_report(result):
    merged = result[2]
    text = merged.report()
    assert str(merged.plan) in text
    lines = text.splitlines()
    head = next(line for line in lines if line.startswith("space") and "budget lifted" in line)
    assert [part.strip() for part in head.split("  ") if part.strip()] == [
        "space",
        "features",
        "in-model merges",
        "mean similarity",
        "budget lifted",
    ]
    for name, g in merged.groups.items():
        row = next(line for line in lines[lines.index(head) :] if line.startswith(name + " "))
        assert f"2 x {g.size}" in row
        assert ", ".join(map(str, g.in_model_merges)) in row
        assert f"{g.value.mean():.3f}" in row
    assert lines[-1].startswith("time: export ") and "batch norm" in lines[-1]
    average = merge(result[0], (result[1][0],), result[1], method="average").report()
    assert "2 x 4" in average and "nan" not in average


def test_progress():
    seen = []
    merge([normed(), normed()], (DATA[0],), DATA, progress=lambda *call: seen.append(call), max_batches=2)
    assert seen == [("moments", 1), ("moments", 2), ("batch norm", 1), ("batch norm", 2)]


def test_gather_moments_agrees_with_the_models():
    models = [mlp(0), mlp(1)]
    graph = find_spaces(models[0], (DATA[0],))
    moments = gather_moments(graph, [m.state_dict() for m in models], DATA)
    (first,) = moments["1"]
    assert first.count == 192 and first.name == "1"
    with torch.no_grad():
        hidden = torch.cat([m[:3](torch.cat(DATA)) for m in models], 1)
    assert_close(moments.correlation("1"), torch.corrcoef(hidden.T).float(), atol=1e-6, rtol=0)


def test_ensemble():
    models = [mlp(0), mlp(1)]
    ensemble = zipfast.LogitEnsemble(models)
    assert_close(ensemble(DATA[0]), (models[0](DATA[0]) + models[1](DATA[0])) / 2)


# ------------------------------------------------------------------------------------------ saving


def test_save_and_load(result, tmp_path):
    _, data, merged = result
    path = tmp_path / "merged.safetensors"
    merged.save(path)
    fresh, _ = build("vgg_bn_flatten", 7)
    fresh.load_state_dict(checkpoint.load(path))
    with torch.no_grad():
        assert torch.equal(fresh(data[0]), merged.module(data[0]))
    metadata = checkpoint.read_metadata(path)
    assert metadata["options"] == dict(merged.options)
    assert Plan.from_json(metadata["plan"]) == merged.plan


def test_out(tmp_path):
    path = tmp_path / "merged.safetensors"
    merged = merge([mlp(0), mlp(1)], (DATA[0],), DATA, out=path)
    loaded = checkpoint.load(path)
    assert all(torch.equal(loaded[k], v) for k, v in merged.state_dict.items())
    assert os.listdir(tmp_path) == ["merged.safetensors"]


def test_merged_models_merge_again(tmp_path):
    models = [mlp(0), mlp(1)]
    merge(models, (DATA[0],), DATA, out=tmp_path / "a.safetensors")
    again = mlp(3)
    again.load_state_dict(checkpoint.load(tmp_path / "a.safetensors"))
    merged = merge([again, mlp(2)], (DATA[0],), DATA)
    assert merged.options["inputs"][0] == checkpoint.state_hash(again.state_dict())


class Untouchable(nn.Module):
    """A model that must not be run."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        raise AssertionError("work started before the output was checked")


@pytest.mark.parametrize("where", ["missing/a.safetensors", "file/a.safetensors", "."])
def test_out_is_checked_before_any_work(tmp_path, where):
    (tmp_path / "file").write_text("")
    data, seen = Counting(DATA), []
    with pytest.raises(OSError, match="cannot write "):
        merge([Untouchable()] * 2, (DATA[0],), data, out=tmp_path / where, progress=lambda *call: seen.append(call))
    assert data.passes == data.read == 0 and not seen
    assert os.listdir(tmp_path) == ["file"]


def test_ending_of_out_is_checked_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        merge([Untouchable()] * 2, (DATA[0],), DATA, out=tmp_path / "a.pt")


def test_out_may_be_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merge([mlp(0), mlp(1)], (DATA[0],), DATA, out="a.safetensors")
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_killed_save_leaves_the_old_file(result, tmp_path, monkeypatch, step):
    path = tmp_path / "merged.safetensors"
    checkpoint.save(path, {"old": torch.ones(3)}, {"who": "old"})
    before = path.read_bytes()

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, step, kill)
    with pytest.raises(KeyboardInterrupt):
        result[2].save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["merged.safetensors"]
    result[2].save(path)
    assert checkpoint.read_metadata(path)["options"]["method"] == "zip"


def test_one_warning_for_lifted_budgets():
    models = [mlp(seed, (12, 10)) for seed in range(3)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        merged = merge(models, (DATA[0],), DATA, beta=0.0)
    lifted = sum(g.lifted for g in merged.groups.values())
    ours = [str(w.message) for w in seen if w.category is RuntimeWarning]
    assert len(ours) == (lifted > 0)
    assert all(f"lifted for {lifted} of" in text for text in ours)
