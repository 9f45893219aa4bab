# SPDX-License-Identifier: Apache-2.0
"""A LogME score, the whole call: from float32 features and labels to one number.

Classification in mode reference beside the authors' code (where ZIPFAST_LOGME names its checkout), the same algebra
in numpy (SVD, then one class after the other), and transformer-ranker, which keeps alpha and beta from one class to the
next, so that its fixed points stop elsewhere. Regression of one target in mode exact beside scikit-learn's BayesianRidge
without priors, which maximises the same evidence by iteration and stops before it is there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import peers
import torch
from harness import Job, Peer
from logme_cost import AGREE, problem
from plan import Planned

import zipfast

OP = "logme"
NUMPY, RANKER, RIDGE = "numpy, SVD and a loop over classes", "transformer-ranker", "BayesianRidge"
TOLERATED = {NUMPY: 1e-9, RANKER: 1e-3, RIDGE: 1e-4}


@dataclass(frozen=True)
class Case:
    n: int
    d: int
    outputs: int
    regression: bool = False

    @property
    def name(self) -> str:
        what = "one target" if self.regression else f"{self.outputs} classes"
        return f"{self.n} x {self.d}, {what}"

    @property
    def need(self) -> float:
        return 8.0 * (8 * self.n * self.d + 4 * min(self.n, self.d) ** 2 + 4 * self.n * self.outputs)


FULL = [Case(5000, 512, 10), Case(10000, 1024, 100), Case(5000, 2048, 10), Case(5000, 512, 1, True)]
QUICK = [Case(400, 64, 5), Case(400, 64, 1, True)]


def by_numpy(x: np.ndarray, y: np.ndarray, outputs: int) -> float:
    from bench_evidence import by_svd

    f = x.astype(np.float64)
    found = by_svd(f, f.T @ f, np.asfortranarray(np.eye(outputs)[y]))
    return float(found.mean())


def by_ridge(x: np.ndarray, y: np.ndarray) -> float:
    from sklearn.linear_model import BayesianRidge

    flat = {"alpha_1": 0.0, "alpha_2": 0.0, "lambda_1": 0.0, "lambda_2": 0.0}
    model = BayesianRidge(max_iter=1000, tol=1e-6, fit_intercept=False, compute_score=True, **flat)
    model.fit(x.astype(np.float64), y)
    return float(model.scores_[-1]) / len(x)


def quiet(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return run


def job(case: Case, device: str, use: Collection[str]) -> Job:
    x, y = problem(case.n, case.d, case.outputs, case.regression)
    y = y[:, 0].copy() if case.regression else y
    task = "regression" if case.regression else "classification"
    options: dict[str, Any] = {"task": task, "mode": "exact" if case.regression else "reference"}
    given = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    found: dict[str, Peer] = {}
    if case.regression:
        if "scikit-learn" in use:
            found[RIDGE] = Peer(quiet(lambda: by_ridge(x, y)), package="scikit-learn")
    else:
        if "numpy" in use:
            found[NUMPY] = Peer(lambda: by_numpy(x, y, case.outputs), package="numpy")
        if "LogME" in use:
            public = peers.logme()
            assert public is not None
            found["LogME"] = Peer(quiet(lambda: public(False).fit(x, y)), package="LogME")
        if "transformer-ranker" in use:
            from transformer_ranker.estimators import LogME

            tensors = torch.from_numpy(x), torch.from_numpy(y)
            found[RANKER] = Peer(quiet(lambda: LogME(regression=False).fit(*tensors)), package="transformer-ranker")
    found[peers.REFERENCE] = Peer(quiet(peers.by_reference(lambda: zipfast.logme(*given, **options))))

    def agree(ours: float, theirs: float, name: str) -> None:
        near = TOLERATED.get(name, AGREE[case.n <= case.d] if name == "LogME" else 1e-10)
        assert abs(ours - theirs) <= near, f"scores are {ours:.9g} and {theirs:.9g}, tolerated {near:g}"

    ours = Peer(quiet(lambda: zipfast.logme(*given, **options)))
    flops = float(case.n) * case.d * (case.d + 1)
    more = {"flops": flops, "rate": "fp64", "repeats": 7, "budget_s": 15.0}
    return Job(OP, case.name, ours, found, agree, more)


def planned(device: str, quick: bool, use: Collection[str]) -> list[Planned]:
    cases = QUICK if quick else FULL
    return [Planned(c.name, c.need, functools.partial(job, c, device, use)) for c in cases]
