# SPDX-License-Identifier: Apache-2.0
"""What moves a network from one iteration to another: two trainers that give the same numbers up to rounding.

``torch`` runs any network, loader and optimiser; ``mlp`` runs perceptrons on the CPU by :func:`zipfast.ops.mlp_steps_`,
where an iteration costs what its surviving weights cost. :func:`why_not_mlp` says when it cannot.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..features import batch_inputs, batch_parts, device_of, output_tensor
from ..ops import available, mlp_steps_, sparse_linear
from ..ops._mask import popcount, unpack
from ..ops.sparse_linear import pack_weight
from .masks import Masks
from .optim import UNMASKED, MaskedOptimizer, has_hooks
from .task import Batches, Task, seed_of, stream

TRAINERS = ("auto", "torch", "mlp")
SMALL = 4096  # weights of a layer that is evaluated densely whatever its mask: a call costs more than it saves


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

    def _note_generators(self) -> None:
        self.generator = torch.get_rng_state()
        if self.device.type == "cuda":
            self.device_generator = torch.cuda.get_rng_state(self.device)

    def _ready(self) -> None:
        if self.generator is not None:
            torch.set_rng_state(self.generator)
            if self.device_generator is not None:
                torch.cuda.set_rng_state(self.device_generator, self.device)

    def advance(self, start: int, stop: int) -> None:
        if self.batches is None:
            torch.manual_seed(seed_of(self.seed, "noise", start) % (1 << 63))
            self._note_generators()  # a loader that begins within an epoch draws before the first batch
            self.batches = stream(self.task.train, start, self.seed, self._ready)
        self.model.train()
        for iteration in range(start, stop):
            batch = next(self.batches)
            factor = self.task.factor(iteration)
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate * factor
            inputs, labels = batch_parts(batch)
            args, kwargs = batch_inputs(inputs, self.device)
            self.optimizer.zero_grad()
            if not isinstance(labels, Tensor):
                raise ValueError("train: each training batch must hold labels beside the inputs, got none")
            output = output_tensor(self.model(*args, **kwargs))
            self.task.loss(output, labels.to(self.device)).backward()
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
        groups = [
            {k: v for k, v in group.items() if isinstance(v, (bool, int, float, str))}
            for group in self.optimizer.param_groups
        ]
        try:
            json.dumps(plain)
        except TypeError as e:
            name = type(self.optimizer).__name__
            raise ValueError(
                f"train: the state of {name} cannot be kept in a checkpoint ({e}); set checkpoint_seconds to infinity"
            ) from None
        return {**tensors, "generator": torch.get_rng_state()}, {"optimizer": plain, "groups": groups}

    def restore(self, iteration: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.model.load_state_dict(_under(tensors, "model."))
        state: dict[int, dict[str, Any]] = {}
        for name, value in {**_under(tensors, "optimizer."), **facts["optimizer"]}.items():
            i, own = name.split(".", 1)
            state.setdefault(int(i), {})[own] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        for group, own_group in zip(self.optimizer.param_groups, facts["groups"]):
            group.update(own_group)
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
        if weight.numel() < SMALL or not mask.numel() or not available("cpu"):
            return None
        if popcount(mask) >= self.sparse_below * weight.numel():
            return None
        row_start, column, _ = pack_weight(weight, mask)
        return row_start, column, unpack(mask, (weight.numel(),)).nonzero().view(-1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x: Tensor = args[0].reshape(len(args[0]), -1)
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
    layers = _in_order(model)
    if layers is None:
        return "the network is no plain nn.Sequential"
    if any(has_hooks(m) for m in model.modules()):
        return "a module has hooks"
    chain = [m for m in layers if type(m) is not nn.Flatten]
    wanted = [nn.Linear if i % 2 == 0 else nn.ReLU for i in range(len(chain))]
    if len(chain) % 2 == 0 or [type(m) for m in chain] != wanted:
        return "the network is no nn.Sequential of linear layers with ReLU between them"
    flat = [m for m in layers if isinstance(m, nn.Flatten)]
    deep = isinstance(task.train, Batches) and task.train.data.dim() != 2 and not isinstance(layers[0], nn.Flatten)
    if deep or any((m.start_dim, m.end_dim) != (1, -1) for m in flat):
        return "inputs of several dimensions are not flattened first"
    linear = [m for m in chain if isinstance(m, nn.Linear)]
    if len({id(m.weight) for m in linear}) < len(linear):
        return "layers share a weight"
    if any(m.bias is None for m in linear):
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
    with torch.random.fork_rng(devices=[]):
        return _why_not_rule(task.optimizer(parameters), len(parameters))


def wants_closure(optimizer: Optimizer) -> bool:
    """Whether it computes the loss again within a step, as LBFGS does."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _in_order(model: nn.Module) -> list[nn.Module] | None:
    """The layers of nested nn.Sequential as they run, one as often as it does; None where something else holds layers."""
    if type(model) is not nn.Sequential:
        return None if list(model.children()) else [model]
    found: list[nn.Module] = []
    for child in model._modules.values():  # children() would leave out repetitions
        inner = None if child is None else _in_order(child)
        if inner is None:
            return None
        found += inner
    return found


def _why_not_rule(optimizer: Optimizer, parameters: int) -> str | None:
    if type(optimizer) not in (SGD, Adam, AdamW):
        return f"{type(optimizer).__name__} is not SGD, Adam or AdamW"
    if has_hooks(optimizer):
        return "the optimiser has hooks around its step"
    if not optimizer.param_groups[0].get("momentum", 0.0) < 1:
        return "the momentum is 1 or more"
    if len(optimizer.param_groups) != 1 or len(optimizer.param_groups[0]["params"]) != parameters:
        return "the optimiser has several groups of parameters"
    for option in ("amsgrad", "maximize", "dampening"):
        if optimizer.param_groups[0].get(option):
            return f"the optimiser uses {option}"
    return None


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
