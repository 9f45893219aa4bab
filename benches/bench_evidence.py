# SPDX-License-Identifier: Apache-2.0
"""``evidence``: LogME's score of k directions and K outputs, once their spectrum is known.

Peers: the fixed point one output at a time in numpy, as the formula is usually written (exact: scipy's scalar search
instead; tridiagonal: after an eigendecomposition), and the reference.  The floor is reading the projected outputs once.

On a GPU also with the eigen step before it, from the Gram matrix on: peers are the same in torch, with ``eigh`` and all
outputs as one array, and the public code's algebra (SVD, U, one class at a time) as it runs, in NumPy on the host.  A row of
its own sets the two routes of the eigen step beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import peers
import torch
from harness import Job, Peer, Row, Run, main, parametrize, skip
from torch import Tensor

import zipfast
from zipfast.ops.evidence import EVIDENCE, EXACT, REFERENCE
from zipfast.ranking.spectrum import Spectrum, obstacles, of_gram

OP = "evidence"
LOOP = "numpy loop, one output at a time"
PIPELINE, ORIGINAL, EIGENVECTORS = "torch.linalg.eigh pipeline", "original", "eigenvectors"
ROUNDS, TOL, EPS, FLOOR = 11, 1e-3, 1e-5, 1e-10
LOG_TAU = math.log(2 * math.pi)


@dataclass(frozen=True)
class Case:
    k: int
    outputs: int
    mode: int = REFERENCE
    tridiagonal: bool = False

    @property
    def name(self) -> str:
        more = (", exact" if self.mode == EXACT else "") + (", tridiagonal" if self.tridiagonal else "")
        return f"{self.k} directions, {self.outputs} outputs{more}"

    @property
    def samples(self) -> int:
        return 4 * self.k


CASES = [Case(512, 10), Case(1024, 100), Case(2048, 10), Case(2048, 100), Case(2048, 1000)]
CASES += [Case(2048, 100, mode=EXACT), Case(2048, 100, tridiagonal=True)]


def spectrum(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Diagonal, off-diagonal, projected and square of RᵀR with R diagonal or bidiagonal, falling by 10^4 along it."""
    g = np.random.default_rng(case.k)
    main_diagonal = math.sqrt(case.samples) * np.geomspace(1, 1e-2, case.k)
    above = 0.5 * main_diagonal[1:] if case.tridiagonal else np.zeros(case.k - 1)
    weights = g.standard_normal((case.k, case.outputs))
    y = main_diagonal[:, None] * weights
    y[:-1] += above[:, None] * weights[1:]
    y += g.standard_normal(y.shape) * math.sqrt(case.k)
    z = main_diagonal[:, None] * y
    z[1:] += above[:, None] * y[:-1]
    square = (y**2).sum(0) + case.k * g.chisquare(case.samples - case.k, case.outputs)
    diagonal = main_diagonal**2
    diagonal[1:] += above**2
    return diagonal, main_diagonal[:-1] * above, z, square


def fixed_point(sigma: np.ndarray, z2: np.ndarray, square: float, n: int) -> float:
    alpha = beta = 1.0
    for _ in range(ROUNDS):
        t = alpha / beta
        shifted = sigma + t
        gamma = (sigma / shifted).sum()
        energy = (z2 / shifted**2).sum()
        misfit = square - (z2 * (sigma + 2 * t) / shifted**2).sum()
        alpha, beta = gamma / (energy + EPS), (n - gamma) / (misfit + EPS)
        if abs(alpha / beta - t) <= TOL * t:
            break
    total = len(sigma) * math.log(alpha) + n * math.log(beta) - np.log(alpha + beta * sigma).sum()
    return (total - beta * misfit - alpha * energy) / (2 * n) - LOG_TAU / 2


def search(sigma: np.ndarray, z2: np.ndarray, square: float, n: int) -> float:
    def cost(u: float) -> float:
        t = math.exp(u)
        q = square - (z2 / (sigma + t)).sum()
        return (n * math.log(q / n) + np.log1p(sigma / t).sum()) / (2 * n)

    import scipy.optimize

    middle = math.log(sigma.sum())
    found = scipy.optimize.minimize_scalar(cost, bounds=(middle - 36, middle + 9), options={"xatol": 1e-8})
    return -float(found.fun) - (1 + LOG_TAU) / 2


def loop(case: Case, diagonal: np.ndarray, off: np.ndarray, z: np.ndarray, square: np.ndarray) -> Tensor:
    if case.tridiagonal:
        import scipy.linalg

        diagonal, basis = scipy.linalg.eigh_tridiagonal(diagonal, off)
        z = basis.T @ z
    one = search if case.mode == EXACT else fixed_point
    z2 = np.ascontiguousarray(z.T) ** 2
    return torch.tensor([one(diagonal, a, b, case.samples) for a, b in zip(z2, square)], dtype=torch.float64)


def agree(ours: Tensor, theirs: Tensor, name: str) -> None:
    peers.close(ours.cpu(), theirs.cpu(), 1e-9)


def job(case: Case, device: str) -> Job:
    arrays = spectrum(case)
    diagonal, off, z, square = (torch.from_numpy(a).to(device) for a in arrays)
    exact = case.mode == EXACT
    options = (case.mode, 1e-10 if exact else TOL, 100 if exact else ROUNDS, 0.0 if exact else EPS, FLOOR, False)

    def ours() -> Tensor:
        offs = [off] if case.tridiagonal else []
        value, _, _ = zipfast.ops.evidence([diagonal], offs, [z], [square], [case.samples], [case.k], *options)
        return value[EVIDENCE]

    package = "scipy" if exact or case.tridiagonal else "numpy"
    found = {LOOP: Peer(lambda: loop(case, *arrays), package=package), peers.REFERENCE: Peer(peers.by_reference(ours))}
    return Job(OP, case.name, Peer(ours), found, agree, {"bytes": 8.0 * case.k * case.outputs})


# ---------------------------------------------------------------------------------------------- with the eigen step


@dataclass(frozen=True)
class Whole:
    features: int
    outputs: int

    @property
    def name(self) -> str:
        return f"D={self.features}, K={self.outputs}"

    @property
    def samples(self) -> int:
        return 4 * self.features


@dataclass(frozen=True)
class Data:
    f: Tensor  # [N, D]
    y: Tensor  # [N, K]
    gram: Tensor
    cross: Tensor
    square: Tensor


WHOLE = [Whole(1024, 100), Whole(2048, 100), Whole(2048, 1000)]


def draw(case: Whole, device: str) -> Data:
    """Correlated features of falling scale, and outputs that they explain in part."""
    g = torch.Generator().manual_seed(case.features + case.outputs)
    n, d = case.samples, case.features
    new = {"generator": g, "dtype": torch.float64}
    f = torch.randn(n, d, **new) * torch.logspace(0, -2, d, dtype=torch.float64)
    f += 0.1 * torch.randn(n, 1, **new)
    y = f @ torch.randn(d, case.outputs, **new) + 5 * torch.randn(n, case.outputs, **new)
    f, y = f.to(device), y.to(device)
    return Data(f, y, f.T @ f, f.T @ y, (y * y).sum(0))


def by_torch(data: Data) -> Tensor:
    """All outputs as one [D, K] array, none of them waiting for the host."""
    n, d = data.f.shape
    sigma, basis = torch.linalg.eigh(data.gram)
    sigma = sigma.clamp(min=0)[:, None]
    z2 = (basis.T @ data.cross).square()
    alpha = beta = used = torch.ones_like(data.square)
    energy = misfit = torch.zeros_like(data.square)
    done = torch.zeros_like(data.square, dtype=torch.bool)
    for _ in range(ROUNDS):
        t = alpha / beta
        q = 1 / (sigma + t)
        part = z2 * q * q
        m2, rest = part.sum(0), data.square - (part * (sigma + 2 * t)).sum(0)
        gamma = (sigma * q).sum(0)
        a, b = gamma / (m2 + EPS), (n - gamma) / (rest + EPS)
        near = (a / b - t).abs() <= TOL * t
        new, old = (a, b, t, m2, rest), (alpha, beta, used, energy, misfit)
        alpha, beta, used, energy, misfit = (torch.where(done, x, y) for x, y in zip(old, new))
        done = done | near
    logdet = (alpha + beta * sigma).log().sum(0)
    total = d * alpha.log() + n * beta.log() - logdet - beta * misfit - alpha * energy
    return total / (2 * n) - LOG_TAU / 2


def by_svd(f: np.ndarray, gram: np.ndarray, y: np.ndarray) -> Tensor:
    """The public algebra for N > D: SVD of FᵀF, U = F V / s, then the fixed point of one output after the other."""
    _, squared, v = np.linalg.svd(gram, full_matrices=True)
    s = np.sqrt(squared)
    keep = s > 1e-10
    u, sigma = f @ (v[keep].T / s[keep]), squared[keep]
    found = [fixed_point(sigma, sigma * (u.T @ one) ** 2, float(one @ one), len(f)) for one in y.T]
    return torch.tensor(found, dtype=torch.float64)


def eigen_step(data: Data, route: str) -> tuple[Spectrum, Tensor]:
    s = of_gram(data.gram, data.f.shape[0], route=route)
    return s, s.project(data.cross)


def whole_job(case: Whole, device: str) -> Job:
    data = draw(case, device)
    f, gram, y = data.f.cpu().numpy(), data.gram.cpu().numpy(), np.asfortranarray(data.y.cpu().numpy())

    def ours() -> Tensor:
        s, z = eigen_step(data, "auto")
        offs = [] if s.offdiagonal is None else [s.offdiagonal]
        options = (REFERENCE, TOL, ROUNDS, EPS, FLOOR, False)
        n, d = data.f.shape
        return zipfast.ops.evidence([s.diagonal], offs, [z], [data.square], [n], [d], *options)[0][EVIDENCE]

    found = {PIPELINE: Peer(lambda: by_torch(data))}
    if case.outputs <= 100:  # beyond, it takes half a minute a call
        found[ORIGINAL] = Peer(lambda: by_svd(f, gram, y), package="numpy")
    flops = 4 / 3 * case.features**3 + 4.0 * case.features**2 * case.outputs
    extra = {"why not tridiagonal": obstacles(data.gram, case.samples)}
    return Job(OP, case.name, Peer(ours), found, agree, {"flops": flops, "rate": "fp64", "extra": extra})


def route_job(case: Whole, device: str) -> Job | None:
    """The eigen step by both routes; None where there is but one."""
    data = draw(case, device)
    if obstacles(data.gram, case.samples):
        return None

    def agree_on_traces(a: tuple[Spectrum, Tensor], b: tuple[Spectrum, Tensor], name: str) -> None:
        for one, other in zip(a, b):
            one, other = (x.diagonal.sum() if isinstance(x, Spectrum) else x.square().sum(0) for x in (one, other))
            peers.close(one.cpu(), other.cpu(), 1e-9)

    found = {EIGENVECTORS: Peer(lambda: eigen_step(data, "eigh"))}
    ours = Peer(lambda: eigen_step(data, "tridiagonal"))
    return Job(OP, f"{case.name}, tridiagonal form alone", ours, found, agree_on_traces, {})


def whole_jobs(device: str) -> Iterator[Job]:
    for case in WHOLE:
        if routes := route_job(case, device) if case.outputs == 100 else None:
            yield routes
        yield whole_job(case, device)


@parametrize("case", CASES, ids=lambda c: c.name)
def test_evidence(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


@parametrize("case", WHOLE, ids=lambda c: c.name)
def test_with_the_eigen_step(case: Whole, run: Run, timed: Callable[[Job], Row]) -> None:
    if torch.device(run.device).type != "cuda":
        skip("the eigen step is measured on GPUs; on a CPU with logme_cost.py")
    timed(whole_job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in CASES:
        yield job(case, device)
    if torch.device(device).type == "cuda":  # last: the original takes seconds a call
        yield from whole_jobs(device)


if __name__ == "__main__":
    main(jobs)
