# SPDX-License-Identifier: Apache-2.0
"""Two ways from a Gram matrix to the evidence: eigenvectors and the tridiagonal form; ranks, rounding, wide features."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch

import zipfast
from zipfast.ranking import Basis, FeatureStats, spectrum
from zipfast.ranking.spectrum import of_gram, of_rows, rounding_of, why_not_tridiagonal

MODES = ("exact", "corrected", "reference")


def draw(n, d, k=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % k
    centre = torch.randn(k, d, generator=g, dtype=torch.float64)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) + centre[y] / d**0.5 + 0.2
    return x.to(dtype), y


@pytest.fixture
def by_eigenvectors(monkeypatch):
    """Call it to switch the tridiagonal route off."""
    return lambda: monkeypatch.setattr(spectrum, "why_not_tridiagonal", lambda gram, samples: ["switched off"])


def same(a, b, tolerance=1e-12):
    assert abs(a.score - b.score) <= tolerance
    torch.testing.assert_close(a.evidence, b.evidence, rtol=0, atol=tolerance)
    for name in ("alpha", "beta", "ratio"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-8, atol=0)
    torch.testing.assert_close(a.mean, b.mean, rtol=0, atol=1e-9 * float(b.mean.abs().max()))


# ------------------------------------------------------------------------------------------ the two routes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n, d, k", [(65, 64, 1), (300, 64, 4), (400, 130, 11)])
def test_routes_agree(by_eigenvectors, mode, n, d, k):
    x, y = draw(n, d, max(k, 2))
    y = y if k > 1 else torch.tanh(x[:, :1])
    task = "classification" if k > 1 else "regression"
    basis = Basis(x)
    assert basis.spectrum().offdiagonal is not None
    first = basis.score(y, task=task, mode=mode, mean=True)
    by_eigenvectors()
    basis = Basis(x)
    assert basis.spectrum().offdiagonal is None
    same(first, basis.score(y, task=task, mode=mode, mean=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", [2, 3, 5])
def test_routes_agree_on_few_features(monkeypatch, mode, d):
    x, y = draw(40, d, 3)
    assert Basis(x).spectrum().offdiagonal is None
    first = Basis(x).score(y, mode=mode, mean=True)
    monkeypatch.setattr(spectrum, "SMALLEST_TRIDIAGONAL", 2)
    basis = Basis(x)
    assert basis.spectrum().offdiagonal is not None
    same(first, basis.score(y, mode=mode, mean=True))


def test_tridiagonal_form_is_a_rotation_of_the_matrix():
    x, _ = draw(200, 70)
    gram = x.T @ x
    found = of_gram(gram, 200)
    assert found.offdiagonal is not None and (found.samples, found.features) == (200, 70)
    matrix = torch.diag(found.diagonal) + torch.diag(found.offdiagonal, 1) + torch.diag(found.offdiagonal, -1)
    eye = torch.eye(70, dtype=torch.float64)
    basis = found.expand(eye)
    assert (basis.T @ basis - eye).abs().max() <= 1e-13
    assert (basis @ matrix @ basis.T - gram).abs().max() <= 1e-12 * gram.abs().max()
    assert (found.project(eye) - basis.T).abs().max() <= 1e-13
    assert (gram == x.T @ x).all()  # not overwritten


@pytest.mark.parametrize("d, dead", [(40, 6), (80, 6), (80, 60)])
@pytest.mark.parametrize("mode", ("exact", "corrected"))
def test_rank_deficient(by_eigenvectors, mode, d, dead):
    """Dead and repeated columns: both routes agree, and with the features that are left."""
    x, y = draw(300, d)
    x[:, :dead] = 0
    first, alive = Basis(x).score(y, mode=mode, mean=True), Basis(x[:, dead:]).score(y, mode=mode, mean=True)
    assert abs(first.score - alive.score) <= 1e-12
    torch.testing.assert_close(first.mean[:, dead:], alive.mean, rtol=0, atol=1e-10)
    assert first.mean[:, :dead].abs().max() <= 1e-10
    by_eigenvectors()
    same(Basis(x).score(y, mode=mode, mean=True), first)


def test_reference_mode_counts_the_rank():
    """With a null space the rank is counted as by NumPy's SVD, so the tridiagonal form is given up."""
    x, _ = draw(300, 80)
    x[:, :10] = 0
    assert Basis(x).spectrum().offdiagonal is not None
    assert Basis(x).spectrum(public=True).offdiagonal is None
    assert Basis(x * 1e-5).spectrum(public=True).diagonal.shape == (70,)
    assert Basis(x * 1e-5).spectrum().diagonal.shape == (80,)
    full, _ = draw(300, 80)
    assert Basis(full).spectrum(public=True).offdiagonal is not None


@pytest.mark.parametrize("mode", MODES)
def test_single_feature(mode):
    x, y = draw(50, 1, 2)
    found = zipfast.logme(x, y, mode=mode, return_details=True)
    assert found.features == 1 and np.isfinite(found.score)
    sigma = Basis(x).spectrum().diagonal
    torch.testing.assert_close(sigma, (x * x).sum().reshape(1))


# ------------------------------------------------------------------------------------------ wide features


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n, d", [(1, 5), (20, 20), (20, 70), (64, 200)])
@pytest.mark.filterwarnings("ignore:Basis. the score of")
def test_wide_features(mode, n, d):
    """The small matrix FFᵀ gives what FᵀF does; statistics only have the latter."""
    x, y = draw(n, d, 3)
    small = Basis(x).score(y, mode=mode, mean=True)
    found = FeatureStats(name="Basis").update(x, y).evidence(mode, mean=True)
    assert abs(small.score - found.score) <= 1e-10
    if n > 1:  # of one sample the evidence is flat: any t does
        torch.testing.assert_close(small.mean, found.mean, rtol=0, atol=1e-9)


def test_of_rows_expands_to_the_posterior_mean():
    x, y = draw(30, 50, 3)
    found = Basis(x).score(y, mean=True)
    columns = torch.nn.functional.one_hot(y).double()
    for i in range(3):
        t = float(found.ratio[i])
        want = torch.linalg.solve(x.T @ x + t * torch.eye(50), x.T @ columns[:, i]) if t < 1e12 else torch.zeros(50)
        torch.testing.assert_close(found.mean[i], want.double(), rtol=0, atol=1e-9)
    x[3] = x[4] = 0  # null directions among the rows
    weights = of_rows(x, x @ x.T).expand(torch.ones(30, 1, dtype=torch.float64))
    assert weights.shape == (50, 1) and bool(weights.isfinite().all())


# ------------------------------------------------------------------------------------------ reasons


def test_reasons_against_the_tridiagonal_form(monkeypatch):
    gram = torch.eye(64, dtype=torch.float64)
    assert why_not_tridiagonal(gram, 65) == []
    assert why_not_tridiagonal(gram, 64) == ["N <= D: null directions must be dropped, which needs eigenvalues"]
    assert why_not_tridiagonal(gram[:63, :63], 65) == ["fewer than 64 features"]
    assert why_not_tridiagonal(gram.to("meta"), 65) == ["LAPACK's reduction runs on the CPU"]
    monkeypatch.setattr(spectrum, "lapack", lambda: None)
    assert why_not_tridiagonal(gram, 65) == ["SciPy is not installed"]
    assert len(why_not_tridiagonal(gram[:3, :3].to("meta"), 3)) == 4


def test_without_scipy(monkeypatch):
    x, y = draw(200, 80)
    score = zipfast.logme(x, y)
    assert spectrum.lapack() is not None
    found = builtins.__import__

    def missing(name, *rest, **more):
        if name.startswith("scipy"):
            raise ImportError(name)
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert spectrum.lapack() is None and Basis(x).spectrum().offdiagonal is None
    assert abs(zipfast.logme(x, y) - score) <= 1e-12


# ------------------------------------------------------------------------------------------ rounding of products


@pytest.mark.parametrize("d", [20, 80])
def test_directions_of_pure_rounding_explain_nothing(d):
    """Columns that depend on others up to float32 rounding: the float32 products' noise must not look like signal."""
    x, y = draw(400, d)
    x = torch.cat([x, x[:, : d // 2] @ torch.full((d // 2, 3), 0.1, dtype=torch.float64)], 1)
    exact = FeatureStats().update(x, y).score()
    rough = FeatureStats(precision="auto").update(x.float(), y)
    assert rough.dtype == torch.float32
    assert abs(rough.score() - exact) <= 1e-4
    tall, _ = draw(400, d)
    exact = FeatureStats().update(tall, y).score()
    assert abs(FeatureStats(precision="auto").update(tall.float(), y).score() - exact) <= 1e-6


@pytest.mark.parametrize("least", [1e-9, 0.5])
@pytest.mark.parametrize("d", [10, 70])
def test_what_is_raised(d, least):
    """Only float32 products, and only where eigenvalues reach down to their rounding."""
    sigma = torch.linspace(1, 2, d, dtype=torch.float64)
    sigma[0] = least
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    gram = rotation @ torch.diag(sigma) @ rotation.T
    gram = 0.5 * (gram + gram.T)
    levels = [rounding_of(gram, dtype) for dtype in (torch.float64, torch.float32)]
    assert levels[0] == 0 and abs(levels[1] - spectrum.SINGLE_ROUNDING * float(sigma.mean())) <= 1e-18
    double, single = (of_gram(gram, 1000, rounding=level) for level in levels)
    raised = levels[1] if least < 0.1 else 0.0
    torch.testing.assert_close(single.diagonal - double.diagonal, torch.full_like(sigma, raised), rtol=0, atol=1e-14)
    assert (single.offdiagonal is None) == (d < 64)
