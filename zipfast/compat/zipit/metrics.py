# SPDX-License-Identifier: Apache-2.0
"""The public code's metrics over batches: what ``ModelMerge.compute_metrics`` fills and hands to a matching.

Features come as that code's hooks leave them, one [D, s] per model: D features, s positions of a batch.  A batch of B
images counts B whatever its s, as there:  outer = Σ B·XXᵀ/s,  mean = Σ B·mean(X).  Sums are those of
:class:`zipfast.Moments`, shifted and in float64, so that a large mean costs no digits; batches of one B/s share one of
them, and a batch of another B/s (images of another size) has the sums so far folded into float64 totals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...merging.moments import Moments


class MetricCalculator(ABC):
    """What a metric offers: a name, ``update`` for each batch, ``finalize`` at the end."""

    name: str

    @abstractmethod
    def update(self, batch_size: float, *feats: Tensor, **aux_params: Any) -> None:
        """Add a batch: features [D, s] of each model."""

    @abstractmethod
    def finalize(self, numel: float, eps: float = 1e-4) -> Tensor:
        """The metric over all batches; numel = Σ batch_size."""


class CovarianceMetric(MetricCalculator):
    """Covariance [F, F] of the stacked features, divided by the count; symmetric to the bit, no variance below 0.

    Law: any split of the same positions into batches of one B/s gives the same result, up to rounding.

    NaN and infinity count as 0, as in the public code.  Where a channel's mean is large against its spread, that code's
    float32 sums lose the variance (off by 36 % at mean/std = 1000) or make it negative and open a debugger; here it is
    right.  ``eps`` is ignored, as there.

    Example:
        >>> import torch
        >>> metric = CovarianceMetric()
        >>> metric.update(2, torch.tensor([[1.0, 3.0]]), torch.tensor([[4.0, 0.0]]))
        >>> metric.finalize(2)
        tensor([[ 1., -2.],
                [-2.,  4.]])
    """

    name = "covariance"

    def __init__(self) -> None:
        self._sums = _Weighted("CovarianceMetric")

    def update(self, batch_size: float, *feats: Tensor, **aux_params: Any) -> None:
        self._sums.add(batch_size, [_without_nan(x) for x in self._sums.check(feats)])

    def finalize(self, numel: float, eps: float = 1e-4) -> Tensor:
        return self._sums.centred(_positive(self._sums.op, "numel", numel))


class MeanMetric(MetricCalculator):
    """Mean magnitude of each stacked feature, [F]."""

    name = "mean"

    def __init__(self) -> None:
        self._features = _Features("MeanMetric")
        self._total: Tensor | None = None

    def update(self, batch_size: float, *feats: Tensor, **aux_params: Any) -> None:
        means = [torch.linalg.vector_norm(x, 1, dim=1) / x.shape[1] for x in self._features.check(feats)]
        total = torch.cat(means) * batch_size
        self._total = total if self._total is None else self._total + total

    def finalize(self, numel: float, eps: float = 1e-4) -> Tensor:
        result: Tensor = _added("MeanMetric", self._total) / _positive("MeanMetric", "numel", numel)
        return result


class CorrelationMetric(MetricCalculator):
    r"""(outer - mean·meanᵀ) / (σσᵀ + eps), σ the mean over the batches of their standard deviations (divided by s - 1).

    Two ways to call it.  ``update(batch_size, *feats)`` and ``finalize(numel)``, as ``ModelMerge`` does, which the public
    class cannot take; and, as that class is written, ``update(batch_size, dx, *feats)`` with the batch's share dx of the
    data, then ``finalize(eps)``.

    Raises: ValueError: NaN or infinity; both ways mixed.
    """

    name = "correlation"

    def __init__(self) -> None:
        self._sums = _Weighted("CorrelationMetric")
        self._std: Tensor | None = None
        self._way = _Way("CorrelationMetric")

    def update(self, batch_size: float, *feats: Any, **aux_params: Any) -> None:
        share, given = self._way.read(batch_size, feats)
        tensors = self._sums.check(given)
        std = torch.cat([x.std(dim=1) for x in tensors]).double() * share
        self._sums.add(share, tensors)
        self._std = std if self._std is None else self._std + std

    def finalize(self, numel: float | None = None, eps: float = 1e-4) -> Tensor:
        numel, eps = self._way.end(numel, eps)
        std = _added("CorrelationMetric", self._std) / numel
        return (self._sums.centred(numel, wide=True) / (torch.outer(std, std) + eps)).to(self._sums.dtype)


class CossimMetric(MetricCalculator):
    """Cosine similarity of the features, over pieces of ``batch_size`` positions, averaged.

    The positions of a batch are cut into s / batch_size pieces, one after the other, as in the public code; of features
    [D, batch_size] (linear layers) there is one.  A feature that is 0 in a piece has similarity 0 there, itself included;
    the public code divides 0 by 0.  Called in the two ways of :class:`CorrelationMetric`.

    Raises: ValueError: NaN or infinity; s not a multiple of batch_size; both ways mixed.
    """

    name = "cossim"

    def __init__(self) -> None:
        self._sums = _Weighted("CossimMetric")
        self._way = _Way("CossimMetric")

    def update(self, batch_size: float, *feats: Any, **aux_params: Any) -> None:
        share, given = self._way.read(batch_size, feats)
        tensors, piece = self._sums.check(given), int(batch_size)
        positions = tensors[0].shape[1]
        if piece < 1 or positions % piece:
            raise ValueError(f"CossimMetric: 'batch_size' must divide the {positions} positions, got {batch_size}")
        units = []
        for x in tensors:
            pieces = x.reshape(x.shape[0], -1, piece)
            norm = torch.linalg.vector_norm(pieces, dim=-1, keepdim=True)
            units.append((pieces / torch.where(norm == 0, 1, norm)).reshape(x.shape))
        self._sums.add(share * piece, units)  # over s, so that the sum of the squares is over s / piece

    def finalize(self, numel: float | None = None, eps: float = 1e-4) -> Tensor:
        numel, _ = self._way.end(numel, eps)
        return self._sums.outer(numel)


METRICS: tuple[type[MetricCalculator], ...] = (MeanMetric, CovarianceMetric, CorrelationMetric, CossimMetric)


def get_metric_fns(names: Iterable[str]) -> dict[str, type[MetricCalculator]]:
    """Classes by their names: mean, covariance, correlation, cossim; else NotImplementedError, as in the public code."""
    known = {metric.name: metric for metric in METRICS}
    found = {}
    for name in names:
        if name not in known:
            raise NotImplementedError(f"get_metric_fns: 'names' must be of {', '.join(known)}, got {name!r}")
        found[name] = known[name]
    return found


class _Features:
    """What every metric asks of the features: one [D, s] per model, of as many features in every batch."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._stacked: int | None = None

    def check(self, feats: tuple[Tensor, ...]) -> list[Tensor]:
        if not feats:
            raise ValueError(f"{self.op}: features must be one tensor [D, s] per model, got none")
        for m, x in enumerate(feats):
            if not isinstance(x, Tensor) or x.dim() != 2 or 0 in x.shape or not x.is_floating_point():
                kind = type(x).__name__
                got = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else kind
                raise ValueError(
                    f"{self.op}: features of model {m} must be floating-point [D, s], neither of them 0, got {got}"
                )
        stacked = sum(x.shape[0] for x in feats)
        if self._stacked not in (None, stacked):
            raise ValueError(f"{self.op}: features must be as many in every batch, got {self._stacked}, then {stacked}")
        self._stacked = stacked
        return [x.detach() for x in feats]


class _Weighted(_Features):
    """Moments of batches with weights w of each position: W = Σ w, the mean, and Σ w(x - mean)(x - mean)ᵀ / W.

    Batches of one weight run in one `Moments`; another weight folds it into the float64 totals (Chan, Golub and LeVeque
    1983, §2, with weights).
    """

    def __init__(self, op: str) -> None:
        super().__init__(op)
        self.dtype = torch.float32
        self._moments: Moments | None = None
        self._weight = 0.0
        self._total: tuple[float, Tensor, Tensor] | None = None

    def add(self, share: float, feats: list[Tensor]) -> None:
        """A batch that counts `share` in all, spread evenly over its positions."""
        _positive(self.op, "batch_size", share)
        weight = share / feats[0].shape[1]
        if self._moments is None or weight != self._weight:
            self._fold()
            self._moments, self._weight = Moments(len(feats), name=self.op), weight
        if feats[0].dtype == torch.float64:
            self.dtype = torch.float64
        self._moments.update(*feats, axis=0)

    def centred(self, numel: float, *, wide: bool = False) -> Tensor:
        """outer / numel - (mean / numel)(mean / numel)ᵀ, without cancellation; float64 if `wide`."""
        whole, mean, covariance = self._result()
        part = whole / numel
        if abs(part - 1) > 1e-9:  # numel is not what was added: then this is no covariance, as in the public code
            covariance = part * covariance + (part - part * part) * torch.outer(mean, mean)
        return covariance if wide else covariance.to(self.dtype)

    def outer(self, numel: float) -> Tensor:
        """Σ w·xxᵀ / numel."""
        whole, mean, covariance = self._result()
        return (whole / numel * (covariance + torch.outer(mean, mean))).to(self.dtype)

    def _result(self) -> tuple[float, Tensor, Tensor]:
        self._fold()
        whole, mean, covariance = _added(self.op, self._total)
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError(f"{self.op}: features must have squares that can be summed, got overflow; rescale them")
        return whole, mean, covariance

    def _fold(self) -> None:
        if self._moments is None:
            return
        whole = self._weight * self._moments.count
        new = (whole, self._moments.mean(), self._moments.covariance())
        self._moments = None
        if self._total is None:
            self._total = new
            return
        before, mean, covariance = self._total
        both, delta = before + whole, new[1] - mean
        spread = (before * covariance + whole * new[2]) / both
        self._total = (
            both,
            mean + delta * (whole / both),
            spread + (before / both * whole / both) * delta.outer(delta),
        )


class _Way:
    """Which of the two ways a metric is called in: with a share dx of the data before the features, or without."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._shares: bool | None = None

    def read(self, batch_size: float, feats: tuple[Any, ...]) -> tuple[float, tuple[Tensor, ...]]:
        """The weight of the batch, and the features."""
        shares = bool(feats) and not (isinstance(feats[0], Tensor) and feats[0].dim() > 0)
        if self._shares not in (None, shares):
            raise ValueError(f"{self.op}: 'update' must get a share of the data in every batch or in none, got both")
        self._shares = shares
        return (float(feats[0]), feats[1:]) if shares else (float(batch_size), feats)

    def end(self, numel: float | None, eps: float) -> tuple[float, float]:
        """What to divide by, and eps: with shares, which add up to 1, the one number given is eps."""
        if self._shares:
            return 1.0, eps if numel is None else float(numel)
        if numel is None and self._shares is not None:
            raise ValueError(f"{self.op}: 'numel' must be the sum of the batch sizes, got None")
        return _positive(self.op, "numel", 1.0 if numel is None else numel), eps


def _without_nan(x: Tensor) -> Tensor:
    """NaN and infinity as 0.  A GPU is not asked first, as that would have to wait for it."""
    if x.device.type == "cpu" and bool(torch.isfinite(x.sum())):
        return x
    return torch.nan_to_num(x, 0.0, 0.0, 0.0)


def _positive(op: str, name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{op}: '{name}' must be above 0, got {value}")
    return float(value)


def _added(op: str, total: Any) -> Any:
    if total is None:
        raise ValueError(f"{op}: 'finalize' must come after at least one 'update', got none")
    return total
