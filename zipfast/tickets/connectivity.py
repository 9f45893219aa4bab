# SPDX-License-Identifier: Apache-2.0
"""Is a network stable to the noise of training? Linear mode connectivity of two copies (Frankle et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..merging import reestimate_batchnorm
from ..soups import Barrier
from ..soups import barrier as barrier_of
from .masks import Masks
from .results import Lottery
from .settings import check_task
from .task import Task, measure, seed_of
from .training import train


@dataclass(frozen=True)
class Connectivity:
    """Two trainings from one start, and the straight line between them.

    Attributes:
        accuracies: of both, on the test data, in per cent.
        barrier: along the line, as :func:`zipfast.soups.barrier` has it; its `height` is the paper's instability, in points
            of accuracy: stable is below 2.
    """

    kind: str
    level: int
    seed: int
    density: float
    accuracies: tuple[float, float]
    barrier: Barrier

    @property
    def stable(self) -> bool:
        """By the paper's bound of 2 points."""
        return self.barrier.height < 2.0


def connectivity(
    task: Task,
    found: Lottery,
    level: int,
    *,
    seed: int = 0,
    kind: str = "ticket",
    points: int = 31,
    recalibrate: bool = False,
) -> Connectivity:
    """Train a level twice with other orders of the data, and look at the line between the two.

    Args:
        task: of the experiment `found`.
        level, seed, kind: which; level 0 is the dense network. Copies start where the level did: at θ_k, and for
            ``kind="reinit"`` at its own weights.
        points: on the line, odd (the paper has 30).
        recalibrate: re-estimate batch-norm statistics at each point, on the training data; else they are mixed like weights.

    Raises:
        FileNotFoundError: the level was not run. ValueError: as :func:`zipfast.soups.barrier`.

    Cost: two trainings and `points` passes over the test data.

    Reference: Frankle et al. 2020 (linear mode connectivity, arXiv 1912.05671), §2.
    """
    check_task(task, found.settings, found.folder, "connectivity")
    masks = found.masks(level, seed=seed, kind=kind)
    start = found.start(seed=seed)
    first = found.settings["rewind"]
    if kind == "reinit":
        start, first = dict(task.network(seed_of(seed, "reinit", level) % (1 << 63)).state_dict()), 0
    ends = [_end(task, found, masks, start, first, seed, copy) for copy in ("one", "two")]
    model = task.network(seed)

    def accuracy(state: dict[str, Tensor]) -> float:
        model.load_state_dict(state)
        if recalibrate:
            reestimate_batchnorm(model, task.train)
        return measure(model, task.test, task.loss)[1]

    line = barrier_of(ends[0], ends[1], accuracy, points=points)
    return Connectivity(kind, level, seed, masks.density, (line.scores[0], line.scores[-1]), line)


def _end(
    task: Task, found: Lottery, masks: Masks, start: Any, first: int, seed: int, copy: str
) -> dict[str, torch.Tensor]:
    model = task.network(seed)
    masks.rewind_(model, start)
    train(
        task, model, masks, seed=seed_of(seed, "copy", copy), start=first, every=task.iterations,
        mode=found.settings["mode"], trainer=found.settings["trainer"], sparse_below=found.settings["sparse_below"],
    )  # fmt: skip
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
