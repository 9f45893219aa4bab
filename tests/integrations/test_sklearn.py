# SPDX-License-Identifier: Apache-2.0
"""LogME in scikit-learn: its own checks of estimators, the score, pipelines, searches, selections."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import zipfast
from zipfast.optional import WINDOWS, numbers_of, optional

sklearn = pytest.importorskip("sklearn", reason="scikit-learn is not installed")
if numbers_of(sklearn.__version__) < (1, 6):
    pytest.skip(f"scikit-learn {sklearn.__version__} is older than 1.6", allow_module_level=True)

from scipy import sparse  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.decomposition import PCA  # noqa: E402
from sklearn.feature_selection import SelectFromModel, SelectKBest, SequentialFeatureSelector  # noqa: E402
from sklearn.linear_model import BayesianRidge  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from zipfast.integrations.sklearn import (  # noqa: E402
    LogMEClassifier,
    LogMERegressor,
    evidence_score,
    feature_evidence,
)

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(120, 6)) * [1, 2, 0.5, 1, 3, 1] + 0.3
VALUES = X @ [1.0, 0, -2, 0, 0.1, 0] + 0.5 * RANDOM.normal(size=120) + 4
CLASSES = np.array(["cat", "dog", "eel"])[(X[:, 0] > 0).astype(int) + (X[:, 2] > 0.4)]
DIGITS = tuple(part[:600] for part in load_digits(return_X_y=True))


@parametrize_with_checks(
    [LogMERegressor(), LogMEClassifier(), LogMERegressor(fit_intercept=True), LogMEClassifier(mode="corrected")]
)
def test_as_scikit_learn_checks_it(estimator: Any, check: Any) -> None:
    check(estimator)  # not one of them is expected to fail


def test_scores_are_those_of_logme() -> None:
    classes = np.unique(CLASSES, return_inverse=True)[1]
    for mode in ("exact", "corrected", "reference"):
        model = LogMEClassifier(mode=mode).fit(X, CLASSES)
        assert model.log_evidence_ == pytest.approx(zipfast.logme(X, classes, mode=mode), rel=1e-12)
    public = zipfast.LogME(regression=True, mode="exact")
    want = public.fit(X, VALUES)
    model = LogMERegressor().fit(X, VALUES)
    assert model.log_evidence_ == pytest.approx(float(want), rel=1e-12) == zipfast.logme(X, VALUES, task="regression")
    np.testing.assert_allclose(model.coef_, public.ms[0], rtol=1e-10)
    np.testing.assert_allclose([model.alpha_[0], model.beta_[0]], [public.alphas[0], public.betas[0]], rtol=1e-10)
    assert model.intercept_ == 0.0 and model.n_iter_ >= 1


def test_the_maximum_is_that_of_bayesian_ridge() -> None:
    """Without hyper-priors scikit-learn's own Bayesian ridge maximises the same evidence (of centred data)."""
    x, y = X - X.mean(0), VALUES - VALUES.mean()
    flat = {"alpha_1": 0, "alpha_2": 0, "lambda_1": 0, "lambda_2": 0}
    peer = BayesianRidge(fit_intercept=False, max_iter=2000, tol=1e-12, **flat).fit(x, y)
    model = LogMERegressor().fit(x, y)
    np.testing.assert_allclose(model.coef_, peer.coef_, rtol=1e-6)
    np.testing.assert_allclose([model.alpha_[0], model.beta_[0]], [peer.lambda_, peer.alpha_], rtol=1e-5)


def test_an_intercept_is_a_constant_feature() -> None:
    ones = np.concatenate([X, np.ones((120, 1))], 1)
    model, wide = LogMERegressor(fit_intercept=True).fit(X, VALUES), LogMERegressor().fit(ones, VALUES)
    assert model.log_evidence_ == wide.log_evidence_ > LogMERegressor().fit(X, VALUES).log_evidence_
    np.testing.assert_allclose(model.predict(X), wide.predict(ones), rtol=1e-12)
    assert model.coef_.shape == (6,) and model.intercept_ == pytest.approx(wide.coef_[6])


def test_several_targets_at_once_and_one_by_one() -> None:
    both = np.stack([VALUES, -2 * VALUES + X[:, 1]], 1)
    model = LogMERegressor(fit_intercept=True).fit(X, both)
    assert model.coef_.shape == (2, 6) and model.intercept_.shape == (2,) and model.predict(X).shape == (120, 2)
    for k in range(2):
        one = LogMERegressor(fit_intercept=True).fit(X, both[:, k])
        np.testing.assert_allclose(model.coef_[k], one.coef_, rtol=1e-9)
        assert model.evidence_[k] == pytest.approx(one.log_evidence_, rel=1e-12)


def test_two_classes_have_one_decision() -> None:
    y = (X[:, 0] > 0.2).astype(int)
    model = LogMEClassifier(fit_intercept=True).fit(X, y)
    assert model.decision_function(X).shape == (120,) and model.score(X, y) > 0.85
    np.testing.assert_array_equal(model.decision_function(X) > 0, model.predict(X) == 1)
    assert LogMEClassifier().fit(X, CLASSES).decision_function(X).shape == (120, 3)
    assert not hasattr(model, "predict_proba")


def test_in_a_search_of_a_pipeline() -> None:
    x, y = DIGITS
    pipeline = make_pipeline(StandardScaler(), PCA(svd_solver="full"), LogMEClassifier(fit_intercept=True))
    sizes = [1, 5, 30]
    search = GridSearchCV(pipeline, {"pca__n_components": sizes}, scoring=evidence_score, cv=3).fit(x, y)
    assert search.best_params_ == {"pca__n_components": 30} and search.best_estimator_.score(x, y) > 0.85
    # Of the training data alone, no fold held out: the evidence has the cost of a larger model in it.
    everything = [(np.arange(len(x)), np.arange(len(x)))]
    search = GridSearchCV(pipeline, {"pca__n_components": sizes}, scoring=evidence_score, cv=everything).fit(x, y)
    found = pipeline.set_params(pca__n_components=30).fit(x, y)[-1].log_evidence_
    assert search.cv_results_["mean_test_score"][2] == pytest.approx(found, rel=1e-9)


def test_the_scorer_takes_any_estimator() -> None:
    model = LogMERegressor().fit(X, VALUES)
    assert evidence_score(model, X, VALUES) == pytest.approx(model.log_evidence_, rel=1e-12)
    ridge = BayesianRidge(fit_intercept=False).fit(X, VALUES)
    assert evidence_score(ridge, X, VALUES) == pytest.approx(model.log_evidence_, rel=1e-12)
    single = make_pipeline(LogMEClassifier()).fit(X, CLASSES)
    assert evidence_score(single, X, CLASSES) == pytest.approx(single[-1].log_evidence_, rel=1e-12)
    assert cross_val_score(LogMEClassifier(), X, CLASSES, scoring=evidence_score, cv=3).shape == (3,)


def test_features_are_selected() -> None:
    scores = feature_evidence(X, VALUES, task="regression")
    assert set(np.argsort(scores)[-2:]) == {0, 2}  # what the values were made of
    column = np.stack([X[:, 3], np.ones(120)], 1)
    assert scores[3] == pytest.approx(zipfast.logme(column, VALUES, task="regression"), rel=1e-12)
    plain = feature_evidence(X, CLASSES, fit_intercept=False)
    assert plain[1] == pytest.approx(LogMEClassifier().fit(X[:, [1]], CLASSES).log_evidence_, rel=1e-12)
    assert (
        SelectKBest(feature_evidence, k=2).fit(X, CLASSES).get_support().tolist() == [True, False, True] + [False] * 3
    )
    chosen = SelectFromModel(LogMERegressor(), max_features=2, threshold=-np.inf).fit(X, VALUES - VALUES.mean())
    assert chosen.get_support().nonzero()[0].tolist() == [0, 2]
    steps = SequentialFeatureSelector(LogMEClassifier(), n_features_to_select=2, scoring=evidence_score, cv=3)
    assert steps.fit(X, CLASSES).get_support().nonzero()[0].tolist() == [0, 2]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"LogMEClassifier: 'y' must hold at least two classes, got one class: a"):
        LogMEClassifier().fit(X, ["a"] * 120)
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        LogMEClassifier().fit(X, VALUES)
    with pytest.raises(
        ValueError, match=r"LogMERegressor: 'mode' must be one of reference, corrected, exact, got 'best'"
    ):
        LogMERegressor(mode="best").fit(X, VALUES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"LogMERegressor: 'labels' must have an output with a value other than 0"):
        LogMERegressor().fit(X, np.zeros(120))
    for call in (lambda x: feature_evidence(x, CLASSES), lambda x: evidence_score(LogMEClassifier(), x, CLASSES)):
        with pytest.raises(TypeError, match=r"Sparse data was passed, but dense data is required. Use '.toarray\(\)'"):
            call(sparse.csr_matrix(X))
    with pytest.raises(ValueError, match=r"feature_evidence: 'X' must be \[N, D\], got shape \[6\]"):
        feature_evidence(X[0], CLASSES)
    with pytest.raises(ValueError, match="X has 5 features, but LogMERegressor is expecting 6 features"):
        LogMERegressor().fit(X, VALUES).predict(X[:, :5])


# --------------------------------------------------------------------------------------------- optional packages


def test_zipfast_imports_no_optional_package() -> None:
    listed = ", ".join(repr(module) for module, _, _ in WINDOWS.values())
    code = f"import sys, zipfast, zipfast.integrations; print([m for m in ({listed}) if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "[]"


def test_absent_and_unsupported_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ImportError, match=r"rank: timm must be installed, got .*; pip install 'timm>=0.9,<2' torchvision$"
    ):
        optional("timm", "rank", "torchvision")
    for version in ("0.8.23", "2.0", "2.0.0.dev1"):
        monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(__version__=version))
        wanted = rf"rank: timm must be of version 0.9 or later and below 2, got {version}; pip install 'timm>=0.9,<2'$"
        with pytest.raises(ImportError, match=wanted):
            optional("timm", "rank")
    for version in ("0.9", "1.0.31", ""):  # the last says nothing of itself
        monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(__version__=version))
        assert optional("timm", "rank").__version__ == version
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.45.0"))
    assert optional("transformers", "load_model").__version__ == "4.45.0"
    with pytest.raises(
        ImportError, match=r"Trainer: transformers must be of version 4.57 or later and below 6, got 4.45.0"
    ):
        optional("transformers", "Trainer", least="4.57")


@pytest.mark.parametrize("module, package", [("transformers", "transformers"), ("sklearn", "scikit-learn")])
def test_an_integration_says_what_it_lacks(module: str, package: str) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; import zipfast.integrations.{module}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    wanted = f"ImportError: zipfast.integrations.{module}: {package} must be installed, got "
    assert found.returncode == 1 and wanted in found.stderr and f"; pip install '{package}>=" in found.stderr
