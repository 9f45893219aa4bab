# SPDX-License-Identifier: Apache-2.0
"""``evidence``: LogME's score of k directions and K outputs, once their spectrum is known.

Peers: the fixed point one output at a time in numpy, as the formula is usually written (exact: scipy's scalar search
instead; tridiagonal: after an eigendecomposition), and the reference.  The floor is reading the projected outputs once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import peers
import pytest
import scipy.linalg
import scipy.optimize
import torch
from harness import Job, Peer, Row, Run, main
from torch import Tensor

import zipfast
from zipfast.ops.evidence import EVIDENCE, EXACT, REFERENCE

OP = "evidence"
LOOP = "numpy loop, one output at a time"
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

    middle = math.log(sigma.sum())
    found = scipy.optimize.minimize_scalar(cost, bounds=(middle - 36, middle + 9), options={"xatol": 1e-8})
    return -float(found.fun) - (1 + LOG_TAU) / 2


def loop(case: Case, diagonal: np.ndarray, off: np.ndarray, z: np.ndarray, square: np.ndarray) -> Tensor:
    if case.tridiagonal:
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

    found = {LOOP: Peer(lambda: loop(case, *arrays)), peers.REFERENCE: Peer(peers.by_reference(ours))}
    return Job(OP, case.name, Peer(ours), found, agree, {"bytes": 8.0 * case.k * case.outputs})


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_evidence(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in CASES:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
