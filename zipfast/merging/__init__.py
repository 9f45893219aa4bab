# SPDX-License-Identifier: Apache-2.0
"""Merging models of one architecture: from the exported graph to a plan of feature spaces, and on to a merged model."""

from .plan import Plan, Space, Tap, Use
from .repair import reestimate_batchnorm
from .rules import UnknownOpError, rule
from .spaces import Graph, find_spaces
from .taps import Tapped, features

__all__ = [
    "Graph",
    "Plan",
    "Space",
    "Tap",
    "Tapped",
    "UnknownOpError",
    "Use",
    "features",
    "find_spaces",
    "reestimate_batchnorm",
    "rule",
]
