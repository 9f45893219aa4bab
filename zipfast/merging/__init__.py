# SPDX-License-Identifier: Apache-2.0
"""Merging models of one architecture: from the exported graph to a plan of feature spaces, and on to a merged model."""

from .apply import apply_groups
from .match import Groups, match, match_identity, match_permutation
from .merge import LogitEnsemble, Merged, gather_moments, merge
from .moments import Moments, update_all
from .plan import Plan, Space, Tap, Use
from .repair import reestimate_batchnorm
from .rules import UnknownOpError, rule
from .spaces import Graph, find_spaces
from .taps import Tapped, features

__all__ = [
    "Graph",
    "Groups",
    "LogitEnsemble",
    "Merged",
    "Moments",
    "Plan",
    "Space",
    "Tap",
    "Tapped",
    "UnknownOpError",
    "Use",
    "apply_groups",
    "features",
    "find_spaces",
    "gather_moments",
    "match",
    "match_identity",
    "match_permutation",
    "merge",
    "reestimate_batchnorm",
    "rule",
    "update_all",
]
