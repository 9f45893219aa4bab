# SPDX-License-Identifier: Apache-2.0
"""A model as an exported graph: one forward pass captured by `torch.export`, with what the walk needs to know beside it.

Cost: one export on the example inputs (0.1-2 s); the weights are never read or changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from .plan import Plan


@dataclass(frozen=True)
class Exported:
    """What was exported.

    keywords: names of the example's keyword arguments, in order. shapes: of all parameters and buffers. twins: for each
    of them all names of the same tensor, itself included. modules: for each graph node the path of its module.
    """

    program: ExportedProgram
    keywords: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    twins: Mapping[str, tuple[str, ...]]

    @cached_property
    def nodes(self) -> list[Node]:
        """All nodes in the order in which they run."""
        return list(self.program.graph.nodes)

    @cached_property
    def order(self) -> dict[Node, int]:
        """Place of each node in `nodes`."""
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def flows(self) -> frozenset[Node]:
        """Nodes whose value depends on an input of the model and on its weights: the data's way through the network.

        Masks and positions, which depend on inputs or constants alone, are not in it.
        """
        specs = self.program.graph_signature.input_specs
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        from_input = {n for n, spec in zip(placeholders, specs) if spec.kind is InputKind.USER_INPUT}
        from_weight = {n for n, spec in zip(placeholders, specs) if spec.kind is InputKind.PARAMETER}
        for node in self.nodes:
            for found in (from_input, from_weight):
                if any(source in found for source in node.all_input_nodes):
                    found.add(node)
        return frozenset(n for n in from_input & from_weight if n.op == "call_function")


@dataclass(frozen=True)
class Graph:
    """The plan of a model, or of the part of it between two nodes, and the exported program that its taps refer to.

    start, stop: names of the nodes at whose value the part begins and ends; None: at the input, at the output.
    """

    plan: Plan
    exported: Exported
    unknown: str = "error"
    start: str | None = None
    stop: str | None = None

    @property
    def program(self) -> ExportedProgram:
        """The exported program, always of the whole model."""
        return self.exported.program


def module_path(node: Node) -> str:
    """The dotted path of the module that a node was traced in; '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())), ("",))[0] if stack else ""
    return str(path).removeprefix("L['self'].").removeprefix("L['self']").replace("slice(None, None, None)", "")


def export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Exported:
    """Capture the forward pass in eval mode without gradients, axis 0 of every tensor input being the batch, of any size.

    Raises:
        ValueError: the model cannot be captured, or the example does not fit its forward.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Exported(_capture(model, args, dict(kwargs or {})), tuple(kwargs or ()), shapes, _twins(tensors))


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    batches = {leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()}
    if batches == {1}:  # an exporter may bake a size of 1 into the graph
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
