# SPDX-License-Identifier: Apache-2.0
"""Adding one more model to a partially merged network: its trunk is zipped into the trunk that is there.

Heads stay as they are. What each of them is handed back changes twice: into the features of the old trunk, as before,
and these into those of the new one; two gathers are one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .. import checkpoint
from .._version import __version__
from .apply import apply_groups
from .assign import PerSpace, match_spaces
from .merge import Merged, check_data
from .partial import MultiHead, Unmerge, exit_targets
from .parts import extract
from .repair import reestimate_batchnorm
from .spaces import find_spaces, part_of
from .statistics import Progress, Taps, gather_moments


def extend(
    merged: MultiHead,
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    data: Iterable[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    alpha: PerSpace = 1.0,
    beta: PerSpace = 1.0,
    weights: Sequence[float] | None = None,
    taps: Taps = "last",
    reestimate: bool = True,
    max_batches: int | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Zip one more model into a partially merged network (ZipIt!), which gets one more head.

    Args:
        merged: from :func:`zipfast.merge` with `stop`, or loaded; left as it is.
        model: of the same architecture up to the cut; its head may differ.
        example_inputs, example_kwargs, data, alpha, beta, taps, reestimate, max_batches, progress: as in
            :func:`zipfast.merge`.
        weights: shares of the trunk and of the model in every average; default (M, 1), M models being in the trunk.

    Returns:
        :class:`Merged`, its module a new :class:`MultiHead` with M + 1 heads.

    Raises:
        ValueError: a network with stems of its own, or a model whose part before the cut differs from the trunk.

    Cost: as merging two models.

    Example:
        >>> import torch, zipfast
        >>> a, b, c = (zipfast.zoo.mlp(8, (16,), 3) for _ in range(3))
        >>> data = [torch.randn(32, 8) for _ in range(2)]
        >>> two = zipfast.merge([a, b], (data[0],), data, stop="1").module
        >>> [tuple(output.shape) for output in extend(two, c, (data[0],), data).module(data[0])]
        [(32, 3), (32, 3), (32, 3)]

    Reference: Stoica et al. 2024 (arXiv 2305.03053), §4.3, several models.
    """
    check_data("extend", data, max_batches)
    if merged.entry is not None:
        raise ValueError("extend: 'merged' must begin at the input, got a network with stems of its own")
    whole = find_spaces(model, example_inputs, example_kwargs)
    stop = merged.origin.get("stop")
    if stop not in whole.exported.by_name:
        raise ValueError(f"extend: 'model' must have the cut of 'merged', got no node {stop!r}")
    graph = part_of(whole, stop=stop)
    own = dict(model.state_dict(keep_vars=True))
    trunk = dict(merged.trunk.state_dict(keep_vars=True))
    for name, shape in graph.plan.shapes.items():
        names = (name, *graph.plan.aliases.get(name, ()))
        found = next((tuple(trunk[n].shape) for n in names if n in trunk), None)
        if found is None and any(n in trunk for n in _all_names(graph.plan.aliases, name)):
            continue
        if found != shape:
            raise ValueError(
                f"extend: 'model' must have the trunk of 'merged', got {name!r} of shape {list(shape)} where it has "
                f"{'none' if found is None else list(found)}"
            )
    states = [{**own, **trunk}, own]
    share = [float(merged.models), 1.0] if weights is None else list(weights)
    stats = gather_moments(graph, states, data, taps=taps, max_batches=max_batches, progress=progress)
    similarities = stats.correlations(pair_dead=True)
    groups = match_spaces(graph.plan, similarities, 2, alpha=alpha, beta=beta)
    known = [{name: state[name] for name in graph.plan.shapes if name in state} for state in states]
    state = apply_groups(graph.plan, groups, known, weights=share)
    targets = exit_targets(whole.exported, graph.plan, groups, 2)
    exits = [
        Unmerge({axis: of[0][old.get_buffer(f"axis{axis}")] if axis in _axes(old) else of[0] for axis, of in targets})
        for old in merged.exits
    ]
    exits.append(Unmerge({axis: of[1] for axis, of in targets}))
    module = MultiHead(
        extract(whole.exported, {**states[0], **state}, end=stop),
        exits,
        [*copy.deepcopy(list(merged.heads)), extract(whole.exported, own, begin=stop)],  # type: ignore[list-item]
        merged.inputs,
        keywords=merged.keywords,
        origin=merged.origin,
    )
    if reestimate:
        reestimate_batchnorm(module, data, max_batches=max_batches)
    options = {
        "extended": checkpoint.state_hash(merged.state_dict()),
        "inputs": [checkpoint.state_hash(own)],
        "alpha": alpha if not isinstance(alpha, Mapping) else dict(alpha),
        "beta": beta if not isinstance(beta, Mapping) else dict(beta),
        "weights": share,
        "zipfast": __version__,
    }
    return Merged(module, graph.plan, groups, similarities, {}, options)


def _axes(module: nn.Module) -> tuple[int, ...]:
    assert isinstance(module, Unmerge)
    return module.axes


def _all_names(aliases: Mapping[str, tuple[str, ...]], name: str) -> set[str]:
    return {other for first, others in aliases.items() if name in (first, *others) for other in (first, *others)}
