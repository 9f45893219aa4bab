# SPDX-License-Identifier: Apache-2.0
"""The matchings that `match` is compared with: definitions by brute force or replay, ties, dead units and messages."""

from __future__ import annotations

import itertools
import sys
import warnings

import pytest
import torch

from zipfast import Groups, match, match_permutation
from zipfast.merging import match_greedy_permutation, match_identity, match_kmeans, match_optimal

NEW = [match_greedy_permutation, match_optimal, match_kmeans]


def correlations(models, size, seed=0, samples=200, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, models * size, generator=generator, dtype=torch.float64)
    x[:, 1:] += 0.5 * x[:, :-1]
    return symmetric(torch.corrcoef(x.T).to(dtype).reshape(models * size, models * size))


def symmetric(s):
    return torch.triu(s) + torch.triu(s, 1).T


def table(size, entries, dtype=torch.float32):
    """Symmetric with ones on the diagonal, the given entries, and zeros."""
    sim = torch.eye(size, dtype=dtype)
    for (i, j), v in entries.items():
        sim[i, j] = sim[j, i] = v
    return sim


def nasty(models, size, seed, dtype=torch.float32):
    """Correlations; rounded, so that there are ties, or with dead features, by the seed."""
    sim = correlations(models, size, seed, samples=12, dtype=dtype)
    if seed % 2:
        sim = (sim * 3).round() / 3
    if seed % 3 == 0:
        for dead in (0, models * size - 1, models * size // 2):
            sim[dead, :] = sim[:, dead] = 0
    return sim


def same(a, b):
    return torch.equal(a.index, b.index) and torch.equal(a.pair, b.pair) and torch.equal(a.value, b.value)


def ordered(groups):
    """Whether groups are numbered by their lowest member."""
    first = [groups.index.tolist().index(g) for g in range(groups.keep)]
    return first == sorted(first)


# ------------------------------------------------------------------------------------------ identity and permutation


def test_identity():
    groups = match_identity(3, 4)
    assert groups.index.tolist() == [0, 1, 2, 3] * 3
    assert groups.is_permutation and groups.value.numel() == 0 and groups.pair.shape == (0, 2)


@pytest.mark.parametrize("models, size", [(2, 1), (2, 3), (2, 5), (3, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_permutation_is_the_best_of_all(models, size, seed):
    sim = correlations(models, size, seed, samples=8)
    groups = match_permutation(sim, models)
    assert groups.is_permutation
    assert groups.of_model(0).tolist() == list(range(size))
    for m in range(1, models):
        block = sim[:size, m * size : (m + 1) * size].double()
        best = max(sum(float(block[i, p[i]]) for i in range(size)) for p in itertools.permutations(range(size)))
        total = sum(float(block[g, k]) for k, g in enumerate(groups.of_model(m).tolist()))
        assert total == pytest.approx(best, abs=1e-12)


def test_permutation_leaves_its_input_and_needs_no_symmetry():
    sim = correlations(2, 5).requires_grad_()
    copy = sim.detach().clone()
    wanted = match_permutation(sim).index
    assert torch.equal(sim.detach(), copy)
    other = sim.detach().clone()
    other[5:] = torch.nan  # only the block between model 0 and 1 is read
    assert torch.equal(match_permutation(other).index, wanted)


def test_permutation_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"scipy must be installed.*pip install 'zipfast\[permute\]'"):
        match_permutation(torch.eye(4))
    assert match(torch.eye(4)).keep == 2  # zip does not need it


@pytest.mark.parametrize("wrong, models", [(torch.zeros(4, 6), 2), (torch.zeros(5, 5), 2), (torch.zeros(4), 2)])
def test_permutation_of_wrong_shapes(wrong, models):
    with pytest.raises(ValueError, match=r"match_permutation: 'correlation' must be square \[M\*D, M\*D\] with M = 2"):
        match_permutation(wrong, models)


def test_permutation_of_nan_names_the_place():
    sim = correlations(2, 3)
    sim[1, 4] = torch.nan
    with pytest.raises(ValueError, match=r"match_permutation: 'correlation'.*\[1, 4\]"):
        match_permutation(sim)


# ------------------------------------------------------------------------------------------ all new ones


@pytest.mark.parametrize("function", NEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hand_computed_by_all(function, dtype):
    sim = table(4, {(0, 2): 0.9, (1, 3): 0.8, (0, 1): 0.1, (0, 3): 0.2, (1, 2): 0.3, (2, 3): 0.4}, dtype)
    groups = function(sim)
    assert isinstance(groups, Groups)
    assert groups.index.tolist() == [0, 1, 0, 1]
    assert groups.index.dtype == torch.int64 and groups.index.device.type == "cpu"
    assert (groups.models, groups.keep, groups.size, groups.lifted) == (2, 2, 2, 0)


@pytest.mark.parametrize("function", NEW)
def test_inputs_stay_and_runs_agree(function):
    sim = correlations(2, 9, 1)
    wanted = function(sim)
    for diagonal in (-5.0, 0.0, torch.inf, torch.nan):  # the diagonal is ignored
        other = sim.clone().fill_diagonal_(diagonal)
        copy = other.clone()
        assert same(function(other), wanted)
        torch.testing.assert_close(other, copy, rtol=0, atol=0, equal_nan=True)
    strided = torch.zeros(36, 36)
    strided[::2, ::2] = sim
    assert same(function(strided[::2, ::2]), wanted)
    assert same(function(sim.clone().requires_grad_()), wanted)
    assert torch.equal(function(sim.double()).index, wanted.index)


@pytest.mark.parametrize("function", NEW)
def test_recover_a_permutation(function):
    generator = torch.Generator().manual_seed(3)
    a, order = torch.randn(400, 21, generator=generator), torch.randperm(21, generator=generator)
    sim = symmetric(torch.corrcoef(torch.cat([a, a[:, order] * 3 + 1], 1).T))
    assert function(sim).index.tolist() == [*range(21), *order.tolist()]


@pytest.mark.parametrize("function", NEW)
@pytest.mark.parametrize("wrong, got", [(torch.zeros(4, 6), r"\[4, 6\]"), (torch.zeros(4), r"\[4\]"), ("s", "str")])
def test_not_square(function, wrong, got):
    wrong = [wrong] if wrong == "s" and function is match_greedy_permutation else wrong
    message = rf"^{function.__name__}: 'similarity' of space #0 must be square \[F, F\], got {got}"
    with pytest.raises(ValueError, match=message):
        function(wrong)


@pytest.mark.parametrize("function, size, models", [(f, n, 2) for f in NEW for n in (0, 5)] + [(f, 4, 0) for f in NEW])
def test_not_divisible(function, size, models):
    message = rf"^{function.__name__}: .*must stack {models} models of equal size, got {size} features"
    if models != 2 and function is match_optimal:
        message = "must be 2"
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(size, size), models)


@pytest.mark.parametrize("function", NEW)
def test_wrong_dtype(function):
    with pytest.raises(TypeError, match=rf"^{function.__name__}: .*must be float32 or float64, got float16"):
        function(torch.eye(4, dtype=torch.float16))


@pytest.mark.parametrize("function", NEW)
def test_nan_is_named(function):
    sim = correlations(2, 3)
    sim[1, 5] = sim[5, 1] = torch.nan
    sim[0, 0] = torch.nan
    message = rf"^{function.__name__}: 'similarity' of space #0 must not hold NaN, got one at \[1, 5\]"
    with pytest.raises(ValueError, match=message):
        function(sim)


@pytest.mark.parametrize("function", NEW)
def test_asymmetry_is_named(function):
    sim = correlations(2, 3)
    sim[4, 2] += 0.25
    message = rf"^{function.__name__}: .*must be symmetric, got different values at \[2, 4\] and \[4, 2\].*torch.triu"
    with pytest.raises(ValueError, match=message):
        function(sim)


@pytest.mark.parametrize("function", [match_optimal, match_kmeans])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity_is_named(function, value):
    sim = table(6, {(2, 4): value})
    with pytest.raises(ValueError, match=rf"^{function.__name__}: .*must be finite, got {value} at \[2, 4\]"):
        function(sim)


@pytest.mark.parametrize(
    "function, module, message",
    [
        (match_optimal, "networkx", r"match_optimal: networkx must be installed.*pip install 'zipfast\[optimal\]'"),
        (match_kmeans, "sklearn.cluster", r"match_kmeans: scikit-learn must be.*pip install 'zipfast\[kmeans\]'"),
    ],
)
def test_without_the_package(monkeypatch, function, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        function(torch.eye(4))
    assert match_greedy_permutation(torch.eye(4)).keep == 2  # needs neither


# ------------------------------------------------------------------------------------------ greedy permutation


def replay(sim, models):
    """The definition in plain loops: (index, pairs, values)."""
    size = sim.shape[0] // models
    groups = [[f] for f in range(size)]
    pairs, values = [], []
    for m in range(1, models):
        score = {
            (g, k): min(float(sim[f, k]) for f in groups[g])
            for g in range(size)
            for k in range(m * size, (m + 1) * size)
        }
        while score:
            g, k = min(score, key=lambda p: (-score[p], p))
            pairs.append([g, k])
            values.append(score[g, k])
            groups[g].append(k)
            score = {p: v for p, v in score.items() if p[0] != g and p[1] != k}
    index = [next(g for g in range(size) if f in groups[g]) for f in range(models * size)]
    return index, pairs, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("models", [1, 2, 3, 4])
def test_greedy_replays_the_definition(models, seed, dtype):
    sim = nasty(models, 2 + seed, seed, dtype)
    groups = match_greedy_permutation(sim, models)
    index, pairs, values = replay(sim, models)
    assert groups.index.tolist() == index
    assert groups.pair.tolist() == pairs
    assert groups.value.tolist() == values and groups.value.dtype == dtype
    assert groups.is_permutation and groups.lifted == 0


@pytest.mark.parametrize("size", [1, 2, 7, 32, 65])
@pytest.mark.parametrize("seed", range(6))
def test_greedy_of_two_models_is_match_without_budget(size, seed):
    sim = nasty(2, size, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(match_greedy_permutation(sim), match(sim, 2, beta=0.0))


def test_greedy_is_a_permutation_where_match_lifts_its_budget():
    lifted = 0
    for seed in range(6):
        sim = correlations(3, 8, seed, samples=10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            lifted += match(sim, 3, beta=0.0).lifted
        assert match_greedy_permutation(sim, 3).is_permutation
    assert lifted > 0


def test_greedy_by_hand_three_models():
    """Feature 5 is closest to group 0 by its member 0, but not by its member 3: complete linkage sends it to group 1."""
    sim = table(6, {(0, 3): 0.9, (1, 2): 0.1, (0, 5): 0.8, (3, 5): 0.2, (1, 5): 0.6, (2, 5): 0.7})
    groups = match_greedy_permutation(sim, 3)
    assert groups.index.tolist() == [0, 1, 1, 0, 0, 1]
    assert groups.pair.tolist() == [[0, 3], [1, 2], [1, 5], [0, 4]]
    assert torch.equal(groups.value, torch.tensor([0.9, 0.1, 0.6, 0.0]))


@pytest.mark.parametrize("models", [2, 3, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, torch.inf])
def test_greedy_ties_take_the_lowest_index(models, value):
    groups = match_greedy_permutation(torch.full((models * 5, models * 5), value), models)
    assert groups.index.tolist() == [*range(5)] * models
    assert groups.pair.tolist() == [[k, m * 5 + k] for m in range(1, models) for k in range(5)]


def test_greedy_dead_features_take_what_is_left():
    sim = table(8, {(0, 6): 0.5, (3, 4): 0.4})  # 1, 2 and 5, 7 are dead
    assert match_greedy_permutation(sim).index.tolist() == [0, 1, 2, 3, 3, 1, 0, 2]


def test_greedy_list_is_one_call_per_added_model(monkeypatch):
    from zipfast.merging import baselines

    calls = []

    def counted(sims, *rest):
        calls.append(len(sims))
        return inner(sims, *rest)

    inner = baselines.zip_match_op
    monkeypatch.setattr(baselines, "zip_match_op", counted)
    sims = [nasty(3, size, size) for size in (1, 4, 9, 2)]
    copies = [sim.clone() for sim in sims]
    many = match_greedy_permutation(sims, 3)
    assert calls == [4, 4]
    assert isinstance(many, list) and all(same(a, match_greedy_permutation(s, 3)) for a, s in zip(many, sims))
    assert all(torch.equal(a, b) for a, b in zip(sims, copies))
    assert isinstance(match_greedy_permutation(sims[:1], 3), list)
    assert match_greedy_permutation([]) == [] and match_greedy_permutation(tuple(sims), 3)[1].keep == 4


@pytest.mark.parametrize("models", [2, 3])
def test_greedy_raises_rather_than_merging_inside_a_model(models):
    sim = correlations(models, 3)
    assert match_greedy_permutation(sim, models).is_permutation
    last = models * 3 - 1
    own = slice(last - 2, last + 1)
    kept = sim[last, own].clone()
    sim[last] = sim[:, last] = -torch.inf  # no partner in another model, but good ones in its own
    sim[last, own] = sim[own, last] = kept
    message = rf"no pair of space late is left after {last - 3} merges: .* to features of model {models - 1} are -inf"
    with pytest.raises(ValueError, match=rf"^match_greedy_permutation: {message}"):
        match_greedy_permutation([correlations(models, 2), sim], models, names=["early", "late"])
    sim[last, 1] = sim[1, last] = -3.0  # one allowed pair is enough, if it is free
    if models == 2:
        sim[1, 3:5] = sim[3:5, 1] = -4.0
        assert match_greedy_permutation(sim).index[last] == 1


def test_greedy_names_the_space():
    sims = [correlations(2, 4), correlations(2, 4)]
    sims[1][2, 5] = sims[1][5, 2] = torch.nan
    with pytest.raises(ValueError, match=r"of space #1 must not hold NaN, got one at \[2, 5\]"):
        match_greedy_permutation(sims)
    with pytest.raises(ValueError, match=r"of space b must not hold NaN"):
        match_greedy_permutation(sims, names=["a", "b"])
    with pytest.raises(
        ValueError, match=r"^match_greedy_permutation: 'names' must have one entry per space \(2\), got 1"
    ):
        match_greedy_permutation(sims, names=["a"])


def test_greedy_reads_all_of_three_models():
    """A fault between the last two models is seen, though the first matching does not read it."""
    sim = correlations(3, 2)
    sim[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"NaN, got one at \[3, 5\]"):
        match_greedy_permutation(sim, 3)


# ------------------------------------------------------------------------------------------ optimal


def pairings(features):
    """All ways to pair an even number of features."""
    if not features:
        yield []
        return
    first, *rest = features
    for k, other in enumerate(rest):
        for more in pairings(rest[:k] + rest[k + 1 :]):
            yield [(first, other), *more]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_optimal_is_the_best_of_all_pairings(size, seed, dtype):
    sim = nasty(2, size, seed, dtype)
    groups = match_optimal(sim)
    assert groups.count.tolist() == [2] * size and ordered(groups)
    total = sum(float(sim[i, j]) for i, j in (torch.nonzero(groups.index == g).flatten() for g in range(size)))
    best = max(sum(float(sim[i, j]) for i, j in pairs) for pairs in pairings(list(range(2 * size))))
    assert total == pytest.approx(best, abs=1e-12)
    assert groups.pair.shape == (0, 2) and groups.value.numel() == 0
    assert torch.equal(match_optimal(sim).index, groups.index)


def test_optimal_beats_greedy_and_pairs_inside_a_model():
    sim = table(4, {(0, 2): 0.9, (0, 3): 0.8, (1, 2): 0.8})
    assert match(sim, beta=0.0).index.tolist() == [0, 1, 0, 1]
    assert match_optimal(sim).index.tolist() == [0, 1, 1, 0]
    assert match_optimal(table(4, {(0, 1): 0.9, (2, 3): 0.1})).index.tolist() == [0, 0, 1, 1]
    assert match_optimal(table(4, {(0, 2): -0.9, (0, 3): -0.8, (0, 1): -0.7})).index.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e308, 1e-320])
def test_optimal_pairs_dead_and_equal_features(value):
    groups = match_optimal(torch.full((12, 12), value, dtype=torch.float64))
    assert groups.count.tolist() == [2] * 6 and ordered(groups)


def test_optimal_needs_two_models():
    for models in (1, 3):
        with pytest.raises(ValueError, match=rf"match_optimal: 'models' must be 2, got {models}; use match or"):
            match_optimal(torch.eye(6), models)


# ------------------------------------------------------------------------------------------ k-means


@pytest.mark.parametrize("models", [1, 2, 3, 4])
def test_kmeans_finds_planted_clusters(models):
    """Features k of all models are alike but for some noise, in another order in each model."""
    generator = torch.Generator().manual_seed(models)
    base = torch.randn(300, 6, generator=generator)
    orders = [torch.arange(6), *[torch.randperm(6, generator=generator) for _ in range(models - 1)]]
    x = torch.cat([base[:, o] for o in orders], 1)
    x += 0.05 * torch.randn(x.shape, generator=generator)
    for dtype in (torch.float32, torch.float64):
        groups = match_kmeans(symmetric(torch.corrcoef(x.T)).to(dtype), models)
        assert groups.index.tolist() == torch.cat(orders).tolist() and groups.is_permutation


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("models, size", [(1, 3), (2, 1), (2, 8), (3, 5), (4, 4)])
def test_kmeans_has_exactly_d_groups(models, size, seed):
    sim = nasty(models, size, seed)
    groups = match_kmeans(sim, models, seed=seed)
    assert groups.keep == size and groups.count.min() >= 1 and groups.count.sum() == models * size and ordered(groups)
    assert groups.pair.shape == (0, 2) and groups.value.numel() == 0
    assert torch.equal(match_kmeans(sim, models, seed).index, groups.index)


def test_kmeans_cuts_copies_in_halves():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the one of scikit-learn, that clusters fell together, is dealt with
        assert match_kmeans(torch.ones(8, 8)).index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert match_kmeans(torch.ones(9, 9), 3).index.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
        assert match_kmeans(torch.ones(2, 2)).index.tolist() == [0, 0]
        two = torch.block_diag(torch.ones(3, 3), torch.ones(5, 5))[[0, 3, 1, 4, 2, 5, 6, 7]]
        two = two[:, [0, 3, 1, 4, 2, 5, 6, 7]]  # copies at 0 2 4 and at 1 3 5 6 7
        assert match_kmeans(two).index.tolist() == [0, 1, 0, 1, 2, 1, 3, 3]


def test_kmeans_of_dead_features():
    """A dead feature's row is zero but for its diagonal, so dead features are no copies of each other."""
    sim = torch.zeros(12, 12)
    sim[:3, :3] = 1
    groups = match_kmeans(sim)
    assert groups.index[:3].tolist() == [0, 0, 0] and groups.count.min() >= 1 and groups.keep == 6
    assert match_kmeans(torch.zeros(6, 6)).count.min() >= 1


def test_kmeans_does_not_depend_on_the_thread_count():
    from threadpoolctl import threadpool_info, threadpool_limits

    sim = correlations(2, 160, samples=400)  # more rows than scikit-learn gives one thread at a time
    found = []
    for threads in (1, 2, 4):
        with threadpool_limits(threads):
            before = threadpool_info()
            found.append(match_kmeans(sim).index)
            assert threadpool_info() == before
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_kmeans_seed_out_of_range(seed):
    with pytest.raises(ValueError, match=rf"match_kmeans: 'seed' must be in \[0, 2\*\*32\), got {seed}"):
        match_kmeans(torch.eye(4), seed=seed)
