# SPDX-License-Identifier: Apache-2.0
"""Drop-in for the public ZipIt! code (github.com/gstoica27/ZipIt at 1b6ca40): its names, signatures and results.

``matching_functions`` and ``metric_calculators`` are one import here; :func:`install` puts zipfast into an imported
checkout instead.  docs/compat/zipit.md lists every call.
"""

from ._common import compute_correlation
from .baselines import match_tensors_identity, match_tensors_kmeans, match_tensors_optimal, match_tensors_permute
from .checkout import check, install
from .greedy import match_tensors_zipit
from .metrics import (
    CorrelationMetric,
    CossimMetric,
    CovarianceMetric,
    MeanMetric,
    MetricCalculator,
    get_metric_fns,
)

__all__ = [
    "CorrelationMetric",
    "CossimMetric",
    "CovarianceMetric",
    "MeanMetric",
    "MetricCalculator",
    "check",
    "compute_correlation",
    "get_metric_fns",
    "install",
    "match_tensors_identity",
    "match_tensors_kmeans",
    "match_tensors_optimal",
    "match_tensors_permute",
    "match_tensors_zipit",
]
