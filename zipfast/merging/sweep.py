# SPDX-License-Identifier: Apache-2.0
"""The budget study: one merge for each alpha and beta, on statistics that are gathered once (Stoica et al. 2024, §5.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from torch import nn

from .. import checkpoint
from .assign import spaces_named
from .common import common_graph
from .merge import check_data, merge
from .statistics import Progress, SpaceMoments, Taps, gather_moments


@dataclass(frozen=True)
class Point:
    """One merge of a sweep. score: what `evaluate` said. in_model: merges inside a model, of all. lifted: see `match`."""

    alpha: float
    beta: float
    score: float
    in_model: float
    lifted: int


def sweep(
    models: Sequence[nn.Module],
    example_inputs: tuple[Any, ...],
    data: Iterable[Any],
    evaluate: Callable[[nn.Module], float],
    *,
    alphas: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 1.0),
    betas: Sequence[float] = (0.0, 0.125, 0.5, 1.0),
    example_kwargs: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    skip: Sequence[str] = (),
    start: str | None = None,
    stop: str | None = None,
    taps: Taps = "last",
    compat: bool = False,
    reestimate: bool = True,
    repair: bool = False,
    max_batches: int | None = None,
    unknown: Literal["error", "freeze"] = "error",
    statistics: SpaceMoments | None = None,
    progress: Progress | None = None,
) -> list[Point]:
    """Merge and evaluate once for each pair of alpha and beta.

    Args:
        models, example_inputs, data, example_kwargs, weights, skip, start, stop, taps, compat, reestimate, repair,
            max_batches, unknown: as in :func:`zipfast.merge`.
        evaluate: module -> score, called with each merged module.
        alphas, betas: the grid. An alpha of 0 lets nothing merge twice, which only two models allow.
        statistics: gathered before; None: one pass over the data here.
        progress: called with ("sweep", merges done).

    Returns:
        One point per pair, alphas outermost.

    Raises:
        ValueError: an empty grid, an alpha or beta outside of [0, 1]; see :func:`zipfast.merge`.

    Cost: one pass over the data, then per point a match, a merge, one pass for batch norm and the evaluation.

    Example:
        >>> import torch, zipfast
        >>> a, b = zipfast.zoo.mlp(8, (16,), 3), zipfast.zoo.mlp(8, (16,), 3)
        >>> data = [torch.randn(32, 8) for _ in range(2)]
        >>> points = sweep([a, b], (data[0],), data, lambda m: m(data[0]).var().item(), alphas=(0.3, 1), betas=(0, 1))
        >>> [(point.alpha, point.beta) for point in points]
        [(0.3, 0), (0.3, 1), (1, 0), (1, 1)]
    """
    if not alphas or not betas:
        raise ValueError(f"sweep: 'alphas' and 'betas' must not be empty, got {list(alphas)} and {list(betas)}")
    for name, values in (("alphas", alphas), ("betas", betas)):
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"sweep: '{name}' must be in [0, 1], got {list(values)}")
    check_data("sweep", data, max_batches)
    if statistics is None:
        graph = common_graph(models, example_inputs, example_kwargs, unknown=unknown, start=start, stop=stop).graph
        states = [dict(model.state_dict(keep_vars=True)) for model in models]
        statistics = gather_moments(
            graph,
            states,
            data,
            taps=taps,
            skip=spaces_named(graph.plan, "skip", skip),
            max_batches=max_batches,
            progress=progress,
        )
    points: list[Point] = []
    for alpha in alphas:
        for beta in betas:
            merged = merge(
                models,
                example_inputs,
                data,
                example_kwargs=example_kwargs,
                alpha=alpha,
                beta=beta,
                weights=weights,
                skip=skip,
                start=start,
                stop=stop,
                taps=taps,
                compat=compat,
                reestimate=reestimate,
                repair=repair,
                max_batches=max_batches,
                unknown=unknown,
                statistics=statistics,
            )
            inside = sum(sum(g.in_model_merges) for g in merged.groups.values())
            total = sum(g.models * g.size - g.keep for g in merged.groups.values())
            lifted = sum(g.lifted for g in merged.groups.values())
            points.append(Point(alpha, beta, float(evaluate(merged.module)), inside / max(1, total), lifted))
            if progress is not None:
                progress("sweep", len(points))
    return points


def plot_sweep(points: Sequence[Point], path: str | PathLike[str], label: str = "score") -> None:
    """A heat map of the scores, written whole or not at all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise ImportError("sweep: matplotlib must be installed for the picture; pip install 'zipfast[plots]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    alphas, betas = (list(dict.fromkeys(getattr(p, name) for p in points)) for name in ("alpha", "beta"))
    score = {(p.alpha, p.beta): p.score for p in points}
    grid = [[score[a, b] for b in betas] for a in alphas]
    figure, axes = plt.subplots(figsize=(1.6 + len(betas), 1.2 + 0.7 * len(alphas)), layout="constrained")
    image = axes.imshow(grid, aspect="auto", origin="lower")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white")
    axes.set_xticks(range(len(betas)), [f"{b:g}" for b in betas])
    axes.set_yticks(range(len(alphas)), [f"{a:g}" for a in alphas])
    axes.set_xlabel("beta: part of the merges that may lie inside a model")
    axes.set_ylabel("alpha")
    figure.colorbar(image, ax=axes, label=label)
    with checkpoint.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
