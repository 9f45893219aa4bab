# SPDX-License-Identifier: Apache-2.0
"""The frame of the rules: their table, how one is chosen for a node, and what they know while walking a graph.

A rule gets the `Flow`, the node and the node's own arguments, and returns one layout per axis of the node's output (a
list of such lists for ops with several outputs). An op without a rule is an `UnknownOpError`; it is never guessed at,
unless nothing that reaches it may be permuted, in which case its output may not be either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from .layout import Atom, Layout, flag, freeze, frozen_atom, leaves, one, size_of, unify


class UnknownOpError(ValueError):
    """The exported graph contains an op that no rule describes."""


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these ATen ops (names without overload and without the in-place `_`)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def op_name(node: Node) -> str:
    """'relu' for aten.relu_.default; for anything that is not an ATen op, its full name."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    space, name = node.target._schema.name.split("::")
    name = name if name.startswith("__") else name.rstrip("_")
    return name if space == "aten" else f"{space}.{name}"


def hint(size: int | torch.SymInt) -> int:
    """A size as a number; a dynamic batch by the example's."""
    return size if isinstance(size, int) else int(size.node.hint)


def shape_of(node: Node | torch.Tensor) -> list[int]:
    """The sizes of a node's value."""
    value = node.meta["val"] if isinstance(node, Node) else node
    return [hint(size) for size in value.shape]


@dataclass
class ParamUse:
    """A parameter axis (`axis` None: all axes that share an atom with `layout`) and its role."""

    node: Node
    axis: int | None
    layout: Layout
    role: str
    at: Node | None = None  # the node that uses it


@dataclass
class Read:
    """A value that is summed over `axis` against a weight ('consume') or against another value ('contract')."""

    node: Node
    axis: int
    how: str
    at: Node | None = None  # the node that reads it


# Ops that only rename or reorder a weight's axes; any other op between a weight and its use makes it reparametrised.
RENAMING = """
 t mT numpy_T transpose permute view reshape flatten squeeze unsqueeze contiguous clone detach to
"""


@dataclass
class Flow:
    """What is known while walking the graph: layouts by node, parameter roots, roles and reads."""

    layouts: dict[Node, Any] = field(default_factory=dict)
    roots: dict[Node, str] = field(default_factory=dict)  # placeholder -> parameter or statistic
    weights: dict[Node, frozenset[Node]] = field(default_factory=dict)  # value made of parameters alone -> its roots
    uses: list[ParamUse] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    stacks: list[Atom] = field(default_factory=list)  # axes that are indexed by number, see layout.alternative
    current: Node | None = None  # the node whose rule runs

    def axes(self, node: Node) -> list[Layout]:
        """One layout per axis of a node's value."""
        axes: list[Layout] = self.layouts[node]
        return axes

    def is_weight(self, node: Any) -> bool:
        """Whether a value is a parameter or computed from parameters and constants alone."""
        return isinstance(node, Node) and node in self.weights

    def fresh(self, node: Node | torch.Tensor, reason: str) -> list[Layout]:
        """New frozen layouts for all axes of a value."""
        return [frozen_atom(size, reason) if size != 1 else one() for size in shape_of(node)]

    def broadcast(self, sizes: Sequence[int], many: Iterable[Sequence[Layout]]) -> list[Layout]:
        """Unify axes as broadcasting lines them up, from the right; axes of size 1 stay out of it."""
        operands = list(many)
        out: list[Layout] = []
        for i in range(1, len(sizes) + 1):
            have = [axes[-i] for axes in operands if len(axes) >= i and size_of(axes[-i]) == sizes[-i]]
            for other in have[1:]:
                unify(have[0], other)
            # The layout object itself is passed on, not its resolved term: `note` finds a weight's axis by identity.
            out.insert(0, have[0] if have else one())
        return out

    def note(self, weight: Node, layout: Layout, role: str) -> None:
        """Record the role of a weight's axis, traced back to the parameters the weight is made of."""
        roots = self.weights[weight]
        path, plain = [weight], len(roots) == 1
        while path and plain:
            node = path.pop()
            if node.op != "placeholder":
                plain = op_name(node) in RENAMING.split()
                path += node.all_input_nodes
        if not plain:
            flag(layout, "reparametrised")
        for root in roots:
            exact = [axis for axis, own in enumerate(self.layouts[root]) if own is layout]
            for axis in exact:
                self.uses.append(ParamUse(root, axis, layout, role, self.current))
            if not exact:
                self.uses.append(ParamUse(root, None, layout, role, self.current))

    def contract(self, x: Node, x_axis: int, weight: Node, weight_axis: int) -> None:
        """A sum over one axis of both operands: the weight's axis consumes the features of x."""
        unify(self.axes(x)[x_axis], self.axes(weight)[weight_axis])
        if self.is_weight(weight):
            self.note(weight, self.axes(weight)[weight_axis], "consume")
            self.read(x, x_axis, "consume")
        else:
            flag(self.axes(x)[x_axis], "contract")  # a product of two merged features is not the merged product
            self.read(x, x_axis, "contract")
            self.read(weight, weight_axis, "contract")

    def read(self, node: Node, axis: int, how: str) -> None:
        """Record that a value's axis is summed over."""
        self.reads.append(Read(node, axis % len(self.axes(node)), how, self.current))

    def produce(self, weight: Node, axis: int, bias: Node | None = None) -> Layout:
        """The features that an output axis of a weight makes, and its bias with it."""
        layout = self.axes(weight)[axis]
        if self.is_weight(weight):
            self.note(weight, layout, "produce")
        if bias is not None:
            own = self.axes(bias)[-1]
            unify(layout, own)
            if self.is_weight(bias):
                self.note(bias, own, "produce")
        return layout


def apply_rule(flow: Flow, node: Node, unknown: str) -> Any:
    """Layouts of a node's output by its op's rule; see `find_spaces` for `unknown`.

    Raises:
        UnknownOpError: the op has no rule, and `unknown` is 'error'.
    """
    name, flow.current = op_name(node), node
    if name in RULES:
        # dtype, device and memory format say nothing about axes
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("dtype", "device", "layout", "memory_format")}
        return RULES[name](flow, node, *node.args, **kwargs)
    inputs = [axis for source in node.all_input_nodes for axis in _flat(flow.layouts[source])]
    # Where nothing may be permuted on the way in, nothing changes on the way out: masks, positions, images. An atom
    # without limits is equal everywhere, so that its order says nothing.
    if any(not atom.reasons and atom.limits for axis in inputs for atom in leaves(axis)):
        if unknown == "error":
            full = str(node.target).removesuffix(".default") if name != "getitem" else "getitem"
            raise UnknownOpError(
                f"find_spaces: no rule for op '{full}' at node '{node.name}'; add one with zipfast.merging.rules.rule "
                "or call with unknown='freeze'"
            )
        for axis in inputs:
            freeze(axis, f"unknown op {name}")
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return flow.fresh(node, f"from {name}")
    return [flow.fresh(item, f"from {name}") if isinstance(item, torch.Tensor) else [] for item in value]


def _flat(layouts: Any) -> list[Layout]:
    if isinstance(layouts, list):
        return [axis for item in layouts for axis in _flat(item)]
    return [layouts]
