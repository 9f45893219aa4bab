# SPDX-License-Identifier: Apache-2.0
"""``evidence``: the log evidence of Bayesian linear regression, maximised over α and β (You et al. 2021, LogME).

Users meet it as :func:`zipfast.logme`, :class:`zipfast.FeatureStats` and :class:`zipfast.LogME`; this is the operator below
them, on the spectrum of the features' Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._registry import op

NAME = "evidence"
REFERENCE, CORRECTED, EXACT = range(3)  # modes
FINE, EMPTY, NO_SIGNAL, PERFECT_FIT, NOT_FINITE = range(5)  # codes
EVIDENCE, ALPHA, BETA, RATIO = range(4)  # rows of the first result
STEPS, CONVERGED, CODE = range(3)  # rows of the second

# Exact mode looks at the profile in these places, ln t - ln Σσ, before it climbs: there may be several maxima.
SCAN_FIRST, SCAN_STEP, SCAN_POINTS = -36.0, 1.25, 35
CLIMB_LOW, CLIMB_HIGH, FLAT, LONGEST_STEP = -60.0, 26.0, 18.0, 3.0


def _contract(
    diagonal: list[Tensor], offdiagonal: list[Tensor], projected: list[Tensor], square: list[Tensor], samples: list[int],
    features: list[int], mode: int, tol: float, max_iter: int, eps: float, floor: float, mean: bool,
) -> None:  # fmt: skip
    check.check_tensors(NAME, "diagonal", diagonal)
    lists: dict[str, Sequence[Any]] = {
        "projected": projected,
        "square": square,
        "samples": samples,
        "features": features,
    }
    if offdiagonal:
        lists["offdiagonal"] = offdiagonal
    for name, value in lists.items():
        if len(value) != len(diagonal):
            raise ValueError(f"{NAME}: '{name}' must have one entry per problem ({len(diagonal)}), got {len(value)}")
    for name in ("projected", "square", "offdiagonal"):
        if name in lists:
            check.check_tensors(NAME, name, lists[name])
    device = diagonal[0].device
    for i, (d, z, y) in enumerate(zip(diagonal, projected, square)):
        for name, t, axes in (("diagonal", d, 1), ("projected", z, 2), ("square", y, 1)):
            check.check_dtype(NAME, f"{name}[{i}]", t, (torch.float64,))
            check.check_device(NAME, f"{name}[{i}]", t, device)
            if t.dim() != axes:
                raise ValueError(f"{NAME}: '{name}[{i}]' must have {axes} axes, got shape {list(t.shape)}")
        check.check_shape(NAME, f"projected[{i}]", z, [d.shape[0], y.shape[0]], "[k, K]")
        if offdiagonal:
            check.check_dtype(NAME, f"offdiagonal[{i}]", offdiagonal[i], (torch.float64,))
            check.check_device(NAME, f"offdiagonal[{i}]", offdiagonal[i], device)
            check.check_shape(NAME, f"offdiagonal[{i}]", offdiagonal[i], [max(d.shape[0] - 1, 0)], "[k - 1]")
        if samples[i] < 1:
            raise ValueError(f"{NAME}: 'samples[{i}]' must be at least 1, got {samples[i]}")
        if features[i] < d.shape[0]:
            raise ValueError(f"{NAME}: 'features[{i}]' must be at least k = {d.shape[0]}, got {features[i]}")
    if mode not in (REFERENCE, CORRECTED, EXACT):
        raise ValueError(f"{NAME}: 'mode' must be 0 (reference), 1 (corrected) or 2 (exact), got {mode}")
    if max_iter < 1:
        raise ValueError(f"{NAME}: 'max_iter' must be at least 1, got {max_iter}")
    for name, number in (("tol", tol), ("eps", eps), ("floor", floor)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{NAME}: '{name}' must be at least 0, got {number}")


def _fake(
    diagonal: list[Tensor], offdiagonal: list[Tensor], projected: list[Tensor], square: list[Tensor], samples: list[int],
    features: list[int], mode: int, tol: float, max_iter: int, eps: float, floor: float, mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = sum(y.shape[0] for y in square)
    new = diagonal[0].new_empty
    entries = sum(z.shape[0] * z.shape[1] for z in projected) if mean else 0
    return new((4, outputs)), new((3, outputs), dtype=torch.int64), new((entries,))


@op(
    "evidence(Tensor[] diagonal, Tensor[] offdiagonal, Tensor[] projected, Tensor[] square, int[] samples, "
    "int[] features, int mode, float tol, int max_iter, float eps, float floor, bool mean) -> (Tensor, Tensor, Tensor)",
    contract=_contract,
    fake=_fake,
)
def evidence(
    diagonal: list[Tensor], offdiagonal: list[Tensor], projected: list[Tensor], square: list[Tensor], samples: list[int],
    features: list[int], mode: int, tol: float, max_iter: int, eps: float, floor: float, mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Maximise the evidence of y ~ N(Fw, 1/β), w ~ N(0, 1/α) for every output y of every problem.

    A problem is a matrix F [N, D] in the form FᵀF = V S Vᵀ, where S is diagonal (eigenvalues σ) or tridiagonal, and its
    outputs in the form z = VᵀFᵀy and ‖y‖².  With t = α/β and sums over the k kept directions (written for the diagonal
    form; null directions may be left out, they add nothing),

    .. math:: γ = \sum \frac{σ}{σ+t} \quad \|m\|^2 = \sum \frac{z^2}{(σ+t)^2} \quad
              \|y-Fm\|^2 = \|y\|^2 - \sum \frac{z^2 (σ+2t)}{(σ+t)^2}

    *reference* iterates α = γ/(‖m‖²+eps), β = (N-γ)/(‖y-Fm‖²+eps) from α = β = 1 until t changes by less than ``tol`` of
    itself, ``max_iter`` times at most, and returns, with the new α, β and the sums at the old t,

    .. math:: N L = \tfrac D2 \ln α + \tfrac N2 \ln β - \tfrac12 \sum_k \ln(α+βσ)
              - \tfrac β2 \|y-Fm\|^2 - \tfrac α2 \|m\|^2 - \tfrac N2 \ln 2π

    *corrected* is the same with the sum over all D directions, so without the term (D-k)/2 ln α, with ‖y-Fm‖² and N-γ
    not below 0, and without outputs of length 0.

    *exact* is the true maximum: with Q = ‖y‖² - Σ z²/(σ+t), not below floor·‖y‖², and β = N/Q it maximises

    .. math:: N L(t) = -\tfrac N2 \ln \tfrac QN - \tfrac12 \sum \ln(1 + σ/t) - \tfrac N2 (1 + \ln 2π)

    by a scan and safeguarded Newton steps on ln t (``tol`` is the last step; eps is not used).

    Args:
        diagonal: per problem, float64 [k]: σ, or the diagonal of the tridiagonal form; σ below 0 counts as 0.
        offdiagonal: per problem, float64 [k - 1], of the tridiagonal form; an empty list: all are diagonal.
        projected: per problem, float64 [k, K]: z of its K outputs.
        square: per problem, float64 [K]: ‖y‖².
        samples: N of each problem.
        features: D of each problem, at least k.
        mode: 0 reference, 1 corrected, 2 exact.
        tol: relative change of t (exact: change of ln t) that ends the rounds.
        max_iter: rounds at most.
        eps: absolute, added to both denominators.
        floor: exact: what rounding leaves of Q, relative to ‖y‖².
        mean: return the posterior means, too.

    Returns:
        Over the outputs of all problems, one after the other:

        value: float64 [4, ΣK]: evidence per sample L, α, β, and the t of the posterior mean.  Without a signal (exact) the
        evidence is that of y ~ N(0, 1/β), α = t = inf.
        status: int64 [3, ΣK]: rounds; 1 if converged; code: 0 fine, 1 empty output (‖y‖ = 0; value NaN), 2 no signal,
        3 perfect fit (Q at the floor: its value is set by rounding), 4 not finite.
        mean: float64 [Σ k·K]: per problem S⁻¹-weighted outputs (S + t)⁻¹ z, [k, K]; V times it is the posterior mean.
        Empty unless asked for.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, range, device.

    Cost and determinism: O(k) per output and round, with 1 division (tridiagonal on a CPU: 3); 11 rounds, or 35 and
    about 7 in exact mode.  Sums run over k in a fixed order: equal on every run and thread count.

    Example:
        >>> import torch
        >>> one, two = torch.ones(1, dtype=torch.float64), torch.full((1, 1), 2.0, dtype=torch.float64)
        >>> value, status, _ = evidence([4 * one], [], [two], [2 * one], [3], [1], EXACT, 1e-10, 100, 0.0, 0.0, False)
        >>> round(float(value[EVIDENCE]), 6), int(status[CODE])
        (-1.187889, 0)

    Reference: You et al. 2021 (LogME, arXiv 2102.11005), §4, and 2022 (arXiv 2110.10545), §3 (fixed point);
    MacKay 1992, *Bayesian interpolation*.
    """
    parts = []
    for i, (d, z, y) in enumerate(zip(diagonal, projected, square)):
        if offdiagonal:  # the reference may pay for an eigendecomposition
            matrix = torch.diag(d) + torch.diag(offdiagonal[i], 1) + torch.diag(offdiagonal[i], -1)
            sigma, basis = torch.linalg.eigh(matrix)
            problem = _Problem(sigma, basis.T @ z, y, samples[i], features[i], eps, floor)
        else:
            basis, problem = None, _Problem(d, z, y, samples[i], features[i], eps, floor)
        value, status = _exact(problem, tol, max_iter) if mode == EXACT else _fixed_point(problem, mode, tol, max_iter)
        weights = problem.mean(value[RATIO]) if mean else d.new_empty(0)
        parts.append((value, status, (weights if basis is None or not mean else basis @ weights).reshape(-1)))
    value_s, status_s, mean_s = zip(*parts)
    return torch.cat(value_s, 1), torch.cat(status_s, 1), torch.cat(mean_s)


@dataclass
class _Problem:
    sigma: Tensor  # [k]
    z: Tensor  # [k, K]
    square: Tensor  # [K]
    samples: int
    features: int
    eps: float
    floor: float

    def __post_init__(self) -> None:
        self.sigma = self.sigma.clamp(min=0)[:, None]

    def code(self) -> Tensor:
        """What ‖y‖² alone says."""
        fine = (self.square > 0) & self.square.isfinite()
        return torch.where(fine, FINE, torch.where(self.square == 0, EMPTY, NOT_FINITE))

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """γ, ‖m‖² and Σ z²/(σ+t) at t [K]."""
        q = 1 / (self.sigma + t)
        y = self.z * q
        return (self.sigma * q).sum(0), (y * y).sum(0), (self.z * y).sum(0)

    def logdet(self, t: Tensor) -> Tensor:
        return torch.log1p(self.sigma / t).sum(0)

    def misfit(self, t: Tensor) -> Tensor:
        return torch.maximum(self.square - self.moments(t)[2], self.floor * self.square)

    def profile(self, t: Tensor) -> Tensor:
        """N L without its constant."""
        return -0.5 * self.samples * torch.log(self.misfit(t) / self.samples) - 0.5 * self.logdet(t)

    def mean(self, t: Tensor) -> Tensor:
        weights = self.z / (self.sigma + t)
        return torch.where(t.isnan(), 0.0, weights)


def _fixed_point(p: _Problem, mode: int, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
    n, guard = p.samples, mode == CORRECTED
    zero, one = torch.zeros_like(p.square), torch.ones_like(p.square)
    alpha, beta, t, used, energy, residual, steps, converged = one, one, one, one, zero, zero, zero, zero.bool()
    code = p.code() if guard else zero.long()
    done = code != FINE
    for _ in range(max_iter):
        gamma, m2, gain = p.moments(t)
        rest, free = p.square - gain - t * m2, n - gamma
        if guard:
            rest, free = rest.clamp(min=0), free.clamp(min=0)
        a, b = gamma / (m2 + p.eps), free / (rest + p.eps)
        near = (a / b - t).abs() / t <= tol
        following = (a / b).clamp(min=1e-300) if guard else a / b
        new = (a, b, t, m2, rest, steps + 1, near, following)
        old = (alpha, beta, used, energy, residual, steps, converged, t)
        alpha, beta, used, energy, residual, steps, converged, t = (torch.where(done, x, y) for x, y in zip(old, new))
        done = done | near | t.isnan()
        if bool(done.all()):
            break
    found = 0.5 * n * beta.log() - 0.5 * p.logdet(t) - 0.5 * beta * residual - 0.5 * alpha * energy
    if not guard:
        found = found + 0.5 * (p.features - p.sigma.shape[0]) * alpha.log()
    found = found / n - 0.5 * math.log(2 * math.pi)
    value = torch.stack([found, alpha, beta, used])
    value[:, code != FINE] = torch.nan
    code = torch.where((code == FINE) & ~found.isfinite(), NOT_FINITE, code)
    return value, torch.stack([steps.long(), converged.long(), code])


def _exact(p: _Problem, tol: float, max_iter: int) -> tuple[Tensor, Tensor]:
    n, trace = p.samples, p.sigma.sum()
    code = p.code()
    dark = torch.where(trace == 0, NO_SIGNAL, torch.where(trace > 0, FINE, NOT_FINITE))
    code = torch.where(code == FINE, dark, code)
    done, hopeless = code != FINE, (code == EMPTY) | (code == NOT_FINITE)
    # Look: the best of a coarse grid brackets a maximum.
    origin = trace.log()
    grid = origin + SCAN_FIRST + SCAN_STEP * torch.arange(SCAN_POINTS, dtype=torch.float64, device=p.square.device)
    seen = torch.stack([p.profile(u.exp().expand_as(p.square)) for u in grid])
    at = seen.nan_to_num(nan=-math.inf, posinf=math.inf).argmax(0)
    u = grid[at]
    low = torch.where(at == 0, origin + CLIMB_LOW, u - SCAN_STEP)
    high = torch.where(at == SCAN_POINTS - 1, origin + CLIMB_HIGH, u + SCAN_STEP)
    steps, converged = torch.zeros_like(code), torch.zeros_like(done)
    # Climb.
    for _ in range(max_iter):
        t = u.exp()
        q, m = 1 / (p.sigma + t), p.misfit(t)
        gamma, m2, gain = p.moments(t)
        curve, bent = (p.sigma * q * q).sum(0), ((p.z * q).square() * q).sum(0)
        pull = torch.where(p.square - gain > p.floor * p.square, t * m2 / m, 0.0)
        turn = torch.where(pull > 0, (t * m2 - 2 * t * t * bent) / m - pull * pull, 0.0)
        slope, bend = 0.5 * gamma - 0.5 * n * pull, -0.5 * t * curve - 0.5 * n * turn
        low, high = torch.where(slope > 0, u, low), torch.where(slope < 0, u, high)
        move = torch.where(bend < 0, -slope / bend, slope.sign()).clamp(-LONGEST_STEP, LONGEST_STEP)
        following = u + move
        outside = ~((following > low) & (following < high))
        following = torch.where(outside, 0.5 * (low + high), following)
        near = ((following - u).abs() < tol) | ((slope >= 0) & (u > origin + FLAT))
        steps, converged = torch.where(done, steps, steps + 1), torch.where(done, converged, near)
        u = torch.where(done, u, torch.where(slope.isnan(), torch.nan, following))
        done = done | near | u.isnan()
        if bool(done.all()):
            break
    t = u.exp()
    best = p.profile(t) / n
    nothing = -0.5 * torch.log(p.square / n)
    beta = n / p.misfit(t)
    value = torch.stack([best, t * beta, beta, t])
    weak = (code == NO_SIGNAL) | (~hopeless & (best <= nothing + 1e-13))
    infinite = torch.full_like(best, math.inf)
    value = torch.where(weak, torch.stack([nothing, infinite, n / p.square, infinite]), value)
    value[EVIDENCE] -= 0.5 * (1 + math.log(2 * math.pi))
    floored = p.square - p.moments(t)[2] <= p.floor * p.square * (1 + 1e-3)
    code = torch.where((code == FINE) & floored, PERFECT_FIT, code)
    code = torch.where(weak, NO_SIGNAL, torch.where((code == FINE) & ~best.isfinite(), NOT_FINITE, code))
    value[:, hopeless] = torch.nan
    return value, torch.stack([steps, (converged | weak).long(), code])
