# SPDX-License-Identifier: Apache-2.0
"""``threshold``: exactly k weights of smallest magnitude dropped over lists of tensors (Frankle & Carbin 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._mask import mask_bytes, pack, unpack
from ._registry import op

NAME = "threshold"
FINITE = torch.iinfo(torch.int64).max  # in `status`: no survivor of this tensor is NaN


def _contract(score: list[Tensor], mask: list[Tensor], drop: list[int], group: list[int]) -> None:
    check.check_tensors(NAME, "score", score)
    count, device = len(score), score[0].device
    for i, t in enumerate(score):
        check.check_dtype(NAME, f"score[{i}]", t, check.FLOATING)
        check.check_device(NAME, f"score[{i}]", t, device)
    if not isinstance(mask, (list, tuple)) or len(mask) not in (0, count):
        seen = len(mask) if isinstance(mask, (list, tuple)) else type(mask).__name__
        raise ValueError(
            f"{NAME}: 'mask' must be empty or hold one packed mask for each of {count} in 'score', got {seen}"
        )
    for i, t in enumerate(mask):
        check.check_dtype(NAME, f"mask[{i}]", t, (torch.uint8,))
        check.check_device(NAME, f"mask[{i}]", t, device)
        check.check_shape(NAME, f"mask[{i}]", t, [mask_bytes(score[i].numel())], "64·ceil(n / 512) bytes")
    if not drop:
        raise ValueError(f"{NAME}: 'drop' must hold one number for each group, got none")
    for g, k in enumerate(drop):
        if k < 0:
            raise ValueError(f"{NAME}: 'drop[{g}]' must be 0 or more, got {k}")
    if len(group) != count:
        raise ValueError(f"{NAME}: 'group' must hold one number for each of {count} in 'score', got {len(group)}")
    dtypes: dict[int, torch.dtype] = {}
    for i, g in enumerate(group):
        if not 0 <= g < len(drop):
            raise ValueError(f"{NAME}: 'group[{i}]' must be one of the {len(drop)} groups of 'drop', got {g}")
        if score[i].dtype != dtypes.setdefault(g, score[i].dtype):
            wanted = f"{check.words([dtypes[g]])} as the others of group {g}"
            raise TypeError(f"{NAME}: 'score[{i}]' must be {wanted}, got {check.words([score[i].dtype])}")


def _fake(score: list[Tensor], mask: list[Tensor], drop: list[int], group: list[int]) -> tuple[list[Tensor], Tensor]:
    kept = [t.new_empty((mask_bytes(t.numel()),), dtype=torch.uint8) for t in score]
    return kept, score[0].new_empty((len(score) + len(drop),), dtype=torch.int64)


@op(
    "threshold(Tensor[] score, Tensor[] mask, int[] drop, int[] group) -> (Tensor[] kept, Tensor status)",
    contract=_contract,
    fake=_fake,
)
def threshold(
    score: list[Tensor], mask: list[Tensor], drop: list[int], group: list[int]
) -> tuple[list[Tensor], Tensor]:
    r"""Drop exactly k survivors of smallest magnitude in each group of tensors.

    .. math:: kept_j = mask_j \setminus \{\text{the } drop_g \text{ first of group } g = group_j
              \text{ by } (|score|, \text{tensor}, \text{flat index})\}

    Only survivors (bits of ``mask`` that are 1) are ranked, whatever the others score.  Zeros of either sign are equal,
    infinity is the largest number, and NaN ranks behind it.  Ties: of the tensor that comes first, the element that comes
    first, goes first.

    A packed mask of n elements is uint8, 64·ceil(n / 512) bytes: element i of the flattened tensor is bit ``i & 7`` of byte
    ``i >> 3``, 1 if it is alive; what follows the last element is 0 in ``kept`` and not looked at in ``mask``.

    Args:
        score: tensors, float32, float64, float16 or bfloat16; of one dtype within a group.
        mask: packed masks, one for each tensor; or none: all elements are alive.
        drop: for each group, how many to drop, 0 or more; more than there are drops all.
        group: for each tensor, its group, in any order; a group may be without tensors.

    Returns:
        ``kept``: new packed masks. ``status``: int64 [tensors + groups], first the flat index of the first survivor of each
        tensor that is NaN (the largest int64: none is), then the survivors of each group before any was dropped: where
        ``drop`` is more, it could not be met.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, range, device.  Values raise nothing: see ``status``.

    Cost and determinism: C++ and CUDA read every element once and 2-4 % of them again (all of them up to nine times where
    most values are equal).  CUDA takes three launches for up to 384 tensors and 256 groups, and 0.4 bytes of scratch for
    each element (0.7 if any is float64).  Equal bits on every backend, run and thread count.

    Example:
        >>> import torch
        >>> kept, status = threshold([torch.tensor([3., -1., 1., -2.])], [], [2], [0])
        >>> int(kept[0][0]), status.tolist()[1:]  # bits 0 and 3 remain, of four survivors
        (9, [4])

    Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), §1: "prune p% of the parameters"; by magnitude,
    layer by layer or over all of them (§4).
    """
    alive = [unpack(mask[j], (t.numel(),)) if mask else _all(t) for j, t in enumerate(score)]
    kept = [a.clone() for a in alive]
    status = torch.full((len(score) + len(drop),), FINITE, device=score[0].device)
    for j, t in enumerate(score):
        if t.numel():
            wrong = alive[j] & t.reshape(-1).isnan()
            status[j] = torch.where(wrong.any(), wrong.to(torch.uint8).argmax(), FINITE)
    for g, k in enumerate(drop):
        members = [j for j in range(len(score)) if group[j] == g]
        if not members:
            status[len(score) + g] = 0
            continue
        live = torch.cat([alive[j] for j in members])
        value = torch.cat([score[j].detach().reshape(-1) for j in members]).double().abs()
        order = torch.argsort(value, stable=True)  # NaN comes last
        order = order[torch.argsort((~live[order]).to(torch.uint8), stable=True)]  # survivors before the dead
        keep = live.clone()
        keep[order[: min(k, live.numel())]] = False
        for j, part in zip(members, keep.split([score[j].numel() for j in members])):
            kept[j] = part
        status[len(score) + g] = live.sum()
    return [pack(k) for k in kept], status


def _all(t: Tensor) -> Tensor:
    return torch.ones(t.numel(), dtype=torch.bool, device=t.device)
