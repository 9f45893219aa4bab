# SPDX-License-Identifier: Apache-2.0
"""LogME from a spectrum: the three modes, what is skipped, and what it means (You et al. 2021, §4)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops import evidence as op
from ..ops.evidence import (
    ALPHA,
    BETA,
    CODE,
    CONVERGED,
    EMPTY,
    EVIDENCE,
    NO_SIGNAL,
    NOT_FINITE,
    PERFECT_FIT,
    RATIO,
    STEPS,
)
from .spectrum import Spectrum
from .targets import Task

Mode = Literal["reference", "corrected", "exact"]
MODES: dict[str, int] = {"reference": 0, "corrected": 1, "exact": 2}
FLOOR = {torch.float64: 1e-10}  # of the misfit, relative to |y|²; what the Gram matrix's rounding leaves
SINGLE_FLOOR = 1e-7
PUBLIC_EPSILON = 1e-5


@dataclass(frozen=True)
class Evidence:
    """A LogME score and what it is made of. Outputs are classes, or columns of regression targets.

    Attributes:
        score: mean of the evidence over the outputs that are not empty; a log density per sample: higher is better, values
            above 1 or below 0 are normal, and only scores on the same labels can be compared.
        evidence: float64 [K], per output, per sample; NaN where skipped.
        alpha, beta: float64 [K], precision of the weights' prior and of the noise; alpha is inf without a signal.
        ratio: float64 [K], the α/β that the posterior mean belongs to.
        steps: int64 [K], rounds. converged: bool [K].
        skipped: outputs that are 0 everywhere (empty classes), left out of the score.
        no_signal: outputs whose best model ignores the features; their evidence is that of noise alone.
        perfect: outputs that the features fit up to rounding: their evidence is set by that rounding, not by the data.
        mode: which formula.
        samples, features: N and D.
        mean: float64 [K, D], posterior mean of the weights, where asked for.
    """

    score: float
    evidence: Tensor
    alpha: Tensor
    beta: Tensor
    ratio: Tensor
    steps: Tensor
    converged: Tensor
    skipped: tuple[int, ...]
    no_signal: tuple[int, ...]
    perfect: tuple[int, ...]
    mode: Mode
    samples: int
    features: int
    mean: Tensor | None = None

    def __float__(self) -> float:
        return self.score


def check_mode(name: str, mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"{name}: 'mode' must be one of {', '.join(MODES)}, got {mode!r}")


def check_empty(name: str, empty: str) -> None:
    if empty not in ("skip", "raise"):
        raise ValueError(f"{name}: 'empty' must be skip or raise, got {empty!r}")


def solve(
    spectra: Sequence[Spectrum],
    projected: Sequence[Tensor],
    square: Sequence[Tensor],
    *,
    name: str,
    task: Task,
    mode: Mode,
    tol: float | None = None,
    max_iter: int | None = None,
    empty: str = "skip",
    precision: torch.dtype = torch.float64,
    mean: bool = False,
) -> list[Evidence]:
    """Evidence of several problems in one call of the operator; labels are in the form of the operator's arguments.

    Raises:
        ValueError: no output with a value in it; with ``empty="raise"`` an empty one.
    """
    exact = mode == "exact"
    value, status, means = op(
        [s.diagonal for s in spectra],
        [s.offdiagonal for s in spectra if s.offdiagonal is not None],
        [p.contiguous() for p in projected],
        list(square),
        [s.samples for s in spectra],
        [s.features for s in spectra],
        MODES[mode],
        (1e-10 if exact else 1e-3) if tol is None else tol,
        (100 if exact else 11) if max_iter is None else max_iter,
        0.0 if exact else PUBLIC_EPSILON,
        FLOOR.get(precision, SINGLE_FLOOR),
        mean,
    )
    value, status = value.cpu(), status.cpu()
    sizes = [int(y.shape[0]) for y in square]
    weights = means.split([p.numel() for p in projected]) if mean else [None] * len(sizes)
    results = []
    for s, p, v, c, w in zip(spectra, projected, value.split(sizes, 1), status.split(sizes, 1), weights):
        full = None if w is None else s.expand(w.reshape(p.shape)).T.contiguous()
        results.append(_result(name, task, mode, s, v, c, full, empty))
    return results


def _result(
    name: str, task: Task, mode: Mode, s: Spectrum, value: Tensor, status: Tensor, mean: Tensor | None, empty: str
) -> Evidence:
    def of_code(code: int) -> tuple[int, ...]:
        return tuple((status[CODE] == code).nonzero()[:, 0].tolist())

    skipped = of_code(EMPTY)
    counted = status[CODE] != EMPTY
    if skipped and empty == "raise":
        raise ValueError(
            f"{name}: every class must have samples (every target a value other than 0), got none in {_some(skipped)}"
        )
    if not bool(counted.any()):
        raise ValueError(f"{name}: 'labels' must have an output with a value other than 0, got none")
    broken = of_code(NOT_FINITE)
    if broken and mode != "reference":
        raise ValueError(
            f"{name}: the evidence of outputs {_some(broken)} is not finite; the features or targets are too large or too "
            "small for float64 squares: rescale them"
        )
    if skipped:
        warnings.warn(
            f"{name}: skipped {len(skipped)} empty output(s), {_some(skipped)}: no sample has that class", stacklevel=4
        )
    if s.samples == 1 or (task == "classification" and int(counted.sum()) == 1):
        what = "one sample" if s.samples == 1 else "one class with samples"
        warnings.warn(f"{name}: the score of {what} says nothing about the features", stacklevel=4)
    # Over those that count; float64, in order.
    score = float(value[EVIDENCE][counted].sum() / counted.sum())
    return Evidence(
        score,
        value[EVIDENCE],
        value[ALPHA],
        value[BETA],
        value[RATIO],
        status[STEPS],
        status[CONVERGED].bool(),
        skipped,
        of_code(NO_SIGNAL),
        of_code(PERFECT_FIT),
        mode,
        s.samples,
        s.features,
        mean,
    )


def _some(items: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in items[:5])
    return shown if len(items) <= 5 else f"{shown}, ... ({len(items)} in all)"


def null_score(square: Tensor, samples: int) -> float:
    """The score of features without any signal: mean over the outputs of -½ ln(‖y‖²/N) - ½(1 + ln 2π)."""
    kept = square[square > 0]
    return float((-0.5 * (torch.log(kept / samples) + 1 + math.log(2 * math.pi))).mean())
