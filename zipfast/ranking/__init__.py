# SPDX-License-Identifier: Apache-2.0
"""Ranking pre-trained models for a data set without training: LogME, and the metrics that need the same pass.

targets (what is accepted) · stats (one pass) · spectrum (FᵀF's eigen- or tridiagonal form) · evidence (LogME) · logme (the
function, the class) · metrics (the others) · extract (features of a model) · collect (all of them, in memory) · rank (many
models) · agreement (with given accuracies) · monitor (checkpoints).
"""

from . import metrics
from .agreement import Agreement, agreement, weighted_tau
from .collect import Features, features_of
from .evidence import Evidence, null_score
from .extract import Extractor, extract, load_candidate
from .logme import Basis, LogME, logme
from .monitor import LogMEMonitor
from .rank import Ranking, rank
from .spectrum import Spectrum
from .stats import FeatureStats

__all__ = [
    "Agreement",
    "Basis",
    "Evidence",
    "Extractor",
    "FeatureStats",
    "Features",
    "LogME",
    "LogMEMonitor",
    "Ranking",
    "Spectrum",
    "agreement",
    "extract",
    "features_of",
    "load_candidate",
    "logme",
    "metrics",
    "null_score",
    "rank",
    "weighted_tau",
]
