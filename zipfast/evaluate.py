# SPDX-License-Identifier: Apache-2.0
"""How good a model is on labelled batches: accuracy, of one answer or of the heads of a merged network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .features import batch_inputs, batch_labels, device_of, output_tensor


def accuracy(module: nn.Module, batches: Iterable[Any], *, head: int | None = None) -> float:
    """Per cent of samples whose largest output is the label.

    Args:
        module: in the mode it should run in; of a :class:`zipfast.MultiHead` the heads' outputs are averaged, as an
            ensemble's, or one `head` is taken.
        batches: (inputs, labels), labels int64 [N] (or [N, ...] for one answer per position).
        head: which head the labels belong to.

    Raises:
        ValueError: no batch, no labels, heads of different sizes without `head`, labels of another shape than the answers
            or that the head does not have.

    Cost: one pass.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.eye(2))
        >>> accuracy(net, [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))])
        50.0
    """
    right = total = 0
    device = device_of(module)
    with torch.no_grad():
        for batch in batches:
            labels = batch_labels(batch)
            if not isinstance(labels, Tensor):
                raise ValueError("accuracy: 'batches' must hold labels beside the inputs, got none")
            args, kwargs = batch_inputs(batch, device)
            logits = _logits(module(*args, **kwargs), head)
            classes, labels = logits.shape[-1], labels.to(device)
            if labels.shape != logits.shape[:-1]:  # else they would be compared all with all
                raise ValueError(
                    f"accuracy: labels must have the shape {list(logits.shape[:-1])} of the answers, "
                    f"got {list(labels.shape)}"
                )
            if labels.numel() and (int(labels.max()) >= classes or int(labels.min()) < 0):
                which = "the model" if head is None else f"head {head}"
                raise ValueError(
                    f"accuracy: labels must be in [0, {classes}), the classes of {which}, "
                    f"got {int(labels.min())} to {int(labels.max())}; are they labels of another head?"
                )
            right += int((logits.argmax(-1) == labels).sum())
            total += labels.numel()
    if not total:
        raise ValueError("accuracy: 'batches' must hold at least one sample, got none")
    return 100 * right / total


def _logits(output: Any, head: int | None) -> Tensor:
    if not isinstance(output, list):
        if head not in (None, 0):
            raise ValueError(f"accuracy: 'head' must be None or 0 for a model with one answer, got {head}")
        return output_tensor(output)
    answers = [output_tensor(item) for item in output]
    if head is not None:
        if not 0 <= head < len(answers):
            raise ValueError(f"accuracy: 'head' must be in [0, {len(answers)}), got {head}")
        return answers[head]
    if len({answer.shape[-1] for answer in answers}) > 1:
        sizes = ", ".join(str(answer.shape[-1]) for answer in answers)
        raise ValueError(f"accuracy: 'head' must say which head the labels belong to, as they have {sizes} classes")
    return torch.stack(answers).mean(0)
