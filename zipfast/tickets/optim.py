# SPDX-License-Identifier: Apache-2.0
"""Optimisers of masked networks: where the mask acts, and the fused step where there is one.

Mode ``grad``: gradient, optimiser state and weight of what is dead are exactly 0, always (the fused step takes gradients so,
and leaves the tensors alone; :meth:`MaskedOptimizer.mask_gradients` writes them). ``post``: the weight alone, after
each step. ``forward``: the weight, before each forward pass, as open_lth does; between step and forward what is dead moves.
Coordinate-wise optimisers give survivors the same values in all three, where the gradient is not clipped by its norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..ops import masked_step_
from ..ops._check import FLOATING
from .masks import Masks, apply_bits_

MODES = ("grad", "post", "forward")
UNMASKED = torch.empty(0, dtype=torch.uint8)


def has_hooks(owner: nn.Module | Optimizer) -> bool:
    """Whether somebody hung functions around a module's passes, or an optimiser's steps."""
    names = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
    names += ["_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"]
    return any(getattr(owner, name, None) for name in names)


def why_not_fused(optimizer: Optimizer, mode: str = "grad") -> str | None:
    """The reason why :func:`zipfast.ops.masked_step_` cannot take this optimiser's steps, or None if it can."""
    if mode != "grad":
        return f"mode {mode!r} masks weights alone"
    if type(optimizer) not in (SGD, Adam, AdamW):
        return f"{type(optimizer).__name__} is not SGD, Adam or AdamW"
    if has_hooks(optimizer):
        return "it has hooks around its step"
    for group in optimizer.param_groups:
        for option in ("amsgrad", "differentiable"):
            if group.get(option):
                return f"it uses {option}"
        for p in group["params"]:
            if p.dtype not in FLOATING or not p.is_contiguous():
                return f"a parameter of shape {list(p.shape)} is {p.dtype} or not contiguous"
    return None


class MaskedOptimizer:
    """Any torch optimiser over a network whose dead weights stay 0.

    Args:
        optimizer: over parameters of `model`; its state dict stays that of torch.
        model: masked at once.
        masks: of this model.
        mode: where the mask acts, see the module.
        fused: None: one fused pass where :func:`why_not_fused` finds no reason against it; False: the optimiser's own step.

    Raises:
        ValueError: another mode; masks of another network; `fused` True where it cannot be.

    Example:
        >>> net = nn.Linear(3, 1, bias=False)
        >>> masks = Masks.from_dense({"weight": torch.tensor([[True, False, True]])})
        >>> steps = MaskedOptimizer(torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), net, masks)
        >>> net(torch.ones(1, 3)).sum().backward()
        >>> steps.step()
        >>> net.weight[0, 1].item()
        0.0
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, masks: Masks, *, mode: str = "grad", fused: bool | None = None
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"MaskedOptimizer: 'mode' must be one of {', '.join(MODES)}, got {mode!r}")
        reason = why_not_fused(optimizer, mode)
        if fused and reason is not None:
            raise ValueError(f"MaskedOptimizer: 'fused' must be False or None here: {reason}")
        self.optimizer, self.mode, self.fused = optimizer, mode, reason is None if fused is None else fused
        weights = masks.check(model, "MaskedOptimizer")
        self.weights = list(weights.values())
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not own & {id(p) for p in model.parameters()}:
            raise ValueError("MaskedOptimizer: 'optimizer' must be over parameters of 'model', got one of others")
        self.bits = masks.on(weights)
        self.of = {id(w): b for w, b in zip(self.weights, self.bits)}
        self.prepare()
        self.hook = None
        if mode == "forward":
            near = Masks(dict(zip(masks.shapes, self.bits)), masks.shapes)
            self.hook = model.register_forward_pre_hook(_BeforeForward(near))

    def prepare(self) -> None:
        """Mask the weights."""
        apply_bits_(self.weights, self.bits)

    def mask_gradients(self) -> None:
        """Mask the gradients: to be called before they are clipped by their norm, which dead weights would enter."""
        pairs = [(w.grad, b) for w, b in zip(self.weights, self.bits) if w.grad is not None]
        if pairs and self.mode == "grad":
            apply_bits_([g for g, _ in pairs], [b for _, b in pairs])

    def step(self) -> None:
        """One step of the optimiser, and the mask."""
        if self.fused:
            for group in self.optimizer.param_groups:
                self._fused(group)
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers of torch ask for
            return
        self.mask_gradients()
        self.optimizer.step()
        self.settle()

    def settle(self) -> None:
        """What follows a step that somebody else made: the mask on weights and, in mode ``grad``, optimiser state."""
        if self.mode == "forward":
            return
        self.prepare()
        if self.mode == "grad":
            state = [
                (value, self.of[id(p)])
                for p, own in self.optimizer.state.items()
                if id(p) in self.of
                for value in own.values()
                if isinstance(value, Tensor) and value.shape == p.shape and value.dtype in FLOATING
            ]
            apply_bits_([value for value, _ in state], [bits for _, bits in state])

    def _fused(self, group: dict[str, Any]) -> None:
        rule = "sgd" if isinstance(self.optimizer, SGD) else "adam"
        if rule == "adam" and group.get("decoupled_weight_decay", isinstance(self.optimizer, AdamW)):
            rule = "adamw"
        momentum = float(group.get("momentum", 0.0))
        betas = group.get("betas", (0.0, 0.0))
        for step, params in self._steps(group, rule, momentum):
            state = [self.optimizer.state[p] for p in params]
            first, second = list[Tensor](), list[Tensor]()
            if rule != "sgd":
                first, second = [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state]
            elif momentum:
                first = [s["momentum_buffer"] for s in state]
            masked_step_(
                [p.detach() for p in params], first, second, [p.grad.detach() for p in params if p.grad is not None],
                [self.of.get(id(p), UNMASKED.to(p.device)) for p in params], rule, step, float(group["lr"]),
                float(group["weight_decay"]), momentum, float(group.get("dampening", 0.0)),
                bool(group.get("nesterov", False)), float(betas[0]), float(betas[1]), float(group.get("eps", 0.0)),
                bool(group.get("maximize", False)),
            )  # fmt: skip

    def _steps(self, group: dict[str, Any], rule: str, momentum: float) -> Iterator[tuple[int, list[Tensor]]]:
        """Parameters with a gradient by device and number of this step, with their state, named as torch names it."""
        found: dict[tuple[torch.device, int], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.optimizer.state[p]
            if rule == "sgd":
                step = 2 if state.get("momentum_buffer") is not None else 1
                if momentum and step == 1:
                    state["momentum_buffer"] = torch.zeros_like(p)
            else:
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                step = int(state["step"])
            found.setdefault((p.device, step), []).append(p)
        for (_, step), params in found.items():
            yield step, params

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's own: gradient scalers and schedulers look there."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """As the optimiser's."""
        self.optimizer.zero_grad()

    def remove(self) -> None:
        """Take the hook of mode ``forward`` off the model."""
        if self.hook is not None:
            self.hook.remove()


@dataclass
class _BeforeForward:
    """The hook of mode ``forward``: masks the module it hangs on, which may be a copy of the first."""

    masks: Masks

    def __call__(self, module: nn.Module, _: Any) -> None:
        self.masks.apply_(module)
