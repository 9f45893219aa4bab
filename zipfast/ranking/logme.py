# SPDX-License-Identifier: Apache-2.0
"""LogME of features in memory: the function, many label sets on one matrix, and the public code's class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from ..merging.moments import Moments
from ..ops import regroup
from . import evidence as ev
from .spectrum import Spectrum, of_gram, of_rows, rounding_of
from .targets import Array, Targets, Task, as_classes, as_features, as_targets, as_tensor, check_products, check_task

WORTH_SAYING = 1e-3  # differences of scores below this are as small as those between equal models


class Basis:
    """A features matrix, factored once, for the scores of any number of label sets.

    Args:
        features: [N, D], NumPy or torch, kept by reference.
        precision: see :class:`zipfast.FeatureStats`.
        name: what errors call it.

    With N <= D everything comes from the small Gram matrix FFᵀ, [N, N].

    Example:
        >>> import torch, zipfast
        >>> x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
        >>> basis = zipfast.Basis(x)
        >>> [round(e.score, 3) for e in basis.score_many([(x[:, 0] > 0).long(), (x[:, 1] * x[:, 2] > 0).long()])]
        [-0.954, -1.071]

    Cost: N·D²/2 multiply-adds (N <= D: D·N²/2) and O(min(N, D)³), once; O(NK + D²K) per label set.

    Reference: You et al. 2021 (LogME, arXiv 2102.11005), §4.
    """

    def __init__(self, features: Array, *, precision: str = "float64", name: str = "Basis") -> None:
        if precision not in ("auto", "float64"):
            raise ValueError(f"{name}: 'precision' must be auto or float64, got {precision!r}")
        x = as_features(name, features)
        if x.shape[0] == 0:
            raise ValueError(f"{name}: 'features' must have at least one row, got no samples")
        self.name = name
        self.features = x.double() if precision == "float64" else x
        self._wide = x.shape[0] <= x.shape[1]
        moments = Moments(1, name=name).update(self.features, axis=0 if self._wide else 1)
        self._gram, self._rounding = moments.gram(), rounding_of(moments.sums()[1], self.features.dtype)
        check_products(name, self._gram, self.features.dtype)
        self._spectra: dict[bool, Spectrum] = {}

    def spectrum(self, *, public: bool = False) -> Spectrum:
        """Computed at the first question; `public` keeps the rank that the public code would."""
        public = public and not self._wide
        if public not in self._spectra:
            n = self.features.shape[0]
            self._spectra[public] = (
                of_rows(self.features, self._gram)
                if self._wide
                else of_gram(self._gram, n, public=public, rounding=self._rounding)
            )
        return self._spectra[public]

    def score(self, labels: Array, **options: Any) -> ev.Evidence:
        """One label set; options as of :meth:`score_many`."""
        return self.score_many([labels], **options)[0]

    def score_many(
        self,
        labels: Sequence[Array],
        *,
        task: Task = "classification",
        mode: ev.Mode = "exact",
        tol: float | None = None,
        max_iter: int | None = None,
        empty: str = "skip",
        mean: bool = False,
        classes: int | None = None,
    ) -> list[ev.Evidence]:
        """Scores of several label sets of the same samples.

        Args:
            labels: each [N] classes, or values as :class:`zipfast.FeatureStats` describes them.
            task, mode, tol, max_iter, empty, mean: as there.
            classes: number of classes, if labels need not have the largest.

        Raises:
            TypeError, ValueError: labels that do not fit.
        """
        check_task(self.name, task)
        ev.check_mode(self.name, mode)
        ev.check_empty(self.name, empty)
        if len(labels) == 0:
            return []
        spectrum, n = self.spectrum(public=mode == "reference"), self.features.shape[0]
        crosses, squares = [], []
        for one in labels:
            targets = as_targets(self.name, one, task, n)
            cross, square = self._cross(targets, max(classes or 0, targets.outputs))
            crosses.append(cross)
            squares.append(square)
        # One product with V for all label sets.
        projected = spectrum.project(torch.cat(crosses, 1)).split([c.shape[1] for c in crosses], 1)
        return ev.solve(
            [spectrum] * len(squares),
            projected,
            squares,
            name=self.name,
            task=task,
            mode=mode,
            tol=tol,
            max_iter=max_iter,
            empty=empty,
            precision=self.features.dtype,
            mean=mean,
        )

    def _cross(self, targets: Targets, outputs: int) -> tuple[Tensor, Tensor]:
        """FᵀY [D, K] (of wide features Y itself, [N, K]) and ‖y‖² [K]."""
        x, y = self.features, targets.values.to(self.features.device)
        if targets.task != "classification":
            return (y if self._wide else x.double().T @ y), (y * y).sum(0)
        count = torch.bincount(y, minlength=outputs)
        if self._wide:
            return torch.nn.functional.one_hot(y, outputs).double(), count.double()  # N <= D: small
        start = torch.cat([count.new_zeros(1), count.cumsum(0)])
        return regroup([x.double()], y.argsort(stable=True), start, None, 0).T, count.double()


@overload
def logme(
    features: Array,
    labels: Array,
    *,
    task: Task = "classification",
    mode: ev.Mode = "exact",
    ignore_index: int | None = None,
    empty: str = "skip",
    precision: str = "float64",
    return_details: Literal[False] = False,
) -> float: ...


@overload
def logme(
    features: Array,
    labels: Array,
    *,
    task: Task = "classification",
    mode: ev.Mode = "exact",
    ignore_index: int | None = None,
    empty: str = "skip",
    precision: str = "float64",
    return_details: Literal[True],
) -> ev.Evidence: ...


def logme(
    features: Array,
    labels: Array,
    *,
    task: Task = "classification",
    mode: ev.Mode = "exact",
    ignore_index: int | None = None,
    empty: str = "skip",
    precision: str = "float64",
    return_details: bool = False,
) -> float | ev.Evidence:
    """How well a linear head on frozen features would explain the labels: the log evidence per sample. Higher is better.

    Args:
        features: [N, D], NumPy or torch on any device, any real dtype.
        labels: classes [N]; values [N] or [N, K] for ``task="regression"``; 0 and 1 [N, K] for ``"multilabel"``.
        mode: ``"exact"`` (the maximum), ``"corrected"`` or ``"reference"`` (the public code's numbers);
            docs/ranking.md shows where they differ.
        ignore_index: leave out samples with this label.
        empty: ``"skip"`` classes without samples, with a warning, or ``"raise"``.
        precision: see :class:`zipfast.FeatureStats`.
        return_details: return :class:`zipfast.ranking.Evidence`.

    Raises:
        TypeError, ValueError: input that does not fit, in one sentence.

    Example:
        >>> import numpy as np, zipfast
        >>> y = np.arange(90) % 3
        >>> x = np.random.default_rng(0).normal(size=(90, 5)) + y[:, None]
        >>> round(zipfast.logme(x, y), 3)
        -0.66

    Cost: N·D²/2 multiply-adds and O(min(N, D)³).

    Reference: You et al. 2021 (LogME, arXiv 2102.11005), §4.
    """
    name = "logme"
    check_task(name, task)
    x = as_features(name, features)
    if ignore_index is not None:
        if task != "classification":
            raise ValueError(f"{name}: 'ignore_index' must be None for task={task!r}, got {ignore_index}")
        y = as_targets(name, labels, task, x.shape[0], ignore_index).values
        kept = y != ignore_index
        x, labels = x[kept.to(x.device)], y[kept]
    found = Basis(x, precision=precision, name=name).score(labels, task=task, mode=mode, empty=empty)
    return found if return_details else found.score


class LogME:
    """The public LogME class, with its results and without its surprises.

    ``fit`` and ``predict`` take NumPy arrays (and give NumPy arrays) or torch tensors (and give torch tensors). In the
    default mode the score is the public code's, to 1e-12 (N > D) or 1e-10; where it is more than 0.001 away from the true
    maximum of the evidence, one warning says why: rankings by it may be wrong there.

    Args:
        regression: labels are values [N] or [N, K]; a 0/1 matrix scores several labels a sample.
        mode: ``"reference"``, ``"corrected"`` or ``"exact"``.
        tol, max_iter: when the rounds end; of ``"exact"`` 1e-10 and 100, else 1e-3 and 11.

    Attributes:
        regression, fitted, num_dim; alphas, betas: lists [K]; ms: posterior means [K, D], float64.

    Example:
        >>> import numpy as np, zipfast
        >>> y = np.arange(90) % 3
        >>> x = np.random.default_rng(0).normal(size=(90, 5)) + y[:, None]
        >>> model = zipfast.LogME()
        >>> round(float(model.fit(x, y)), 3), model.predict(x[:4]).tolist(), model.ms.shape
        (-0.66, [2, 2, 2, 0], (3, 5))

    Reference: You et al. 2021 (arXiv 2102.11005) and 2022 (arXiv 2110.10545); github.com/thuml/LogME at ed40c1a.
    """

    _warned = False  # one warning per process: ranking twenty models says it once

    def __init__(
        self,
        regression: bool = False,
        *,
        mode: ev.Mode = "reference",
        tol: float | None = None,
        max_iter: int | None = None,
    ) -> None:
        ev.check_mode("LogME", mode)
        self.regression, self.mode, self.tol, self.max_iter = regression, mode, tol, max_iter
        self.fitted = False
        self.reset()

    def reset(self) -> None:
        """Forget the fit."""
        self.num_dim = 0
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.ms: Any = []
        self.evidence: ev.Evidence | None = None

    def fit(self, f: Array, y: Array) -> np.float64:
        """The score of features f [N, D] for labels y; keeps the posterior means for :meth:`predict`.

        Raises:
            TypeError, ValueError: input that does not fit; the state stays as it was.
        """
        basis = Basis(f, precision="float64", name="LogME")
        task: Task = "regression" if self.regression else "classification"
        if not self.regression and self.mode == "reference":
            y, task = self._public_labels(y, basis.features.shape[0])
        found = basis.score(y, task=task, mode=self.mode, tol=self.tol, max_iter=self.max_iter, mean=True)
        if self.mode == "reference" and not LogME._warned:
            self._compare(basis, y, task, found)
        if self.fitted:
            warnings.warn("re-fitting for new data. old parameters cleared.", stacklevel=2)
        self.reset()
        self.fitted, self.evidence, self.num_dim = True, found, found.alpha.shape[0]
        self.alphas, self.betas = found.alpha.tolist(), found.beta.tolist()
        assert found.mean is not None
        self.ms = found.mean if isinstance(f, Tensor) else found.mean.cpu().numpy()
        score: np.float64 = np.float64(found.score)
        return score

    def predict(self, f: Array) -> Any:
        """Classes [N], or values [N, K] of a regression, by the posterior means.

        Raises:
            RuntimeError: not fitted. ValueError: another number of features.
        """
        if not self.fitted or len(self.ms) == 0:  # reset() leaves `fitted` alone, as in the public code
            raise RuntimeError("not fitted, please call fit first")
        x = as_features("LogME", f).double()
        means = torch.as_tensor(self.ms, device=x.device)
        if x.shape[1] != means.shape[1]:
            raise ValueError(f"LogME: 'f' must have {means.shape[1]} columns as in fit, got {x.shape[1]}")
        logits = x @ means.T
        answer = logits if self.regression else logits.argmax(1)
        return answer if isinstance(f, Tensor) else answer.cpu().numpy()

    @staticmethod
    def _public_labels(labels: Array, samples: int) -> tuple[Array, Task]:
        """The public code takes a negative label for a sample that is in no class; elsewhere it is an error."""
        y = as_tensor("LogME", "labels", labels)
        if y.dim() != 1 or not y.numel() or not bool((y < 0).any()):
            return labels, "classification"
        warnings.warn(
            "LogME: samples with negative labels count as in no class, as in the public code; mode='exact' refuses them, "
            "and zipfast.logme leaves them out with ignore_index",
            stacklevel=3,
        )
        kept = as_classes("LogME", torch.where(y < 0, 0, y), samples)
        one_hot = torch.nn.functional.one_hot(kept, max(1, int(y.max()) + 1)).double()
        return one_hot * (y >= 0)[:, None], "regression"

    @staticmethod
    def _compare(basis: Basis, y: Array, task: Task, found: ev.Evidence) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty class is among the reasons below
            try:
                best = basis.score(y, task=task, mode="exact")
            except ValueError:
                best = None
        if best is None:
            truth, reasons = "the evidence has no maximum", ["no output has a value other than 0"]
        elif abs(best.score - found.score) <= WORTH_SAYING:
            return
        else:
            truth = f"the evidence's maximum is {best.score:.4f}"
            reasons = disagreements(found, best) or ["its absolute 1e-5 in both denominators is not small here"]
        LogME._warned = True
        warnings.warn(
            f"LogME: the public formula gives {found.score:.4f}, {truth}, as "
            + "; ".join(reasons)
            + ". Rankings by it may be wrong; use mode='exact'.",
            stacklevel=3,
        )


def disagreements(reference: ev.Evidence, exact: ev.Evidence) -> list[str]:
    """Why the public code's score is not the maximum of the evidence."""
    reasons = []
    if reference.samples < reference.features:
        reasons.append(f"with N = {reference.samples} < D = {reference.features} it grows with D")
    if exact.skipped:
        reasons.append(f"{len(exact.skipped)} empty class(es) count about 7 each")
    if not bool(torch.isfinite(reference.evidence).all()):
        reasons.append("a perfect fit breaks it")
    if not bool(reference.converged.all()):
        reasons.append(f"{int((~reference.converged).sum())} output(s) have not converged in its rounds")
    return reasons
