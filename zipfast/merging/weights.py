# SPDX-License-Identifier: Apache-2.0
"""Similarity of features by the weights that make and use them, and the matching that iterates it (no data needed).

A feature is the vector of all weights that touch it, over all its uses, with every other axis brought into the order of
the merged model by the groups of the spaces there. Those groups depend on this space's in turn: spaces are matched one
after the other until none changes (Git Re-Basin's weight matching, a coordinate ascent).

Reference: Ainsworth et al. 2023 (Git Re-Basin, arXiv 2209.04836), §3.2, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..ops import regroup
from .apply import _AxisGroups, axis_targets, entry_of
from .baselines import match_identity
from .match import Groups
from .plan import Plan, Space, Use

SWEEPS = 50  # seen: 4 to 12


def weight_similarity(
    plan: Plan,
    space: Space,
    states: Sequence[Mapping[str, Tensor]],
    groups: Mapping[str, Groups],
    *,
    cosine: bool,
    averaged: Collection[str] = (),
) -> Tensor:
    """Inner products (or cosines) of the weights of the stacked features of one space, float64 [M·total, M·total].

    Args:
        groups: of the other spaces, by which their axes are brought together; spaces without an entry keep their order.
        averaged: spaces beside this one in the same blocks, whose order is not known before the blocks are matched: along
            the axes that they share with it only their means and mean squares count, which no order changes.

    Cost: one product F x F x (weights per feature) over all uses.
    """
    models = len(states)
    total = torch.zeros(models * space.total, models * space.total, dtype=torch.float64)
    for use in space.uses:
        if use.param not in plan.statistics:
            rows = torch.cat(
                [_rows(plan, space, use, state, groups, m, models, averaged) for m, state in enumerate(states)]
            )
            total += (rows @ rows.T).cpu()
    total = (total + total.T) / 2
    if not cosine:
        return total
    norm = total.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(norm > 0, 1 / norm.clamp(min=1e-300), 0.0)
    return (total * torch.outer(inverse, inverse)).clamp(-1, 1)


def _rows(
    plan: Plan,
    space: Space,
    use: Use,
    state: Mapping[str, Tensor],
    groups: Mapping[str, Groups],
    model: int,
    models: int,
    averaged: Collection[str],
) -> Tensor:
    """The weights of each feature of one model along one use, float64 [total, weights]."""
    value = state[use.param].detach()
    fixed = {space.name, *space.parents, *averaged}
    for axis in range(value.dim()):
        entries = [
            entry_of(plan, other, u, groups[other.name])
            for other in plan.mergeable
            if other.name in groups and (axis != use.axis or other.name not in fixed)
            for u in other.uses
            if (u.param, u.axis) == (use.param, axis)
        ]
        if entries:
            length = value.shape[axis]
            moved = _AxisGroups(axis_targets(length, models, entries), length)
            value = regroup([value], *moved.members([model], value.device), None, axis)
    length = use.outer * space.size * use.block
    at = torch.arange(length)
    row, rest = at // use.block % space.size, at - at // use.block % space.size * use.block
    block = torch.zeros_like(at)
    for stride, parent in zip(use.parents, space.parents):
        index = at // stride % plan[parent].size
        block, rest = block * plan[parent].size + index, rest - index * stride
    row, beside = block * space.size + row, 1
    for other in plan.mergeable:  # positions of the averaged spaces come last, as they are summed over
        for u in other.uses:
            if other.name in averaged and (u.param, u.axis, u.offset) == (use.param, use.axis, use.offset):
                rest, beside = rest - at // u.block % other.size * u.block, beside * other.size
    order = (row * length + rest).argsort(stable=True) + use.offset
    picked = value.movedim(use.axis, 0)[order.to(value.device)].double()
    picked = picked.reshape(space.total, -1, beside, picked[0].numel())
    if beside > 1:
        picked = torch.stack([picked.mean(2), picked.square().mean(2)])
        return picked.transpose(0, 1).reshape(space.total, -1)
    return picked.reshape(space.total, -1)


def match_weights(
    plan: Plan,
    states: Sequence[Mapping[str, Tensor]],
    solve: Callable[[Plan, Mapping[str, Tensor]], dict[str, Groups]],
    *,
    cosine: bool,
    blend: Callable[[str, Tensor], Tensor] = lambda name, similarity: similarity,
    skip: Sequence[str] = (),
    seed: int = 0,
) -> tuple[dict[str, Groups], dict[str, Tensor]]:
    """Match all spaces by weights, one after the other, until nothing changes.

    Args:
        solve: groups of the spaces of a plan (a family: a space and those inside it) from their similarities.
        cosine: of weights instead of inner products: comparable between the features of one model.
        blend: (name, similarity) -> similarity, e.g. with that of activations mixed in.
        skip: spaces that keep their order.
        seed: of the order of the spaces.

    Returns:
        Groups and the last similarities, by name.
    """
    models = len(states)
    families = [
        tuple(s for s in plan.mergeable if s.name == root.name or root.name in s.parents[:1])
        for root in plan.mergeable
        if not root.parents
    ]
    groups = {space.name: match_identity(models, space.total) for space in plan.mergeable}
    similarities: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    frozen = tuple(space for space in plan.spaces if space.frozen)
    for _ in range(SWEEPS):
        changed = False
        for i in torch.randperm(len(families), generator=generator).tolist():
            family = families[i]
            if family[0].name in skip:
                continue
            names = {space.name for space in family}
            for space in family:
                if not plan.children(space.name):
                    raw = weight_similarity(
                        plan, space, states, groups, cosine=cosine, averaged=names - {space.name, *space.parents}
                    )
                    similarities[space.name] = blend(space.name, raw)
            part = replace(plan, spaces=family + frozen)
            new = solve(part, {name: similarities[name] for name in names if name in similarities})
            changed |= any(not torch.equal(new[name].index, groups[name].index) for name in names)
            groups.update(new)
        if not changed:
            break
    return groups, similarities
