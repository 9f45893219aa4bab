# SPDX-License-Identifier: Apache-2.0
"""Re-estimating batch-norm statistics after a merge.

Averaging units that are not perfectly correlated shrinks the variance of the result, so the running statistics of the
parents do not fit the merged model any more. One pass over a few batches replaces them by the merged model's own: with
momentum None a batch-norm layer keeps the plain average over batches, which does not depend on their order.

Cost: one forward pass per batch, no gradients, no memory beyond the layers' statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def reestimate_batchnorm(module: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None) -> int:
    """Replace all running batch-norm statistics by averages over `batches`.

    Only batch-norm layers that track statistics run in train mode; all else, dropout too, runs in eval mode.
    Afterwards every module's mode and every layer's momentum are what they were; if the pass fails, the statistics too.

    Args:
        module: changed in place: the running statistics and nothing else.
        batches: tensors, tuples or lists whose first item is the model's input, or mappings of keyword arguments;
            moved to the device of the module's first parameter or buffer.
        max_batches: stop after so many batches; None uses all.

    Returns:
        The number of layers re-estimated; 0, without reading a batch, if there is none.

    Raises:
        ValueError: there are layers to re-estimate but no batch; the module is unchanged.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
        >>> reestimate_batchnorm(net, [torch.randn(8, 2), torch.randn(8, 2)])
        1

    Reference: Stoica et al. 2024 (ZipIt!), §4.3; Jordan et al. 2023 (REPAIR), §3.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"reestimate_batchnorm: 'max_batches' must be at least 1 or None, got {max_batches}")
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return 0
    iterator = iter(batches if max_batches is None else islice(batches, max_batches))
    try:
        first = next(iterator)  # before anything is reset, so that empty data leaves the model as it was
    except StopIteration:
        raise ValueError("reestimate_batchnorm: 'batches' must hold at least one batch, got none") from None

    tensor = next(chain(module.parameters(), module.buffers()))
    modes = [(m, m.training) for m in module.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    before = [(value, value.clone()) for layer in layers for value in layer.buffers(recurse=False)]
    try:
        for m, _ in modes:
            m.training = False  # the flag alone: a module may override train() and eval()
        for layer in layers:
            layer.training, layer.momentum = True, None
            layer.reset_running_stats()
        with torch.no_grad():
            for batch in chain([first], iterator):
                _forward(module, batch, tensor.device)
    except BaseException:
        for value, saved in before:
            value.copy_(saved)
        raise
    finally:
        for layer, momentum in momenta:
            layer.momentum = momentum
        for m, training in modes:
            m.training = training
    return len(layers)


def _forward(module: nn.Module, batch: Any, device: torch.device) -> None:
    if isinstance(batch, Mapping):
        module(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
        return
    while isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if not isinstance(batch, torch.Tensor):
        raise TypeError(
            "reestimate_batchnorm: each batch must be a tensor, a tuple that starts with one or a mapping, "
            f"got {type(batch).__name__}"
        )
    module(batch.to(device))
