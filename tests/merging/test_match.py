# SPDX-License-Identifier: Apache-2.0
"""`match`: groups as M and U, budgets, recovery of permutations, warnings and messages."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch.testing import assert_close

from zipfast import Groups, match, match_permutation
from zipfast.merging.match import in_model_budget


def correlations(models, size, seed=0, samples=200, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, models * size, generator=generator, dtype=torch.float64)
    x[:, 1:] += 0.5 * x[:, :-1]
    s = torch.corrcoef(x.T).to(dtype)
    return torch.triu(s) + torch.triu(s, 1).T


def replay(sim, models, keep, alpha, budget):
    """The definition in plain loops over lists of members: (members of each group, similarities, lifted)."""
    size = sim.shape[0] // models
    groups = {f: [f] for f in range(models * size)}
    score = {(i, j): sim[i, j] for i in groups for j in groups if i < j}
    left, lifted, depth = [budget] * models, 0, set()
    values = []
    while len(groups) > keep:

        def owners(g):
            return {f // size for f in groups[g]}

        pool = [p for p in score if alpha > 0 or not depth & set(p)]
        allowed = [p for p in pool if lifted or all(left[m] > 0 for m in owners(p[0]) & owners(p[1]))]
        if not allowed:
            allowed = pool
            lifted = len(groups) - keep
        i, j = min(allowed, key=lambda p: (-float(score[p]), p))
        values.append(float(score[i, j]))
        for m in owners(i) & owners(j):
            left[m] -= 1
        for k in groups:
            if k not in (i, j):
                a, b = tuple(sorted((i, k))), tuple(sorted((j, k)))
                score[a] = alpha * torch.minimum(score[a], score[b])
        score = {p: v for p, v in score.items() if j not in p}
        groups[i] += groups.pop(j)
        depth.add(i)
    return [groups[g] for g in sorted(groups)], values, lifted


def members(groups):
    return [torch.nonzero(groups.index == g).flatten().tolist() for g in range(groups.keep)]


# ------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize(
    "models, size, keep", [(2, 7, None), (3, 5, None), (2, 6, 9), (2, 6, 1), (1, 6, 4), (4, 1, None)]
)
def test_merge_and_unmerge_matrices(models, size, keep):
    groups = match(correlations(models, size), models, keep=keep)
    kept = size if keep is None else keep
    assert (groups.models, groups.size, groups.keep) == (models, size, kept)
    assert groups.index.dtype == torch.int64 and groups.index.shape == (models * size,)
    assert groups.count.sum() == models * size and groups.count.min() >= 1
    assert groups.count.tolist() == [len(m) for m in members(groups)]
    assert torch.equal(torch.cat([groups.of_model(m) for m in range(models)]), groups.index)
    merge, unmerge = groups.merge_matrix(torch.float64), groups.unmerge_matrix(torch.float64)
    assert merge.shape == (kept, models * size) and unmerge.shape == (models * size, kept)
    assert set(unmerge.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(unmerge.sum(1), torch.ones(models * size, dtype=torch.float64))
    assert_close(merge.sum(1), torch.ones(kept, dtype=torch.float64), atol=1e-15, rtol=0)
    assert_close(merge @ unmerge, torch.eye(kept, dtype=torch.float64), atol=1e-15, rtol=0)
    assert groups.merge_matrix().dtype == torch.float32
    assert groups.pair.shape == (models * size - kept, 2)
    assert groups.value.shape == (models * size - kept,)
    assert (groups.pair[:, 0] < groups.pair[:, 1]).all()
    first = [m[0] for m in members(groups)]
    assert first == sorted(first)  # groups are in the order of their lowest members


def test_groups_by_hand():
    groups = Groups(torch.tensor([0, 1, 0, 1, 2, 2]), 2, 3, torch.empty(0, 2), torch.empty(0))
    assert groups.size == 3
    assert groups.count.tolist() == [2, 2, 2]
    assert groups.of_model(1).tolist() == [1, 2, 2]
    assert groups.in_model_merges == [1, 1]
    assert not groups.is_permutation
    assert groups.merge_matrix().tolist()[0] == [0.5, 0, 0.5, 0, 0, 0]
    assert Groups(torch.tensor([0, 1, 1, 0]), 2, 2, torch.empty(0, 2), torch.empty(0)).is_permutation
    assert not match(correlations(2, 3), keep=5).is_permutation


def test_hand_computed():
    sim = torch.tensor([[0, 0.1, 0.9, 0.2], [0.1, 0, 0.3, 0.8], [0.9, 0.3, 0, 0.4], [0.2, 0.8, 0.4, 0]])
    groups = match(sim)
    assert groups.index.tolist() == [0, 1, 0, 1]
    assert groups.pair.tolist() == [[0, 2], [1, 3]]
    assert torch.equal(groups.value, torch.tensor([0.9, 0.8]))


def test_ties_take_the_smallest_row_then_column():
    assert match(torch.ones(6, 6), 2, keep=4).pair.tolist() == [[0, 1], [0, 3]]  # then model 0 is exhausted
    sim = torch.zeros(4, 4)
    sim[1, 3] = sim[3, 1] = sim[0, 2] = sim[2, 0] = 0.5
    assert match(sim).pair.tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "models, alpha, beta", [(2, 1.0, 1.0), (2, 0.3, 0.25), (3, 0.5, 0.4), (2, 0.0, 1.0), (4, 1.0, 0.5)]
)
def test_replays_the_definition(models, alpha, beta, seed):
    size = 3 + seed % 4
    sim = correlations(models, size, seed, samples=20)
    if seed % 2:
        sim = (sim * 4).round() / 4  # ties
    if seed % 3 == 0:
        sim[1, :] = sim[:, 1] = 0  # a dead feature
    keep = size + (models * size) // 2 - size // 2 if alpha == 0 else size
    budget = in_model_budget(models * size - keep, models, beta)
    wanted, values, lifted = replay(sim, models, keep, alpha, budget)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        groups = match(sim, models, keep=keep, alpha=alpha, beta=beta)
    assert members(groups) == [sorted(m) for m in wanted]
    assert groups.value.tolist() == values
    assert groups.lifted == lifted


def test_defaults_are_alpha_1_beta_1_keep_d():
    sim = correlations(2, 9, 3)
    plain, spelled = match(sim), match(sim, 2, keep=9, alpha=1.0, beta=1.0)
    assert torch.equal(plain.index, spelled.index) and torch.equal(plain.value, spelled.value)
    assert plain.lifted == 0


def test_a_list_equals_one_by_one():
    sims = [correlations(2, d, d) for d in (1, 4, 9, 2)]
    keeps, betas = [1, 5, 9, 2], [1.0, 0.5, 0.0, 0.2]
    many = match(sims, 2, keep=keeps, beta=betas, alpha=0.5)
    assert isinstance(many, list) and len(many) == 4
    for sim, keep, beta, groups in zip(sims, keeps, betas, many):
        one = match(sim, 2, keep=keep, beta=beta, alpha=0.5)
        assert isinstance(one, Groups)
        assert torch.equal(one.index, groups.index)
        assert torch.equal(one.pair, groups.pair)
        assert torch.equal(one.value, groups.value)
    assert isinstance(match([sims[0]]), list)
    assert match(tuple(sims))[1].keep == 4
    assert match([]) == []


def test_diagonal_is_ignored_and_input_kept():
    sim = correlations(2, 6)
    wanted = match(sim).index
    for value in (-5.0, 0.0, torch.inf):
        other = sim.clone().fill_diagonal_(value)
        copy = other.clone()
        assert torch.equal(match(other).index, wanted)
        assert torch.equal(other, copy)
    strided = torch.zeros(24, 24)
    strided[::2, ::2] = sim
    assert torch.equal(match(strided[::2, ::2]).index, wanted)
    assert torch.equal(match(sim.clone().requires_grad_()).index, wanted)


def test_float64():
    sim = correlations(2, 6, dtype=torch.float64)
    groups = match(sim)
    assert groups.value.dtype == torch.float64
    assert torch.equal(groups.index, match(sim.float()).index)


def test_size_one():
    groups = match(torch.tensor([[1.0, -0.3], [-0.3, 1.0]]), beta=0.0)
    assert groups.index.tolist() == [0, 0] and groups.value.tolist() == pytest.approx([-0.3])
    assert groups.is_permutation
    assert match(torch.ones(1, 1), 1).index.tolist() == [0]


# ------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_in_model_budget(beta):
    for merges, models in itertools.product(range(0, 40, 3), (1, 2, 3, 4)):
        assert in_model_budget(merges, models, beta) == math.floor(beta * merges / models + 1e-9)
        assert in_model_budget(merges, models, beta, compat=True) == int((merges // models) * beta + 1e-4)
    assert in_model_budget(30, 3, 0.1) == 1  # 0.1 * 30 / 3 in floating point must not fall below 1


@pytest.mark.parametrize("beta", [0.0, 0.125, 0.3, 0.5])
def test_two_models_never_exceed_the_budget(beta):
    for seed in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            groups = match(correlations(2, 16, seed, samples=12), beta=beta)
        assert max(groups.in_model_merges) <= in_model_budget(16, 2, beta)
        assert groups.is_permutation or beta > 0


@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_recovers_a_permutation(size):
    """Features of B are those of A in another order."""
    generator = torch.Generator().manual_seed(size)
    a, order = torch.randn(400, size, generator=generator), torch.randperm(size, generator=generator)
    sim = torch.corrcoef(torch.cat([a, a[:, order] * 3 + 1], 1).T).reshape(2 * size, 2 * size)
    sim = torch.triu(sim) + torch.triu(sim, 1).T
    for groups in (match(sim, beta=0.0), match(sim), match_permutation(sim)):
        assert groups.index.tolist() == [*range(size), *order.tolist()]
        assert groups.is_permutation and groups.keep == size


def test_three_permuted_models():
    generator = torch.Generator().manual_seed(0)
    a, orders = torch.randn(400, 8, generator=generator), [torch.randperm(8, generator=generator) for _ in range(2)]
    sim = torch.corrcoef(torch.cat([a, *[a[:, o] for o in orders]], 1).T)
    sim = torch.triu(sim) + torch.triu(sim, 1).T
    for groups in (match(sim, 3, beta=0.0), match_permutation(sim, 3)):
        assert groups.index.tolist() == [*range(8), *orders[0].tolist(), *orders[1].tolist()]


def test_one_warning_with_the_sum_of_lifted_merges():
    sims = [correlations(3, 8, seed, samples=10) for seed in range(6)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        groups = match(sims, 3, beta=0.0)
    lifted = sum(g.lifted for g in groups)
    assert lifted > 0
    assert [w.category for w in seen] == [RuntimeWarning]
    assert f"lifted for {lifted} of {6 * 16} merges" in str(seen[0].message)
    assert seen[0].filename == __file__
    for g in groups:
        assert g.count.min() >= 1  # no feature is lost, unlike where the reference deadlocks


def test_compat_budget_lets_one_merge_through():
    sim = torch.zeros(8, 8)
    for (i, j), v in {
        (0, 1): 0.9,
        (2, 3): 0.8,
        (2, 4): 0.7,
        (3, 5): 0.6,
        (0, 6): 0.5,
        (1, 6): 0.5,
        (0, 7): 0.4,
    }.items():
        sim[i, j] = sim[j, i] = v
    assert match(sim, beta=0.0).in_model_merges == [0, 0]
    assert match(sim, beta=0.0, compat=True).in_model_merges[0] == 1


# ------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize("wrong", [torch.zeros(16, 12), torch.zeros(4), torch.zeros(2, 4, 4)])
def test_not_square(wrong):
    with pytest.raises(ValueError, match=r"match: 'similarity' of space #0 must be square \[F, F\], got \["):
        match(wrong)


def test_not_a_tensor():
    with pytest.raises(ValueError, match=r"of space late must be square \[F, F\], got str"):
        match([torch.eye(2), "text"], names=["early", "late"])


@pytest.mark.parametrize("size, models", [(5, 2), (0, 2), (4, 0), (4, 3)])
def test_not_divisible(size, models):
    with pytest.raises(ValueError, match=f"must stack {models} models of equal size, got {size} features"):
        match(torch.zeros(size, size), models)


def test_nan_is_named():
    sims = [correlations(2, 4), correlations(2, 4)]
    sims[1][2, 5] = sims[1][5, 2] = torch.nan
    with pytest.raises(ValueError, match=r"match: 'similarity' of space b must not hold NaN, got one at \[2, 5\]"):
        match(sims, names=["a", "b"])


def test_asymmetry_is_named():
    sim = correlations(2, 4)
    sim[6, 1] += 0.25
    message = r"space #0 must be symmetric, got different values at \[1, 6\] and \[6, 1\].*torch.triu\(s\)"
    with pytest.raises(ValueError, match=message):
        match(sim)
    assert match(torch.triu(sim) + torch.triu(sim, 1).T).keep == 4  # as the message advises


@pytest.mark.parametrize("keep", [0, -1, 9])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=rf"'keep' must be in \[1, 8\], got {keep}"):
        match(torch.eye(8), keep=keep)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"'alpha' must be in \[0, 1\]"):
        match(torch.eye(8), alpha=alpha)


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan, [0.5, 2.0]])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=r"match: 'beta' must be in \[0, 1\]"):
        match([torch.eye(8), torch.eye(8)], beta=beta)


def test_one_entry_per_space():
    for argument in ("keep", "beta"):
        with pytest.raises(ValueError, match=rf"match: '{argument}' must have one entry per space \(2\), got 1"):
            match([torch.eye(4), torch.eye(4)], **{argument: [1]})


def test_one_name_per_space():
    with pytest.raises(ValueError, match=r"match: 'names' must have one entry per space \(2\), got 1"):
        match([torch.eye(4), torch.eye(4)], names=["a"])


def test_alpha_0_merges_nothing_twice():
    with pytest.raises(ValueError, match="'alpha' must be greater than 0 where more than half"):
        match(torch.eye(9), 3, alpha=0.0)
    groups = match(correlations(2, 9), alpha=0.0)
    assert groups.count.tolist() == [2] * 9


def test_wrong_dtype():
    with pytest.raises(TypeError, match=r"'sim\[0\]' must be float32 or float64, got float16"):
        match(torch.eye(4, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"must be float32 as the first one, got float64"):
        match([torch.eye(4), torch.eye(4, dtype=torch.float64)])


def test_too_many_models():
    with pytest.raises(ValueError, match=r"'models' must be in \[1, 31\], got 32"):
        match(torch.eye(32), 32)


def test_nothing_left_to_merge():
    sim = torch.full((4, 4), -torch.inf)
    sim[0, 2] = sim[2, 0] = 0.5
    with pytest.raises(
        ValueError, match=r"no pair of space #0 is left after 1 merges: all remaining similarities are -inf"
    ):
        match(sim)


def test_compat_deadlock_and_alpha_0():
    with pytest.raises(ValueError, match=r"the reference would merge feature 0 with itself.*use compat=False"):
        for seed in range(10):
            match(correlations(3, 8, seed, samples=10), 3, beta=0.0, compat=True)
    with pytest.raises(ValueError, match=r"'alpha' must be in \(0, 1\] with compat=True, got 0"):
        match(torch.eye(4), alpha=0.0, compat=True)
