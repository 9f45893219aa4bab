# SPDX-License-Identifier: Apache-2.0
"""Feeding models and reading what they compute: the one place that says what a batch is, and hooks for features.

A batch is a tensor, a mapping of keyword arguments, or a tuple or list whose first item is one of those; labels and
whatever else follows are for the caller. Every command of zipfast reads data this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def batch_inputs(batch: Any, device: torch.device | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a forward call from a batch, moved to a device.

    Returns:
        (args, kwargs) for ``model(*args, **kwargs)``.

    Raises:
        TypeError: the batch has another form.

    Example:
        >>> args, kwargs = batch_inputs((torch.zeros(2, 3), torch.tensor([0, 1])))
        >>> tuple(args[0].shape), kwargs
        ((2, 3), {})
    """
    while isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        return (), {k: v.to(device) if isinstance(v, Tensor) and device is not None else v for k, v in batch.items()}
    if not isinstance(batch, Tensor):
        raise TypeError(
            "data: each batch must be a tensor, a mapping of keyword arguments, or a tuple that starts with one, "
            f"got {type(batch).__name__}"
        )
    return (batch if device is None else batch.to(device),), {}


def batch_labels(batch: Any) -> Any:
    """The second item of a batch that is a tuple or list; None if there is none."""
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def batch_parts(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch: of a pair, or of a mapping with ``labels``, which are then left out of the inputs."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != "labels"}, batch.get("labels")
    return batch, batch_labels(batch)


def output_tensor(output: Any) -> Tensor:
    """The tensor of a model's answer: itself, `logits` of a Hugging Face record, or the first tensor in it.

    Raises:
        TypeError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    items = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(items, (tuple, list)):
        for item in items:
            if isinstance(item, Tensor):
                return item
    raise TypeError(f"output: a model must return a tensor or a record with one, got {type(output).__name__}")


def device_of(state: Mapping[str, Tensor] | nn.Module) -> torch.device:
    """The device of a state dict's or module's first tensor; the CPU if it has none."""
    if isinstance(state, nn.Module):
        state = {**dict(state.named_parameters()), **dict(state.named_buffers())}
    return next((value.device for value in state.values()), torch.device("cpu"))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module's mode is what it was."""
    training = {part: part.training for part in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for part, was in training.items():
            part.training = was


@contextmanager
def capture(module: nn.Module, names: Iterable[str], *, inputs: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs (or first inputs) of submodules of every forward call inside the block.

    Args:
        module: any module; the hooks are removed at the end, also after an exception.
        names: dotted paths as in ``named_modules()``.
        inputs: collect what enters instead of what leaves.

    Yields:
        A dict that holds, after a forward call, one detached tensor per name.

    Raises:
        ValueError: a name is no submodule; the message lists some that are.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with capture(net, ["1"]) as found:
        ...     _ = net(torch.zeros(3, 4))
        >>> tuple(found["1"].shape)
        (3, 8)
    """
    modules, found, hooks = dict(module.named_modules()), dict[str, Tensor](), []
    for name in names:
        if name not in modules:
            some = ", ".join(list(modules)[1:6])
            raise ValueError(f"capture: 'names' must be submodules, got {name!r}; there are e.g. {some}")
    try:
        for name in names:

            def keep(_: nn.Module, args: Any, output: Any = None, name: str = name) -> None:
                found[name] = output_tensor(args if inputs else output).detach()

            own = modules[name]
            hooks.append(own.register_forward_pre_hook(keep) if inputs else own.register_forward_hook(keep))
        yield found
    finally:
        for hook in hooks:
            hook.remove()
