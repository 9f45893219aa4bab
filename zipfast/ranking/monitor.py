# SPDX-License-Identifier: Apache-2.0
"""Scores of checkpoints during pre-training, on a fixed probe set, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..features import evaluating
from . import evidence as ev
from .candidates import labelled
from .extract import Extractor
from .stats import FeatureStats
from .targets import Task, check_task


class LogMEMonitor:
    """Follow how well a network's features would serve a task while it is being trained on another.

    Args:
        batches: the probe set, (inputs, labels), read at every scoring.
        features: ``features(model, inputs)`` -> [N, D]; None: the pooled pre-logits (or `layers`' first), as
            :class:`zipfast.ranking.extract.Extractor` takes them.
        layers, pool: for the extractor.
        task, mode: see :class:`zipfast.FeatureStats`.
        every: score at every so many calls of :meth:`step`.
        patience: stop after so many scorings without a better one.
        min_delta: a score is better if it is by more than this.

    Attributes:
        history: (step, score) of each scoring. best_score, best_step. should_stop.

    Example:
        >>> import torch, zipfast
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> monitor = zipfast.LogMEMonitor([(x, (x[:, 0] > 0).long())], patience=2)
        >>> for _ in range(3):
        ...     _ = monitor.step(net)
        >>> len(monitor.history), monitor.should_stop
        (3, True)

    Cost: per scoring one pass over the probe set, N·D²/2 multiply-adds and O(D³); nothing is read back before the score.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        features: Callable[[nn.Module, Any], Tensor] | None = None,
        layers: list[str] | None = None,
        pool: str = "auto",
        task: Task = "classification",
        mode: ev.Mode = "exact",
        every: int = 1,
        patience: int = 5,
        min_delta: float = 1e-3,
    ) -> None:
        check_task("LogMEMonitor", task)
        ev.check_mode("LogMEMonitor", mode)
        if iter(batches) is batches:
            raise TypeError(
                "LogMEMonitor: 'batches' must be readable more than once, got an iterator; pass a list or loader"
            )
        for name, value, least in (("every", every, 1), ("patience", patience, 1), ("min_delta", min_delta, 0)):
            if not value >= least:
                raise ValueError(f"LogMEMonitor: '{name}' must be at least {least}, got {value}")
        self.batches, self.features, self.layers, self.pool = batches, features, layers, pool
        self.task: Task = task
        self.mode: ev.Mode = mode
        self.every, self.patience, self.min_delta = every, patience, min_delta
        self.calls = 0
        self.history: list[tuple[int, float]] = []
        self.best_score, self.best_step, self.waited = float("-inf"), -1, 0

    @property
    def should_stop(self) -> bool:
        """Whether `patience` scorings in a row were no better than the best."""
        return self.waited >= self.patience

    def step(self, model: nn.Module, step: int | None = None) -> float | None:
        """Count a checkpoint; its score at every `every`-th call, else None.

        Args:
            model: scored in eval mode; its modules' modes are put back.
            step: what the history calls it; None: the number of the call, from 0.
        """
        self.calls += 1
        if (self.calls - 1) % self.every:
            return None
        score = self.score(model)
        at = self.calls - 1 if step is None else step
        self.history.append((at, score))
        if score > self.best_score + self.min_delta:
            self.best_score, self.best_step, self.waited = score, at, 0
        else:
            self.waited += 1
        return score

    def score(self, model: nn.Module) -> float:
        """The score of a model, without counting it."""
        stats = FeatureStats(self.task, name="LogMEMonitor")
        with evaluating(model), torch.no_grad():
            extractor = None if self.features else Extractor(model, layers=self.layers, pool=self.pool)
            for inputs, labels in labelled(self.batches):
                if self.features is not None:
                    x = self.features(model, inputs)
                else:
                    assert extractor is not None
                    x = next(iter(extractor(inputs).values()))
                stats.update(x, labels)
        return stats.evidence(self.mode).score

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; plain numbers and lists."""
        names = ("calls", "history", "best_score", "best_step", "waited")
        return {**{name: getattr(self, name) for name in names}, "history": list(self.history)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.calls, self.waited, self.best_step = int(state["calls"]), int(state["waited"]), int(state["best_step"])
        self.best_score = float(state["best_score"])
        self.history = [(int(step), float(score)) for step, score in state["history"]]
