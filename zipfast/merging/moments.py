# SPDX-License-Identifier: Apache-2.0
"""Streaming moments of the features of M models in one space, and the correlations that matching needs.

Uncentred float32 sums give negative variances and wrong correlations where a channel's mean is large. Here each feature is
shifted by a fixed number c before it is squared: 0 if |mean| <= 2 std in the first batch (a blind mean shift would turn the
exact zeros after a ReLU into inexact constants), else the mean rounded to a power of two below std / 2, so that c is short
and what remains of the mean is less than the spread. Sums stay additive
over batches and workers; differently shifted ones are rebased in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.correlate import ALIVE, FEATURE, FINE, PAIR, correlate, spread
from ..ops.moments import NO_BAD_VALUE, moments_

FORMAT = "zipfast.moments/1"
SHIFT_SAMPLES = 16384  # of the first batch, to choose the shift by


@dataclass
class _Sums:
    """What the kernel adds to; sums are of x - shift."""

    shift: Tensor  # [F] float64, each value exact in float32
    total: Tensor  # [F] float64
    comoment: Tensor  # [F, F] float64, upper triangle
    bad: Tensor  # [M] int64, see ops.moments

    @staticmethod
    def zeros(shift: Tensor, models: int) -> _Sums:
        stacked = shift.shape[0]
        bad = torch.full((models,), NO_BAD_VALUE, dtype=torch.int64, device=shift.device)
        return _Sums(shift, shift.new_zeros(stacked), shift.new_zeros(stacked, stacked), bad)


class Moments:
    """Means, covariance and correlation of the stacked features of M models, batch by batch.

    Laws: ``Moments.merge(a.update(x), b.update(y))`` equals ``c.update(x).update(y)`` to 1e-12 for float64 features, and
    for the others where both started from one shift (``b = a.like()``): then the same float32 products are added, in
    another order. With shifts of their own, float32 features agree to about 1e-7.

    Args:
        models: M, the number of models.
        name: what the errors call this space.

    Example:
        >>> import torch, zipfast
        >>> a, b = torch.randn(8, 3, 5, 5), torch.randn(8, 3, 5, 5)
        >>> moments = zipfast.Moments(2).update(a, b)
        >>> moments.count, tuple(moments.correlation().shape)
        (200, (6, 6))

    Reference: Stoica et al. 2024, §4.1 (correlation of activations); Chan, Golub and LeVeque 1983, §2 (shifted sums).
    """

    def __init__(self, models: int, *, name: str = "features") -> None:
        if models < 1:
            raise ValueError(f"Moments: 'models' must be at least 1, got {models}")
        self.models, self.name = models, name
        self.count = 0
        self._sums: _Sums | None = None  # until the first batch gives sizes and shift

    def like(self) -> Moments:
        """An empty accumulator with the same shift, for another worker."""
        other = Moments(self.models, name=self.name)
        if self._sums is not None:
            other._sums = _Sums.zeros(self._sums.shift, self.models)
        return other

    @property
    def shift(self) -> Tensor | None:
        """The number subtracted from each stacked feature, float64 [F]; None before the first batch."""
        return None if self._sums is None else self._sums.shift

    @property
    def device(self) -> torch.device | None:
        """Where the sums are; None before the first batch."""
        return None if self._sums is None else self._sums.shift.device

    def prepare(self, *features: Tensor, axis: int = 1) -> Moments:
        """Choose the shift by these features without adding them, as `update` does by the first batch it sees."""
        tensors, axis = _as_stored(self, features, axis)
        if self._sums is None and tensors[0].numel():
            with torch.no_grad():
                self._sums = _Sums.zeros(_choose_shift(tensors, axis), self.models)
        return self

    def start(self, shift: Tensor) -> Moments:
        """Begin empty with a shift from elsewhere, float64 [F] of values exact in float32: another worker's."""
        if self.count:
            raise ValueError(f"Moments.start: space '{self.name}' must be empty, got {self.count} samples")
        self._sums = _Sums.zeros(shift, self.models)
        return self

    def sums(self) -> list[Tensor]:
        """The tensors that add up over workers with one shift."""
        return [] if self._sums is None else [self._sums.total, self._sums.comoment]

    def status(self) -> Tensor:
        """First bad place per model, int64 [M]; the least over workers counts."""
        return self._sums.bad if self._sums is not None else torch.full((self.models,), NO_BAD_VALUE)

    def update(self, *features: Tensor, axis: int = 1) -> Moments:
        """Add one batch.

        Args:
            features: M tensors of one shape, dtype (float32, float64, float16, bfloat16) and device, one per model, in
                any layout with the D features along ``axis``: NCHW (axis 1), tokens (..., D) (axis -1), (N, D).
                Channels-last memory is read as it lies.
            axis: the feature axis.

        Returns:
            self.

        Raises:
            ValueError, TypeError, RuntimeError: shapes, dtypes or devices that do not fit; on the CPU also a NaN or
                infinity (elsewhere it is reported when the moments are read).
        """
        update_all([self], [features], [axis])
        return self

    def merge(self, other: Moments) -> Moments:
        """The moments of both, as a new accumulator with this one's shift."""
        if (self.models, self.features) != (other.models, other.features) and self.count and other.count:
            raise ValueError(
                f"Moments.merge: 'other' must have {self.models} models and {self.features} stacked features, "
                f"got {other.models} and {other.features}"
            )
        first, second = (self, other) if self._sums is not None else (other, self)
        result = first.like()
        if first._sums is None or result._sums is None:
            return result
        result.count = first.count + second.count
        sums, mine, theirs = result._sums, first._sums, second._sums
        sums.total += mine.total
        sums.comoment += mine.comoment
        sums.bad = mine.bad.clone()
        if theirs is not None:
            device = mine.shift.device
            delta, total = theirs.shift.to(device) - mine.shift, theirs.total.to(device)
            cross = torch.outer(delta, total)  # x - c1 = (x - c2) + delta
            sums.total += total + second.count * delta
            sums.comoment += theirs.comoment.to(device) + cross + cross.T + second.count * torch.outer(delta, delta)
            sums.bad = torch.minimum(sums.bad, theirs.bad.to(device))
        return result

    @property
    def features(self) -> int:
        """F = M·D, stacked; 0 before the first batch."""
        return 0 if self._sums is None else self._sums.shift.shape[0]

    def mean(self) -> Tensor:
        """Mean of each stacked feature, float64 [F]."""
        sums = self._require(1)
        return sums.shift + sums.total / self.count

    def total(self) -> Tensor:
        """Σ (x - shift) of each stacked feature, float64 [F]."""
        return self._require(1).total

    def second(self) -> Tensor:
        """Σ (x - shift)(x - shift)ᵀ, float64 [F, F], symmetric to the bit."""
        full = self._require(1).comoment.triu()
        below = full.T.tril(-1)
        return full.add_(below)

    def gram(self) -> Tensor:
        """Σ x xᵀ, not centred, float64 [F, F], symmetric to the bit."""
        sums, second = self._require(1), self.second()
        if bool((sums.shift == 0).all()):
            return second
        cross = torch.outer(sums.shift, sums.total + 0.5 * self.count * sums.shift)
        return second.add_(cross).add_(cross.T)

    def covariance(self) -> Tensor:
        """Biased covariance (divided by the count), float64 [F, F], symmetric to the bit; no variance is negative.

        Raises:
            ValueError: no sample yet, or a feature that is not finite.
        """
        sums = self._require(1)
        mean = sums.total / self.count
        upper = torch.triu(sums.comoment / self.count - torch.outer(mean, mean), 1)
        variance = (sums.comoment.diagonal() / self.count - mean * mean).clamp(min=0)
        return upper + upper.T + torch.diag(variance)

    def alive(self) -> Tensor:
        """Which features vary, bool [F]: their variance is above rounding level, (2^-18 · mean)² + 1e-30."""
        sums = self._require(2)
        return spread(sums.comoment.diagonal(), sums.total, sums.shift, self.count).alive

    def correlation(self, *, dtype: torch.dtype = torch.float32, pair_dead: bool = False) -> Tensor:
        """Pearson correlation [F, F], symmetric to the bit, in [-1, 1].

        A feature whose variance is at rounding level, (2^-18 · mean)² + 1e-30 or less, is dead: its row and column are
        exactly 0, its diagonal too; never NaN.

        Args:
            dtype: of the result; the computation is float64.
            pair_dead: give two dead features of equal value (two ReLU channels that are always 0) similarity 1: merging
                them loses nothing on the data, and leaves more groups to the others.

        Raises:
            ValueError: fewer than two samples; a feature that is not finite (model, sample and feature are named);
                every feature dead.
        """
        return correlate_all([self], dtype=dtype, pair_dead=pair_dead)[0]

    def check_finite(self) -> None:
        """Read the status the kernels left; one host synchronisation.

        Raises:
            ValueError: a feature is NaN or infinite; names space, model, sample and feature.
        """
        if self._sums is not None:
            self._refuse(self._sums.bad.tolist())

    def _refuse(self, bad: Sequence[int]) -> None:
        for model, place in enumerate(bad):
            if place != NO_BAD_VALUE:
                sample, feature = divmod(place, self.features // self.models)
                raise ValueError(
                    f"Moments: features of space '{self.name}' must be finite, got NaN or infinity in model {model}, "
                    f"feature {feature}, first at sample {sample}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers; :meth:`from_state_dict` restores an equal accumulator."""
        state: dict[str, Any] = {"format": FORMAT, "models": self.models, "name": self.name, "count": self.count}
        return state if self._sums is None else state | {k: v.clone() for k, v in vars(self._sums).items()}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Moments:
        if state.get("format") != FORMAT:
            raise ValueError(f"Moments: 'format' must be {FORMAT!r}, got {state.get('format')!r}")
        moments = Moments(state["models"], name=state["name"])
        moments.count = state["count"]
        if "shift" in state:
            moments._sums = _Sums(*(state[key].clone() for key in ("shift", "total", "comoment", "bad")))
        return moments

    def _require(self, samples: int) -> _Sums:
        sums = self._seen(samples)
        self.check_finite()
        return sums

    def _seen(self, samples: int) -> _Sums:
        if self._sums is None or self.count < samples:
            raise ValueError(
                f"Moments: space '{self.name}' must have seen at least {samples} sample{'s' if samples > 1 else ''}, "
                f"got {self.count}"
            )
        return self._sums


def correlate_all(
    moments: Sequence[Moments], *, dtype: torch.dtype = torch.float32, pair_dead: bool = False
) -> list[Tensor]:
    """The correlations of many spaces in one call of the kernel, with one host read; see `Moments.correlation`."""
    if not moments:
        return []
    sums = [m._seen(2) for m in moments]
    found, status = correlate(
        [s.comoment for s in sums],
        [s.total for s in sums],
        [s.shift for s in sums],
        [m.count for m in moments],
        dtype != torch.float32,
        pair_dead,
    )
    notes = torch.cat([status.reshape(-1), *(s.bad for s in sums)]).tolist()
    at = status.numel()
    for i, m in enumerate(moments):
        m._refuse(notes[at : at + m.models])
        at += m.models
        note = notes[3 * i : 3 * i + 3]
        if note[FEATURE] != FINE or (note[ALIVE] and note[PAIR] != FINE):
            raise ValueError(f"Moments: the features of space '{m.name}' are too large for their squares to be summed")
        if not note[ALIVE]:
            raise ValueError(
                f"Moments: at least one feature of space '{m.name}' must vary, got {m.features} dead or constant "
                "ones; check the data and that the models are trained"
            )
    return [t.to(dtype) for t in found]


def update_all(moments: Sequence[Moments], features: Sequence[Sequence[Tensor]], axes: Sequence[int]) -> None:
    """Add one batch to many spaces in one call of the kernel: ``features[s]`` are the M tensors of space s."""
    flat: list[Tensor] = []
    axis_of: list[int] = []
    sums: list[_Sums] = []
    added: list[Moments] = []
    with torch.no_grad():
        for space, own, axis in zip(moments, features, axes):
            tensors, axis = _as_stored(space, own, axis)
            if not tensors[0].numel():
                continue  # nothing to add, and nothing to choose a shift by
            if space._sums is None:
                space._sums = _Sums.zeros(_choose_shift(tensors, axis), space.models)
            sums.append(space._sums)
            added.append(space)
            flat += tensors
            axis_of.append(axis)
        if not added:
            return
        moments_(
            [s.comoment for s in sums],
            [s.total for s in sums],
            [s.bad for s in sums],
            flat,
            [s.shift for s in sums],
            axis_of,
            [m.count for m in added],
        )
    for i, (space, axis) in enumerate(zip(added, axis_of)):
        first = flat[i * space.models]
        space.count += first.numel() // first.shape[axis]
        if first.device.type == "cpu":  # free here; a GPU would have to be waited for
            space.check_finite()


def _as_stored(space: Moments, features: Sequence[Tensor], axis: int) -> tuple[list[Tensor], int]:
    """The features as views in memory order, so that no kernel has to copy channels-last tensors."""
    if len(features) != space.models:
        raise ValueError(f"Moments: space '{space.name}' must get {space.models} tensors, got {len(features)}")
    first = features[0]
    if not -first.dim() <= axis < first.dim():
        raise ValueError(f"Moments: 'axis' must be in [{-first.dim()}, {first.dim()}), got {axis}")
    axis %= first.dim()
    for m, x in enumerate(features):
        if x.shape != first.shape:
            raise ValueError(
                f"Moments: the models must agree on the features of space '{space.name}', "
                f"got {list(first.shape)} in model 0 and {list(x.shape)} in model {m}"
            )
    if space._sums is not None and space.features != space.models * first.shape[axis]:
        raise ValueError(
            f"Moments: space '{space.name}' must have {space.features // space.models} features per model, "
            f"got {first.shape[axis]}"
        )
    if all(x.is_contiguous() for x in features):
        return list(features), axis
    last = [x.movedim(axis, -1) for x in features]
    if all(x.is_contiguous() for x in last):
        return last, first.dim() - 1
    return [x.contiguous() for x in features], axis


def _choose_shift(features: Sequence[Tensor], axis: int) -> Tensor:
    """Per feature 0 where |mean| <= 2 std over a part of the first batch, else the shortest number within std / 4 of it."""
    shifts = []
    for x in features:
        positions = x.numel() // max(1, x.shape[0] * x.shape[axis]) if axis else x.numel() // max(1, x.shape[0])
        part = x[: max(1, SHIFT_SAMPLES // max(1, positions))] if axis else x
        # So few that torch does not split a row among threads: the choice must not depend on their number.
        rows = part.movedim(axis, 0).reshape(x.shape[axis], -1)[:, :SHIFT_SAMPLES].double()
        variance, mean = torch.var_mean(rows, 1, correction=0)
        std = variance.sqrt()
        grid = torch.ldexp(torch.ones_like(std), torch.frexp(std).exponent - 2)  # in [std / 4, std / 2]
        short = torch.where(std > 0, torch.round(mean / grid) * grid, mean)
        wanted = (mean.abs() > 2 * std) & torch.isfinite(mean)
        shifts.append(torch.where(wanted, short, 0.0).float().double())
    return torch.cat(shifts)
