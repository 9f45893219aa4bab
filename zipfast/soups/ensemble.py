# SPDX-License-Identifier: Apache-2.0
"""What soups are compared with: ensembles of logits, and how calibrated predictions are.

Logits of all models, [k, N, C], are computed once by the caller; everything here is arithmetic on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GreedyEnsemble:
    """Which models are in, in the order of joining, and the accuracy with them, in per cent."""

    members: tuple[int, ...]
    accuracy: float
    logits: Tensor


def accuracy_of(logits: Tensor, labels: Tensor) -> float:
    """Per cent of samples whose largest logit is the label; logits [N, C], labels int64 [N]."""
    _check("accuracy_of", logits, labels, 2)
    return 100 * float((logits.argmax(1) == labels).double().mean())


def logit_ensemble(logits: Tensor) -> Tensor:
    """Mean of raw logits over models, [k, N, C] -> [N, C]: no softmax, no temperature (Wortsman et al. 2022, Table 2)."""
    if logits.dim() != 3 or logits.shape[0] == 0:
        raise ValueError(f"logit_ensemble: 'logits' must be [k, N, C] of one model or more, got {list(logits.shape)}")
    return logits.double().mean(0)


def greedy_ensemble(logits: Tensor, labels: Tensor, *, accept: str = "gt") -> GreedyEnsemble:
    """The greedy rule of soups on ensembles: models by accuracy, each kept if the ensemble's accuracy rises.

    Args:
        logits: [k, N, C] on held-out samples. labels: int64 [N].
        accept: ``"gt"`` (rises) or ``"ge"`` (does not fall).

    Raises:
        ValueError: shapes; another rule.

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), Table 2.
    """
    if accept not in ("gt", "ge"):
        raise ValueError(f"greedy_ensemble: 'accept' must be gt or ge, got {accept!r}")
    _check("greedy_ensemble", logits, labels, 3)
    alone = [accuracy_of(one, labels) for one in logits]
    order = sorted(range(len(alone)), key=lambda i: (-alone[i], i))
    members, total, best = [order[0]], logits[order[0]].double(), alone[order[0]]
    for i in order[1:]:
        found = accuracy_of((total + logits[i]) / (len(members) + 1), labels)
        if found > best or (accept == "ge" and found == best):
            members, total, best = [*members, i], total + logits[i], found
    return GreedyEnsemble(tuple(members), best, total / len(members))


def ece(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error with bins of equal counts: Σ (n_b / n) · |accuracy_b - confidence_b|, in [0, 1].

    Args:
        logits: [N, C]. labels: int64 [N]. bins: B, at most N.

    Raises:
        ValueError: shapes; bins out of range.

    Example:
        >>> ece(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]), bins=1) > 0.49
        True

    Reference: Guo et al. 2017 (arXiv 1706.04599); equal-mass bins as in Wortsman et al. 2022, App. F.
    """
    _check("ece", logits, labels, 2)
    if not 1 <= bins <= logits.shape[0]:
        raise ValueError(f"ece: 'bins' must be in [1, {logits.shape[0]}], got {bins}")
    confidence, answer = logits.double().softmax(1).max(1)
    right = (answer == labels).double()
    order = confidence.argsort(stable=True)
    parts = zip(confidence[order].tensor_split(bins), right[order].tensor_split(bins))
    return sum(len(c) * abs(float(r.mean() - c.mean())) for c, r in parts) / len(labels)


def _check(name: str, logits: Tensor, labels: Tensor, axes: int) -> None:
    wanted = "[k, N, C]" if axes == 3 else "[N, C]"
    if logits.dim() != axes or 0 in logits.shape:
        raise ValueError(f"{name}: 'logits' must be {wanted}, not empty, got {list(logits.shape)}")
    if labels.shape != logits.shape[-2:-1] or labels.dtype.is_floating_point:
        raise ValueError(
            f"{name}: 'labels' must be whole numbers [{logits.shape[-2]}], got {list(labels.shape)} {labels.dtype}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{name}: 'logits' must be finite, got NaN or infinity")
