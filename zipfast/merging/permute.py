# SPDX-License-Identifier: Apache-2.0
"""Permuting the features of a network without changing its function: what tests and `verify` are built on.

A permutation is a merge of one model: `Groups` with M = 1, in which every group has one member.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .apply import apply_groups, block_targets
from .match import Groups
from .plan import Plan


def random_permutations(plan: Plan, seed: int = 0, *, only: Collection[str] | None = None) -> dict[str, Groups]:
    """A random order for every mergeable space, inside each block of its own; no block keeps its order.

    Args:
        plan: of the architecture.
        seed: of the orders.
        only: names of the spaces to permute; None: all.

    Returns:
        By space name Groups with M = 1: ``index[k]`` is the new place of feature k.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Groups] = {}
    for space in sorted(plan.mergeable, key=lambda space: len(space.parents)):
        if only is not None and space.name not in only:
            continue
        block = block_targets(plan, space, found, 0)
        order = torch.rand(space.blocks, space.size, generator=generator).argsort(1)
        same = (order == torch.arange(space.size)).all(1, keepdim=True)
        order = torch.where(same, order.roll(1, 1), order)
        found[space.name] = as_groups((block[:, None] * space.size + order).reshape(-1))
    return found


def as_groups(index: Tensor) -> Groups:
    """A permutation, ``index[k]`` being the new place of feature k, as groups of one model."""
    return Groups(index, 1, index.shape[0], torch.empty(0, 2, dtype=torch.int64), torch.empty(0))


def permute(plan: Plan, permutations: Mapping[str, Groups], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with its features reordered; tensors that the plan does not know are kept.

    Args:
        plan: of the architecture.
        permutations: by space name, e.g. from :func:`random_permutations`.
        state: not changed.

    Cost: each weight read and written once per permuted axis.
    """
    known = {key: value for key, value in state.items() if key in plan.shapes}
    return {**state, **apply_groups(plan, permutations, [known])}
