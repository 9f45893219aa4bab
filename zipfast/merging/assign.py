# SPDX-License-Identifier: Apache-2.0
"""From the similarities of all spaces of a network to their groups: which method serves which space, blocks first.

Spaces inside others (the features of attention heads) are matched in two steps. Two blocks are as similar as their
features are when matched inside, over all spaces that lie in them (q and k, v); by that the blocks are permuted. Then the
features of blocks that now belong together are matched like any space's.

Where only a permutation is exact (a flag of the space), the groups are one, whatever beta says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor

from .apply import block_targets
from .baselines import match_greedy_permutation, match_identity, match_kmeans, match_optimal, match_permutation
from .match import Groups, match
from .plan import Plan, Space

Method = Literal["zip", "permute", "optimal", "kmeans", "average"]
METHODS: tuple[str, ...] = get_args(Method)
PerSpace = float | Mapping[str, float]


def match_spaces(
    plan: Plan,
    similarity: Mapping[str, Tensor],
    models: int,
    *,
    method: Method = "zip",
    alpha: PerSpace = 1.0,
    beta: PerSpace = 1.0,
    skip: Sequence[str] = (),
    compat: bool = False,
) -> dict[str, Groups]:
    """Groups for every mergeable space of a plan.

    Args:
        plan: the spaces.
        similarity: by name, [M·total, M·total], for every space that has no others inside it.
        models: M.
        method: ``"zip"`` (greedy, in-model merges within the budget), ``"permute"`` (the assignment of greatest total
            similarity), ``"optimal"`` (best pairing, two models), ``"kmeans"``, ``"average"`` (feature k with feature k).
        alpha, beta: as in :func:`match`, one number or by space name; names may be patterns (``"*.conv1"``), the first
            that fits counts, other spaces get 1. A beta that names a flagged space allows in-model merges there too.
        skip: names or patterns of spaces that keep their features: they are averaged as they are.
        compat: the public reference's rules for spaces that are not inside others.

    Returns:
        By space name, in the plan's order.

    Raises:
        ValueError: a pattern that fits no space; an unknown method; see :func:`match`.
    """
    if method not in METHODS:
        raise ValueError(f"merge: 'method' must be one of {', '.join(METHODS)}, got {method!r}")
    skipped = spaces_named(plan, "skip", skip)
    alphas, betas = per_space(plan, "alpha", alpha), per_space(plan, "beta", beta)
    forced = set(spaces_named(plan, "beta", list(beta))) if isinstance(beta, Mapping) else set()
    found: dict[str, Groups] = {}
    for depth in sorted({len(space.parents) for space in plan.mergeable}):
        spaces = [space for space in plan.mergeable if len(space.parents) == depth]
        for space in spaces:
            if method == "average" or space.name in skipped:
                found[space.name] = _stay(plan, space, found, models)
        todo = [space for space in spaces if space.name not in found]
        problems = [problem for space in todo for problem in _problems(plan, space, similarity, found, models, skipped)]
        greedy = [p for p in problems if method == "zip" and _mergeable(p.space, forced)]
        exact = [p for p in problems if p not in greedy]
        for a in dict.fromkeys(alphas[p.space.name] for p in greedy):
            own = [p for p in greedy if alphas[p.space.name] == a]
            groups = match(
                [p.similarity for p in own],
                models,
                alpha=a,
                beta=[betas[p.space.name] for p in own],
                compat=compat,
                names=[p.space.name for p in own],
            )
            for problem, result in zip(own, _all(groups)):
                problem.result = result
        if method in ("zip", "kmeans", "optimal"):
            strict = [p for p in exact if method == "zip" or p.space.flags]
            results = _all(match_greedy_permutation([p.similarity for p in strict], models)) if strict else []
            for problem, result in zip(strict, results):
                problem.result = result
        for problem in exact:
            if problem.result is None:
                problem.result = _SOLVERS[method](problem.similarity, models)
        for space in todo:
            found[space.name] = _join(space, [p for p in problems if p.space is space], models)
    return {space.name: found[space.name] for space in plan.mergeable}


_SOLVERS = {"permute": match_permutation, "optimal": match_optimal, "kmeans": match_kmeans}


def spaces_named(plan: Plan, option: str, patterns: Sequence[str]) -> list[str]:
    """The mergeable spaces that fit one of the names or patterns.

    Raises:
        ValueError: a pattern fits none.
    """
    names = [space.name for space in plan.mergeable]
    found: list[str] = []
    for pattern in patterns:
        fits = [name for name in names if fnmatchcase(name, pattern)]
        if not fits:
            raise ValueError(
                f"merge: '{option}' must name mergeable spaces, got {pattern!r}; there are {', '.join(names[:8])}"
                f"{' and more' if len(names) > 8 else ''}"
            )
        found += fits
    return list(dict.fromkeys(found))


def per_space(plan: Plan, option: str, value: PerSpace) -> dict[str, float]:
    """One number per mergeable space from one for all or from patterns."""
    if not isinstance(value, Mapping):
        return {space.name: float(value) for space in plan.mergeable}
    chosen: dict[str, float] = {}
    for pattern, number in value.items():
        for name in spaces_named(plan, option, [pattern]):
            chosen.setdefault(name, float(number))
    return {space.name: chosen.get(space.name, 1.0) for space in plan.mergeable}


def _all(groups: Groups | list[Groups]) -> list[Groups]:
    assert isinstance(groups, list), "a list of similarities gives a list of groups"
    return groups


class _Problem:
    """One matching: a space, or one block of it. members: stacked indices of its features, model by model."""

    def __init__(self, space: Space, block: int, members: Tensor | None, similarity: Tensor) -> None:
        self.space, self.block, self.members, self.similarity = space, block, members, similarity
        self.result: Groups | None = None


def _mergeable(space: Space, forced: set[str]) -> bool:
    """Whether features of one model may merge: no flag forbids it, or the user asks for it where it is possible."""
    if {"blocks", "tied"} & set(space.flags):
        return False
    return not space.flags or space.name in forced


def _stay(plan: Plan, space: Space, found: Mapping[str, Groups], models: int) -> Groups:
    """Feature k with feature k, in the blocks that now belong together."""
    if not space.parents:
        return match_identity(models, space.size)
    slot = torch.arange(space.size)
    index = [(block_targets(plan, space, found, m)[:, None] * space.size + slot).reshape(-1) for m in range(models)]
    return _permutation(torch.cat(index), models)


def _permutation(index: Tensor, models: int) -> Groups:
    return Groups(index, models, index.shape[0] // models, torch.empty(0, 2, dtype=torch.int64), torch.empty(0))


def _problems(
    plan: Plan,
    space: Space,
    similarity: Mapping[str, Tensor],
    found: Mapping[str, Groups],
    models: int,
    skipped: Sequence[str],
) -> list[_Problem]:
    children = plan.children(space.name)
    if children and not space.parents:
        read = [child for child in children if child.name in similarity and child.name not in skipped]
        if not read:  # nothing inside is compared, so that nothing says which block is which
            return [_Problem(space, 0, None, torch.eye(space.size).repeat(models, models))]
        return [_Problem(space, 0, None, _block_similarity([similarity[c.name] for c in read], space.size, models))]
    if space.name not in similarity:
        raise ValueError(f"merge: 'similarity' must hold space {space.name!r}, got {len(similarity)} others")
    full = similarity[space.name]
    if not space.parents:
        return [_Problem(space, 0, None, full)]
    problems, width = [], torch.arange(space.size)
    origin = torch.stack([block_targets(plan, space, found, m).argsort() for m in range(models)])  # [M, blocks]
    for block in range(space.blocks):
        start = (torch.arange(models) * space.blocks + origin[:, block]) * space.size
        members = (start[:, None] + width).reshape(-1)
        at = members.to(full.device)
        problems.append(_Problem(space, block, members, full[at[:, None], at]))
    return problems


def _join(space: Space, problems: list[_Problem], models: int) -> Groups:
    """One `Groups` from those of all blocks."""
    results = [p.result for p in problems if p.result is not None]
    if len(problems) == 1 and problems[0].members is None:
        return results[0]
    index = torch.empty(models * space.total, dtype=torch.int64)
    pairs = []
    for problem, result in zip(problems, results):
        assert problem.members is not None
        index[problem.members] = problem.block * space.size + result.index
        pairs.append(problem.members[result.pair])
    value = torch.cat([result.value for result in results])
    return Groups(index, models, space.total, torch.cat(pairs), value, sum(result.lifted for result in results))


def _block_similarity(children: Sequence[Tensor], blocks: int, models: int) -> Tensor:
    """How similar blocks are [M·blocks, M·blocks]: the mean similarity of their features when matched inside.

    Cost: one matching of 2·D features for each pair of blocks of different models.
    """
    count = models * blocks
    total = torch.zeros(count, count)
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count) if a // blocks != b // blocks]
    for child in children:
        size = child.shape[0] // count
        tiles = child.view(count, size, count, size)
        for start in range(0, len(pairs), 256):  # bounds the memory of the small problems
            some = pairs[start : start + 256]
            sims = []
            for a, b in some:
                sim = child.new_zeros(2 * size, 2 * size)
                sim[:size, size:] = tiles[a, :, b]
                sim[size:, :size] = tiles[a, :, b].T
                sims.append(sim)
            for (a, b), groups in zip(some, _all(match_greedy_permutation(sims, 2))):
                first, second = groups.index[:size].argsort(), groups.index[size:].argsort()
                score = float(tiles[a, first.to(child.device), b, second.to(child.device)].mean())
                total[a, b] += score / len(children)
    return total + total.T
