# SPDX-License-Identifier: Apache-2.0
"""One training of a masked network, from iteration k to T, that goes on from where it was killed.

Two trainers give the same numbers up to rounding: ``torch`` runs any network, loader and optimiser; ``mlp`` runs
perceptrons on the CPU by :func:`zipfast.ops.mlp_steps_`, where an iteration costs what its surviving weights cost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import checkpoint
from ..features import batch_inputs, batch_labels, device_of, output_tensor
from ..ops import available, mlp_steps_, sparse_linear
from ..ops._mask import popcount, unpack
from ..ops.sparse_linear import pack_weight
from .masks import Masks
from .optim import MODES, UNMASKED, MaskedOptimizer
from .task import Batches, Task, measure, seed_of, stream

TRAINERS = ("auto", "torch", "mlp")


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


class Trainer(Protocol):
    """What moves a network; `state` and `restore` are all that is needed to go on bit for bit."""

    name: str

    @property
    def forward(self) -> Callable[..., Any] | None: ...

    def advance(self, start: int, stop: int) -> None: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def restore(self, iteration: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None: ...


class TorchTrainer:
    """Any network: forward, backward, clip, masked step."""

    name, forward = "torch", None

    def __init__(self, task: Task, model: nn.Module, masks: Masks, seed: int, mode: str) -> None:
        self.task, self.model, self.seed = task, model, seed
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = task.optimizer(self.parameters)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = MaskedOptimizer(self.optimizer, model, masks, mode=mode)
        self.device = device_of(model)
        self.batches: Iterator[Any] | None = None
        self.generator: Tensor | None = None
        self.device_generator: Tensor | None = None

    def _ready(self) -> None:
        if self.generator is not None:
            torch.set_rng_state(self.generator)
            if self.device_generator is not None:
                torch.cuda.set_rng_state(self.device_generator, self.device)

    def advance(self, start: int, stop: int) -> None:
        if self.batches is None:
            torch.manual_seed(seed_of(self.seed, "noise", start) % (1 << 63))
            self.batches = stream(self.task.train, start, self.seed, self._ready)
        self.model.train()
        for iteration in range(start, stop):
            batch = next(self.batches)
            factor = self.task.factor(iteration)
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate * factor
            args, kwargs = batch_inputs(batch, self.device)
            self.optimizer.zero_grad()
            output = output_tensor(self.model(*args, **kwargs))
            self.task.loss(output, batch_labels(batch).to(self.device)).backward()
            if self.task.clip_norm is not None:
                self.steps.mask_gradients()
                torch.nn.utils.clip_grad_norm_(self.parameters, self.task.clip_norm)
            self.steps.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, plain = {f"model.{name}": value for name, value in self.model.state_dict().items()}, {}
        for i, own in self.optimizer.state_dict()["state"].items():
            for name, value in own.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{i}.{name}"] = value
                else:
                    plain[f"{i}.{name}"] = value
        if self.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        return {**tensors, "generator": torch.get_rng_state()}, {"optimizer": plain}

    def restore(self, iteration: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.model.load_state_dict(_under(tensors, "model."))
        state: dict[int, dict[str, Any]] = {}
        for name, value in {**_under(tensors, "optimizer."), **facts["optimizer"]}.items():
            i, own = name.split(".", 1)
            state.setdefault(int(i), {})[own] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.generator, self.device_generator = tensors["generator"], tensors.get("generator.cuda")
        self.batches = stream(self.task.train, iteration, self.seed, self._ready)


class MlpTrainer:
    """Perceptrons on the CPU: whole stretches of iterations in one call, on surviving weights alone where that is faster."""

    name = "mlp"

    def __init__(self, task: Task, model: nn.Module, masks: Masks, seed: int, sparse_below: float) -> None:
        self.task, self.seed, self.sparse_below = task, seed, sparse_below
        masks.apply_(model)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        names = {id(p): name for name, p in model.named_parameters()}
        self.parameters = [m.weight.detach() for m in layers] + [m.bias.detach() for m in layers]
        self.mask = [masks.bits.get(names[id(m.weight)], UNMASKED) for m in layers]
        assert isinstance(task.train, Batches)
        self.data = task.train.data.reshape(len(task.train.data), -1).contiguous()
        self.train = task.train
        self.optimizer = task.optimizer(list(model.parameters()))
        group = self.optimizer.param_groups[0]
        self.rule = "sgd" if isinstance(self.optimizer, SGD) else "adam"
        if self.rule == "adam" and group.get("decoupled_weight_decay", isinstance(self.optimizer, AdamW)):
            self.rule = "adamw"
        self.betas = (group["momentum"], 0.0) if self.rule == "sgd" else group["betas"]
        with_first, with_second = self.rule != "sgd" or self.betas[0] > 0, self.rule != "sgd"
        self.first = [torch.zeros_like(p) for p in self.parameters] if with_first else []
        self.second = [torch.zeros_like(p) for p in self.parameters] if with_second else []
        self.group, self.taken = group, 0
        self.layout = [self._layout(i) for i in range(len(layers))]

    def _layout(self, i: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where the survivors of a sparse layer are, for evaluations: rows, columns, places in the flat weight."""
        weight, mask = self.parameters[i], self.mask[i]
        if not mask.numel() or popcount(mask) >= self.sparse_below * weight.numel() or not available("cpu"):
            return None
        row_start, column, _ = pack_weight(weight, mask)
        return row_start, column, unpack(mask, (weight.numel(),)).nonzero().view(-1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0].reshape(len(args[0]), -1)
        half = len(self.parameters) // 2
        for i, layout in enumerate(self.layout):
            weight, bias = self.parameters[i], self.parameters[half + i]
            if layout is None:
                x = F.linear(x, weight, bias)
            else:
                x = sparse_linear(layout[0], layout[1], weight.view(-1)[layout[2]], x, bias)
            x = x.relu_() if i + 1 < half else x
        return x

    def advance(self, start: int, stop: int) -> None:
        if start == stop:
            return
        rates = torch.tensor([self.group["lr"] * self.task.factor(i) for i in range(start, stop)], dtype=torch.float64)
        half = len(self.parameters) // 2
        mlp_steps_(
            self.parameters[:half], self.parameters[half:], self.mask, self.first, self.second, self.data,
            self.train.labels, self.train.order(start, stop, self.seed), rates, self.rule, float(self.betas[0]),
            float(self.betas[1]), float(self.group.get("eps", 0.0)), float(self.group["weight_decay"]),
            bool(self.group.get("nesterov", False)), self.taken, self.sparse_below,
        )  # fmt: skip
        self.taken += stop - start

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        lists = {"parameter": self.parameters, "first": self.first, "second": self.second}
        return {f"{name}.{i}": t for name, ts in lists.items() for i, t in enumerate(ts)}, {"taken": self.taken}

    def restore(self, iteration: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        for name, own in (("parameter", self.parameters), ("first", self.first), ("second", self.second)):
            for i, tensor in enumerate(own):
                tensor.copy_(tensors[f"{name}.{i}"])
        self.taken = facts["taken"]


def why_not_mlp(task: Task, model: nn.Module, mode: str = "grad") -> str | None:
    """The reason why :class:`MlpTrainer` cannot run a training, or None if it can."""
    leaves = [m for m in model.modules() if not list(m.children())]
    chain = [m for m in leaves if not isinstance(m, nn.Flatten)]
    wanted = [nn.Linear if i % 2 == 0 else nn.ReLU for i in range(len(chain))]
    if not isinstance(model, nn.Sequential) or len(chain) % 2 == 0 or [type(m) for m in chain] != wanted:
        return "the network is no nn.Sequential of linear layers with ReLU between them"
    if any(m.bias is None for m in chain if isinstance(m, nn.Linear)):
        return "a layer has no bias"
    if not isinstance(task.train, Batches):
        return "the training data are no zipfast.tickets.Batches"
    parameters = list(model.parameters())
    dtypes = {p.dtype for p in parameters} | {task.train.data.dtype}
    if dtypes not in ({torch.float32}, {torch.float64}):
        return "parameters and data are not all float32, or all float64"
    if {p.device.type for p in parameters} | {task.train.data.device.type} != {"cpu"}:
        return "parameters and data are not on the CPU"
    if not all(p.requires_grad for p in parameters):
        return "a parameter is frozen"
    if task.loss is not F.cross_entropy:
        return "the loss is not torch.nn.functional.cross_entropy"
    if task.clip_norm is not None:
        return "gradients are clipped"
    if mode != "grad":
        return f"mode {mode!r} lets dead weights move"
    return _why_not_rule(task.optimizer(parameters), len(parameters))


def _why_not_rule(optimizer: Optimizer, parameters: int) -> str | None:
    if type(optimizer) not in (SGD, Adam, AdamW):
        return f"{type(optimizer).__name__} is not SGD, Adam or AdamW"
    if len(optimizer.param_groups) != 1 or len(optimizer.param_groups[0]["params"]) != parameters:
        return "the optimiser has several groups of parameters"
    for option in ("amsgrad", "maximize", "dampening"):
        if optimizer.param_groups[0].get(option):
            return f"the optimiser uses {option}"
    return None


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
    tensors, facts = checkpoint.load(partial), checkpoint.read_metadata(partial)
    if facts.get("identity") != identity or facts.get("trainer") != runner.name:
        raise ValueError(
            f"train: {partial} must be of this training, got one of other settings; delete it to begin again"
        )
    try:
        runner.restore(facts["iteration"], tensors, facts)
        return [Point(**p) for p in facts["curve"]], facts["iteration"], facts["seconds"]
    except (KeyError, TypeError) as e:
        raise ValueError(f"train: {partial} is damaged: it lacks {e}; delete it to begin this training again") from None


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
