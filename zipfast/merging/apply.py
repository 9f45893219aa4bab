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
from .plan import Plan, Space, Use


@dataclass(frozen=True)
class _Entry:
    """A use with the groups of its space: `size` features per block, `parents` the sizes of the spaces around it."""

    use: Use
    groups: Groups
    size: int
    parents: tuple[int, ...]


def entry_of(plan: Plan, space: Space, use: Use, groups: Groups) -> _Entry:
    """What `axis_targets` needs to know of one use."""
    return _Entry(use, groups, space.size, tuple(plan[parent].size for parent in space.parents))


def block_targets(plan: Plan, space: Space, groups: Mapping[str, Groups], model: int) -> Tensor:
    """The block that each block of a space becomes in one model, by the groups of its parents; int64 [blocks]."""
    if not space.parents:
        return torch.zeros(1, dtype=torch.int64)
    sizes = [plan[parent].size for parent in space.parents]
    grid = torch.meshgrid(*[torch.arange(size) for size in sizes], indexing="ij")
    env = {parent: index.reshape(-1) for parent, index in zip(space.parents, grid)}
    target = torch.zeros(space.blocks, dtype=torch.int64)
    for parent, size in zip(space.parents, sizes):
        moved = env[parent]
        if parent in groups:
            flat = torch.zeros_like(moved)
            for outer in plan[parent].parents:
                flat = flat * plan[outer].size + env[outer]
            moved = groups[parent].of_model(model)[flat * size + moved] % size
        target = target * size + moved
    return target


def _check_blocks(plan: Plan, space: Space, groups: Mapping[str, Groups]) -> None:
    """A block's features must go to the block that its parents' groups say."""
    for m in range(groups[space.name].models if space.parents else 0):
        block = groups[space.name].of_model(m).view(-1, space.size) // space.size
        if not torch.equal(block, block_targets(plan, space, groups, m)[:, None].expand_as(block)):
            raise ValueError(
                f"apply_groups: groups of space '{space.name}' must keep the blocks of {', '.join(space.parents)} together"
            )


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


def apply_groups(
    plan: Plan,
    groups: Mapping[str, Groups],
    states: Sequence[Mapping[str, Tensor]],
    *,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Merge M state dicts into one; with M = 1, permute one.

    Args:
        plan: of the architecture.
        groups: by space name; spaces without an entry keep their features (identity).
        states: M state dicts of that architecture; not changed.
        weights: positive shares of the models wherever they are averaged, None for equal ones. A model that was merged
            from two counts for two with (2, 1).

    Returns:
        A state dict with new tensors, in the key order of ``states[0]``. Integer buffers are taken from it; tied
        parameters stay equal.

    Raises:
        ValueError: a tensor is missing or has another shape than the plan says, or groups do not fit a space.

    Cost: each weight read twice and written twice; deterministic.
    """
    models = len(states)
    check_weights("apply_groups", weights, models)
    for name, g in groups.items():
        space = plan[name]
        if space.frozen:
            raise ValueError(
                f"apply_groups: space '{name}' must not be merged, as it is frozen ({', '.join(space.frozen)}); "
                "leave it out of 'groups'"
            )
        if (g.models, g.size, g.keep) != (models, space.total, space.total):
            raise ValueError(
                f"apply_groups: groups of space '{name}' must map {models} x {space.total} features to {space.total}, "
                f"got {g.models} x {g.size} to {g.keep}"
            )
        only = [reason for reason in ("tied", "blocks") if reason in space.flags]
        if only and not g.is_permutation:
            raise ValueError(
                f"apply_groups: groups of space '{name}' must be a permutation ({only[0]}), got in-model merges"
            )
        _check_blocks(plan, space, groups)
    uses: dict[str, list[_Entry]] = {}
    for space in plan.mergeable:
        if space.name in groups:
            for use in space.uses:
                uses.setdefault(use.param, []).append(entry_of(plan, space, use, groups[space.name]))

    merged: dict[str, Tensor] = {}
    done: dict[str, Tensor] = {}
    first_name = {alias: name for name, aliases in plan.aliases.items() for alias in aliases}
    for key in states[0]:
        name = first_name.get(key, key)
        if name not in done:
            source = name if name in states[0] else key
            tensors = [_tensor(state, source, m) for m, state in enumerate(states)]
            done[name] = _merge_tensor(source, tensors, uses.get(name, []), plan.shapes.get(name), weights)
        merged[key] = done[name] if name == key else done[name].clone()
    return merged


def check_weights(caller: str, weights: Sequence[float] | None, models: int) -> None:
    """Refuse interpolation weights that do not fit."""
    if weights is not None and (len(weights) != models or not all(0 < w < float("inf") for w in weights)):
        raise ValueError(
            f"{caller}: 'weights' must be one positive number for each of {models} models, got {list(weights)}"
        )


def _tensor(state: Mapping[str, Tensor], name: str, model: int) -> Tensor:
    if name not in state:
        raise ValueError(f"apply_groups: the state dict of model {model} must hold '{name}', got none of that name")
    return state[name].detach()


def _merge_tensor(
    name: str,
    tensors: list[Tensor],
    entries: list[_Entry],
    shape: tuple[int, ...] | None,
    weights: Sequence[float] | None,
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
    by_axis: dict[int, list[_Entry]] = {}
    for entry in entries:
        by_axis.setdefault(entry.use.axis, []).append(entry)
    output = [axis for axis, own in by_axis.items() if all(entry.use.role != "consume" for entry in own)]
    # One axis is merged over all models at once. On any further one each model can only be permuted on its own.
    for axis in output[:-1]:
        if not all(entry.groups.is_permutation for entry in by_axis[axis]):
            raise ValueError(f"apply_groups: '{name}' must have one merged output axis, got axes {sorted(output)}")
    merged = output[-1] if output else None

    for axis, own in by_axis.items():
        if axis == merged:
            continue
        axis_groups = _AxisGroups(axis_targets(first.shape[axis], len(tensors), own), first.shape[axis])
        tensors = [regroup([t], *axis_groups.members([m], first.device), None, axis) for m, t in enumerate(tensors)]
    scale = [1.0] * len(tensors) if weights is None else [float(w) for w in weights]
    if first.dim() == 0:
        return (sum(t.double() * w for t, w in zip(tensors, scale)) / sum(scale)).to(first.dtype)  # type: ignore[union-attr]
    axis = 0 if merged is None else merged
    own = [] if merged is None else by_axis[merged]
    axis_groups = _AxisGroups(axis_targets(first.shape[axis], len(tensors), own), first.shape[axis])
    order, start = axis_groups.members(range(len(tensors)), first.device)
    if weights is None:
        mean: Tensor = regroup(tensors, order, start, (start[1:] - start[:-1]).double(), axis)
        return mean
    share = torch.tensor(scale, dtype=torch.float64).repeat_interleave(first.shape[axis])[order.cpu()]
    divisor = torch.segment_reduce(share, "sum", lengths=(start[1:] - start[:-1]).cpu()).to(first.device)
    weighted: Tensor = regroup([t * w for t, w in zip(tensors, scale)], order, start, divisor, axis)
    return weighted


def axis_targets(length: int, models: int, entries: Sequence[_Entry]) -> tuple[Tensor, ...]:
    """Per model the target of each of `length` positions of an axis, of which segments belong to spaces.

    Each space moves its own index, so that the moves of all spaces along an axis add up: a feature k of a block p that
    becomes feature j of block q moves by (j - k) strides of its own and by (q - p) strides of the block's.
    """
    target = [torch.arange(length) for _ in range(models)]
    for entry in entries:
        use, size = entry.use, entry.size
        end = use.offset + use.outer * size * use.block
        at = torch.arange(end - use.offset)
        feature, block = at // use.block % size, torch.zeros_like(at)
        for stride, count in zip(use.parents, entry.parents):
            block = block * count + at // stride % count
        for m in range(models):
            new = entry.groups.of_model(m)[block * size + feature] % size
            target[m][use.offset : end] += (new - feature) * use.block
    return tuple(target)
