# SPDX-License-Identifier: Apache-2.0
"""``install`` and ``check`` for an imported checkout of the public ZipIt! code, and the problems both sides must solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _patch
from . import _common, baselines, greedy, metrics

ROUNDING = 1e-5  # float32 sums against float64 ones, relative to the largest value; worst seen here: 3e-7


def install(
    checkout: ModuleType | None = None,
    *,
    names: Sequence[str] | None = None,
    also: Sequence[ModuleType] = (),
) -> _patch.Installed:
    """Make an imported checkout of github.com/gstoica27/ZipIt compute with zipfast: its scripts run unchanged.

    First :func:`check` runs, and a checkout that computes otherwise (a changed fork) is refused. Then each name is replaced
    wherever a module of the checkout's folder holds it: in ``matching_functions`` and ``metric_calculators``, where it was
    imported by name (``model_merger``), and in the defaults of functions (``ModelMerge.transform``).

    Args:
        checkout: any module of it, such as ``matching_functions``; None: the one that is imported.
        names: which to replace; None: all that zipfast offers and the checkout has.
        also: further modules, of your own, that took names from the checkout by ``from ... import``.

    Returns:
        a handle: ``replaced``, ``elsewhere``, ``difference``, ``uninstall()``; also a context manager.

    Raises:
        ImportError: nothing of the checkout has been imported.
        ValueError: an unknown name; several checkouts; served by zipfast already; another result on the small problems.

    Example::

        import matching_functions, metric_calculators, model_merger
        from zipfast.compat import zipit

        with zipit.install() as handle:
            print(handle.replaced)
            merge = model_merger.ModelMerge(graph_a, graph_b)
            merge.transform(model, loader)
    """
    return _patch.install(TOOL, checkout, names, also)


def check(checkout: ModuleType | None = None, *, names: Sequence[str] | None = None) -> dict[str, float]:
    """Compare with an imported checkout on small problems, and replace nothing: name -> largest difference, 0: equal bits.

    Matchings must agree to the bit; the metrics to 1e-5 of their largest value, as the public code adds in float32.

    Raises: as :func:`install`.
    """
    return _patch.check(TOOL, checkout, names)


def _numbers(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] in [-1, 1), without any random generator: the caller's must not move."""
    k = np.arange(rows * columns, dtype=np.uint64).reshape(rows, columns) + np.uint64(seed * 1_000_003 + 1)
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):  # the finaliser of MurmurHash3 (Appleby, public domain)
        k = (k ^ (k >> np.uint64(33))) * np.uint64(factor)
    return torch.from_numpy(((k ^ (k >> np.uint64(33))) >> np.uint64(11)).astype(np.float64) / 2**52 - 1).float()


def _covariance(features: int, seed: int) -> Tensor:
    x = _numbers(features, 3 * features, seed)
    x = x + 0.6 * x.roll(1, 0) + 0.4 * x.roll(features // 2, 0)  # so that merges are within the models and across
    x[-1] *= 1e-4  # so that eps in the correlation counts
    covariance = x @ x.T / x.shape[1]
    if seed % 2:
        covariance[1], covariance[:, 1] = 0, 0  # a dead feature
    return covariance.triu() + covariance.triu(1).T


def _equal(theirs: Sequence[Any], ours: Sequence[Any]) -> float:
    """0 where all tensors have equal bits, else the largest difference."""
    if len(theirs) != len(ours) or any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(theirs, ours)):
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(theirs, ours))


def _matching(
    sizes: Sequence[tuple[int, int]], options: Sequence[dict[str, Any]], *, seeded: bool = False
) -> Callable[[Any, Any], float]:
    """Both on covariances of (models, size of one), with each set of options."""

    def distance(theirs: Callable[..., Any], ours: Callable[..., Any]) -> float:
        worst = 0.0
        for seed, (models, size) in enumerate(sizes):
            for option in options:
                both = []
                for call in (theirs, ours):
                    if seeded:
                        np.random.seed(seed)
                    both.append(call({"covariance": _covariance(models * size, seed)}, 1 - 1 / models, **option))
                worst = max(worst, _equal(*both))
        return worst

    def untouched(theirs: Callable[..., Any], ours: Callable[..., Any]) -> float:
        state = np.random.get_state()
        try:
            return distance(theirs, ours)
        finally:
            np.random.set_state(state)

    return untouched if seeded else distance


def _correlation(theirs: Callable[..., Tensor], ours: Callable[..., Tensor]) -> float:
    return max(_equal([theirs(c)], [ours(c)]) for c in (_covariance(12, seed) for seed in range(3)))


def _metric(shares: bool) -> Callable[[Any, Any], float]:
    """Both classes on three batches of two models; `shares`: called with a part of the data, which adds up to 1."""

    def values(kind: Callable[[], Any]) -> Tensor:
        metric, sizes = kind(), (4, 4, 2)
        for seed, size in enumerate(sizes):
            feats = [_numbers(5, 9 * size, 7 * seed + m) + 0.5 for m in range(2)]
            metric.update(size, *([size / sum(sizes)] if shares else []), *feats)
        result: Tensor = metric.finalize() if shares else metric.finalize(sum(sizes))
        return result

    def distance(theirs: Any, ours: Any) -> float:
        want, got = values(theirs), values(ours)
        if want.shape != got.shape or want.dtype != got.dtype:
            return float("inf")
        return float((want - got).abs().max() / want.abs().max())

    return distance


_PAIRS: list[tuple[int, int]] = [(2, 8), (2, 9), (2, 16)]
_GREEDY = _matching(_PAIRS, [{}, {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.5, "add_bias": True}, {"a": 0.0, "b": 1.0}])
_SEVERAL = _matching([*_PAIRS, (3, 6)], [{}, {"add_bias": True}])

_SHARE = ("update(dx)",)  # ours is told by what comes first among the features

TOOL = _patch.Tool(
    op="zipit.install",
    source="github.com/gstoica27/ZipIt at 1b6ca40",
    example="matching_functions, metric_calculators or model_merger",
    names=[
        _patch.Name("matching_functions", "compute_correlation", _common.compute_correlation, _correlation),
        _patch.Name("matching_functions", "match_tensors_zipit", greedy.match_tensors_zipit, _GREEDY),
        _patch.Name("matching_functions", "match_tensors_permute", baselines.match_tensors_permute, _SEVERAL),
        _patch.Name("matching_functions", "match_tensors_identity", baselines.match_tensors_identity, _SEVERAL),
        _patch.Name(
            "matching_functions", "match_tensors_optimal", baselines.match_tensors_optimal, _matching([(2, 6)], [{}])
        ),
        _patch.Name(
            "matching_functions",
            "match_tensors_kmeans",
            baselines.match_tensors_kmeans,
            _matching([(2, 8)], [{}], seeded=True),
        ),
        _patch.Name("metric_calculators", "compute_correlation", _common.compute_correlation, _correlation),
        _patch.Name("metric_calculators", "CovarianceMetric", metrics.CovarianceMetric, _metric(False), ROUNDING),
        _patch.Name("metric_calculators", "MeanMetric", metrics.MeanMetric, _metric(False), ROUNDING),
        _patch.Name(
            "metric_calculators", "CorrelationMetric", metrics.CorrelationMetric, _metric(True), ROUNDING, _SHARE
        ),
        _patch.Name("metric_calculators", "CossimMetric", metrics.CossimMetric, _metric(True), ROUNDING, _SHARE),
    ],
)
