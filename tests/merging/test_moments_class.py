# SPDX-License-Identifier: Apache-2.0
"""`Moments`: the laws of merging, accuracy against two passes in float64, dead features, layouts and messages."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch.testing import assert_close

from zipfast import Moments
from zipfast.merging import update_all
from zipfast.merging.moments import _as_stored, correlate_all


def two_pass(*features, axis=1):
    """Mean, biased covariance and correlation of the stacked features, in float64; every channel must vary."""
    rows = torch.cat([x.movedim(axis, 0).reshape(x.shape[axis], -1).double() for x in features])
    mean = rows.mean(1)
    centred = rows - mean[:, None]
    covariance = centred @ centred.T / rows.shape[1]
    std = covariance.diagonal().sqrt()
    return mean, covariance, covariance / torch.outer(std, std)


def batch(*shape, seed=0, dtype=torch.float32, mean=0.0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)


def shift(moments):
    return moments.state_dict()["shift"]


def equal_state(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            x, y = (value, second[key]) if key != "comoment" else (value.triu(), second[key].triu())
            assert torch.equal(x, y), key
        else:
            assert value == second[key], key


def test_hand_computed():
    # Columns of (1, 2, 3, 4): itself, its negative, a constant, and a step.
    a = torch.tensor([[1.0, -1], [2, -2], [3, -3], [4, -4]])
    b = torch.tensor([[5.0, 0], [5, 0], [5, 1], [5, 1]])
    moments = Moments(2).update(a, b)
    assert moments.count == 4
    assert moments.features == 4
    assert moments.mean().tolist() == [2.5, -2.5, 5, 0.5]
    assert_close(moments.covariance()[0], torch.tensor([1.25, -1.25, 0, 0.5], dtype=torch.float64))
    step = 0.5 / (1.25 * 0.25) ** 0.5
    expected = torch.tensor([[1, -1, 0, step], [-1, 1, 0, -step], [0, 0, 0, 0], [step, -step, 0, 1]])
    assert_close(moments.correlation(), expected, atol=1e-7, rtol=0)


# ------------------------------------------------------------------------------------------ merge


def test_merge_law_float64_with_different_shifts():
    x = [batch(60, 5, seed=m, dtype=torch.float64) for m in range(2)]
    y = [batch(45, 5, seed=m + 2, dtype=torch.float64, mean=5.0, std=0.7) for m in range(2)]
    a, b = Moments(2).update(*x), Moments(2).update(*y)
    assert not torch.equal(shift(a), shift(b))
    merged, whole = Moments.merge(a, b), Moments(2).update(*x).update(*y)
    assert merged.count == whole.count == 105
    assert_close(merged.mean(), whole.mean(), atol=1e-12, rtol=1e-12)
    assert_close(merged.covariance(), whole.covariance(), atol=1e-12, rtol=1e-12)
    wanted = two_pass(*[torch.cat(pair) for pair in zip(x, y)])[2]
    for side in (merged, Moments.merge(b, a), whole):
        assert_close(side.correlation(dtype=torch.float64), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_law_with_one_shift(dtype):
    x = [batch(300, 4, 3, seed=m, mean=3.0, dtype=dtype) for m in range(2)]
    y = [batch(41, 4, 3, seed=m + 2, mean=3.0, dtype=dtype) for m in range(2)]
    a = Moments(2).update(*x)
    b = a.like().update(*y)
    assert torch.equal(shift(a), shift(b)) and shift(a).any()
    merged, whole = a.merge(b), a.like().update(*x).update(*y)
    assert_close(merged.covariance(), whole.covariance(), atol=1e-12, rtol=1e-12)
    assert_close(merged.correlation(dtype=torch.float64), whole.correlation(dtype=torch.float64), atol=1e-12, rtol=0)


def test_merge_float32_with_shifts_of_their_own():
    x, y = batch(500, 6, seed=0, mean=4.0), batch(500, 6, seed=1, mean=0.5)
    merged = Moments(1).update(x).merge(Moments(1).update(y))
    assert_close(merged.correlation(), two_pass(torch.cat([x, y]))[2].float(), atol=5e-7, rtol=0)


def test_merge_with_an_empty_one_and_leaves_its_parts():
    x = batch(30, 4, mean=7.0)
    full, empty = Moments(2, name="stem").update(x, x + 1), Moments(2, name="stem")
    before = full.state_dict()
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in before.items()}
    for merged in (full.merge(empty), empty.merge(full), full.merge(full.like()), full.like().merge(full)):
        assert merged.count == 30 and merged.name == "stem"
        assert torch.equal(merged.covariance(), full.covariance())
    assert empty.merge(empty).count == 0
    full.merge(full)
    assert empty.count == 0 and empty.features == 0
    for key, value in before.items():
        assert torch.equal(value, full.state_dict()[key]) if isinstance(value, torch.Tensor) else True, key


def test_merge_is_associative_over_many_workers():
    parts = [batch(20, 3, seed=s, dtype=torch.float64, mean=s) for s in range(6)]
    workers = [Moments(1).update(p) for p in parts]
    left = workers[0]
    for w in workers[1:]:
        left = left.merge(w)
    right = workers[-1]
    for w in reversed(workers[:-1]):
        right = w.merge(right)
    assert_close(left.covariance(), right.covariance(), atol=1e-12, rtol=1e-12)
    assert_close(left.covariance(), two_pass(torch.cat(parts))[1], atol=1e-12, rtol=1e-12)


def test_merge_reports_what_either_part_saw():
    x, bad = batch(4, 3), batch(4, 3)
    bad[1, 2] = torch.inf
    broken = Moments(1, name="b")
    with pytest.raises(ValueError, match="finite"):
        broken.update(bad)
    for merged in (Moments(1).update(x).merge(broken), broken.merge(Moments(1).update(x))):
        with pytest.raises(ValueError, match="feature 2, first at sample 1"):
            merged.covariance()


# ------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize("shape, axis", [((700, 6), 1), ((40, 6, 5, 7), 1), ((9, 11, 6), -1), ((6, 333), 0)])
def test_agrees_with_two_passes(shape, axis):
    a, b = batch(*shape, seed=1), batch(*shape, seed=2)
    b = 0.6 * a + 0.8 * b
    moments = Moments(2)
    for part_a, part_b in zip(a.tensor_split(3, 1 if axis == 0 else 0), b.tensor_split(3, 1 if axis == 0 else 0)):
        moments.update(part_a, part_b, axis=axis)
    mean, covariance, correlation = two_pass(a, b, axis=axis)
    assert moments.count == a.numel() // 6
    assert_close(moments.mean(), mean, atol=1e-6, rtol=0)
    assert_close(moments.covariance(), covariance, atol=1e-6, rtol=0)
    assert_close(moments.correlation(), correlation.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("std", [1.0, 1e-3, 300.0])
def test_large_means(std):
    """Mean/std from 0 to 1000, where uncentred float32 sums lose variances by 36%."""
    ratio = torch.tensor([0.0, 1, 2, 10, -30, 100, 333.3, 1000, -1000])
    noise = batch(4096, 9, seed=3)
    noise[:, 1:] += 0.8 * noise[:, :1]
    x = (ratio + noise) * std
    moments = Moments(1)
    for part in x.split(512):
        moments.update(part)
    assert_close(moments.correlation(), two_pass(x)[2].float(), atol=1e-6, rtol=0)


def test_mean_may_drift_after_the_first_batch():
    parts = [batch(256, 4, seed=s, dtype=torch.float64, mean=10.0 * s) for s in range(4)]
    moments = Moments(1)
    for part in parts:
        moments.update(part)
    assert_close(moments.covariance(), two_pass(torch.cat(parts))[1], atol=0, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype):
    a = batch(64, 5, 4, 4, seed=0, dtype=dtype, mean=2.0)
    b = (0.5 * a.double() + batch(64, 5, 4, 4, seed=1, dtype=torch.float64)).to(dtype)
    assert_close(Moments(2).update(a, b).correlation(), two_pass(a, b)[2].float(), atol=2e-6, rtol=0)


def test_symmetric_to_the_bit_and_within_one():
    a = batch(513, 20, seed=0, mean=1.0)
    moments = Moments(2).update(a, a[:, torch.randperm(20, generator=torch.Generator().manual_seed(0))])
    covariance, correlation = moments.covariance(), moments.correlation()
    assert torch.equal(covariance, covariance.T)
    assert torch.equal(correlation, correlation.T)
    assert correlation.abs().max() <= 1
    assert covariance.diagonal().min() >= 0
    assert_close(correlation.diagonal(), torch.ones(40), atol=1e-6, rtol=0)
    assert moments.correlation(dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_features_are_exact_zeros(dtype):
    x = batch(200, 8, dtype=dtype)
    constants = [0.0, 3.7, 1e4 + 1 / 3, -1e-3]
    x[:, 2:6] = torch.tensor(constants, dtype=dtype)
    x[:, 6] = 1000 * (1 + 2.0**-20 * x[:, 6].sign())  # varies by less than 2^-18 of the mean: rounding
    x[:, 7] = 1000 * (1 + 2.0**-12 * x[:, 7].sign())
    correlation = Moments(1).update(x[:70]).update(x[70:]).correlation()
    for dead in range(2, 7):
        assert (correlation[dead] == 0).all() and (correlation[:, dead] == 0).all(), dead
    alive = [0, 1, 7]
    assert_close(correlation[alive][:, alive], two_pass(x[:, alive])[2].float(), atol=1e-6, rtol=0)


def test_zeros_after_relu_stay_exact():
    """A channel that is zero but for few samples keeps shift 0, and one that is always on does not."""
    x = batch(1000, 3, seed=5).relu()
    x[:, 1] += 50
    moments = Moments(1).update(x)
    chosen = shift(moments)
    assert chosen[0] == 0 and chosen[2] == 0 and abs(chosen[1] - x[:, 1].mean()) < x[:, 1].std() / 2
    assert torch.equal(chosen, chosen.float().double())


def test_empty_first_batch_does_not_spoil_the_shift():
    x = batch(2048, 3, mean=1000.0)
    moments = Moments(1).update(x[:0]).update(x)
    assert_close(moments.correlation(), two_pass(x)[2].float(), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------ layouts


def test_channels_last_is_read_as_it_lies():
    a, b = batch(6, 5, 4, 3, seed=0, mean=9.0), batch(6, 5, 4, 3, seed=1)
    last = [x.contiguous(memory_format=torch.channels_last) for x in (a, b)]
    stored, axis = _as_stored(Moments(2), last, 1)
    assert axis == 3
    assert [s.data_ptr() for s in stored] == [x.data_ptr() for x in last]
    assert all(s.is_contiguous() for s in stored)
    equal_state(Moments(2).update(a, b), Moments(2).update(*last))


def test_other_strides():
    a = batch(6, 5, 8, 3)
    wanted = Moments(1).update(a).covariance()
    assert_close(Moments(1).update(a.movedim(1, 2), axis=2).covariance(), wanted, atol=1e-6, rtol=0)
    wide = torch.randn(6, 5, 8, 6)
    wide[..., ::2] = a
    assert torch.equal(Moments(1).update(wide[..., ::2]).covariance(), wanted)
    mixed = [a, a.contiguous(memory_format=torch.channels_last)]
    assert torch.equal(Moments(2).update(*mixed).covariance(), Moments(2).update(a, a).covariance())


def test_axis_by_negative_index():
    x = batch(7, 3, 4)
    equal_state(Moments(1).update(x, axis=-1), Moments(1).update(x, axis=2))


def test_vectors_along_axis_0():
    x = batch(4, 50)
    assert_close(Moments(1).update(x, axis=0).covariance(), two_pass(x, axis=0)[1], atol=1e-6, rtol=0)


def test_update_all_equals_one_by_one():
    x, y = batch(8, 3, 2, 2), batch(8, 5, seed=1)
    together = [Moments(2, name="x"), Moments(2, name="y")]
    update_all(together, [[x, -x], [y, y + 1]], [1, 1])
    update_all(together, [[x + 1, x], [y, y]], [1, -1 if y.dim() == 2 else 1])
    equal_state(together[0], Moments(2, name="x").update(x, -x).update(x + 1, x))
    equal_state(together[1], Moments(2, name="y").update(y, y + 1).update(y, y))


def test_correlate_all_equals_one_by_one():
    x = batch(50, 5)
    x[:, 1:3] = 2.0
    spaces = [Moments(1, name="a").update(x), Moments(2, name="b").update(x, batch(50, 5, seed=1))]
    assert correlate_all([]) == []
    for options in ({}, {"dtype": torch.float64}, {"dtype": torch.float16}, {"pair_dead": True}):
        for together, alone in zip(correlate_all(spaces, **options), spaces):
            assert together.dtype == options.get("dtype", torch.float32)
            assert torch.equal(together, alone.correlation(**options))
    with pytest.raises(ValueError, match="at least one feature of space 'second' must vary, got 3 dead"):
        correlate_all([*spaces, Moments(1, name="second").update(torch.ones(4, 3)), *spaces])
    with pytest.raises(ValueError, match="'third' must have seen at least 2 samples, got 0"):
        correlate_all([*spaces, Moments(1, name="third")])


def test_inputs_are_unchanged_and_gradients_are_not_tracked():
    x = batch(10, 3, mean=5.0).requires_grad_()
    copy = x.detach().clone()
    moments = Moments(1).update(x)
    assert torch.equal(x.detach(), copy)
    assert not moments.correlation().requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_independent_of_threads(dtype):
    """The whole class, the choice of the shift included."""
    a, b = batch(64, 24, 12, 12, seed=0, dtype=dtype, mean=2.0), batch(64, 24, 12, 12, seed=1, dtype=dtype, mean=30.0)
    wide = batch(1, 1, 256, 256, dtype=dtype, mean=2.0)
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            seen.append((Moments(2).update(a, b).update(b, a), Moments(1).update(wide)))
    finally:
        torch.set_num_threads(threads)
    for pair in seen[1:]:
        for first, other in zip(seen[0], pair):
            equal_state(first, other)
            assert torch.equal(first.correlation(), other.correlation())


def test_shift_on_a_rounding_boundary_is_independent_of_threads():
    """One large map of one channel, its mean within a few ulps of the middle between two candidates."""
    threads, middle = torch.get_num_threads(), 4 + 2.0**-6
    try:
        for seed in range(60):
            x = 0.1 * batch(1, 1, 192, 192, seed=seed, dtype=torch.float64)
            torch.set_num_threads(1)
            x = x - torch.var_mean(x.reshape(1, -1), 1)[1] + middle
            chosen = []
            for n in (1, 2):
                torch.set_num_threads(n)
                chosen.append(shift(Moments(1).update(x)).item())
            assert len(set(chosen)) == 1, f"seed {seed}: {chosen}"
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------ state


def test_state_round_trip():
    moments = Moments(2, name="layer 1").update(batch(9, 3, mean=4.0), batch(9, 3, seed=1))
    file = io.BytesIO()
    torch.save(moments.state_dict(), file)
    file.seek(0)
    restored = Moments.from_state_dict(torch.load(file, weights_only=True))
    equal_state(moments, restored)
    assert torch.equal(moments.correlation(), restored.correlation())
    more = batch(5, 3, seed=2)
    equal_state(moments.update(more, more), restored.update(more, more))


def test_state_of_an_empty_one():
    restored = Moments.from_state_dict(Moments(3, name="x").state_dict())
    assert (restored.models, restored.name, restored.count, restored.features) == (3, "x", 0, 0)


def test_restored_state_is_a_copy():
    moments = Moments(1).update(batch(9, 3))
    before = moments.covariance()
    Moments.from_state_dict(moments.state_dict()).update(batch(9, 3, seed=1))
    assert torch.equal(moments.covariance(), before)


def test_state_of_another_format():
    with pytest.raises(ValueError, match=r"Moments: 'format' must be 'zipfast.moments/1', got 'other'"):
        Moments.from_state_dict({"format": "other"})


def test_like_is_empty_and_keeps_shift_and_name():
    moments = Moments(2, name="x").update(batch(9, 3, mean=8.0), batch(9, 3))
    other = moments.like()
    assert (other.models, other.name, other.count, other.features) == (2, "x", 0, 6)
    assert torch.equal(shift(other), shift(moments))
    assert Moments(2).like().features == 0


# ------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_not_finite_names_model_space_sample_feature(value, dtype):
    good = batch(5, 4, 3, dtype=dtype)
    bad = good.clone()
    bad[2, 1, 0] = value  # sample 5 * 3 + 2 * 3 + 0 of two batches
    bad[3, 0, 0] = value
    moments = Moments(3, name="stages.0").update(good, good, good)
    with pytest.raises(
        ValueError,
        match=r"of space 'stages.0' must be finite, got NaN or infinity in model 1, feature 1, first at sample 21",
    ):
        moments.update(good, bad, good)
    with pytest.raises(ValueError, match="must be finite"):
        moments.correlation()


def test_not_finite_of_one_space_in_many():
    x, bad = batch(5, 4), batch(5, 4)
    bad[4, 3] = torch.nan
    with pytest.raises(ValueError, match=r"space 'second'.*model 0, feature 3, first at sample 4"):
        update_all([Moments(1, name="first"), Moments(1, name="second")], [[x], [bad]], [1, 1])


@pytest.mark.parametrize("models", [0, -1])
def test_wrong_number_of_models(models):
    with pytest.raises(ValueError, match=f"Moments: 'models' must be at least 1, got {models}"):
        Moments(models)


def test_too_few_samples():
    with pytest.raises(ValueError, match="'conv' must have seen at least 1 sample, got 0"):
        Moments(1, name="conv").mean()
    with pytest.raises(ValueError, match="'conv' must have seen at least 1 sample, got 0"):
        Moments(1, name="conv").update(torch.zeros(0, 3)).covariance()
    one = Moments(1, name="conv").update(torch.ones(1, 3))
    assert one.mean().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="'conv' must have seen at least 2 samples, got 1"):
        one.correlation()


def test_all_dead():
    moments = Moments(2, name="conv").update(torch.full((9, 3), 5.0), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="at least one feature of space 'conv' must vary, got 6 dead or constant ones"):
        moments.correlation()


def test_too_large():
    x = batch(9, 2, dtype=torch.float64) * 1e200
    with pytest.raises(ValueError, match="space 'big' are too large"):
        Moments(1, name="big").update(x).correlation()


def test_wrong_tensors():
    x = batch(4, 3)
    with pytest.raises(ValueError, match="space 'conv' must get 2 tensors, got 1"):
        Moments(2, name="conv").update(x)
    with pytest.raises(
        ValueError, match=r"agree on the features of space 'conv', got \[4, 3\] in model 0 and \[4, 2\]"
    ):
        Moments(2, name="conv").update(x, x[:, :2])
    with pytest.raises(ValueError, match=r"'axis' must be in \[-2, 2\), got 2"):
        Moments(1).update(x, axis=2)
    with pytest.raises(ValueError, match=r"'axis' must be in \[-2, 2\), got -3"):
        Moments(1).update(x, axis=-3)
    with pytest.raises(ValueError, match="space 'conv' must have 3 features per model, got 2"):
        Moments(1, name="conv").update(x).update(x[:, :2])
    with pytest.raises(TypeError, match=r"'features\[1\]' must be float32 as the first one, got float64"):
        Moments(2).update(x, x.double())
    with pytest.raises(TypeError, match=r"'features\[0\]' must be float32.*got int64"):
        Moments(1).update(torch.ones(4, 3, dtype=torch.int64))


def test_merge_of_others():
    x = batch(4, 3)
    with pytest.raises(ValueError, match="'other' must have 1 models and 3 stacked features, got 1 and 2"):
        Moments(1).update(x).merge(Moments(1).update(x[:, :2]))
    with pytest.raises(ValueError, match="'other' must have 2 models and 6 stacked features, got 1 and 3"):
        Moments(2).update(x, x).merge(Moments(1).update(x))


def test_a_refused_batch_changes_nothing():
    x = batch(4, 3)
    moments = Moments(2).update(x, x)
    before = Moments.from_state_dict(moments.state_dict())
    for wrong in ((x,), (x, x[:2]), (x, x.double())):
        with pytest.raises((ValueError, TypeError)):
            moments.update(*wrong)
    equal_state(moments, before)


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Moments(2).update(batch(4, 3), torch.zeros(4, 3)).correlation()
