# SPDX-License-Identifier: Apache-2.0
"""From a model to its merge plan: which axes of which parameters share a feature space.

`find_spaces` exports the model's forward pass once (`torch.export`), walks the graph with one rule per op
(`rules.py`), which unifies the axes that must agree (`layout.py`), and reads off the result as plain data (`plan.py`).
What remains of each set of unified axes is a space: the axes that produce, consume and ride it, the value at which its
features are best observed, and, if it must stay as it is, the reasons.

Cost: one export on the example inputs (0.1-2 s) and a walk over the graph; the weights are never read or changed.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from .layout import Atom, Layout, freeze, frozen_atom, leaves, one, places, positions_of, size_of
from .plan import Plan, Role, Space, Tap, Use
from .rules import Flow, UnknownOpError, apply_rule, op_name, shape_of  # importing the rules fills their table


@dataclass(frozen=True)
class Graph:
    """A model's plan and the exported program that its taps refer to.

    keywords: names of the example's keyword arguments, in order, for running the program again.
    """

    plan: Plan
    program: ExportedProgram
    keywords: tuple[str, ...] = ()


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

    Cost: one export, 0.1-2 s for models up to ResNet-50; deterministic.

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
    program = _export(model, example_inputs, dict(example_kwargs or {}))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    twins = _twins(tensors)
    flow = _walk(program, twins, unknown)
    return Graph(_read_plan(flow, program, tensors, twins), program, tuple(example_kwargs or ()))


# ------------------------------------------------------------------------------------------ export


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    batches = {leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()}
    if batches == {1}:
        args, kwargs = tree_map(
            lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf, (args, kwargs)
        )
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise ValueError(
            f"find_spaces: 'example_inputs' must fit {type(model).__name__}.forward, got {error}"
        ) from None
    dynamic = tree_map(
        lambda leaf: {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None, dict(bound)
    )
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False  # the flag alone: a module may override eval()
        with torch.no_grad():  # else a forward under no_grad of its own becomes an opaque submodule
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # whatever the exporter or the model's own code raises, the user's answer is the same
        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(" .") if lines else type(error).__name__
        raise ValueError(
            f"find_spaces: torch.export cannot capture {type(model).__name__} ({reason}); "
            "check that the example inputs fit and that its forward does not branch on tensor values"
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def _twins(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """For each name all names of the same tensor, itself included, in registration order."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        groups.setdefault(key, []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


# ------------------------------------------------------------------------------------------ walk


def _walk(program: ExportedProgram, twins: Mapping[str, tuple[str, ...]], unknown: str) -> Flow:
    flow = Flow()
    _enter(flow, program, twins)
    for node in program.graph.nodes:
        if node.op == "output":
            for source in node.all_input_nodes:
                for axis in flow.layouts[source]:
                    freeze(axis, "output")
        elif node.op == "get_attr":
            is_tensor = isinstance(node.meta.get("val"), Tensor)
            flow.layouts[node] = flow.fresh(node, "constant") if is_tensor else []
        elif node.op == "call_function":
            _step(flow, node, unknown)
    return flow


def _enter(flow: Flow, program: ExportedProgram, twins: Mapping[str, tuple[str, ...]]) -> None:
    """Layouts of the graph's inputs: parameters and norm statistics are free, all else is frozen."""
    specs = program.graph_signature.input_specs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    first: dict[tuple[str, ...], Node] = {}
    used = {twins[str(spec.target)] for node, spec in zip(nodes, specs) if node.users and str(spec.target) in twins}
    for node, spec in zip(nodes, specs):
        name = str(spec.target)
        if not isinstance(node.meta.get("val"), Tensor):
            flow.layouts[node] = []
        elif spec.kind is InputKind.USER_INPUT:
            flow.layouts[node] = flow.fresh(node, "input")
        elif name in twins and (spec.kind is InputKind.PARAMETER or _is_statistic(node)):
            same = first.setdefault(twins[name], node)  # tied tensors are one tensor: one layout for all their names
            if same is node:
                reasons = () if twins[name] in used else ("unused",)
                flow.layouts[node] = [one() if size == 1 else frozen_atom(size, *reasons) for size in shape_of(node)]
            else:
                flow.layouts[node] = flow.layouts[same]
            flow.roots[node] = name
            flow.weights[node] = frozenset([same])
        else:
            flow.layouts[node] = flow.fresh(node, "constant")


def _is_statistic(node: Node) -> bool:
    # Other buffers are constants: they are not learned, so all models of an architecture have the same.
    return any(op_name(user) in ("batch_norm", "instance_norm") and node in user.args[3:5] for user in node.users)


def _step(flow: Flow, node: Node, unknown: str) -> None:
    value, name = node.meta.get("val"), op_name(node)
    if name == "getitem" and isinstance(node.args[0], Node) and isinstance(flow.layouts[node.args[0]], list):
        flow.layouts[node] = flow.layouts[node.args[0]][node.args[1]]  # type: ignore[index]
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


# ------------------------------------------------------------------------------------------ read the plan off


def _read_plan(
    flow: Flow, program: ExportedProgram, tensors: Mapping[str, Tensor], twins: Mapping[str, tuple[str, ...]]
) -> Plan:
    roles = _roles(flow)
    owners = {node: name for node, name in flow.roots.items() if flow.weights[node] == frozenset([node])}
    _freeze_leftovers(flow, owners, roles)
    uses: dict[Atom, list[Use]] = {}
    for node, name in owners.items():
        for axis, layout in enumerate(flow.axes(node)):
            for atom in dict.fromkeys(leaves(layout)):
                if atom.size == 1 or "kernel" in atom.reasons:
                    continue
                role = _role(roles.get((node, axis), set()), atom)
                for offset, outer, block in positions_of(layout, atom):
                    uses.setdefault(atom, []).append(Use(name, axis, role, offset, outer, block))
    for atom, places_ in uses.items():
        if all(use.role == "consume" for use in places_):
            atom.reasons.add("no producer")  # constant features, e.g. padding; inputs have their own reason
    names = _names(uses)
    taps = _taps(flow, program, uses)
    spaces = tuple(
        Space(names[atom], atom.size, tuple(used), taps.get(atom, ()), tuple(sorted(atom.flags)), _reasons(atom))
        for atom, used in uses.items()
    )
    known = {name for names_ in owners.values() for name in twins[names_]}
    # Buffers that no op reads, like a norm's batch count, say nothing about the function: they are left out.
    inputs = zip((n for n in program.graph.nodes if n.op == "placeholder"), program.graph_signature.input_specs)
    read = [str(spec.target) for n, spec in inputs if spec.kind is InputKind.BUFFER and n.users]
    statistics = {name for node, name in owners.items() if _is_statistic(node)}
    return Plan(
        spaces=spaces,
        shapes={name: tuple(tensors[name].shape) for name in tensors if name in known},
        statistics=tuple(name for name in tensors if name in statistics),
        aliases={
            name: tuple(other for other in twins[name] if other != name)
            for name in owners.values()
            if len(twins[name]) > 1
        },
        constants=tuple(name for name in read if name not in known),
    )


def _reasons(atom: Atom) -> tuple[str, ...]:
    real = atom.reasons - {"no producer"} or atom.reasons  # an input has no producer either, but that says less
    return tuple(sorted(real))


def _roles(flow: Flow) -> dict[tuple[Node, int], set[tuple[str, Atom]]]:
    """For each parameter axis the (role, atom) pairs noted along the walk."""
    roles: dict[tuple[Node, int], set[tuple[str, Atom]]] = {}
    for use in flow.uses:
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
    """Freeze what the walk alone cannot see: doubly used axes and layouts that are no [outer, size, block]."""
    for noted in roles.values():
        both = Counter(atom for _, atom in noted)
        for atom, count in both.items():
            if count > 1:
                atom.reasons.add("tied")  # one tensor cannot be averaged as an output and summed as an input
    for node in owners:
        for layout in flow.axes(node):
            for _, factors in places(layout):
                for factor in factors:
                    if not isinstance(factor, Atom):
                        freeze(factor, "nested layout")


def _names(uses: Mapping[Atom, list[Use]]) -> dict[Atom, str]:
    """A stable name for each space: the module that first produces it, numbered from the second of that name on."""
    names: dict[Atom, str] = {}
    seen: Counter[str] = Counter()
    for atom, used in uses.items():
        use = next((use for use in used if use.role == "produce"), used[0])
        module = use.param.rpartition(".")[0] or use.param
        name = f"{module}.input" if use.role == "consume" else module
        seen[name] += 1
        names[atom] = name if seen[name] == 1 else f"{name}:{seen[name]}"
    return names


def _taps(flow: Flow, program: ExportedProgram, uses: Mapping[Atom, list[Use]]) -> dict[Atom, tuple[Tap, ...]]:
    """Where to read each space: the input of its last consumer, among those that see most samples.

    A stream's very last consumer may follow a global pool, which leaves one sample per image; an earlier one sees every
    pixel, and where there is no earlier one the value before the pool does. Features that only meet other features
    (contract) are read on both sides; features that nothing consumes are read at the last value that carries them.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    reads: dict[Atom, list[tuple[str, int, int, Node, int]]] = {atom: [] for atom in uses}
    for read in flow.reads:
        if read.node.op == "call_function":
            for atom in dict.fromkeys(leaves(flow.axes(read.node)[read.axis])):
                if atom in reads:
                    node, axis = _before_average(flow, atom, read.node, read.axis)
                    reads[atom].append((read.how, _samples(node, atom), order[node], node, axis))
    carriers: dict[Atom, tuple[Node, int]] = {}
    for node, layouts in flow.layouts.items():
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and node not in flow.weights:
            for axis, layout in enumerate(layouts):
                carriers.update(dict.fromkeys((a for a in leaves(layout) if a in reads), (node, axis)))
    taps: dict[Atom, tuple[Tap, ...]] = {}
    for atom, found in reads.items():
        consumed = [read for read in found if read[0] == "consume"]
        if consumed:
            best = max(consumed, key=lambda read: read[1:3])
            chosen = [best[3:]]
        elif found:
            chosen = [read[3:] for read in found[-2:]]
        else:
            chosen = [carriers[atom]] if atom in carriers else []
        taps[atom] = tuple(tap for node, axis in chosen for tap in _tap(node, axis, flow.axes(node)[axis], atom))
    return taps


# Ops that average positions, and ops that may stand between an average and a consumer without changing any value.
AVERAGES = {"mean"} | {f"{kind}{d}d" for kind in ("avg_pool", "adaptive_avg_pool") for d in (1, 2, 3)}
PASSING = {"flatten", "view", "reshape", "squeeze", "unsqueeze", "transpose", "permute", "contiguous", "dropout", "to"}


def _samples(node: Node, atom: Atom) -> int:
    return math.prod(shape_of(node)) // atom.size


def _before_average(flow: Flow, atom: Atom, node: Node, axis: int) -> tuple[Node, int]:
    """The value before the averages that lead to `node`, if that shows more samples of the same features."""
    best, current = (node, axis), node
    while current.op == "call_function" and op_name(current) in AVERAGES | PASSING:
        averages, current = op_name(current) in AVERAGES, current.all_input_nodes[0]
        if current.op != "call_function" or current in flow.weights:
            break
        carries = [i for i, layout in enumerate(flow.axes(current)) if atom in leaves(layout)]
        if len(carries) != 1:
            break
        if averages and _samples(current, atom) > _samples(best[0], atom):
            best = (current, carries[0])
    return best


def _tap(node: Node, axis: int, layout: Layout, atom: Atom) -> list[Tap]:
    """The first place of a space along a value's axis."""
    grows = not isinstance(node.meta["val"].shape[axis], int)  # the batch was folded into this axis
    for offset, outer, block in positions_of(layout, atom):
        return [Tap(node.name, axis, offset, -1 if grows else outer, block, atom.size)]
    return []
