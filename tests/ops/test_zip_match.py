# SPDX-License-Identifier: Apache-2.0
"""zip_match: hand tables, replay of the definition, agreement of all backends in every bit.

``replay`` knows the docstring only: it walks the recorded merges and asks at each whether the rules allowed that pair,
and whether no allowed pair came before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch

import zipfast
from zipfast.ops import zip_match
from zipfast.ops.zip_match import ASYMMETRIC_AT, DEADLOCK, LIFTED, NAN_AT

INF, NAN, MANY = np.inf, np.nan, 10**6


class Case(NamedTuple):
    sim: np.ndarray
    models: int
    keep: int
    budget: int
    alpha: float
    compat: bool


class Result(NamedTuple):
    group: np.ndarray
    pair: np.ndarray
    value: np.ndarray
    status: np.ndarray

    def same_bits(self, other: Result) -> bool:
        """Equal, every NaN counting as equal to every other."""
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(self, other)):
            return False
        return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(self, other))


def run_list(cases: Sequence[Case], device: str = "cpu", call=zip_match) -> list[Result]:
    """One call for cases that agree in models, alpha and compat."""
    first = cases[0]
    assert all((c.models, c.alpha, c.compat) == (first.models, first.alpha, first.compat) for c in cases)
    sim = [torch.from_numpy(np.ascontiguousarray(c.sim)).to(device) for c in cases]
    keep, budget = [c.keep for c in cases], [c.budget for c in cases]
    group, pair, value, status = call(sim, first.models, keep, budget, first.alpha, first.compat)
    assert group.dtype == pair.dtype == status.dtype == torch.int64 and value.dtype == sim[0].dtype
    assert {t.device.type for t in (group, pair, value, status)} == {device}
    features = [len(c.sim) for c in cases]
    merges = [len(c.sim) - c.keep for c in cases]
    assert group.shape == (sum(features),) and pair.shape == (sum(merges), 2) and value.shape == (sum(merges),)
    assert status.shape == (len(cases), 4)
    cut = (group.cpu().split(features), pair.cpu().split(merges), value.cpu().split(merges), status.cpu())
    return [Result(*(t.numpy() for t in part)) for part in zip(*cut, strict=True)]


def run(case: Case, device: str = "cpu") -> Result:
    return run_list([case], device)[0]


def reference(case: Case) -> Result:
    return run_list([case], call=zip_match.reference)[0]


@np.errstate(invalid="ignore")  # 0 * -inf, for alpha = 0: rows that have left the pool
def replay(case: Case, result: Result) -> None:
    """Every recorded merge was the first of the best allowed pairs, and the outputs follow from the merges."""
    sim, models, keep, budget, alpha, compat = case
    n, alpha = len(sim), sim.dtype.type(alpha)
    s = sim.copy()
    np.fill_diagonal(s, -INF)
    members = {k: {k} for k in range(n)}  # slot -> features of its group
    present = {k: {k // (n // models)} for k in range(n)}  # slot -> models of its group
    pool = np.ones(n, dtype=bool)  # slots that may still merge
    left = [budget] * models
    spent = {m for m in range(models) if not compat and budget <= 0}
    later = np.triu(np.ones((n, n), dtype=bool), 1)
    lifted, done = 0, 0

    def open_pairs() -> np.ndarray:
        """Values of the pairs i < j that may merge, -inf elsewhere."""
        bits = np.array([sum(1 << m for m in present.get(k, ()) if m in spent) for k in range(n)])
        return np.where(later & pool[:, None] & pool[None, :] & ((bits[:, None] & bits[None, :]) == 0), s, -INF)

    while done < n - keep:
        values, free = open_pairs(), False
        if values.max() == -INF and not compat:
            values, free = np.where(later & pool[:, None] & pool[None, :], s, -INF), True
        if values.max() == -INF:
            break
        lifted += free
        i, j = (int(v) for v in result.pair[done])
        assert 0 <= i < j < n and i in members and j in members
        assert result.value[done] == values[i, j] == values.max(), f"merge {done} of {i} and {j} was not the best"
        first = np.argwhere(values == values.max())[0]  # row by row: smallest i, then smallest j
        assert (i, j) == tuple(first), f"merge {done}: {tuple(first)} comes before {(i, j)} at the same value"

        shared = present[i] & present[j]
        for k in range(n):
            if k in members and k not in (i, j):
                s[i, k] = s[k, i] = alpha * min(s[i, k], s[j, k])
        members[i] |= members.pop(j)
        pool[j] = False
        if alpha == 0:
            pool[i] = False
        if compat:
            del present[j]
        else:
            present[i] |= present.pop(j)
        for m in shared if not free else ():
            left[m] -= 1
            if left[m] <= 0:
                spent.add(m)
        if compat:  # "loses all pairs inside it for good": gone from the matrix, and so from what it is merged into
            slots = [k for k in present if present[k] & spent]
            for k in slots:
                for q in slots:
                    if present[k] & present[q]:
                        s[k, q] = -INF
        done += 1

    assert result.status[NAN_AT] == result.status[ASYMMETRIC_AT] == -1
    if done < n - keep:
        assert result.status[DEADLOCK] == done
        assert (result.group == -1).all()
        assert (result.pair[done:] == -1).all() and np.isnan(result.value[done:]).all()
        return
    assert result.status.tolist() == [lifted, -1, -1, -1]
    want = np.empty(n, dtype=np.int64)
    for number, slot in enumerate(sorted(members)):
        assert slot == min(members[slot])
        want[list(members[slot])] = number
    assert len(members) == keep and np.array_equal(result.group, want)


def symmetric(x: np.ndarray) -> np.ndarray:
    return np.triu(x, 1) + np.triu(x, 1).T


def similarity(kind: str, n: int, seed: int, dtype: type = np.float32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, n))
    if kind == "rounded":  # ties everywhere, at zero and on both sides of it
        x = np.round(x * 1.5) / 2
    elif kind == "positive":
        x = np.abs(x) + 1e-3
    elif kind == "negative":
        x = -np.abs(x) - 1e-3
    elif kind == "coarse":
        x = np.round(np.abs(x)) / 4 + 0.25
    elif kind == "relu":  # correlations of post-ReLU features in blocks, some of them dead
        base = rng.standard_normal((max(n // 4, 1), 64))
        f = np.maximum(base[rng.integers(0, len(base), n)] + 0.5 * rng.standard_normal((n, 64)) - 0.3, 0)
        f[rng.random(n) < 0.1] = 0
        f = f - f.mean(1, keepdims=True)
        norm = np.linalg.norm(f, axis=1)
        f = f / np.where(norm == 0, 1, norm)[:, None]
        x = f @ f.T
    elif kind == "sparse":
        x[rng.random((n, n)) < 0.4] = -INF
    elif kind == "ones":
        x = np.ones((n, n))
    elif kind == "zeros":
        x = np.zeros((n, n))
    elif kind == "tiny":  # down into the subnormals and out of them
        x = np.abs(x) * (1e-44 if dtype == np.float32 else 1e-322)
    elif kind == "chain":  # one reciprocal pair at a time
        x = -np.maximum(np.arange(n)[:, None], np.arange(n)[None, :]) / n + 1.5
    else:
        assert kind == "real"
    return symmetric(x).astype(dtype)


KINDS = ("real", "rounded", "positive", "negative", "coarse", "relu", "sparse", "ones", "zeros", "tiny", "chain")
ALPHAS = (1.0, 0.3, 1e-4, 0.0)
BUDGETS = (0, 1, 2, MANY)


def keeps(n: int, models: int, alpha: float) -> list[int]:
    return [k for k in sorted({n // models, max(n // 2, 1), 1, n}) if alpha > 0 or n - k <= n // 2]


# --- hand tables ------------------------------------------------------------------------------------------------------


def table(*upper: Sequence[float], dtype: type = np.float32) -> np.ndarray:
    """Symmetric matrix from the rows of its upper triangle; the diagonal is larger than everything: it is ignored."""
    n = len(upper) + 1
    s = np.full((n, n), 100, dtype=dtype)
    for i, row in enumerate(upper):
        s[i, i + 1 :] = row
        s[i + 1 :, i] = row
    return s


# two models, a and b, of two features each: 0 = a0, 1 = a1, 2 = b0, 3 = b1
FOUR = table([0.5, 0.9, 0.2], [0.3, 0.7], [0.8])
TABLE = [
    # all of it: a0+b0 at .9; row 0 becomes (min(.5, .3), min(.2, .8)); then a1+b1 at .7; then min(.3, .2)
    (
        "no budget",
        (FOUR, 2, 1, MANY, 1.0, False),
        [(0, 2, 0.9), (1, 3, 0.7), (0, 1, 0.2)],
        [0, 0, 0, 0],
        [0, -1, -1, -1],
    ),
    ("alpha", (FOUR, 2, 1, MANY, 0.5, False), [(0, 2, 0.9), (1, 3, 0.7), (0, 1, 0.05)], [0, 0, 0, 0], [0, -1, -1, -1]),
    ("half", (FOUR, 2, 2, MANY, 1.0, False), [(0, 2, 0.9), (1, 3, 0.7)], [0, 1, 0, 1], [0, -1, -1, -1]),
    ("nothing", (FOUR, 2, 4, MANY, 1.0, False), [], [0, 1, 2, 3], [0, -1, -1, -1]),
    # budget 0: both groups hold both models, so the third merge lifts
    ("no inside", (FOUR, 2, 1, 0, 1.0, False), [(0, 2, 0.9), (1, 3, 0.7), (0, 1, 0.2)], [0, 0, 0, 0], [1, -1, -1, -1]),
    # alpha 0: a merged group leaves the pool
    ("pool", (FOUR, 2, 2, MANY, 0.0, False), [(0, 2, 0.9), (1, 3, 0.7)], [0, 1, 0, 1], [0, -1, -1, -1]),
    ("one feature", (np.zeros((1, 1), np.float32), 1, 1, 0, 1.0, False), [], [0], [0, -1, -1, -1]),
    # a0+a1 spends the budget of a, b0+b1 that of b; what is left shares no model with itself
    (
        "budget 1",
        (table([0.9, 0.1, 0.1], [0.2, 0.3], [0.8]), 2, 1, 1, 1.0, False),
        [(0, 1, 0.9), (2, 3, 0.8), (0, 2, 0.1)],
        [0, 0, 0, 0],
        [0, -1, -1, -1],
    ),
    # a0+a1 spends a's budget: a2 may not follow at .8 any more, but b0 may at .2
    (
        "budget 1 of 3",
        (
            table([0.9, 0.8, 0.2, 0.1, 0.1], [0.8, 0.2, 0.1, 0.1], [0.1, 0.1, 0.1], [0.0, 0.0], [0.0]),
            2,
            3,
            1,
            1.0,
            False,
        ),
        [(0, 1, 0.9), (0, 3, 0.2), (2, 4, 0.1)],
        [0, 0, 1, 0, 1, 2],
        [0, -1, -1, -1],
    ),
    # ties: smallest i, then smallest j
    (
        "ties",
        (table([0, 0, 1], [1, 0], [0]), 1, 2, MANY, 1.0, False),
        [(0, 3, 1), (1, 2, 1)],
        [0, 1, 1, 0],
        [0, -1, -1, -1],
    ),
    ("ones", (table([1, 1], [1]), 1, 1, MANY, 1.0, False), [(0, 1, 1), (0, 2, 1)], [0, 0, 0], [0, -1, -1, -1]),
    # alpha < 1 raises negative values: after the first merge -0.5 is -0.25, and so ahead of -0.4
    (
        "negative",
        (table([-0.1, -0.5, -0.5], [-0.5, -0.5], [-0.4]), 1, 1, MANY, 0.5, False),
        [(0, 1, -0.1), (0, 2, -0.25), (0, 3, -0.2)],
        [0, 0, 0, 0],
        [0, -1, -1, -1],
    ),
    # -inf forbids a pair for good
    (
        "forbidden",
        (table([-INF, 0.5, 0.1], [0.4, 0.3], [-INF]), 1, 2, MANY, 1.0, False),
        [(0, 2, 0.5), (1, 3, 0.3)],
        [0, 1, 0, 1],
        [0, -1, -1, -1],
    ),
    ("deadlock", (table([-INF, 1], [-INF]), 1, 1, MANY, 1.0, False), [(0, 2, 1.0)], None, [0, 1, -1, -1]),
    # compat: the merge a0+a1 takes a's budget below zero, its pairs are gone; slot 0 counts as a
    (
        "compat",
        (table([0.9, 0.8, 0.1], [0.8, 0.1], [0.5]), 2, 1, 0, 1.0, True),
        [(0, 1, 0.9), (0, 2, 0.8), (0, 3, 0.1)],
        [0, 0, 0, 0],
        [0, -1, -1, -1],
    ),
    # compat: groups count as the model of their slot (a), and a is spent: nothing is left
    (
        "compat deadlock",
        (table([0.9, 0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.5, 0.1], [0.1]), 5, 1, 1, 1.0, True),
        [(0, 1, 0.9), (0, 2, 0.8), (0, 3, 0.1), (0, 4, 0.1)],
        [0, 0, 0, 0, 0],
        [0, -1, -1, -1],
    ),
    (
        "compat deadlock of one model",
        (table([0.9, 0.8, 0.1], [0.8, 0.1], [0.5]), 1, 1, 1, 1.0, True),
        [(0, 1, 0.9)],
        None,
        [0, 1, -1, -1],
    ),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("case", "merges", "group", "status"), [t[1:] for t in TABLE], ids=[t[0] for t in TABLE])
def test_table(
    backend: str, device: str, case: tuple, merges: list, group: list | None, status: list, dtype: type
) -> None:
    case = Case(*case)._replace(sim=case[0].astype(dtype))
    got = run(case, device)
    assert got.status.tolist() == status
    assert got.pair[: len(merges)].tolist() == [[i, j] for i, j, _ in merges]
    np.testing.assert_allclose(got.value[: len(merges)], [v for *_, v in merges], rtol=1e-6)
    assert got.group.tolist() == ([-1] * len(case.sim) if group is None else group)
    replay(case, got)


# --- the definition, replayed -----------------------------------------------------------------------------------------


def cases(n: int, kinds: Sequence[str], models: Sequence[int], dtype: type = np.float32) -> list[Case]:
    """A thin cut through kinds x models x alpha x budget x keep x rule: each pair of values meets somewhere."""
    found, turn = [], 0
    for kind in kinds:
        for m in models:
            size = max(n // m, 1) * m
            for alpha in ALPHAS:
                for compat in (False, True) if alpha > 0 else (False,):
                    turn += 1
                    choice = keeps(size, m, alpha)
                    sim = similarity(kind, size, turn, dtype)
                    found.append(Case(sim, m, choice[turn % len(choice)], BUDGETS[turn * 3 % 7 % 4], alpha, compat))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_replay(fast_backend: str, device: str, kind: str) -> None:
    for size, dtype in ((12, np.float32), (33, np.float64), (40, np.float32)):
        for case in cases(size, [kind], [1, 2, 3, 4], dtype):
            replay(case, run(case, device))


@pytest.mark.parametrize("kind", KINDS)
def test_replay_in_the_emulator(emu_backend: str, kind: str) -> None:
    turn = KINDS.index(kind)
    for case in cases(10, [kind], [1 + turn % 2, 3 + turn % 2]):
        replay(case, run(case))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", ["real", "rounded", "relu"])
def test_replay_every_budget_and_keep(cpu_backend: str, kind: str, budget: int) -> None:
    for models in (1, 2, 3, 4):
        for alpha in ALPHAS:
            for keep in keeps(24, models, alpha):
                for compat in (False, True) if alpha > 0 else (False,):
                    case = Case(similarity(kind, 24, keep + models), models, keep, budget, alpha, compat)
                    replay(case, run(case))


def inside_merges(case: Case, result: Result) -> list[int]:
    """Merges that each model took part in with itself, by the strict rule's count."""
    size, spent = len(case.sim) // case.models, [0] * case.models
    present = {k: {k // size} for k in range(len(case.sim))}
    for i, j in result.pair.tolist():
        for m in present[i] & present[j]:
            spent[m] += 1
        present[i] |= present.pop(j)
    return spent


@pytest.mark.parametrize("budget", [0, 1, 2, 5])
def test_strict_budget_is_never_exceeded_unless_lifted(fast_backend: str, device: str, budget: int) -> None:
    lifted = 0
    for seed in range(12):
        models = 2 + seed % 3
        n = 12 * models
        kind = ("real", "rounded", "relu", "positive")[seed % 4]
        case = Case(similarity(kind, n, seed), models, (12, 12 * (models - 1), 3)[seed % 3], budget, 0.3, False)
        got = run(case, device)
        lifted += got.status[LIFTED] > 0
        if got.status[LIFTED] == 0:
            assert max(inside_merges(case, got)) <= budget
        else:  # up to the lift the rule holds; after it, each merge is inside some model
            kept = len(got.pair) - int(got.status[LIFTED])
            assert max(inside_merges(case, got._replace(pair=got.pair[:kept]))) <= budget
    assert 0 < lifted < 12  # both happen in these data


# --- agreement of the backends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 63, 64, 65])
def test_sizes(backend: str, device: str, size: int) -> None:
    if backend == "emu" and size > 34:
        size = 34
    for case in (
        Case(similarity("real", size, size), 1, max(size // 2, 1), 2, 0.3, False),
        Case(similarity("coarse", size, size), 1, max(size // 3, 1), size // 2 + 1, 1.0, True),
    ):
        assert run(case, device).same_bits(reference(case))


@pytest.mark.parametrize("kind", KINDS)
def test_large_agrees_with_the_reference(cpu_backend: str, kind: str) -> None:
    for turn, alpha in enumerate(ALPHAS):
        models, budget = turn + 1, (MANY, 20, 3, 0)[(turn + len(kind)) % 4]
        for compat in (False, True) if alpha > 0 else (False,):
            case = Case(similarity(kind, 120, turn), models, 60, budget, alpha, compat)
            got = run(case)
            assert got.same_bits(reference(case))
            if turn == 1:
                replay(case, got)


@pytest.mark.parametrize("kind", ["real", "relu", "coarse"])
def test_larger_agrees_with_the_reference(cpu_backend: str, kind: str, threads) -> None:
    threads(1)  # the reference works on small matrices
    for models, keep, budget, compat in ((2, 150, 20, False), (3, 200, 5, True)):
        case = Case(similarity(kind, 300, models), models, keep, budget, 0.3, compat)
        assert run(case).same_bits(reference(case))


def random_case(rng: np.random.Generator, most: int) -> Case:
    models = int(rng.integers(1, 5))
    n = int(rng.integers(1, max(most // models, 1) + 1)) * models
    alpha = float(rng.choice([1.0, 0.9, 0.3, 1e-4, 0.0]))
    keep = int(rng.integers(1, n + 1))
    if alpha == 0:
        keep = max(keep, n - n // 2)
    budget = int(rng.choice([-1, 0, 1, 2, 3, n // 4, MANY]))
    dtype = (np.float32, np.float64)[int(rng.integers(2))]
    sim = similarity(KINDS[int(rng.integers(len(KINDS)))], n, int(rng.integers(1 << 30)), dtype)
    return Case(sim, models, keep, budget, alpha, bool(alpha > 0 and rng.random() < 0.5))


def test_random(cpu_backend: str) -> None:
    rng = np.random.default_rng(0)
    for trial in range(250):
        case = random_case(rng, 40)
        got = run(case)
        assert got.same_bits(reference(case)), trial
        replay(case, got)


def test_random_in_the_emulator(emu_backend: str) -> None:
    rng = np.random.default_rng(1)
    for trial in range(40):
        case = random_case(rng, 14)
        assert run(case).same_bits(reference(case)), trial


def test_equal_for_every_emulator_schedule(emu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (
        Case(similarity("coarse", 20, 0), 2, 6, 2, 0.3, False),
        Case(similarity("rounded", 20, 1), 2, 6, 2, 0.3, True),
        Case(similarity("relu", 20, 2), 2, 2, 0, 1.0, False),
    ):
        want = reference(case)
        for seed in range(4):
            monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
            assert run(case).same_bits(want)


def mixed(count: int, most: int) -> list[Case]:
    rng = np.random.default_rng(3)
    found = []
    for k in range(count):
        n = 3 * int(rng.integers(1, most // 3 + 1))
        keep = int(rng.integers(1, n + 1))
        found.append(Case(similarity(KINDS[k % len(KINDS)], n, k), 3, keep, int(rng.integers(0, 4)), 0.3, False))
    bad = similarity("real", 6, 0)
    bad[2, 4] = bad[4, 2] = NAN
    found.insert(2, Case(bad, 3, 2, 1, 0.3, False))
    return found


def test_spaces_in_one_call_equal_separate_calls(backend: str, device: str) -> None:
    spaces = mixed(7, 12) if backend == "emu" else mixed(60, 40)
    for together, case in zip(run_list(spaces, device), spaces, strict=True):
        assert together.same_bits(run(case, device))


def test_more_spaces_than_one_launch_holds(emu_backend: str) -> None:
    spaces = [Case(similarity("real", 2 + k % 2, k), 1, 1, MANY, 1.0, False) for k in range(35)]
    for together, case in zip(run_list(spaces), spaces, strict=True):
        assert together.same_bits(reference(case))


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    spaces, results = mixed(30, 60), []
    for n in (1, 2, 3, 4):
        threads(n)
        results.append(run_list(spaces))
    for other in results[1:]:
        assert all(a.same_bits(b) for a, b in zip(results[0], other, strict=True))


def test_inputs_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    case = Case(similarity("rounded", 18, 0), 2, 5, 2, 0.3, False)
    sim = torch.from_numpy(case.sim).to(device)
    before = sim.clone()
    first, second = (zip_match([sim], 2, [5], [2], 0.3, False) for _ in range(2))
    assert torch.equal(sim, before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided(backend: str, device: str) -> None:
    case = Case(similarity("rounded", 16, 0), 2, 5, 2, 0.3, False)
    want = reference(case)
    wide = torch.zeros(16, 40, device=device)
    wide[:, 2:34:2] = torch.from_numpy(case.sim).to(device)
    for view in (wide[:, 2:34:2], torch.from_numpy(case.sim).to(device).T):
        got = Result(*(t.cpu().numpy() for t in zip_match([view], 2, [5], [2], 0.3, False)))
        assert got._replace(status=got.status[0]).same_bits(want)


def test_the_diagonal_is_ignored(backend: str, device: str) -> None:
    case = Case(similarity("real", 12, 0), 2, 4, 2, 0.3, False)
    want = run(case, device)
    for value in (INF, -INF, 1e30, NAN):
        sim = case.sim.copy()
        np.fill_diagonal(sim, value)
        assert run(case._replace(sim=sim), device).same_bits(want)


def test_one_reciprocal_pair_at_a_time(backend: str, device: str) -> None:
    n = 16 if backend == "emu" else 100
    case = Case(similarity("chain", n, 0), 1, 1, MANY, 1.0, False)
    got = run(case, device)
    assert got.pair.tolist() == [[0, k] for k in range(1, n)]
    replay(case, got)


def test_zero_has_one_sign_or_none_matters(backend: str, device: str) -> None:
    sim = np.zeros((10, 10), np.float32)
    sim[np.triu_indices(10, 1)] = np.where(np.random.default_rng(0).random(45) < 0.5, 0.0, -0.0)
    case = Case(symmetric(sim), 1, 2, MANY, 0.5, False)
    got = run(case, device)
    assert got.pair.tolist() == [[0, k] for k in range(1, 9)]


def test_infinite_similarity(backend: str, device: str) -> None:
    sim = similarity("real", 10, 0)
    sim[1, 7] = sim[7, 1] = sim[2, 3] = sim[3, 2] = INF
    case = Case(sim, 2, 4, 2, 0.3, False)
    got = run(case, device)
    assert got.pair[:2].tolist() == [[1, 7], [2, 3]]
    replay(case, got)


def test_most_models(backend: str, device: str) -> None:
    n = 31 if backend == "emu" else 62
    for compat in (False, True):
        case = Case(similarity("real", n, 0), 31, n // 2, 1, 0.3, compat)
        got = run(case, device)
        replay(case, got)
        assert got.same_bits(reference(case))


@pytest.mark.parametrize(("n", "keep"), [(5, 1), (24, 1), (24, 7), (40, 20)])
def test_complete_linkage(backend: str, device: str, n: int, keep: int) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    if backend == "emu" and n > 24:
        pytest.skip("the emulator would take seconds; the smaller sizes run there")
    sim = symmetric(np.random.default_rng(n).permutation(n * n).reshape(n, n) / n**2)  # no two values are equal
    got = run(Case(sim, 1, keep, MANY, 1.0, False), device)
    tree = hierarchy.linkage(1 - sim[np.triu_indices(n, 1)], "complete")
    np.testing.assert_allclose(1 - got.value, tree[: n - keep, 2], rtol=1e-12)
    label = hierarchy.cut_tree(tree, keep)[:, 0]
    assert np.array_equal(label[:, None] == label[None, :], got.group[:, None] == got.group[None, :])


# --- the CUDA kernels: paths, and blocks shared out over spaces --------------------------------------------------------

PATHS = zip_match.paths.names


@pytest.fixture(params=["emu", "cuda"])
def kernels(request: pytest.FixtureRequest):
    """The device of the arguments, while the CUDA source runs: emulated, or on a GPU."""
    if (reason := zipfast.ops.why_not(request.param)) is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    with zipfast.backend(request.param):
        yield "cuda" if request.param == "cuda" else "cpu"


def by(path: str):
    return lambda *args: zip_match(*args, path)


def hard_cases() -> list[Case]:
    """One of each kind of end, and of what takes merges back."""
    real, tied, relu = (similarity(kind, 24, 5) for kind in ("real", "coarse", "relu"))
    bad, skew = real.copy(), real.copy()
    bad[3, 20] = NAN
    skew[4, 9] += 1
    return [
        Case(real, 2, 3, MANY, 0.3, False),  # to the negative ones
        Case(tied, 3, 4, 1, 0.9, False),  # budgets run out among ties, one model after the other
        Case(tied, 3, 4, 1, 0.9, True),
        Case(tied, 4, 6, 2, 1.0, False),
        Case(tied.astype(np.float64), 4, 6, 2, 0.5, True),
        Case(similarity("positive", 24, 6), 2, 2, 3, 0.3, False),  # lifted
        Case(relu, 2, 9, 4, 1e-4, False),
        Case(relu, 2, 12, 2, 0.0, False),
        Case(similarity("sparse", 24, 7), 1, 1, 3, 0.5, False),  # a deadlock
        Case(tied, 1, 1, 11, 1.0, True),  # the only model is spent: a deadlock
        Case(similarity("negative", 24, 8), 2, 8, 2, 0.3, False),
        Case(similarity("chain", 24, 9), 2, 5, 8, 0.9, False),
        Case(bad, 2, 5, 2, 0.3, False),
        Case(skew, 2, 5, 2, 0.3, False),
    ]


@pytest.mark.parametrize("path", PATHS)
def test_each_path_agrees_with_the_reference(kernels: str, path: str) -> None:
    statuses = set()
    for case in hard_cases():
        (got,) = run_list([case], kernels, by(path))
        assert got.same_bits(reference(case)), case[1:]
        statuses |= {k for k in range(4) if got.status[k] != (0 if k == LIFTED else -1)}
    assert statuses == {LIFTED, DEADLOCK, NAN_AT, ASYMMETRIC_AT}


def test_unknown_path_is_refused(kernels: str) -> None:
    with pytest.raises(ValueError, match="zip_match: 'path' must be one of auto, rounds, sequential, got 'fast'"):
        zip_match([S.to(kernels)], 2, [2], [1], 1.0, False, "fast")


# Rows of a few accesses of 16 bytes, one more or less; tiles of the emulator's 16; the last has a row of two chunks.
@pytest.mark.parametrize(
    ("n", "dtype"),
    [(n, t) for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33) for t in (np.float32, np.float64)]
    + [(130, np.float32), (260, np.float64)],
)
def test_sizes_of_the_kernels(kernels: str, n: int, dtype: type) -> None:
    case = Case(similarity("coarse", n, n, dtype), 1, max(n // 2, n - 60, 1), max(n // 8, 1), 0.9, n % 2 == 0)
    (got,) = run_list([case], kernels, by("rounds"))
    assert got.same_bits(reference(case))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned(kernels: str, path: str, offset: int) -> None:
    for case in (
        Case(similarity("coarse", 24, 1), 2, 8, 2, 0.9, False),
        Case(similarity("coarse", 24, 2, np.float64), 2, 8, 2, 0.9, True),
    ):
        n = len(case.sim)
        room = torch.zeros(n * n + offset, dtype=torch.from_numpy(case.sim).dtype, device=kernels)
        sim = room[offset:].view(n, n).copy_(torch.from_numpy(case.sim))
        assert sim.data_ptr() % 16 or (offset * sim.element_size()) % 16 == 0
        got = zip_match([sim], case.models, [case.keep], [case.budget], case.alpha, case.compat, path)
        assert Result(*(t.cpu().numpy() for t in (*got[:3], got[3][0]))).same_bits(reference(case))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "sizes",
    [(40, 2), (2, 30, 4), (6, 40, 2, 2, 12), (20, 20), (16,) * 4, (2,) * 9, (30, 4, 4, 4, 4, 4, 4, 4, 4, 2, 26)],
    ids=str,
)
def test_spaces_of_one_call_whatever_their_sizes(kernels: str, path: str, sizes: tuple) -> None:
    """Many blocks for a large one, several spaces for one block, more spaces than there are blocks."""
    spaces = [
        Case(similarity(KINDS[k % len(KINDS)], n, k), 2, max(n // 2, 1), (MANY, n // 8)[k % 2], 0.3, False)
        for k, n in enumerate(sizes)
    ]
    for got, case in zip(run_list(spaces, kernels, by(path)), spaces, strict=True):
        assert got.same_bits(reference(case))


def test_one_refused_space_does_not_hold_up_the_others(kernels: str) -> None:
    bad = similarity("real", 8, 0)
    bad[1, 5] = NAN
    skew = similarity("real", 30, 0)
    skew[1, 25] = 9
    for sims in ([bad] * 5 + [similarity("relu", 30, 1)], [skew, similarity("relu", 8, 2)] * 3):
        spaces = [Case(s, 2, len(s) // 2, 1, 0.3, False) for s in sims]
        for got, case in zip(run_list(spaces, kernels, by("rounds")), spaces, strict=True):
            assert got.same_bits(reference(case))


def test_groups_of_many_depths_are_made_anew(kernels: str) -> None:
    """Budgets that run out late, after groups have grown: merges that are kept have merges below them."""
    for n, models, budget, alpha, compat in ((40, 2, 14, 0.9, False), (36, 3, 8, 0.7, True), (40, 4, 6, 0.95, False)):
        sim = np.sqrt(similarity("positive", n, n))
        case = Case((sim / (sim.max() + 1)).astype(np.float32), models, models + 1, budget, alpha, compat)
        (got,) = run_list([case], kernels, by("rounds"))
        assert got.same_bits(reference(case))
        slots = got.pair[:, 0].tolist()
        assert max(slots.count(k) for k in set(slots)) > 2


# --- what only the values can tell ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("places", [[(3, 7)], [(0, 1)], [(11, 10), (10, 11)], [(9, 4), (6, 8), (6, 5)]])
def test_nan_is_refused_at_its_first_index(backend: str, device: str, places: list, dtype: type) -> None:
    sim = similarity("real", 12, 0, dtype)
    for i, j in places:
        sim[i, j] = NAN
    got = run(Case(sim, 2, 5, 2, 0.3, False), device)
    first = min(i * 12 + j for i, j in places)
    assert got.status.tolist() == [0, -1, first, -1]
    assert (got.group == -1).all() and (got.pair == -1).all() and np.isnan(got.value).all()


@pytest.mark.parametrize("places", [[(3, 7)], [(7, 3)], [(11, 0)], [(9, 4), (6, 8), (5, 6)]])
def test_asymmetry_is_refused_at_its_first_pair(backend: str, device: str, places: list) -> None:
    sim = similarity("real", 12, 0)
    for i, j in places:
        sim[i, j] = np.nextafter(sim[i, j], np.float32(9))
    got = run(Case(sim, 2, 5, 2, 0.3, False), device)
    first = min(min(i, j) * 12 + max(i, j) for i, j in places)
    assert got.status.tolist() == [0, -1, -1, first]
    assert (got.group == -1).all() and (got.pair == -1).all() and np.isnan(got.value).all()


def test_nan_and_asymmetry_far_into_a_large_matrix(fast_backend: str, device: str) -> None:
    for n in (130, 200):
        for i, j in ((0, n - 1), (63, 64), (64, 128), (n - 2, n - 1), (70, 65)):
            sim = similarity("real", n, 0)
            sim[i, j] += 1
            assert run(Case(sim, 1, n - 1, 2, 0.3, False), device).status[ASYMMETRIC_AT] == min(i, j) * n + max(i, j)
            sim[i, j] = NAN
            assert run(Case(sim, 1, n - 1, 2, 0.3, False), device).status.tolist() == [0, -1, i * n + j, -1]


def test_values_are_judged_even_where_nothing_merges(backend: str, device: str) -> None:
    sim = similarity("real", 4, 0)
    sim[1, 3] = NAN
    assert run(Case(sim, 2, 4, 2, 0.3, False), device).status.tolist() == [0, -1, 7, -1]


def test_lifted_counts_merges_that_were_made(backend: str, device: str) -> None:
    sim = table(
        [0.9, -INF, -INF], [-INF, -INF], [0.8]
    )  # one model, budget 1: (0, 1), lift, (2, 3), then nothing is left
    got = run(Case(sim, 1, 1, 1, 1.0, False), device)
    assert got.pair.tolist() == [[0, 1], [2, 3], [-1, -1]]
    assert got.status.tolist() == [1, 2, -1, -1]


# --- the contract -----------------------------------------------------------------------------------------------------

S = torch.zeros(4, 4)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "zip_match: 'sim' must be a non-empty list of tensors, got Tensor", (S, 2, [2], [1], 1.0, False)),
        (TypeError, "'sim' must be a non-empty list of tensors, got list", ([], 2, [], [], 1.0, False)),
        (TypeError, r"'sim\[1\]' must be a tensor, got str", ([S, "x"], 2, [2, 2], [1, 1], 1.0, False)),
        (ValueError, r"'models' must be in \[1, 31\], got 0", ([S], 0, [2], [1], 1.0, False)),
        (ValueError, r"'models' must be in \[1, 31\], got 32", ([torch.zeros(32, 32)], 32, [2], [1], 1.0, False)),
        (ValueError, r"'keep' must have one entry per space \(1\), got 2", ([S], 2, [2, 2], [1], 1.0, False)),
        (ValueError, r"'budget' must have one entry per space \(1\), got 0", ([S], 2, [2], [], 1.0, False)),
        (ValueError, r"'alpha' must be in \[0, 1\], got 1.5", ([S], 2, [2], [1], 1.5, False)),
        (ValueError, r"'alpha' must be in \[0, 1\], got -0.1", ([S], 2, [2], [1], -0.1, False)),
        (ValueError, r"'alpha' must be in \[0, 1\], got nan", ([S], 2, [2], [1], NAN, False)),
        (
            ValueError,
            r"'alpha' must be in \(0, 1\] with compat=True, got 0; zipfast.compat.zipit.match_tensors_zipit",
            ([S], 2, [2], [1], 0.0, True),
        ),
        (TypeError, r"'sim\[0\]' must be float32 or float64, got float16", ([S.half()], 2, [2], [1], 1.0, False)),
        (
            TypeError,
            r"'sim\[1\]' must be float32 or float64, got int64",
            ([S, S.long()], 2, [2, 2], [1, 1], 1.0, False),
        ),
        (TypeError, r"'sim\[1\]' must be float32 as the first one", ([S, S.double()], 2, [2, 2], [1, 1], 1.0, False)),
        (RuntimeError, r"'sim\[1\]' must be on cpu .*, got meta", ([S, S.to("meta")], 2, [2, 2], [1, 1], 1.0, False)),
        (
            ValueError,
            r"'sim' must be square \[F, F\], got \[16, 12\]",
            ([torch.zeros(16, 12)], 2, [2], [1], 1.0, False),
        ),
        (ValueError, r"'sim' must be square \[F, F\], got \[4\]", ([S[0]], 2, [2], [1], 1.0, False)),
        (ValueError, r"'sim' must be \[M\*D, M\*D\] with M = 3 models, got \[4, 4\]", ([S], 3, [2], [1], 1.0, False)),
        (
            ValueError,
            r"'sim' must be \[M\*D, M\*D\] with M = 2 models, got \[0, 0\]",
            ([S[:0, :0]], 2, [0], [1], 1.0, False),
        ),
        (ValueError, r"'keep' must be in \[1, 4\], got 0", ([S], 2, [0], [1], 1.0, False)),
        (ValueError, r"'keep' must be in \[1, 4\], got 5", ([S], 2, [5], [1], 1.0, False)),
        (
            ValueError,
            r"'alpha' must be greater than 0 where more than half of the 4 features are merged away \(keep = 1\)",
            ([S], 2, [1], [1], 0.0, False),
        ),
    ],
)
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        zip_match(*args)


def test_automatic_choice_serves_the_cpu() -> None:
    with zipfast.backend(None):
        case = Case(FOUR, 2, 1, MANY, 1.0, False)
        replay(case, run(case))
