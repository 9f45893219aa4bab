# SPDX-License-Identifier: Apache-2.0
"""Adding a model to a partially merged network: old heads keep their answers, the new one gets its own."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import permute_state, random_permutations

import zipfast
from zipfast import MultiHead, extend, zoo
from zipfast.merging import find_spaces

GENERATOR = torch.Generator().manual_seed(0)
DATA = [torch.randn(16, 1, 12, 12, generator=GENERATOR) for _ in range(3)]
TOLERANCE = 1e-5  # float32; worst seen 3e-8


def trained(seed: int, classes: int = 10) -> torch.nn.Module:
    torch.manual_seed(seed)
    net = zoo.resnet(1, width=0.5, classes=classes).train()
    with torch.no_grad():
        for x in DATA:
            net(x)
    return net.eval()


def copy_of(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    plan = find_spaces(net, (DATA[0],)).plan
    other = copy.deepcopy(net)
    other.load_state_dict(permute_state(net.state_dict(), plan, random_permutations(plan, seed)))
    return other


def two(a: torch.nn.Module, b: torch.nn.Module, **options) -> MultiHead:
    merged = zipfast.merge([a, b], (DATA[0],), DATA, stop="stages.1", taps="all", reestimate=False, **options)
    assert isinstance(merged.module, MultiHead)
    return merged.module


def test_a_third_permuted_copy_joins_exactly():
    a = trained(0)
    before = two(a, copy_of(a, 1))
    state = {key: value.clone() for key, value in before.state_dict().items()}
    result = extend(before, copy_of(a, 2), (DATA[0],), DATA, taps="all", reestimate=False)
    x = torch.randn(5, 1, 12, 12)
    with torch.no_grad():
        want = a(x)
        outputs = result.module(x)
    assert len(outputs) == 3
    for output in outputs:
        torch.testing.assert_close(output, want, atol=TOLERANCE, rtol=0)
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())
    assert result.options["weights"] == [2.0, 1.0]


def test_shares_count_the_models_in_the_trunk():
    models = [trained(seed) for seed in range(3)]
    before = two(models[0], models[1], method="average")
    result = extend(before, models[2], (DATA[0],), DATA, reestimate=False)
    name, groups = next(iter(result.groups.items()))
    bias = [before.trunk.state_dict()["bn1.bias"], models[2].state_dict()["bn1.bias"]]
    got = result.module.trunk.state_dict()["bn1.bias"]
    assert name == "conv1"
    for group in range(groups.keep):
        members = [(m, k) for m in range(2) for k in range(groups.size) if groups.of_model(m)[k] == group]
        share = [(2.0, 1.0)[m] for m, _ in members]
        mean = sum(s * bias[m][k] for s, (m, k) in zip(share, members)) / sum(share)
        torch.testing.assert_close(got[group], mean)


def test_another_number_of_classes_and_a_saved_network(tmp_path):
    two(trained(0), trained(1)).save(tmp_path / "two")
    loaded = MultiHead.load(tmp_path / "two")
    result = extend(loaded, trained(2, classes=4), (DATA[0],), DATA)
    result.save(tmp_path / "three")
    again = MultiHead.load(tmp_path / "three")
    with torch.no_grad():
        for got, want in zip(again(DATA[0]), result.module(DATA[0])):
            assert torch.equal(got, want)
        assert [output.shape[1] for output in again(DATA[0])] == [10, 10, 4]


def test_what_does_not_fit_is_refused():
    before = two(trained(0), trained(1))
    torch.manual_seed(2)
    with pytest.raises(
        ValueError, match=r"extend: 'model' must have the trunk of 'merged', got 'conv1.weight' of shape"
    ):
        extend(before, zoo.resnet(1), (DATA[0],), DATA)
    with pytest.raises(ValueError, match="extend: 'model' must have the cut of 'merged', got no node 'relu_4'"):
        extend(before, zoo.mlp(144, (8,), 10), (DATA[0],), DATA)
    with pytest.raises(TypeError, match="extend: 'data' must be batches that can be read more than once"):
        extend(before, trained(2), (DATA[0],), iter(DATA))
    late = zipfast.merge([trained(0), trained(1)], (DATA[0],), DATA, start="stages.0", stop="stages.1").module
    with pytest.raises(ValueError, match="extend: 'merged' must begin at the input"):
        extend(late, trained(2), (DATA[0],), DATA)
