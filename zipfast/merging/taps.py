# SPDX-License-Identifier: Apache-2.0
"""Reading the features of a plan's spaces while a model runs.

`Tapped` runs the exported program with any state dict of its architecture: one graph serves all models that are to be
merged, each through the same taps, and no model object is needed. Only tapped values are kept; all others are freed
after their last use, as in a plain forward pass. A tapped value is copied only if an in-place op may write to it later.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_unflatten

from .flow import op_name
from .graph import Graph
from .plan import Tap

# Ops that may return their input itself although their schema does not say so.
MAY_ALIAS = """
 reshape flatten unflatten contiguous to type_as dropout alpha_dropout feature_dropout chunk split split_with_sizes
 tensor_split unbind getitem expand_as view_as reshape_as numpy_T
"""


class Tapped:
    """An exported program as a function (state, inputs) -> (output, values at the taps).

    Args:
        graph: what `find_spaces` returned.
        extra: also keep the values at the spaces' extra taps.
        also: names of further nodes to keep.

    Example:
        >>> from torch import nn
        >>> from zipfast.merging import find_spaces
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> x = torch.randn(5, 4)
        >>> graph = find_spaces(net, (x,))
        >>> output, values = Tapped(graph).run(net.state_dict(), x)
        >>> bool((output == net(x)).all()), [tuple(value.shape) for value in values.values()]
        (True, [(5, 8)])
    """

    def __init__(self, graph: Graph, *, extra: bool = False, also: Iterable[str] = ()) -> None:
        self.graph = graph
        program = graph.program
        nodes = list(program.graph.nodes)
        spaces = graph.plan.mergeable
        taps = [tap for space in spaces for tap in (*space.taps, *(space.extra if extra else ()))]
        self.nodes = frozenset(tap.node for tap in taps) | frozenset(also)
        self._specs = list(program.graph_signature.input_specs)
        written = _written_later(nodes)
        self._copied = frozenset(node.name for node in nodes if node.name in self.nodes and node in written)
        self._guarded = [node in written for node in nodes if node.op == "placeholder"]
        self._short = _up_to_last(program.graph, self.nodes)
        # A tied tensor has several names; a state dict without duplicates holds one of them.
        self._twins = {name: others for name, others in graph.plan.aliases.items()}
        self._twins |= {twin: (name, *others) for name, others in graph.plan.aliases.items() for twin in others}

    def run(self, state: Mapping[str, Tensor], *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """One forward pass without gradients.

        Args:
            state: parameters and buffers by name, as in a state dict; buffers that are not in it are taken from the
                exported model, moved to the device of the state.
            inputs: positional arguments as in the example; any batch size.
            kwargs: keyword arguments as in the example. Arguments that are no tensors keep the example's value.

        Returns:
            The model's output and {node name: value} for all taps of mergeable spaces. `state` and inputs are not
            written, also not by a model that works in place.

        Raises:
            ValueError: a parameter is missing, or the tensors are not as many as in the example.
        """
        device = next((value.device for value in state.values()), torch.device("cpu"))
        placed = self.placeholders(state, device, inputs, kwargs)
        keeper = _Keeper(self.graph.program.graph_module, self.nodes, self._copied, device)
        with torch.no_grad():
            results = keeper.run(*placed)
        signature = self.graph.program.graph_signature
        flat = [
            value.value if isinstance(value := spec.arg, ConstantArgument) else result
            for spec, result in zip(signature.output_specs, results)
            if spec.kind is OutputKind.USER_OUTPUT
        ]
        spec = self.graph.program.call_spec.out_spec
        return (tree_unflatten(flat, spec) if spec is not None else flat), keeper.kept

    def values(self, state: Mapping[str, Tensor], *inputs: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The values at the taps alone, by node name; nothing behind the last of them is run. See `run`."""
        device = next((value.device for value in state.values()), torch.device("cpu"))
        placed = self.placeholders(state, device, inputs, kwargs, self._short)
        keeper = _Keeper(self.graph.program.graph_module, self.nodes, self._copied, device, self._short)
        with torch.no_grad():
            keeper.run(*placed)
        return keeper.kept

    def together(
        self, states: Sequence[Mapping[str, Tensor]], *inputs: Any, **kwargs: Any
    ) -> Iterator[tuple[str, list[Tensor]]]:
        """Run several models in step: (node name, its value in each) as soon as a tapped value is there in all.

        Each value is to be used before the next is asked for: it is not kept, and a model that works in place may write to
        it then. So the features of one place are held at a time, not those of all.
        """
        device = next((value.device for value in states[0].values()), torch.device("cpu"))
        module, short, nothing = self.graph.program.graph_module, self._short, frozenset[str]()
        runs = [_Keeper(module, self.nodes, nothing, device, short) for _ in states]
        for run, state in zip(runs, states):
            run.args_iter = iter(self.placeholders(state, device, inputs, kwargs, short))
        for node in short.nodes:
            if node.op == "output":
                return
            with torch.no_grad():
                for run in runs:
                    run.env[node] = run.run_node(node)
                    for last in run.user_to_last_uses.get(node, ()):
                        del run.env[last]
            if node.name in self.nodes:
                yield node.name, [run.kept.pop(node.name) for run in runs]

    def placeholders(
        self,
        state: Mapping[str, Tensor],
        device: torch.device,
        inputs: Any,
        kwargs: Mapping[str, Any],
        short: torch.fx.Graph | None = None,
    ) -> list[Any]:
        """Values of the graph's inputs, in order; None for those that a shortened graph does not read."""
        needs = [True] * len(self._specs)
        if short is not None:
            needs = [bool(node.users) for node in short.nodes if node.op == "placeholder"]
        keywords = self.graph.exported.keywords
        if set(kwargs) != set(keywords):
            raise ValueError(f"run: keyword arguments must be {list(keywords)} as in the example, got {list(kwargs)}")
        given = [leaf for leaf in tree_leaves((inputs, [kwargs[k] for k in keywords])) if isinstance(leaf, Tensor)]
        wanted = [s for s in self._specs if s.kind is InputKind.USER_INPUT and not isinstance(s.arg, ConstantArgument)]
        if len(given) != len(wanted):
            raise ValueError(f"run: 'inputs' must hold {len(wanted)} tensors as in the example, got {len(given)}")
        feed = iter(given)
        placed: list[Any] = []
        for spec, guarded, needed in zip(self._specs, self._guarded, needs):
            value: Any
            if spec.kind is InputKind.USER_INPUT:
                value = spec.arg.value if isinstance(spec.arg, ConstantArgument) else next(feed)
            elif not needed:
                value = None
            else:
                value = self._tensor(str(spec.target), spec.kind, state, device)
            placed.append(value.clone() if guarded and isinstance(value, Tensor) else value)
        return placed

    def _tensor(self, name: str, kind: InputKind, state: Mapping[str, Tensor], device: torch.device) -> Any:
        for key in (name, *self._twins.get(name, ())):
            if key in state:
                return state[key]
        program = self.graph.program
        value = program.constants.get(name)
        if value is None and kind is InputKind.BUFFER:
            value = program.state_dict.get(name)
        if value is None:
            raise ValueError(f"run: 'state' must hold {name!r}, got {len(state)} tensors without it")
        return value.to(device) if isinstance(value, Tensor) else value


def features(value: Tensor, tap: Tap) -> tuple[Tensor, int]:
    """A tapped value with the space's features alone on one axis, block by block; a view where that is possible.

    Returns:
        (tensor, axis) with tensor.shape[axis] == the space's total. Where other spaces lie in the value, whose order
        differs between models, their means and mean squares take the place of their features (two samples for all).

    Raises:
        ValueError: the value has no such segment.

    Example:
        >>> x = torch.randn(2, 12)  # three channels of 2x2 pixels, flattened
        >>> tensor, axis = features(x, Tap("flatten", 1, 0, -1, factors=((-1,), (3, 4)), features=(1,)))
        >>> tuple(tensor.shape), axis
        ((2, 3, 4), 1)
    """
    if tap.length != -1:
        if tap.offset + tap.length > value.shape[tap.axis]:
            raise ValueError(
                f"features: axis {tap.axis} of 'value' must hold {tap.length} positions from {tap.offset} on, "
                f"got size {value.shape[tap.axis]}"
            )
        value = value.narrow(tap.axis, tap.offset, tap.length)
    for axis in reversed(range(value.dim())):
        sizes = tap.factors[axis]
        known = math.prod(size for size in sizes if size != -1)
        if value.shape[axis] % known or (-1 not in sizes and value.shape[axis] != known and axis == tap.axis):
            raise ValueError(
                f"features: axis {axis} of 'value' must be made of {list(sizes)}, got size {value.shape[axis]}"
            )
        if len(sizes) > 1:
            value = value.unflatten(axis, sizes)
    own, gone = list(tap.features), list(tap.averaged)
    if gone:
        mean, square = value.mean(gone, keepdim=True), value.square().mean(gone, keepdim=True)
        value = torch.stack([mean, square])
        own = [dim + 1 for dim in own]
    if len(own) == 1:
        return value, own[0]
    first = min(own)
    if own != list(range(first, first + len(own))):  # several axes become one: the blocks move beside their features
        rest = [dim for dim in range(value.dim()) if dim not in own]
        value, first = value.permute(*rest, *own), len(rest)
    return value.flatten(first, first + len(own) - 1), first


class _Keeper(Interpreter):
    """Runs the graph on a device and keeps the values of the wanted nodes."""

    def __init__(
        self,
        module: Any,
        wanted: frozenset[str],
        copied: frozenset[str],
        device: torch.device,
        graph: torch.fx.Graph | None = None,
    ) -> None:
        super().__init__(module, graph=graph)
        self._wanted, self._to_copy, self._device = wanted, copied, device
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            self.kept[n.name] = value.clone() if n.name in self._to_copy else value
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("device") is not None:  # the export wrote the example's device into ops that make tensors
            kwargs = {**kwargs, "device": self._device}
        return super().call_function(target, args, kwargs)


def _up_to_last(graph: torch.fx.Graph, wanted: frozenset[str]) -> torch.fx.Graph:
    """The graph without what lies behind the last wanted node."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    last = max((i for i, node in enumerate(nodes) if node.name in wanted), default=-1)
    short, copies = torch.fx.Graph(), dict[Node, Node]()
    for i, node in enumerate(nodes):
        if i <= last or node.op == "placeholder":
            copies[node] = short.node_copy(node, lambda old: copies[old])
    short.output(None)
    return short


def _written_later(nodes: list[Node]) -> set[Node]:
    """Nodes whose memory an in-place op may write to after they are computed.

    Values that may share memory are one set; a write to a set concerns all its members computed before the write.
    """
    aliasing = frozenset(MAY_ALIAS.split())
    parent = {node: node for node in nodes}

    def find(node: Node) -> Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    writes: list[tuple[int, Node]] = []
    for i, node in enumerate(nodes):
        if node.op != "call_function":
            continue
        if op_name(node) in aliasing:
            for source in node.all_input_nodes:
                parent[find(node)] = find(source)
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args):
            if argument.alias_info is None:
                continue
            for item in value if isinstance(value, list | tuple) else [value]:
                if isinstance(item, Node):
                    parent[find(node)] = find(item)
                    if argument.alias_info.is_write:
                        writes.append((i, item))
    last = {find(target): i for i, target in writes}  # in graph order: the last write to each set stays
    return {node for i, node in enumerate(nodes) if last.get(find(node), -1) > i}
