# SPDX-License-Identifier: Apache-2.0
"""The claims of LogME at toy size: the score falls as features get noisier, and weighted τ is that of the paper.

You et al. 2021 (arXiv 2102.11005), §5.1 (toy data) and §5.2 (weighted Kendall τ).
"""

from __future__ import annotations

import numpy as np
import pytest

import zipfast
from zipfast.ranking import weighted_tau

MODES = ("exact", "corrected", "reference")
SIGMAS = (0.1, 0.3, 0.6, 1, 2, 4, 8)
FINE_SIGMAS = (0.01, 0.05, 0.1, 0.3, 0.6, 1, 2, 4)


def blobs(sigma: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes around a triangle's corners, and a column of ones."""
    g = np.random.default_rng(seed)
    y = np.arange(1500) % 3
    corners = np.array([[0.0, 2], [2, -1], [-2, -1]])
    return np.column_stack([corners[y] + sigma * g.normal(size=(1500, 2)), np.ones(1500)]), y


def curve(sigma: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """y = sin 2x + x/2 from sin kx, cos kx and x itself, seen through noise."""
    g = np.random.default_rng(seed)
    x = g.uniform(-3, 3, 1500)
    basis = [f(k * x) for k in (1, 2, 3) for f in (np.sin, np.cos)]
    features = np.column_stack([*basis, x])
    return features + sigma * g.normal(size=features.shape), np.sin(2 * x) + x / 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_score_falls_with_noise_in_classification(mode, seed):
    scores = [zipfast.logme(*blobs(sigma, seed), mode=mode) for sigma in SIGMAS]
    assert (np.diff(scores) < -1e-3).all(), scores
    assert scores[0] > 1.5 and -0.7 < scores[-1] < -0.6  # log densities per sample: above 1 and below 0 are usual


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_score_falls_with_noise_in_regression(mode, seed):
    scores = [zipfast.logme(*curve(sigma, seed), task="regression", mode=mode) for sigma in FINE_SIGMAS]
    assert (np.diff(scores) < -1e-3).all(), scores
    assert scores[0] > 2.5 and scores[-1] < -1


@pytest.mark.parametrize("mode", MODES)
def test_scores_rank_as_accuracies_do(mode):
    """The accuracy of the head that the posterior mean gives falls with the noise, too: τ is 1."""
    scores, accuracies = [], []
    for sigma in SIGMAS:
        model = zipfast.LogME(mode=mode)
        scores.append(float(model.fit(*blobs(sigma, 0))))
        x, y = blobs(sigma, 1)
        accuracies.append(float((model.predict(x) == y).mean()))
    order = np.argsort(accuracies)
    assert accuracies[0] == 1 and accuracies[-1] < 0.6
    assert weighted_tau(scores, accuracies) > 0.95 and order[-1] in (0, 1)


def test_signal_beats_more_features_without_it():
    """What few samples and many features do to the public formula: it prefers features of pure noise to a clear signal."""
    g = np.random.default_rng(0)
    y = np.arange(200) % 4
    signal = g.normal(size=(4, 32))[y] + 0.5 * g.normal(size=(200, 32))
    noise = g.normal(size=(200, 1024))
    for mode in ("exact", "corrected"):
        assert zipfast.logme(signal, y, mode=mode) > zipfast.logme(noise, y, mode=mode) + 0.5
    assert zipfast.logme(signal, y, mode="reference") < zipfast.logme(noise, y, mode="reference") - 0.5


@pytest.mark.parametrize(
    "accuracies, tau",
    [([1, 2, 3, 5, 4], 0.671533), ([2, 1, 3, 4, 5], 0.901460), ([1, 2, 3, 4, 5], 1.0), ([5, 4, 3, 2, 1], -1.0)],
)
def test_weighted_tau(accuracies, tau):
    """Mistakes among the best count most."""
    pytest.importorskip("scipy")
    assert abs(weighted_tau([1, 2, 3, 4, 5], accuracies) - tau) <= 5e-7
    assert abs(weighted_tau(accuracies, [1, 2, 3, 4, 5]) - tau) <= 5e-7
