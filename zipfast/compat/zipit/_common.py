# SPDX-License-Identifier: Apache-2.0
"""What the matchings of this package share: reading the metric, and the two dense matrices that ZipIt!'s code passes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

KEYS = ("covariance", "cossim", "correlation")  # in the order in which the public code looks; it lacks the last
EPS = 1e-5  # that the public code adds to the size of a group


def compute_correlation(covariance: Tensor, eps: float = 1e-7) -> Tensor:
    """Covariance [F, F] over max(σσᵀ, eps), as the reference forms it; a dead feature is a row of zeros."""
    std = torch.diagonal(covariance).sqrt()
    return covariance / torch.clamp(torch.outer(std, std), min=eps)


def similarity(op: str, metric: Mapping[str, Tensor]) -> Tensor:
    """Similarities [F, F] from the first of `KEYS` that the metric holds: a covariance becomes a correlation."""
    key, given = _given(op, metric)
    return compute_correlation(given) if key == "covariance" else given


def stacked_features(op: str, metric: Mapping[str, Tensor]) -> tuple[int, torch.device]:
    """F and the device, of a matching that reads no values."""
    _, given = _given(op, metric)
    return given.shape[0], given.device


def _given(op: str, metric: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    for key in KEYS:
        if key in metric:
            given = metric[key]
            if given.dim() != 2 or given.shape[0] != given.shape[1]:
                raise ValueError(f"{op}: 'metric[{key}]' must be square [F, F], got {list(given.shape)}")
            return key, given
    raise ValueError(f"{op}: 'metric' must hold 'covariance', 'cossim' or 'correlation', got {list(metric)}")


def models_of(op: str, features: int, r: float) -> int:
    """N = 1 / (1 - r), rounded, which must divide the features."""
    if not 0 <= r < 1:
        raise ValueError(f"{op}: 'r' must be in [0, 1), got {r}")
    models = int(1 / (1 - r) + 0.5)
    if features % models:
        raise ValueError(f"{op}: {features} features must divide among {models} models (r = {r})")
    return models


def two_models(op: str, features: int, r: float, instead: str) -> int:
    """D of the two models that a method is limited to."""
    models = models_of(op, features, r)
    if models != 2:
        raise ValueError(f"{op}: 'r' must be 0.5, as the method is for two models, got {r}; use {instead}")
    return features // 2


def refuse_nan(op: str, sims: Tensor) -> None:
    """The diagonal does not count, as no matching reads it."""
    wrong = sims.isnan().fill_diagonal_(False)
    if bool(wrong.any()):
        i, j = divmod(int(wrong.reshape(-1).to(torch.uint8).argmax()), sims.shape[1])
        raise ValueError(f"{op}: 'metric' must not give NaN, got one at [{i}, {j}]")


def matrices(plain: Tensor, models: int, add_bias: bool) -> tuple[Tensor, Tensor]:
    """(merge [keep, F], unmerge [F, keep]) from the 0/1 membership [F, keep].

    Rows of merge hold 1/(k + 1e-5) on the k members.  With `add_bias` each model's block of unmerge gets a row and a
    column more, which pass a bias through.
    """
    merge = plain / (plain.sum(dim=0, keepdim=True) + EPS)
    unmerge = torch.cat([_with_bias(block) for block in plain.chunk(models)]) if add_bias else plain
    return merge.T, unmerge


def _with_bias(block: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(block, (0, 1, 0, 1))
    padded[-1, -1] = 1
    return padded
