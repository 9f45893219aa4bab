# SPDX-License-Identifier: Apache-2.0
"""Does a ranking agree with given accuracies? Weighted Kendall τ with a bootstrap interval over the models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Weighted Kendall τ in [-1, 1], its interval over resampled models, and their number."""

    tau: float
    low: float
    high: float
    models: int

    def __str__(self) -> str:
        return f"{self.tau:.3f} [{self.low:.2f}, {self.high:.2f}]"


def weighted_tau(scores: Sequence[float], accuracies: Sequence[float]) -> float:
    """How well scores order models as their accuracies do; mistakes among the best count most.

    SciPy's `weightedtau` with its defaults (additive hyperbolic weights, the mean over both rankings), as the LogME paper
    uses it.

    Raises:
        ValueError: fewer than two models, different lengths, NaN. ImportError: no SciPy.

    Example:
        >>> round(weighted_tau([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]), 6)
        0.671533

    Reference: Vigna 2015, *A weighted correlation index for rankings with ties*; You et al. 2021, §5.
    """
    a, b = np.asarray(scores, dtype=np.float64), np.asarray(accuracies, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.shape[0] < 2:
        raise ValueError(
            "weighted_tau: 'scores' and 'accuracies' must have one number per model, two or more, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("weighted_tau: 'scores' and 'accuracies' must be finite, got NaN or infinity")
    return _tau(a, b)


def agreement(
    scores: Mapping[str, float],
    truth: Mapping[str, float],
    *,
    replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """:func:`weighted_tau` over the models that have both, with a percentile interval of resampled models.

    Raises:
        ValueError: fewer than two models have both; ImportError: no SciPy.

    Example:
        >>> agreement({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 60.0, "b": 70.0, "c": 80.0}).tau
        1.0

    Cost: one sort of the models per replicate.
    """
    names = [name for name in scores if name in truth and math.isfinite(scores[name])]
    if len(names) < 2:
        known = ", ".join(list(scores)[:5])
        raise ValueError(
            f"agreement: 'truth' must name two or more of the scored models ({known}), got {len(names)} of them"
        )
    a, b = np.array([scores[n] for n in names]), np.array([truth[n] for n in names], dtype=np.float64)
    tau = weighted_tau(a.tolist(), b.tolist())
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(replicates):
        pick = generator.integers(0, len(names), len(names))
        if len(set(a[pick])) > 1 and len(set(b[pick])) > 1:
            drawn.append(_tau(a[pick], b[pick]))
    if len(drawn) < 2:
        return Agreement(tau, math.nan, math.nan, len(names))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Agreement(tau, float(low), float(high), len(names))


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    try:
        from scipy.stats import weightedtau
    except ImportError as e:
        raise ImportError("weighted_tau: SciPy must be installed; pip install 'zipfast[rank]'") from e
    return float(weightedtau(a, b).statistic)
