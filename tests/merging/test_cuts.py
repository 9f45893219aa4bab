# SPDX-License-Identifier: Apache-2.0
"""A cut is valid if all flow passes it: handing its value over from another input hands over that input's output."""

from __future__ import annotations

import functools

import pytest
import torch
from hf_nets import case, others
from nets import UNet, build
from torch import Tensor, nn
from torch.fx import Interpreter
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import zipfast
from zipfast import zoo
from zipfast.merging import Cut, cuts, find_spaces, part_of, resolve_cut

NAMES = [
    "mlp",
    "vgg",
    "vgg_bn_flatten",
    "resnet_basic",
    "resnet_bottleneck",
    "unet",
    "squeeze_excite",
    "option_a",
    "sequence_1d",
    "vit",
    "bert",
    "gpt2",
    "encoder_layer",
]


@functools.cache
def graph_of(name):
    net, args, kwargs = case(name)
    return net, args, kwargs, find_spaces(net, args, kwargs)


class Recorded(Interpreter):
    """Runs the exported graph up to a node with given values, behind it with its own."""

    def __init__(self, module, given=None):
        super().__init__(module, garbage_collect_values=False)
        self.given, self.seen = given or {}, {}

    def run_node(self, n):
        value = super().run_node(n) if n.name not in self.given else copy_of(self.given[n.name])
        self.seen[n.name] = copy_of(value)  # before anything writes to it
        return value


def copy_of(value):
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def record(graph, state, args, kwargs, given=None):
    program = graph.program
    feed = iter(v for v in tree_leaves((args, list(kwargs.values()))) if isinstance(v, Tensor))
    values = []
    for spec in program.graph_signature.input_specs:
        name = str(spec.target)
        if spec.kind.name == "USER_INPUT":
            values.append(next(feed) if not hasattr(spec.arg, "value") else spec.arg.value)
        else:
            values.append(state[name] if name in state else program.constants.get(name, program.state_dict.get(name)))
    run = Recorded(program.graph_module, given)
    with torch.no_grad():
        return run, next(v for v in run.run(*copy_of(values)) if isinstance(v, Tensor))


def same(a, b):
    pairs = list(zip(tree_leaves(a), tree_leaves(b)))
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_is_valid_if_its_value_decides_the_output(name):
    """Values that depend on the inputs alone do not count: both sides of a cut compute them."""
    net, args, kwargs, graph = graph_of(name)
    state = net.state_dict()
    other_state = {key: value * 1.5 if value.is_floating_point() else value for key, value in state.items()}
    first, second = others(args, kwargs, 4, seed=1), others(args, kwargs, 4, seed=2)
    of_first, own = record(graph, state, *first)
    of_second, wanted = record(graph, state, *second)
    of_weights, _ = record(graph, other_state, *second)
    assert (own - wanted).abs().max() > 1e-3
    nodes = [n for n in graph.program.graph.nodes if n.op == "call_function"]
    valid, given = [], {}
    for node in nodes:
        by_inputs = not same(of_first.seen[node.name], of_second.seen[node.name])
        by_weights = not same(of_weights.seen[node.name], of_second.seen[node.name])
        given[node.name] = (of_first if by_weights else of_second).seen[node.name]
        if by_inputs and by_weights and isinstance(node.meta["val"], Tensor):
            _, got = record(graph, state, *second, {**given, node.name: of_second.seen[node.name]})
            if torch.allclose(got, wanted, rtol=0, atol=1e-9):
                valid.append(node)
    found = [cut.node for cut in cuts(graph)]
    assert found and set(found) <= {node.name for node in valid}
    for node in valid:
        if node.name not in found:  # nothing to merge before it, no weights behind it, or no feature axis of its own
            assert no_use(graph, node), f"{node.name} is a valid cut"


def no_use(graph, node):
    after = nodes_behind(graph, node)
    reads = {source.name for other in after for source in other.all_input_nodes if source.op == "placeholder"}
    if not any(name.startswith("p_") for name in reads) or node.meta["val"].dim() < 2:
        return True
    try:
        return not part_of(graph, stop=node.name).plan.exit
    except ValueError:
        return True


def nodes_behind(graph, node):
    nodes = list(graph.program.graph.nodes)
    return nodes[nodes.index(node) + 1 :]


@pytest.mark.parametrize("name", NAMES)
def test_each_cut_leaves_a_part_to_merge_and_one_to_keep(name):
    net, _, _, graph = graph_of(name)
    total = sum(p.numel() for p in net.parameters())
    shares = [cut.share for cut in cuts(graph)]
    assert shares == sorted(shares)
    for cut in cuts(graph):
        part = part_of(graph, stop=cut.node)
        assert part.plan.mergeable and part.plan.exit, cut
        assert 0 < cut.share <= 1 and cut.share == cut.parameters / total
        value = graph.exported.by_name[cut.node].meta["val"]
        assert len(cut.shape) == value.dim() and cut.shape.count(-1) == 1
        assert all(size in (-1, own) for size, own in zip(cut.shape, value.shape))


def test_table_of_an_mlp():
    _, _, _, graph = graph_of("mlp")  # 64 -> 9 -> 7 -> 5
    first, second, total = 64 * 9 + 9, 64 * 9 + 9 + 9 * 7 + 7, 64 * 9 + 9 + 9 * 7 + 7 + 7 * 5 + 5
    assert cuts(graph) == [
        Cut("linear", "1", (-1, 9), first, first / total),
        Cut("relu", "2", (-1, 9), first, first / total),
        Cut("linear_1", "3", (-1, 7), second, second / total),
        Cut("relu_1", "4", (-1, 7), second, second / total),
    ]
    assert zipfast.cuts(graph) == cuts(graph)


def test_skip_connections_leave_few():
    """The value that the skip carries goes around everything below, the concatenation included."""
    _, _, _, graph = graph_of("unet")
    assert [(cut.node, cut.module) for cut in cuts(graph)] == [
        ("conv2d", "stem.0"),
        ("batch_norm", "stem.1"),
        ("relu_", "stem.2"),
        ("cat", ""),
        ("conv2d_2", "join.0"),
        ("batch_norm_2", "join.1"),
        ("relu__1", "join.2"),
    ]


def test_residual_blocks_can_be_cut_at_their_ends_only():
    _, _, _, graph = graph_of("resnet_basic")
    inside = [cut for cut in cuts(graph) if cut.module.startswith("stages.")]
    assert {cut.module for cut in inside} == {f"stages.{i}.{j}" for i in range(3) for j in range(2)}
    assert {cut.node.split("_")[0] for cut in inside} == {"add", "relu"}


def test_masks_do_not_count():
    """The attention mask reaches every layer, but both sides of a cut have it."""
    _, _, _, graph = graph_of("bert")
    found = [cut.module for cut in cuts(graph)]
    assert {"bert.embeddings", "bert.encoder.layer.0.output", "bert.pooler.dense"} <= set(found)
    assert not any("attention.self" in module or "intermediate" in module for module in found)


def test_tied_and_reused_weights_count_once():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(F.relu(self.inner(F.relu(self.inner(F.relu(self.first(x)))))))

    graph = find_spaces(Reused(), (torch.randn(2, 4),))
    by_node = {cut.node: cut.parameters for cut in cuts(graph)}
    assert by_node == {"linear": 30, "relu": 30, "linear_1": 72, "relu_1": 72, "linear_2": 72, "relu_2": 72}
    net, _, _, graph = graph_of("gpt2")  # the embedding is the classifier: before the last cut lie all weights, it too
    last = cuts(graph)[-1]
    assert last.parameters == sum(p.numel() for p in net.parameters()) and last.share == 1


@pytest.mark.parametrize("spare", [False, True])
def test_the_end_of_the_network_is_no_cut(spare):
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softmax(1))
    if spare:
        net[1].unused = nn.Parameter(torch.zeros(11))
    found = cuts(find_spaces(net, (torch.randn(2, 4),)))
    assert [cut.node for cut in found] == ["linear", "relu"]  # behind linear_1 no weights are read
    assert [cut.share for cut in found] == [30 / (51 + 11 * spare)] * 2


def test_one_layer_has_no_cut():
    graph = find_spaces(nn.Linear(4, 3), (torch.randn(2, 4),))
    assert cuts(graph) == []
    with pytest.raises(ValueError, match=r"got 'linear', around which .* the nearest valid cuts are none"):
        resolve_cut(graph, "linear")
    with pytest.raises(ValueError, match="got 'nowhere'; valid cuts are none"):
        resolve_cut(graph, "nowhere")


def test_what_lies_behind_does_not_limit_a_cut():
    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = F.relu(self.a(x))
            x = F.relu(self.b(x.flip(1)))
            return self.c(x)

    graph = find_spaces(Ordered(), (torch.randn(2, 4),))
    assert "a" not in [space.name for space in graph.plan.mergeable]
    found = [cut.node for cut in cuts(graph)]
    assert found == ["linear", "relu", "linear_1", "relu_1"]
    assert [space.name for space in part_of(graph, stop="relu").plan.mergeable] == ["a"]


class Masked(nn.Module):
    """Makes a mask before the first layer, in place, and uses it behind the last."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        mask = torch.ones_like(x[:, :1])
        mask[0] = 0.0
        return self.c(F.relu(self.b(F.relu(self.a(x))))) * mask


class Filled(nn.Module):
    """Two branches write their halves of a buffer that was made from the input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(11, 3)

    def forward(self, x):
        buffer = torch.zeros_like(x[:, :1]).repeat(1, 11)
        buffer[:, :6] = self.a(x)
        buffer[:, 6:] = F.relu(self.b(x))
        return self.c(buffer)


def test_a_mask_written_in_place_is_no_flow():
    found = [cut.node for cut in cuts(find_spaces(Masked(), (torch.randn(3, 4),)))]
    assert found == ["linear", "relu", "linear_1", "relu_1"]


def test_flow_that_was_written_to_a_buffer_is_still_under_way():
    found = [cut.node for cut in cuts(find_spaces(Filled(), (torch.randn(3, 4),), unknown="freeze"))]
    assert found == ["linear"]  # at the second branch the first lies in the buffer already


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "given", "node"),
    [
        ("mlp", "relu_1", "relu_1"),
        ("mlp", "1", "linear"),
        ("resnet_basic", "conv1", "conv2d"),
        ("resnet_basic", "stages.1.0", "relu_6"),
        ("resnet_basic", "stages.1", "relu_8"),
        ("resnet_basic", "add_2", "add_2"),
        ("resnet_basic", "relu_2", "relu_2"),  # a node's name, not the module 'relu'
        ("vgg_bn_flatten", "features.6", "relu__1"),
        ("vgg_bn_flatten", "features", "max_pool2d_1"),
        ("unet", "stem", "relu_"),
        ("unet", "join", "relu__1"),
        ("vit", "vit.embeddings", "dropout"),
        ("vit", "vit.layers.0", "add_4"),
        ("bert", "bert.encoder.layer.1", "layer_norm_4"),
        ("bert", "bert.embeddings", "dropout"),
        ("gpt2", "transformer.h.0", "add_7"),
    ],
)
def test_names_of_nodes_and_paths_of_modules(name, given, node):
    _, _, _, graph = graph_of(name)
    assert resolve_cut(graph, given) == node


@pytest.mark.parametrize(
    ("name", "given", "near"),
    [
        ("resnet_basic", "stages.1.0.conv1", "'relu_4' (stages.0.1) and 'add_2' (stages.1.0)"),
        ("resnet_basic", "stages.1.0.shortcut", "'relu_4' (stages.0.1) and 'add_2' (stages.1.0)"),
        ("resnet_basic", "relu_1", "'relu' (the model) and 'add' (stages.0.0)"),
        ("resnet_basic", "linear", "'mean' (the model)"),
        ("unet", "down.0", "'relu_' (stem.2) and 'cat' (the model)"),
        ("unet", "up", "'relu_' (stem.2) and 'cat' (the model)"),
        ("mlp", "5", "'relu_1' (4)"),
        ("vit", "vit.layers.0.attention", "'dropout' (vit.embeddings.dropout) and 'add_3' (vit.layers.0)"),
    ],
)
def test_invalid_cuts_name_the_nearest_valid_ones(name, given, near):
    _, _, _, graph = graph_of(name)
    with pytest.raises(ValueError) as error:
        resolve_cut(graph, given, "start")
    assert str(error.value) == (
        f"merge: 'start' must be a place that all flow passes, got {given!r}, around which there is another way; "
        f"the nearest valid cuts are {near}"
    )


@pytest.mark.parametrize("given", ["nowhere", "x", "p_conv1_weight", "stages.9", "stages.1."])
def test_unknown_names(given):
    _, _, _, graph = graph_of("resnet_basic")
    with pytest.raises(ValueError) as error:
        resolve_cut(graph, given)
    assert str(error.value) == (
        f"merge: 'stop' must be a module's path or a graph node, got {given!r}; valid cuts are "
        "conv2d, batch_norm, relu, add, relu_2, add_1 and 10 more"
    )


def test_start_and_stop_of_merge_are_resolved_this_way():
    models = [build("resnet_basic", seed)[0] for seed in range(2)]
    data = [torch.randn(8, 1, 8, 8, dtype=torch.float64)]
    merged = zipfast.merge(models, (data[0],), data, start="stages.0.0", stop="stages.1")
    assert merged.options["start"] == "relu_2" and merged.options["stop"] == "relu_8"
    with pytest.raises(ValueError, match=r"'start' must be a place that all flow passes, got 'stages.0.0.bn1'"):
        zipfast.merge(models, (data[0],), data, start="stages.0.0.bn1")


def test_order_and_batch_size_do_not_matter():
    net, x = build("unet")
    assert cuts(find_spaces(net, (x,))) == cuts(find_spaces(net, (x[:1],))) == cuts(find_spaces(net, (x[:2],)))
    small = UNet()
    assert [c.node for c in cuts(find_spaces(small, (x.float(),)))] == [c.node for c in cuts(find_spaces(net, (x,)))]


def test_zoo_nets_have_one_cut_per_layer():
    vgg = find_spaces(zoo.VGG(((4,), (6, 5)), hidden=7), (torch.randn(2, 1, 8, 8),))
    assert len([c for c in cuts(vgg) if c.node.startswith("conv2d")]) == 3
    assert resolve_cut(vgg, "classifier.1") == "relu__3"
