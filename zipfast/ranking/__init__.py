# SPDX-License-Identifier: Apache-2.0
"""Ranking pre-trained models for a data set without training: LogME, and the metrics that need the same pass.

targets (what is accepted) · stats (one pass) · spectrum (FᵀF's eigen- or tridiagonal form) · evidence (LogME) · logme (the
function, the class) · metrics (the others) · extract (features of a model) · rank (many models) · agreement (with given
accuracies) · monitor (checkpoints).
"""

from . import metrics
from .evidence import Evidence, null_score
from .logme import Basis, LogME, logme
from .spectrum import Spectrum
from .stats import FeatureStats

__all__ = ["Basis", "Evidence", "FeatureStats", "LogME", "Spectrum", "logme", "metrics", "null_score"]
