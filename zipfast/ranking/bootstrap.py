# SPDX-License-Identifier: Apache-2.0
"""How sure a score is: statistics in shards, resampled by adding them up with random weights.

The sums of :class:`FeatureStats` add over samples. Kept for S random shards of the samples, a bootstrap replicate is a
weighted sum of S statistics and needs no second look at the data. Shards are drawn by a hash of the sample's number, so that
all models scored on the same data are resampled alike and can be compared replicate by replicate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import distributed
from .stats import FeatureStats
from .targets import Array, as_features, as_tensor

MEMORY = 2 << 30  # bytes for the shards' Gram matrices; larger features get fewer shards


@dataclass(frozen=True)
class Interval:
    """A confidence interval and the replicates behind it, already moved so that their mean is the estimate."""

    low: float
    high: float
    replicates: tuple[float, ...]


class ShardedStats:
    """:class:`FeatureStats` of S disjoint random parts of the samples.

    Args:
        empty: statistics without samples, whose options all shards get.
        shards: S; fewer where S·D² float64 numbers would take more than 2 GiB.
        seed: of the draw.
    """

    def __init__(self, empty: FeatureStats, shards: int = 16, *, seed: int = 0) -> None:
        if shards < 1:
            raise ValueError(f"{empty.name}: 'shards' must be at least 1, got {shards}")
        self.empty, self.wanted, self.seed = empty, shards, seed
        self.parts: list[FeatureStats] = []
        self._rows = 0

    def update(self, features: Array, labels: Array) -> ShardedStats:
        """Add a batch; see :meth:`FeatureStats.update`."""
        x, y = as_features(self.empty.name, features), as_tensor(self.empty.name, "labels", labels)
        if not self.parts:
            most = max(4, MEMORY // (8 * x.shape[1] ** 2))
            self.parts = [self.empty.like() for _ in range(min(self.wanted, most))]
        if len(self.parts) == 1 or y.dim() == 0 or y.shape[0] != x.shape[0]:
            self.parts[0].update(x, y)  # which also refuses labels that do not fit
            return self
        start = (distributed.rank() << 40) + self._rows
        self._rows += x.shape[0]
        owner = _scatter(torch.arange(start, start + x.shape[0]), self.seed) % len(self.parts)
        for i, part in enumerate(self.parts):
            rows = (owner == i).nonzero()[:, 0]
            if rows.numel():
                part.update(x[rows.to(x.device)], y[rows.to(y.device)])
        return self

    def all_reduce(self) -> ShardedStats:
        """The shards of all processes; each calls it."""
        if distributed.world_size() > 1:
            most = max(distributed.gather(len(self.parts)))
            self.parts += [self.empty.like() for _ in range(most - len(self.parts))]
            self.parts = [part.all_reduce() for part in self.parts]
        return self

    def total(self) -> FeatureStats:
        """All samples. The shards are brought to one shift on the way."""
        full = [part for part in self.parts if part.count]
        if not full:
            return self.empty.like()
        if len(full) == 1:
            self.parts = full  # nothing to resample
            return full[0]
        shift = full[0].flush().moments.shift
        assert shift is not None
        outputs = max(part.outputs for part in full)
        self.parts = [part.flush()._based_on(shift, outputs) for part in full]
        return self._weighted(torch.ones(len(full), dtype=torch.int64))

    def intervals(
        self,
        score: Callable[[FeatureStats], dict[str, float]],
        estimate: dict[str, float],
        *,
        replicates: int = 100,
        confidence: float = 0.95,
        progress: Callable[[str, int], None] | None = None,
    ) -> dict[str, Interval]:
        """Bootstrap intervals of the scores of :meth:`total`, which must have been called.

        A replicate draws S shards with replacement. Some samples are then in it twice, which flatters large D; so the
        replicates are moved to have the estimate as their mean, and only their spread counts.
        The interval is for the score of so many samples: that of more is higher, for LogME by O(D·ln(N)/N).

        Args:
            score: statistics -> scores by name.
            estimate: the scores of all samples.
            replicates: how many.
            confidence: the part of the replicates inside.

        Cost: `score`, replicates times.
        """
        generator = torch.Generator().manual_seed(self.seed)
        count, drawn = len(self.parts), []
        for i in range(replicates):
            draw = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a replicate may miss a class
                drawn.append(score(self._weighted(draw)))
            if progress is not None:
                progress("bootstrap", i + 1)
        return {name: _interval([d[name] for d in drawn], value, confidence) for name, value in estimate.items()}

    def _weighted(self, weight: Tensor) -> FeatureStats:
        """Each shard so many times; they have one shift."""
        first = self.parts[0]
        result = first.like()
        shift = first.moments.shift
        assert shift is not None
        result = result._based_on(shift, first.outputs)
        result._dtype, count = first._dtype, 0
        for part, times in zip(self.parts, weight.tolist()):
            if times:
                sums = (*result._sums(), *result.moments.sums())
                for mine, theirs in zip(sums, (*part._sums(), *part.moments.sums())):
                    mine.add_(theirs, alpha=times)
                count += times * part.moments.count
                result.seen += times * part.seen
                bad = torch.minimum(result.moments.status(), part.moments.status())
                result.moments.status().copy_(bad)
        result.moments.count = count
        return result


def _scatter(number: Tensor, seed: int) -> Tensor:
    """A hash of int64 numbers to [0, 2^31): neighbours and regular patterns fall apart (a multiply-xorshift mix)."""
    x = number + seed * 0x9E3779B9
    for factor in (0x45D9F3B3335B369, 0x3335B36945D9F3B):
        x = (x ^ (x >> 29)) * factor
    return (x ^ (x >> 32)) & 0x7FFFFFFF


def _interval(drawn: Sequence[float], estimate: float, confidence: float) -> Interval:
    values = torch.tensor(drawn, dtype=torch.float64)
    values = values[torch.isfinite(values)]
    if values.numel() < 2:
        return Interval(float("nan"), float("nan"), tuple(values.tolist()))
    values = values - values.mean() + estimate
    edges = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(values, edges).tolist()
    return Interval(low, high, tuple(values.tolist()))
