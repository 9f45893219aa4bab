# SPDX-License-Identifier: Apache-2.0
"""What goes into the scores and what comes out: every refusal and its sentence, every kind of array, LogME's warnings."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import zipfast
from zipfast import Basis, FeatureStats, LogME
from zipfast.ranking import null_score
from zipfast.ranking.targets import LARGEST

N, D, K = 60, 5, 3
X = np.random.default_rng(0).normal(size=(N, D))
Y = np.arange(N) % K
X[:, 0] += Y


def by_function(x, y, **options):
    return zipfast.logme(x, y, **options)


def by_stats(x, y, task="classification", **options):
    return FeatureStats(task).update(x, y).score(**options)


def by_basis(x, y, **options):
    return Basis(x).score(y, **options).score


def by_class(x, y, task="classification", mode="exact"):
    return float(LogME(task == "regression", mode=mode).fit(x, y))


def by_public_class(x, y, task="classification"):
    return float(LogME(task == "regression").fit(x, y))


DOORS = {"logme": by_function, "FeatureStats": by_stats, "Basis": by_basis, "LogME": by_class}
everywhere = pytest.mark.parametrize("name", DOORS)
SCORE = by_function(X, Y)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(LogME, "_warned", True)


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(LogME, "_warned", False)


def planted(value, places=((3, 2),)):
    x = X.copy()
    for place in places:
        x[place] = value
    return x


# ------------------------------------------------------------------------------------------ refused


FEATURES = {
    "nan": (
        planted(np.nan, ((7, 1), (3, 2))),
        r"'features' must be finite, got 2 NaN or inf.* first in row 3, column 2",
    ),
    "inf": (planted(-np.inf), "'features' must be finite, got 1 NaN or infinite values, the first in row 3, column 2"),
    "fp16 inf": (
        torch.from_numpy(planted(1e6)).half(),
        "'features' must be finite, got 1 NaN or infinite values, the f",
    ),
    "huge": (X * 1e200, r"'features' must be at most 1e\+36 in magnitude, got [0-9.]+e\+200; rescale them"),
    "above": (planted(LARGEST * 1.1), r"'features' must be at most 1e\+36 in magnitude, got 1.1e\+36"),
    "1-D": (X[:, 0], r"'features' must be \[N, D\], got shape \[60\]"),
    "3-D": (X[None], r"'features' must be \[N, D\], got shape \[1, 60, 5\]"),
    "no column": (X[:, :0], r"'features' must have at least one column, got shape \[60, 0\]"),
    "ragged": ([[1.0, 2.0], [3.0]], "'features' must be an array, got rows of different lengths"),
}


@everywhere
@pytest.mark.parametrize("case", FEATURES)
def test_features_refused(name, case):
    x, message = FEATURES[case]
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        DOORS[name](x, Y)


@everywhere
@pytest.mark.parametrize("kind", ["text", "complex", "complex tensor", "objects"])
def test_no_numbers(name, kind):
    bad, dtype = {
        "text": (X.astype(str), "<U"),
        "complex": (X + 0j, "complex128"),
        "complex tensor": (torch.from_numpy(X) + 0j, "complex"),
        "objects": (X.astype(object), "object"),
    }[kind]
    with pytest.raises(TypeError, match=f"^{name}: 'features' must be real numbers, got dtype {dtype}"):
        DOORS[name](bad, Y)
    with pytest.raises(TypeError, match=f"^{name}: 'labels' must be real numbers, got dtype {dtype}"):
        DOORS[name](X, bad[:, 0])


CLASSES = {
    "negative": (
        np.where(Y == 2, -100, Y),
        r"must be classes from 0, got -100 in row 2; rows to leave out are named by ig",
    ),
    "half": (Y + np.where(Y == 1, 0.5, 0), r"must be whole numbers, got 1\.5 in row 1; for values use regression"),
    "nan": (np.where(Y == 2, np.nan, Y), "must be whole numbers, got nan in row 2"),
    "inf": (np.where(Y == 2, np.inf, Y), "must be whole numbers, got inf in row 2"),
    "one-hot": (
        np.eye(K)[Y],
        r"must be classes \[N\], got shape \[60, 3\]; for one-hot .*argmax\(1\).*regression=True",
    ),
    "3-D": (Y[:, None, None], r"must be classes \[N\], got shape \[60, 1, 1\]"),
    "0-D": (1, r"must be classes \[N\], got shape \[\]"),
    "short": (Y[:-1], r"must have one entry per row of the features \(60\), got 59"),
    "long": (np.append(Y, 0), r"must have one entry per row of the features \(60\), got 61"),
}


@everywhere
@pytest.mark.parametrize("case", CLASSES)
def test_classes_refused(name, case):
    y, message = CLASSES[case]
    with pytest.raises(ValueError, match=f"^{name}: 'labels' {message}"):
        DOORS[name](X, y)


VALUES = {
    "nan": (np.where(Y == 2, np.nan, 1.0), "must be finite, got 20 NaN or infinite values, the first in row 2"),
    "huge": (Y * 1e37, r"must be at most 1e\+36 in magnitude, got 2e\+37; rescale them"),
    "3-D": (X[:, :, None], r"must be \[N\] or \[N, K\] values, got shape \[60, 5, 1\]"),
    "no column": (X[:, :0], r"must be \[N\] or \[N, K\] values, got shape \[60, 0\]"),
    "short": (X[:7], r"must have one entry per row of the features \(60\), got 7"),
    "all zero": (0.0 * Y, "must have an output with a value other than 0, got none"),
}


@everywhere
@pytest.mark.parametrize("case", VALUES)
def test_values_refused(name, case):
    y, message = VALUES[case]
    with pytest.raises(ValueError, match=f"^{name}: 'labels' {message}"):
        DOORS[name](X, y, task="regression")


@pytest.mark.parametrize("name", ["logme", "FeatureStats", "Basis"])
def test_multilabel_refused(name):
    with pytest.raises(
        ValueError, match=f"^{name}: 'labels' must be 0 or 1 for task='multilabel', got other values; see"
    ):
        DOORS[name](X, 2 * np.eye(K)[Y], task="multilabel")
    with pytest.raises(ValueError, match=rf"^{name}: 'labels' must be \[N, K\] of 0 and 1, got shape \[60\]"):
        DOORS[name](X, Y, task="multilabel")


@everywhere
def test_options_refused(name):
    with pytest.raises(ValueError, match=f"{name}: 'mode' must be one of reference, corrected, exact, got 'best'"):
        DOORS[name](X, Y, mode="best")
    if name != "LogME":
        with pytest.raises(
            ValueError, match=f"{name}: 'task' must be one of classification, regression, multilabel, got"
        ):
            DOORS[name](X, Y, task="ranking")


def test_more_options_refused():
    for make in (lambda: zipfast.logme(X, Y, precision="half"), lambda: Basis(X, precision="half")):
        with pytest.raises(ValueError, match="'precision' must be auto or float64, got 'half'"):
            make()
    with pytest.raises(ValueError, match="logme: 'ignore_index' must be None for task='regression', got -1"):
        zipfast.logme(X, Y, task="regression", ignore_index=-1)
    with pytest.raises(ValueError, match="logme: 'empty' must be skip or raise, got 'keep'"):
        zipfast.logme(X, Y, empty="keep")


@everywhere
@pytest.mark.parametrize("d", [2, 5])
def test_no_samples(name, d):
    message = f"^{name}: (at least one sample is needed|'features' must have at least one row), got no samples"
    with pytest.raises(ValueError, match=message):
        DOORS[name](np.zeros((0, d)), np.zeros(0, dtype=int))


def test_all_ignored():
    with pytest.raises(ValueError, match=r"logme: .* got no samples"):
        zipfast.logme(X, np.full(N, -100), ignore_index=-100)
    with pytest.raises(ValueError, match=r"FeatureStats: .* got no samples"):
        FeatureStats(ignore_index=-100).update(X, np.full(N, -100)).score()


def test_products_that_overflow():
    large = (X * 1e30).astype(np.float32)
    assert abs(zipfast.logme(large, Y) - SCORE) <= 1e-6
    for name, score in {
        "logme": lambda: zipfast.logme(large, Y, precision="auto"),
        "Basis": lambda: Basis(large[:3], precision="auto"),
        "FeatureStats": lambda: FeatureStats(precision="auto").update(large, Y).score(),
    }.items():
        with pytest.raises(
            ValueError, match=f"{name}: 'features' must have squares that can be summed, got overflow with f"
        ):
            score()


# ------------------------------------------------------------------------------------------ accepted


@everywhere
def test_kinds_of_arrays(name):
    score, x, y = DOORS[name], torch.from_numpy(X), torch.from_numpy(Y)
    frozen = X.copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = [(x, y), (X.tolist(), Y.tolist()), (X, y), (x, Y), (np.asfortranarray(X), Y), (x.T.contiguous().T, y)]
        same += [(frozen, Y), (X[::-1][::-1], Y), (X.astype(">f8"), Y.astype(">i4")), (X.astype(np.longdouble), Y)]
        same += [(x.clone().requires_grad_(), y), (X, Y[:, None]), (X, Y.astype(float)), (X, Y.astype(np.uint64))]
        for features, labels in same:
            assert abs(score(features, labels) - SCORE) <= 1e-14
    assert frozen.tobytes() == X.tobytes()


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool])
def test_dtypes_of_features(name, dtype):
    x = torch.from_numpy(X * 3).to(dtype)
    want = DOORS[name](x.double().numpy(), Y)
    assert DOORS[name](x, Y) == want
    if dtype != torch.bfloat16:
        assert DOORS[name](x.numpy(), Y) == want


@everywhere
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.uint32, bool])
@pytest.mark.filterwarnings("ignore:.*skipped")
def test_dtypes_of_labels(name, dtype):
    y = np.where(Y == 2, min(np.iinfo(dtype).max, 300), Y).astype(dtype) if dtype is not bool else Y > 0
    assert DOORS[name](X, y) == DOORS[name](X, y.astype(np.int64))
    assert DOORS[name](X, torch.from_numpy(y.astype(np.int64))) == DOORS[name](X, y)


@everywhere
def test_tiny_and_huge_features(name):
    assert abs(DOORS[name](X * 1e35, Y) - SCORE) <= 1e-12
    nothing = null_score(torch.full((K,), N / K, dtype=torch.float64), N)
    assert abs(DOORS[name](X * 1e-200, Y) - nothing) <= 1e-13


@everywhere
def test_scores_that_say_nothing(name):
    with pytest.warns(UserWarning, match=f"{name}: the score of one sample says nothing about the features"):
        assert np.isfinite(DOORS[name](X[:1], Y[:1]))
    with pytest.warns(
        UserWarning, match=f"{name}: the score of one class with samples says nothing about the features"
    ):
        assert np.isfinite(DOORS[name](X, 0 * Y))
    with pytest.warns(UserWarning, match=rf"{name}: skipped 1 empty output\(s\), 1: no sample has that class"):
        DOORS[name](X, np.where(Y == 1, 0, Y))


def test_ignored_rows():
    y = np.where(np.arange(N) % 7 == 0, -100, Y)
    kept = y >= 0
    want = zipfast.logme(X[kept], y[kept])
    assert zipfast.logme(X, y, ignore_index=-100) == zipfast.logme(torch.from_numpy(X), y, ignore_index=-100) == want
    assert abs(FeatureStats(ignore_index=-100).update(X, y).score() - want) <= 1e-13
    assert zipfast.logme(X, np.where(kept, y, 255), ignore_index=255) == want
    for score in (lambda: zipfast.logme(X, y, ignore_index=-1), lambda: FeatureStats(ignore_index=-1).update(X, y)):
        with pytest.raises(ValueError, match="got -100 in row 0"):
            score()


# ------------------------------------------------------------------------------------------ the class


def test_predict_before_fit_and_with_other_features():
    model = LogME()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not fitted, please call fit first"):
            model.predict(X)
        with pytest.raises(ValueError, match="LogME: 'features' must be finite"):
            model.fit(planted(np.nan), Y)
        assert not model.fitted
    model.fit(X, Y)
    with pytest.raises(ValueError, match="LogME: 'f' must have 5 columns as in fit, got 4"):
        model.predict(X[:, :4])
    with pytest.raises(ValueError, match=r"LogME: 'features' must be \[N, D\], got shape \[5\]"):
        model.predict(X[0])


def test_failed_fit_leaves_the_state_and_refit_replaces_it():
    model = LogME()
    first = model.fit(X, Y)
    before = (list(model.alphas), list(model.betas), model.ms.copy(), model.evidence)
    with pytest.raises(ValueError, match="must be whole numbers"):
        model.fit(X, Y + 0.5)
    assert (model.alphas, model.betas, model.evidence) == (before[0], before[1], before[3])
    assert (model.ms == before[2]).all() and model.fitted and model.num_dim == K
    with pytest.warns(UserWarning, match=r"re-fitting for new data\. old parameters cleared\."):
        model.fit(X[:, :4], Y % 2)
    assert model.num_dim == len(model.alphas) == len(model.betas) == 2 and model.ms.shape == (2, 4)
    model.reset()
    assert model.num_dim == 0 and model.alphas == model.betas == [] and len(model.ms) == 0
    assert first == LogME().fit(X, Y)


@pytest.mark.parametrize("mode", ["reference", "corrected", "exact"])
@pytest.mark.parametrize("regression", [False, True])
def test_arrays_come_out_as_they_go_in(mode, regression):
    make, y = (lambda: LogME(regression, mode=mode)), X[:, :2] ** 2 if regression else Y
    model = make()
    score, want = model.fit(X, y), model.predict(X[:7])
    assert (
        isinstance(want, np.ndarray)
        and isinstance(model.ms, np.ndarray)
        and want.shape == ((7, 2) if regression else (7,))
    )
    for dtype, tolerance in ((torch.float64, 0), (torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        x, other = torch.from_numpy(X).to(dtype), make()
        assert abs(other.fit(x, torch.from_numpy(y)) - score) <= tolerance
        found = other.predict(x[:7])
        assert (
            isinstance(found, torch.Tensor) and isinstance(other.ms, torch.Tensor) and other.ms.dtype == torch.float64
        )
        assert found.dtype == (torch.float64 if regression else torch.int64) and tuple(found.shape) == want.shape
        assert isinstance(other.predict(X), np.ndarray) and isinstance(model.predict(x), torch.Tensor)
    listed = make()
    assert listed.fit(X.tolist(), y.tolist()) == score and (listed.predict(X[:7].tolist()) == want).all()


def test_multilabel_is_regression_on_zero_and_one():
    y = (np.random.default_rng(1).random((N, 4)) < 0.4).astype(int)
    for mode in ("reference", "corrected", "exact"):
        one, other = LogME(True, mode=mode).fit(X, y), zipfast.logme(X, y, task="multilabel", mode=mode)
        assert one == other == zipfast.logme(X, y, task="regression", mode=mode)


def test_negative_labels_in_the_public_class():
    """They count as in no class, with a warning; everywhere else they are refused."""
    y = np.where(Y == 2, -1, Y)
    with pytest.warns(UserWarning, match="LogME: samples with negative labels count as in no class"):
        score = LogME().fit(X, y)
    assert score == LogME(regression=True).fit(X, np.eye(K)[Y][:, :2])


def test_one_warning_in_a_process(fresh):
    y = Y + 1
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            LogME().fit(X, Y)  # agrees: nothing to say
            LogME().fit(X, y)
    assert len(seen) == 1 and seen[0].filename == __file__
    text = str(seen[0].message)
    assert text.startswith("LogME: the public formula gives ") and text.endswith("use mode='exact'.")
    assert "the evidence's maximum is -0." in text and "1 empty class(es) count about 7 each" in text


def test_nothing_to_compare_with(fresh):
    for _ in range(2):  # not a matter of what was warned of before
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert LogME(regression=True).fit(X, 0.0 * Y) > 6
        assert [("no output has a value" in str(w.message)) for w in seen] == [True] * (not _)


def test_small_scale_is_named_as_the_reason(fresh):
    with pytest.warns(UserWarning, match="as its absolute 1e-5 in both denominators is not small here"):
        LogME().fit(X * 1e4, Y)
