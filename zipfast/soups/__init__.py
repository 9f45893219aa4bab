# SPDX-License-Identifier: Apache-2.0
"""Model soups: one better model from many fine-tuned ones, in the memory of one.

mix (what fits together, the streamed weighted sum) · adapters (PEFT's LoRA) · ingredients (both behind one face) · recipes
(uniform, greedy, WiSE-FT) · learned · ensemble (logits, ECE) · geometry (angles, barriers, planes) · evaluator · diagnosis ·
plots. Checkpoints are read by `zipfast.states`.
"""

from .adapters import Adapter
from .diagnosis import Diagnosis, diagnose
from .ensemble import GreedyEnsemble, accuracy_of, ece, greedy_ensemble, logit_ensemble
from .evaluator import Evaluator
from .geometry import Advantage, Barrier, Geometry, Plane, advantages, barrier, geometry, plane, soup_minus_ensemble
from .ingredients import adapted
from .learned import LearnedSoup
from .mix import Layout, layout_of, mix
from .recipes import Soup, Tried, greedy_soup, uniform_soup, wise_ft

__all__ = [
    "Adapter",
    "Advantage",
    "Barrier",
    "Diagnosis",
    "Evaluator",
    "Geometry",
    "GreedyEnsemble",
    "Layout",
    "LearnedSoup",
    "Plane",
    "Soup",
    "Tried",
    "accuracy_of",
    "adapted",
    "advantages",
    "barrier",
    "diagnose",
    "ece",
    "geometry",
    "greedy_ensemble",
    "greedy_soup",
    "layout_of",
    "logit_ensemble",
    "mix",
    "plane",
    "soup_minus_ensemble",
    "uniform_soup",
    "wise_ft",
]
