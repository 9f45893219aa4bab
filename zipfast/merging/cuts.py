# SPDX-License-Identifier: Apache-2.0
"""Where a network can be cut in two: values that all flow from input to output passes.

Masks and positions, which depend on the inputs alone, do not count: both sides can compute them. A value between a
residual branch and its shortcut is no cut, as the shortcut goes around it.

Reference: Stoica et al. 2024 (ZipIt!), §4.3 (partial zip); there the cuts are chosen by hand.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from .flow import Flow, shape_of
from .graph import Exported, Graph, module_path
from .parts import memory_of, only_writes
from .reading import Region, splittable
from .spaces import walk


@dataclass(frozen=True)
class Cut:
    """A valid cut behind a graph node.

    node: its name. module: dotted path of the module it was traced in. shape: of the value there, the batch as -1.
    parameters: how many of the model's lie before it; share: the same as a part of all, 0 to 1.
    """

    node: str
    module: str
    shape: tuple[int, ...]
    parameters: int
    share: float


def cuts(graph: Graph) -> list[Cut]:
    """All valid cuts of a model, in the order of the flow.

    Cost: one walk over the graph.

    Example:
        >>> import torch, zipfast
        >>> net = zipfast.zoo.mlp(8, (16,), 3)
        >>> [cut.node for cut in zipfast.cuts(zipfast.find_spaces(net, (torch.randn(2, 8),)))]
        ['linear', 'relu']
    """
    exported = graph.exported
    passes, joints = set(_bottlenecks(exported)), set[Node]()

    def visit(flow: Flow, node: Node) -> None:
        # What lies behind a cut does not limit the part before it, so that each node is judged when it is reached.
        if node in passes and splittable(flow, node) is None:
            joints.add(node)

    walk(exported, graph.unknown, Region(exported), visit)
    weights = _weights(exported)
    sizes = {exported.twins[name][0]: math.prod(exported.shapes[name]) for name in weights.values()}  # tied ones once
    total, last = sum(sizes.values()), max((exported.order[user] for node in weights for user in node.users), default=0)
    found, before, seen = [], 0, set[str]()
    for node in exported.nodes:
        for source in node.all_input_nodes:
            name = weights.get(source)
            if name is not None and exported.twins[name][0] not in seen:
                seen.add(exported.twins[name][0])
                before += math.prod(exported.shapes[name])
        if node in joints and exported.order[node] < last:  # some weight is read behind it
            shape = tuple(s if isinstance(s, int) else -1 for s in node.meta["val"].shape)
            found.append(Cut(node.name, module_path(node), shape, before, before / total))
    return found


def resolve_cut(graph: Graph, name: str, option: str = "stop") -> str:
    """The graph node of a cut given as a node's name or a module's path; a module stands for the end of its work.

    Raises:
        ValueError: there is no such node or module, or no valid cut there; the nearest valid ones are named.
    """
    exported, valid = graph.exported, cuts(graph)
    nodes = [node for node in exported.nodes if node in exported.flows]
    inside = [n for n in nodes if module_path(n) == name or module_path(n).startswith(name + ".")]
    by_name = {node.name: node for node in nodes}
    wanted = by_name.get(name) or (inside[-1] if inside else None)
    if wanted is None:
        raise ValueError(f"merge: '{option}' must be a module's path or a graph node, got {name!r}; {_list(valid)}")
    if wanted.name in {cut.node for cut in valid}:
        return wanted.name
    places = [exported.order[by_name[cut.node]] for cut in valid]
    at = bisect_left(places, exported.order[wanted])
    near = [f"{c.node!r} ({c.module or 'the model'})" for c in valid[max(0, at - 1) : at + 1]]
    raise ValueError(
        f"merge: '{option}' must be a place that all flow passes, got {name!r}, around which there is another way; "
        f"the nearest valid cuts are {' and '.join(near) or 'none'}"
    )


def _list(valid: list[Cut], most: int = 6) -> str:
    names = [cut.node for cut in valid]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"valid cuts are {', '.join(names[:most]) or 'none'}{more}"


def _weights(exported: Exported) -> dict[Node, str]:
    """The parameters' placeholders and names."""
    specs = exported.program.graph_signature.input_specs
    nodes = [node for node in exported.nodes if node.op == "placeholder"]
    return {n: str(s.target) for n, s in zip(nodes, specs) if s.kind is InputKind.PARAMETER}


def _bottlenecks(exported: Exported) -> list[Node]:
    """Nodes behind which no other value of the flow is used."""
    last = {source: i for i, node in enumerate(exported.nodes) for source in node.all_input_nodes}
    # Memory that inputs alone made, and into which the flow is written: open from there to its last use, views' included.
    filled = {memory_of(n) for n in exported.flows if only_writes(n)} - exported.flows
    for source, i in list(last.items()):
        if memory_of(source) in filled:
            last[memory_of(source)] = max(i, last[memory_of(source)])
    found: list[Node] = []
    open_: set[Node] = set()
    for i, node in enumerate(exported.nodes):
        open_ = {other for other in open_ if last[other] > i}
        if only_writes(node) and node in exported.flows and memory_of(node) in filled and last[memory_of(node)] > i:
            open_.add(memory_of(node))
        if node in exported.flows and isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            if last.get(node, -1) > i:
                open_.add(node)
            wide = isinstance(node.meta["val"], Tensor) and len(shape_of(node)) > 1
            if open_ == {node} and wide and not all(user.op == "output" for user in node.users):
                found.append(node)
    return found
