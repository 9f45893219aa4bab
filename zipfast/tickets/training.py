# SPDX-License-Identifier: Apache-2.0
"""One training of a masked network, from iteration k to T, that goes on from where it was killed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import checkpoint
from ..features import batch_inputs, batch_parts, device_of, evaluating, output_tensor
from .masks import Masks
from .optim import MODES
from .task import Task, measure
from .trainers import TRAINERS, MlpTrainer, TorchTrainer, Trainer, why_not_mlp


@dataclass(frozen=True)
class Point:
    """Of a curve: after so many iterations, the validation loss and accuracy, and the test accuracy in per cent.

    The test accuracy is NaN where the validation loss was no new minimum: early stopping cannot end there.
    """

    iteration: int
    loss: float
    accuracy: float
    test: float


@dataclass(frozen=True)
class Trained:
    """One training: its curve, the wall time of its iterations, what trained it."""

    curve: tuple[Point, ...]
    seconds: float
    trainer: str

    @property
    def early(self) -> Point:
        """Where the validation loss is least (the first such place): the early-stop iteration, decided afterwards."""
        return min(self.curve, key=lambda p: (math.isnan(p.loss), p.loss, p.iteration))

    @property
    def end(self) -> Point:
        """The last one."""
        return self.curve[-1]


def train(
    task: Task,
    model: nn.Module,
    masks: Masks,
    *,
    seed: int,
    start: int = 0,
    every: int = 100,
    mode: str = "grad",
    trainer: str = "auto",
    sparse_below: float = 0.5,
    keep: Callable[[int, nn.Module], None] | None = None,
    keep_at: int | None = None,
    partial: Path | None = None,
    identity: str = "",
    checkpoint_seconds: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> Trained:
    """Train a network in place, from an iteration to the task's last.

    Args:
        task: data, optimiser, schedule.
        model: at its start; masked at once.
        masks: dead weights, 0 all the time (see `mode`).
        seed: of the order of the data and of the network's noise.
        start: the iteration it stands at (late rewinding); data order and schedule are those from there on.
        every: iterations between evaluations; there is one at the start and one at the end, too.
        mode: where the mask acts, see :class:`zipfast.tickets.MaskedOptimizer`.
        trainer: ``"auto"``: ``"mlp"`` where :func:`why_not_mlp` finds no reason against it, else ``"torch"``.
        sparse_below: density below which the ``mlp`` trainer computes a layer on its survivors.
        keep, keep_at: called with (iteration, model) at that iteration.
        partial: file to go on from, written now and then, gone at the end; `identity` says what it belongs to.
        checkpoint_seconds: between two of them.
        progress: called with the iteration at each evaluation.

    Returns:
        :class:`Trained`.

    Raises:
        ValueError: another mode or trainer; a partial file of another training, or a damaged one.
    """
    for what, value, known in (("mode", mode, MODES), ("trainer", trainer, TRAINERS)):
        if value not in known:
            raise ValueError(f"train: '{what}' must be one of {', '.join(known)}, got {value!r}")
    if not 0 <= start <= task.iterations or every < 1:
        raise ValueError(
            f"train: 'start' must be in [0, {task.iterations}] and 'every' 1 or more, got {start} and {every}"
        )
    reason = why_not_mlp(task, model, mode)
    if trainer == "mlp" and reason is not None:
        raise ValueError(f"train: trainer 'mlp' cannot be used: {reason}")
    gpu = device_of(model)
    with torch.random.fork_rng(devices=[gpu] if gpu.type == "cuda" else []), ExitStack() as afterwards:
        runner: Trainer
        if trainer == "torch" or reason is not None:
            runner = TorchTrainer(task, model, masks, seed, mode)
            afterwards.callback(runner.steps.remove)
        else:
            runner = MlpTrainer(task, model, masks, seed, sparse_below)
            _check_same(runner, task, model)
        curve, at, seconds = _resumed(partial, identity, runner, start)
        stops = {i for i in range(start, task.iterations) if i % every == 0} | {start, task.iterations}
        if keep_at is not None and start <= keep_at <= task.iterations:
            stops.add(keep_at)
        saved = time.monotonic()
        for stop in sorted(stops):
            if stop < at:
                continue
            before = time.perf_counter()
            runner.advance(at, stop)
            seconds += time.perf_counter() - before
            at = stop
            if keep is not None and stop == keep_at:
                keep(stop, model)
            if not curve or curve[-1].iteration < stop:
                curve.append(_point(task, model, runner.forward, stop, curve, last=stop == task.iterations))
            if progress is not None:
                progress(stop)
            if partial is not None and stop < task.iterations and time.monotonic() - saved >= checkpoint_seconds:
                tensors, facts = runner.state()
                facts |= {"identity": identity, "iteration": stop, "seconds": seconds, "trainer": runner.name}
                checkpoint.save(partial, tensors, {**facts, "curve": [vars(p) for p in curve]})
                saved = time.monotonic()
    return Trained(tuple(curve), seconds, runner.name)


def _check_same(runner: MlpTrainer, task: Task, model: nn.Module) -> None:
    """The perceptron that is trained is the network: one batch through both."""
    args, kwargs = batch_inputs(batch_parts(next(iter(task.validation)))[0], device_of(model))
    with evaluating(model), torch.no_grad():
        theirs, ours = output_tensor(model(*args, **kwargs)), runner.forward(*args, **kwargs)
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise RuntimeError("train: trainer 'mlp' does not compute this network; use trainer 'torch'")


def _point(
    task: Task, model: nn.Module, forward: Callable[..., Any] | None, iteration: int, curve: list[Point], *, last: bool
) -> Point:
    loss, accuracy = measure(model, task.validation, task.loss, forward)
    lowest = min((p.loss for p in curve if not math.isnan(p.loss)), default=float("inf"))
    look = last or loss < lowest or not curve
    test = measure(model, task.test, task.loss, forward)[1] if look else float("nan")
    return Point(iteration, loss, accuracy, test)


def _resumed(partial: Path | None, identity: str, runner: Trainer, start: int) -> tuple[list[Point], int, float]:
    if partial is None or not partial.exists():
        return [], start, 0.0
    try:
        tensors, facts = checkpoint.load(partial), checkpoint.read_metadata(partial)
    except ValueError as e:
        reason = str(e).split(";")[0].removeprefix("load: ")
        raise ValueError(f"train: {reason}; delete {partial} to begin this training again") from None
    if facts.get("identity") != identity or facts.get("trainer") != runner.name:
        raise ValueError(
            f"train: {partial} must be of this training, got one of other settings; delete it to begin again"
        )
    try:
        runner.restore(facts["iteration"], tensors, facts)
        return [Point(**p) for p in facts["curve"]], facts["iteration"], facts["seconds"]
    except (KeyError, TypeError) as e:
        raise ValueError(f"train: {partial} is damaged: it lacks {e}; delete it to begin this training again") from None
