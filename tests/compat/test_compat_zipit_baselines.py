# SPDX-License-Identifier: Apache-2.0
"""The public ZipIt! code's other matchings: identity, permute, optimal, kmeans; against their definitions, recorded answers
(tests/golden/zipit.json) and, where ZIPFAST_ZIPIT names a checkout, the code itself.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from checkouts import imported

from zipfast.compat import zipit

ALL = ["match_tensors_identity", "match_tensors_permute", "match_tensors_optimal", "match_tensors_kmeans"]


def covariance(features, seed=0, dead=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((features, 40)).astype(np.float32)
    x = x + 0.8 * np.roll(x, features // 2, 0)
    x[rng.permutation(features)[:dead]] = 0
    c = np.cov(x, bias=True).reshape(features, features).astype(np.float32)
    return torch.from_numpy(np.triu(c) + np.triu(c, 1).T)


def call(name, metric, r=0.5, **options):
    pytest.importorskip(
        {"permute": "scipy", "optimal": "networkx", "kmeans": "sklearn"}.get(name.split("_")[-1], "torch")
    )
    return getattr(zipit, name)(metric, r, **options)


def test_identity_by_hand():
    merge, unmerge = zipit.match_tensors_identity({"covariance": torch.eye(4)})
    assert unmerge.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    assert torch.equal(merge, unmerge.T / (2 + 1e-5))
    merge, unmerge = zipit.match_tensors_identity(
        {"cossim": torch.full((6, 6), torch.nan)}, 2 / 3
    )  # values are not read
    assert torch.equal(unmerge, torch.eye(2).repeat(3, 1)) and torch.equal(merge, unmerge.T / (3 + 1e-5))


def test_permute_by_hand():
    """Greedy would take 0.9 and leave 0; the assignment takes 0.8 + 0.7."""
    sims = torch.eye(4)
    sims[:2, 2:] = torch.tensor([[0.9, 0.8], [0.7, 0.0]])
    merge, unmerge, value = call("match_tensors_permute", {"cossim": sims}, get_merge_value=True)
    assert unmerge.argmax(1).tolist() == [0, 1, 1, 0]
    assert float(value) == pytest.approx(0.75)
    assert torch.equal(merge, unmerge.T / (2 + 1e-5))
    assert len(call("match_tensors_permute", {"cossim": sims})) == 2


def test_permute_is_the_best_permutation():
    pytest.importorskip("scipy")
    for seed in range(5):
        c = covariance(10, seed)
        block = zipit.compute_correlation(c)[:5, 5:].double()
        best = max(sum(float(block[k, p[k]]) for k in range(5)) for p in itertools.permutations(range(5)))
        merge, unmerge, value = zipit.match_tensors_permute({"covariance": c}, get_merge_value=True)
        assert float(value) * 5 == pytest.approx(best, abs=1e-5)
        assert (
            (unmerge[:5] == torch.eye(5)).all() and (unmerge[5:].sum(0) == 1).all() and (unmerge[5:].sum(1) == 1).all()
        )
        assert merge.shape == (5, 10)


def test_merge_value_of_several_models_is_of_all():
    c = covariance(12, 1)
    sims = zipit.compute_correlation(c)
    _, unmerge, value = call("match_tensors_permute", {"covariance": c}, 2 / 3, get_merge_value=True)
    pairs = [float(sims[k, f]) for f in range(4, 12) for k in [int(unmerge[f].argmax())]]
    assert float(value) == pytest.approx(np.mean(pairs), abs=1e-6)


def test_optimal_is_the_best_pairing():
    pytest.importorskip("networkx")

    def best(left, sims):
        if not left:
            return 0.0
        first, rest = left[0], left[1:]
        return max(float(sims[first, k]) + best([f for f in rest if f != k], sims) for k in rest)

    for seed in range(4):
        c = covariance(8, seed, dead=seed)
        sims = zipit.compute_correlation(c).double()
        merge, unmerge = zipit.match_tensors_optimal({"covariance": c})
        assert (unmerge.sum(0) == 2).all() and (unmerge.sum(1) == 1).all() and merge.shape == (4, 8)
        pairs = [column.nonzero()[:, 0].tolist() for column in unmerge.T]
        assert sum(float(sims[i, j]) for i, j in pairs) == pytest.approx(best(list(range(8)), sims), abs=1e-6)


@pytest.mark.parametrize("models, size", [(2, 9), (3, 5)])
def test_kmeans_is_of_negated_rows(models, size):
    """F/N clusters for any number of models (the public code has F - F/N, which is right for two)."""
    cluster = pytest.importorskip("sklearn.cluster")
    c = covariance(models * size, 2)
    rows = -zipit.compute_correlation(c).numpy()
    np.fill_diagonal(rows, 10)
    label = cluster.KMeans(size, random_state=3).fit(rows).labels_
    merge, unmerge = zipit.match_tensors_kmeans({"covariance": c}, 1 - 1 / models, random_state=3)
    assert unmerge.argmax(1).tolist() == label.tolist() and unmerge.shape == (models * size, size)
    assert torch.equal(merge, (unmerge / (unmerge.sum(0) + 1e-5)).T)


def test_kmeans_of_equal_rows_leaves_groups_empty():
    """All similarities NaN-free and equal: scikit-learn warns and finds fewer clusters; the matrices keep their size."""
    pytest.importorskip("sklearn")
    merge, unmerge = zipit.match_tensors_kmeans({"cossim": torch.zeros(2, 2)}, 0.5)
    assert unmerge.tolist() == [[1], [1]] and merge.shape == (1, 2)


def test_kmeans_draws_from_numpy():
    c = {"covariance": covariance(24, 3)}
    call("match_tensors_kmeans", c)
    found = []
    for _ in range(2):
        np.random.seed(5)
        found.append(zipit.match_tensors_kmeans(c)[1])
    assert torch.equal(*found)
    assert torch.equal(zipit.match_tensors_kmeans(c, random_state=5)[1], found[0])


@pytest.mark.parametrize("name", ALL)
def test_bias_inputs_and_further_keywords(name):
    c = covariance(12, 4, dead=2)
    metric, options = {"covariance": c.clone(), "mean": torch.ones(12)}, {"prune_threshold": 0.0, "debug": 1}
    if name.endswith("kmeans"):
        options["random_state"] = 0
    merge, unmerge = call(name, metric, **options)
    assert torch.equal(metric["covariance"], c) and list(metric) == ["covariance", "mean"]
    assert merge.dtype == unmerge.dtype == torch.float32 and merge.shape == (6, 12) and unmerge.shape == (12, 6)
    torch.testing.assert_close(merge.sum(1), unmerge.sum(0) / (unmerge.sum(0) + 1e-5))
    again, biased = call(name, metric, add_bias=True, **options)
    assert torch.equal(again, merge) and biased.shape == (14, 7)
    for m, block in enumerate(biased.chunk(2)):
        assert torch.equal(block[:6, :6], unmerge[6 * m : 6 * m + 6])
        assert block[6].tolist() == block[:, 6].tolist() == [0] * 6 + [1]


@pytest.mark.parametrize("name", ALL[1:])
def test_nan_and_infinity(name):
    sims = zipit.compute_correlation(covariance(8))
    sims[1, 6] = torch.nan
    sims[3, 3] = torch.nan  # of the diagonal: not read
    with pytest.raises(ValueError, match=rf"{name}: 'metric' must not give NaN, got one at \[1, 6\]"):
        call(name, {"cossim": sims})
    sims[1, 6] = 0.1
    assert call(name, {"cossim": sims})[1].shape == (8, 4)
    if name != "match_tensors_permute":
        sims[5, 2] = -torch.inf
        with pytest.raises(ValueError, match=rf"{name}: 'metric' must give finite similarities, got -inf at \[5, 2\]"):
            call(name, {"cossim": sims})


@pytest.mark.parametrize("name", ALL)
def test_messages(name):
    with pytest.raises(
        ValueError, match=rf"{name}: 'metric' must hold 'covariance', 'cossim' or 'corr.*got \['mean'\]"
    ):
        call(name, {"mean": torch.ones(4)})
    with pytest.raises(ValueError, match=rf"{name}: 'metric\[cossim\]' must be square \[F, F\], got \[3, 4\]"):
        call(name, {"cossim": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=rf"{name}: 7 features must divide among 2 models"):
        call(name, {"cossim": torch.zeros(7, 7)})
    with pytest.raises(ValueError, match=rf"{name}: 'r' must be in \[0, 1\), got 1"):
        call(name, {"cossim": torch.eye(4)}, 1)


def test_optimal_is_for_two_models():
    pytest.importorskip("networkx")
    with pytest.raises(ValueError, match=r"match_tensors_optimal: 'r' must be 0.5, .* use match_tensors_zipit"):
        zipit.match_tensors_optimal({"cossim": torch.eye(6)}, 2 / 3)


@pytest.mark.parametrize(
    "name, package, extra",
    [("permute", "scipy", "permute"), ("optimal", "networkx", "optimal"), ("kmeans", "sklearn", "kmeans")],
)
def test_missing_package(name, package, extra, monkeypatch):
    for module in [package, *(m for m in sys.modules if m.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"must be installed .*; pip install 'zipfast\[{extra}\]'"):
        getattr(zipit, f"match_tensors_{name}")({"cossim": torch.eye(4)})


# ------------------------------------------------------------------------------------------ the public code itself


@pytest.fixture(scope="module")
def public():
    with imported("ZIPFAST_ZIPIT", ["matching_functions"]) as modules:
        yield modules["matching_functions"]


def same(theirs, ours, where):
    assert len(theirs) == len(ours), where
    for x, y in zip(theirs, ours):
        assert type(x) is type(y), where
        if isinstance(x, torch.Tensor):
            assert x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y), where
        else:
            assert x == y, where


@pytest.mark.parametrize("models", [2, 3, 4])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_public_code(name, models, public):
    if models > 2 and name in ("match_tensors_optimal", "match_tensors_kmeans"):
        pytest.skip(f"{name} of the public code is for two models")
    for seed in range(25):
        size = 1 + (7 * seed) % (12 if name == "match_tensors_optimal" else 21)
        metric, where = {"covariance": covariance(models * size, seed, dead=seed % 4 * (size > 4))}, f"{seed}: {size}"
        options = {} if name.endswith("kmeans") else {"add_bias": seed % 2 == 1}
        if name == "match_tensors_optimal":
            options = {}  # the public code ignores add_bias there
        if name == "match_tensors_permute":
            options["get_merge_value"] = models == 2
        found = []
        for module in (public, zipit):
            np.random.seed(seed)
            found.append(getattr(module, name)({k: v.clone() for k, v in metric.items()}, 1 - 1 / models, **options))
        same(*found, where)
