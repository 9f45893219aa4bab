# SPDX-License-Identifier: Apache-2.0
"""The drop-in matching, bit for bit against a literal replay of the public algorithm in plain loops.

Set ZIPFAST_ZIPIT to a checkout of github.com/gstoica27/ZipIt to compare with that code itself as well.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkouts import imported

from zipfast.compat.zipit import compute_correlation, match_tensors_zipit

CASES = 400
NEG = -np.inf


def replay(sims, r, a, b):
    """Returns (members of each slot, merges before every entry was -inf or None); rows and columns are deleted."""
    s = sims.numpy().copy()
    n = s.shape[0]
    np.fill_diagonal(s, NEG)
    keep, models = int(n * (1 - r) + 1e-4), int(1 / (1 - r) + 0.5)
    size, merges = n // models, n - keep
    origin = [f // size for f in range(n)]
    budget = [int((merges // models) * b + 1e-4)] * models
    slots = [[f] for f in range(n)]
    scale = s.dtype.type(a)
    for t in range(merges):
        i, j = 0, 0
        for row in range(len(slots)):  # the first maximum, row by row
            col = int(np.argmax(s[row]))
            if s[row, col] > s[i, j]:
                i, j = row, col
        if s.max() == NEG:
            return slots, t
        if j < i:
            i, j = j, i
        masks = [slice(origin[g] * size, (origin[g] + 1) * size) for g in (i, j)]
        slots[i] = slots[i] + slots[j]
        s[:, i] = np.minimum(s[:, i], s[:, j])
        if a > 0:
            s[:, i] = s[:, i] * scale
        else:
            for mask in masks:
                s[mask, i] = NEG
        s = np.delete(s, j, 1)
        s[i] = np.minimum(s[i], s[j])
        if a > 0:
            s[i] = s[i] * scale
        else:
            for mask in masks:
                s[i, mask] = NEG
        s = np.delete(s, j, 0)
        inside, owner = origin[i] == origin[j], origin[i]
        del slots[j], origin[j]
        if inside:
            budget[owner] -= 1
            if budget[owner] <= 0:
                own = [k for k, o in enumerate(origin) if o == owner]
                for p in own:
                    for q in own:
                        s[p, q] = NEG
    return slots, None


def matrices(slots, n):
    unmerge = torch.zeros(n, len(slots))
    for slot, members in enumerate(slots):
        unmerge[members, slot] = 1
    return (unmerge / (unmerge.sum(0, keepdim=True) + 1e-5)).T, unmerge


def case(number):
    """A random problem: (metric, similarities, r, a, b, kind of matrix)."""
    rng = np.random.default_rng(number)
    models = int(rng.choice([2, 2, 3, 4]))
    size = int(rng.integers(1, 40 // models + 1))
    n = models * size
    x = rng.standard_normal((n, int(rng.integers(3, 60)))).astype(np.float32)
    x[1:] += rng.choice([0, 0.5, 2]) * x[:-1]
    kind = str(rng.choice(["plain", "ties", "dead", "asymmetric", "covariance", "negative"]))
    if kind in ("dead", "covariance"):
        x[rng.random(n) < 0.25] = 0
    covariance = np.cov(x, bias=True).reshape(n, n).astype(np.float32)
    covariance = np.triu(covariance) + np.triu(covariance, 1).T
    sims = compute_correlation(torch.from_numpy(covariance))
    metric = {"covariance": torch.from_numpy(covariance)}
    if kind != "covariance":
        if kind == "ties":
            sims = (sims * 4).round() / 4
        elif kind == "asymmetric":
            sims = sims + 0.2 * torch.from_numpy(rng.standard_normal((n, n)).astype(np.float32))
        elif kind == "negative":
            sims = -sims.abs()
        metric = {"cossim": sims}
    a = float(rng.choice([-0.5, 0, 0.01, 0.1, 0.3, 0.5, 1, 1, 1.5]))
    return metric, sims.clone(), 1 - 1 / models, a, float(rng.choice([0, 0.125, 0.5, 1])), kind


@pytest.mark.parametrize("block", range(CASES // 20))
def test_equals_the_replay(block):
    for number in range(20 * block, 20 * block + 20):
        metric, sims, r, a, b, kind = case(number)
        slots, stuck = replay(sims, r, a, b)
        where = f"case {number}: {kind}, {len(sims)} features, r = {r:.3f}, a = {a}, b = {b}"
        if stuck is not None:
            with pytest.raises(ValueError, match=f"no pair is left after {stuck} of "):
                match_tensors_zipit(metric, r, a, b)
            continue
        merge, unmerge = match_tensors_zipit(metric, r, a, b)
        wanted_merge, wanted_unmerge = matrices(slots, len(sims))
        assert torch.equal(unmerge, wanted_unmerge), where
        assert torch.equal(merge, wanted_merge), where


def test_cases_are_of_all_sorts():
    """The generator reaches every kind, both kernels and both outcomes."""
    kinds, models, stuck = set(), set(), 0
    for number in range(CASES):
        _, sims, r, a, b, kind = case(number)
        kinds.add((kind, a <= 0, a > 1))
        models.add(round(1 / (1 - r)))
        stuck += replay(sims, r, a, b)[1] is not None
    assert len(kinds) == 18 and models == {2, 3, 4}
    assert CASES // 20 < stuck < CASES // 2


@pytest.mark.parametrize("a", [0.3, 1.0, 0.0, 2.0])
def test_float64(a):
    sims = torch.corrcoef(torch.randn(24, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    sims = torch.triu(sims) + torch.triu(sims, 1).T
    slots, stuck = replay(sims, 0.5, a, 0.5)
    assert stuck is None
    assert torch.equal(match_tensors_zipit({"cossim": sims}, 0.5, a, 0.5)[1], matrices(slots, 24)[1])


def covariance(n=12, seed=0):
    x = torch.randn(n, 50, generator=torch.Generator().manual_seed(seed))
    c = x @ x.T / 50
    return torch.triu(c) + torch.triu(c, 1).T


def test_defaults():
    metric = {"covariance": covariance()}
    for got, wanted in zip(match_tensors_zipit(metric), match_tensors_zipit(metric, r=0.5, a=0.3, b=0.125)):
        assert torch.equal(got, wanted)
    assert torch.equal(match_tensors_zipit(metric, correlation_matrix=None, debug=1)[1], match_tensors_zipit(metric)[1])


def test_similarities_under_another_name():
    """A correlation is taken as it is; the covariance comes first where there are several, as in the public code."""
    sims = compute_correlation(covariance())
    wanted = match_tensors_zipit({"covariance": covariance()})
    for metric in ({"correlation": sims}, {"cossim": sims}, {"correlation": -sims, "covariance": covariance()}):
        assert all(torch.equal(x, y) for x, y in zip(match_tensors_zipit(metric), wanted))


def test_rows_sum_to_k_over_k_plus_eps():
    merge, unmerge = match_tensors_zipit({"covariance": covariance()}, a=1.0, b=1.0)
    count = unmerge.sum(0)
    assert merge.shape == (6, 12) and unmerge.shape == (12, 6)
    assert merge.dtype == unmerge.dtype == torch.float32
    assert torch.equal(unmerge.sum(1), torch.ones(12))
    torch.testing.assert_close(merge.sum(1), count / (count + 1e-5))


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("a", [0.5, 0.0])
def test_add_bias(models, a):
    metric = {"covariance": covariance(6 * models)}
    r = 1 - 1 / models
    plain_merge, plain = match_tensors_zipit(metric, r, a, 1.0)
    merge, unmerge = match_tensors_zipit(metric, r, a, 1.0, add_bias=True)
    assert torch.equal(merge, plain_merge)
    assert unmerge.shape == (7 * models, 7)
    for m, block in enumerate(unmerge.chunk(models)):
        assert torch.equal(block[:6, :6], plain[6 * m : 6 * m + 6])
        assert block[6].tolist() == [0] * 6 + [1]
        assert block[:, 6].tolist() == [0] * 6 + [1]


@pytest.mark.parametrize("a", [0.5, 0.0, 1.5])
def test_merge_value_is_the_mean_similarity(a):
    """By hand: 0.9 across, then 0.8 across, no other pair before them."""
    sims = torch.tensor([[0, 0.1, 0.9, 0.2], [0.1, 0, 0.3, 0.8], [0.9, 0.3, 0, 0.4], [0.2, 0.8, 0.4, 0]])
    _, unmerge, value = match_tensors_zipit({"cossim": sims}, a=a, b=1.0, get_merge_value=True)
    assert unmerge.argmax(1).tolist() == [0, 1, 0, 1]
    assert float(value) == pytest.approx(0.85)
    assert len(match_tensors_zipit({"cossim": sims}, a=a, b=1.0)) == 2


def test_print_merges(capsys):
    sims = torch.full((6, 6), 0.0)
    for i, j, v in ((0, 1, 0.9), (3, 4, 0.8), (2, 5, 0.7)):
        sims[i, j] = sims[j, i] = v
    match_tensors_zipit({"cossim": sims}, b=1.0, print_merges=True)
    assert capsys.readouterr().out == "within A: 1 | within B: 1 | across: 1\n"


@pytest.mark.parametrize("key", ["covariance", "cossim"])
@pytest.mark.parametrize("a", [0.3, 0.0, 1.5])
def test_inputs_are_unchanged(key, a):
    given = covariance()
    metric, copy = {key: given, "magnitudes": torch.ones(12)}, given.clone()
    first = match_tensors_zipit(metric, a=a, b=1.0)
    assert torch.equal(given, copy) and list(metric) == [key, "magnitudes"] and metric["magnitudes"].shape == (12,)
    second = match_tensors_zipit(metric, a=a, b=1.0)
    assert all(torch.equal(x, y) for x, y in zip(first, second))


def test_compute_correlation():
    c = torch.tensor([[4.0, 2, 0], [2, 9, 0], [0, 0, 0]])
    result = compute_correlation(c)
    torch.testing.assert_close(result, torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]]))
    assert (result[2] == 0).all()
    assert c[0, 0] == 4
    assert compute_correlation(torch.tensor([[1e-8]])).item() == pytest.approx(0.1)


@pytest.mark.parametrize("a", [0.3, 0.0, 1.5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nan(a, symmetric):
    sims = covariance()
    sims[2, 7] = torch.nan
    if symmetric:
        sims[7, 2] = torch.nan
    with pytest.raises(ValueError, match=r"'metric' must not give NaN, got one at \[2, 7\]"):
        match_tensors_zipit({"cossim": sims}, a=a)


def test_negative_variance_gives_nan():
    c = covariance()
    c[5, 5] = -1e-3
    with pytest.raises(ValueError, match=r"must not give NaN, got one at \[0, 5\]"):
        match_tensors_zipit({"covariance": c})


def test_messages():
    with pytest.raises(ValueError, match=r"must hold 'covariance', 'cossim' or 'correlation', got \['mean'\]"):
        match_tensors_zipit({"mean": covariance()})
    for r in (1.0, -0.5):
        with pytest.raises(ValueError, match=rf"match_tensors_zipit: 'r' must be in \[0, 1\), got {r}"):
            match_tensors_zipit({"cossim": torch.eye(4)}, r)
    for key in ("covariance", "cossim", "correlation"):
        with pytest.raises(ValueError, match=rf"'metric\[{key}\]' must be square \[F, F\], got \[3, 4\]"):
            match_tensors_zipit({key: torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="5 features must divide among 2 models"):
        match_tensors_zipit({"cossim": torch.eye(5)})


def test_deadlock_says_what_the_reference_would_do():
    with pytest.raises(ValueError, match=r"merge feature 0 with itself and zero the rest; use zipfast.match"):
        for seed in range(20):
            match_tensors_zipit({"covariance": covariance(24, seed)}, r=2 / 3, a=0.3, b=0.0)


# ------------------------------------------------------------------------------------------ the public code itself


@pytest.fixture(scope="module")
def public():
    with imported("ZIPFAST_ZIPIT", ["matching_functions"]) as modules:
        yield modules["matching_functions"]


def test_equals_the_public_code(public, record_property):
    equal = refused = 0
    for number in range(CASES):
        metric, sims, r, a, b, kind = case(number)
        theirs = {k: v.clone() for k, v in metric.items()}
        wanted_merge, wanted_unmerge = public.match_tensors_zipit(theirs, r, a, b)
        if replay(sims, r, a, b)[1] is not None:
            refused += 1
            with pytest.raises(ValueError, match="no pair is left"):
                match_tensors_zipit(metric, r, a, b)
            continue
        merge, unmerge = match_tensors_zipit(metric, r, a, b)
        where = f"case {number}: {kind}, {len(sims)} features, r = {r:.3f}, a = {a}, b = {b}"
        assert torch.equal(unmerge, wanted_unmerge), where
        assert torch.equal(merge, wanted_merge), where
        biased = match_tensors_zipit(metric, r, a, b, add_bias=True)
        wanted = public.match_tensors_zipit({k: v.clone() for k, v in metric.items()}, r, a, b, add_bias=True)
        assert all(torch.equal(x, y) for x, y in zip(biased, wanted)), where
        equal += 1
    record_property("equal", equal)
    record_property("refused", refused)
    print(f"{equal} of {CASES} equal, {refused} where the public code zeroes features")
    assert equal + refused == CASES and equal > CASES // 2
