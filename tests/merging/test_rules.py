# SPDX-License-Identifier: Apache-2.0
"""One line per op: what it leaves of a convolution's six channels, and that permuting what is left changes nothing."""

import re

import pytest
import torch
from nets import permute_state, random_permutations, randomise
from torch import nn
from torch.nn import functional as F

from zipfast.merging import find_spaces
from zipfast.merging.flow import RULES


class Between(nn.Module):
    """conv a (6 channels on 8x8 pixels) -> the op -> conv b."""

    def __init__(self, op, channels):
        super().__init__()
        self.a, self.b, self.op = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(channels, 3, 1), op
        self.slope, self.depth = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(6, 1, 2, 2))
        self.spread, self.matrix = nn.Parameter(torch.rand(6, 2, 2, 2)), nn.Parameter(torch.rand(6, 5))

    def forward(self, x):
        return self.b(self.op(self.a(x), self))


def assign(x, _):
    x = x.clone()
    x[:, :2] = 0
    return x


FREE = ()
# op -> (function, channels after it, sizes of the spaces of a that may be permuted, reasons if there are none)
OPS = {
    "relu_": (lambda x, m: F.relu_(x), 6, [6], FREE),
    "clamp": (lambda x, m: x.clamp(-1, 1).abs().sqrt().maximum(x), 6, [6], FREE),
    "where": (lambda x, m: torch.where(x > 0, x, x * m.slope[:, None, None]), 6, [6], FREE),
    "prelu": (lambda x, m: F.prelu(x, m.slope), 6, [6], FREE),
    "prelu one": (lambda x, m: F.prelu(x, m.slope[:1] * 0 + 0.2), 6, [6], FREE),
    "max of two": (lambda x, m: torch.max(x, x.neg()), 6, [6], FREE),
    "softmax": (lambda x, m: x.softmax(1), 6, [6], FREE),
    "channel mean": (lambda x, m: x - x.mean(1, keepdim=True), 6, [6], FREE),
    "norm": (lambda x, m: x / x.norm(2, 1, keepdim=True), 6, [6], FREE),
    "vector norm": (lambda x, m: F.normalize(x, dim=1), 6, [6], FREE),
    "amax": (lambda x, m: x.amax((2, 3), keepdim=True), 6, [6], FREE),
    "max along pixels": (lambda x, m: x.max(3, keepdim=True).values, 6, [6], FREE),
    "max along channels": (lambda x, m: x.max(1, keepdim=True).values, 1, [], ("position",)),
    "layer norm": (lambda x, m: F.layer_norm(x.permute(0, 2, 3, 1), (6,), m.slope).permute(0, 3, 1, 2), 6, [6], FREE),
    "group norm": (lambda x, m: F.group_norm(x, 3, m.slope), 6, [3, 2], FREE),
    "instance norm": (lambda x, m: F.instance_norm(x), 6, [6], FREE),
    "max pool": (lambda x, m: F.max_pool2d(x, 2), 6, [6], FREE),
    "max pool indices": (lambda x, m: F.max_pool2d(x, 2, return_indices=True)[0], 6, [6], FREE),
    "upsample": (lambda x, m: F.interpolate(x, scale_factor=2, mode="bilinear"), 6, [6], FREE),
    "nearest": (lambda x, m: F.interpolate(x, size=(5, 5)), 6, [6], FREE),
    "reflect": (lambda x, m: F.pad(x, (1, 1, 1, 1), mode="reflect"), 6, [6], FREE),
    "zero pad": (lambda x, m: F.pad(x, (1, 1)), 6, [6], FREE),
    "pad channels": (lambda x, m: F.pad(x, (0, 0, 0, 0, 1, 2), value=0.3), 9, [6], FREE),
    "crop channels": (lambda x, m: F.pad(x, (0, 0, 0, 0, -1, 0)), 5, [], ("pad",)),
    "slice pixels": (lambda x, m: x[:, :, 1:-1, ::2], 6, [6], FREE),
    "slice channels": (lambda x, m: x[:, 2:], 4, [2, 4], FREE),
    "narrow": (lambda x, m: x.narrow(1, 1, 3), 3, [3, 2], FREE),
    "stride channels": (lambda x, m: x[:, ::2], 3, [], ("slice",)),
    "assign": (assign, 6, [2, 4], FREE),
    "split": (lambda x, m: torch.cat([part * i for i, part in enumerate(x.split([2, 4], 1), 1)], 1), 6, [2, 4], FREE),
    "swap halves": (lambda x, m: torch.cat(x.chunk(2, 1)[::-1], 1), 6, [3, 3], FREE),
    "glu": (lambda x, m: x[:, :3] * torch.sigmoid(x[:, 3:]), 3, [3], FREE),
    "select": (lambda x, m: x + x[:, 3:4] * 0 + x[:, 2].unsqueeze(1), 6, [], ("select",)),
    "unbind": (lambda x, m: torch.stack(x.unbind(1)[::-1], 1), 6, [], ("select",)),
    "stack": (lambda x, m: torch.stack([x, 2 * x], 2).flatten(1, 2), 12, [6], FREE),
    "index": (lambda x, m: x[:, torch.tensor([5, 0, 2])], 3, [], ("table index",)),
    "index select": (lambda x, m: x.index_select(1, torch.tensor([5, 0])), 2, [], ("table index",)),
    "index pixels": (lambda x, m: x[:, :, torch.tensor([5, 0, 2])], 6, [6], FREE),
    "roll": (lambda x, m: x.roll(1, 1), 6, [], ("order",)),
    "roll pixels": (lambda x, m: x.roll((1, 2), (2, 3)), 6, [6], FREE),
    "flip": (lambda x, m: x.flip(1), 6, [], ("order",)),
    "cumsum": (lambda x, m: x.cumsum(1), 6, [], ("order",)),
    "flatten pixels": (
        lambda x, m: x.flatten(2).transpose(1, 2).reshape(-1, 8, 8, 6).permute(0, 3, 1, 2),
        6,
        [6],
        FREE,
    ),
    "movedim": (lambda x, m: x.movedim(1, -1).tanh().movedim(-1, 1), 6, [6], FREE),
    "space to depth": (
        lambda x, m: x.reshape(-1, 6, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(-1, 24, 4, 4),
        24,
        [6],
        FREE,
    ),
    "shuffle": (lambda x, m: x.view(-1, 2, 3, 8, 8).transpose(1, 2).reshape(-1, 6, 8, 8), 6, [2, 3], FREE),
    "pixel shuffle": (
        lambda x, m: F.pixel_shuffle(x.unsqueeze(2).expand(-1, -1, 4, -1, -1).flatten(1, 2), 2),
        6,
        [6],
        FREE,
    ),
    "pixel shuffle across": (lambda x, m: F.pixel_shuffle(torch.cat([x, x], 1), 2), 3, [], ("layout conflict",)),
    "pixel shuffle within": (lambda x, m: F.pixel_shuffle(x[:, :4], 2), 1, [2], FREE),
    "mixed reshape": (lambda x, m: x.reshape(-1, 4, 12, 8), 4, [], ("reshape",)),
    "rows of channels": (lambda x, m: x.reshape(-1, 2, 24, 8), 2, [2], FREE),
    "pool of channels": (lambda x, m: F.avg_pool1d(x.flatten(2).transpose(1, 2), 2)[:, :3, None], 3, [], ("spatial",)),
    "upsampled channels": (
        lambda x, m: F.interpolate(x.flatten(2).transpose(1, 2), scale_factor=2)[:, :3, None],
        3,
        [],
        ("spatial",),
    ),
    "expand": (lambda x, m: x.mean(1, keepdim=True).expand(-1, 4, -1, -1).contiguous(), 4, [6], FREE),
    "squeeze": (lambda x, m: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze().reshape(-1, 6, 1, 1), 6, [6], FREE),
    "zeros like": (lambda x, m: x + torch.ones_like(x) * x.new_full((6, 1, 1), 2.0), 6, [6], FREE),
    "transposed depthwise": (lambda x, m: F.conv_transpose2d(x, m.depth, m.slope, 2, groups=6), 6, [6], FREE),
    "transposed grouped": (lambda x, m: F.conv_transpose2d(x, m.spread, None, 2, groups=3), 6, [3, 2], FREE),
    "matmul": (lambda x, m: (x.permute(0, 2, 3, 1) @ m.matrix).permute(0, 3, 1, 2), 5, [6], FREE),
    "matrix on the left": (
        lambda x, m: (m.matrix.t() @ x.flatten(2)).reshape(-1, 5, 8, 8),
        5,
        [6],
        FREE,
    ),
    "gram": (lambda x, m: (x.flatten(2) @ x.flatten(2).mT).mean(2)[:, :, None, None], 6, [6], FREE),
    "addmm": (
        lambda x, m: torch.addmm(m.slope[:5] * 0, x.mean((2, 3)), m.matrix)[:, :, None, None],
        5,
        [6],
        FREE,
    ),
}


@pytest.mark.parametrize("op", OPS)
def test_op(op):
    function, channels, sizes, reasons = OPS[op]
    torch.manual_seed(0)
    net = randomise(Between(function, channels).double().eval())
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    plan = find_spaces(net, (x,)).plan
    made = [space for space in plan.spaces if "a.weight" in space.params("produce")]
    assert [space.size for space in made if not space.frozen] == sizes, str(plan)
    if reasons:
        assert reasons[0] in {reason for space in made for reason in space.frozen}, str(plan)
    state = net.state_dict()
    moved = permute_state(state, plan, random_permutations(plan))
    with torch.no_grad():
        got, want = (torch.func.functional_call(net, s, (x,)) for s in (moved, state))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    assert not sizes or max(sizes) == 1 or not torch.equal(moved["a.weight"], state["a.weight"])


@pytest.mark.parametrize(
    ("op", "flags"),
    [
        ("relu_", ()),
        ("softmax", ("softmax",)),
        ("channel mean", ("mean",)),
        ("layer norm", ("norm",)),
        ("gram", ("mean",)),
        ("correlate", ("contract",)),
        ("amax", ()),
    ],
)
def test_flags(op, flags):
    correlate = (lambda x, m: (x.flatten(2).mT @ x.flatten(2)).reshape(-1, 64, 8, 8), 64)
    function, channels = correlate if op == "correlate" else OPS[op][:2]
    plan = find_spaces(Between(function, channels), (torch.randn(2, 1, 8, 8),)).plan
    assert plan["a"].flags == flags and not plan["a"].frozen


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda flow, node, x: flow.axes(x)[:1], r"the rule of 'i0' must return the sizes \[2, 6, 8, 8\] .*got \[2\]"),
        (lambda flow, node: [], r"op 'aten.i0.default' at node 'i0' does not fit its rule \(TypeError: "),
    ],
)
def test_a_wrong_rule_is_named(monkeypatch, answer, match):
    for name in ("i0", "special_i0"):
        monkeypatch.setitem(RULES, name, answer)
    with pytest.raises(ValueError, match=match):
        find_spaces(Between(lambda x, m: torch.i0(x), 6), (torch.randn(2, 1, 8, 8),))


def test_every_rule_says_what_it_unifies():
    for name, function in RULES.items():
        assert function.__doc__ and re.match(r"[A-Z0-9a-z].*", function.__doc__), name
