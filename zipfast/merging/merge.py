# SPDX-License-Identifier: Apache-2.0
"""The main job: merge trained models of one architecture into one model, without training."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import checkpoint, distributed
from .._version import __version__
from ..features import output_tensor
from ..pretrained import save_pretrained, wants_folder
from .apply import apply_groups, check_weights
from .assign import Method, PerSpace, match_spaces, spaces_named
from .common import Common, common_graph
from .graph import Graph
from .match import Groups
from .partial import MultiHead, build
from .plan import Plan
from .repair import reestimate_batchnorm
from .statistics import Progress, SpaceMoments, Taps, gather_moments
from .weights import match_weights

Similarity = Literal["activations", "weights", "mix"]


@dataclass(frozen=True, eq=False)
class Merged:
    """What :func:`merge` returns.

    module: the merged model, in eval mode: the class and configuration of ``models[0]``, or a :class:`MultiHead` where
    only a part was merged. plan: the spaces, frozen ones with their reasons. groups: by space name. similarities: by
    space name, [F, F] (empty for ``average``). seconds: by stage. options: everything that determined the result, with
    hashes of the inputs' weights.
    """

    module: nn.Module
    plan: Plan
    groups: Mapping[str, Groups]
    similarities: Mapping[str, Tensor]
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

    def save(self, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the result atomically, with plan, options and further `metadata` in the metadata.

        A whole model goes into one .safetensors file, or one of transformers by :meth:`save_pretrained` into a folder if
        `path` has another ending; a :class:`MultiHead` into a folder that `MultiHead.load` reads.
        """
        whole = {"options": dict(self.options), "plan": self.plan.to_json(), **(metadata or {})}
        if isinstance(self.module, MultiHead):
            self.module.save(path, whole)
        elif wants_folder(path, self.module):
            self.save_pretrained(path, metadata=metadata)
        else:
            checkpoint.save(path, self.state_dict, whole)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        source: str | Path | None = None,
        processor: Any = None,
        max_shard_size: int | str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Write a merged model of transformers as a folder that ``from_pretrained`` loads; arguments, result and errors as
        of :func:`zipfast.pretrained.save_pretrained`. Plan, options and `metadata` go into zipfast.json beside it.

        Raises:
            TypeError: a result of several networks, or one that is not of transformers; :meth:`save` writes those.
        """
        if isinstance(self.module, (MultiHead, LogitEnsemble)):
            raise TypeError(
                f"save_pretrained: the result must be one whole network, got a {type(self.module).__name__}, which no "
                "config.json can say; use save, and for a partial zip zipfast.MultiHead.load"
            )
        whole = {"options": dict(self.options), "plan": self.plan.to_json(), **(metadata or {})}
        return save_pretrained(
            self.module, folder, source=source, processor=processor, max_shard_size=max_shard_size, facts=whole
        )


def merge(
    models: Sequence[nn.Module],
    example_inputs: tuple[Any, ...],
    data: Iterable[Any],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    method: Method | Literal["ensemble"] = "zip",
    similarity: Similarity = "activations",
    mix: float = 0.5,
    alpha: PerSpace = 1.0,
    beta: PerSpace = 1.0,
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
    statistics: SpaceMoments | str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Merged:
    r"""Merge models that were trained apart into one (ZipIt!), wholly or up to a cut.

    The feature spaces are derived from the exported graph; the features of all models on the same data give
    correlations; features are matched greedily, also inside a model; weights follow, W* = Σ_m M W U; batch-norm
    statistics are re-estimated. Models whose outputs differ in size are merged up to the last possible cut and keep
    their own heads.

    Args:
        models: two or more of one architecture; left as they are, train mode included. A merged model can be merged
            again (see `weights`).
        example_inputs, example_kwargs: arguments of a forward call, for the export.
        data: batches, more than once iterable (a DataLoader or a list), read by
            :func:`zipfast.features.batch_inputs`: a tensor, a tuple or list whose first item is the input, or a mapping of
            the keyword arguments in ``example_kwargs``. In a process group each process passes its own share.
        method: ``"zip"``; or a baseline: ``"permute"`` (one feature of each model per group, by scipy's assignment),
            ``"optimal"`` (best pairing, two models, by networkx), ``"kmeans"`` (by scikit-learn), ``"average"`` (feature
            k with feature k); ``"ensemble"`` merges nothing: a :class:`LogitEnsemble` of copies.
        similarity: by ``"activations"`` (their correlation on `data`), by ``"weights"`` (Git Re-Basin's weight matching,
            iterated; data only serves `reestimate`), or a ``"mix"`` of both, `mix` being the share of weights.
        alpha, beta: as in :func:`zipfast.match`, one number or by space (names or patterns); 1 and 1 are the best safe
            choice for whole networks. Spaces where only a permutation is exact (flagged in the plan) get a permutation,
            unless `beta` names them.
        weights: shares of the models in every average; a model merged from two counts double with (2, 1).
        skip: spaces (names or patterns) that are averaged as they are.
        start, stop: merge only between these cuts: a module's path or a graph node, see :func:`zipfast.cuts`. The result
            is a :class:`MultiHead`.
        taps: ``"last"`` or ``"all"``, see :class:`SpaceMoments`.
        compat: the public reference's rules, see :mod:`zipfast.compat.zipit`.
        reestimate: re-estimate batch-norm statistics on ``data``; without it a merged network with batch norm is near
            chance.
        repair: for layers without batch norm behind them, rescale merged features to the mean and spread of their parents
            (REPAIR); one more pass over the data, of all models and the merged one.
        max_batches: read so many batches of ``data`` at most, for each pass.
        unknown: ``"freeze"`` leaves features unmerged that reach an op without a rule, instead of raising.
        statistics: of these models on other data or of an earlier run, instead of a pass over ``data``; or a
            .safetensors file, where they are kept as they grow: an interrupted run goes on from there.
        out: save the result there (.safetensors; a folder for models of transformers, and for a :class:`MultiHead`); checked
            before the work starts.
        progress: called with (stage, batches done).

    Returns:
        :class:`Merged`.

    Raises:
        ValueError: models whose graphs differ (the node is named), a model that cannot be exported, an unknown op, a cut
            that does not exist (the nearest are named), empty data, features that are not finite. TypeError: ``data``
            that can be read only once. OSError: ``out`` cannot be written.

    Cost: one export; one forward pass per model and batch, up to the last tap, with D²·M²/2 multiply-adds per sample and
    space; one more pass of the merged model. Deterministic for deterministic models.

    Example:
        >>> import torch, zipfast
        >>> a, b = zipfast.zoo.mlp(8, (16,), 3), zipfast.zoo.mlp(8, (16,), 3)
        >>> data = [torch.randn(32, 8) for _ in range(4)]
        >>> merged = zipfast.merge([a, b], (data[0],), data)
        >>> tuple(merged.module(data[0]).shape)
        (32, 3)
        >>> merged = zipfast.merge([a, b], (data[0],), data, stop="1")
        >>> [tuple(output.shape) for output in merged.module(data[0])]
        [(32, 3), (32, 3)]

    Reference: Stoica et al. 2024 (arXiv 2305.03053), §4; Ainsworth et al. 2023 (weights); Jordan et al. 2023 (REPAIR).
    """
    _check_arguments(models, data, similarity, mix, weights, max_batches)
    if out is not None:
        shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
        whole = start is None and stop is None and all(other == shapes[0] for other in shapes[1:])
        one_file = method == "ensemble" or (whole and not wants_folder(out, models[0]))
        (checkpoint.check_writable if one_file else checkpoint.check_folder)(out)
    clock = _Clock()
    with clock("export"):
        common = common_graph(models, example_inputs, example_kwargs, unknown=unknown, start=start, stop=stop)
    plan = common.graph.plan
    if method == "ensemble":
        ensemble = LogitEnsemble([copy.deepcopy(model) for model in models]).eval()
        merged = Merged(ensemble, plan, {}, {}, clock.seconds, {"method": method, "zipfast": __version__})
        if out is not None and distributed.rank() == 0:
            merged.save(out)
        return merged
    states = [dict(m.state_dict(keep_vars=True)) for m in models]
    skipped = spaces_named(plan, "skip", skip)
    hashes = [checkpoint.state_hash(state) for state in states]
    found: dict[str, Tensor] = {}
    if similarity != "weights" and method != "average":
        with clock("moments"):
            if not isinstance(statistics, SpaceMoments):
                statistics = _gather(
                    common.graph, states, data, statistics, taps, skipped, max_batches, progress, list(hashes)
                )
            found = statistics.correlations(pair_dead=method == "zip" and not compat)
    with clock("match"):

        def solve(part: Plan, similarities: Mapping[str, Tensor]) -> dict[str, Groups]:
            names = {space.name for space in part.mergeable}
            return match_spaces(
                part,
                similarities,
                len(models),
                method=method,
                alpha=_restrict(alpha, plan, names, "alpha"),
                beta=_restrict(beta, plan, names, "beta"),
                skip=[name for name in skipped if name in names],
                compat=compat,
            )

        if similarity == "activations" or method == "average":
            groups = solve(plan, found)
        else:
            groups, found = match_weights(
                plan,
                states,
                solve,
                cosine=method != "permute" or similarity == "mix",
                blend=lambda name, s: (
                    s if similarity == "weights" else mix * s + (1 - mix) * found[name].double().cpu()
                ),
                skip=skipped,
            )
    with clock("apply"):
        module = _assemble(models, common, groups, states, weights)
    if repair:
        from .rescale import rescale

        with clock("repair"):
            batches = _counted(data, "repair", max_batches, progress)
            rescale(module, common, groups, states, batches, weights, reestimate=reestimate)
    if reestimate:
        with clock("batch norm"):
            reestimate_batchnorm(module, _counted(data, "batch norm", max_batches, progress))
    options = {
        "method": method,
        "similarity": similarity,
        "mix": mix,
        "alpha": dict(alpha) if isinstance(alpha, Mapping) else alpha,
        "beta": dict(beta) if isinstance(beta, Mapping) else beta,
        "weights": None if weights is None else list(weights),
        "skip": list(skip),
        "start": common.graph.start,
        "stop": common.graph.stop,
        "taps": taps,
        "compat": compat,
        "reestimate": reestimate,
        "repair": repair,
        "max_batches": max_batches,
        "unknown": unknown,
        "zipfast": __version__,
        "torch": torch.__version__,
        "inputs": hashes,
    }
    merged = Merged(module, plan, groups, found, clock.seconds, options)
    if out is not None and distributed.rank() == 0:
        merged.save(out)
    return merged


class LogitEnsemble(nn.Module):
    """The mean of the models' outputs: the upper bound that a merge is compared with, at M times its cost.

    Outputs of different sizes have no mean: then all are returned, as a list like a :class:`MultiHead`'s.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:
        outputs = [output_tensor(m(*args, **kwargs)) for m in self.models]
        if any(output.shape != outputs[0].shape for output in outputs):
            return outputs
        return torch.stack(outputs).mean(0)


def _check_arguments(
    models: Sequence[nn.Module],
    data: Any,
    similarity: str,
    mix: float,
    weights: Sequence[float] | None,
    max_batches: int | None,
) -> None:
    if len(models) < 2:
        raise ValueError(f"merge: 'models' must hold at least two models, got {len(models)}")
    check_weights("merge", weights, len(models))
    if similarity not in ("activations", "weights", "mix"):
        raise ValueError(f"merge: 'similarity' must be 'activations', 'weights' or 'mix', got {similarity!r}")
    if not 0 <= mix <= 1:
        raise ValueError(f"merge: 'mix' must be in [0, 1], got {mix}")
    check_data("merge", data, max_batches)


def check_data(caller: str, data: Any, max_batches: int | None) -> None:
    """Refuse data that can be read only once."""
    if isinstance(data, (Iterator, Tensor)):
        raise TypeError(
            f"{caller}: 'data' must be batches that can be read more than once, "
            f"got {'one tensor' if isinstance(data, Tensor) else 'an iterator'}; pass a DataLoader or a list of batches"
        )
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"{caller}: 'max_batches' must be at least 1 or None, got {max_batches}")


def _gather(
    graph: Graph,
    states: Sequence[Mapping[str, Tensor]],
    data: Iterable[Any],
    path: str | Path | None,
    taps: Taps,
    skip: Sequence[str],
    max_batches: int | None,
    progress: Progress | None,
    hashes: list[str],
) -> SpaceMoments:
    """The statistics, from a file as far as it has them."""
    resume = None
    origin = {"inputs": hashes, "start": graph.start, "stop": graph.stop, "data": getattr(data, "description", None)}
    if path is not None:
        checkpoint.check_writable(path)
        if Path(path).exists() and distributed.world_size() == 1:
            resume = SpaceMoments.load(path)
            for key, value in origin.items():
                if resume.origin.get(key) != value:
                    raise ValueError(
                        f"merge: 'statistics' must be of these models and data, but {path} is of other {key}; delete it or "
                        "give another name"
                    )
    return gather_moments(
        graph,
        states,
        data,
        taps=taps,
        skip=skip,
        max_batches=max_batches,
        resume=resume,
        origin=origin,
        checkpoint_to=path,
        progress=progress,
    )


def _restrict(value: PerSpace, plan: Plan, names: set[str], option: str) -> PerSpace:
    """A choice by patterns as one by the names of some spaces only."""
    if not isinstance(value, Mapping):
        return value
    chosen: dict[str, float] = {}
    for pattern, number in value.items():
        for name in spaces_named(plan, option, [pattern]):
            if name in names:
                chosen.setdefault(name, float(number))
    return chosen


def _assemble(
    models: Sequence[nn.Module],
    common: Common,
    groups: Mapping[str, Groups],
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None,
) -> nn.Module:
    graph = common.graph
    if graph.stop is None and graph.start is None:
        module = copy.deepcopy(models[0])
        module.load_state_dict(apply_groups(graph.plan, groups, states, weights=weights))
        return module.eval()
    known = [{name: state[name] for name in graph.plan.shapes if name in state} for state in states]
    merged = apply_groups(graph.plan, groups, known, weights=weights)
    assert graph.stop is not None
    return build(common.exported, states, merged, graph.plan, groups, graph.start, graph.stop, weights)


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
