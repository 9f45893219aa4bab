# SPDX-License-Identifier: Apache-2.0
"""FeatureStats: the laws of the sums, plain NumPy, precision, late classes, ignored samples, files, memory, messages."""

from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import zipfast
from zipfast import Basis, FeatureStats, checkpoint
from zipfast.ranking.stats import CHUNK

# |Δscore| of float64 and float32 products. Worst seen: 2.6e-15; 7.3e-8 (bfloat16), and 5.2e-7 where a shift chosen by the
# first batch meets samples that are far from it (test_merging: 5 times the tolerance).
DOUBLE, SINGLE = 1e-12, 2e-7
MODES = ("exact", "corrected", "reference")


def draw(n=700, d=12, k=5, *, seed=0, mean=0.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(k, (n,), generator=g)
    y[:k] = torch.arange(k)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) + 0.5 * torch.randn(k, d, generator=g).double()[y] + mean
    return x.to(dtype), y


def gather(x, y, cuts=(), **options):
    stats = FeatureStats(**options)
    edges = [0, *cuts, x.shape[0]]
    for a, b in itertools.pairwise(edges):
        stats.update(x[a:b], y[a:b])
    return stats


def agree(a, b, tolerance=DOUBLE):
    assert (a.count, a.seen, a.features, a.outputs, a.task) == (b.count, b.seen, b.features, b.outputs, b.task)
    for one, other in ((a.gram(), b.gram()), (a.cross(), b.cross()), (a.square(), b.square())):
        assert_close(one, other, rtol=0, atol=10 * tolerance * float(other.abs().max()))
    for mode in MODES:
        assert abs(a.score(mode=mode) - b.score(mode=mode)) <= tolerance, mode


# ------------------------------------------------------------------------------------------ the sums


@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_sums_are_numpys(mean):
    x, y = draw(mean=mean)
    f, columns = x.numpy(), np.eye(5)[y.numpy()]
    stats = gather(x, y, (100, 101))
    assert (stats.count, stats.seen, stats.features, stats.outputs) == (700, 700, 12, 5)
    assert stats.device == x.device and stats.dtype == torch.float64
    size = (f * f).sum(0).max()
    np.testing.assert_allclose(stats.gram(), f.T @ f, rtol=0, atol=1e-14 * size)
    np.testing.assert_allclose(stats.cross(), f.T @ columns, rtol=0, atol=1e-13 * np.abs(f.T @ columns).max())
    assert stats.square().tolist() == columns.sum(0).tolist()
    np.testing.assert_allclose(stats.moments.mean(), f.mean(0), rtol=0, atol=1e-13 * max(1, mean))
    assert stats.gram().dtype == stats.cross().dtype == stats.square().dtype == torch.float64


def test_sums_of_values():
    x, _ = draw()
    y = torch.sin(x[:, :3]) + 2
    stats = gather(x, y, (5, 300), task="regression")
    assert_close(stats.cross(), x.T @ y, rtol=1e-12, atol=1e-10)
    assert_close(stats.square(), (y * y).sum(0), rtol=1e-13, atol=0)
    for mode in MODES:
        assert abs(stats.score(mode=mode) - zipfast.logme(x, y, task="regression", mode=mode)) <= DOUBLE
    one = gather(x, y[:, 0], (5, 300), task="regression")
    assert one.outputs == 1 and abs(one.score() - zipfast.logme(x, y[:, :1], task="regression")) <= DOUBLE


def test_readers_give_copies():
    x, y = draw()
    stats = gather(x, y)
    score, sums, summary = stats.score(), [stats.gram(), stats.cross(), stats.square()], stats.summary()
    before = [t.clone() for t in (*sums, summary.class_count)]
    stats.update(x + 1, y).flush()
    assert all(torch.equal(t, old) for t, old in zip((*sums, summary.class_count), before))
    for t in (stats.gram(), stats.cross(), stats.square()):
        t.zero_()
    assert abs(stats.score() - gather(torch.cat([x, x + 1]), torch.cat([y, y])).score()) <= DOUBLE
    assert score != stats.score()


def test_inputs_may_be_overwritten():
    x, y = draw()
    want = gather(x, y).score()
    stats, f, labels = FeatureStats(), torch.empty(100, 12, dtype=torch.float64), torch.empty(100, dtype=torch.int64)
    for i in range(0, 700, 100):  # a loader that fills one buffer
        stats.update(f.copy_(x[i : i + 100]), labels.copy_(y[i : i + 100]))
    assert abs(stats.score() - want) <= DOUBLE


# ------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, DOUBLE), (torch.float32, SINGLE)])
@pytest.mark.parametrize("mean", [0.0, 20.0])
@pytest.mark.parametrize("cuts", [(1,), (350,), (1, 2, 3, 5, 600), tuple(range(50, 2500, 50)), (CHUNK, CHUNK + 1)])
def test_batches_in_any_cut(cuts, mean, dtype, tolerance):
    x, y = draw(2500, mean=mean, dtype=dtype)
    agree(gather(x, y, cuts, precision="auto"), gather(x, y, precision="auto"), tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, DOUBLE), (torch.float32, 5 * SINGLE)])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_merging_commutes_and_associates(task, dtype, tolerance):
    """Shards far apart, so that each has a shift of its own; an empty one among them."""
    x, y = draw(900, dtype=dtype)
    x[300:600] += 5
    x[600:] -= 8
    y = y if task == "classification" else torch.stack([torch.sin(x[:, 0].double()), y.double()], 1)
    whole = gather(x, y, task=task, precision="auto")
    a, b, c = (gather(x[i : i + 300], y[i : i + 300], task=task, precision="auto") for i in (0, 300, 600))
    shifts = [part.flush().moments.shift for part in (a, b, c)]
    assert not torch.equal(shifts[0], shifts[1]) and not torch.equal(shifts[1], shifts[2])
    before = a.score()
    for total in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b), a.like().merge(b.merge(a)).merge(c)):
        agree(total, whole, tolerance)
        assert total.dtype == dtype
    assert a.count == 300 and a.score() == before
    for empty in (a.merge(a.like()), a.like().merge(a)):
        agree(empty, a, tolerance)
    agree(a.merge(b).update(x[600:], y[600:]), whole, tolerance)


def test_like_and_empty_ones():
    stats = FeatureStats(classes=7, ignore_index=-1, precision="auto", name="probe").update(*draw())
    twin = stats.like()
    assert (twin.count, twin.seen, twin.features, twin.outputs, twin.device) == (0, 0, 0, 7, None)
    assert (twin.classes, twin.ignore_index, twin.precision, twin.name) == (7, -1, "auto", "probe")
    both = twin.merge(stats.like())
    assert (both.count, both.outputs) == (0, 7) and both.all_reduce().count == 0
    merged = twin.merge(FeatureStats().update(*draw()))  # the options are those of the first
    assert (merged.classes, merged.ignore_index, merged.name, merged.outputs) == (7, -1, "probe", 7)
    for reader in (twin.score, twin.gram, twin.cross, twin.square, twin.summary, twin.spectrum):
        with pytest.raises(ValueError, match="probe: at least one sample is needed, got no samples"):
            reader()
    twin.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert twin.count == 0 and twin.dtype == torch.float64


# ------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("ratio", [10, 100, 1000])
@pytest.mark.parametrize("d", [12, 70])
def test_large_means(ratio, d):
    """The mean is so many standard deviations: float32 products are formed of what remains after a shift."""
    x, y = draw(3000, d, mean=float(ratio), dtype=torch.float32)
    want = gather(x.double(), y).score()
    rough, fine = (gather(x, y, (500, 1700), precision=p) for p in ("auto", "float64"))
    assert rough.dtype == torch.float32 and fine.dtype == torch.float64
    assert abs(rough.score() - want) <= 1e-6
    assert abs(fine.score() - want) <= 1e-10
    assert abs(zipfast.logme(x, y, precision="auto") - want) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.bool])
def test_narrow_features(dtype):
    x, y = draw(mean=0.3)
    x = (x * 4 if dtype == torch.int8 else x > 0.3 if dtype == torch.bool else x).to(dtype)
    want = zipfast.logme(x.double(), y)
    assert abs(gather(x, y, (300,)).score() - want) <= DOUBLE
    rough = gather(x, y, (300,), precision="auto")
    assert rough.dtype == (dtype if dtype.is_floating_point else torch.float64)
    assert abs(rough.score() - want) <= SINGLE


def test_dtypes_may_change():
    """A float16 batch before float32 ones must not narrow them."""
    x, y = draw()
    x = x.half().double()
    want = gather(x * 1e3, y).score()
    for first, second in itertools.permutations([torch.float16, torch.float32, torch.float64], 2):
        stats = FeatureStats(precision="auto")
        stats.update((x[:10] * 1e3).to(first), y[:10]).update((x[10:] * 1e3).to(second), y[10:])
        assert stats.dtype == torch.float32 and abs(stats.score() - want) <= 1e-4  # rounding of the inputs themselves
    one, other = gather(x.float(), y, precision="auto"), gather(x, y, precision="auto")
    assert one.merge(other).dtype == other.merge(one).dtype == torch.float32


# ------------------------------------------------------------------------------------------ labels


def test_late_classes():
    x, y = draw(900)
    order = y.argsort(stable=True)  # classes come one after the other
    stats = FeatureStats()
    for rows in order.split(40):
        stats.update(x[rows], y[rows])
        stats.flush()
    assert stats.outputs == 5 and abs(stats.score() - zipfast.logme(x, y)) <= DOUBLE
    early = gather(x[order], y[order], (200,), classes=5)
    agree(early, stats)
    few, more = gather(x[order[:300]], y[order[:300]]), gather(x[order[300:]], y[order[300:]])
    assert few.outputs < 5
    agree(few.merge(more), stats)
    agree(more.merge(few), stats)


def test_classes_without_samples():
    x, y = draw()
    stats = gather(x, y, classes=9)
    assert stats.square().tolist()[5:] == [0] * 4 and stats.outputs == 9
    with pytest.warns(UserWarning, match=r"FeatureStats: skipped 4 empty output\(s\), 5, 6, 7, 8: no sample"):
        assert abs(stats.score() - gather(x, y).score()) <= 1e-14
    with pytest.raises(ValueError, match=r"FeatureStats: every class must have samples .*, got none in 5, 6, 7, 8"):
        stats.score(empty="raise")
    assert stats.score(mode="reference") > gather(x, y).score() + 1


def test_ignored_samples_are_in_no_sum():
    x, y = draw()
    dirty, kept = torch.where(torch.arange(700) % 3 == 0, 255, y), torch.arange(700) % 3 != 0
    stats = gather(x, dirty, (50, 51), ignore_index=255)
    want = gather(x[kept], y[kept])
    assert (stats.count, stats.seen, stats.outputs) == (466, 700, 5)
    assert_close(stats.gram(), want.gram(), rtol=0, atol=1e-11)
    assert torch.equal(stats.square(), want.square())
    assert all(abs(stats.score(mode=m) - want.score(mode=m)) <= DOUBLE for m in MODES)
    assert abs(stats.summary().fourth - want.summary().fourth) <= 1e-9 * want.summary().fourth


def test_multilabel_equals_one_hot_classes():
    """The sums are the same numbers, so that the scores are to the bit; integers, for which sums in any order agree."""
    x, y = draw(n=900)
    x = (8 * x).round()
    one_hot = torch.nn.functional.one_hot(y).int()
    for mode in MODES:
        classes = gather(x, y, (77,)).score(mode=mode)
        assert gather(x, one_hot, (77,), task="multilabel").score(mode=mode) == classes
        assert gather(x, one_hot.double(), (78,), task="regression").score(mode=mode) == classes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n, d", [(40, 40), (30, 45), (40, 100)])
def test_fewer_samples_than_features(n, d, mode):
    x, y = draw(n, d, 3)
    want = Basis(x).score(y, mode=mode)
    found = gather(x, y, (7, 20)).evidence(mode)
    fine = torch.tensor([i not in want.perfect + found.perfect for i in range(3)])
    assert fine.any()
    assert_close(found.evidence[fine], want.evidence[fine], rtol=0, atol=1e-10)
    assert_close(found.alpha[fine], want.alpha[fine], rtol=1e-6, atol=0)
    assert abs(found.score - want.score) <= 1e-5  # of a perfect fit rounding decides


# ------------------------------------------------------------------------------------------ summary


def test_summary_is_numpys():
    """Also of merged shards with shifts of their own, whose fourth moments are moved to one centre."""
    x, y = draw(900, 6, 4)
    x[300:600] += 30
    x[600:] -= 200
    f, labels = x.numpy(), y.numpy()
    centred = f - f.mean(0)
    fourth = ((centred**2).sum(1) ** 2).sum()
    a, b, c = (gather(x[i : i + 300], y[i : i + 300], (100,)) for i in (0, 300, 600))
    for stats in (gather(x, y, (10,)), a.merge(b).merge(c), c.merge(b.merge(a)), a.like().merge(b).merge(c).merge(a)):
        found = stats.summary()
        assert found.count == 900
        np.testing.assert_allclose(found.mean, f.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, centred.T @ centred / 900, rtol=1e-10)
        assert found.class_count.tolist() == np.bincount(labels).tolist()
        np.testing.assert_allclose(found.class_mean, [f[labels == i].mean(0) for i in range(4)], rtol=1e-11)
        assert abs(found.fourth - fourth) <= 1e-11 * fourth
    rough = gather(x.float(), y, precision="auto").summary()
    assert abs(rough.fourth - fourth) <= 1e-5 * fourth
    same = torch.ones(5, 3, dtype=torch.float64)
    assert gather(same * 1e3, y[:5]).summary().fourth == 0


def test_other_scores_of_the_same_pass():
    x, y = draw()
    stats = gather(x, y, (100,))
    assert stats.score("logme", mode="corrected") == stats.evidence("corrected").score
    assert all(np.isfinite(stats.score(metric)) for metric in ("hscore", "reg_hscore", "lfc"))
    with pytest.raises(
        ValueError, match="FeatureStats: 'metric' must be one of logme, hscore, reg_hscore, lfc, got 'knn'"
    ):
        stats.score("knn")
    with pytest.raises(ValueError, match="'task' must be classification for metrics of classes, got 'regression'"):
        gather(x, x[:, 0], task="regression").score("hscore")


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("task", ["classification", "regression", "multilabel"])
def test_round_trip(tmp_path, task):
    x, y = draw(mean=9.0)
    y = {"classification": y, "regression": torch.sin(x[:, :2]), "multilabel": (x[:, :3] > 9).int()}[task]
    stats = gather(x[:400], y[:400], (3,), task=task)
    stats.save(tmp_path / "s.safetensors")
    state = stats.state_dict()
    for again in (FeatureStats.load(tmp_path / "s.safetensors"), FeatureStats.from_state_dict(state)):
        assert all(again.score(mode=m) == stats.score(mode=m) for m in MODES)
        assert (again.dtype, again.seen, again.name) == (stats.dtype, stats.seen, stats.name)
        before = stats.score()
        agree(again.update(x[400:], y[400:]), gather(x, y, (3, 400), task=task))
        assert stats.score() == before  # nothing is shared
    stats.update(x, y).flush()
    assert FeatureStats.from_state_dict(state).score() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_round_trip_of_an_empty_one(tmp_path):
    FeatureStats(classes=3, ignore_index=-1, precision="auto", name="n").save(tmp_path / "s.safetensors")
    again = FeatureStats.load(tmp_path / "s.safetensors")
    assert (again.count, again.classes, again.ignore_index, again.precision, again.name) == (0, 3, -1, "auto", "n")
    assert again.update(*draw(k=3)).count == 700


def test_files_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    stats = gather(*draw())
    stats.save(path)
    whole = path.read_bytes()
    for part in (b"", whole[:7], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"s\.safetensors cannot be read as plain tensors"):
            FeatureStats.load(path)
    checkpoint.save(path, {"weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"FeatureStats: 'format' must be 'zipfast\.feature_stats/1', got None"):
        FeatureStats.load(path)
    broken = "FeatureStats: the saved statistics must be whole, got none of "
    for key in ("cross", "moments.shift", "moments.bad"):
        state = stats.state_dict()
        del state["tensors"][key]
        with pytest.raises(ValueError, match=f"{broken}'{key.removeprefix('moments.')}'"):
            FeatureStats.from_state_dict(state)
    for group, key in [("numbers", "dtype"), ("options", "colour")]:
        state = stats.state_dict()
        state[group][key] = "red"
        with pytest.raises(ValueError, match=broken):
            FeatureStats.from_state_dict(state)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        FeatureStats.load(tmp_path / "none.safetensors")


# ------------------------------------------------------------------------------------------ memory


def test_memory_does_not_grow_with_samples():
    stats = FeatureStats()
    x, y = draw(CHUNK // 2, 8)
    for i in range(20):
        stats.update(x, y)
        assert stats._pending_rows < CHUNK and stats.count == (i + 1) * CHUNK // 2
    stats.flush()
    gc.collect()
    held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() >= CHUNK and t is not x]
    assert stats._pending == [] and not [t for t in held if t.shape[:1] == (CHUNK,)]
    numbers = sum(t.numel() for t in stats.state_dict()["tensors"].values())
    assert numbers <= 8 * 8 + 8 * 5 + 10 * 8 + 20


# ------------------------------------------------------------------------------------------ messages


def test_messages():
    x, y = draw()
    stats = FeatureStats(classes=5, name="probe").update(x, y)
    before = stats.score()
    for wrong, match in [
        ((x[:, :3], y), "probe: 'features' must have 12 columns as before, got 3"),
        ((x, y + 1), "probe: 'labels' must be below classes = 5, got 5"),
        ((x, y[:5]), r"probe: 'labels' must have one entry per row of the features \(700\), got 5"),
    ]:
        with pytest.raises(ValueError, match=match):
            stats.update(*wrong)
    assert stats.score() == before and stats.seen == 700
    values = FeatureStats("regression").update(x, x[:, :2])
    with pytest.raises(ValueError, match="FeatureStats: 'labels' must have 2 columns as before, got 3"):
        values.update(x, x[:, :3])
    with pytest.raises(
        ValueError, match="merge must get statistics of classification on 12 features, got regression on 12"
    ):
        stats.merge(values)
    with pytest.raises(ValueError, match=r"on 12 features, got classification on 3$"):
        stats.merge(FeatureStats().update(x[:, :3], y))
    with pytest.raises(ValueError, match="merge must get statistics of 2 targets, got 3"):
        values.merge(FeatureStats("regression").update(x, x[:, :3]))
    for options, match in [
        ({"task": "ranking"}, "'task' must be one of classification, regression, multilabel, got 'ranking'"),
        ({"precision": "half"}, "'precision' must be auto or float64, got 'half'"),
        ({"classes": 0}, "'classes' must be at least 1, got 0"),
        ({"task": "regression", "ignore_index": 0}, "'ignore_index' must be None for task='regression', got 0"),
    ]:
        with pytest.raises(ValueError, match=f"FeatureStats: {match}"):
            FeatureStats(**options)
