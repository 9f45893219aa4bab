# SPDX-License-Identifier: Apache-2.0
"""A plan is right if permuting any of its spaces leaves the function alone, and complete if no use can be left out."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import NETS, build, output_of, permute_state, random_permutations, randomise
from torch import nn
from torch.nn import functional as F

from zipfast import zoo
from zipfast.merging import UnknownOpError, Use, find_spaces, rule
from zipfast.merging.rules import RULES

EXACT = 1e-9  # double precision; worst seen 4.4e-16 (squeeze_excite), a left-out use moves outputs by >= 4.6e-5


@pytest.fixture(scope="module", params=NETS)
def case(request):
    net, x = build(request.param)
    return request.param, net, x, find_spaces(net, (x,)).plan


def run(net, state, x):
    with torch.no_grad():
        return output_of(torch.func.functional_call(net, state, (x,), tie_weights=False))


def test_permuting_all_spaces_leaves_the_function(case):
    _, net, x, plan = case
    state = net.state_dict()
    moved = permute_state(state, plan, random_permutations(plan))
    changed = [name for name in state if not torch.equal(state[name], moved[name])]
    assert len(changed) > len(plan.mergeable)
    torch.testing.assert_close(run(net, moved, x), run(net, state, x), rtol=0, atol=EXACT)


def test_each_space_alone_leaves_the_function(case):
    _, net, x, plan = case
    state = net.state_dict()
    want = run(net, state, x)
    for space in plan.mergeable:
        name = space.name
        got = run(net, permute_state(state, plan, random_permutations(plan, only=[name])), x)
        torch.testing.assert_close(got, want, rtol=0, atol=EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_no_use_can_be_left_out(case):
    _, net, x, plan = case
    state = net.state_dict()
    want = run(net, state, x)
    for space in plan.mergeable:
        alone = random_permutations(plan, only=[space.name])
        for i, use in enumerate(space.uses):
            got = run(net, permute_state(state, plan, alone, skip=(space.name, i)), x)
            assert (got - want).abs().max() > 1e-7, f"{space.name}: {use} could be left out"


def test_roles_tell_how_features_merge(case):
    # Where feature j repeats feature i, the two merge exactly: consumers add j's part to i's and ignore j.
    _, net, x, plan = case
    tested = 0
    for space in plan.mergeable:
        if space.flags:
            continue
        twin, folded = dict(net.state_dict()), {}
        for use in space.uses:
            if use.role != "consume":
                value, at = twin[use.param].clone().movedim(use.axis, 0), places_of(twin[use.param], use, space.size)
                value[at[:, 1]] = value[at[:, 0]]
                twin[use.param] = value.movedim(0, use.axis)
        folded = dict(twin)
        for use in space.uses:
            if use.role == "consume":
                value, at = folded[use.param].clone().movedim(use.axis, 0), places_of(twin[use.param], use, space.size)
                value[at[:, 0]] += value[at[:, 1]]
                value[at[:, 1]] = 0
                folded[use.param] = value.movedim(0, use.axis)
        torch.testing.assert_close(run(net, folded, x), run(net, twin, x), rtol=0, atol=EXACT)
        tested += not torch.equal(run(net, twin, x), run(net, net.state_dict(), x))  # dead features show nothing
    assert tested >= sum(not space.flags for space in plan.mergeable) / 2


def places_of(tensor, use, size):
    """Positions along a use's axis of each feature, [outer*block, size]."""
    segment = torch.arange(tensor.shape[use.axis])[use.offset : use.offset + use.outer * size * use.block]
    return segment.view(use.outer, size, use.block).transpose(1, 2).reshape(-1, size)


def test_number_of_mergeable_spaces(case):
    name, _, _, plan = case
    assert len(plan.mergeable) == NETS[name][2], str(plan)


def test_every_mergeable_space_is_produced_and_tapped(case):
    _, _, _, plan = case
    for space in plan.mergeable:
        assert space.params("produce") and space.taps, space
        assert space.size > 1


def test_every_parameter_axis_is_accounted_for(case):
    # Each axis of each parameter is covered exactly once by uses, but for kernels (which stay) and single features.
    _, net, _, plan = case
    covered = {}
    for space in plan.spaces:
        for use in space.uses:
            covered.setdefault((use.param, use.axis), []).append((use, space.size))
    for name, param in net.named_parameters():
        for axis in range(min(param.dim(), 2)):
            if param.shape[axis] == 1:
                continue
            grid = torch.zeros(param.shape[axis], dtype=torch.long)
            for use, size in covered[name, axis]:
                if use.outer == 1:
                    grid[use.offset : use.offset + size * use.block] += 1
            assert grid.min() >= 1, f"{name} axis {axis} is not in the plan"


def test_resnet20_has_the_spaces_of_the_paper():
    # Two per block inside (here one: basic blocks) and one per residual stream: 9 + 3, plus the frozen head.
    plan = find_spaces(zoo.resnet(3), (torch.randn(1, 1, 8, 8),)).plan
    sizes = [(space.name, space.size) for space in plan.mergeable]
    assert len(sizes) == 12
    assert sizes[0] == ("conv1", 16)
    assert ("stages.1.0.conv2", 32) in sizes and ("stages.2.2.conv1", 64) in sizes
    stream = plan["conv1"]
    assert stream.params("produce") == ("conv1.weight", *(f"stages.0.{i}.conv2.weight" for i in range(3)))
    assert "stages.1.0.shortcut.0.weight" in stream.params("consume")
    assert {use.param for use in stream.uses if use.role == "ride"} >= {"bn1.running_mean", "bn1.running_var"}
    assert [space.frozen for space in plan.frozen] == [("output",)]


def test_a_square_weight_inside_one_space_keeps_both_roles():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.step, self.end = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x):
            x = self.start(x)
            return self.end(x + F.relu(self.step(x)))

    (space,) = find_spaces(Loop(), (torch.randn(2, 3),)).plan.mergeable
    roles = {(use.param, use.axis): use.role for use in space.uses}
    assert roles["step.weight", 0] == "produce" and roles["step.weight", 1] == "consume"


def test_flatten_gives_blocks_and_cat_gives_offsets():
    net, x = build("vgg_bn_flatten")
    space = find_spaces(net, (x,)).plan["features.7"]
    assert Use("classifier.0.weight", 1, "consume", offset=0, outer=1, block=4) in space.uses
    net, x = build("unet")
    plan = find_spaces(net, (x,)).plan
    offsets = {s.name: u.offset for s in plan.spaces for u in s.uses if (u.param, u.axis) == ("join.0.weight", 1)}
    assert offsets == {"stem.0": 0, "up": 6}


def test_frozen_spaces_say_why():
    net, x = build("volume")
    reasons = {reason for space in find_spaces(net, (x,)).plan.frozen for reason in space.frozen}
    assert reasons == {"output"}
    net, x = build("separable")
    frozen = {space.name: space.frozen for space in find_spaces(net, (x,)).plan.frozen}
    assert frozen == {"stem.input": ("input",), "head": ("output",)}


def test_flags_tell_permutation_from_merge():
    net, x = build("sequence_1d")
    plan = find_spaces(net, (x,)).plan
    assert {space.name: space.flags for space in plan.mergeable if space.flags} == {
        "conv2.blocks": ("blocks", "norm"),
        "conv2": ("norm",),
    }


def test_tied_weights_are_permuted_and_reuse_is_free():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4)
            self.table = nn.Embedding(7, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.table.weight

        def forward(self, index):
            x = F.relu(self.inner(F.relu(self.inner(self.table(index)))))  # applied twice: one space for in and out
            return self.out(self.decode(F.relu(self.encode(x))))

    net = randomise(Tied().double().eval())
    index = torch.randint(7, (3, 5))
    plan = find_spaces(net, (index,)).plan
    assert plan.aliases == {"table.weight": ("out.weight",)}
    assert [(space.name, space.flags) for space in plan.mergeable] == [("inner", ("tied",)), ("encode", ())]
    state = net.state_dict()
    moved = permute_state(state, plan, random_permutations(plan))
    torch.testing.assert_close(run(net, moved, index), run(net, state, index), rtol=0, atol=EXACT)


def test_a_weight_used_forth_and_back_is_flagged():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.end = nn.Linear(3, 4), nn.Linear(4, 2)
            self.weight = nn.Parameter(torch.randn(6, 4))

        def forward(self, x):
            return self.end(F.linear(F.relu(F.linear(self.start(x), self.weight)), self.weight.t()))

    plan = find_spaces(Autoencoder(), (torch.randn(2, 3),)).plan
    assert not plan["weight"].frozen and plan["weight"].flags == ("tied",)
    assert [space.name for space in plan.mergeable] == ["weight", "weight:2"]


def test_unused_parameters_and_constant_buffers_are_listed():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(3, 3)
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("scale", torch.rand(6))

        def forward(self, x):
            return self.b(self.a(self.norm(x)) * self.scale)

    plan = find_spaces(Odd(), (torch.randn(2, 4),)).plan
    assert plan.constants == ("scale",)
    assert plan.statistics == ("norm.running_mean", "norm.running_var")
    assert plan["a"].frozen == ("constant",)
    assert plan["spare"].frozen == ("unused",)


def test_weight_norm_is_flagged_and_permutes():
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)),
        nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
    ).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    plan = find_spaces(net, (x,)).plan
    assert [(space.name, space.flags) for space in plan.mergeable] == [("0", ("norm", "reparametrised"))]
    state = net.state_dict()
    moved = permute_state(state, plan, random_permutations(plan))
    torch.testing.assert_close(run(net, moved, x), run(net, state, x), rtol=0, atol=EXACT)


def test_unknown_op_names_op_node_and_remedy():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.c(F.relu(self.b(torch.fft.fft(self.a(x)).real)))

    x = torch.randn(2, 4)
    with pytest.raises(
        UnknownOpError, match=r"no rule for op 'aten\.fft_fft' at node 'fft_fft'; add one with .*rule or"
    ):
        find_spaces(Odd(), (x,))
    plan = find_spaces(Odd(), (x,), unknown="freeze").plan
    assert [space.name for space in plan.mergeable] == ["b"]
    assert plan["a"].frozen == ("unknown op fft_fft",)


def test_ops_on_frozen_data_need_no_rule():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(torch.fft.fft(x).real))

    assert [space.name for space in find_spaces(Odd(), (torch.randn(2, 4),)).plan.mergeable] == ["a"]


def test_a_rule_can_be_added():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.special.i0(self.a(x)))

    try:
        rule("i0", "special_i0")(lambda flow, node, x: list(flow.axes(x)))
        assert [space.name for space in find_spaces(Odd(), (torch.randn(2, 4),)).plan.mergeable] == ["a"]
    finally:
        del RULES["i0"], RULES["special_i0"]


def test_uncapturable_model_is_one_sentence():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(
        ValueError, match=r"find_spaces: torch.export cannot capture Branch \(.+\); check that the"
    ) as e:
        find_spaces(Branch(), (torch.randn(2, 4),))
    assert "\n" not in str(e.value)


def test_bad_arguments():
    net = zoo.mlp(4, (3,), 2)
    with pytest.raises(TypeError, match="'example_inputs' must be a tuple, got Tensor"):
        find_spaces(net, torch.randn(2, 4))
    with pytest.raises(ValueError, match="'unknown' must be 'error' or 'freeze', got 'guess'"):
        find_spaces(net, (torch.randn(2, 4),), unknown="guess")
    with pytest.raises(ValueError, match=r"'example_inputs' must fit Sequential\.forward"):
        find_spaces(net, (torch.randn(2, 4), 1, 2))


def test_model_is_left_as_it_was():
    net = zoo.resnet(1, width=0.25)
    net.train()
    net.bn1.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    find_spaces(net, (torch.randn(2, 1, 8, 8),))
    assert [m.training for m in net.modules()] == modes
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_two_runs_and_two_batch_sizes_give_one_plan():
    net, x = build("resnet_basic")
    plan = find_spaces(net, (x,)).plan
    assert find_spaces(net, (x,)).plan == plan
    assert find_spaces(net, (x[:1],)).plan == plan
    plan.same_spaces(find_spaces(build("resnet_basic", seed=1)[0], (x,)).plan)


def test_last_stream_is_read_before_the_global_pool():
    net, x = build("resnet_basic")
    graph = find_spaces(net, (x,))
    (tap,) = graph.plan["stages.2.0.conv2"].taps
    (node,) = [n for n in graph.program.graph.nodes if n.name == tap.node]
    assert tuple(node.meta["val"].shape[1:]) == (16, 2, 2)
