# SPDX-License-Identifier: Apache-2.0
"""LogME as estimators of scikit-learn: the Bayesian linear head whose evidence the score is, in pipelines and searches.

``fit`` maximises the log evidence of w ~ N(0, I/α), y ~ N(Xw, I/β) over α and β (zipfast's ``mode="exact"``); ``predict`` is
by the posterior mean. A classifier regresses one 0/1 column per class and takes the largest: it has no probabilities, as
the model states none. Model selection by evidence needs no held-out data: :func:`evidence_score` is a scorer for any search
or feature selection, :func:`feature_evidence` a ``score_func`` for ``SelectKBest``.

Needs scikit-learn >= 1.6.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ..optional import optional
from ..ranking import Basis
from ..ranking import evidence as ev
from ..ranking.targets import Task

optional("scikit-learn", "zipfast.integrations.sklearn")

from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, is_classifier  # noqa: E402
from sklearn.pipeline import Pipeline  # noqa: E402
from sklearn.utils.multiclass import check_classification_targets  # noqa: E402
from sklearn.utils.validation import check_array, check_is_fitted, validate_data  # noqa: E402

__all__ = ["LogMEClassifier", "LogMERegressor", "evidence_score", "feature_evidence"]


class _Evidence(BaseEstimator):
    """What both have in common: one call of the evidence, kept under scikit-learn's names."""

    def __init__(
        self,
        *,
        fit_intercept: bool = False,
        mode: ev.Mode = "exact",
        tol: float | None = None,
        max_iter: int | None = None,
    ) -> None:
        self.fit_intercept = fit_intercept
        self.mode = mode
        self.tol = tol
        self.max_iter = max_iter

    def _fit(self, x: np.ndarray, y: np.ndarray, task: Task) -> None:
        name = type(self).__name__
        ev.check_mode(name, self.mode)
        basis = Basis(_with_ones(x) if self.fit_intercept else x, name=name)
        with warnings.catch_warnings():
            # Outputs that are 0 everywhere are all the same to a regression: the best prediction is 0.
            warnings.filterwarnings("ignore", message=".*skipped .* empty output")
            found = basis.score(y, task=task, mode=self.mode, tol=self.tol, max_iter=self.max_iter, mean=True)
        assert found.mean is not None
        mean = found.mean.numpy()
        self.log_evidence_ = float(found.score)
        self.evidence_ = found.evidence.numpy()
        self.alpha_, self.beta_ = found.alpha.numpy(), found.beta.numpy()
        self.n_iter_ = max(1, int(found.steps.max()))
        self.coef_ = mean[:, : x.shape[1]]
        self.intercept_: Any = mean[:, -1] if self.fit_intercept else np.zeros(len(mean))

    def _outputs(self, x: Any) -> np.ndarray:
        """[N, K], by the posterior mean."""
        check_is_fitted(self)
        x = validate_data(self, x, dtype=np.float64, reset=False)
        result: np.ndarray = x @ np.atleast_2d(self.coef_).T + np.atleast_1d(self.intercept_)
        return result


class LogMERegressor(RegressorMixin, _Evidence):
    """Bayesian linear regression at the maximum of its evidence, for one target or several.

    Args:
        fit_intercept: add a constant feature, whose weight has the same prior. False, as LogME is defined: then
            ``log_evidence_`` is ``zipfast.logme(X, y, task="regression")``.
        mode: "exact", or "corrected" or "reference" for the public code's numbers.
        tol, max_iter: when the rounds end; None: as in :class:`zipfast.LogME`.

    Attributes:
        coef_: [D], or [K, D] for several targets. intercept_: a number, or [K].
        log_evidence_: the LogME score, a log density per sample: higher is better, for the same targets only.
        evidence_, alpha_, beta_: [K]: of each target, and the precisions of its weights and noise.
        n_iter_, n_features_in_, feature_names_in_: rounds of the target that took most; as in all of scikit-learn.

    Raises:
        ValueError: as scikit-learn's own; targets that are 0 everywhere.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(60, 3))
        >>> model = LogMERegressor().fit(x, x @ [1.0, 0.0, -2.0])
        >>> model.coef_.round(3) + 0.0
        array([ 1.,  0., -2.])

    Cost: N·D²/2 multiply-adds (N <= D: D·N²/2) and O(min(N, D)³).

    Reference: You et al. 2021 (LogME, arXiv 2102.11005), §4.
    """

    def fit(self, X: Any, y: Any) -> LogMERegressor:
        """Fit to features X [N, D] and targets y [N] or [N, K]."""
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        self._fit(X, np.asarray(y, dtype=np.float64), "regression")
        if y.ndim == 1:
            self.coef_, self.intercept_ = self.coef_[0], float(self.intercept_[0])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The posterior mean of the targets, [N] or [N, K]."""
        found = self._outputs(X)
        return found[:, 0] if np.ndim(self.coef_) == 1 else found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class LogMEClassifier(ClassifierMixin, _Evidence):
    """Classes by Bayesian linear regression on 0/1 columns, at the maximum of its evidence.

    Args:
        fit_intercept, mode, tol, max_iter: as of :class:`LogMERegressor`.

    Attributes:
        classes_: [C]. coef_: [C, D], one row per class also for two. intercept_, evidence_, alpha_, beta_: [C].
        log_evidence_: ``zipfast.logme(X, y)`` where `fit_intercept` is False.
        n_iter_, n_features_in_, feature_names_in_: rounds of the class that took most; as in all of scikit-learn.

    Raises:
        ValueError: as scikit-learn's own; targets that are no classes; a single class.

    Example:
        >>> import numpy as np, zipfast
        >>> y = np.arange(90) % 3
        >>> x = np.random.default_rng(0).normal(size=(90, 5)) + y[:, None]
        >>> model = LogMEClassifier().fit(x, y)
        >>> round(model.log_evidence_, 3), round(zipfast.logme(x, y), 3), model.predict(x[:4]).tolist()
        (-0.66, -0.66, [2, 2, 2, 0])

    Cost and reference: as of :class:`LogMERegressor`.
    """

    def fit(self, X: Any, y: Any) -> LogMEClassifier:
        """Fit to features X [N, D] and classes y [N], numbers or texts."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, classes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"LogMEClassifier: 'y' must hold at least two classes, got one class: {self.classes_[0]}")
        self._fit(X, classes, "classification")
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The regressions' values [N, C]; of two classes their difference, [N]. They are no probabilities."""
        found = self._outputs(X)
        return found[:, 1] - found[:, 0] if found.shape[1] == 2 else found

    def predict(self, X: Any) -> np.ndarray:
        """The class of the largest value, the first of equal ones."""
        best = self._outputs(X).argmax(1)
        result: np.ndarray = self.classes_[best]
        return result


def evidence_score(estimator: Any, X: Any, y: Any) -> float:
    """LogME of the features that an estimator works on: ``scoring=evidence_score`` for searches and selections.

    Args:
        estimator: fitted. Of a ``Pipeline`` all steps but the last make the features; of any other, X are the features.
            If it is no classifier, y are values.
        X, y: as for its ``score``.

    Returns:
        The score of X's features and y alone: the estimator's own coefficients do not enter. On a fold that was held out, it
        is the evidence of that fold.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.decomposition import PCA
        >>> from sklearn.model_selection import GridSearchCV
        >>> from sklearn.pipeline import make_pipeline
        >>> x, y = load_iris(return_X_y=True)
        >>> pipeline = make_pipeline(PCA(), LogMEClassifier(fit_intercept=True))
        >>> search = GridSearchCV(pipeline, {"pca__n_components": [1, 2, 3]}, scoring=evidence_score).fit(x, y)
        >>> search.best_params_
        {'pca__n_components': 3}
    """
    head = estimator
    if isinstance(estimator, Pipeline):
        head = estimator.steps[-1][1]
        X = estimator[:-1].transform(X) if len(estimator.steps) > 1 else X
    x = _dense(X)
    if getattr(head, "fit_intercept", False):
        x = _with_ones(x)
    classes = is_classifier(estimator)
    target = np.unique(y, return_inverse=True)[1] if classes else np.asarray(y, dtype=np.float64)
    return Basis(x, name="evidence_score").score(target, task="classification" if classes else "regression").score


def feature_evidence(X: Any, y: Any, *, task: Task = "classification", fit_intercept: bool = True) -> np.ndarray:
    """LogME of each feature alone, for ``SelectKBest(feature_evidence)``.

    Args:
        X: [N, D]. y: classes [N], or values for ``task="regression"``.
        fit_intercept: each feature stands beside a constant, so that its own mean does not count.

    Returns:
        [D], higher is better.

    Cost: O(N·D), one small problem per feature.

    Example:
        >>> import numpy as np
        >>> y = np.arange(60) % 2
        >>> x = np.random.default_rng(0).normal(size=(60, 3))
        >>> x[:, 1] += 2 * y
        >>> int(feature_evidence(x, y).argmax())
        1
    """
    x = _dense(X)
    if x.ndim != 2:
        raise ValueError(f"feature_evidence: 'X' must be [N, D], got shape {list(x.shape)}")
    target = np.unique(y, return_inverse=True)[1] if task == "classification" else np.asarray(y, dtype=np.float64)
    columns = (x[:, [j]] for j in range(x.shape[1]))
    given = (_with_ones(column) if fit_intercept else column for column in columns)
    return np.array([Basis(one, name="feature_evidence").score(target, task=task).score for one in given])


def _dense(x: Any) -> np.ndarray:
    """float64, of any shape; sparse matrices are refused by scikit-learn's own words."""
    found: np.ndarray = check_array(x, dtype=np.float64, ensure_2d=False, allow_nd=True, ensure_all_finite=False)
    return found


def _with_ones(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1))], 1)
