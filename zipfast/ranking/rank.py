# SPDX-License-Identifier: Apache-2.0
"""Rank candidates for a data set: one forward pass over the labelled data each, then scores with intervals.

Features stream through sharded statistics; they are kept only for metrics that need them all. What is finished goes into a
journal, line by line, so that a killed run goes on with the next model.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, distributed
from ..features import evaluating
from . import evidence as ev
from .agreement import Agreement, agreement
from .bootstrap import Interval, ShardedStats
from .candidates import Candidate, Source, labelled, load_candidate, parameters_of, sources_of, stacked
from .extract import Extractor
from .journal import FORMAT, Journal, Ranked
from .metrics import FROM_FEATURES, FROM_PROBABILITIES, FROM_SUMMARY
from .stats import FeatureStats
from .targets import TASKS, Task, as_targets

METRICS = ("logme", *FROM_SUMMARY, *FROM_FEATURES, *FROM_PROBABILITIES)


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first; those without scores last."""

    rows: tuple[Ranked, ...]
    metric: str
    options: dict[str, Any]

    def agreement(self, truth: Mapping[str, float], *, seed: int = 0) -> dict[str, Agreement]:
        """Weighted Kendall τ of each metric with given accuracies, and of two trivial baselines: size and D.

        Raises:
            ValueError: fewer than two scored models have an accuracy. ImportError: no SciPy.
        """
        rows = [row for row in self.rows if row.error is None]
        columns = {name: {r.name: r.scores[name] for r in rows if name in r.scores} for name in self.metrics}
        columns["features D"] = {r.name: float(r.features) for r in rows}
        columns["parameters"] = {r.name: float(r.parameters) for r in rows if r.parameters is not None}
        least = sum(r.name in truth for r in rows)
        found = {}
        for name, column in columns.items():
            differ = len(set(column.values())) > 1 and sum(n in truth for n in column) == least
            if differ or name in self.metrics:
                found[name] = agreement(column, truth, seed=seed)
        return found

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.scores))

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN; replicates are left out."""
        rows = []
        for row in self.rows:
            plain = asdict(row)
            plain.pop("replicates")
            plain["scores"] = {name: s if math.isfinite(s) else None for name, s in row.scores.items()}
            rows.append(plain)
        return {"format": FORMAT, "metric": self.metric, "options": self.options, "rows": rows}

    def __str__(self) -> str:
        wide = max([5, *(len(row.name) for row in self.rows)])
        names = self.metrics
        head = f"{'':>3} {'model':<{wide}} " + " ".join(f"{name:>10}" for name in names)
        lines = [head + f" {'95%' if names else '':>19} {'first':>6} {'D':>6} {'params':>8} {'seconds':>8}"]
        for place, row in enumerate(self.rows, 1):
            if row.error is not None:
                lines.append(f"{'-':>3} {row.name:<{wide}} {row.error}")
                continue
            scores = " ".join(f"{row.scores.get(name, math.nan):>10.4f}" for name in names)
            low, high = row.intervals.get(self.metric, (math.nan, math.nan))
            between = f"{low:>9.4f} {high:>9.4f}" if math.isfinite(low) else " " * 19
            first = f"{100 * row.first:>5.0f}%" if row.first is not None else " " * 6
            size = f"{row.parameters / 1e6:>7.1f}M" if row.parameters is not None else " " * 8
            lines.append(
                f"{place:>3} {row.name:<{wide}} {scores} {between} {first} {row.features:>6} {size} "
                f"{sum(row.seconds.values()):>8.1f}"
            )
            lines += [f"      {note}" for note in row.notes]
        return "\n".join(line.rstrip() for line in lines)


def rank(
    models: Mapping[str, Candidate] | Sequence[str],
    batches: Iterable[Any] | None = None,
    *,
    task: Task = "classification",
    metrics: Sequence[str] = ("logme",),
    mode: ev.Mode = "exact",
    classes: int | None = None,
    ignore_index: int | None = None,
    layers: Sequence[str] | None = None,
    pool: str = "auto",
    labels: Any = None,
    max_batches: int | None = None,
    bootstrap: int = 100,
    shards: int = 16,
    confidence: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
    out: str | os.PathLike[str] | None = None,
    save_features: str | os.PathLike[str] | None = None,
    load: Callable[[str], nn.Module] = load_candidate,
    data_name: str = "",
    progress: Callable[[str, int], None] | None = None,
) -> Ranking:
    """Which of these models should be fine-tuned on this data? Each is scored in one forward pass.

    Args:
        models: by name: a torch module; a function that makes one; a text (a Hugging Face folder or name, ``timm:NAME``,
            ``package.module:factory@checkpoint``; see :func:`zipfast.ranking.extract.load_candidate`), or saved features
            (.npy, .npz, .safetensors); or a pair (features, labels). A list of texts names them by themselves, or by
            ``NAME=SPEC``. In a process group files are shared out, and a pair is the process's share.
        batches: (inputs, labels), or mappings with ``labels`` in them, that can be read once per model, in the same order;
            in a process group each process has its own share.
        task, classes, ignore_index: see :class:`zipfast.FeatureStats`.
        metrics: the first orders the table. In one pass: logme, hscore, reg_hscore, lfc; with all features in memory, and in
            one process only: transrate, gbc, knn, nleep; of models with a class head: leep.
        mode: of LogME.
        layers: take the outputs of these submodules, one row each, instead of the pooled pre-logits. pool: see
            :class:`zipfast.ranking.extract.Extractor`.
        labels: of saved features without their own.
        max_batches: read so many at most.
        bootstrap: replicates for the intervals; 0: none. shards, seed: see :class:`zipfast.ranking.bootstrap.ShardedStats`.
        confidence: of the intervals.
        device: where models run; None: where they are.
        out: a folder for the journal; finished models found there, of the same options, are not scored again.
        save_features: a folder; each candidate's features and labels are kept there as .safetensors.
        load: makes a model of a text.
        data_name: says in the journal which data it was, so that other data is not mixed in.
        progress: called with (stage, done).

    Returns:
        :class:`Ranking`. A candidate that cannot be loaded or scored is listed with the reason; the others go on.

    Raises:
        TypeError, ValueError: options that do not fit, or a journal of other options. OSError: `out` cannot be written.

    Cost: one forward pass per model, N·D²/2 multiply-adds, then O(D³) for the score and for each replicate.

    Example:
        >>> import torch, zipfast
        >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] + x[:, 1] > 0).long()
        >>> ranking = zipfast.rank({"all": (x, y), "half": (x[:, 1:], y)}, bootstrap=20)
        >>> [row.name for row in ranking.rows]
        ['all', 'half']

    Reference: You et al. 2021 (LogME, arXiv 2102.11005), §5.
    """
    options: dict[str, Any] = {
        "task": task, "metrics": list(metrics), "mode": mode, "classes": classes, "ignore_index": ignore_index,
        "layers": None if layers is None else list(layers), "pool": pool, "max_batches": max_batches,
        "bootstrap": bootstrap, "shards": shards, "confidence": confidence, "seed": seed, "data": data_name,
    }  # fmt: skip
    _check(options, batches)
    sources = sources_of(models, load)
    job = _Job(options, batches, labels, device, save_features, progress)
    journal = Journal(out, options)
    rows: list[Ranked] = []
    for number, source in enumerate(sources):
        if progress is not None:
            progress("models", number)
        known = journal.rows_of(source)
        if known is None:
            known = job.rows(source)
            journal.add(source, known)
        rows += known
    if progress is not None:
        progress("models", len(sources))
    return Ranking(_ordered(rows, metrics[0]), metrics[0], options)


def _check(options: Mapping[str, Any], batches: Any) -> None:
    if options["task"] not in TASKS:
        raise ValueError(f"rank: 'task' must be one of {', '.join(TASKS)}, got {options['task']!r}")
    ev.check_mode("rank", options["mode"])
    metrics = options["metrics"]
    if not metrics or len(set(metrics)) < len(metrics) or not set(metrics) <= set(METRICS):
        raise ValueError(
            f"rank: 'metrics' must be of {', '.join(METRICS)}, each once, got {', '.join(metrics) or 'none'}"
        )
    of_classes = [name for name in metrics if name != "logme"]
    if options["task"] != "classification" and of_classes:
        raise ValueError(f"rank: 'metrics' must be logme for task={options['task']!r}, got {of_classes[0]}")
    whole = [name for name in metrics if name in FROM_FEATURES or name in FROM_PROBABILITIES]
    if whole and distributed.world_size() > 1:
        raise ValueError(f"rank: 'metrics' must be computable in one pass in a process group, got {whole[0]}")
    if options["bootstrap"] < 0 or options["shards"] < 1 or not 0 < options["confidence"] < 1:
        raise ValueError(
            "rank: 'bootstrap' must be at least 0, 'shards' at least 1 and 'confidence' between 0 and 1, got "
            f"{options['bootstrap']}, {options['shards']} and {options['confidence']}"
        )
    if isinstance(batches, (Tensor, str, Mapping)):
        raise TypeError(f"rank: 'batches' must be batches of (inputs, labels), got {type(batches).__name__}")


def _ordered(rows: Sequence[Ranked], metric: str) -> tuple[Ranked, ...]:
    """Best first, and how often each is the best among the replicates."""
    good = [row for row in rows if row.error is None]
    good.sort(key=lambda row: -row.scores[metric] if math.isfinite(row.scores[metric]) else math.inf)
    sizes = {len(row.replicates) for row in good}
    if len(sizes) == 1 and min(sizes) > 1 and len({row.samples for row in good}) == 1:
        winner = torch.tensor([row.replicates for row in good]).argmax(0)  # ties: the better estimate
        share = torch.bincount(winner, minlength=len(good)).double() / winner.numel()
        good = [Ranked(**{**vars(row), "first": float(s)}) for row, s in zip(good, share)]
    return (*good, *(row for row in rows if row.error is not None))


class _Job:
    """Everything that is the same for all candidates."""

    def __init__(
        self, options: dict[str, Any], batches: Any, labels: Any, device: Any, save_features: Any, progress: Any
    ) -> None:
        self.options, self.batches, self.labels, self.device, self.progress = options, batches, labels, device, progress
        self.folder = None if save_features is None else Path(save_features)
        if self.folder is not None:
            if distributed.world_size() > 1:
                raise ValueError(f"rank: 'save_features' must be None in a process group, got {str(self.folder)!r}")
            checkpoint.check_folder(self.folder)
            self.folder.mkdir(exist_ok=True)
        self.metrics: list[str] = options["metrics"]
        self.keep = self.folder is not None or any(name in FROM_FEATURES for name in self.metrics)
        self.squares: Tensor | None = None  # of the first candidate: all must see the same labels

    def rows(self, source: Source) -> list[Ranked]:
        """One per layer asked for; with the reason where that fails."""
        begin = time.perf_counter()
        try:
            if source.arrays is not None:
                return [self._of_arrays(source, begin)]
            return self._of_model(source, begin)
        except Exception as e:  # models are anyone's code
            if distributed.world_size() > 1:  # the others would wait for this process for ever
                raise
            said, kind = " ".join(str(e).split()), type(e).__name__
            plain = isinstance(e, (ValueError, TypeError, OSError, ImportError, RuntimeError)) and said
            return [Ranked(source.name, source.origin, error=said if plain else f"{kind}: {said}")]

    def _stats(self) -> ShardedStats:
        o = self.options
        empty = FeatureStats(o["task"], classes=o["classes"], ignore_index=o["ignore_index"], name="rank")
        return ShardedStats(empty, o["shards"] if o["bootstrap"] else 1, seed=o["seed"])

    def _targets(self, labels: Any, samples: int | None = None) -> Tensor:
        return as_targets("rank", labels, self.options["task"], samples, self.options["ignore_index"]).values

    def _of_arrays(self, source: Source, begin: float) -> Ranked:
        assert source.arrays is not None
        features, labels = source.arrays()
        labels = self.labels if labels is None else labels
        if labels is None:
            raise ValueError(f"rank: {source.origin} must hold labels too, got none; pass labels=")
        y = self._targets(labels, features.shape[0])
        if distributed.world_size() > 1 and source.origin != "arrays":  # a file is whole in every process
            own = slice(distributed.rank(), None, distributed.world_size())
            features, y = features[own], y[own]
        stats = self._stats().update(features, y)
        row = Ranked(source.name, source.origin, how="saved features", features=features.shape[1])
        return self._scored(row, stats, begin, (features, y), None)

    def _of_model(self, source: Source, begin: float) -> list[Ranked]:
        assert source.model is not None
        if self.batches is None:
            raise ValueError(f"rank: 'batches' must be given to score the model {source.name!r}, got none")
        model = source.model()
        if not isinstance(model, nn.Module):
            raise TypeError(f"rank: {source.origin} must return a torch module, got {type(model).__name__}")
        if self.device is not None:
            model = model.to(self.device)
        stats: dict[str, ShardedStats] = {}
        kept: dict[str, list[Tensor]] = {}
        labels: list[Tensor] = []
        logits: list[Tensor] = []
        with evaluating(model):
            extractor = Extractor(model, layers=self.options["layers"], pool=self.options["pool"])
            for number, (inputs, y) in enumerate(labelled(islice(self.batches, self.options["max_batches"]))):
                with torch.no_grad():
                    found = extractor(inputs)
                for name, x in found.items():
                    stats.setdefault(name, self._stats()).update(x, y)
                    if self.keep:
                        kept.setdefault(name, []).append(x.cpu())
                labels.append(self._targets(y).cpu())
                if "leep" in self.metrics:
                    if extractor.logits is None:
                        raise ValueError(f"rank: leep needs a model with a class head, got none in {source.name!r}")
                    logits.append(extractor.logits.float().cpu())
                if self.progress is not None:
                    self.progress("batches", number + 1)
        if not labels and distributed.world_size() == 1:
            raise ValueError("rank: 'batches' must hold at least one batch, got none; can they be read more than once?")
        rows = []
        for name in stats or dict.fromkeys(extractor.names):
            shards = stats.get(name) or self._stats()
            row = Ranked(
                f"{source.name}:{name}" if name else source.name,
                source.origin,
                extractor.how,
                parameters=parameters_of(model),
            )
            whole = (stacked(kept[name]), torch.cat(labels)) if self.keep else None
            theta = torch.cat(logits).softmax(-1) if logits else None
            rows.append(self._scored(row, shards, begin, whole, theta, torch.cat(labels) if labels else None))
            begin = time.perf_counter()
        return rows

    def _scored(
        self,
        row: Ranked,
        shards: ShardedStats,
        begin: float,
        whole: tuple[Tensor, Tensor] | None,
        theta: Tensor | None,
        labels: Tensor | None = None,
    ) -> Ranked:
        o, middle = self.options, time.perf_counter()
        total = shards.all_reduce().total()
        squares = total.square().cpu()
        if self.squares is None:
            self.squares = squares
        elif squares.shape != self.squares.shape or not torch.allclose(squares, self.squares, rtol=1e-6):
            raise ValueError(f"rank: {row.name} must be scored on the same labels as the others, got other ones")
        notes: list[str] = []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = total.evidence(o["mode"])
        notes += [str(w.message).removeprefix("rank: ") for w in said]
        if found.no_signal:
            notes.append(f"{len(found.no_signal)} of {total.outputs} outputs have no signal in these features")
        if found.perfect:
            which = f"{len(found.perfect)} of {total.outputs} outputs"
            notes.append(f"{which} are fitted up to rounding: N is too small for D, or they are linear in the features")

        def one_pass(stats: FeatureStats) -> dict[str, float]:
            scores = {}
            for name in self.metrics:
                if name == "logme":
                    scores[name] = stats.evidence(o["mode"]).score
                elif name in FROM_SUMMARY:
                    scores[name] = stats.score(name)
            return scores

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said above
            scores = one_pass(total)
        intervals: dict[str, Interval] = {}
        if o["bootstrap"] and len(shards.parts) > 1 and scores:
            intervals = shards.intervals(
                one_pass, scores, replicates=o["bootstrap"], confidence=o["confidence"], progress=self.progress
            )
        for name in self.metrics:
            if name in FROM_FEATURES:
                assert whole is not None
                scores[name] = FROM_FEATURES[name](*_without(*whole, o["ignore_index"]))
            elif name in FROM_PROBABILITIES:
                if theta is None or labels is None:
                    raise ValueError(f"rank: {name} needs a model with a class head, got features only in {row.name!r}")
                scores[name] = FROM_PROBABILITIES[name](*_without(theta, labels, o["ignore_index"]))
        if self.folder is not None and whole is not None:
            tensors = {"features": whole[0], "labels": whole[1]}
            checkpoint.save(
                self.folder / f"{slug(row.name)}.safetensors", tensors, {"origin": row.origin, "how": row.how}
            )
        main = intervals.get(self.metrics[0])
        end = time.perf_counter()
        return Ranked(
            row.name,
            row.origin,
            row.how,
            {name: scores[name] for name in self.metrics},
            {name: (i.low, i.high) for name, i in intervals.items() if math.isfinite(i.low)},
            None,
            total.count,
            total.features,
            row.parameters,
            {"extract": middle - begin, "score": end - middle},
            tuple(notes),
            None,
            main.replicates if main is not None else (),
        )


def _without(values: Tensor, labels: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    if ignore_index is None:
        return values, labels
    kept = labels != ignore_index
    return values[kept], labels[kept]


def slug(name: str) -> str:
    """A name as a file name; different names stay different."""
    plain = re.sub(r"[^\w.+-]+", "_", name).strip("_") or "model"
    if plain == name:
        return plain
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
