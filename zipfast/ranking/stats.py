# SPDX-License-Identifier: Apache-2.0
"""Statistics of features and labels, gathered in one pass, that all scores are computed from.

What LogME needs of N samples are FᵀF, FᵀY, ‖y‖² and N: sums over samples. They add over batches, shards and processes, and
take O(D² + DK) memory for any N. Mean and Gram matrix come from the streaming operator ``moments_`` (float32 products are
shifted and flushed to float64, so that large means do no harm), class sums from ``regroup`` in float64, in order: the result
depends neither on threads nor on a dense one-hot matrix.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint, distributed
from ..merging.moments import Moments
from ..ops import regroup
from . import evidence as ev
from .metrics import FROM_SUMMARY, Summary
from .spectrum import of_gram, rounding_of
from .targets import Array, Task, as_features, as_targets, check_products, check_task

FORMAT = "zipfast.feature_stats/1"
CHUNK = 1024  # rows gathered before they are added: adding D² float64 sums for each small batch would cost more


class FeatureStats:
    """One pass over features and labels; scores from the sums.

    Laws: ``a.update(x).merge(b.update(y))`` scores as ``c.update(x).update(y)``, to 1e-12 (float32 products: about 1e-8);
    the order of merging does not matter beyond that.

    Args:
        task: ``"classification"`` (labels are classes [N]), ``"regression"`` (values [N] or [N, K]) or ``"multilabel"``
            (0 and 1, [N, K]; the same sums as regression).
        classes: how many classes there are; None: as many as the largest label says. A class without samples is skipped.
        ignore_index: samples with this label are left out of all sums (classification).
        precision: ``"float64"`` casts features before products are formed; ``"auto"`` forms them as the features come,
            which is faster for 16-bit and float32 ones: errors of the score are about 1e-8, and more where features are
            nearly dependent, as directions with less than 1e-6 of the mean variance are then rounding.
        name: what errors call it.

    Example:
        >>> import torch, zipfast
        >>> x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> stats = zipfast.FeatureStats()
        >>> for i in range(0, 300, 100):
        ...     _ = stats.update(x[i : i + 100], y[i : i + 100])
        >>> stats.count, stats.features, round(stats.score(), 3)
        (300, 8, -0.916)

    Reference: You et al. 2021 (LogME, arXiv 2102.11005), §4.
    """

    def __init__(
        self,
        task: Task = "classification",
        *,
        classes: int | None = None,
        ignore_index: int | None = None,
        precision: str = "float64",
        name: str = "FeatureStats",
    ) -> None:
        check_task(name, task)
        if precision not in ("auto", "float64"):
            raise ValueError(f"{name}: 'precision' must be auto or float64, got {precision!r}")
        if classes is not None and classes < 1:
            raise ValueError(f"{name}: 'classes' must be at least 1, got {classes}")
        if ignore_index is not None and task != "classification":
            raise ValueError(f"{name}: 'ignore_index' must be None for task={task!r}, got {ignore_index}")
        self.task: Task = task
        self.classes, self.ignore_index, self.precision, self.name = classes, ignore_index, precision, name
        self.moments = Moments(1, name=name)
        self.seen = 0  # samples, those of ignore_index included
        self._dtype: torch.dtype | None = None  # of the products
        self._outputs = classes or 0
        self._cross = torch.zeros(0, 0, dtype=torch.float64)  # FᵀY, as [K, D]
        self._weight = torch.zeros(0, dtype=torch.float64)  # Σ y [K]; samples per class
        self._target = torch.zeros(0, 0, dtype=torch.float64)  # YᵀY [K, K], not of classes
        self._square = torch.zeros(0, dtype=torch.float64)  # Σ y² [K]
        self._quartic = torch.zeros(0, dtype=torch.float64)  # Σ‖a‖²a, then Σ‖a‖⁴; a = x - shift: [D + 1]
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._pending_rows = 0

    # ------------------------------------------------------------------------------------------------- gathering

    def update(self, features: Array, labels: Array) -> FeatureStats:
        """Add a batch.

        Args:
            features: [N, D], any real dtype, NumPy or torch on any device (one device for all batches).
            labels: see `task`.

        Returns:
            self.

        Raises:
            TypeError: no numbers. ValueError: shapes that do not fit; NaN or infinity (the first place is named); labels
            that are no classes, or at or above `classes`.

        Cost: N·D² multiply-adds, gathered into chunks of 1024 rows.
        """
        x = as_features(self.name, features)
        y = as_targets(self.name, labels, self.task, x.shape[0], self.ignore_index)
        if self.features and x.shape[1] != self.features:
            raise ValueError(f"{self.name}: 'features' must have {self.features} columns as before, got {x.shape[1]}")
        if self.classes is not None and y.outputs > self.classes and self.task == "classification":
            raise ValueError(f"{self.name}: 'labels' must be below classes = {self.classes}, got {y.outputs - 1}")
        if self.task != "classification" and self._outputs and y.outputs != self._outputs:
            raise ValueError(f"{self.name}: 'labels' must have {self._outputs} columns as before, got {y.outputs}")
        if self.device is not None and x.device != self.device:
            raise ValueError(f"{self.name}: 'features' must be on {self.device} as before, got {x.device}")
        values = y.values.to(x.device)
        self.seen += x.shape[0]
        if self.ignore_index is not None:
            kept = values != self.ignore_index
            x, values = x[kept], values[kept]
        self._outputs = max(self._outputs, y.outputs)
        if not x.shape[0]:
            return self
        dtype = torch.float64 if self.precision == "float64" else x.dtype
        self._dtype = dtype if self._dtype in (None, dtype) else torch.float32  # of several, a less exact one
        self._pending.append((x.to(dtype, copy=True), values.clone()))
        self._pending_rows += x.shape[0]
        if self._pending_rows >= CHUNK:
            self.flush()
        return self

    def flush(self) -> FeatureStats:
        """Add what waits for a full chunk; every reader calls it."""
        if not self._pending:
            return self
        x, y = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*self._pending))
        self._pending, self._pending_rows = [], 0
        self.moments.update(x, axis=1)
        self._grow(self._outputs, x.shape[1], x.device)
        exact = x.double()
        if self.task == "classification":
            order = y.argsort(stable=True)
            count = torch.bincount(y, minlength=self._outputs)
            start = torch.cat([count.new_zeros(1), count.cumsum(0)])
            self._cross += regroup([exact], order, start, None, 0)
            self._weight += count
            self._square += count
        else:
            self._cross += y.T @ exact
            self._weight += y.sum(0)
            self._target += y.T @ y
            self._square += (y * y).sum(0)
        assert self.moments.shift is not None
        shifted = exact - self.moments.shift
        length = (shifted * shifted).sum(1)
        self._quartic[:-1] += length @ shifted
        self._quartic[-1] += length @ length
        return self

    def _grow(self, outputs: int, features: int, device: torch.device) -> None:
        """Room for more classes; the first time, for all."""
        if self._cross.shape == (outputs, features):
            return
        old = self._cross.shape[0]
        cross = torch.zeros(outputs, features, dtype=torch.float64, device=device)
        vectors = torch.zeros(2, outputs, dtype=torch.float64, device=device)
        if old:
            cross[:old], vectors[0, :old], vectors[1, :old] = self._cross, self._weight, self._square
        else:
            self._quartic = cross.new_zeros(features + 1)
            columns = 0 if self.task == "classification" else outputs
            self._target = cross.new_zeros(columns, columns)
        self._cross, (self._weight, self._square) = cross, vectors

    # --------------------------------------------------------------------------------------------------- reading

    @property
    def count(self) -> int:
        """Samples in the sums."""
        return self.moments.count + self._pending_rows

    @property
    def features(self) -> int:
        """D; 0 before the first sample."""
        return self._pending[0][0].shape[1] if self._pending else self.moments.features

    @property
    def outputs(self) -> int:
        """K: classes, or columns of the targets."""
        return self._outputs

    @property
    def device(self) -> torch.device | None:
        """Where the sums are; None before the first sample."""
        return self._pending[0][0].device if self._pending else self.moments.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the features whose products were formed."""
        return self._dtype or torch.float64

    def gram(self) -> Tensor:
        """FᵀF, float64 [D, D]: not centred."""
        return self._require().moments.gram()

    def cross(self) -> Tensor:
        """FᵀY, float64 [D, K]."""
        return self._require()._cross.T.clone()

    def square(self) -> Tensor:
        """Σ y² of each output, float64 [K]; of classes: samples in each."""
        return self._require()._square.clone()

    def spectrum(self, *, public: bool = False) -> Any:
        """See :func:`zipfast.ranking.spectrum.of_gram`."""
        gram = self.gram()
        return of_gram(gram, self.count, public=public, rounding=rounding_of(self.moments.sums()[1], self.dtype))

    def evidence(
        self,
        mode: ev.Mode = "exact",
        *,
        tol: float | None = None,
        max_iter: int | None = None,
        empty: str = "skip",
        mean: bool = False,
    ) -> ev.Evidence:
        """LogME with everything it is made of.

        Args:
            mode: ``"exact"``: the maximum of the evidence; ``"corrected"`` and ``"reference"``: the public code's iterates,
                without and with its defects. docs/ranking.md shows where they differ.
            tol, max_iter: 1e-10 and 100 in exact mode, else 1e-3 and 11 as in the public code.
            empty: ``"skip"`` outputs without samples, with a warning, or ``"raise"``. Reference mode keeps them.
            mean: compute the posterior mean of the weights.

        Raises:
            ValueError: no samples; nothing to fit.

        Cost: O(D³), once; O(D) per output and round.
        """
        ev.check_mode(self.name, mode)
        ev.check_empty(self.name, empty)
        spectrum = self.spectrum(public=mode == "reference")
        return ev.solve(
            [spectrum],
            [spectrum.project(self.cross())],
            [self.square()],
            name=self.name,
            task=self.task,
            mode=mode,
            tol=tol,
            max_iter=max_iter,
            empty=empty,
            precision=self.dtype,
            mean=mean,
        )[0]

    def score(self, metric: str = "logme", **options: Any) -> float:
        """One number, higher is better: ``"logme"`` (with the options of :meth:`evidence`), ``"hscore"``, ``"reg_hscore"``
        or ``"lfc"``.

        Raises:
            ValueError: another name; a metric of classes on other labels.
        """
        if metric == "logme":
            return self.evidence(**options).score
        if metric not in FROM_SUMMARY:
            known = ", ".join(["logme", *FROM_SUMMARY])
            raise ValueError(f"{self.name}: 'metric' must be one of {known}, got {metric!r}")
        return FROM_SUMMARY[metric](self.summary())

    def summary(self) -> Summary:
        """Centred statistics of classes, for :mod:`zipfast.ranking.metrics`.

        Raises:
            ValueError: labels are not classes; no samples.
        """
        if self.task != "classification":
            raise ValueError(f"{self.name}: 'task' must be classification for metrics of classes, got {self.task!r}")
        self._require()
        covariance = self.moments.covariance()
        centre = self.moments.total() / self.count
        _, fourth = _recentred(self._quartic, self.moments.second(), self.moments.total(), self.count, centre)
        weight = self._weight.clamp(min=1)[:, None]
        return Summary(
            self.count,
            self.moments.mean(),
            covariance,
            self._weight.clone(),
            self._cross / weight,
            max(0.0, float(fourth)),
        )

    def _require(self) -> FeatureStats:
        self.flush()
        if self.count == 0:
            raise ValueError(f"{self.name}: at least one sample is needed, got no samples")
        self.moments.check_finite()
        check_products(self.name, self.moments.sums()[1], self.dtype)
        return self

    # ------------------------------------------------------------------------------------------------- combining

    def like(self) -> FeatureStats:
        """An empty one with the same options, for another shard."""
        return FeatureStats(
            self.task, classes=self.classes, ignore_index=self.ignore_index, precision=self.precision, name=self.name
        )

    def merge(self, other: FeatureStats) -> FeatureStats:
        """The statistics of both, as a new one.

        Raises:
            ValueError: another task, number of features, or number of targets.
        """
        mine, theirs = (self.task, self.features), (other.task, other.features)
        if mine[0] != theirs[0] or (self.count and other.count and mine[1] != theirs[1]):
            raise ValueError(
                f"{self.name}: merge must get statistics of {mine[0]} on {mine[1]} features, got {theirs[0]} on {theirs[1]}"
            )
        if self.task != "classification" and self.count and other.count and self.outputs != other.outputs:
            raise ValueError(f"{self.name}: merge must get statistics of {self.outputs} targets, got {other.outputs}")
        parts = [part.flush() for part in (self, other) if part.count]
        outputs = max(self.outputs, other.outputs)
        if not parts:
            result = self.like()
            result._outputs = outputs
        else:
            shift = parts[0].moments.shift
            assert shift is not None
            result = parts[0]._based_on(shift, outputs)
            for part in parts[1:]:
                further = part._based_on(shift, outputs)
                for total, more in zip(result._sums(), further._sums()):
                    total += more
                result.moments = parts[0].moments.merge(part.moments)
                if result._dtype != part._dtype:
                    result._dtype = torch.float32  # the less exact of the two
        result.classes, result.ignore_index = self.classes, self.ignore_index
        result.precision, result.name = self.precision, self.name
        result.seen = self.seen + other.seen
        return result

    def all_reduce(self) -> FeatureStats:
        """The statistics of all processes of the process group, on each of them; itself without one.

        Every process calls it, also one without samples.

        Cost: D² + KD float64 numbers, summed over the processes.
        """
        self.flush()
        if distributed.world_size() == 1:
            return self
        facts = distributed.gather((self.features, self.outputs, self.moments.count, self.seen, str(self.dtype)))
        root = next((rank for rank, fact in enumerate(facts) if fact[2]), None)
        if root is None:
            result = self.like()
            result.seen, result._outputs = sum(fact[3] for fact in facts), max(fact[1] for fact in facts)
            return result
        device = self.device or distributed.device()
        features, outputs = facts[root][0], max(fact[1] for fact in facts)
        if len({fact[0] for fact in facts if fact[2]}) > 1:
            raise ValueError(f"{self.name}: all processes must have the same features, got {[f[0] for f in facts]}")
        if self.task != "classification" and len({fact[1] for fact in facts if fact[2]}) > 1:
            raise ValueError(f"{self.name}: all processes must have the same targets, got {[f[1] for f in facts]}")
        own = self.moments.shift
        shift = distributed.broadcast(
            torch.zeros(features, dtype=torch.float64, device=device) if own is None else own.clone(), root
        )
        result = self._based_on(shift, outputs)
        for tensor in (*result._sums(), *result.moments.sums()):
            distributed.sum_(tensor)
        distributed.least_(result.moments.status())
        result.moments.count, result.seen = sum(f[2] for f in facts), sum(f[3] for f in facts)
        result._dtype = torch.float64 if {f[4] for f in facts if f[2]} == {"torch.float64"} else torch.float32
        return result

    def _based_on(self, shift: Tensor, outputs: int) -> FeatureStats:
        """A copy whose sums are of x - shift, with room for so many outputs, on the device of the shift."""
        result = self.like()
        result.seen, result._dtype, result._outputs = self.seen, self._dtype, outputs
        result.moments = Moments(1, name=self.name).start(shift)
        result._grow(outputs, shift.shape[0], shift.device)
        if self.count:
            old = self.moments.shift
            assert old is not None
            result.moments = result.moments.merge(self.moments)
            k = self._cross.shape[0]
            result._cross[:k] += self._cross.to(shift.device)
            result._weight[:k] += self._weight.to(shift.device)
            result._square[:k] += self._square.to(shift.device)
            result._target += self._target.to(shift.device)
            sums = (self._quartic, self.moments.second(), self.moments.total(), self.count, shift.to(old.device) - old)
            result._quartic += torch.cat([part.reshape(-1) for part in _recentred(*sums)]).to(shift.device)
        return result

    def _sums(self) -> list[Tensor]:
        """What adds up over samples, besides the moments; for statistics of one shape."""
        return [self._cross, self._weight, self._target, self._square, self._quartic]

    def state_dict(self) -> dict[str, Any]:
        """Everything: tensors under "tensors", options under "options"."""
        self.flush()
        tensors = {"cross": self._cross, "weight": self._weight, "target": self._target, "square": self._square}
        tensors["quartic"] = self._quartic
        numbers: dict[str, Any] = {"seen": self.seen, "outputs": self._outputs, "count": self.moments.count}
        numbers["dtype"] = None if self._dtype is None else str(self._dtype).removeprefix("torch.")
        state = self.moments.state_dict()
        tensors |= {f"moments.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        options = {key: getattr(self, key) for key in ("task", "classes", "ignore_index", "precision", "name")}
        copies = {key: value.clone() for key, value in tensors.items()}
        return {"format": FORMAT, "options": options, "numbers": numbers, "tensors": copies}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> FeatureStats:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: another format, or parts missing.
        """
        if state.get("format") != FORMAT:
            raise ValueError(f"FeatureStats: 'format' must be {FORMAT!r}, got {state.get('format')!r}")
        try:
            options = dict(state["options"])
            numbers, tensors = state["numbers"], dict(state["tensors"])
            stats = FeatureStats(options.pop("task"), **options)
            stats.seen, stats._outputs = int(numbers["seen"]), int(numbers["outputs"])
            stats._dtype = None if numbers["dtype"] is None else getattr(torch, numbers["dtype"])
            for key in ("cross", "weight", "target", "square", "quartic"):
                setattr(stats, f"_{key}", tensors[key].clone())
            if numbers["count"]:
                own = {
                    key.removeprefix("moments."): value for key, value in tensors.items() if key.startswith("moments.")
                }
                head = {"format": "zipfast.moments/1", "models": 1, "name": stats.name, "count": int(numbers["count"])}
                stats.moments = Moments.from_state_dict({"shift": own["shift"]} | head | own)
        except (AttributeError, KeyError, TypeError) as e:
            raise ValueError(f"FeatureStats: the saved statistics must be whole, got none of {e}") from None
        return stats

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file, whole or not at all."""
        state = self.state_dict()
        tensors = state.pop("tensors")
        checkpoint.save(path, tensors, state)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> FeatureStats:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file; another one.
        """
        tensors = checkpoint.load(path)
        return FeatureStats.from_state_dict({**checkpoint.read_metadata(path), "tensors": tensors})


def _recentred(quartic: Tensor, second: Tensor, total: Tensor, count: int, move: Tensor) -> tuple[Tensor, Tensor]:
    """Σ‖b‖²b and Σ‖b‖⁴ of b = a - move, from Σ‖a‖²a and Σ‖a‖⁴ (`quartic`), Σaaᵀ, Σa and their number."""
    cubic, fourth = quartic[:-1], quartic[-1]
    square, length = second.diagonal().sum(), move @ move
    image, along = second @ move, total @ move
    new_cubic = cubic - 2 * image + length * total - move * (square - 2 * along + count * length)
    new_fourth = fourth + 4 * (move @ image) + count * length**2
    new_fourth = new_fourth - 4 * (move @ cubic) + 2 * length * square - 4 * length * along
    return new_cubic, new_fourth
