# SPDX-License-Identifier: Apache-2.0
"""``zip_match``: the exact greedy matching of ZipIt! (Stoica et al. 2024, §4.3), for many spaces at once.

The function that users meet is :func:`zipfast.match`; this is the operator below it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._paths import Paths
from ._registry import op

NAME = "zip_match"
MAX_MODELS = 31  # a group's models are one bit each of an int32, and one bit means "left the pool"

# Entries of `status`, one row per space.
LIFTED, DEADLOCK, NAN_AT, ASYMMETRIC_AT = range(4)
OK = -1


def _contract(sim: list[Tensor], models: int, keep: list[int], budget: list[int], alpha: float, compat: bool) -> None:
    check.check_tensors(NAME, "sim", sim)
    if not 1 <= models <= MAX_MODELS:
        raise ValueError(f"{NAME}: 'models' must be in [1, {MAX_MODELS}], got {models}")
    for name, value in (("keep", keep), ("budget", budget)):
        if len(value) != len(sim):
            raise ValueError(f"{NAME}: '{name}' must have one entry per space ({len(sim)}), got {len(value)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{NAME}: 'alpha' must be in [0, 1], got {alpha}")
    if compat and alpha == 0:
        raise ValueError(
            f"{NAME}: 'alpha' must be in (0, 1] with compat=True, got 0; "
            "zipfast.compat.zipit.match_tensors_zipit follows the reference there"
        )
    for s, t in enumerate(sim):
        check.check_dtype(NAME, f"sim[{s}]", t, (torch.float32, torch.float64))
        if t.dim() != 2 or t.shape[0] != t.shape[1]:
            raise ValueError(f"{NAME}: 'sim' must be square [F, F], got {list(t.shape)}")
        size = t.shape[0]
        if size == 0 or size % models:
            raise ValueError(f"{NAME}: 'sim' must be [M*D, M*D] with M = {models} models, got {list(t.shape)}")
        if not 1 <= keep[s] <= size:
            raise ValueError(f"{NAME}: 'keep' must be in [1, {size}], got {keep[s]}")
        if alpha == 0 and size - keep[s] > size // 2:
            raise ValueError(
                f"{NAME}: 'alpha' must be greater than 0 where more than half of the {size} features are merged away "
                f"(keep = {keep[s]}), got 0: with alpha = 0 a feature takes part in one merge only"
            )
    check.check_same(NAME, "sim", sim)


def _fake(
    sim: list[Tensor], models: int, keep: list[int], budget: list[int], alpha: float, compat: bool, path: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = sum(t.shape[0] for t in sim)
    merges = sum(t.shape[0] - k for t, k in zip(sim, keep))
    new = sim[0].new_empty
    return (
        new(features, dtype=torch.int64),
        new((merges, 2), dtype=torch.int64),
        new(merges),
        new((len(sim), 4), dtype=torch.int64),
    )


@op(
    "zip_match(Tensor[] sim, int models, int[] keep, int[] budget, float alpha, bool compat, "
    'str path="auto") -> (Tensor, Tensor, Tensor, Tensor)',
    contract=_contract,
    fake=_fake,
    paths=Paths(("rounds", "sequential")),
)
def zip_match(
    sim: list[Tensor], models: int, keep: list[int], budget: list[int], alpha: float, compat: bool, path: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Merge the most similar pair of groups again and again, until ``keep`` groups remain.

    Groups start as single features, in order; a group lives in the slot of its lowest member.  One step takes the pair
    i < j with the largest similarity (ties: smallest i, then smallest j), puts j's members into slot i, and sets

    .. math:: sim(i, k) = sim(k, i) = α \min(sim(i, k), sim(j, k))

    Two rules for merges inside a model:

    *strict* (``compat=False``): each model may take part in ``budget`` of them.  A group carries the set of its models,
    and a merge is charged to every model present on both of its sides.  A pair that shares an exhausted model is forbidden.
    When every remaining pair is forbidden, the budgets are lifted for the best one; such merges are counted.  With
    α = 0 a merged group leaves the pool.

    *compat*: the public reference, bit for bit.  A group counts as the model of its
    slot; a model whose budget is at or below zero *after* a merge inside it loses all pairs inside it for good.  Where
    the reference would then merge slot 0 with itself, silently zeroing features, matching stops and says so.

    Args:
        sim: per space, symmetric [F, F], F = M·D, float32 or float64; the diagonal is ignored, -inf forbids a pair.
        models: M, up to 31.
        keep: groups that remain, per space.
        budget: per space, merges inside a model that each model may take part in (:func:`zipfast.match` derives it
            from β).
        alpha: in [0, 1].
        compat: which rule; needs alpha > 0.
        path: which CUDA kernel (see ``docs/kernels.md``): ``"rounds"`` merges all pairs at once that must come, with the
            blocks of the GPU shared out over the spaces; ``"sequential"``, one merge after the other, one block per space;
            ``"auto"``: rounds.

    Returns:
        Over all spaces, one after the other:

        group: int64 [ΣF], the group of each feature, 0..keep-1, in the order of the slots.
        pair: int64 [ΣK, 2], slots (i, j) of each merge, in the order of execution.
        value: [ΣK], similarity of each merge, as it stood then.
        status: int64 [spaces, 4]: merges with a lifted budget; merges done before no pair was left, or -1; flat index of the
        first NaN, or -1; flat index (upper triangle, first) of the first asymmetric pair, or -1.  Where one of the last
        three is set, the rest of that space is undefined: -1 and NaN.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, range, device.

    Cost and determinism: C++: O(F²) plus rescans, see csrc/cpu/zip_match.cpp; CUDA: 5 to 40 rounds over the matrix, see
    csrc/cuda/zip_match.cu, and one copy of the matrix of every space that is worked on at once, which are at most as many
    as the GPU has multiprocessors; this reference: O(K·F²).  The same bits on every backend and path, ties included.

    Reference: Stoica et al. 2024 (arXiv 2305.03053), §4.3 and App. A.
    """
    parts = [_match_one(t, models, k, b, alpha, compat) for t, k, b in zip(sim, keep, budget)]
    return tuple(torch.cat(column) for column in zip(*parts))  # type: ignore[return-value]


def _match_one(
    sim: Tensor, models: int, keep: int, budget: int, alpha: float, compat: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, features = sim.device, sim.shape[0]
    merges = features - keep
    pair = torch.full((merges, 2), -1, dtype=torch.int64, device=device)
    value = torch.full((merges,), torch.nan, dtype=sim.dtype, device=device)
    group = torch.full((features,), -1, dtype=torch.int64, device=device)
    status = torch.tensor([[0, OK, OK, OK]], dtype=torch.int64, device=device)

    sim = sim.clone().fill_diagonal_(-torch.inf)
    for column, wrong in ((NAN_AT, sim.isnan()), (ASYMMETRIC_AT, torch.triu(sim != sim.T))):
        if wrong.any():
            status[0, column] = wrong.reshape(-1).to(torch.uint8).argmax()
            return group, pair, value, status

    left = [budget] * models
    present = (1 << torch.arange(models, device=device)).repeat_interleave(features // models)  # models of each slot
    exhausted = 0 if compat or budget > 0 else (1 << models) - 1
    alive = torch.ones(features, dtype=torch.bool, device=device)
    pool = alive.clone()  # slots that may still merge
    slot = torch.arange(features, device=device)  # slot of each feature

    for t in range(merges):
        allowed = pool[:, None] & pool[None, :] & ((present[:, None] & present[None, :] & exhausted) == 0)
        best = torch.where(allowed, sim, -torch.inf)
        if best.max() == -torch.inf and not compat and exhausted:
            # Groups only gain models, so from here on every pair stays forbidden: lift once, count each merge.
            exhausted = 0
            status[0, LIFTED] = merges - t
            best = torch.where(pool[:, None] & pool[None, :], sim, -torch.inf)
        if best.max() == -torch.inf:
            status[0, DEADLOCK] = t
            status[0, LIFTED] = max(0, int(status[0, LIFTED]) - (merges - t))  # those that were not made after all
            return group, pair, value, status
        i, j = sorted(divmod(int(best.reshape(-1).argmax()), features))
        pair[t, 0], pair[t, 1], value[t] = i, j, best[i, j]

        shared = int(present[i] & present[j])
        merged = alpha * torch.minimum(best[i], best[j]) if compat else alpha * torch.minimum(sim[i], sim[j])
        sim[i], sim[:, i] = merged, merged
        sim[i, i] = -torch.inf
        slot[slot == j] = i
        alive[j] = pool[j] = False
        if alpha == 0:
            pool[i] = False
        if not compat:
            present[i] |= present[j]
        if status[0, LIFTED] == 0:
            for m in range(models):
                if shared >> m & 1:
                    left[m] -= 1
                    if left[m] <= 0:
                        exhausted |= 1 << m

    group[:] = (torch.cumsum(alive, 0) - 1)[slot]
    return group, pair, value, status
