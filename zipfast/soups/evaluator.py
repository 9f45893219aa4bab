# SPDX-License-Identifier: Apache-2.0
"""A model and held-out batches as the callable that soups are chosen by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluate import accuracy
from ..features import batch_inputs, batch_labels, device_of, evaluating, output_tensor
from ..merging import reestimate_batchnorm
from ..pretrained import is_pretrained, renamed
from .mix import RUNNING


class Evaluator:
    """``evaluator(state)``: the accuracy, in per cent, of a model with these weights on held-out batches.

    Args:
        model: any module that the weights fit; it is left with those evaluated last.
        batches: (inputs, labels), readable more than once.
        recalibrate: batches to re-estimate batch-norm statistics on before each evaluation, as averaged statistics are wrong
            for averaged weights. None: keep them as averaged.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> evaluator = Evaluator(net, [(torch.eye(2), torch.tensor([0, 1]))])
        >>> evaluator({"weight": torch.eye(2)}), evaluator({"weight": -torch.eye(2)})
        (100.0, 0.0)

    Cost: one pass over the batches (two with `recalibrate`).
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], *, recalibrate: Iterable[Any] | None = None) -> None:
        if iter(batches) is batches:
            raise TypeError(
                "Evaluator: 'batches' must be readable more than once, got an iterator; pass a list or loader"
            )
        self.model, self.batches, self.recalibrate = model, batches, recalibrate
        self.total: int | None = None  # labels in the batches, known after the first full pass

    def __call__(self, state: Mapping[str, Tensor]) -> float:
        self.load(state)
        with evaluating(self.model):
            return accuracy(self.model, self.batches)

    def at_most(self, state: Mapping[str, Tensor], need: float, *, equal: bool) -> tuple[float, bool]:
        """As a call, but stops as soon as `need` per cent cannot be passed (`equal`: cannot be reached).

        Returns:
            (accuracy, True), or, where it stopped, (what it could have reached at most, False).
        """
        self.load(state)
        right = seen = 0
        device = device_of(self.model)
        with evaluating(self.model), torch.no_grad():
            for batch in self.batches:
                labels = batch_labels(batch)
                if not isinstance(labels, Tensor):
                    raise ValueError("Evaluator: 'batches' must hold labels beside the inputs, got none")
                args, kwargs = batch_inputs(batch, device)
                answer = output_tensor(self.model(*args, **kwargs)).argmax(-1)
                right += int((answer == labels.to(device)).sum())
                seen += labels.numel()
                if self.total is not None:
                    most = 100 * (right + self.total - seen) / self.total
                    if most < need or (most == need and not equal):
                        return most, seen == self.total
        if not seen:
            raise ValueError("Evaluator: 'batches' must hold at least one sample, got none")
        self.total = seen
        return 100 * right / seen, True

    def recalibrated(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same weights, with batch-norm statistics re-estimated on `recalibrate`; without it, the state as it is."""
        self.load(state)
        own = self.model.state_dict()
        return {
            key: own[key].to(value.device, value.dtype, copy=True) if key.rsplit(".", 1)[-1] in RUNNING else value
            for key, value in state.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put weights into the model, and re-estimate its batch norm where asked to.

        Of a model of transformers they may have the names of its files, too.

        Raises:
            ValueError: names or shapes that do not fit, by name.
        """
        own = self.model.state_dict(keep_vars=True)
        if (
            any(key not in own for key in state)
            and hasattr(self.model, "from_pretrained")
            and is_pretrained(self.model)
        ):
            state = renamed(self.model, state) or state
        there = {value.data_ptr() for key, value in own.items() if key in state}
        missing = [key for key, value in own.items() if key not in state and value.data_ptr() not in there]
        unknown = [key for key in state if key not in own]
        wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
        for what, names in (("lack", missing), ("hold besides", unknown), ("hold in another shape", wrong)):
            if names:
                kind = type(self.model).__name__
                raise ValueError(f"Evaluator: the weights must fit {kind}, got ones that {what} {', '.join(names[:3])}")
        with torch.no_grad():
            for key, value in state.items():
                own[key].copy_(value)
        if self.recalibrate is not None:
            reestimate_batchnorm(self.model, self.recalibrate)
