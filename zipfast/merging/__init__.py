# SPDX-License-Identifier: Apache-2.0
"""Merging models of one architecture: from the exported graph to a plan of feature spaces, and on to a merged model."""

from .apply import apply_groups
from .assign import match_spaces
from .baselines import match_greedy_permutation, match_identity, match_kmeans, match_optimal, match_permutation
from .cuts import Cut, cuts, resolve_cut
from .extend import extend
from .match import Groups, match
from .merge import LogitEnsemble, Merged, merge
from .moments import Moments, update_all
from .partial import MultiHead
from .permute import permute, random_permutations
from .plan import Plan, Space, Tap, Use
from .repair import reestimate_batchnorm
from .rules import UnknownOpError, rule
from .spaces import Graph, find_spaces, part_of
from .statistics import SpaceMoments, gather_moments
from .sweep import plot_sweep, sweep
from .taps import Tapped, features
from .verify import Verification, verify
from .weights import match_weights, weight_similarity

__all__ = [
    "Cut",
    "Graph",
    "Groups",
    "LogitEnsemble",
    "Merged",
    "Moments",
    "MultiHead",
    "Plan",
    "Space",
    "SpaceMoments",
    "Tap",
    "Tapped",
    "UnknownOpError",
    "Use",
    "Verification",
    "apply_groups",
    "cuts",
    "extend",
    "features",
    "find_spaces",
    "gather_moments",
    "match",
    "match_greedy_permutation",
    "match_identity",
    "match_kmeans",
    "match_optimal",
    "match_permutation",
    "match_spaces",
    "match_weights",
    "merge",
    "part_of",
    "permute",
    "plot_sweep",
    "random_permutations",
    "reestimate_batchnorm",
    "resolve_cut",
    "rule",
    "sweep",
    "update_all",
    "verify",
    "weight_similarity",
]
