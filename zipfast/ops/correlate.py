# SPDX-License-Identifier: Apache-2.0
"""``correlate``: the sums of ``moments_`` become correlations, for many spaces at once.

The class that users meet is :class:`zipfast.Moments`; this is the operator below it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _check as check
from ._registry import op

NAME = "correlate"
RELATIVE_FLOOR = 2.0**-18  # a standard deviation below this part of the mean is rounding, not signal
ABSOLUTE_FLOOR = 1e-30  # of a variance
FINE = torch.iinfo(torch.int64).max  # in `status`: everything is finite
FEATURE, ALIVE, PAIR = range(3)  # columns of `status`


class Spread(NamedTuple):
    """What is known of each feature, [F]."""

    mean: Tensor  # of x - shift
    value: Tensor  # mean of x
    variance: Tensor  # as it is computed: may be below 0, or not finite
    alive: Tensor  # it varies, beyond rounding


def spread(diagonal: Tensor, total: Tensor, shift: Tensor, count: int) -> Spread:
    """Mean, variance and whether a feature is alive, from Σ (x - shift)² and Σ (x - shift)."""
    share = 1.0 / count
    mean = total * share
    value, variance = shift + mean, diagonal * share - mean * mean
    limit = RELATIVE_FLOOR * torch.maximum(value.abs(), shift.abs())
    return Spread(mean, value, variance, torch.isfinite(variance) & (variance > limit * limit + ABSOLUTE_FLOOR))


def _contract(
    comoment: list[Tensor], total: list[Tensor], shift: list[Tensor], count: list[int], wide: bool, pair_dead: bool
) -> None:
    check.check_tensors(NAME, "comoment", comoment)
    for name, value in (("total", total), ("shift", shift), ("count", count)):
        if not isinstance(value, (list, tuple)) or len(value) != len(comoment):
            seen = len(value) if isinstance(value, (list, tuple)) else type(value).__name__
            raise ValueError(f"{NAME}: '{name}' must have one entry per space ({len(comoment)}), got {seen}")
    for s, square in enumerate(comoment):
        features = square.shape[-1] if square.dim() else 1
        for name, t, shape, letters in (
            ("comoment", square, (features, features), "[F, F]"),
            ("total", total[s], (features,), "[F]"),
            ("shift", shift[s], (features,), "[F]"),
        ):
            check.check_dtype(NAME, f"{name}[{s}]", t, (torch.float64,))
            check.check_device(NAME, f"{name}[{s}]", t, comoment[0].device)
            check.check_shape(NAME, f"{name}[{s}]", t, shape, letters)
        if count[s] < 1:
            raise ValueError(f"{NAME}: 'count[{s}]' must be at least 1, got {count[s]}")


def _fake(
    comoment: list[Tensor], total: list[Tensor], shift: list[Tensor], count: list[int], wide: bool, pair_dead: bool
) -> tuple[list[Tensor], Tensor]:
    dtype = torch.float64 if wide else torch.float32
    found = [t.new_empty(t.shape, dtype=dtype) for t in comoment]
    return found, comoment[0].new_empty((len(comoment), 3), dtype=torch.int64)


@op(
    "correlate(Tensor[] comoment, Tensor[] total, Tensor[] shift, int[] count, bool wide, bool pair_dead) -> "
    "(Tensor[] correlation, Tensor status)",
    contract=_contract,
    fake=_fake,
)
def correlate(
    comoment: list[Tensor], total: list[Tensor], shift: list[Tensor], count: list[int], wide: bool, pair_dead: bool
) -> tuple[list[Tensor], Tensor]:
    r"""Pearson correlations from the sums that ``moments_`` keeps, of every space.

    With N = count, μ = total / N and σ² = comoment_ii / N - μ_i²,

    .. math:: r_{ij} = \frac{comoment_{ij} / N - μ_i μ_j}{σ_i σ_j}

    A feature is alive if σ² > (2^-18 · max(\|shift + μ\|, \|shift\|))² + 1e-30; of the others, rows and columns are exactly
    0, the diagonal too.  What is not finite shows as NaN, at its own place, and in ``status``.

    Args:
        comoment: per space, float64 [F, F]: Σ (x - shift)(x - shift)ᵀ in the upper triangle; what lies below the diagonal
            is ignored.
        total: per space, float64 [F]: Σ (x - shift).
        shift: per space, float64 [F].
        count: per space N, at least 1.
        wide: float64 results instead of float32.
        pair_dead: two features that are not alive and have the same mean (to 2^-18 of it) get 1 instead of 0.

    Returns:
        ``correlation``: per space [F, F], symmetric to the bit, in [-1, 1], 1 on the diagonal of what is alive.
        ``status``: int64 [spaces, 3]: the first feature whose variance is not finite; how many are alive; the first pair
        i · F + j, i < j, that is not finite.  The largest int64: none.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, range, device.  Values raise nothing: see ``status``.

    Cost and determinism: half of ``comoment`` read once, results written once; bandwidth-bound.  In float64, rounded once
    at the end; the same bits on every compiled backend, run and thread count.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2, 3], [3, 2, 1], [0, 0, 0]], dtype=torch.float64)
        >>> found, status = correlate([x @ x.T], [x.sum(1)], [torch.zeros(3).double()], [3], False, False)
        >>> found[0].round(decimals=6).tolist(), int(status[0, ALIVE])
        ([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], 2)

    Reference: Stoica et al. 2024, §4.1 (correlation of activations).
    """
    found, notes = [], []
    for square, own_total, own_shift, n in zip(comoment, total, shift, count):
        mean, value, variance, alive = spread(square.diagonal(), own_total, own_shift, n)
        inverse = torch.where(alive, variance, 1.0).sqrt().reciprocal() * alive
        raw = (square.triu(1) * (1.0 / n) - mean[:, None] * mean) * inverse[:, None] * inverse
        upper = raw.clamp(-1, 1) + (raw - raw)  # NaN where it is not finite, and no zero with a sign
        if pair_dead:
            size = torch.maximum(value.abs()[:, None], value.abs())
            equal = (value[:, None] - value).abs() <= RELATIVE_FLOOR * size
            upper = torch.where(equal & ~(alive[:, None] | alive) & raw.isfinite(), 1.0, upper)
        upper = upper.triu(1)
        diagonal = torch.where(variance.isfinite(), alive.double(), torch.nan)
        found.append((upper + upper.T + torch.diag(diagonal)).to(torch.float64 if wide else torch.float32))
        broken = _first(~variance.isfinite()), alive.sum(), _first(~upper.isfinite().reshape(-1))
        notes.append(torch.stack(broken))
    return found, torch.stack(notes)


def _first(wrong: Tensor) -> Tensor:
    """The first index that is true."""
    if not wrong.numel():
        return torch.tensor(FINE, device=wrong.device)
    return torch.where(wrong.any(), wrong.to(torch.uint8).argmax(), FINE)
