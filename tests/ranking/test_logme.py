# SPDX-License-Identifier: Apache-2.0
"""LogME against the public algorithm, SciPy's density and its own laws: the class, the function, one matrix and many labels.

Set ZIPFAST_LOGME to a checkout of github.com/thuml/LogME (needs numba) to compare with that code itself as well.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

import zipfast
from zipfast import Basis, FeatureStats, LogME
from zipfast.ranking import null_score
from zipfast.ranking.logme import disagreements

PUBLIC = os.environ.get("ZIPFAST_LOGME")
TALL, WIDE = 1e-12, 1e-10  # against the public algorithm for N > D and N <= D; worst seen: 7.5e-15, 1.4e-11


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(LogME, "_warned", True)


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(LogME, "_warned", False)


def draw(n, d, k=3, *, seed=0, scale=1.0, mean=0.0, signal=1.0):
    """Features with some signal of k classes in them."""
    g = np.random.default_rng(seed)
    y = np.arange(n) % k
    x = g.normal(size=(n, d)) + signal * g.normal(size=(k, d))[y] / np.sqrt(d) + mean
    return scale * x, y


def one_hot(y, k=None):
    return np.eye(int(y.max()) + 1 if k is None else k)[y]


def public(f, columns):
    """The public algorithm, from its description: (score, α [K], β [K], m [K, D])."""
    n, d = f.shape
    if n > d:
        _, squared, right = np.linalg.svd(f.T @ f)
        kept = np.sqrt(squared) > 1e-10
        s, right = np.sqrt(squared[kept]), right[kept]
        left = (f @ right.T) / s
    else:
        left, s, right = np.linalg.svd(f, full_matrices=False)
    found = []
    for y in columns.T:
        x = left.T @ y
        outside, following = y @ y - x @ x, 1.0
        for _ in range(11):
            t = following
            energy = ((s * x / (s**2 + t)) ** 2).sum()
            residual = outside + ((t * x / (s**2 + t)) ** 2).sum()
            gamma = (s**2 / (s**2 + t)).sum()
            a, b = gamma / (energy + 1e-5), (n - gamma) / (residual + 1e-5)
            following = a / b
            if abs(following - t) <= 1e-3 * t:
                break
        density = d * np.log(a) + n * np.log(b / (2 * np.pi)) - np.log(a + b * s**2).sum() - b * residual - a * energy
        found.append((density / (2 * n), a, b, right.T @ (s * x / (s**2 + t))))
    evidence, alpha, beta, means = (np.stack(part) for part in zip(*found))
    return evidence.mean(), alpha, beta, means


def agree(model, score, want, tolerance):
    expected, alpha, beta, means = want
    assert abs(score - expected) <= tolerance
    np.testing.assert_allclose(model.alphas, alpha, rtol=100 * tolerance)
    np.testing.assert_allclose(model.betas, beta, rtol=100 * tolerance)
    np.testing.assert_allclose(model.ms, means, rtol=0, atol=100 * tolerance * np.abs(means).max())


SHAPES = [(300, 40, 5), (500, 100, 10), (65, 64, 2), (7, 3, 2), (60, 60, 3), (40, 100, 4), (30, 300, 7), (2, 1, 2)]


# ------------------------------------------------------------------------------------------ the public algorithm


@pytest.mark.parametrize("scale", [1.0, 1e-3, 30.0])
@pytest.mark.parametrize("n, d, k", SHAPES)
def test_is_the_public_algorithm(n, d, k, scale):
    f, y = draw(n, d, k, scale=scale, mean=0.5)
    model, tolerance = LogME(), TALL if n > d else WIDE
    score = model.fit(f, y)
    agree(model, score, public(f, one_hot(y)), tolerance)
    assert type(score) is np.float64 and model.fitted and model.num_dim == k and not model.regression
    assert isinstance(model.alphas, list) and model.ms.shape == (k, d) and model.ms.dtype == np.float64
    new = np.random.default_rng(1).normal(size=(50, d)) * scale
    assert (model.predict(new) == (new @ public(f, one_hot(y))[3].T).argmax(1)).all()


@pytest.mark.parametrize("n, d", [(200, 30), (150, 80), (50, 120)])
def test_is_the_public_algorithm_of_regression(n, d):
    f, _ = draw(n, d, seed=3)
    targets = np.tanh(f[:, :4]) + 0.3 * np.random.default_rng(1).normal(size=(n, 4))
    model = LogME(regression=True)
    agree(model, model.fit(f, targets), public(f, targets), TALL if n > d else WIDE)
    np.testing.assert_allclose(model.predict(f), f @ public(f, targets)[3].T, rtol=0, atol=1e-9)
    single = LogME(regression=True)
    agree(single, single.fit(f, targets[:, 0]), public(f, targets[:, :1]), TALL if n > d else WIDE)
    assert single.num_dim == 1


@pytest.mark.parametrize("scale", [1.0, 1e-5])
@pytest.mark.parametrize("d, dead", [(40, 7), (96, 20)])
def test_dead_columns(d, dead, scale):
    """At scale 1 the public code keeps the null space's rounding, at 1e-5 it drops it: both are met."""
    f, y = draw(400, d, 4, scale=scale)
    f[:, ::2][:, :dead] = 0
    model = LogME()
    score = model.fit(f, y)
    want = public(f, one_hot(y))
    assert abs(score - want[0]) <= TALL
    np.testing.assert_allclose(model.alphas, want[1], rtol=1e-9)
    corrected, exact = (zipfast.logme(f, y, mode=mode) for mode in ("corrected", "exact"))
    alive = f[:, (f != 0).any(0)]
    for mode, found in (("corrected", corrected), ("exact", exact)):
        assert abs(found - zipfast.logme(alive, y, mode=mode)) <= 1e-11
    if scale == 1:
        assert abs(score - corrected) <= 1e-6
    else:
        assert score < corrected - 0.01


def test_duplicated_columns_in_reference_mode():
    f, y = draw(300, 20, 3)
    f = np.concatenate([f, f[:, :10]], 1)
    assert abs(LogME().fit(f, y) - public(f, one_hot(y))[0]) <= 1e-10


def load_public():
    if not PUBLIC:
        pytest.skip("set ZIPFAST_LOGME to a checkout of github.com/thuml/LogME")
    pytest.importorskip("numba")
    spec = importlib.util.spec_from_file_location("public_logme", Path(PUBLIC) / "LogME.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LogME


def test_is_the_public_code():
    theirs = load_public()
    g = np.random.default_rng(0)
    for case in range(60):
        n, d, k = int(g.integers(10, 260)), int(g.integers(1, 180)), int(g.integers(2, 9))
        f, y = draw(n, d, k, seed=case, scale=10.0 ** g.integers(-2, 2), mean=float(g.choice([0, 1, 10])) * (n > d))
        if case % 3 == 0:
            f = np.maximum(f, 0) if (f > 0).any(0).all() else f
        targets = one_hot(y) + 0.1 * g.normal(size=(n, k)) if case % 4 == 0 else y
        them, us = (kind(regression=case % 4 == 0) for kind in (theirs, LogME))
        want = them.fit(f, targets)
        agree(us, us.fit(f, targets), (want, them.alphas, them.betas, them.ms), 1e-12 if n > d else 1e-10)
        new = f[:9] + 0.1
        if case % 4:
            assert (us.predict(new) == them.predict(new)).all()
        else:
            np.testing.assert_allclose(us.predict(new), them.predict(new), rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------------------ modes


def exact(f, y, **options):
    return zipfast.logme(f, y, **options)


@pytest.mark.parametrize("n, d", [(200, 30), (200, 90), (60, 90)])
def test_exact_is_the_density(n, d):
    """At its α and β the score is SciPy's log density of the labels; nowhere near is it higher."""
    f, y = draw(n, d)
    found = exact(f, y, return_details=True)
    columns = one_hot(y)
    for i in range(3):
        if i in found.no_signal:
            continue
        a, b = float(found.alpha[i]), float(found.beta[i])
        assert abs(a / b - float(found.ratio[i])) <= 1e-12 * a / b

        def density(a, b, column=columns[:, i]):
            return multivariate_normal.logpdf(column, cov=np.eye(n) / b + f @ f.T / a) / n

        assert abs(density(a, b) - float(found.evidence[i])) <= 1e-12
        assert all(density(a * u, b * v) < density(a, b) for u, v in ((1.1, 1), (0.9, 1), (1, 1.1), (1, 0.9)))


@pytest.mark.parametrize("n, d", [(200, 30), (200, 90), (60, 90)])
def test_exact_knows_no_scale(n, d):
    f, y = draw(n, d, mean=0.3)
    base = exact(f, y)
    for factor in (1e2, 1e4, 1e-12):
        assert abs(exact(f * factor, y) - base) <= 1e-12
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(d, d)))[0]
    assert abs(exact(f @ rotation, y) - base) <= 1e-12
    assert abs(exact(f[::-1], y[::-1]) - base) <= 1e-12


@pytest.mark.parametrize("n, d", [(300, 40), (300, 90), (50, 90), (100, 60)])
def test_padding_and_duplication(n, d):
    f, y = draw(n, d)
    base, corrected = exact(f, y), exact(f, y, mode="corrected")
    padded, doubled = np.concatenate([f, 0 * f], 1), np.concatenate([f, f], 1)
    assert abs(exact(padded, y) - base) <= 1e-12 and abs(exact(doubled, y) - base) <= 1e-12
    assert abs(exact(padded, y, mode="corrected") - corrected) <= 1e-12
    assert 0 < abs(exact(doubled, y, mode="corrected") - corrected) < 0.05


def test_exact_is_the_highest():
    g = np.random.default_rng(0)
    for case in range(25):
        n, d, k = int(g.integers(5, 120)), int(g.integers(1, 90)), int(g.integers(2, 6))
        f, y = draw(n, d, k, seed=case, scale=10.0 ** g.integers(-3, 4), signal=float(g.choice([0, 1, 5])))
        best, other = (zipfast.logme(f, y, mode=m, return_details=True) for m in ("exact", "corrected"))
        assert bool((best.evidence >= other.evidence - 1e-12).all()), (case, n, d)


def test_targets_shift_by_their_scale():
    f, _ = draw(200, 20)
    y = np.sin(f[:, :2]) + 0.1
    base = exact(f, y, task="regression")
    for c in (1e-3, 7.0, 1e4):
        assert abs(exact(f, c * y, task="regression") + np.log(c) - base) <= 1e-12
    assert abs(exact(f, -y, task="regression") - base) <= 1e-14


def test_modes_agree_where_the_public_formula_is_right():
    f, y = draw(400, 20, 4, signal=3.0)
    reference, corrected, best = (exact(f, y, mode=m) for m in ("reference", "corrected", "exact"))
    assert abs(reference - corrected) <= 1e-13 and abs(best - reference) < 1e-3 and best >= reference


def test_defect_of_fewer_samples_than_features():
    f, y = draw(100, 64, 4, signal=6.0)
    noise = np.random.default_rng(5).normal(size=(100, 448)) * 0.05
    found = {
        mode: [exact(np.concatenate([f, noise[:, :extra]], 1), y, mode=mode) for extra in (0, 64, 192, 448)]
        for mode in ("reference", "corrected", "exact")
    }
    grows = np.diff(found["reference"])
    assert (grows > 0.3).all() and found["reference"][-1] - found["reference"][0] > 3
    assert np.ptp(found["corrected"]) < 0.3 and np.ptp(found["exact"]) < 0.1
    assert abs(found["reference"][0] - found["corrected"][0]) < 1e-12


def test_defect_of_scale():
    f, y = draw(300, 10, 3)
    reference = [exact(f * c, y, mode="reference") for c in (1, 1e2, 1e4)]
    corrected = [exact(f * c, y, mode="corrected") for c in (1, 1e2, 1e4)]
    assert reference[0] > reference[1] + 1e-3 and reference[1] > reference[2] + 1e-2
    np.testing.assert_allclose(reference, corrected, atol=1e-10)
    assert exact(f * 1e-12, y, mode="reference") < corrected[0] - 0.1  # all directions are cut


def test_empty_class():
    f, y = draw(300, 10, 3)
    base = exact(f, y)
    reference = exact(f, y + 1, mode="reference", return_details=True)
    assert float(reference.evidence[0]) > 6 and reference.score > base + 1 and reference.skipped == ()
    for mode in ("corrected", "exact"):
        with pytest.warns(UserWarning, match=r"logme: skipped 1 empty output\(s\), 0"):
            found = exact(f, y + 1, mode=mode, return_details=True)
        assert found.skipped == (0,) and bool(found.evidence[0].isnan())
        assert abs(found.score - exact(f, y, mode=mode)) <= 1e-14
    with pytest.raises(ValueError, match=r"logme: every class must have samples .*, got none in 0"):
        exact(f, y + 1, empty="raise")
    with pytest.raises(ValueError, match="Basis: 'empty' must be skip or raise, got 'drop'"):
        Basis(f).score(y, empty="drop")
    with pytest.warns(UserWarning, match=r"Basis: skipped 7 empty output\(s\), 3, 4, 5, 6, 7, \.\.\. \(7 in all\)"):
        assert abs(Basis(f).score(y, classes=10).score - base) <= 1e-14


@pytest.mark.parametrize("n, d", [(200, 20), (200, 80), (30, 60)])
def test_perfect_fit(n, d):
    f, _ = draw(n, d)
    y = 1e3 * f @ np.random.default_rng(1).normal(size=(d, 2))
    found = exact(f, y, task="regression", return_details=True)
    assert np.isfinite(found.score) and (found.perfect == (0, 1) or n < d)
    assert np.isfinite(exact(f, y, task="regression", mode="corrected"))
    noisy = y + 1e3 * np.random.default_rng(2).normal(size=y.shape)
    assert exact(f, noisy, task="regression") < found.score
    assert exact(f, noisy, task="regression", return_details=True).perfect == ()


def test_perfect_fit_breaks_the_public_formula(fresh):
    g = np.random.default_rng(0)
    f = g.normal(size=(200, 20))
    y = 1e4 * f @ g.normal(size=(20, 64))  # rounding decides which residuals are negative: some of many
    with pytest.warns(UserWarning, match="a perfect fit breaks it"):
        assert not np.isfinite(LogME(regression=True).fit(f, y))
    assert np.isfinite(LogME(regression=True, mode="corrected").fit(f, y))


@pytest.mark.parametrize("n, d", [(90, 10), (90, 70), (20, 30)])
def test_features_without_signal(n, d):
    y = np.arange(n) % 3
    nothing = null_score(torch.bincount(torch.from_numpy(y)).double(), n)
    found = exact(np.zeros((n, d)), y, return_details=True)
    assert abs(found.score - nothing) <= 1e-14 and found.no_signal == (0, 1, 2)
    assert bool(found.alpha.isinf().all()) and bool(found.converged.all())
    share = np.bincount(y) / n
    assert abs(nothing - np.mean(-0.5 * np.log(share) - 0.5 * (1 + np.log(2 * np.pi)))) <= 1e-14
    assert np.isfinite(exact(np.zeros((n, d)), y, mode="corrected"))
    assert not np.isfinite(exact(np.zeros((n, d)), y, mode="reference"))
    noise = exact(np.random.default_rng(0).normal(size=(n, d)), y)
    assert noise >= nothing - 1e-13
    assert null_score(torch.tensor([4.0, 0, 4], dtype=torch.float64), 4) == -0.5 * (1 + np.log(2 * np.pi))


def test_floor_of_single_precision():
    """A perfect fit is one up to the rounding of the products."""
    f = torch.from_numpy(draw(400, 20)[0]).float()
    y = f[:, :1].double() + 1e-4 * torch.randn(400, 1, generator=torch.Generator().manual_seed(0)).double()
    double, single = (FeatureStats("regression", precision=p).update(f, y).evidence() for p in ("float64", "auto"))
    assert double.perfect == () and single.perfect == (0,) and single.score < double.score


def test_rounds():
    f, y = draw(200, 60, 10, signal=0)
    model = LogME(max_iter=3)
    model.fit(f, y)
    assert model.evidence.steps.tolist() == [3] * 10
    stats = FeatureStats().update(f, y)
    assert (
        stats.evidence("reference", tol=0).steps.tolist() == [11] * 10 and stats.evidence("reference").steps.max() <= 11
    )
    assert stats.evidence("reference", tol=1e9).steps.tolist() == [1] * 10
    assert stats.evidence(max_iter=2).steps.max() == 2 and bool(stats.evidence().converged.all())


def test_reasons_of_disagreement():
    f, y = draw(40, 20, 4)
    wide = np.concatenate([f, f, f], 1)

    def reasons(f, y):
        basis = Basis(f)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return disagreements(*(basis.score(y, mode=m) for m in ("reference", "exact")))

    assert any("N = 40 < D = 60 it grows with D" in r for r in reasons(wide, y))
    assert "1 empty class(es) count about 7 each" in reasons(f, y + 1)
    assert "a perfect fit breaks it" in reasons(0 * f, y)
    assert any("have not converged in its rounds" in r for r in reasons(*draw(80, 70, 4, signal=0)))


# ------------------------------------------------------------------------------------------ many labels, threads


@pytest.mark.parametrize("mode", ["exact", "corrected", "reference"])
@pytest.mark.parametrize("n, d", [(200, 20), (200, 80), (50, 80)])
def test_one_matrix_many_label_sets(n, d, mode):
    f, y = draw(n, d)
    g = np.random.default_rng(4)
    labels = [y] + [np.concatenate([np.arange(2 + i % 5), g.integers(0, 2 + i % 5, n - 2 - i % 5)]) for i in range(19)]
    basis = Basis(f)
    many = basis.score_many(labels, mode=mode)
    assert len(many) == 20 and basis.score_many([]) == []
    for one, found in zip(labels, many):
        assert abs(found.score - basis.score(one, mode=mode).score) <= 1e-12 and float(found) == found.score
        assert abs(found.score - FeatureStats().update(f, one).score(mode=mode)) <= (1e-10 if n < d else 1e-12)
    values = [f[:, :2] + g.normal(size=(n, 2)) for _ in range(3)]
    for one, found in zip(values, basis.score_many(values, task="regression", mode=mode)):
        assert abs(found.score - basis.score(one, task="regression", mode=mode).score) <= 1e-12


@pytest.mark.parametrize("n, d", [(600, 20), (600, 150), (90, 150)])
def test_threads_and_precision_flags_change_nothing(threads, n, d):
    f, y = draw(n, d)
    before, found = torch.get_float32_matmul_precision(), []
    try:
        for count, flag in ((1, "highest"), (2, "highest"), (2, "medium")):
            threads(count)
            torch.set_float32_matmul_precision(flag)
            found.append([exact(f, y), exact(f.astype(np.float32), y, precision="auto"), LogME().fit(f, y)])
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_allclose(found, [found[0]] * 3, rtol=0, atol=1e-12)
