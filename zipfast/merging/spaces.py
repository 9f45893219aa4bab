# SPDX-License-Identifier: Apache-2.0
"""From a model to its merge plan: which axes of which parameters share a feature space.

`find_spaces` exports the model's forward pass once (`graph.py`), walks the graph with one rule per op (`rules.py`), which
unifies the axes that must agree (`layout.py`), and reads off the result as plain data (`reading.py`, `plan.py`). What
remains of each set of unified axes is a space: the axes that produce, consume and ride it, the values at which its
features are best observed (`observe.py`), and, if it must stay as it is, the reasons.

Cost: one export on the example inputs (0.1-2 s) and a walk over the graph; the weights are never read or changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch  # noqa: F401  (the doctests read it)
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node

from . import rules, rules_shapes  # noqa: F401  (importing them fills the table of rules)
from .flow import RULES, Flow, UnknownOpError, apply_rule, op_name, shape_of
from .graph import Exported, Graph, export
from .layout import freeze, frozen_atom, one, own_atom, settle, size_of
from .reading import Region, is_statistic, read_plan

__all__ = ["RULES", "Graph", "find_spaces", "part_of"]


def find_spaces(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    unknown: Literal["error", "freeze"] = "error",
) -> Graph:
    """Find the feature spaces of a model: which tensor axes must be permuted or merged together.

    The forward pass is exported in eval mode without gradients; axis 0 of every tensor input is taken as the batch and
    may have any size later.

    Args:
        model: left as it is, train mode included.
        example_inputs: positional arguments of its forward; a batch of 1 is repeated to 2, as an exporter may bake
            a size of 1 into the graph.
        example_kwargs: keyword arguments of its forward.
        unknown: what to do with an op that has no rule: 'error', or 'freeze' all features that reach it.

    Returns:
        The plan and the exported program.

    Raises:
        UnknownOpError: an op has no rule, and `unknown` is 'error'.
        ValueError: the model cannot be exported, or two axes that must agree differ in size.

    Cost: one export, 0.1-2 s for models up to ViT-B and ResNet-50; deterministic.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> [(space.name, space.size) for space in find_spaces(net, (torch.randn(2, 4),)).plan.mergeable]
        [('0', 8)]

    Reference: Stoica et al. 2024 (ZipIt!), §4.2 and App. B, where the graph is written by hand.
    """
    if unknown not in ("error", "freeze"):
        raise ValueError(f"find_spaces: 'unknown' must be 'error' or 'freeze', got {unknown!r}")
    if not isinstance(example_inputs, tuple):
        raise TypeError(f"find_spaces: 'example_inputs' must be a tuple, got {type(example_inputs).__name__}")
    exported = export(model, example_inputs, example_kwargs)
    return _find(exported, unknown, None, None)


def part_of(graph: Graph, *, start: str | None = None, stop: str | None = None) -> Graph:
    """The plan of the part of a model between the values of two nodes; see `cuts.resolve_cut` for their names.

    Spaces beyond the part are not in its plan, and what lies behind `stop` (a tied head, a norm) does not limit it.

    Raises:
        KeyError: no node of that name.
    """
    return _find(graph.exported, graph.unknown, start, stop)


def _find(exported: Exported, unknown: str, start: str | None, stop: str | None) -> Graph:
    region = Region(
        exported,
        None if start is None else exported.by_name[start],
        None if stop is None else exported.by_name[stop],
    )
    flow = walk(exported, unknown, region)
    return Graph(read_plan(flow, region), exported, unknown, start, stop)


def walk(
    exported: Exported, unknown: str, region: Region, visit: Callable[[Flow, Node], None] = lambda flow, node: None
) -> Flow:
    """Run the rules up to the end of a region; `visit` sees each op's node when what lies before it is known."""
    flow = Flow()
    _enter(flow, exported, region)
    for node in exported.nodes:
        if exported.order[node] > region.last:
            break
        if node.op == "output":
            for source in node.all_input_nodes:
                for axis in flow.layouts[source]:
                    freeze(axis, "output")
        elif node.op == "get_attr":
            is_tensor = isinstance(node.meta.get("val"), Tensor)
            flow.layouts[node] = flow.fresh(node, "constant") if is_tensor else []
        elif node.op == "call_function":
            _step(flow, node, unknown)
            visit(flow, node)
    settle(flow.stacks)
    return flow


def _enter(flow: Flow, exported: Exported, region: Region) -> None:
    """Layouts of the graph's inputs: parameters and norm statistics are free, all else is frozen."""
    twins = exported.twins
    specs = exported.program.graph_signature.input_specs
    nodes = [node for node in exported.nodes if node.op == "placeholder"]
    first: dict[tuple[str, ...], Node] = {}
    used = {
        twins[str(spec.target)]
        for node, spec in zip(nodes, specs)
        if str(spec.target) in twins and any(exported.order[user] <= region.last for user in node.users)
    }
    for node, spec in zip(nodes, specs):
        name = str(spec.target)
        if not isinstance(node.meta.get("val"), Tensor):
            flow.layouts[node] = []
        elif spec.kind is InputKind.USER_INPUT:
            flow.layouts[node] = flow.fresh(node, "input")
        elif name in twins and (spec.kind is InputKind.PARAMETER or is_statistic(node)):
            same = first.setdefault(twins[name], node)  # tied tensors are one tensor: one layout for all their names
            if same is node:
                free = twins[name] in used
                flow.layouts[node] = [
                    one() if size == 1 else own_atom(size) if free else frozen_atom(size, "unused")
                    for size in shape_of(node)
                ]
            else:
                flow.layouts[node] = flow.layouts[same]
            flow.roots[node] = name
            flow.weights[node] = frozenset([same])
        else:
            flow.layouts[node] = flow.fresh(node, "constant")


def _step(flow: Flow, node: Node, unknown: str) -> None:
    value, name = node.meta.get("val"), op_name(node)
    if name == "getitem" and isinstance(node.args[0], Node) and isinstance(flow.layouts[node.args[0]], list):
        flow.layouts[node] = flow.layouts[node.args[0]][node.args[1]]
    elif not isinstance(value, Tensor | tuple | list):
        flow.layouts[node] = []  # sizes and assertions
        return
    else:
        try:
            flow.layouts[node] = apply_rule(flow, node, unknown)
        except UnknownOpError:
            raise
        except Exception as error:  # a call form that the rule does not know; the node says where to look
            raise ValueError(
                f"find_spaces: op '{node.target}' at node '{node.name}' does not fit its rule "
                f"({type(error).__name__}: {error}); please report it, or give the op a rule of your own"
            ) from error
    tensors = [source for source in node.all_input_nodes if flow.layouts[source]]
    made_of = [flow.weights.get(source) for source in tensors if source.op != "get_attr"]
    if made_of and all(made_of):
        flow.weights[node] = frozenset(root for roots in made_of if roots for root in roots)
    if isinstance(value, Tensor):
        seen = [size_of(axis) for axis in flow.layouts[node]]
        if seen != shape_of(node):
            raise ValueError(
                f"find_spaces: the rule of '{name}' must return the sizes {shape_of(node)} at node '{node.name}', "
                f"got {seen}"
            )
