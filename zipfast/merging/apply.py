# SPDX-License-Identifier: Apache-2.0
"""Applying groups to weights: W* = sum over models of M W U (Stoica et al. 2024, eq. 4), axis by axis.

Input axes are unmerged first, model by model (the columns of a group's members are summed), then the output axis is
merged over all models at once (the rows of a group are averaged). An axis without a mergeable space keeps its entries,
and the models are averaged: so are heads, and parameters that no space touches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import regroup
from .match import Groups
from .plan import Plan, Use


@dataclass(frozen=True)
class _AxisGroups:
    """Where the entries of one axis go: per model, the target of each position."""

    target: tuple[Tensor, ...]
    size: int  # entries after merging

    def members(self, models: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(order, start) of the stacked entries of some models, for :func:`zipfast.ops.regroup`."""
        target = torch.cat([self.target[m] for m in models])
        order = torch.argsort(target, stable=True)
        start = torch.zeros(self.size + 1, dtype=torch.int64)
        start[1:] = torch.cumsum(torch.bincount(target, minlength=self.size), 0)
        return order.to(device), start.to(device)


def apply_groups(plan: Plan, groups: Mapping[str, Groups], states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merge M state dicts into one.

    Args:
        plan: of the architecture.
        groups: by space name; spaces without an entry keep their features (identity).
        states: M state dicts of that architecture; not changed.

    Returns:
        A state dict with new tensors, in the key order of ``states[0]``. Integer buffers are taken from it; tied
        parameters stay equal.

    Raises:
        ValueError: a tensor is missing or has another shape than the plan says, or groups do not fit a space.

    Cost: each weight read twice and written twice; deterministic.
    """
    models = len(states)
    for name, g in groups.items():
        space = plan[name]
        if space.frozen:
            raise ValueError(
                f"apply_groups: space '{name}' must not be merged, as it is frozen ({', '.join(space.frozen)}); "
                "leave it out of 'groups'"
            )
        if (g.models, g.size, g.keep) != (models, space.size, space.size):
            raise ValueError(
                f"apply_groups: groups of space '{name}' must map {models} x {space.size} features to {space.size}, "
                f"got {g.models} x {g.size} to {g.keep}"
            )
    uses: dict[str, list[tuple[Use, Groups]]] = {}
    for space in plan.mergeable:
        if space.name in groups:
            for use in space.uses:
                uses.setdefault(use.param, []).append((use, groups[space.name]))

    merged: dict[str, Tensor] = {}
    done: dict[str, Tensor] = {}
    first_name = {alias: name for name, aliases in plan.aliases.items() for alias in aliases}
    for key in states[0]:
        name = first_name.get(key, key)
        if name not in done:
            source = name if name in states[0] else key
            tensors = [_tensor(state, source, m) for m, state in enumerate(states)]
            done[name] = _merge_tensor(source, tensors, uses.get(name, []), plan.shapes.get(name))
        merged[key] = done[name] if name == key else done[name].clone()
    return merged


def _tensor(state: Mapping[str, Tensor], name: str, model: int) -> Tensor:
    if name not in state:
        raise ValueError(f"apply_groups: the state dict of model {model} must hold '{name}', got none of that name")
    return state[name].detach()


def _merge_tensor(
    name: str, tensors: list[Tensor], uses: list[tuple[Use, Groups]], shape: tuple[int, ...] | None
) -> Tensor:
    first = tensors[0]
    if shape is not None and tuple(first.shape) != shape:
        raise ValueError(f"apply_groups: '{name}' must have the plan's shape {list(shape)}, got {list(first.shape)}")
    if first.is_complex():
        raise TypeError(f"apply_groups: '{name}' must be real, got {first.dtype}; merge its real and imaginary parts")
    for m, t in enumerate(tensors):
        if t.shape != first.shape:
            raise ValueError(
                f"apply_groups: '{name}' must have one shape in all models, got {list(first.shape)} in model 0 and "
                f"{list(t.shape)} in model {m}"
            )
    if not first.is_floating_point():
        return first.clone()
    by_axis: dict[int, list[tuple[Use, Groups]]] = {}
    for use, g in uses:
        by_axis.setdefault(use.axis, []).append((use, g))
    output = [axis for axis, entries in by_axis.items() if entries[0][0].role != "consume"]
    if len(output) > 1:
        raise ValueError(f"apply_groups: '{name}' must have one merged output axis, got axes {sorted(output)}")

    for axis, entries in by_axis.items():
        if axis in output:
            continue
        axis_groups = _axis_groups(first.shape[axis], len(tensors), entries)
        tensors = [regroup([t], *axis_groups.members([m], first.device), None, axis) for m, t in enumerate(tensors)]
    if first.dim() == 0:
        return torch.stack(tensors).double().mean(0).to(first.dtype)
    axis = output[0] if output else 0
    axis_groups = _axis_groups(first.shape[axis], len(tensors), by_axis.get(axis, []) if output else [])
    order, start = axis_groups.members(range(len(tensors)), first.device)
    return regroup(tensors, order, start, (start[1:] - start[:-1]).double(), axis)


def _axis_groups(length: int, models: int, entries: list[tuple[Use, Groups]]) -> _AxisGroups:
    """Targets along an axis of `length` entries, of which segments [outer, size, block] belong to spaces."""
    target = [torch.arange(length) for _ in range(models)]
    for use, g in entries:
        outer = torch.arange(use.outer)[:, None, None] * (g.keep * use.block)
        block = torch.arange(use.block)[None, None, :]
        end = use.offset + use.outer * g.size * use.block
        for m in range(models):
            feature = g.of_model(m)[None, :, None] * use.block
            target[m][use.offset : end] = (use.offset + outer + feature + block).reshape(-1)
    return _AxisGroups(tuple(target), length)
