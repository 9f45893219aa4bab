# SPDX-License-Identifier: Apache-2.0
"""Tapped runs must be the model itself, and the values what the consuming layers really see."""

import pytest
import torch
from nets import NETS, build, output_of
from torch import nn
from torch.nn import functional as F

from zipfast import zoo
from zipfast.merging import Tap, Tapped, features, find_spaces


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("name", NETS)
def test_one_graph_serves_other_weights_and_batch_sizes(name, batch):
    net, x = build(name)
    graph = find_spaces(net, (x,))
    other, _ = build(name, seed=1)
    x = torch.randn(batch, *x.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        want = output_of(other(x))
    state = other.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    got, values = Tapped(graph).run(state, x)
    torch.testing.assert_close(output_of(got), want, rtol=0, atol=1e-12)
    assert set(values) == {tap.node for space in graph.plan.mergeable for tap in space.taps}
    for space in graph.plan.mergeable:
        for tap in space.taps:
            tensor, axis = features(values[tap.node], tap)
            assert tensor.shape[axis] == space.total
            assert tensor.numel() % (batch * space.size) == 0
            if not tap.averaged and not space.parents:
                assert tensor.untyped_storage().data_ptr() == values[tap.node].untyped_storage().data_ptr()
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["mlp", "vgg", "vgg_bn_flatten", "resnet_basic", "resnet_bottleneck", "unet"])
def test_values_are_what_forward_hooks_see(name):
    net, x = build(name)
    graph = find_spaces(net, (x,))
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, inputs, key=key: seen.__setitem__(key, inputs[0].clone()))
        for key, module in net.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    _, values = Tapped(graph).run(net.state_dict(), x)
    pooled = 0
    for space in graph.plan.mergeable:
        (tap,) = space.taps
        value = values[tap.node]
        inputs = [seen[param.rpartition(".")[0]] for param in space.params("consume")]
        if not any(v.shape == value.shape and torch.equal(v, value) for v in inputs):
            # the one stream whose consumers all follow the global pool is read before it
            assert any(torch.allclose(v, value.mean(tuple(range(2, value.dim())))) for v in inputs if v.dim() == 2)
            pooled += 1
    assert pooled <= 1


def test_values_are_read_before_later_in_place_ops():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.a(x)
            y = self.b(x)  # reads x, and then x is overwritten
            return self.c(F.relu_(x).view(-1, 6).mul_(0.5)) + self.c(y)

    net = InPlace().eval()
    x = torch.randn(5, 4)
    graph = find_spaces(net, (x,))
    output, values = Tapped(graph).run(net.state_dict(), x)
    torch.testing.assert_close(output, net(x))
    with torch.no_grad():
        early, late = net.a(x), F.relu(net.a(x)) * 0.5
    (tap,) = graph.plan["a"].taps
    assert any(torch.allclose(values[tap.node], want) for want in (early, late))


def test_a_tap_before_a_write_is_copied():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.a(x)
            y = self.b(x)
            x.zero_()
            return y

    net = InPlace().eval()
    x = torch.randn(5, 4)
    tapped = Tapped(find_spaces(net, (x,)))
    assert len(tapped._copied) == 1
    _, values = tapped.run(net.state_dict(), x)
    torch.testing.assert_close(*values.values(), net.a(x).detach())


def test_plain_taps_are_not_copied():
    net, x = build("vgg")  # in-place activations, but each before its tap
    assert not Tapped(find_spaces(net, (x,)))._copied


def test_inputs_and_state_are_not_written():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.b(F.relu(self.a(x.mul_(2))))

    net = Greedy().eval()
    graph = find_spaces(net, (torch.randn(5, 4),))
    x, state = torch.randn(3, 4), {k: v.clone() for k, v in net.state_dict().items()}
    x_before, state_before = x.clone(), {k: v.clone() for k, v in state.items()}
    output, _ = Tapped(graph).run(state, x)
    assert torch.equal(x, x_before) and all(torch.equal(state[k], state_before[k]) for k in state)
    torch.testing.assert_close(output, net(x.clone()))


def test_keyword_arguments_constants_and_structured_output():
    class Rich(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("shift", torch.randn(4), persistent=False)

        def forward(self, x, scale=1, *, mask=None, flip=False):
            x = (x + self.shift + torch.tensor([1.0, 2.0, 3.0, 4.0])) * scale
            y = self.b(F.relu(self.a(x)))
            return {"y": y if mask is None else y * mask, "none": None, "pair": (y, 2)}

    net = Rich().eval()
    x, mask = torch.randn(5, 4), torch.rand(5, 3)
    graph = find_spaces(net, (x, 3), {"mask": mask, "flip": True})
    tapped = Tapped(graph)
    x, mask = torch.randn(2, 4), torch.rand(2, 3)
    output, _ = tapped.run(net.state_dict(), x, 3, flip=True, mask=mask)
    want = net(x, 3, mask=mask)
    torch.testing.assert_close(output["y"], want["y"])
    assert output["none"] is None and output["pair"][1] == 2
    with pytest.raises(
        ValueError, match=r"run: keyword arguments must be \['mask', 'flip'\] as in the example, got \[\]"
    ):
        tapped.run(net.state_dict(), x, 3)
    with pytest.raises(ValueError, match="run: 'inputs' must hold 2 tensors as in the example, got 1"):
        tapped.run(net.state_dict(), x, 3, mask=None, flip=True)


def test_missing_parameter():
    net = zoo.mlp(4, (3,), 2)
    x = torch.randn(2, 4)
    state = net.state_dict()
    del state["1.weight"]
    with pytest.raises(ValueError, match=r"run: 'state' must hold '1\.weight', got 3 tensors without it"):
        Tapped(find_spaces(net, (x,))).run(state, x)


def test_features_by_hand():
    x = torch.arange(2 * 14.0).reshape(2, 14)
    # two features in the axis layout: 1 leading position | [3, 2, 2] | 1 trailing
    tensor, axis = features(x, Tap("n", 1, offset=1, length=12, factors=((-1,), (3, 2, 2)), features=(2,)))
    assert tuple(tensor.shape) == (2, 3, 2, 2) and axis == 2
    assert tensor[0].tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]]
    assert tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    plain, axis = features(x, Tap("n", 1, 0, -1, ((-1,), (14,)), (1,)))
    assert plain is x and axis == 1
    part, axis = features(x, Tap("n", 1, 4, 5, ((-1,), (5,)), (1,)))
    assert tuple(part.shape) == (2, 5) and axis == 1
    folded, axis = features(x.reshape(28), Tap("n", 0, 0, -1, ((-1, 7),), (1,)))
    assert tuple(folded.shape) == (4, 7) and axis == 1


def test_features_of_blocks_by_hand():
    x = torch.arange(2 * 3 * 5 * 4.0).reshape(2, 3, 5, 4)  # [N, heads, T, width]
    tensor, axis = features(x, Tap("n", 3, 0, -1, ((-1,), (3,), (5,), (4,)), features=(1, 3)))
    assert tuple(tensor.shape) == (2, 5, 12) and axis == 2
    assert torch.equal(tensor[1, 2], x[1, :, 2].reshape(12))
    joined = x.transpose(1, 2).reshape(2, 5, 12)  # heads and width on one axis: nothing moves
    same, axis = features(joined, Tap("n", 2, 0, -1, ((-1,), (5,), (3, 4)), features=(2, 3)))
    assert torch.equal(same, joined) and axis == 2
    assert same.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    # heads alone: the order of the widths differs between models, so that only what no order changes is kept
    heads, axis = features(x, Tap("n", 1, 0, -1, ((-1,), (3,), (5,), (4,)), features=(1,), averaged=(3,)))
    assert tuple(heads.shape) == (2, 2, 3, 5, 1) and axis == 2
    assert torch.equal(heads[0, ..., 0], x.mean(3)) and torch.equal(heads[1, ..., 0], x.square().mean(3))
    shuffled, _ = features(x[..., [2, 0, 3, 1]], Tap("n", 1, 0, -1, ((-1,), (3,), (5,), (4,)), (1,), (3,)))
    torch.testing.assert_close(shuffled, heads)


@pytest.mark.parametrize(
    "tap",
    [
        Tap("n", 1, 3, 12, ((-1,), (12,)), (1,)),
        Tap("n", 1, 0, -1, ((-1,), (-1, 5)), (2,)),
        Tap("n", 1, 0, -1, ((-1,), (7,)), (1,)),
    ],
)
def test_features_that_do_not_fit(tap):
    with pytest.raises(ValueError, match=r"features: axis 1 of 'value' must .* got size 14"):
        features(torch.zeros(2, 14), tap)


def test_batch_folded_into_the_feature_axis_runs_at_any_size():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):  # [N, T, 4]
            y = F.relu(self.a(x)).reshape(-1, 6)
            return self.b(y).reshape(x.shape[0], -1, 3)

    net = Folded().eval()
    tapped = Tapped(find_spaces(net, (torch.randn(2, 5, 4),)))
    for n in (1, 7):
        x = torch.randn(n, 5, 4)
        output, values = tapped.run(net.state_dict(), x)
        torch.testing.assert_close(output, net(x))
        assert [tuple(v.shape) for v in values.values()] == [(n * 5, 6)]


def test_state_and_constants_meet_on_the_device_of_the_state():
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = x + torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.arange(4, device=x.device)
            return self.b(F.relu(self.a(x)) * torch.full((6,), 2.0, device=x.device))

    net = Made().eval()
    tapped = Tapped(find_spaces(net, (torch.randn(2, 4),)))
    state = {name: value.to("meta") for name, value in net.state_dict().items()}  # stands in for any other device
    output, values = tapped.run(state, torch.empty(5, 4, device="meta"))
    assert output.is_meta and output.shape == (5, 3) and all(value.is_meta for value in values.values())
