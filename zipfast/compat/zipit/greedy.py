# SPDX-License-Identifier: Apache-2.0
"""ZipIt!'s greedy matching under the public code's rules, ties included.

Where it differs, on purpose: inputs are not changed; NaN is refused instead of merged first; a matching in which no pair
is left raises instead of zeroing features; the merge value is the mean similarity of the merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...merging.match import in_model_budget
from ...ops import zip_match
from ...ops.zip_match import DEADLOCK
from ._common import matrices, models_of, refuse_nan, similarity

NAME = "match_tensors_zipit"


def match_tensors_zipit(
    metric: Mapping[str, Tensor],
    r: float = 0.5,
    a: float = 0.3,
    b: float = 0.125,
    print_merges: bool = False,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """The reference's greedy matching, bit for bit wherever it is well defined, ties included.

    Args:
        metric: ``{"covariance": [F, F]}``, or similarities under ``"cossim"`` or ``"correlation"``; not changed.
        r: part of the F features to merge away; F·(1 - r) remain, and 1/(1 - r) is the number of models.
        a, b: α and β of Stoica et al. 2024, §4.3.
        print_merges: print how many groups are within A, within B and across (two models).
        get_merge_value: also return the mean similarity of the merges.
        add_bias: append a row and column that pass a bias through, to each model's block of the unmerge matrix.
        kwargs: ignored, as by the reference.

    Returns:
        (merge, unmerge[, value]): merge [keep, F] with rows 1/(k + 1e-5) on the k members, unmerge [F, keep] of 0/1.

    Raises:
        ValueError: NaN; no pair left (the reference would zero features there); no usable metric.

    Cost: as :func:`zipfast.ops.zip_match` for a > 0 and a symmetric matrix; else O(K·F²) on the CPU.
    """
    sims = similarity(NAME, metric)
    features = sims.shape[0]
    models, keep = models_of(NAME, features, r), int(features * (1 - r) + 1e-4)
    budget = in_model_budget(features - keep, models, b, compat=True)
    refuse_nan(NAME, sims)
    off_diagonal = sims.clone().fill_diagonal_(0)
    if 0 < a <= 1 and torch.equal(off_diagonal, off_diagonal.T):
        index, _, value, status = zip_match([sims], models, [keep], [budget], float(a), True)
        stuck = int(status[0, DEADLOCK])
    else:
        index, value, stuck = _match_general(sims, models, keep, budget, a)
    if stuck >= 0:
        raise ValueError(
            f"match_tensors_zipit: no pair is left after {stuck} of {features - keep} merges; the reference would merge "
            "feature 0 with itself and zero the rest; use zipfast.match, or a larger b"
        )

    plain = torch.nn.functional.one_hot(index, keep).to(torch.float32)
    merge, unmerge = matrices(plain, models, add_bias)
    if print_merges and models == 2:
        in_a, in_b = plain[: features // 2].sum(0), plain[features // 2 :].sum(0)
        only_a, only_b = int((in_b == 0).sum()), int((in_a == 0).sum())
        print(f"within A: {only_a} | within B: {only_b} | across: {keep - only_a - only_b}")
    result = (merge.to(sims.device), unmerge.to(sims.device))
    return (*result, value.mean()) if get_merge_value else result


def _match_general(sims: Tensor, models: int, keep: int, budget: int, alpha: float) -> tuple[Tensor, Tensor, int]:
    """The reference's loop on the host, for what the kernel's rules exclude: an asymmetric matrix, alpha <= 0 or > 1.

    With alpha <= 0 the reference masks row and column ranges by the features' *current positions*, the column before
    the merged feature is removed and the row after it: so is it here. Returns (index, values, merges before no pair was
    left or -1).
    """
    s = sims.detach().cpu().numpy().copy()
    features = s.shape[0]
    size = features // models
    scale = s.dtype.type(alpha)
    np.fill_diagonal(s, -np.inf)
    origin = np.arange(features) // size
    left = [budget] * models
    alive = np.ones(features, dtype=bool)
    slot = np.arange(features)
    values = []
    for t in range(features - keep):
        flat = int(s.argmax())
        row, col = divmod(flat, features)
        if s[row, col] == -np.inf:
            return torch.empty(0, dtype=torch.int64), torch.empty(0), t
        i, j = min(row, col), max(row, col)
        values.append(float(s[row, col]))
        origins = (int(origin[i]), int(origin[j]))
        s[:, i] = np.minimum(s[:, i], s[:, j])
        if alpha > 0:
            s[:, i] *= scale
        else:
            s[_positions(alive, origins, size), i] = -np.inf
        alive[j] = False
        s[:, j] = -np.inf
        s[i, :] = np.minimum(s[i, :], s[j, :])
        if alpha > 0:
            s[i, :] *= scale
        else:
            s[i, _positions(alive, origins, size)] = -np.inf
        s[j, :] = -np.inf
        slot[slot == j] = i
        if origins[0] == origins[1]:
            left[origins[0]] -= 1
            if left[origins[0]] <= 0:
                own = alive & (origin == origins[0])
                s[np.ix_(own, own)] = -np.inf
    index = (np.cumsum(alive) - 1)[slot]
    return torch.from_numpy(index).to(sims.device), torch.tensor(values), -1


def _positions(alive: np.ndarray, origins: tuple[int, int], size: int) -> np.ndarray:
    """Slots whose rank among those alive lies in [o·D, (o+1)·D) for one of the origins."""
    slots = np.flatnonzero(alive)
    return np.concatenate([slots[o * size : (o + 1) * size] for o in origins])
