# SPDX-License-Identifier: Apache-2.0
"""Partial zips end to end: every cut of a network, other heads, saving, exporting, what they cost."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from variety import build, twin

import zipfast
from zipfast import MultiHead, zoo
from zipfast.merging import cuts, find_spaces, permute, random_permutations

TOLERANCE = 1e-4  # relative, float32; worst seen 1e-6
DATA = [torch.randn(16, 1, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def resnet(seed: int, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    net = zoo.resnet(1, width=0.5, classes=classes).train()
    with torch.no_grad():
        for x in DATA:
            net(x)
    return net.eval()


@pytest.fixture(scope="module")
def pair() -> list[nn.Module]:
    return [resnet(0), resnet(1)]


@pytest.fixture(scope="module")
def partial(pair) -> MultiHead:
    return zipfast.merge(pair, (DATA[0],), DATA, stop="stages.1").module


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("name", ["resnet_basic", "unet", "vit", "bert_mask", "llama"])
def test_a_permuted_copy_is_exact_at_every_sampled_cut(name):
    case = build(name)
    graph = find_spaces(case.net, case.args, case.kwargs)
    copied = twin(case, permute(graph.plan, random_permutations(graph.plan, 1), case.net.state_dict()))
    valid = cuts(graph)
    want = case.run()
    for cut in valid[:: max(1, len(valid) // 3)]:
        merged = zipfast.merge(
            [case.net, copied],
            case.args,
            [case.batch()],
            example_kwargs=case.kwargs,
            stop=cut.node,
            taps="all",
            reestimate=False,
        )
        with torch.no_grad():
            for output in merged.module(*case.args, **case.kwargs):
                assert (output.double() - want).abs().max() <= TOLERANCE * want.abs().max(), cut


def test_the_trunk_runs_once_and_the_costs_are_true(pair, partial):
    calls = []
    partial.trunk.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        partial(DATA[0])
    assert len(calls) == 1
    partial.trunk._forward_hooks.clear()
    cost = partial.report(DATA[0])
    count = sum(p.numel() for p in pair[0].parameters())
    trunk = sum(p.numel() for p in partial.trunk.parameters())
    assert cost["ensemble_parameters"] == 2 * count
    assert cost["parameters"] == trunk + 2 * (count - trunk)

    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for net in pair:
            net(DATA[0])
    assert cost["ensemble_flops"] == counter.get_total_flops() > cost["flops"] > counter.get_total_flops() / 2


def test_heads_are_the_models_own(pair, partial):
    for net, head in zip(pair, partial.heads):
        own = net.state_dict()
        for key, value in head.state_dict().items():
            if "running" not in key and "num_batches" not in key:
                assert torch.equal(value, own[key]), key


def test_saved_and_loaded_without_the_models(partial, tmp_path):
    partial.save(tmp_path / "net", {"note": 1})
    again = MultiHead.load(tmp_path / "net")
    with torch.no_grad():
        for n in (1, 7):
            assert same(again(DATA[0][:n]), partial(DATA[0][:n]))
    assert zipfast.checkpoint.read_metadata(tmp_path / "net" / "model.safetensors") == {"note": 1}
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["model.safetensors", "zipfast.json"]


def test_damaged_folders_are_refused(partial, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MultiHead.load: no zipfast.json in"):
        MultiHead.load(tmp_path)
    partial.save(tmp_path)
    text = (tmp_path / "zipfast.json").read_text()
    (tmp_path / "zipfast.json").write_text(text[:100])
    with pytest.raises(ValueError, match="must be JSON"):
        MultiHead.load(tmp_path)
    (tmp_path / "zipfast.json").write_text(json.dumps({**json.loads(text), "weights": "0"}))
    with pytest.raises(ValueError, match=r"must belong to zipfast.json, got other weights"):
        MultiHead.load(tmp_path)
    (tmp_path / "zipfast.json").write_text(text.replace("aten.relu", "os.system", 1))
    with pytest.raises(ValueError, match=r"operator 'os.system.*must be one of this PyTorch's own"):
        MultiHead.load(tmp_path)


def test_it_is_an_ordinary_module(partial):
    x = DATA[0]
    with torch.no_grad():
        want = partial(x)
        assert same(copy.deepcopy(partial)(x), want)
        exported = torch.export.export(partial, (x,)).module()(x)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(exported, want))
        double = copy.deepcopy(partial).double()(x.double())
        assert all(torch.allclose(a, b.float(), atol=1e-4) for a, b in zip(want, double))
    other = copy.deepcopy(partial).train()
    sum(output.sum() for output in other(x)).backward()
    assert all(p.grad is not None for p in other.parameters())
    norms = [m for m in partial.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 5
    assert zipfast.reestimate_batchnorm(copy.deepcopy(partial), DATA) == len(norms)


def test_classifiers_of_different_sizes_are_kept(pair):
    other = resnet(2, classes=4)
    merged = zipfast.merge([pair[0], other], (DATA[0],), DATA)
    assert [tuple(output.shape) for output in merged.module(DATA[0])] == [(16, 10), (16, 4)]
    assert torch.equal(merged.module.heads[1].state_dict()["linear.weight"], other.linear.weight)
    ensemble = zipfast.merge([pair[0], other], (DATA[0],), DATA, method="ensemble").module
    assert [tuple(output.shape) for output in ensemble(DATA[0])] == [(16, 10), (16, 4)]


def test_a_late_start_has_stems(pair):
    merged = zipfast.merge(pair, (DATA[0],), DATA, start="stages.0", stop="stages.1", weights=(2, 1), reestimate=False)
    assert len(merged.module.stems) == 2 and merged.module.entry is not None
    share = merged.module.entry.share
    torch.testing.assert_close(share.sum(0), torch.ones(share.shape[1]))
    with torch.no_grad():
        assert [tuple(output.shape) for output in merged.module(DATA[0])] == [(16, 10)] * 2
    with pytest.raises(ValueError, match=r"merge: 'start' must come before 'stop', got 'stages.1' and 'stages.0'"):
        zipfast.merge(pair, (DATA[0],), DATA, start="stages.1", stop="stages.0")


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (
            "stages.1.0.conv1",
            r"must be a place that all flow passes, .* nearest valid cuts are 'relu_2' .* and 'add_1'",
        ),
        ("nowhere", r"must be a module's path or a graph node, got 'nowhere'; valid cuts are conv2d"),
    ],
)
def test_cuts_that_are_none(pair, stop, message):
    with pytest.raises(ValueError, match=f"merge: 'stop' {message}"):
        zipfast.merge(pair, (DATA[0],), DATA, stop=stop)


def test_wrong_inputs_are_named(partial):
    with pytest.raises(ValueError, match=r"MultiHead: the inputs must be \['x'\], got 2 tensors"):
        partial(DATA[0], DATA[1])
    with pytest.raises(ValueError, match=r"head: 'm' must be in \[0, 2\), got 2"):
        partial.head(2, DATA[0])


def test_a_start_whose_features_no_weight_of_the_part_uses_is_refused():
    # Between the packed projection and the output projection, queries and keys only meet each other.
    net = nn.Sequential(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), nn.Linear(12, 4)).eval()
    x = torch.randn(3, 5, 12)
    with pytest.raises(
        ValueError, match=r"the features of node 'linear' must be used by a weight of the part, got 4 that"
    ):
        zipfast.merge([net, net], (x,), [x], start="linear", stop="linear_1", reestimate=False)
