# SPDX-License-Identifier: Apache-2.0
"""Lottery tickets: sparse subnetworks that train as well as the dense network they were found in.

masks (one bit a weight) · scores · schedule (pruning while training) · optim (where the mask acts) · task (what is
trained) · trainers, training (one level) · settings, experiment (levels, rewinding, controls, resume) · results ·
connectivity · networks (of the papers) · sparse (layers of survivors) · crossover (when sparse pays) · plots.
"""

from .connectivity import Connectivity, connectivity
from .crossover import measure_crossover, mlp_crossover, prefer_sparse
from .experiment import lottery
from .masks import Masks, rate_for
from .networks import PRESETS, Preset, ladder, prunable, rates_of
from .optim import MaskedOptimizer, why_not_fused
from .results import Lottery, Row, Training
from .schedule import gradual
from .sparse import SparseLinear, SparseWeight
from .task import Batches, Task, measure
from .trainers import why_not_mlp
from .training import Point, Trained, train

__all__ = [
    "PRESETS",
    "Batches",
    "Connectivity",
    "Lottery",
    "MaskedOptimizer",
    "Masks",
    "Point",
    "Preset",
    "Row",
    "SparseLinear",
    "SparseWeight",
    "Task",
    "Trained",
    "Training",
    "connectivity",
    "gradual",
    "ladder",
    "lottery",
    "measure",
    "measure_crossover",
    "mlp_crossover",
    "prefer_sparse",
    "prunable",
    "rate_for",
    "rates_of",
    "train",
    "why_not_fused",
    "why_not_mlp",
]
