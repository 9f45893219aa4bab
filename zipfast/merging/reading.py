# SPDX-License-Identifier: Apache-2.0
"""Reading a plan off a walked graph: which atoms are spaces, what lies inside what, and who plays which role."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from .flow import Flow, op_name
from .graph import Exported
from .layout import Atom, flag, freeze, is_frozen, leaves, parents_of, places, places_of
from .observe import choose_taps
from .plan import Plan, Role, Space, Use


@dataclass(frozen=True)
class Region:
    """The part of the graph behind the value of `start` (None: from the input) up to that of `stop` (None: the output)."""

    exported: Exported
    start: Node | None = None
    stop: Node | None = None

    @cached_property
    def first(self) -> int:
        """Order of the node at which the region begins, itself outside."""
        return -1 if self.start is None else self.exported.order[self.start]

    @cached_property
    def last(self) -> int:
        """Order of the last node inside."""
        return len(self.exported.nodes) - 1 if self.stop is None else self.exported.order[self.stop]

    def __contains__(self, node: Node | None) -> bool:
        return node is not None and self.first < self.exported.order[node] <= self.last

    def placeholders(self, flow: Flow) -> set[Node]:
        """The weights' placeholders that the region reads, also by way of values made of weights alone."""
        everything = self.start is None and self.stop is None
        read = {node for node in flow.roots if everything}
        for node in self.exported.nodes:
            if node in self and node not in flow.weights:
                for source in node.all_input_nodes:
                    for root in flow.weights.get(source, ()):
                        read |= {other for other, name in flow.roots.items() if flow.weights[other] == {root}}
        return read


def is_statistic(node: Node) -> bool:
    """Whether a placeholder is the running mean or variance of a norm.

    Other buffers are constants: they are not learned, so that all models of an architecture have the same.
    """
    return any(op_name(user) in ("batch_norm", "instance_norm") and node in user.args[3:5] for user in node.users)


def read_plan(flow: Flow, region: Region) -> Plan:
    """The plan of a region; `flow` has walked the graph at least to its end."""
    exported = region.exported
    read = region.placeholders(flow)
    roles = _roles(flow, region)
    owners = {node: name for node, name in flow.roots.items() if flow.weights[node] == frozenset([node])}
    owners = {node: name for node, name in owners.items() if any(flow.weights[n] == {node} for n in read)}
    _freeze_leftovers(flow, owners, roles)
    parents = _dependences(flow, owners)
    entry = _leaves_of(flow, region.start)
    uses = _uses(flow, owners, roles, parents)
    for atom, used in uses.items():
        if all(use.role == "consume" for use in used) and atom not in entry:
            atom.reasons.add("no producer")  # constant features, e.g. padding; inputs have their own reason
    outer = _outer(flow, owners)
    for atom in outer:
        atom.flags.add("blocks")  # of two merges along one axis a model could lack every member: only one is free
    names = _names(uses, outer)
    taps = choose_taps(flow, region, uses, parents)
    for atom, (main, _) in taps.items():
        if not main:  # activations could not say which feature is which
            atom.reasons.add("no value shows it")
    spaces = tuple(
        Space(
            names[atom],
            atom.size,
            tuple(used),
            taps[atom][0] if atom in taps else (),
            tuple(sorted(atom.flags)),
            _reasons(atom),
            tuple(names[parent] for parent in parents[atom]),
            math.prod(parent.size for parent in parents[atom]),
            taps[atom][1] if atom in taps else (),
        )
        for atom, used in uses.items()
    )
    known = {twin for name in owners.values() for twin in exported.twins[name]}
    # Buffers that no op reads, like a norm's batch count, say nothing about the function: they are left out.
    inputs = zip((n for n in exported.nodes if n.op == "placeholder"), exported.program.graph_signature.input_specs)
    buffers = [str(s.target) for n, s in inputs if s.kind is InputKind.BUFFER and any(u in region for u in n.users)]
    statistics = {name for node, name in owners.items() if is_statistic(node)}
    return Plan(
        spaces=spaces,
        shapes={name: shape for name, shape in exported.shapes.items() if name in known},
        statistics=tuple(name for name in exported.shapes if name in statistics),
        aliases={
            name: tuple(other for other in exported.twins[name] if other != name)
            for name in owners.values()
            if len(exported.twins[name]) > 1
        },
        constants=tuple(name for name in buffers if name not in known),
        entry=_joints(flow, region.start, names, parents),
        exit=_joints(flow, region.stop, names, parents),
    )


def _reasons(atom: Atom) -> tuple[str, ...]:
    real = atom.reasons - {"no producer"} or atom.reasons  # an input has no producer either, but that says less
    return tuple(sorted(real))


def _roles(flow: Flow, region: Region) -> dict[tuple[Node, int], set[tuple[str, Atom]]]:
    """For each parameter axis the (role, atom) pairs noted along the walk."""
    roles: dict[tuple[Node, int], set[tuple[str, Atom]]] = {}
    for use in flow.uses:
        if use.at not in region:
            continue
        wanted = set(leaves(use.layout))
        for axis, layout in enumerate(flow.axes(use.node)):
            if use.axis in (None, axis):
                for atom in leaves(layout):
                    if atom in wanted:
                        roles.setdefault((use.node, axis), set()).add((use.role, atom))
    return roles


def _role(noted: set[tuple[str, Atom]], atom: Atom) -> Role:
    found = {role for role, other in noted if other is atom}
    return "produce" if "produce" in found else "consume" if "consume" in found else "ride"


def _freeze_leftovers(
    flow: Flow, owners: Mapping[Node, str], roles: Mapping[tuple[Node, int], set[tuple[str, Atom]]]
) -> None:
    """Mark what the walk alone cannot see: doubly used axes, and layouts that are no [outer, size, block]."""
    for noted in roles.values():
        both = Counter(atom for _, atom in noted)
        for atom, count in both.items():
            if count > 1:
                flag(atom, "tied")  # one tensor cannot be averaged as an output and summed as an input
    for node in owners:
        for layout in flow.axes(node):
            for _, factors in places(layout):
                for factor in factors:
                    if not isinstance(factor, Atom):
                        freeze(factor, "nested layout")


def _dependences(flow: Flow, owners: Mapping[Node, str]) -> dict[Atom, tuple[Atom, ...]]:
    """For each atom the atoms it has one order for each index of, outermost first.

    An order may differ by parent only where the parent is at hand: in every value that carries the atom, and in a
    parameter even outside it on the same axis.
    """
    found: dict[Atom, set[Atom]] = {}
    rank: dict[Atom, int] = {}
    for layouts in flow.layouts.values():
        axes = [axis for axis in layouts if not isinstance(axis, list)] if isinstance(layouts, list) else []
        present = {leaf for axis in axes for leaf in leaves(axis)}
        for atom in present:
            found.setdefault(atom, parents_of(atom)).intersection_update(present)
    for node in owners:
        for layout in flow.axes(node):
            for _, factors in places(layout):
                outside: set[Atom] = set()
                for depth, factor in enumerate(factors):
                    for atom in leaves(factor):
                        found[atom] &= outside
                        rank.setdefault(atom, depth)
                    outside |= set(leaves(factor))
    frozen = {atom for atom in found if atom.reasons}
    # A frozen parent keeps its order in all models, and still separates what lies inside it.
    return {
        atom: () if atom in frozen else tuple(sorted(own, key=lambda a: rank.get(a, 0))) for atom, own in found.items()
    }


def _outer(flow: Flow, owners: Mapping[Node, str]) -> set[Atom]:
    """Atoms with other mergeable ones inside them along some axis of a parameter: heads, groups."""
    found: set[Atom] = set()
    for node in owners:
        for layout in flow.axes(node):
            for _, factors in places(layout):
                free = [factor for factor in factors if isinstance(factor, Atom) and not factor.reasons]
                found |= set(free[:-1])
    return found


def _uses(
    flow: Flow,
    owners: Mapping[Node, str],
    roles: Mapping[tuple[Node, int], set[tuple[str, Atom]]],
    parents: Mapping[Atom, tuple[Atom, ...]],
) -> dict[Atom, list[Use]]:
    uses: dict[Atom, list[Use]] = {}
    for node, name in owners.items():
        for axis, layout in enumerate(flow.axes(node)):
            for atom in dict.fromkeys(leaves(layout)):
                if atom.size == 1 or "kernel" in atom.reasons:
                    continue
                role = _role(roles.get((node, axis), set()), atom)
                for place in places_of(layout, atom):
                    strides = tuple(place.strides[parent] for parent in parents[atom])
                    uses.setdefault(atom, []).append(
                        Use(name, axis, role, place.offset, place.outer, place.block, strides)
                    )
    return uses


def _names(uses: Mapping[Atom, list[Use]], outer: set[Atom]) -> dict[Atom, str]:
    """A stable name for each space: the module that first produces it, numbered from the second of that name on."""
    names: dict[Atom, str] = {}
    seen: Counter[str] = Counter()
    for atom, used in uses.items():
        use = next((use for use in used if use.role == "produce"), used[0])
        module = use.param.rpartition(".")[0] or use.param
        name = f"{module}.input" if use.role == "consume" else f"{module}.blocks" if atom in outer else module
        seen[name] += 1
        names[atom] = name if seen[name] == 1 else f"{name}:{seen[name]}"
    return names


def _leaves_of(flow: Flow, node: Node | None) -> set[Atom]:
    return set() if node is None else {leaf for axis in flow.axes(node) for leaf in leaves(axis)}


def _joints(
    flow: Flow, node: Node | None, names: Mapping[Atom, str], parents: Mapping[Atom, tuple[Atom, ...]]
) -> tuple[tuple[str, Use], ...]:
    """Places of the mergeable spaces in the value at which a region begins or ends; see `splittable`."""
    if node is None:
        return ()
    joints = []
    for axis, layout in enumerate(flow.axes(node)):
        loose = [atom for atom in leaves(layout) if not atom.reasons and atom.limits and atom not in names]
        if loose:  # nothing in the part could be brought into a common order by them
            raise ValueError(
                f"part_of: the features of node {node.name!r} must be used by a weight of the part, "
                f"got {loose[0].size} that are not"
            )
        for atom in dict.fromkeys(leaves(layout)):
            if atom in names and not atom.reasons:
                for place in places_of(layout, atom):
                    if any(parent not in place.strides for parent in parents[atom]):
                        raise ValueError(f"part_of: the value of node {node.name!r} must hold its features on one axis")
                    strides = tuple(place.strides[parent] for parent in parents[atom])
                    use = Use(node.name, axis, "ride", place.offset, place.outer, place.block, strides)
                    joints.append((names[atom], use))
    return tuple(joints)


def splittable(flow: Flow, node: Node) -> str | None:
    """Why the value of a node cannot be handed from a merged part to the models' own parts; None if it can."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return "not one tensor"
    if all(is_frozen(layout) for layout in flow.axes(node)):
        return "no mergeable features"
    for axis, layout in enumerate(flow.axes(node)):
        for atom in dict.fromkeys(leaves(layout)):
            if atom.reasons:
                continue
            if not isinstance(value.shape[axis], int):
                return "features share an axis with the batch"
            if any(not parents_of(atom) <= place.strides.keys() for place in places_of(layout, atom)):
                return "features depend on blocks that do not lie around them"
    return None
