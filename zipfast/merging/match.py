# SPDX-License-Identifier: Apache-2.0
"""From similarities to groups: ZipIt!'s greedy matching; what people compare it with is in baselines.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from ..ops import zip_match as zip_match_op
from ..ops.zip_match import ASYMMETRIC_AT, DEADLOCK, LIFTED, NAN_AT


@dataclass(frozen=True, eq=False)
class Groups:
    """Which stacked features form one merged feature; an index, never a dense 0/1 matrix.

    index: int64 [F], F = M·D: the group, 0..keep-1, of each stacked feature (model m's feature k is m·D + k).
    models: M. keep: number of groups. pair, value: slots and similarity of each greedy merge, in order (empty for the
    baselines). lifted: merges for which the in-model budget had to be lifted.
    """

    index: Tensor
    models: int
    keep: int
    pair: Tensor
    value: Tensor
    lifted: int = 0

    @property
    def size(self) -> int:
        """D, features per model."""
        return self.index.shape[0] // self.models

    @cached_property
    def count(self) -> Tensor:
        """Members of each group, int64 [keep]."""
        return torch.bincount(self.index, minlength=self.keep)

    def of_model(self, m: int) -> Tensor:
        """Group of each feature of model m, int64 [D]: M and U of that model in index form."""
        return self.index[m * self.size : (m + 1) * self.size]

    @cached_property
    def in_model_merges(self) -> list[int]:
        """Per model, how many of its features share a group with another one of its own."""
        return [self.size - int(torch.unique(self.of_model(m)).numel()) for m in range(self.models)]

    @property
    def is_permutation(self) -> bool:
        """Whether every group has exactly one feature of each model."""
        return self.keep == self.size and not any(self.in_model_merges)

    def unmerge_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """U as a dense 0/1 matrix [F, keep] (Stoica et al. 2024, eq. 3); for small sizes and comparisons."""
        return torch.nn.functional.one_hot(self.index, self.keep).to(dtype)

    def merge_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """M as a dense matrix [keep, F], rows averaging the members (Stoica et al. 2024, eq. 2)."""
        return self.unmerge_matrix(dtype).T / self.count[:, None].to(dtype)


def in_model_budget(merges: int, models: int, beta: float, compat: bool = False) -> int:
    """In-model merges that each model may take part in: ⌊β·K/M⌋; compat: the reference's int(K // M · β + 1e-4)."""
    return int((merges // models) * beta + 1e-4) if compat else math.floor(beta * merges / models + 1e-9)


@overload
def match(
    similarity: Tensor,
    models: int = 2,
    *,
    keep: int | Sequence[int] | None = None,
    alpha: float = 1.0,
    beta: float | Sequence[float] = 1.0,
    compat: bool = False,
    names: Sequence[str] | None = None,
) -> Groups: ...


@overload
def match(
    similarity: Sequence[Tensor],
    models: int = 2,
    *,
    keep: int | Sequence[int] | None = None,
    alpha: float = 1.0,
    beta: float | Sequence[float] = 1.0,
    compat: bool = False,
    names: Sequence[str] | None = None,
) -> list[Groups]: ...


def match(
    similarity: Tensor | Sequence[Tensor],
    models: int = 2,
    *,
    keep: int | Sequence[int] | None = None,
    alpha: float = 1.0,
    beta: float | Sequence[float] = 1.0,
    compat: bool = False,
    names: Sequence[str] | None = None,
) -> Groups | list[Groups]:
    """Group the stacked features of M models by ZipIt!'s exact greedy matching.

    Args:
        similarity: symmetric [F, F] or a list of them (all spaces of a network in one call), float32 or float64,
            F = M·D; the diagonal is ignored.
        models: M.
        keep: groups that remain, per space; default D.
        alpha: in [0, 1]; scales the similarity of a merged group each time (1: complete linkage; 0: nothing merges
            twice).
        beta: in [0, 1], one for all spaces or one each; model m may take part in ⌊β·K/M⌋ in-model merges, K = F - keep.
        compat: the public reference's rules instead (see :mod:`zipfast.compat.zipit`).
        names: of the spaces, for messages.

    Returns:
        Groups, or a list of them if a list was given.

    Raises:
        ValueError: not square, not symmetric, NaN, F not divisible by M, keep, alpha or beta out of range; in compat
            mode, a matching that the reference would continue by zeroing features.

    Warns once if budgets had to be lifted, with the counts.

    Cost: see :func:`zipfast.ops.zip_match`; one host synchronisation, to read the status. Deterministic, ties included:
    smallest row, then smallest column.

    Example:
        >>> import torch, zipfast
        >>> sim = torch.tensor([[0, 0.1, 0.9, 0.2], [0.1, 0, 0.3, 0.8], [0.9, 0.3, 0, 0.4], [0.2, 0.8, 0.4, 0]])
        >>> groups = zipfast.match(sim)
        >>> groups.index.tolist(), [round(v, 1) for v in groups.value.tolist()]
        ([0, 1, 0, 1], [0.9, 0.8])

    Reference: Stoica et al. 2024 (arXiv 2305.03053), §4.3.
    """
    single = isinstance(similarity, Tensor)
    sims = [similarity] if isinstance(similarity, Tensor) else list(similarity)
    if not sims:
        return []
    labels = list(names) if names is not None else [f"#{i}" for i in range(len(sims))]
    if len(labels) != len(sims):
        raise ValueError(f"match: 'names' must have one entry per space ({len(sims)}), got {len(labels)}")
    for sim, label in zip(sims, labels):
        if not isinstance(sim, Tensor) or sim.dim() != 2 or sim.shape[0] != sim.shape[1]:
            got = list(sim.shape) if isinstance(sim, Tensor) else type(sim).__name__
            raise ValueError(f"match: 'similarity' of space {label} must be square [F, F], got {got}")
        if models < 1 or sim.shape[0] == 0 or sim.shape[0] % models:
            raise ValueError(
                f"match: 'similarity' of space {label} must stack {models} models of equal size, "
                f"got {sim.shape[0]} features"
            )
    keeps = [s.shape[0] // models for s in sims] if keep is None else _per_space("keep", keep, len(sims))
    betas = _per_space("beta", beta, len(sims))
    for b in betas:
        if not 0 <= b <= 1:
            raise ValueError(f"match: 'beta' must be in [0, 1], got {b}")
    budgets = [in_model_budget(s.shape[0] - k, models, b, compat) for s, k, b in zip(sims, keeps, betas)]
    index, pair, value, status = zip_match_op([s.detach() for s in sims], models, keeps, budgets, float(alpha), compat)
    index, pair, value = index.cpu(), pair.cpu(), value.cpu()

    results, feature, merge = [], 0, 0
    for sim, kept, label, row in zip(sims, keeps, labels, status.tolist()):
        size = sim.shape[0]
        _raise_for(label, size, row, compat)
        merges = size - kept
        results.append(
            Groups(
                index[feature : feature + size],
                models,
                kept,
                pair[merge : merge + merges],
                value[merge : merge + merges],
                row[LIFTED],
            )
        )
        feature, merge = feature + size, merge + merges
    lifted = sum(r.lifted for r in results)
    if lifted:
        warnings.warn(
            f"match: the in-model budget had to be lifted for {lifted} of {merge} merges, as no allowed pair was left; "
            "a larger beta or keep avoids this",
            RuntimeWarning,
            stacklevel=2,
        )
    return results[0] if single else results


def _per_space(name: str, value: float | Sequence[float], spaces: int) -> list[Any]:
    if isinstance(value, (list, tuple)):
        if len(value) != spaces:
            raise ValueError(f"match: '{name}' must have one entry per space ({spaces}), got {len(value)}")
        return list(value)
    return [value] * spaces


def _raise_for(label: str, size: int, status: list[int], compat: bool) -> None:
    if status[NAN_AT] >= 0:
        i, j = divmod(status[NAN_AT], size)
        raise ValueError(f"match: 'similarity' of space {label} must not hold NaN, got one at [{i}, {j}]")
    if status[ASYMMETRIC_AT] >= 0:
        i, j = divmod(status[ASYMMETRIC_AT], size)
        raise ValueError(
            f"match: 'similarity' of space {label} must be symmetric, got different values at [{i}, {j}] and [{j}, {i}]; "
            "symmetrise it first, e.g. torch.triu(s) + torch.triu(s, 1).T"
        )
    if status[DEADLOCK] >= 0:
        why = (
            "the reference would merge feature 0 with itself and zero the rest from here on; use compat=False or a larger "
            "beta"
            if compat
            else "all remaining similarities are -inf"
        )
        raise ValueError(f"match: no pair of space {label} is left after {status[DEADLOCK]} merges: {why}")
