# SPDX-License-Identifier: Apache-2.0
"""evidence: against the definition in dense numpy, by the density of scipy, by a brute-force maximum, and by its laws."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch

from zipfast.ops import evidence

EVIDENCE, ALPHA, BETA, RATIO = range(4)
STEPS, CONVERGED, CODE = range(3)
FINE, EMPTY, NO_SIGNAL, PERFECT_FIT, NOT_FINITE = range(5)
REFERENCE, CORRECTED, EXACT = range(3)
MODES = pytest.mark.parametrize("mode", [REFERENCE, CORRECTED, EXACT], ids=["reference", "corrected", "exact"])
UNBIASED = pytest.mark.parametrize("mode", [CORRECTED, EXACT], ids=["corrected", "exact"])
ROUNDS = pytest.mark.parametrize("mode", [REFERENCE, CORRECTED], ids=["reference", "corrected"])
FORMS = pytest.mark.parametrize("form", ["diagonal", "tridiagonal"])
SIZES = (0, 1, 2, 7, 8, 9, 31, 32, 33)
OUTPUTS = (1, 7, 8, 9, 33)
WIDE = ((127, 1), (128, 3), (130, 1), (257, 2))  # rows and outputs: an output's threads are more than one warp
LAUNCH, FULL_LAUNCH = 20, 352  # kEvidenceProblems: what one launch takes, on the emulator and on a GPU
EPS, FLOOR = 1e-5, 1e-10
LOG_TAU = np.log(2 * np.pi)


class Problem(NamedTuple):
    """F and Y, and what the operator is told of them; ``basis`` leads from its coordinates to those of F."""

    f: np.ndarray
    y: np.ndarray
    diagonal: np.ndarray
    offdiagonal: np.ndarray
    projected: np.ndarray
    square: np.ndarray
    basis: np.ndarray


class Answer(NamedTuple):
    value: np.ndarray
    status: np.ndarray
    mean: list[np.ndarray]  # one per problem


def draw(n: int, d: int, outputs: int, noise: float = 0.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng([seed, n, d, outputs])
    f = g.standard_normal((n, d)) * np.geomspace(1, 0.05, d) if d else np.zeros((n, 0))
    return f, f @ g.standard_normal((d, outputs)) + noise * g.standard_normal((n, outputs))


def form_of(f: np.ndarray, y: np.ndarray, form: str) -> Problem:
    square, d = (y**2).sum(0), f.shape[1]
    if form == "diagonal":
        _, s, v = np.linalg.svd(f, full_matrices=False)
        return Problem(f, y, s**2, np.zeros(max(len(s) - 1, 0)), v @ (f.T @ y), square, v.T)
    h, q = scipy.linalg.hessenberg(f.T @ f, calc_q=True) if d else (np.zeros((0, 0)), np.zeros((0, 0)))
    return Problem(f, y, np.diag(h).copy(), np.diag(h, 1).copy(), q.T @ (f.T @ y), square, q)


@functools.cache
def made(n: int, d: int, outputs: int, noise: float, form: str) -> Problem:
    return form_of(*draw(n, d, outputs, noise), form)


def arguments(problems: list[Problem], form: str, device: str) -> tuple:
    def tensors(name: str) -> list[torch.Tensor]:
        return [torch.tensor(getattr(p, name), dtype=torch.float64, device=device) for p in problems]

    off = tensors("offdiagonal") if form == "tridiagonal" else []
    sizes = [len(p.f) for p in problems], [p.f.shape[1] for p in problems]
    return tensors("diagonal"), off, tensors("projected"), tensors("square"), *sizes


def options(mode: int, tol=None, max_iter=None, eps=None, floor=FLOOR, mean=False) -> tuple:
    usual = (1e-10, 100, 0.0) if mode == EXACT else (1e-3, 11, EPS)
    chosen = (u if o is None else o for o, u in zip((tol, max_iter, eps), usual))
    return mode, *chosen, floor, mean


def solve(problems: list[Problem] | Problem, mode: int, device: str, form: str = "diagonal", **other) -> Answer:
    problems = [problems] if isinstance(problems, Problem) else problems
    result = evidence(*arguments(problems, form, device), *options(mode, **other))
    value, status, mean = (r.cpu().numpy() for r in result)
    outputs = sum(len(p.square) for p in problems)
    assert (value.dtype, status.dtype, mean.dtype) == (np.float64, np.int64, np.float64)
    assert value.shape == (4, outputs) and status.shape == (3, outputs)
    assert all(r.device.type == device and r.is_contiguous() for r in result)
    problems = problems if other.get("mean") else []
    sizes = [p.projected.size for p in problems]
    assert mean.shape == (sum(sizes),)
    split = np.split(mean, np.cumsum(sizes)[:-1])
    return Answer(value, status, [m.reshape(p.projected.shape) for m, p in zip(split, problems)])


def alone(sigma, z, square, device: str, mode: int = EXACT, samples: int = 9, features: int = 0, **other) -> Answer:
    """One output, or a column each, from a spectrum given by hand."""
    sigma, z, square = (np.asarray(v, np.float64) for v in (sigma, z, square))
    f = np.broadcast_to(0.0, (samples, features or len(sigma)))
    return solve(Problem(f, z, sigma, sigma, z, square, sigma), mode, device, **other)


def same_bits(got: tuple, want: tuple) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.view(torch.int64), b.view(torch.int64))


# ------------------------------------------------------------------------------------- the definition, in dense algebra


def iterate(f, y, mode: int, kept: int, tol: float = 1e-3, most: int = 11, eps: float = EPS) -> tuple:
    """One output: (evidence, α, β, t of the mean), rounds, whether near, mean."""
    (n, d), alpha, beta = f.shape, 1.0, 1.0
    for rounds in range(1, most + 1):  # noqa: B007
        t, a = alpha / beta, alpha * np.eye(d) + beta * f.T @ f
        m = beta * np.linalg.solve(a, f.T @ y)
        gamma = beta * np.trace(np.linalg.solve(a, f.T @ f))
        misfit = ((y - f @ m) ** 2).sum()
        alpha, beta = gamma / (m @ m + eps), (n - gamma) / (misfit + eps)
        near = abs(alpha / beta - t) / t <= tol
        if near:
            break
    logdet = np.linalg.slogdet(alpha * np.eye(d) + beta * f.T @ f)[1]
    counted = 2 * d - kept if mode == REFERENCE else d  # there, that determinant is of the kept directions only
    twice = counted * np.log(alpha) + n * np.log(beta) - logdet - beta * misfit - alpha * m @ m
    return (twice / (2 * n) - LOG_TAU / 2, alpha, beta, t), rounds, near, m


def profile(f, y, u: np.ndarray) -> np.ndarray:
    """Evidence at ln t = u and the best β for it: [len(u), K]."""
    n = len(y)
    c = np.eye(n) + f @ f.T / np.exp(u)[:, None, None]
    q = np.einsum("nk,unk->uk", y, np.linalg.solve(c, np.broadcast_to(y, (len(u), *y.shape))))
    return -np.log(q / n) / 2 - np.linalg.slogdet(c)[1][:, None] / (2 * n) - (1 + LOG_TAU) / 2


def climb(f: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The highest evidence of each output: a dense grid, then scipy; the flat end is the null evidence."""
    trace = (f**2).sum()
    best = -(np.log((y**2).mean(0)) + 1 + LOG_TAU) / 2
    grid = np.log(trace or 1) + np.linspace(-26, 12, 200)
    seen = profile(f, y, grid)
    for j, i in enumerate(seen.argmax(0)):
        ends = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
        one = lambda u, j=j: -profile(f, y[:, j : j + 1], np.array([u]))[0, 0]  # noqa: E731
        best[j] = max(best[j], -scipy.optimize.minimize_scalar(one, bounds=ends, options={"xatol": 1e-7}).fun)
    return best


@functools.cache
def expected(n: int, d: int, outputs: int, noise: float, mode: int, kept: int) -> tuple | np.ndarray:
    f, y = draw(n, d, outputs, noise)
    if mode == EXACT:
        return climb(f, y)
    value, rounds, near, mean = zip(*(iterate(f, y[:, j], mode, kept) for j in range(outputs)))
    return np.array(value).T, np.array(rounds), np.array(near), np.array(mean).T


def allowed(p: Problem, got: Answer, tolerance) -> np.ndarray:
    """Q is the difference of ‖y‖² and a sum: its rounding, and so that of ln Q, grows with ‖y‖² / Q = β ‖y‖² / N."""
    return tolerance("evidence", "exact", torch.float64)["atol"] * (1 + p.square * got.value[BETA] / len(p.f))


def check(p: Problem, got: Answer, want: tuple | np.ndarray, mode: int, tolerance) -> None:
    if mode == EXACT:
        assert (np.abs(got.value[EVIDENCE] - want) <= allowed(p, got, tolerance)).all()
        return
    value, rounds, near, mean = want
    close, relative = (tolerance("evidence", what, torch.float64) for what in ("value", "precision"))
    np.testing.assert_allclose(got.value[EVIDENCE], value[EVIDENCE], **close)
    np.testing.assert_allclose(got.value[ALPHA:] / value[ALPHA:], 1, **relative)
    assert (got.status == np.stack([rounds, near, FINE * rounds])).all()
    scale = np.abs(mean).max() or 1.0
    np.testing.assert_allclose(p.basis @ got.mean[0] / scale, mean / scale, **close)


def test_table(backend: str, device: str) -> None:
    # σ = 4, z = 2, ‖y‖² = 2, N = 3: by hand, Q = (2t + 4) / (t + 4), and the slope of L is 0 at t = 4 alone
    got = alone([4], [[2]], [2], device, samples=3, mean=True)
    np.testing.assert_allclose(got.value[:, 0], [np.log(2) / 3 - (1 + LOG_TAU) / 2, 8, 2, 4], rtol=1e-9)
    assert got.status[CONVERGED:, 0].tolist() == [1, FINE]
    np.testing.assert_allclose(got.mean[0], [[0.25]], rtol=1e-9)
    # one round from t = 1: γ = 0.8, ‖m‖² = 0.16, ‖y - Fm‖² = 2 - 24/25; D = 3 tells the modes apart
    for mode, more in ((REFERENCE, 2), (CORRECTED, 0)):
        got = alone([4], [[2]], [2], device, mode, samples=3, features=3, max_iter=1, eps=0.0, mean=True)
        a, b = 0.8 / 0.16, 2.2 / 1.04
        want = more / 2 * np.log(a) + 1.5 * np.log(b) - np.log1p(4 * b / a) / 2 - b / 2 * 1.04 - a / 2 * 0.16
        np.testing.assert_allclose(got.value[:, 0], [want / 3 - LOG_TAU / 2, a, b, 1], rtol=1e-14)
        assert got.status[:, 0].tolist() == [1, 0, FINE]
        np.testing.assert_allclose(got.mean[0], [[0.4]], rtol=1e-15)


@MODES
@FORMS
@pytest.mark.parametrize("shape", [(40, 9, 5, 0.5), (17, 30, 4, 0.1), (25, 25, 3, 2.0), (60, 5, 4, 0.02)], ids=str)
def test_definition(backend: str, device: str, mode: int, form: str, shape: tuple, tolerance) -> None:
    p = made(*shape, form)
    got = solve(p, mode, device, form, mean=True)
    check(p, got, expected(*shape, mode, len(p.diagonal)), mode, tolerance)
    gram, error = p.f.T @ p.f, allowed(p, got, tolerance)
    for (found, alpha, beta, t), m, y, e in zip(got.value.T, got.mean[0].T, p.y.T, error):
        if mode == EXACT and np.isfinite(t):
            density = scipy.stats.multivariate_normal(None, np.eye(len(y)) / beta + p.f @ p.f.T / alpha)
            assert abs(found - density.logpdf(y) / len(y)) <= e and alpha == pytest.approx(t * beta, rel=1e-15)
        want = np.linalg.solve(gram + t * np.eye(len(gram)), p.f.T @ y) if np.isfinite(t) else 0 * m
        close = 1e-13 * (1e3 + np.trace(gram) / t) * np.abs(want).max()  # the condition of the matrix
        np.testing.assert_allclose(p.basis @ m, want, rtol=0, atol=close)


@MODES
@FORMS
@pytest.mark.parametrize("k", SIZES)
def test_sizes(backend: str, device: str, mode: int, form: str, k: int, tolerance) -> None:
    for outputs in OUTPUTS:
        p = made(36, k, outputs, 0.5, form)
        if k > 0 or mode == EXACT:  # else in test_no_features_worth_the_name
            want = expected(36, k, outputs, 0.5, mode, k)
            check(p, solve(p, mode, device, form, mean=True), want, mode, tolerance)


@MODES
@FORMS
@pytest.mark.parametrize(("k", "outputs"), WIDE)
def test_many_rows_few_outputs(
    backend: str, device: str, mode: int, form: str, k: int, outputs: int, tolerance
) -> None:
    p = made(k + 30, k, outputs, 0.5, form)
    got = solve(p, mode, device, form, mean=True)
    if mode != EXACT:
        check(p, got, expected(k + 30, k, outputs, 0.5, mode, k), mode, tolerance)
        return
    best = profile(p.f, p.y, np.log(got.value[RATIO]))[range(outputs), range(outputs)]
    around = profile(p.f, p.y, np.log(np.outer([0.5, 0.99, 1.01, 2], got.value[RATIO])).ravel()).reshape(
        4, outputs, outputs
    )
    error = allowed(p, got, tolerance)
    assert (np.abs(got.value[EVIDENCE] - best) <= error).all()
    assert (around[:, range(outputs), range(outputs)] <= best + error).all()
    t = got.value[RATIO]
    want = [np.linalg.solve(p.f.T @ p.f + t[j] * np.eye(k), p.f.T @ p.y[:, j]) for j in range(outputs)]
    np.testing.assert_allclose(p.basis @ got.mean[0], np.array(want).T, rtol=0, atol=1e-9 * np.abs(want).max())


@MODES
@pytest.mark.parametrize("dead", [0, 30])
def test_steep_spectra(backend: str, device: str, mode: int, dead: int, tolerance) -> None:
    """Eigenvalues over 16 orders of magnitude, and a null space: the tridiagonal form says what the diagonal one does."""
    g = np.random.default_rng(3)
    f = g.standard_normal((200, 130)) * np.geomspace(1, 1e-8, 130)
    f = f @ np.linalg.qr(g.standard_normal((130, 130)))[0]
    f[:, :dead] = 0
    y = f @ g.standard_normal((130, 2)) + [0.5, 0.01] * g.standard_normal((200, 2))
    forms = [form_of(f, y, form) for form in ("diagonal", "tridiagonal")]
    first, second = (solve(p, mode, device, form) for p, form in zip(forms, ("diagonal", "tridiagonal")))
    assert (first.status[CODE] == second.status[CODE]).all() and (first.status[CODE] == FINE).all()
    error = 10 * allowed(forms[0], first, tolerance)
    assert (np.abs(first.value[EVIDENCE] - second.value[EVIDENCE]) <= error).all()
    np.testing.assert_allclose(second.value[ALPHA:], first.value[ALPHA:], rtol=1e-6)


@MODES
@pytest.mark.parametrize("k", [40, 128])
def test_forms_take_the_same_steps(backend: str, device: str, mode: int, k: int) -> None:
    """Newton's second derivative decides how many; where it is wrong, only their number shows it."""
    first, second = (solve(made(3 * k, k, 3, 0.5, form), mode, device, form) for form in ("diagonal", "tridiagonal"))
    assert first.status.tolist() == second.status.tolist() and first.status[CONVERGED].all()


@MODES
def test_outputs_do_not_touch_each_other(backend: str, device: str, mode: int) -> None:
    p = made(60, 40, 5, 0.5, "tridiagonal")
    want = solve(p, mode, device, "tridiagonal", mean=True)
    z, square = p.projected.copy(), p.square.copy()
    z[17, 2], z[0, 4], square[3] = np.nan, np.nan, np.nan
    got = solve(p._replace(projected=z, square=square), mode, device, "tridiagonal", mean=True)
    assert got.status[CODE].tolist() == [FINE, FINE, NOT_FINITE, NOT_FINITE, NOT_FINITE]
    for fine in (0, 1):
        if backend == "torch":  # its product of matrices adds columns together
            np.testing.assert_allclose(got.value[:, fine], want.value[:, fine], rtol=1e-9)
        else:
            assert (got.value[:, fine] == want.value[:, fine]).all()
            assert (got.mean[0][:, fine] == want.mean[0][:, fine]).all()


@MODES
@FORMS
def test_strided(backend: str, device: str, mode: int, form: str) -> None:
    args = arguments([made(36, 9, 9, 0.5, form)], form, device)
    wide = [[torch.stack([t, t], -1)[..., 0] for t in tensors] for tensors in args[:4]]
    want = evidence(*args, *options(mode, mean=True))
    for _ in range(2):
        got = evidence(*wide, *args[4:], *options(mode, mean=True))
        if backend == "torch":  # a library's product of strided matrices adds in another order
            torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        else:
            same_bits(got, want)
        wide[2] = [t.T.contiguous().T for t in args[2]]
    shifted = [[torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape) for t in tensors] for tensors in args[:4]]
    same_bits(evidence(*shifted, *args[4:], *options(mode, mean=True)), want)


@MODES
@FORMS
def test_many_problems_equal_one_by_one_and_inputs_stay(backend: str, device: str, mode: int, form: str) -> None:
    shapes = [(12 + i, (0, 1, 5, 20)[i % 4], (1, 0, 9, 33)[i % 3]) for i in range(2 * LAUNCH + 3)]
    problems = [made(n, d, outputs, 0.5, form) for n, d, outputs in shapes]
    args = arguments(problems, form, device)
    before = [[t.clone() for t in tensors] for tensors in args[:4]]
    together = evidence(*args, *options(mode, mean=True))
    same_bits(evidence(*args, *options(mode, mean=True)), together)
    assert all(torch.equal(a, b) for x, y in zip(before, args[:4]) for a, b in zip(x, y, strict=True))
    single = [evidence(*arguments([p], form, device), *options(mode, mean=True)) for p in problems]
    value, status, mean = zip(*single)
    same_bits(together, (torch.cat(value, 1), torch.cat(status, 1), torch.cat(mean)))


@FORMS
def test_more_problems_than_a_launch_takes(backend: str, device: str, form: str) -> None:
    count = LAUNCH + 3 if backend == "torch" else FULL_LAUNCH + 3
    problems = [made(12 + i % 7, i % 4 + 1, i % 3, 0.5, form) for i in range(count)]
    options_ = options(CORRECTED, mean=True)
    together = evidence(*arguments(problems, form, device), *options_)
    parts = [evidence(*arguments(problems[b : b + 17], form, device), *options_) for b in range(0, count, 17)]
    value, status, mean = zip(*parts)
    same_bits(together, (torch.cat(value, 1), torch.cat(status, 1), torch.cat(mean)))


@MODES
@FORMS
def test_equal_for_every_thread_count(cpu_backend: str, threads, mode: int, form: str) -> None:
    problems = [made(80, 60, 70, 0.5, form), made(36, 9, 33, 0.5, form)]
    args = *arguments(problems, form, "cpu"), *options(mode, mean=True)
    want = evidence(*args)
    for n in range(1, 5):
        threads(n)
        same_bits(evidence(*args), want)


@MODES
@FORMS
def test_equal_for_every_emulator_schedule(emu_backend: str, monkeypatch, mode: int, form: str) -> None:
    problems = [made(36, 9, 33, 0.5, form), made(36, 7, 8, 0.5, form), made(158, 128, 3, 0.5, form)]
    args = *arguments(problems, form, "cpu"), *options(mode, mean=True)
    want = evidence(*args)
    for seed in range(3):
        monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
        same_bits(evidence(*args), want)


# Two groups of eigenvalues, 10^8 apart, with a signal in both: found by looking for profiles with two maxima.
TWO_MAXIMA = {"first": (6, 24, 300, 0.60, 0.30), "second": (6, 24, 300, 0.90, 0.02)}


@pytest.mark.parametrize("case", TWO_MAXIMA)
def test_exact_finds_the_higher_of_two_maxima(backend: str, device: str, case: str, tolerance) -> None:
    few, many, n, strong, weak = TWO_MAXIMA[case]
    sigma = np.repeat([1e8, 1.0], [few, many])
    z = np.sqrt(sigma * np.repeat([strong / few, weak / many], [few, many]))
    u = np.log(sigma.sum()) + np.linspace(-45, 10, 20001)
    t = np.exp(u)[:, None]
    seen = -np.log((1 - (z**2 / (sigma + t)).sum(1)) / n) / 2 - np.log1p(sigma / t).sum(1) / (2 * n)
    tops = 1 + np.flatnonzero((seen[1:-1] > seen[:-2]) & (seen[1:-1] > seen[2:]))
    assert len(tops) == 2 and np.ptp(seen[tops]) > 0.01 and seen[tops].argmax() == (case == "second")
    got = alone(sigma, z[:, None], [1], device, samples=n)
    assert got.status[CONVERGED:, 0].tolist() == [1, FINE]
    np.testing.assert_allclose(np.log(got.value[RATIO, 0]), u[tops[seen[tops].argmax()]], atol=0.01)
    assert got.value[EVIDENCE, 0] == pytest.approx(seen.max() - (1 + LOG_TAU) / 2, abs=1e-6)


@FORMS
def test_exact_is_equivariant_under_scale(backend: str, device: str, form: str) -> None:
    f, y = draw(30, 8, 4)
    base = solve(form_of(f, y, form), EXACT, device, form)
    for c in (1e-6, 3.0, 1e6):
        for other, less in ((form_of(c * f, y, form), 0), (form_of(f, c * y, form), np.log(c))):
            got = solve(other, EXACT, device, form)
            np.testing.assert_allclose(got.value[EVIDENCE], base.value[EVIDENCE] - less, rtol=0, atol=1e-12)


@UNBIASED
@FORMS
def test_padding_with_zeros_changes_nothing(backend: str, device: str, form: str, mode: int) -> None:
    f, y = draw(30, 8, 4)
    wider = form_of(np.pad(f, ((0, 0), (0, 7))), y, form)  # null directions told of, and not
    base = solve(form_of(f, y, form), mode, device, form)
    for wide in (wider, form_of(f, y, form)._replace(f=wider.f)):
        got = solve(wide, mode, device, form).value[EVIDENCE]
        np.testing.assert_allclose(got, base.value[EVIDENCE], rtol=0, atol=1e-12)


@FORMS
def test_no_signal(backend: str, device: str, form: str) -> None:
    f, y = draw(30, 4, 2)
    y[:, 1] -= f @ np.linalg.lstsq(f, y[:, 1])[0]  # orthogonal to the features
    got = solve(form_of(f, y, form), EXACT, device, form, mean=True)
    assert got.status[CODE].tolist() == [FINE, NO_SIGNAL] and got.status[CONVERGED].all()
    want = [-(np.log(power := (y[:, 1] ** 2).mean()) + 1 + LOG_TAU) / 2, np.inf, 1 / power, np.inf]
    np.testing.assert_allclose(got.value[:, 1], want, rtol=1e-14)
    assert (got.mean[0][:, 1] == 0).all() and (got.mean[0][:, 0] != 0).all()


@MODES
def test_codes(backend: str, device: str, mode: int) -> None:
    sigma, nan, inf = [4.0, 1.0], np.nan, np.inf
    z = np.array([[1, 0, nan, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1]])
    square = [2, 0, 2, nan, -1, inf, 2]
    got = alone(sigma, z, square, device, mode, mean=True)
    want = alone(sigma, z[:, :1], square[:1], device, mode, mean=True)
    for good in (0, 6):  # unharmed by the others, in whichever lane
        assert got.value[:, good].tolist() == want.value[:, 0].tolist()
        assert got.mean[0][:, good].tolist() == want.mean[0][:, 0].tolist()
    assert got.status[CODE, [0, 2, 3, 5, 6]].tolist() == [FINE, NOT_FINITE, NOT_FINITE, NOT_FINITE, FINE]
    assert not np.isfinite(got.value[EVIDENCE, [2, 3, 5]]).any() and (got.status[STEPS, 2] == 1 or mode == EXACT)
    if mode == REFERENCE:  # what the public formula says of an output that is 0 everywhere
        want = iterate(np.vstack([np.diag([2, 1]), np.zeros((7, 2))]), np.zeros(9), REFERENCE, 2)
        np.testing.assert_allclose(got.value[:, 1], want[0], rtol=1e-13)
        assert got.status[:, 1].tolist() == [want[1], want[2], FINE] and got.value[EVIDENCE, 1] > 5
    else:
        assert got.status[:, 1].tolist() == [0, 0, EMPTY] and np.isnan(got.value[:, 1]).all()
        assert got.status[CODE, 4] == NOT_FINITE and (got.mean[0][:, 1] == 0).all()


@MODES
def test_no_features_worth_the_name(backend: str, device: str, mode: int) -> None:
    for sigma in ([], [0, -1e-18]):
        got = alone(sigma, np.zeros((len(sigma), 1)), [2], device, mode, mean=True)
        assert got.status[CODE, 0] == {REFERENCE: NOT_FINITE, CORRECTED: FINE, EXACT: NO_SIGNAL}[mode]
        if mode != REFERENCE:  # which takes ln α of α = 0
            assert got.value[EVIDENCE, 0] == pytest.approx(-(np.log(2 / 9) + 1 + LOG_TAU) / 2, abs=1e-9)
            assert (got.mean[0] == 0).all()


@FORMS
def test_perfect_fit(backend: str, device: str, form: str) -> None:
    f, y = draw(30, 4, 3, noise=0.0)
    y[:, 1] += np.random.default_rng(0).standard_normal(30)
    got = solve(p := form_of(f, y, form), EXACT, device, form, mean=True)
    assert got.status[CODE].tolist() == [PERFECT_FIT, FINE, PERFECT_FIT]
    assert (got.value[BETA] * p.square <= 30 / FLOOR * 1.001).all()
    np.testing.assert_allclose(f @ p.basis @ got.mean[0][:, [0, 2]], y[:, [0, 2]], atol=1e-4)
    got = alone([4], [[np.sqrt(8) * (1 + 1e-9)]], [2], device, CORRECTED, eps=1e-12)  # ‖y - Fm‖² a bit below 0
    assert got.status[CODE] == FINE and got.value[BETA] > 1e12


@ROUNDS
def test_rounds_tolerance_and_eps(backend: str, device: str, mode: int) -> None:
    p = form_of(*draw(40, 9, 3), "diagonal")
    for tol, most, eps in ((1e-9, 400, EPS), (1e-9, 3, EPS), (0.5, 11, EPS), (1e-3, 11, 0.0), (1e-3, 11, 3.0)):
        got = solve(p, mode, device, tol=tol, max_iter=most, eps=eps)
        for j in range(3):
            value, rounds, near, _ = iterate(p.f, p.y[:, j], mode, 9, tol, most, eps)
            np.testing.assert_allclose(got.value[:, j], value, rtol=1e-11)
            assert got.status[:, j].tolist() == [rounds, near, FINE]
    assert solve(p, mode, device, tol=1e-9, max_iter=3).status[:CODE].tolist() == [[3] * 3, [0] * 3]
    assert solve(p, EXACT, device, max_iter=2).status[:CODE].tolist() == [[2] * 3, [0] * 3]


@MODES
def test_eigenvalues_below_zero_are_zero_and_nan_is_told(backend: str, device: str, mode: int) -> None:
    z = np.array([[1.0, 2], [3, 1], [0, 0], [0, 0]])
    got, want = (alone([4, 2, v, v], z, [6, 5], device, mode, mean=True) for v in (-1e-9, 0))
    assert got.value.tolist() == want.value.tolist() and got.mean[0].tolist() == want.mean[0].tolist()
    got = alone([4, 2, 0, np.nan], z, [6, 5], device, mode)
    assert (got.status[CODE] == NOT_FINITE).all() and np.isnan(got.value[EVIDENCE]).all()


@pytest.mark.parametrize(("n", "d"), [(60, 20), (20, 60)])
def test_the_public_code(backend: str, device: str, n: int, d: int) -> None:
    if not (folder := os.environ.get("ZIPFAST_LOGME")):
        pytest.skip("ZIPFAST_LOGME names no checkout of the public LogME code")
    pytest.importorskip("numba")
    spec = importlib.util.spec_from_file_location("public_logme", Path(folder) / "LogME.py")
    public = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(public)
    for seed in range(10):
        f, y = draw(n + seed, d + seed, 3, seed=seed)
        theirs = public.LogME(regression=True)
        score = theirs.fit(f, y)
        got = solve(form_of(f, y, "diagonal"), REFERENCE, device)
        np.testing.assert_allclose(got.value[EVIDENCE].mean(), score, rtol=0, atol=1e-12 if n > d else 1e-10)
        np.testing.assert_allclose(got.value[ALPHA : BETA + 1], [theirs.alphas, theirs.betas], rtol=1e-7)


V, M = torch.ones(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
GOOD = {
    "diagonal": [V], "offdiagonal": [], "projected": [M], "square": [M[0]], "samples": [5], "features": [2],
    "mode": 0, "tol": 1e-3, "max_iter": 11, "eps": EPS, "floor": FLOOR, "mean": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "'diagonal' must be a non-empty list of tensors, got Tensor", {"diagonal": V}),
        (TypeError, r"'projected\[0\]' must be a tensor, got int", {"projected": [1]}),
        (TypeError, r"'offdiagonal\[0\]' must be a tensor, got int", {"offdiagonal": [1]}),
        (ValueError, r"'square' must have one entry per problem \(1\), got 2", {"square": [V, V]}),
        (ValueError, r"'offdiagonal' must have one entry per problem \(1\), got 2", {"offdiagonal": [V, V]}),
        (TypeError, r"'diagonal\[0\]' must be float64, got float32", {"diagonal": [V.float()]}),
        (TypeError, r"'offdiagonal\[0\]' must be float64, got float32", {"offdiagonal": [V[:1].float()]}),
        (RuntimeError, r"'projected\[0\]' must be on cpu as the other arg.*, got meta", {"projected": [M.to("meta")]}),
        (RuntimeError, r"'offdiagonal\[0\]' must be on cpu .*, got meta", {"offdiagonal": [V[:1].to("meta")]}),
        (ValueError, r"'diagonal\[0\]' must have 1 axes, got shape \[2, 3\]", {"diagonal": [M]}),
        (ValueError, r"'projected\[0\]' must have 2 axes, got shape \[2\]", {"projected": [V]}),
        (ValueError, r"'projected\[0\]' must be \[k, K\] = \[2, 3\], got \[3, 2\]", {"projected": [M.T]}),
        (ValueError, r"'offdiagonal\[0\]' must be \[k - 1\] = \[1\], got \[2\]", {"offdiagonal": [V]}),
        (ValueError, r"'samples\[0\]' must be at least 1, got 0", {"samples": [0]}),
        (ValueError, r"'features\[0\]' must be at least k = 2, got 1", {"features": [1]}),
        (ValueError, r"'mode' must be 0 \(reference\), 1 \(corrected\) or 2 \(exact\), got 3", {"mode": 3}),
        (ValueError, "'max_iter' must be at least 1, got 0", {"max_iter": 0}),
        (ValueError, "'tol' must be at least 0, got -1", {"tol": -1.0}),
        (ValueError, "'eps' must be at least 0, got nan", {"eps": float("nan")}),
        (ValueError, "'floor' must be at least 0, got inf", {"floor": float("inf")}),
    ],
)
def test_errors(error: type, match: str, change: dict) -> None:
    evidence(*GOOD.values())
    with pytest.raises(error, match="^evidence: " + match):
        evidence(*(GOOD | change).values())
