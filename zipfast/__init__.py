# SPDX-License-Identifier: Apache-2.0
"""zipfast: the fast, exact backend for merging, ranking, souping and pruning trained networks.

>>> import zipfast
>>> zipfast.available("torch")
True
"""

from . import checkpoint, compat, features, merging, ops, ranking, soups, states, tickets, zoo
from ._version import __version__
from .merging import (
    Groups,
    LogitEnsemble,
    Merged,
    Moments,
    MultiHead,
    Plan,
    SpaceMoments,
    cuts,
    extend,
    find_spaces,
    match,
    match_permutation,
    merge,
    reestimate_batchnorm,
)
from .ops import _loader, available, backend
from .ranking import Basis, FeatureStats, LogME, LogMEMonitor, features_of, logme, rank
from .soups import LearnedSoup, greedy_soup, uniform_soup, wise_ft
from .tickets import Lottery, Masks, lottery

_loader.load_all()

__all__ = [
    "Basis",
    "FeatureStats",
    "Groups",
    "LearnedSoup",
    "LogME",
    "LogMEMonitor",
    "LogitEnsemble",
    "Lottery",
    "Masks",
    "Merged",
    "Moments",
    "MultiHead",
    "Plan",
    "SpaceMoments",
    "__version__",
    "available",
    "backend",
    "checkpoint",
    "compat",
    "cuts",
    "extend",
    "features",
    "features_of",
    "find_spaces",
    "greedy_soup",
    "logme",
    "lottery",
    "match",
    "match_permutation",
    "merge",
    "merging",
    "ops",
    "rank",
    "ranking",
    "reestimate_batchnorm",
    "soups",
    "states",
    "tickets",
    "uniform_soup",
    "wise_ft",
    "zoo",
]
