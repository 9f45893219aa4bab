# SPDX-License-Identifier: Apache-2.0
"""LogME of a Trainer's model while it is being trained: a metric of its own, and a reason to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ...ranking import LogMEMonitor
from ...ranking import evidence as ev
from ...ranking.targets import Task
from .common import TrainerCallback, check_resumed, recall, remember, undisturbed

KEY = "LogMECallback"


class LogMECallback(TrainerCallback):
    """Score the model's features on a probe set at every evaluation, or every so many steps.

    At an evaluation the score is a metric, ``eval_logme``, which ``metric_for_best_model="logme"`` and early stopping can
    use; at other steps it is an entry ``logme`` of the log history.

    Args:
        batches: the probe set, of the task that counts in the end: (inputs, labels), or mappings with ``labels``; readable
            more than once.
        every: score every so many steps too; None: at evaluations only.
        patience: stop the training after so many scorings without a better one; None: never.
        min_delta: better is better by more than this.
        name: of the metric; two callbacks must have two.
        features, layers, pool, task, mode: what is scored and how, as of :class:`zipfast.LogMEMonitor`.
        log: ``trainer.log``, to be set as ``callback.log`` once there is a trainer: then scores between evaluations reach
            TensorBoard and the like, too.

    Attributes:
        monitor: the :class:`zipfast.LogMEMonitor`, with its history, best_score and best_step.

    Raises:
        TypeError, ValueError: as :class:`zipfast.LogMEMonitor`; 'every' or 'patience' below 1.

    Cost: per scoring one pass over the probe set, on every process. The training's random state is left alone.

    Example:
        >>> import torch
        >>> probe = [(torch.randn(8, 4), torch.arange(8) % 2)]
        >>> callback = LogMECallback(probe, every=100, patience=5)
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        every: int | None = None,
        patience: int | None = None,
        min_delta: float = 1e-3,
        name: str = "logme",
        features: Callable[[nn.Module, Any], Tensor] | None = None,
        layers: list[str] | None = None,
        pool: str = "auto",
        task: Task = "classification",
        mode: ev.Mode = "exact",
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        for what, value in (("every", every), ("patience", patience)):
            if value is not None and not value >= 1:
                raise ValueError(f"LogMECallback: '{what}' must be at least 1 or None, got {value}")
        self.monitor = LogMEMonitor(
            batches, features=features, layers=layers, pool=pool, task=task, mode=mode, min_delta=min_delta,
            patience=1 if patience is None else patience,
        )  # fmt: skip
        self.fresh = self.monitor.state_dict()
        self.every, self.stops, self.name, self.log = every, patience is not None, name, log
        self.training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Begin anew, or go on from the checkpoint."""
        check_resumed("LogMECallback", args, state, model)
        self.monitor.load_state_dict(recall(state, self._key) or self.fresh)
        self.training = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        """Score every so many steps."""
        if self.every is None or state.global_step % self.every:
            return control
        score = self._score(state, control, model)
        if self.log is None:
            state.log_history.append({self.name: score, "epoch": state.epoch, "step": state.global_step})
        else:
            logging = control.should_log
            self.log({self.name: score})
            control.should_log = logging  # to log something is not to have logged the loss
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **_: Any) -> Any:
        """The score as a metric of the evaluation."""
        if self.training:
            score = self._score(state, control, model)
        else:
            with undisturbed(model):
                score = self.monitor.score(model)
        name = f"eval_{self.name}"
        if metrics is not None:
            metrics[name] = score
        for entry in reversed(state.log_history):  # the trainer has just logged the metrics
            if entry.get("step") != state.global_step:
                break
            if any(key.startswith("eval_") for key in entry):
                entry[name] = score
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluations from now on are not counted."""
        self.training = False

    @property
    def _key(self) -> str:
        return f"{KEY}.{self.name}"

    def _score(self, state: Any, control: Any, model: nn.Module) -> float:
        """Of this step, once, however often it is evaluated."""
        history = self.monitor.history
        if history and history[-1][0] == state.global_step:
            return history[-1][1]
        with undisturbed(model):
            score = self.monitor.step(model, state.global_step)
        assert score is not None
        remember(state, self._key, self.monitor.state_dict())
        if self.stops and self.monitor.should_stop:
            control.should_training_stop = True
        return score
