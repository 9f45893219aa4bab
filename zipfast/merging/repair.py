# SPDX-License-Identifier: Apache-2.0
"""Re-estimating batch-norm statistics after a merge.

Averaging units that are not perfectly correlated shrinks the variance of the result, so the running statistics of the
parents do not fit the merged model any more. One pass over a few batches replaces them by the merged model's own: with
momentum None a batch-norm layer keeps the plain average over batches, which does not depend on their order.

Cost: one forward pass per batch, no gradients, no memory beyond the layers' statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .. import distributed
from ..features import batch_inputs


def reestimate_batchnorm(module: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None) -> int:
    """Replace all running batch-norm statistics by averages over `batches`.

    Only norm layers that track statistics (every batch norm, and instance norms that do) run in train mode; all else,
    dropout too, runs in eval mode. Afterwards every module's mode and every layer's momentum are what they were; if the
    pass fails, the statistics too. In a process group each process passes its own share of the batches.

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
    return reestimate(module, batches, batch_inputs, max_batches)


def reestimate(
    module: nn.Module,
    batches: Iterable[Any],
    inputs: Callable[[Any, torch.device], tuple[tuple[Any, ...], dict[str, Any]]],
    max_batches: int | None = None,
) -> int:
    """`reestimate_batchnorm` with a rule of one's own: `inputs` (batch, device) -> (args, kwargs) of the forward call."""
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"reestimate_batchnorm: 'max_batches' must be at least 1 or None, got {max_batches}")
    layers = [m for m in module.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    if not layers:
        return 0
    iterator = iter(batches if max_batches is None else islice(batches, max_batches))
    first = list(islice(iterator, 1))  # before anything is reset, so that empty data leaves the model as it was
    if not first and distributed.world_size() == 1:  # of several workers one may have no share
        raise ValueError("reestimate_batchnorm: 'batches' must hold at least one batch, got none")

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
            for batch in chain(first, iterator):
                args, kwargs = inputs(batch, tensor.device)
                module(*args, **kwargs)
            _share(layers)
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


def _share(layers: list[_NormBase]) -> None:
    """The average over the batches of all workers of a process group."""
    if distributed.world_size() == 1:
        return
    for layer in layers:
        assert layer.running_mean is not None and layer.running_var is not None
        assert layer.num_batches_tracked is not None
        count = layer.num_batches_tracked.double()
        flat = torch.cat([layer.running_mean.double() * count, layer.running_var.double() * count, count[None]])
        mean, variance, total = distributed.sum_(flat).split([layer.num_features, layer.num_features, 1])
        layer.running_mean.copy_(mean / total)
        layer.running_var.copy_(variance / total)
        layer.num_batches_tracked.copy_(total[0])
