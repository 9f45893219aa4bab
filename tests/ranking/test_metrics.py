# SPDX-License-Identifier: Apache-2.0
"""The metrics beside LogME: hand-made tables, dense NumPy, SciPy and scikit-learn, invariances, degenerate input, errors."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from zipfast.ranking import metrics
from zipfast.ranking.metrics import Summary

FLAT = torch.tensor([0, 0, 1, 1])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def summary(features: Tensor, labels: Tensor, classes: int | None = None) -> Summary:
    x, y = features.double().numpy(), labels.numpy()
    count = np.bincount(y, minlength=classes or 0).astype(float)
    mean = np.stack([x[y == c].mean(0) if (y == c).any() else np.zeros(x.shape[1]) for c in range(len(count))])
    centred = x - x.mean(0)
    covariance, fourth = centred.T @ centred / len(x), float(((centred**2).sum(1) ** 2).sum())
    centre, square, weight, means = (torch.from_numpy(t) for t in (x.mean(0), covariance, count, mean))
    return Summary(len(x), centre, square, weight, means, fourth)


def blobs(noise: float = 1.0, *, samples: int = 300, size: int = 6, classes: int = 4, seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=draw)
    labels[:classes] = torch.arange(classes)
    centre = torch.randn(classes, size, generator=draw, dtype=torch.float64)
    return centre[labels] + noise * torch.randn(samples, size, generator=draw, dtype=torch.float64) + 3, labels


def onehot(labels: Tensor) -> np.ndarray:
    return np.eye(int(labels.max()) + 1)[labels.numpy()]


# --- agreement with dense computations


def between(features: Tensor, labels: Tensor) -> np.ndarray:
    x, y = features.numpy(), onehot(labels)
    explained = y @ (np.linalg.pinv(y) @ x)  # each row is the mean of its class
    return np.cov(explained.T, bias=True)


@pytest.mark.parametrize("samples, size", [(300, 6), (40, 20)])
def test_h_score_is_the_dense_formula(samples: int, size: int) -> None:
    features, labels = blobs(samples=samples, size=size)
    expected = np.trace(linalg.solve(np.cov(features.numpy().T, bias=True), between(features, labels)))
    assert metrics.h_score(summary(features, labels)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("samples, size", [(300, 6), (50, 20), (12, 30)])
def test_shrinkage_is_that_of_scikit_learn_and_enters_the_score(samples: int, size: int) -> None:
    covariance = pytest.importorskip("sklearn.covariance")
    features, labels = blobs(samples=samples, size=size)
    shrunk, alpha = covariance.ledoit_wolf(features.numpy())
    given = summary(features, labels)
    assert metrics.ledoit_wolf_shrinkage(given) == pytest.approx(alpha, abs=1e-10)
    assert 0 < alpha < 1
    expected = np.trace(linalg.solve(shrunk, (1 - alpha) * between(features, labels)))
    assert metrics.regularized_h_score(given) == pytest.approx(expected, rel=1e-10)


def test_shrinkage_of_pure_noise_is_whole_and_of_one_feature_none() -> None:
    sign = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * torch.tensor([1.0, 1.001])
    assert metrics.ledoit_wolf_shrinkage(summary(torch.cat([sign, 9 * sign]), torch.zeros(8).long())) == 1
    assert metrics.ledoit_wolf_shrinkage(summary(torch.arange(5.0)[:, None], torch.zeros(5).long())) == 0


@pytest.mark.parametrize("kernel", ["one-hot", "plus-minus"])
def test_lfc_is_the_cosine_of_centred_kernels(kernel: str) -> None:
    features, labels = blobs(samples=80)
    centre = np.eye(80) - 1 / 80
    y = onehot(labels) @ onehot(labels).T
    first, second = (
        centre @ k @ centre for k in ((features @ features.T).numpy(), y if kernel == "one-hot" else 2 * y - 1)
    )
    expected = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
    assert metrics.lfc(summary(features, labels)) == pytest.approx(expected, rel=1e-11)


def test_lfc_keeps_its_digits_when_one_class_has_nearly_all() -> None:
    total = 10**8
    count = torch.tensor([total - 1, 1]).double()
    mean = torch.tensor([[-1.0], [total - 1]], dtype=torch.float64) / total  # the label itself as the only feature
    variance = torch.full((1, 1), (total - 1) / total**2, dtype=torch.float64)
    given = Summary(total, torch.zeros(1).double(), variance, count, mean, 0.0)
    assert metrics.lfc(given) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("samples, size", [(300, 6), (90, 70), (30, 50)])
def test_transrate_is_the_dense_formula(samples: int, size: int) -> None:
    features, labels = blobs(samples=samples, size=size)

    def rate(x: np.ndarray) -> float:
        return float(np.linalg.slogdet(np.eye(size) + x.T @ x / (1e-4 * len(x)))[1]) / 2

    x, y = features.numpy() - features.numpy().mean(0), labels.numpy()
    expected = rate(x) - sum((y == c).mean() * rate(x[y == c]) for c in range(4))
    assert metrics.transrate(features, labels) == pytest.approx(expected, rel=1e-10)
    assert expected > 0


def dense_gbc(x: np.ndarray, y: np.ndarray, floor: float = 1e-4) -> float:
    total = 0.0
    for i in range(y.max() + 1):
        for j in range(y.max() + 1):
            a, b = np.diag(np.maximum(x[y == i].var(0), floor)), np.diag(np.maximum(x[y == j].var(0), floor))
            gap, pooled = x[y == i].mean(0) - x[y == j].mean(0), (a + b) / 2
            logs = [np.linalg.slogdet(m)[1] for m in (pooled, a, b)]
            total += (i != j) * math.exp(-(gap @ linalg.solve(pooled, gap) / 8 + (logs[0] - sum(logs[1:]) / 2) / 2))
    return -total


@pytest.mark.parametrize("samples, size, components", [(300, 6, None), (300, 6, 3), (300, 6, 64), (20, 40, 5)])
def test_gbc_is_the_dense_formula(samples: int, size: int, components: int | None) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    features, labels = blobs(samples=samples, size=size)
    x = features.numpy()
    if components:
        x = decomposition.PCA(min(components, size), svd_solver="full").fit_transform(x)
    expected = dense_gbc(x, labels.numpy())
    assert metrics.gbc(features, labels, components=components) == pytest.approx(expected, rel=1e-9)
    assert -12 < expected < 0


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 3])
def test_knn_agrees_with_scikit_learn(metric: str, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    features, labels = blobs(2.0, samples=150, classes=2)  # two classes and odd k: no ties
    x, y = features.numpy(), labels.numpy()
    index = neighbors.NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(x).kneighbors()[1]
    expected = float(((y[index].mean(1) > 0.5) == y).mean())
    assert metrics.knn(features, labels, k=k, metric=metric) == expected
    assert 0.5 < expected < 1
    monkeypatch.setattr(metrics, "BLOCK", 1000)  # several blocks of samples and of candidates
    assert metrics.knn(features, labels, k=k, metric=metric) == expected


def test_n_leep_is_leep_of_a_mixture() -> None:
    decomposition, mixture = pytest.importorskip("sklearn.decomposition"), pytest.importorskip("sklearn.mixture")
    features, labels = blobs(0.7, samples=200, classes=3)
    points = decomposition.PCA(0.8, svd_solver="full").fit_transform(features.numpy())
    assert 1 < points.shape[1] < 6
    posterior = mixture.GaussianMixture(15, random_state=0).fit(points).predict_proba(points)
    assert metrics.n_leep(features, labels) == pytest.approx(
        metrics.leep(torch.from_numpy(posterior), labels), rel=1e-6
    )
    assert metrics.n_leep(features, labels) == metrics.n_leep(features, labels)
    assert metrics.n_leep(features, labels) > metrics.n_leep(features, labels[torch.randperm(200)])


# --- by hand


def test_leep_by_hand() -> None:
    theta = torch.tensor([[0.5, 0.5, 0], [1, 0, 0], [0.25, 0.75, 0], [0, 1, 0]]).double()
    # mass 1.75 and 2.25; P(0|z) = 1.5 / 1.75 and 0.5 / 2.25, P(1|z) = 0.25 / 1.75 and 1.75 / 2.25
    first, second = (6 / 7, 2 / 9), (1 / 7, 7 / 9)
    expected = [
        0.5 * first[0] + 0.5 * first[1],
        first[0],
        0.25 * second[0] + 0.75 * second[1],
        second[1],
    ]
    assert metrics.leep(theta, FLAT) == pytest.approx(sum(map(math.log, expected)) / 4, rel=1e-14)
    assert metrics.leep(theta[:, :2], FLAT) == metrics.leep(theta, FLAT)


def test_leep_of_certain_predictions_is_nce() -> None:
    source, labels = torch.randint(5, (200,)), torch.randint(3, (200,))
    theta = torch.from_numpy(np.eye(9)[source.numpy()])
    assert metrics.leep(theta, labels) == pytest.approx(metrics.nce(source, labels), rel=1e-12)


def test_leep_with_masses_that_nearly_vanish() -> None:
    theta = torch.tensor([[1, 5e-324], [1, 0]], dtype=torch.float64)
    assert metrics.leep(theta, torch.tensor([0, 1])) == pytest.approx(math.log(0.5), rel=1e-14)


def test_nce_by_hand_and_as_entropy() -> None:
    # z = 0: y = 0, 0, 1; z = 7: y = 2
    value = metrics.nce(torch.tensor([0, 0, 0, 7]), torch.tensor([0, 0, 1, 2]))
    assert value == pytest.approx((2 * math.log(2 / 3) + math.log(1 / 3)) / 4, rel=1e-14)
    source, labels = torch.randint(6, (500,)).numpy(), torch.randint(4, (500,)).numpy()
    table = np.histogram2d(source, labels, bins=(6, 4))[0] / 500
    p, pz = table[table > 0], table.sum(1)
    expected = float((p * np.log(p)).sum() - (pz * np.log(pz)).sum())
    assert metrics.nce(torch.from_numpy(source), torch.from_numpy(labels)) == pytest.approx(expected, rel=1e-12)


def test_gbc_by_hand() -> None:
    features = torch.tensor([[0.0, 5], [2, 5], [4, 5], [8, 5]])  # variances 1 and 4; the dead feature is at its floor
    distance = (1 - 6) ** 2 / 2.5 / 8 + math.log(2.5 / math.sqrt(1 * 4)) / 2
    assert metrics.gbc(features, FLAT, components=None) == pytest.approx(-2 * math.exp(-distance), rel=1e-14)
    assert metrics.gbc(features, FLAT) == pytest.approx(-2 * math.exp(-distance), rel=1e-12)
    # the floor stands in for a variance below it: 4 and 4 now
    distance = 25 / 4 / 8
    assert metrics.gbc(features[:, :1], FLAT, floor=4) == pytest.approx(-2 * math.exp(-distance), rel=1e-12)


def test_knn_by_hand() -> None:
    line = torch.tensor([[0.0], [1], [3], [6], [10]])
    labels = torch.tensor([0, 0, 1, 1, 0])
    # nearest of each: 1, 0, 1, 2, 3
    assert metrics.knn(line, labels, k=1, metric="euclidean") == 3 / 5
    # k = 2: (0 1), (0 1), (0 1) with 1 nearer -> 0, (1 0) with 2 nearer -> 1, (1 1) -> 1
    assert metrics.knn(line, labels, k=2, metric="euclidean") == 3 / 5


def test_knn_ties_go_to_the_nearest_of_the_tied_classes_then_to_the_lower_index() -> None:
    line = torch.tensor([[0.0], [1], [-2], [3], [-4]])
    labels = torch.tensor([2, 2, 1, 1, 2])
    # sample 0 sees 2, 1, 1, 2: a tie of two each, and class 2 is nearest
    accuracy = [metrics.knn(line, labels, k=k, metric="euclidean") for k in (1, 4)]
    assert accuracy[0] == 2 / 5  # 1, 0, 0 (rather than 4), 1, 2 are the nearest
    # k = 4: 0 -> 2; 1 sees 0: 2, then 3: 1, 2: 1, 4: 2 -> 2; 2 sees 0: 2 ... -> 2; 3 sees 1: 2 ... -> 2; 4 sees 2: 1 -> 1
    assert accuracy[1] == 2 / 5
    # 1 and 2 are at one distance from 0: index 1 is the neighbour
    assert metrics._nearest(torch.tensor([[0.0], [5], [-5]]).double(), 0, 1, 1).tolist() == [[1]]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_knn_of_duplicates_is_exact(metric: str) -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(7, 33, generator=draw, dtype=torch.float64) + 100
    index = torch.arange(7).repeat_interleave(4)
    shuffle = torch.randperm(28, generator=draw)
    features, labels = rows[index][shuffle], index[shuffle]
    assert metrics.knn(features, labels, k=3, metric=metric) == 1.0
    # copies are at distance 0, in the order of their indices, also where more are alike than are asked for
    for k in (1, 2, 3):
        for i, near in enumerate(metrics._nearest(features, 0, 28, k).tolist()):
            assert near == [j for j in range(28) if labels[j] == labels[i] and j != i][:k]


def test_knn_sees_differences_below_the_rounding_of_the_product() -> None:
    draw = torch.Generator().manual_seed(2)
    cloud = 1e-6 * torch.randn(40, 3, generator=draw, dtype=torch.float64)
    features = torch.cat([cloud, torch.tensor([[1e4, -3e4, 2e4]], dtype=torch.float64)])
    distance = (features[:40, None] - features).square().sum(2).fill_diagonal_(math.inf)
    assert torch.equal(metrics._nearest(features, 0, 40, 4), distance.argsort(dim=1, stable=True)[:, :4])


def test_knn_all_samples_alike() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1])
    for features in (torch.zeros(5, 3), torch.full((5, 3), 0.1)):
        # the lowest other index: 1 for sample 0, else 0
        assert metrics.knn(features, labels, k=1) == 2 / 5
    # a zero row is at right angles to all: 80 degrees are nearer
    angle = math.radians(80)
    assert metrics.knn(torch.tensor([[1, 0], [math.cos(angle), math.sin(angle)], [0, 0]]), labels[:3], k=1) == 2 / 3
    # and nearer to its like than to any direction
    assert metrics.knn(torch.tensor([[0.0, 0], [1, 1], [0, 0], [1, 2]]), torch.tensor([0, 1, 0, 1]), k=1) == 1


# --- laws


SCORES: dict[str, Callable[[Tensor, Tensor], float]] = {
    **{name: lambda f, y, m=m: m(summary(f, y)) for name, m in metrics.FROM_SUMMARY.items()},  # type: ignore[misc]
    **metrics.FROM_FEATURES,
}


def test_registry() -> None:
    assert list(metrics.FROM_SUMMARY) == ["hscore", "reg_hscore", "lfc"]
    assert list(metrics.FROM_FEATURES) == ["transrate", "gbc", "knn", "nleep"]
    assert list(metrics.FROM_PROBABILITIES) == ["leep"]
    features, labels = blobs(samples=60)
    for score in (*SCORES.values(), lambda f, y: metrics.leep(f.softmax(1), y), lambda f, y: metrics.nce(y, y)):
        assert type(score(features, labels)) is float


@pytest.mark.parametrize("name", [n for n in SCORES if n != "nleep"])
def test_order_of_samples_and_classes_and_empty_classes(name: str) -> None:
    features, labels = blobs(samples=120, size=5)
    draw = torch.Generator().manual_seed(3)
    value = SCORES[name](features, labels)
    shuffle = torch.randperm(120, generator=draw)
    assert SCORES[name](features[shuffle], labels[shuffle]) == pytest.approx(value, rel=1e-10)
    names = torch.tensor([7, 2, 5, 0])  # 1, 3, 4 and 6 are empty
    assert SCORES[name](features, names[labels]) == pytest.approx(value, rel=1e-10)


def test_order_of_classes_for_leep_and_nce() -> None:
    features, labels = blobs(samples=120)
    theta, names, source = features.softmax(1), torch.tensor([7, 2, 5, 0]), features.argmax(1)
    assert metrics.leep(theta.flip(1), names[labels]) == pytest.approx(metrics.leep(theta, labels), rel=1e-12)
    assert metrics.nce(5 - source, names[labels]) == pytest.approx(metrics.nce(source, labels), rel=1e-12)


def test_h_score_ignores_invertible_affine_maps() -> None:
    features, labels = blobs()
    draw = torch.Generator().manual_seed(5)
    mapped = features @ torch.randn(6, 6, generator=draw, dtype=torch.float64) + torch.arange(6)
    assert metrics.h_score(summary(mapped, labels)) == pytest.approx(
        metrics.h_score(summary(features, labels)), rel=1e-9
    )


@pytest.mark.parametrize("name", ["hscore", "reg_hscore", "lfc", "transrate", "gbc"])
def test_rotation_and_translation(name: str) -> None:
    features, labels = blobs()
    draw = torch.Generator().manual_seed(6)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
    moved = features @ rotation + 1000 * torch.arange(6)
    assert SCORES[name](moved, labels) == pytest.approx(SCORES[name](features, labels), rel=1e-8)


@pytest.mark.parametrize("name", ["hscore", "reg_hscore", "lfc", "knn"])
def test_scale(name: str) -> None:
    features, labels = blobs()
    for scale in (1e-9, 1e9):
        assert SCORES[name](features * scale, labels) == pytest.approx(SCORES[name](features, labels), rel=1e-9)


@pytest.mark.parametrize("name", ["hscore", "reg_hscore", "lfc", "knn", "gbc", "nleep"])
def test_noise_lowers_the_score(name: str) -> None:
    scores = [SCORES[name](*blobs(noise, samples=400)) for noise in (0.1, 0.5, 1.5, 5.0)]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4


def test_lower_precision_is_widened_and_inputs_stay() -> None:
    features, labels = blobs(samples=80)
    for dtype in (torch.float32, torch.bfloat16):
        low = features.to(dtype)
        kept = low.clone()
        for score in metrics.FROM_FEATURES.values():
            assert score(low, labels) == score(low.double(), labels)
        assert torch.equal(low, kept)
    with_gradient = features.clone().requires_grad_()
    assert metrics.transrate(with_gradient, labels) == metrics.transrate(features, labels)


def test_global_precision_does_not_matter() -> None:
    features, labels = blobs(samples=80)
    features = features.float()
    expected = [score(features, labels) for score in SCORES.values()]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.bfloat16)
        assert [score(features, labels) for score in SCORES.values()] == expected
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(torch.float32)


# --- degenerate input


def entropy(labels: Tensor) -> float:
    share = labels.bincount().double() / len(labels)
    return -float(torch.special.xlogy(share, share).sum())


def test_one_class() -> None:
    features, labels = blobs(samples=30)[0], torch.full((30,), 2)
    expected = {"hscore": 0, "reg_hscore": 0, "lfc": 0, "transrate": 0, "gbc": 0, "knn": 1, "nleep": 0}
    for name, value in expected.items():
        assert SCORES[name](features, labels) == pytest.approx(value, abs=1e-12), name
    assert metrics.leep(features.softmax(1), labels) == pytest.approx(0, abs=1e-12)
    assert metrics.nce(torch.arange(30), labels) == 0


def test_features_that_never_vary() -> None:
    labels = torch.arange(30) % 3
    expected = {"hscore": 0, "reg_hscore": 0, "lfc": 0, "gbc": -6, "transrate": 0, "nleep": -math.log(3)}
    for constant in (0.0, 0.1, -300.7):
        features = torch.full((30, 4), constant, dtype=torch.float64)
        # the mean of equal numbers may round: the statistics say exactly 0, as those of zipfast.Moments do
        given = summary(features * 0, labels)
        for name, value in expected.items():
            score = (
                metrics.FROM_SUMMARY[name](given) if name in metrics.FROM_SUMMARY else SCORES[name](features, labels)
            )
            assert score == pytest.approx(value, abs=1e-9), (name, constant)
        assert metrics.ledoit_wolf_shrinkage(given) == 0


@pytest.mark.parametrize("name", ["hscore", "lfc", "transrate", "gbc", "knn"])
def test_a_dead_feature_changes_nothing(name: str) -> None:
    features, labels = blobs(samples=90)
    dead = torch.cat([features, torch.zeros(90, 2)], 1)
    assert SCORES[name](dead, labels) == pytest.approx(SCORES[name](features, labels), rel=1e-9)


def test_copied_features_and_samples() -> None:
    features, labels = blobs(samples=90)
    score = metrics.h_score(summary(features, labels))
    assert metrics.h_score(summary(torch.cat([features, features], 1), labels)) == pytest.approx(score, rel=1e-9)
    for name in ("hscore", "lfc", "transrate", "gbc"):
        twice = SCORES[name](features.repeat(2, 1), labels.repeat(2))
        assert twice == pytest.approx(SCORES[name](features, labels), rel=1e-9), name
    assert metrics.knn(features.repeat(2, 1), labels.repeat(2), k=1) == 1
    assert math.isfinite(metrics.n_leep(features[:3].repeat(9, 1), labels[:3].repeat(9)))


def test_a_class_with_one_sample_and_fewer_samples_than_features() -> None:
    features, labels = blobs(samples=12, size=40, classes=3)
    labels[:] = torch.tensor([0] * 5 + [1] * 6 + [2])
    for name, score in SCORES.items():
        assert math.isfinite(score(features, labels)), name
    assert metrics.h_score(summary(features, labels)) == pytest.approx(2, rel=1e-9)  # K - 1, as the docstring says
    assert metrics.knn(features, labels) < 1


def test_large_features_stay_finite() -> None:
    features, labels = blobs(samples=40)
    features = torch.cat([features, features], 1)  # so that the Gram matrix has eigenvalues of 0, up to rounding
    for scale in (1e12, 1e35):
        for score in metrics.FROM_FEATURES.values():
            assert math.isfinite(score(features * scale, labels))


# --- errors

GOOD = blobs(samples=8, size=2, classes=2)
GIVEN = summary(*GOOD)


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (None, TypeError, "'summary' must be a Summary, got NoneType"),
        ({"mean": torch.zeros(2)}, TypeError, r"'summary.mean' must be float64, got torch.float32"),
        ({"covariance": torch.zeros(3, 2).double()}, ValueError, r"'summary.covariance' must be \[2, 2\] .*\[3, 2\]"),
        ({"mean": torch.zeros(0).double()}, ValueError, r"'summary.mean' must be \[0\] and not empty, got \[0\]"),
        ({"class_mean": torch.zeros(3, 2).double()}, ValueError, r"'summary.class_mean' must be \[2, 2\]"),
        ({"covariance": torch.full((2, 2), math.nan).double()}, ValueError, "must be finite, got 4 values that are"),
        ({"class_count": torch.tensor([4.0, 5]).double()}, ValueError, "whole numbers .* 8, .* with the sum 9"),
        ({"class_count": torch.tensor([9.0, -1]).double()}, ValueError, "'summary.class_count' must be whole numbers"),
        ({"class_count": torch.tensor([4.5, 3.5]).double()}, ValueError, "'summary.class_count' must be whole numbers"),
    ],
)
@pytest.mark.parametrize("name", ["h_score", "regularized_h_score", "lfc", "ledoit_wolf_shrinkage"])
def test_errors_of_a_summary(name: str, change: Any, kind: type[Exception], message: str) -> None:
    given: Any = None if change is None else replace(GIVEN, **change)
    with pytest.raises(kind, match=f"^{name}: .*{message.removeprefix('^')}"):
        getattr(metrics, name)(given)


@pytest.mark.parametrize("name", ["regularized_h_score", "ledoit_wolf_shrinkage"])
@pytest.mark.parametrize("fourth", [-1.0, math.nan, math.inf])
def test_errors_of_the_fourth_moment(name: str, fourth: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}: 'summary.fourth' must be finite and at least 0, got {fourth}"):
        getattr(metrics, name)(replace(GIVEN, fourth=fourth))
    assert math.isfinite(metrics.h_score(replace(GIVEN, fourth=fourth)))


HOLE = torch.tensor([[1.0, 2], [3, math.nan], [math.inf, 4], [1, 1]])


@pytest.mark.parametrize(
    "features, labels, kind, message",
    [
        ([[1.0]], FLAT, TypeError, "must be a tensor, got list"),
        (torch.zeros(4, 2).long(), FLAT, TypeError, "must be floating-point, got torch.int64"),
        (torch.zeros(4), FLAT, ValueError, r"must be \[N, D\] with N and D at least 1, got \[4\]"),
        (torch.zeros(4, 0), FLAT, ValueError, r"must be \[N, D\] with N and D at least 1, got \[4, 0\]"),
        (HOLE, FLAT, ValueError, r"must be finite and at most 1e\+36 in size, got nan at \[1, 1\]"),
        (HOLE[2:], FLAT[2:], ValueError, r"must be finite and at most 1e\+36 in size, got inf at \[0, 0\]"),
        (torch.zeros(4, 2), [0, 0, 1, 1], TypeError, "'labels' must be an int64 tensor, got list"),
        (torch.zeros(4, 2), FLAT.int(), TypeError, "'labels' must be an int64 tensor, got torch.int32"),
        (torch.zeros(4, 2), FLAT[:3], ValueError, r"'labels' must be \[N\] with N = 4, got \[3\]"),
        (torch.zeros(4, 2), FLAT[:, None], ValueError, r"'labels' must be \[N\] with N = 4, got \[4, 1\]"),
        (torch.zeros(4, 2), FLAT - 1, ValueError, "'labels' must be at least 0, got -1"),
    ],
)
@pytest.mark.parametrize("name", ["transrate", "gbc", "knn", "n_leep", "leep"])
def test_errors_of_features_and_labels(name: str, features: Any, labels: Any, kind: Any, message: str) -> None:
    argument = "" if message.startswith("'") else "'probabilities' " if name == "leep" else "'features' "
    with pytest.raises(kind, match=f"^{name}: {argument}{message}"):
        getattr(metrics, name)(features, labels)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("transrate", {"eps": 0.0}, "transrate: 'eps' must be finite and above 0, got 0.0"),
        ("gbc", {"components": 0}, "gbc: 'components' must be None or at least 1, got 0"),
        ("gbc", {"floor": -1.0}, "gbc: 'floor' must be finite and above 0, got -1.0"),
        ("knn", {"k": 8}, "knn: 'k' must be at least 1 and less than the number of samples, 8, got 8"),
        ("knn", {"k": 0}, "knn: 'k' must be at least 1"),
        ("knn", {"metric": "l1"}, "knn: 'metric' must be 'cosine' or 'euclidean', got 'l1'"),
        ("n_leep", {"share": 1.0}, "n_leep: 'share' must be above 0 and below 1, got 1.0"),
        ("n_leep", {"clusters": 9}, "n_leep: 'clusters' must be None or from 1 to the number of samples, 8, got 9"),
        ("n_leep", {"clusters": 0}, "n_leep: 'clusters' must be None or from 1"),
        ("n_leep", {"seed": -1}, r"n_leep: 'seed' must be in \[0, 2\*\*32\), got -1"),
    ],
)
def test_errors_of_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(metrics, name)(*GOOD, **options)


def test_errors_of_probabilities_and_source_labels() -> None:
    theta = torch.tensor([[0.5, 0.5], [0.9, 0.1], [1.5, -0.5], [0.7, 0.7]])
    with pytest.raises(ValueError, match=r"^leep: 'probabilities' must be at least 0, got -0.5"):
        metrics.leep(theta, FLAT)
    with pytest.raises(ValueError, match=r"^leep: 'probabilities' must be rows that sum to 1, got 1.4 in row 3; apply"):
        metrics.leep(theta[[0, 1, 0, 3]], FLAT)
    with pytest.raises(ValueError, match=r"^nce: 'source_labels' must be \[N\] with N = at least 1, got \[0\]"):
        metrics.nce(FLAT[:0], FLAT[:0])
    with pytest.raises(ValueError, match=r"^nce: 'labels' must be \[N\] with N = 4, got \[2\]"):
        metrics.nce(FLAT, FLAT[:2])
    with pytest.raises(ValueError, match=r"^nce: 'source_labels' must be at least 0, got -1"):
        metrics.nce(FLAT - 1, FLAT)
    with pytest.raises(TypeError, match=r"^nce: 'source_labels' must be an int64 tensor, got torch.float32"):
        metrics.nce(FLAT.float(), FLAT)


def test_n_leep_needs_two_samples_and_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn.mixture")
    with pytest.raises(ValueError, match=r"^n_leep: 'features' must be of at least 2 samples, got 1"):
        metrics.n_leep(torch.zeros(1, 3), torch.zeros(1).long())
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=r"^n_leep: scikit-learn must be installed .* pip install 'zipfast\[kmeans\]'"
    ):
        metrics.n_leep(*GOOD)
