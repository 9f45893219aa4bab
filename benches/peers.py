# SPDX-License-Identifier: Apache-2.0
"""What users call otherwise, and the agreement of each with ours.

The public ZipIt and LogME codes take part where ZIPFAST_ZIPIT and ZIPFAST_LOGME name their checkouts: they are imported
from there, as they are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import zipfast

ZIPIT = "ZipIt"
ZIPIT_STEPS = "ZipIt's steps"
REFERENCE = "torch reference"


@functools.cache
def zipit(module: str) -> ModuleType | None:
    """A module of the public ZipIt code, or None where ZIPFAST_ZIPIT is not set."""
    folder = os.environ.get("ZIPFAST_ZIPIT")
    if not folder:
        return None
    return module_of(Path(folder) / f"{module}.py", "ZIPFAST_ZIPIT")


@functools.cache
def logme() -> type | None:
    """The public LogME class, or None where ZIPFAST_LOGME is not set. It needs numba, and compiles when it is imported."""
    folder = os.environ.get("ZIPFAST_LOGME")
    return None if not folder else module_of(Path(folder) / "LogME.py", "ZIPFAST_LOGME").LogME


def module_of(path: Path, variable: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{variable.lower()}_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{variable} is {path.parent}, which has no {path.name}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def by_reference(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same call, served by the pure-torch reference."""

    def run() -> Any:
        with zipfast.backend("torch"):
            return call()

    return run


@contextlib.contextmanager
def fp32_precision(name: str) -> Iterator[None]:
    """``"ieee"`` or ``"tf32"`` for CUDA matrix products inside, whatever the process had set."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = name
    try:
        yield
    finally:
        settings.fp32_precision = before


# -------------------------------------------------------------------------------------------------------------- moments


def as_rows(x: Tensor, axis: int) -> Tensor:
    """[D, samples]: the copy that every library route needs before it can multiply."""
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def torch_cov(features: list[Tensor], axis: int) -> Tensor:
    return torch.cov(torch.cat([as_rows(x, axis).float() for x in features]))


def zipit_update(metric, features: list[Tensor], axis: int):
    """One batch as ZipIt's loop feeds it: the hook's permute and reshape, ``.float()``, then ``update``."""
    if axis == 1:
        rows = [x.permute(1, 0, 2, 3).reshape(x.shape[1], -1) for x in features]
    else:
        rows = [x.flatten(0, x.dim() - 2).transpose(1, 0).contiguous() for x in features]
    metric.update(features[0].shape[0], *[r.float() for r in rows])
    return metric


class StepsOfZipit:
    """What ZipIt's update does with a batch, operation by operation, for machines that have no checkout of it.

    Features to float32 rows, stacked, copied once more without what is not finite, standard deviations (which nothing
    uses), means, and the whole product, each weighted by the batch.
    """

    def __init__(self) -> None:
        self.mean: Tensor | float = 0.0
        self.deviation: Tensor | float = 0.0
        self.outer: Tensor | float = 0.0

    def update(self, features: list[Tensor], axis: int) -> StepsOfZipit:
        batch = features[0].shape[0]
        x = torch.nan_to_num(torch.cat([as_rows(f, axis).float() for f in features]), 0, 0, 0)
        self.deviation = self.deviation + x.std(1) * batch
        self.mean = self.mean + x.mean(1) * batch
        self.outer = self.outer + (x @ x.T) / x.shape[1] * batch
        return self


def cov_of(comoment: Tensor, total: Tensor, samples: int) -> Tensor:
    """Unbiased covariance from unshifted sums, float64."""
    upper = torch.triu(comoment)
    return (upper + torch.triu(upper, 1).T - torch.outer(total, total) / samples) / (samples - 1)


def close(ours: Tensor, theirs: Tensor, rtol: float) -> None:
    """Largest difference, relative to the largest entry; raises AssertionError beyond ``rtol``."""
    scale = max(float(theirs.abs().max()), 1e-30)
    error = float((ours.double() - theirs.double()).abs().max()) / scale
    if not error <= rtol:  # a NaN fails too
        raise AssertionError(f"largest difference {error:.3g} of the largest entry, tolerated {rtol:.3g}")


# ------------------------------------------------------------------------------------------------------------ zip_match


def groups_of(unmerge: Tensor) -> Tensor:
    """The group of each feature from ZipIt's 0/1 unmerge matrix [F, groups], whose columns follow the slots."""
    if not bool((unmerge.sum(1) == 1).all()):
        raise AssertionError("the peer's unmerge matrix does not put each feature into one group")
    return unmerge.argmax(1)


def same_groups(ours: Tensor, theirs: Tensor) -> None:
    wrong = int((ours.cpu() != theirs.cpu()).sum())
    if wrong:
        raise AssertionError(f"{wrong} of {len(ours)} features are in another group")


# -------------------------------------------------------------------------------------------------------------- regroup


def dense_groups(order: Tensor, start: Tensor, features: int, divisor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The 0/1 (or averaging) matrix [groups, features] that a matrix route multiplies by."""
    groups = len(start) - 1
    owner = torch.repeat_interleave(torch.arange(groups, device=order.device), start[1:] - start[:-1])
    dense = torch.zeros(groups, features, dtype=dtype, device=order.device)
    dense[owner, order] = 1
    return dense if divisor is None else (dense / divisor[:, None]).to(dtype)


def owners(order: Tensor, start: Tensor, features: int) -> Tensor:
    """The group of each feature, for ``index_add``."""
    owner = torch.empty(features, dtype=torch.int64, device=order.device)
    owner[order] = torch.repeat_interleave(torch.arange(len(start) - 1, device=order.device), start[1:] - start[:-1])
    return owner


def index_add(x: list[Tensor], owner: Tensor, divisor: Tensor | None, axis: int, groups: int) -> Tensor:
    stacked = torch.cat(x, axis) if len(x) > 1 else x[0]
    shape = list(stacked.shape)
    shape[axis] = groups
    out = stacked.new_zeros(shape).index_add_(axis, owner, stacked)
    if divisor is not None:
        out /= divisor.to(out.dtype).reshape([-1 if i == axis else 1 for i in range(out.dim())])
    return out
