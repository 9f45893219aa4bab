# SPDX-License-Identifier: Apache-2.0
"""The public ZipIt! code's metrics: against their formulas in float64, and that code itself where ZIPFAST_ZIPIT names it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkouts import imported

from zipfast.compat import zipit

CLOSE = 2e-6  # float32 products in zipfast.Moments and the rounding of the result; worst seen: 3.4e-7
UPSTREAM = 2e-5  # the public code's sums are float32 throughout; worst seen: 1.6e-6


def draw(sizes, models=2, features=5, positions=9, *, seed=0, mean=0.0, relu=False, dtype=torch.float32):
    """[(batch size, [features [D, s] of each model])]."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        common = torch.randn(features, size * positions, generator=g, dtype=torch.float64)
        x = [torch.randn(common.shape, generator=g, dtype=torch.float64) + 0.7 * common + mean for _ in range(models)]
        found.append((size, [(v.relu() if relu else v).to(dtype) for v in x]))
    return found


def run(kind, batches, *, shares=False):
    metric, total = kind(), sum(size for size, _ in batches)
    for size, feats in batches:
        metric.update(size, *([size / total] if shares else []), *feats)
    return metric.finalize() if shares else metric.finalize(total)


def weighted(batches):
    """outer, mean and std as the public code defines them, per image, in float64."""
    total, outer, mean, std = 0, 0.0, 0.0, 0.0
    for size, feats in batches:
        x = torch.cat([f.double() for f in feats])
        total += size
        outer = outer + size * (x @ x.T) / x.shape[1]
        mean = mean + size * x.mean(1)
        std = std + size * x.std(1)
    return outer / total, mean / total, std / total


def near(got, want, within=CLOSE):
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert float((got.double() - want).abs().max()) <= within * float(want.abs().max())


@pytest.mark.parametrize("models, features", [(1, 1), (2, 5), (3, 4), (2, 33)])
@pytest.mark.parametrize("sizes", [(4,), (4, 4, 2), (1, 7)])
@pytest.mark.parametrize("relu", [False, True])
def test_covariance(models, features, sizes, relu):
    batches = draw(sizes, models, features, relu=relu)
    outer, mean, _ = weighted(batches)
    got = run(zipit.CovarianceMetric, batches)
    near(got, outer - torch.outer(mean, mean))
    assert torch.equal(got, got.T) and bool((got.diagonal() >= 0).all())


def test_images_of_several_sizes_count_by_image():
    """Batches of 3 and 5 images, 9 and 64 positions each: B·XXᵀ/s weighs the images alike, not the positions."""
    batches = draw((3,), positions=9) + draw((5,), positions=64, seed=1, mean=2.0) + draw((2,), positions=9, seed=2)
    outer, mean, std = weighted(batches)
    want = outer - torch.outer(mean, mean)
    near(run(zipit.CovarianceMetric, batches), want)
    near(run(zipit.CorrelationMetric, batches), want / (torch.outer(std, std) + 1e-4))
    flat = torch.cat([torch.cat(f) for _, f in batches], 1).double()
    assert float((torch.cov(flat, correction=0) - want).abs().max()) > 0.1


@pytest.mark.parametrize("mean", [100.0, 1e3, 1e4])
def test_large_means_keep_the_variance(mean):
    """Where float32 sums of squares are off by 0.5 %, 36 % and 44 times, or negative."""
    batches = draw((32, 32), positions=16, mean=mean)
    x = torch.cat([torch.cat(f) for _, f in batches], 1).double()
    want = torch.cov(x, correction=0)
    got = run(zipit.CovarianceMetric, batches)
    assert float((got.double() - want).abs().max()) <= 1e-5 * float(want.max())


def test_dead_and_constant_features_have_rows_of_zeros():
    batches = draw((4, 4))
    for _, (a, b) in batches:
        a[1], b[2] = 0, 3.7
    got = run(zipit.CovarianceMetric, batches)
    for row in (1, 7):
        assert not got[row].any() and not got[:, row].any()
    correlation = zipit.compute_correlation(got)
    assert not correlation[1].any() and not bool(correlation.isnan().any())
    zipit.match_tensors_zipit({"covariance": got})


def test_nan_and_infinity_count_as_zero():
    batches, clean = draw((4, 4)), draw((4, 4))
    for k, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        batches[0][1][0][k, 5] = value
        clean[0][1][0][k, 5] = 0
    before = batches[0][1][0].clone()
    assert torch.equal(run(zipit.CovarianceMetric, batches), run(zipit.CovarianceMetric, clean))
    assert torch.equal(batches[0][1][0].nan_to_num(7), before.nan_to_num(7))  # the features are not changed
    for kind in (zipit.CorrelationMetric, zipit.CossimMetric):
        with pytest.raises(ValueError, match=f"space '{kind.__name__}' must be finite, got NaN or infinity in model 0"):
            run(kind, batches)


def test_double_features_give_double():
    batches = draw((4, 4), dtype=torch.float64)
    outer, mean, _ = weighted(batches)
    got = run(zipit.CovarianceMetric, batches)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, outer - torch.outer(mean, mean), rtol=0, atol=1e-13)


def test_another_numel_is_divided_by():
    """As the formula says, though it is no covariance then."""
    batches = draw((4, 4), mean=1.0)
    outer, mean, _ = weighted(batches)
    metric = zipit.CovarianceMetric()
    for size, feats in batches:
        metric.update(size, *feats)
    near(metric.finalize(10), 0.8 * outer - 0.64 * torch.outer(mean, mean))
    assert torch.equal(metric.finalize(8), run(zipit.CovarianceMetric, batches))  # and asking twice is no harm


def test_updates_after_a_result_add_to_it():
    batches = draw((4, 4, 2))
    metric = zipit.CovarianceMetric()
    for size, feats in batches[:2]:
        metric.update(size, *feats)
    metric.finalize(8)
    metric.update(2, *batches[2][1])
    outer, mean, _ = weighted(batches)
    near(metric.finalize(10), outer - torch.outer(mean, mean))


def test_mean_is_of_magnitudes():
    batches = draw((4, 4, 2))
    want = sum(size * torch.cat(f).double().abs().mean(1) for size, f in batches) / 10
    near(run(zipit.MeanMetric, batches), want)
    by_hand = zipit.MeanMetric()
    by_hand.update(1, torch.tensor([[1.0, -3.0]]), torch.tensor([[0.0, 5.0]]))
    assert by_hand.finalize(1).tolist() == [2, 2.5]


@pytest.mark.parametrize("shares", [False, True])
def test_correlation(shares):
    batches = draw((4, 4, 2), mean=1.0)
    outer, mean, std = weighted(batches)
    near(
        run(zipit.CorrelationMetric, batches, shares=shares),
        (outer - torch.outer(mean, mean)) / (torch.outer(std, std) + 1e-4),
    )


def test_correlation_eps():
    batches = draw((4, 4))
    outer, mean, std = weighted(batches)
    want = (outer - torch.outer(mean, mean)) / (torch.outer(std, std) + 0.5)
    one, other = zipit.CorrelationMetric(), zipit.CorrelationMetric()
    for size, feats in batches:
        one.update(size, 0.5, *feats)
        other.update(size, *feats)
    for got in (one.finalize(0.5), one.finalize(eps=0.5), other.finalize(8, 0.5), other.finalize(8, eps=0.5)):
        near(got, want)


@pytest.mark.parametrize("shares", [False, True])
def test_cossim(shares):
    batches, want = draw((4, 4, 2), mean=1.0), 0.0
    for size, feats in batches:
        x = torch.cat(feats).double().reshape(10, 9, size)
        x = x / x.norm(dim=-1, keepdim=True)
        want = want + size / 10 * torch.einsum("ips,jps->ij", x, x) / 9
    got = run(zipit.CossimMetric, batches, shares=shares)
    near(got, want)
    assert torch.equal(got, got.T)


def test_cossim_of_a_dead_feature_is_zero():
    """ReLU features are 0 in whole pieces, where the public code divides 0 by 0."""
    batches = draw((4, 4), relu=True)
    for _, feats in batches:
        feats[0][2] = 0
        feats[1][1, :8] = 0
    got = run(zipit.CossimMetric, batches)
    assert bool(torch.isfinite(got).all()) and not got[2].any() and not got[:, 2].any()
    pieces = torch.stack([feats[1][1].reshape(9, 4).any(1).float() for _, feats in batches])
    assert float(got[6, 6]) == pytest.approx(float(pieces.mean()), abs=1e-6) and not pieces[:, :2].any()
    zipit.match_tensors_zipit({"cossim": got})


@pytest.mark.parametrize("kind", [zipit.CorrelationMetric, zipit.CossimMetric])
def test_the_matchings_take_every_metric(kind):
    batches = draw((4, 4), features=8)
    metric = {kind.name: run(kind, batches)}
    assert zipit.match_tensors_zipit(metric)[1].shape == (16, 8)
    assert zipit.match_tensors_identity(metric)[1].shape == (16, 8)


def test_names():
    found = zipit.get_metric_fns(["covariance", "mean", "correlation", "cossim"])
    assert list(found) == ["covariance", "mean", "correlation", "cossim"]
    assert all(issubclass(kind, zipit.MetricCalculator) and kind.name == name for name, kind in found.items())
    with pytest.raises(NotImplementedError, match=r"'names' must be of mean, covariance, .*, got 'fisher'"):
        zipit.get_metric_fns(["fisher"])


def test_two_runs_are_equal_for_any_number_of_threads(threads):
    batches, found = draw((8, 8), features=40, positions=50), []
    for n in (1, 2):
        threads(n)
        found.append([run(kind, batches) for kind in (zipit.CovarianceMetric, zipit.CossimMetric)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


KINDS = [zipit.CovarianceMetric, zipit.MeanMetric, zipit.CorrelationMetric, zipit.CossimMetric]


@pytest.mark.parametrize("kind", KINDS)
def test_messages(kind):
    name, x = kind.__name__, torch.ones(3, 8)
    with pytest.raises(ValueError, match=f"{name}: 'finalize' must come after at least one 'update'"):
        kind().finalize(1)
    with pytest.raises(ValueError, match=f"{name}: features must be one tensor .* per model, got none"):
        kind().update(4)
    for wrong, got in (
        (torch.ones(2, 3, 4), r"float32 \[2, 3, 4\]"),
        (torch.ones(3, 0), r"float32 \[3, 0\]"),
        (torch.ones(3, 8).long(), r"int64 \[3, 8\]"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: features of model 1 must be .*, got {got}"):
            kind().update(4, x, wrong)
    metric = kind()
    metric.update(4, x, x + 1)
    with pytest.raises(ValueError, match=f"{name}: features must be as many in every batch, got 6, then 10"):
        metric.update(4, torch.ones(5, 8), torch.ones(5, 8))
    with pytest.raises(ValueError, match=f"{name}: 'numel' must be above 0, got 0"):
        metric.finalize(0)


@pytest.mark.parametrize("kind", [zipit.CovarianceMetric, zipit.CorrelationMetric, zipit.CossimMetric])
def test_messages_of_sums(kind):
    name, x = kind.__name__, torch.ones(3, 8)
    with pytest.raises(ValueError, match="must agree on the features"):
        kind().update(4, x, torch.ones(4, 8))
    with pytest.raises(
        ValueError, match=f"{name}: 'batch_size' must be above 0, got 0|must divide the 8 positions, got 0"
    ):
        kind().update(0, x)


def test_messages_of_the_two_ways():
    x = torch.ones(3, 8)
    for kind in (zipit.CorrelationMetric, zipit.CossimMetric):
        metric = kind()
        metric.update(4, x, x)
        with pytest.raises(ValueError, match=f"{kind.__name__}: 'numel' must be the sum of the batch sizes, got None"):
            metric.finalize()
        with pytest.raises(ValueError, match="must get a share of the data in every batch or in none, got both"):
            metric.update(4, 0.5, x, x)
    with pytest.raises(ValueError, match="CossimMetric: 'batch_size' must divide the 8 positions, got 3"):
        zipit.CossimMetric().update(3, x)
    metric = zipit.CovarianceMetric()
    metric.update(1, torch.full((2, 4), 1e30) * torch.tensor([[1.0], [-1.0]]) * torch.arange(4))
    with pytest.raises(ValueError, match="squares that can be summed, got overflow; rescale them"):
        metric.finalize(1)


# ------------------------------------------------------------------------------------------ the public code itself


@pytest.fixture(scope="module")
def public():
    with imported("ZIPFAST_ZIPIT", ["metric_calculators"]) as modules:
        yield modules["metric_calculators"]


@pytest.mark.parametrize("name, shares", [("Covariance", 0), ("Mean", 0), ("Correlation", 1), ("Cossim", 1)])
@pytest.mark.parametrize("models", [2, 3])
def test_equals_the_public_code(name, shares, models, public):
    for seed, (sizes, features) in enumerate([((4, 4, 2), 5), ((8,), 31), ((3, 1), 8), ((16, 16, 5), 64)]):
        for mean, relu in ((0.0, False), (0.0, True), (3.0, False)):
            batches = draw(sizes, models, features, seed=seed, mean=mean, relu=relu)
            if name == "Cossim" and relu:
                batches = [(size, [x + 0.01 for x in feats]) for size, feats in batches]  # it divides 0 by 0
            want = run(getattr(public, name + "Metric"), batches, shares=bool(shares))
            got = run(getattr(zipit, name + "Metric"), batches, shares=bool(shares))
            near(got, want.double(), UPSTREAM)


def test_the_whole_way_equals_the_public_code(public):
    """Features -> covariance -> groups: at least 99 % of the features in the same group, of 1500."""
    equal = total = 0
    for seed in range(6):
        for kind in ({}, {"relu": True}, {"mean": 3.0}):
            batches = draw((16, 16, 8), 2, 40, seed=seed, **kind)
            groups = [
                zipit.match_tensors_zipit({"covariance": run(m.CovarianceMetric, batches)}, a=0.5, b=0.5)[1].argmax(1)
                for m in (public, zipit)
            ]
            equal += int((groups[0] == groups[1]).sum())
            total += groups[0].numel()
    print(f"{equal} of {total} features in the same group")
    assert np.isclose(total, 1440) and equal >= 0.99 * total
