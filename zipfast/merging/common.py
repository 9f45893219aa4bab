# SPDX-License-Identifier: Apache-2.0
"""The graph that several models share, or the one sentence that says where they differ.

Models of one architecture have one graph, so that only the first is exported; that the others have the same is shown by
running the graph with their weights on the example, which must give their own outputs. Where something differs, both are
exported and compared node by node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_map

from ..features import device_of, output_tensor
from .cuts import cuts, resolve_cut
from .flow import op_name
from .graph import Exported, Graph, export, module_path
from .spaces import find_spaces, part_of
from .taps import Tapped

TOLERANCE = 1e-3  # relative to the largest output; other graphs with the same weights differ by orders more


@dataclass(frozen=True)
class Common:
    """graph: of the part that is merged. exported: of each model; the same object where graphs are equal."""

    graph: Graph
    exported: tuple[Exported, ...]


def common_graph(
    models: Sequence[nn.Module],
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None,
    *,
    unknown: Any = "error",
    start: str | None = None,
    stop: str | None = None,
) -> Common:
    """The graph of the part of the models between two cuts, after checking that they share it.

    Without `stop`, models that differ in size behind the last valid cut, in their classifiers, are cut there.

    Raises:
        ValueError: models that differ in structure (the first node is named), a cut that does not exist, nothing to
            merge.
    """
    whole = find_spaces(models[0], example_inputs, example_kwargs, unknown=unknown)
    exported = [whole.exported]
    for model in models[1:]:
        if _looks_alike(models[0], model) and _computes(whole, model, example_inputs, example_kwargs):
            exported.append(whole.exported)
        else:
            exported.append(export(model, example_inputs, example_kwargs))
    begin = None if start is None else resolve_cut(whole, start, "start")
    end = None if stop is None else resolve_cut(whole, stop, "stop")
    if end is None and (begin is not None or any(e.shapes != whole.exported.shapes for e in exported)):
        valid = cuts(whole)  # heads of their own: all before the last cut must agree
        end = valid[-1].node if valid else None
    if begin is not None and end is not None:
        order = whole.exported.order
        if order[whole.exported.by_name[begin]] >= order[whole.exported.by_name[end]]:
            raise ValueError(f"merge: 'start' must come before 'stop', got {start!r} and {stop or end!r}")
    for m, other in enumerate(exported[1:], 1):
        if other is not whole.exported:
            difference = first_difference(whole.exported, other, end)
            if difference is not None:
                raise ValueError(f"merge: models 0 and {m} must have one structure, but {difference}")
    if begin is None and end is None:
        return Common(whole, tuple(exported))
    part = part_of(whole, start=begin, stop=end)
    if not part.plan.mergeable:
        raise ValueError(f"merge: there must be something to merge before 'stop', got {stop or end!r}")
    return Common(part, tuple(exported))


def first_difference(a: Exported, b: Exported, stop: str | None = None) -> str | None:
    """The first node, up to `stop`, in which two graphs differ, as half a sentence; None if there is none."""
    ours, theirs = _computing(a), _computing(b)
    for x, y in zip(ours, theirs):
        if op_name(x) != op_name(y):
            return f"node {x.name!r}{_where(x)} is {op_name(x)!r} in one and {op_name(y)!r} in the other"
        if _sizes(x) != _sizes(y):
            return f"node {x.name!r}{_where(x)} gives {_sizes(x)} in one and {_sizes(y)} in the other"
        for option, other in zip(_options(x), _options(y)):
            if option != other:
                return f"node {x.name!r}{_where(x)} has {option} in one and {other} in the other"
        if x.name == stop:
            break
    else:
        if len(ours) != len(theirs):
            longer = ours if len(ours) > len(theirs) else theirs
            node = longer[min(len(ours), len(theirs))]
            return f"node {node.name!r}{_where(node)} is in one of them only"
    names = _weights_before(a, stop)
    for name in names:
        if a.shapes[name] != b.shapes.get(name):
            return f"{name!r} has shape {list(a.shapes[name])} in one and {_shape(b.shapes.get(name))} in the other"
    return None


def _looks_alike(a: nn.Module, b: nn.Module) -> bool:
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (a, b)]
    return type(a) is type(b) and shapes[0] == shapes[1] and _tied(a) == _tied(b)


def _tied(model: nn.Module) -> list[str]:
    every = dict(model.named_parameters(remove_duplicate=False))
    return sorted(every.keys() - dict(model.named_parameters()).keys())


def _computes(graph: Graph, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether the graph with the model's weights gives the model's own output, on two samples of the example."""
    device = device_of(model)
    few, few_kwargs = tree_map(
        lambda v: v[:2].to(device) if isinstance(v, Tensor) and v.dim() else v, (args, dict(kwargs or {}))
    )
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            own = output_tensor(model(*few, **few_kwargs))
            graphs = output_tensor(Tapped(graph).run(model.state_dict(), *few, **few_kwargs)[0])
    finally:
        for module, training in modes:
            module.training = training
    if own.shape != graphs.shape:
        return False
    scale = own.abs().max().clamp(min=1e-30)
    return bool((own - graphs).abs().max() <= TOLERANCE * scale) or bool(own.isnan().any())


def _weights_before(exported: Exported, stop: str | None) -> list[str]:
    last = len(exported.nodes) if stop is None else exported.order[exported.by_name[stop]]
    specs = exported.program.graph_signature.input_specs
    nodes = (node for node in exported.nodes if node.op == "placeholder")
    return [
        str(spec.target)
        for node, spec in zip(nodes, specs)
        if str(spec.target) in exported.shapes and any(exported.order[user] <= last for user in node.users)
    ]


def _computing(exported: Exported) -> list[Node]:
    return [n for n in exported.nodes if n in exported.flows and isinstance(n.meta.get("val"), Tensor)]


def _options(node: Node) -> list[str]:
    """All arguments of an op that are not computed, as text."""
    return [f"{k}={v}" for k, v in [*enumerate(node.args), *node.kwargs.items()] if not _has_node(v)]


def _has_node(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, (list, tuple)) and any(_has_node(v) for v in value))


def _sizes(node: Node) -> list[Any]:
    return [size if isinstance(size, int) else "batch" for size in node.meta["val"].shape]


def _where(node: Node) -> str:
    path = module_path(node)
    return f" (module {path})" if path else ""


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
