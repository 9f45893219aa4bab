# SPDX-License-Identifier: Apache-2.0
"""From the Gram matrix of features to the form that ``evidence`` reads: FᵀF = V S Vᵀ with S diagonal or tridiagonal.

The evidence sees the features only through S and VᵀFᵀy. Eigenvalues serve every case; where a reduction to tridiagonal
form can be called (LAPACK's through SciPy; on a GPU cuSOLVER's), it gives the same result in a fraction of the time, as no
eigenvector is formed. With N <= D the small Gram matrix FFᵀ has all of it. Everything here is float64: the spectrum of a
float32 Gram matrix is noise where features have large means.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import cusolver

ROUTES = ("auto", "eigh", "tridiagonal")
SMALLEST_TRIDIAGONAL = 64  # below, eigenvectors cost next to nothing
# On a GPU both routes reduce first, column by column; eigenvectors of the tridiagonal form come on top of that. Of small
# matrices the checks of the result, which wait for the GPU, cost as much.
SMALLEST_TRIDIAGONAL_CUDA = 256
# Part of the mean eigenvalue of shifted features that float32 products may be wrong by: 2^-24 in D entries of a row.
SINGLE_ROUNDING = 1e-6
PUBLIC_CUT = 1e-10  # the public code drops singular values at or below this, whatever the features' scale
RESIDUAL = 1e-8  # relative, above which a GPU's eigendecomposition is not believed


@dataclass(frozen=True)
class Spectrum:
    """A features matrix, ready for any labels."""

    diagonal: Tensor  # [k] float64
    offdiagonal: Tensor | None  # [k - 1]
    samples: int
    features: int
    project: Callable[[Tensor], Tensor]  # FᵀY [D, K] -> VᵀFᵀY [k, K]; of `of_rows`: Y [N, K]
    expand: Callable[[Tensor], Tensor]  # [k, K] -> [D, K], V times it


def lapack() -> Any | None:
    """SciPy's LAPACK, or None where SciPy is not installed."""
    try:
        from scipy.linalg import lapack as found
    except ImportError:
        return None
    return found


def why_not_tridiagonal(gram: Tensor, samples: int) -> list[str]:
    """Reasons for which eigenvectors are formed; empty: the tridiagonal form serves."""
    smallest = SMALLEST_TRIDIAGONAL_CUDA if gram.device.type == "cuda" else SMALLEST_TRIDIAGONAL
    few = [f"fewer than {smallest} features"] if gram.shape[0] < smallest else []
    return few + obstacles(gram, samples)


def obstacles(gram: Tensor, samples: int) -> list[str]:
    """Those of :func:`why_not_tridiagonal` that leave no choice."""
    reasons = ["N <= D: null directions must be dropped, which needs eigenvalues"] if samples <= gram.shape[0] else []
    if gram.device.type == "cuda":
        return reasons + cusolver.why_not_cusolver(gram.device)
    if gram.device.type != "cpu":
        reasons.append("LAPACK's reduction runs on the CPU")
    if lapack() is None:
        reasons.append("SciPy is not installed")
    return reasons


def rounding_of(second: Tensor, dtype: torch.dtype) -> float:
    """What eigenvalues may be wrong by, from the sums of products of shifted features [D, D] and the products' dtype.

    Large means are no part of it, as only what is left of them after the shift is multiplied.
    """
    return 0.0 if dtype == torch.float64 else SINGLE_ROUNDING * float(second.diagonal().mean())


def of_gram(
    gram: Tensor, samples: int, *, public: bool = False, rounding: float = 0.0, route: str = "auto"
) -> Spectrum:
    """The spectrum of FᵀF [D, D].

    Args:
        gram: float64, symmetric.
        samples: N; with N < D only the N largest eigenvalues are kept, as the others are 0.
        public: keep what the public code keeps (`mode="reference"`): all D directions, but those with a singular value of
            F at or below 1e-10, as NumPy's SVD of the Gram matrix has them, null space and its rounding included.
        rounding: what its eigenvalues may be wrong by, see :func:`rounding_of`. Where they reach down to that, all are
            raised by it: a direction of pure rounding would seem to explain any labels.
        route: ``"eigh"`` forms eigenvectors, ``"tridiagonal"`` does without wherever it can, ``"auto"`` as
            :func:`why_not_tridiagonal` says. Any ends in eigenvectors where the result of the reduction is not believed, or
            where the public code's rank must be counted.

    Raises:
        ValueError: another route; one that is not open.

    Cost: about 4/3·D³ (tridiagonal) or 9·D³ (eigenvectors) flops.
    """
    if route not in ROUTES:
        raise ValueError(f"of_gram: 'route' must be one of {', '.join(ROUTES)}, got {route!r}")
    if route == "eigh":
        closed = ["eigenvectors are asked for"]
    else:
        closed = (why_not_tridiagonal if route == "auto" else obstacles)(gram, samples)
    if route == "tridiagonal" and closed:
        raise ValueError(f"of_gram: 'route' must be eigh here, got 'tridiagonal': {'; '.join(closed)}")
    if not closed:
        solver = cusolver.solver() if gram.device.type == "cuda" else None
        if solver is None:
            found = _tridiagonal(gram, samples, public, rounding)
        else:
            found = _on_gpu(gram, samples, public, rounding, solver)
        if found is not None:
            return found
    sigma, basis = eigh(gram)
    size = gram.shape[0]
    keep = min(samples, size)
    if public and samples > size and _public_rank_matters(sigma):
        return _as_public(gram, samples)
    sigma, basis = sigma[size - keep :].contiguous(), basis[:, size - keep :]
    sigma = sigma + _raised(sigma, rounding)
    return Spectrum(sigma, None, samples, size, lambda x: basis.T @ x, lambda w: basis @ w)


def of_rows(features: Tensor, gram: Tensor) -> Spectrum:
    """The spectrum of features [N, D] with N <= D from FFᵀ [N, N]; `project` takes Y itself."""
    sigma, left = eigh(gram)
    sigma = sigma.clamp(min=0)
    root = sigma.sqrt()
    samples, size = features.shape

    def expand(weights: Tensor) -> Tensor:  # V = Fᵀ U / √σ; null directions carry no weight
        # The mean of a direction is z / (σ + t) with z = √σ·Uᵀy, so that a division by √σ is safe
        scaled = torch.where(root[:, None] > 0, weights / root[:, None], 0.0)
        return features.double().T @ (left @ scaled)

    return Spectrum(sigma, None, samples, size, lambda y: root[:, None] * (left.T @ y), expand)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric float64 matrix.

    A GPU's result is checked, as CUDA's solvers have failed on matrices of low rank; where it is not finite or does not
    reproduce the matrix, the CPU solves it again.
    """
    if matrix.device.type == "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    try:
        sigma, basis = torch.linalg.eigh(matrix)
    except RuntimeError:  # did not converge (LinAlgError), or refused the size: the CPU's does neither
        believed = False
    else:
        probe = torch.ones(matrix.shape[0], 1, dtype=matrix.dtype, device=matrix.device)
        image = matrix @ probe
        error = (basis @ (sigma[:, None] * (basis.T @ probe)) - image).norm()
        believed = bool(error <= RESIDUAL * sigma.abs().amax() * probe.norm())
    if not believed:
        sigma, basis = (x.to(matrix.device) for x in torch.linalg.eigh(matrix.cpu()))
    return sigma, basis


def _public_rank_matters(sigma: Tensor) -> bool:
    """Whether the smallest eigenvalue is rounding of the largest, or near the public code's absolute cut."""
    return float(sigma[0]) <= _public_limit(sigma.shape[0], float(sigma[-1]))


def _public_limit(size: int, largest: float) -> float:
    return max(size * torch.finfo(torch.float64).eps * largest, (100 * PUBLIC_CUT) ** 2)


def _raised(sigma: Tensor, rounding: float) -> float:
    """What to raise eigenvalues by; 0 where all of them are well above the rounding of the products."""
    return rounding if rounding and float(sigma.min()) <= 10 * rounding else 0.0


def _as_public(gram: Tensor, samples: int) -> Spectrum:
    _, squared, right = np.linalg.svd(gram.cpu().numpy())
    keep = int((np.sqrt(squared) > PUBLIC_CUT).sum())
    sigma = torch.from_numpy(squared[:keep].copy()).to(gram.device)
    basis = torch.from_numpy(right[:keep].copy()).to(gram.device)
    return Spectrum(sigma, None, samples, gram.shape[0], lambda x: basis @ x, lambda w: basis.T @ w)


def _tridiagonal(gram: Tensor, samples: int, public: bool, rounding: float) -> Spectrum | None:
    """None where the public code's rank must be counted."""
    solver, size = lapack(), gram.shape[0]
    assert solver is not None
    matrix = np.array(gram.numpy(), order="F")
    work = int(solver.dsytrd_lwork(size, lower=1)[0])
    packed, diagonal, offdiagonal, tau, _ = solver.dsytrd(matrix, lower=1, lwork=work, overwrite_a=1)
    raised = 0.0
    if public or rounding:  # eigenvalues alone cost little
        sigma, failed = solver.dsterf(diagonal, offdiagonal)
        if failed or (public and _public_rank_matters(torch.from_numpy(sigma))):
            return None
        raised = _raised(torch.from_numpy(sigma), rounding)
    reflectors = np.asfortranarray(packed[1:, :-1])  # Q = diag(1, H1 H2 ...), the vectors lie below the subdiagonal

    def rotate(x: Tensor, transposed: str) -> Tensor:
        rest = np.asfortranarray(x[1:].numpy())
        work = 64 * max(1, rest.shape[1])
        turned, _, failed = solver.dormqr("L", transposed, reflectors, tau, rest, lwork=work)
        assert not failed
        return torch.cat([x[:1], torch.from_numpy(np.ascontiguousarray(turned))])

    return Spectrum(
        torch.from_numpy(diagonal + raised),
        torch.from_numpy(offdiagonal),
        samples,
        size,
        lambda x: rotate(x, "T"),
        lambda w: rotate(w, "N"),
    )


def _on_gpu(gram: Tensor, samples: int, public: bool, rounding: float, solver: cusolver.Solver) -> Spectrum | None:
    """None where the public code's rank must be counted, or where the result does not reproduce the matrix."""
    size = gram.shape[0]
    probe = torch.ones(size, 1, dtype=gram.dtype, device=gram.device)
    try:
        reduced = solver.reduce(gram)
        # T Qᵀ1 must be Qᵀ G1
        turned = solver.rotate(reduced, torch.cat([probe, gram @ probe], 1), True)
    except cusolver.CusolverError as e:
        _say(gram.device, str(e))
        return None
    diagonal, off = reduced.diagonal, reduced.offdiagonal
    image = diagonal * turned[:, 0]
    image[:-1] += off * turned[1:, 0]
    image[1:] += off * turned[:-1, 0]
    # One copy to the host tells all, and waits for the GPU once.
    told = torch.cat([diagonal, off, (image - turned[:, 1]).norm().reshape(1), reduced.info.double()]).cpu()
    own, side, error, info = told[:size], told[size : 2 * size - 1].abs(), float(told[-2]), int(told[-1])
    radius = torch.cat([side, side.new_zeros(1)]) + torch.cat([side.new_zeros(1), side])
    largest = float((own.abs() + radius).max())  # no eigenvalue is beyond (Gershgorin)
    if info != 0 or not error <= RESIDUAL * largest * size**0.5:
        _say(gram.device, f"cuSOLVER's tridiagonal form (info {info}) is off by {error:.3g} on a vector of ones")
        return None
    if public and not all_above(own, side, _public_limit(size, largest)):
        return None
    raised = rounding if rounding and not all_above(own, side, 10 * rounding) else 0.0
    return Spectrum(
        diagonal + raised,
        off,
        samples,
        size,
        lambda x: solver.rotate(reduced, x, True),
        lambda w: solver.rotate(reduced, w, False),
    )


def _say(device: torch.device, problem: str) -> None:
    warnings.warn(f"of_gram: eigenvectors are formed on {device}, as {problem}", RuntimeWarning, stacklevel=4)


def all_above(diagonal: Tensor, offdiagonal: Tensor, limit: float) -> bool:
    """Whether every eigenvalue of a tridiagonal matrix on the CPU is above a limit: no pivot of T - limit is 0 or less."""
    pivot, off = 1.0, 0.0
    for own, following in zip(diagonal.tolist(), [*offdiagonal.tolist(), 0.0]):
        pivot = own - limit - off * off / pivot
        if not pivot > 0:
            return False
        off = following
    return True
