# SPDX-License-Identifier: Apache-2.0
"""The main job: merge trained models of one architecture into one model, without training."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import checkpoint
from .._version import __version__
from .apply import apply_groups
from .match import Groups, match, match_identity, match_permutation
from .moments import Moments, update_all
from .plan import Plan
from .repair import reestimate_batchnorm
from .spaces import Graph, find_spaces
from .taps import Tapped, features

Method = Literal["zip", "permute", "average"]
Progress = Callable[[str, int], None]


@dataclass(frozen=True, eq=False)
class Merged:
    """What :func:`merge` returns.

    module: the merged model, in eval mode; the class and configuration of ``models[0]``. plan: the spaces, frozen ones
    with their reasons. groups: by space name. correlations: by space name, [F, F] (empty for ``average``). seconds: by
    stage. options: everything that determined the result, with hashes of the inputs' weights.
    """

    module: nn.Module
    plan: Plan
    groups: Mapping[str, Groups]
    correlations: Mapping[str, Tensor]
    seconds: Mapping[str, float]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def report(self) -> str:
        """The plan, and per space how its features were grouped."""
        rows = [("space", "features", "in-model merges", "mean similarity", "budget lifted")]
        for name, g in self.groups.items():
            merges = ", ".join(str(n) for n in g.in_model_merges)
            mean = f"{g.value.mean():.3f}" if g.value.numel() else ""
            rows.append((name, f"{g.models} x {g.size}", merges, mean, str(g.lifted)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        times = ", ".join(f"{stage} {s:.2f} s" for stage, s in self.seconds.items())
        return "\n".join([str(self.plan), "", *table, "", f"time: {times}"])

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors, atomically, with plan and options in the metadata."""
        checkpoint.save(path, self.state_dict, {"options": dict(self.options), "plan": self.plan.to_json()})


def merge(
    models: Sequence[nn.Module],
    example_inputs: tuple[Any, ...],
    data: Iterable[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: Method = "zip",
    alpha: float = 1.0,
    beta: float = 1.0,
    compat: bool = False,
    reestimate: bool = True,
    max_batches: int | None = None,
    unknown: Literal["error", "freeze"] = "error",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Merged:
    r"""Merge models that were trained apart into one of the same size (ZipIt!).

    Each model is exported and its feature spaces are derived from the graph; the features of all models on the same data
    give correlations; features are matched greedily, also inside a model; weights follow, W* = Σ_m M W U; batch-norm
    statistics are re-estimated.

    Args:
        models: two or more of one architecture; left as they are, train mode included.
        example_inputs, example_kwargs: arguments of a forward call, for the export.
        data: batches, more than once iterable (a DataLoader or a list). A batch is a tensor, a tuple or list whose first
            item is the input, or a mapping of the keyword arguments in ``example_kwargs``. Inputs are
            moved to the models' device.
        method: ``"zip"``; ``"permute"`` (one feature of each model per group, by scipy's assignment) or ``"average"``
            (feature k with feature k) as baselines.
        alpha, beta, compat: as in :func:`zipfast.match`; 1 and 1 are the best safe choice for whole networks. Spaces
            where only a permutation is exact (flagged in the plan) get beta = 0.
        reestimate: re-estimate batch-norm statistics on ``data``; without it a merged network with batch norm is near
            chance.
        max_batches: read so many batches of ``data`` at most, for each pass.
        unknown: ``"freeze"`` leaves features unmerged that reach an op without a rule, instead of raising.
        out: save the result there (.safetensors); checked before the work starts.
        progress: called with (stage, batches done).

    Returns:
        :class:`Merged`.

    Raises:
        ValueError: models whose spaces differ, a model that cannot be exported, an unknown op, empty data, features
            that are not finite. TypeError: ``data`` that can be read only once. OSError: ``out`` cannot be written.

    Cost: one export per model; one forward pass per model and batch, with D²·M²/2 multiply-adds per sample and space;
    one more pass of the merged model. Deterministic for deterministic models.

    Example:
        >>> import torch, zipfast
        >>> a, b = zipfast.zoo.mlp(8, (16,), 3), zipfast.zoo.mlp(8, (16,), 3)
        >>> data = [torch.randn(32, 8) for _ in range(4)]
        >>> merged = zipfast.merge([a, b], (data[0],), data)
        >>> tuple(merged.module(data[0]).shape)
        (32, 3)

    Reference: Stoica et al. 2024 (arXiv 2305.03053), §4.
    """
    if method not in ("zip", "permute", "average"):
        raise ValueError(f"merge: 'method' must be 'zip', 'permute' or 'average', got {method!r}")
    if len(models) < 2:
        raise ValueError(f"merge: 'models' must hold at least two models, got {len(models)}")
    if isinstance(data, (Iterator, Tensor)):
        raise TypeError(
            "merge: 'data' must be batches that can be read more than once, "
            f"got {'one tensor' if isinstance(data, Tensor) else 'an iterator'}; pass a DataLoader or a list of batches"
        )
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"merge: 'max_batches' must be at least 1 or None, got {max_batches}")
    if out is not None:
        checkpoint.check_writable(out)
    clock = _Clock()

    with clock("export"):
        graph = _common_graph(models, example_inputs, example_kwargs, unknown)
    plan, states = graph.plan, [dict(m.state_dict(keep_vars=True)) for m in models]
    correlations: dict[str, Tensor] = {}
    if method != "average":
        with clock("moments"):
            moments = gather_moments(graph, states, data, max_batches=max_batches, progress=progress)
            pair_dead = method == "zip" and not compat
            correlations = {name: m.correlation(pair_dead=pair_dead) for name, m in moments.items()}
    with clock("match"):
        groups = _match_all(plan, correlations, len(models), method, alpha, beta, compat)
    with clock("apply"):
        module = copy.deepcopy(models[0])
        module.load_state_dict(apply_groups(plan, groups, states))
        module.eval()
    if reestimate:
        with clock("batch norm"):
            reestimate_batchnorm(module, _counted(data, "batch norm", max_batches, progress))
    options = {
        "method": method,
        "alpha": alpha,
        "beta": beta,
        "compat": compat,
        "reestimate": reestimate,
        "max_batches": max_batches,
        "unknown": unknown,
        "zipfast": __version__,
        "inputs": [checkpoint.state_hash(s) for s in states],
    }
    merged = Merged(module, plan, groups, correlations, clock.seconds, options)
    if out is not None:
        merged.save(out)
    return merged


def gather_moments(
    graph: Graph,
    states: Sequence[Mapping[str, Tensor]],
    data: Iterable[Any],
    *,
    max_batches: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """One pass over the data: the moments of every mergeable space, by name, all spaces in one kernel call per batch.

    Raises:
        ValueError: no batch; features that are not finite (model, space and first index are named).
    """
    spaces = graph.plan.mergeable
    moments = {space.name: Moments(len(states), name=space.name) for space in spaces}
    device = next((t.device for t in states[0].values()), torch.device("cpu"))
    program, batches = Tapped(graph), 0
    for batch in _counted(data, "moments", max_batches, progress):
        args, kwargs = _inputs(batch, device)
        values = [program.run(state, *args, **kwargs)[1] for state in states]
        # A space with several taps adds each in a call of its own: one call writes each accumulator once.
        for i in range(max((len(space.taps) for space in spaces), default=0)):
            tapped = [space for space in spaces if len(space.taps) > i]
            read = [[features(v[space.taps[i].node], space.taps[i]) for v in values] for space in tapped]
            update_all(
                [moments[space.name] for space in tapped],
                [[tensor for tensor, _ in own] for own in read],
                [own[0][1] for own in read],
            )
        batches += 1
    if not batches:
        raise ValueError("merge: 'data' must hold at least one batch, got none")
    return moments


class LogitEnsemble(nn.Module):
    """The mean of the models' outputs: the upper bound that a merge is compared with, at M times its cost."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([m(*args, **kwargs) for m in self.models]).mean(0)


def _common_graph(
    models: Sequence[nn.Module], example_inputs: tuple[Any, ...], example_kwargs: Mapping[str, Any] | None, unknown: Any
) -> Graph:
    graphs = [find_spaces(m, example_inputs, example_kwargs, unknown=unknown) for m in models]
    for i, other in enumerate(graphs[1:], 1):
        try:
            graphs[0].plan.same_spaces(other.plan)
        except ValueError as e:
            raise ValueError(f"merge: models 0 and {i} must have the same spaces: {e}") from None
    return graphs[0]


def _match_all(
    plan: Plan, correlations: Mapping[str, Tensor], models: int, method: Method, alpha: float, beta: float, compat: bool
) -> dict[str, Groups]:
    names = [space.name for space in plan.mergeable]
    if method == "average":
        return {space.name: match_identity(models, space.size) for space in plan.mergeable}
    if method == "permute":
        return {name: match_permutation(correlations[name], models) for name in names}
    found = match(
        [correlations[name] for name in names],
        models,
        alpha=alpha,
        beta=[0.0 if space.flags else beta for space in plan.mergeable],
        compat=compat,
        names=names,
    )
    assert isinstance(found, list)
    return dict(zip(names, found))


def _inputs(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a forward call from a batch, as :func:`reestimate_batchnorm` reads them too."""
    if isinstance(batch, Mapping):
        return (), {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    while isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise TypeError(
            f"merge: each batch must be a tensor, a tuple that starts with one or a mapping, got {type(batch).__name__}"
        )
    return (batch.to(device),), {}


def _counted(data: Iterable[Any], stage: str, most: int | None, progress: Progress | None) -> Iterator[Any]:
    for done, batch in enumerate(islice(data, most), 1):
        yield batch
        if progress is not None:
            progress(stage, done)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start
