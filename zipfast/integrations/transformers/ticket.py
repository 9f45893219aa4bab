# SPDX-License-Identifier: Apache-2.0
"""Sparse training in a Trainer: what is pruned stays exactly 0, and a schedule prunes as training goes."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...tickets import MaskedOptimizer, Masks
from ...tickets.masks import SCOPES, Rates, apply_bits_
from ...tickets.optim import MODES
from .common import TrainerCallback, check_resumed, checkpoint_folder, not_loaded, recall, remember

KEY = "TicketCallback"
FILE = "masks.safetensors"


class TicketCallback(TrainerCallback):
    """Train a pruned network, or prune while training.

    Gradients are masked as they arrive, before the trainer clips their norm; weights and optimiser state after each step.
    The masks stand beside every checkpoint as masks.safetensors, and a resumed run goes on with those; after
    ``load_best_model_at_end`` they are those of the best checkpoint. Iterative pruning with rewinding is a loop of
    trainers, as each level begins with a fresh optimiser and schedule: see docs/integrations/transformers.md.

    Args:
        masks: of the model; None: nothing pruned yet.
        schedule: step -> what is pruned after it: a fraction of the survivors, a whole number of weights, or fractions by
            layer, as :meth:`zipfast.Masks.prune` takes it; see :func:`zipfast.tickets.gradual`. By magnitude.
        scope: of the schedule: ``"global"`` or ``"layer"``.
        mode: ``"grad"``, ``"post"`` or ``"forward"``, see :class:`zipfast.tickets.MaskedOptimizer`.
        only, ignore: which weights, where `masks` is None, as of :meth:`zipfast.Masks.ones`.

    Attributes:
        masks: the present ones. history: (step, density) after each pruning.

    Raises:
        ValueError: a schedule, scope or mode that is none; masks of another network; training with DeepSpeed or FSDP, which
        cut weights up; a checkpoint whose masks are not there. TypeError: `masks` is something else.

    Example:
        >>> callback = TicketCallback(schedule={100: 0.2, 200: 0.2}, ignore="classifier")
    """

    def __init__(
        self,
        masks: Masks | None = None,
        *,
        schedule: Mapping[int, Rates | int] | None = None,
        scope: str = "global",
        mode: str = "grad",
        only: str | None = None,
        ignore: str | None = None,
    ) -> None:
        if masks is not None and not isinstance(masks, Masks):
            raise TypeError(
                f"TicketCallback: 'masks' must be zipfast.Masks, got {type(masks).__name__}; see Masks.load"
            )
        if masks is not None and (only or ignore):
            raise ValueError("TicketCallback: 'only' and 'ignore' must be left out with masks, which say it themselves")
        for what, value, known in (("scope", scope, SCOPES), ("mode", mode, MODES)):
            if value not in known:
                raise ValueError(f"TicketCallback: '{what}' must be one of {', '.join(known)}, got {value!r}")
        self.start, self.masks = masks, masks
        self.schedule = {_step(step): amount for step, amount in (schedule or {}).items()}
        self.scope, self.mode, self.only, self.ignore = scope, mode, only, ignore
        self.history: list[tuple[int, float]] = []
        self.steps: MaskedOptimizer | None = None
        self.handles: list[Any] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Mask the model and find the masks of the checkpoint, if it is resumed."""
        self._check(args, state)
        check_resumed("TicketCallback", args, state, model)
        masks = self.start
        if masks is None:
            masks = Masks.ones(model, only=self.only, ignore=self.ignore)
        known = recall(state, KEY)
        self.history = [(int(step), float(density)) for step, density in (known or {}).get("history", [])]
        if known is not None:
            masks = self._find(args, state, known["hash"], masks)
        masks.agree()
        self._attach(masks, model, optimizer, state)
        if late := [step for step in self.schedule if step > state.max_steps]:
            warnings.warn(
                f"TicketCallback: 'schedule' prunes at step {late[0]}, but the training ends at {state.max_steps}: that is "
                "not pruned",
                stacklevel=2,
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """The mask after a step, and pruning where the schedule has it."""
        if self.steps is None or self.masks is None:
            return
        self.steps.settle()
        amount = self.schedule.get(state.global_step)
        if amount is None:
            return
        facts = {"step": state.global_step}
        masks = self.masks.prune(model, amount, scope=self.scope, facts=facts)
        masks.agree()
        if state.is_world_process_zero:  # here too: whoever is killed before on_save has the masks of that checkpoint
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            masks.save(Path(args.output_dir) / FILE)
        self.history.append((state.global_step, masks.density))
        self._attach(masks, model, optimizer, state)
        entry = {"ticket_density": masks.density, "epoch": state.epoch, "step": state.global_step}
        state.log_history.append(entry)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The masks beside the checkpoint."""
        folder = checkpoint_folder(args, state)
        if self.masks is not None and state.is_world_process_zero and folder.is_dir():
            self.masks.save(folder / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Let go of the model; the masks become those of the best checkpoint if that was loaded."""
        self._detach()
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            return
        file = Path(state.best_model_checkpoint) / FILE
        if not file.is_file():
            warnings.warn(
                f"TicketCallback: the best model, {file.parent}, has no {FILE}: what it has pruned is not known",
                stacklevel=2,
            )
            return
        if key := not_loaded(model, file.parent):
            warnings.warn(
                f"TicketCallback: the Trainer has not loaded the best model, {file.parent}, but kept another {key!r}: names "
                f"in memory are not those of the file; load it by {type(model).__name__}.from_pretrained",
                stacklevel=2,
            )
            return
        self.masks = Masks.load(file)
        self.masks.apply_(model)

    def _check(self, args: Any, state: Any) -> None:
        for what in ("deepspeed", "fsdp"):
            if getattr(args, what, None):
                raise ValueError(
                    f"TicketCallback: 'args' must train whole weights on each device (one device, or DDP), got {what}, "
                    "which cuts them up"
                )
        if getattr(state, "is_hyper_param_search", False) and args.save_strategy != "no":
            raise ValueError(
                "TicketCallback: a hyper-parameter search must have save_strategy='no', as its checkpoints lie elsewhere, "
                f"got {args.save_strategy!r}"
            )

    def _find(self, args: Any, state: Any, wanted: str, given: Masks) -> Masks:
        if given.hash() == wanted:
            return given
        named = args.resume_from_checkpoint
        folders = [checkpoint_folder(args, state), *([Path(named)] if isinstance(named, str) else []), args.output_dir]
        files = [Path(folder) / FILE for folder in folders]
        for file in files:
            if file.is_file() and (found := Masks.load(file)).hash() == wanted:
                return found
        raise ValueError(
            f"TicketCallback: the masks of step {state.global_step} must be in {', '.join(map(str, files))}, got none that "
            "are those of the checkpoint; give them as masks=zipfast.Masks.load(...)"
        )

    def _attach(self, masks: Masks, model: nn.Module, optimizer: Any, state: Any) -> None:
        self._detach()
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps torch's own
        steps = MaskedOptimizer(inner, model, masks, mode=self.mode, fused=False)
        if self.mode == "grad":
            for weight, bits in zip(steps.weights, steps.bits):
                if weight.requires_grad:
                    self.handles.append(weight.register_post_accumulate_grad_hook(partial(_mask_gradient, bits)))
        steps.settle()
        self.masks, self.steps = masks, steps
        remember(state, KEY, {"hash": masks.hash(), "density": masks.density, "history": self.history})

    def _detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.steps is not None:
            self.steps.remove()
            self.steps = None


def _mask_gradient(bits: Tensor, weight: Tensor) -> None:
    if weight.grad is not None:
        apply_bits_([weight.grad], [bits])


def _step(step: Any) -> int:
    try:
        found = operator.index(step)
    except TypeError:
        found = 0
    if found < 1:
        raise ValueError(f"TicketCallback: 'schedule' must name steps, whole numbers from 1, got {step!r}")
    return found
