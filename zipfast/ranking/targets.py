# SPDX-License-Identifier: Apache-2.0
"""What the ranking functions accept: features and labels as NumPy arrays, torch tensors or lists, checked before use.

Every refusal is one sentence. Nothing is repaired in silence: labels of half a class, NaN, one-hot labels where classes are
wanted and negative classes are errors; rows to leave out are named by `ignore_index`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = Tensor | np.ndarray | Sequence[Any]
Task = Literal["classification", "regression", "multilabel"]
TASKS = ("classification", "regression", "multilabel")
LARGEST = 1e36  # in magnitude: shifts are exact in float32, squares and their sums stay finite


@dataclass(frozen=True)
class Targets:
    """The labels of some samples: classes (int64 [N]) or values (float64 [N, K])."""

    task: Task
    values: Tensor
    outputs: int  # K: largest class + 1, or columns


def check_task(op: str, task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"{op}: 'task' must be one of {', '.join(TASKS)}, got {task!r}")


def as_tensor(op: str, name: str, value: Any) -> Tensor:
    """An array of numbers as a tensor; its memory is shared where possible."""
    if isinstance(value, Tensor):
        found = value.detach()
    else:
        try:
            array = np.asarray(value)
        except ValueError:
            raise ValueError(f"{op}: '{name}' must be an array, got rows of different lengths") from None
        if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
            if array.dtype.kind == "f":  # long double
                array = array.astype(np.float64)
            else:
                raise TypeError(f"{op}: '{name}' must be real numbers, got dtype {array.dtype}")
        if array.dtype in (np.uint16, np.uint32, np.uint64):
            array = array.astype(np.int64)
        array = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)  # nothing writes to it
            found = torch.from_numpy(array)
    if found.is_complex():
        raise TypeError(f"{op}: '{name}' must be real numbers, got dtype complex")
    return found


def as_features(op: str, value: Any, *, finite: bool = True) -> Tensor:
    """Features [N, D] in a floating dtype; integers and booleans become float64.

    Raises:
        TypeError: no numbers. ValueError: another shape; no feature; NaN, infinity or magnitudes whose squares overflow
            (with `finite`; the first place is named).
    """
    x = as_tensor(op, "features", value)
    if x.dim() != 2:
        raise ValueError(f"{op}: 'features' must be [N, D], got shape {list(x.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{op}: 'features' must have at least one column, got shape {list(x.shape)}")
    if not x.is_floating_point():
        x = x.double()
    if finite and x.numel():
        check_finite(op, x)
    return x


def check_finite(op: str, x: Tensor, name: str = "features") -> None:
    """Refuse NaN, infinities and magnitudes whose squares overflow, naming the first place."""
    largest = float(x.abs().amax())
    if largest <= LARGEST:  # not so of NaN
        return
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        place = [int(i) for i in bad.nonzero()[0]]
        where = "row {}, column {}".format(*place) if len(place) == 2 else f"row {place[0]}"
        raise ValueError(
            f"{op}: '{name}' must be finite, got {int(bad.sum())} NaN or infinite values, the first in {where}"
        )
    raise ValueError(f"{op}: '{name}' must be at most {LARGEST:g} in magnitude, got {largest:.3g}; rescale them")


def check_products(op: str, gram: Tensor, dtype: torch.dtype) -> None:
    """Refuse sums of products that overflowed: float32 ones do long before `LARGEST`."""
    if not bool(torch.isfinite(gram.diagonal()).all()):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{op}: 'features' must have squares that can be summed, got overflow with {kind} features; rescale them or "
            "set precision='float64'"
        )


def as_classes(op: str, value: Any, samples: int | None = None, ignore_index: int | None = None) -> Tensor:
    """Class labels, int64 [N]; those equal to `ignore_index` stay in.

    Raises:
        TypeError: no numbers. ValueError: another shape or number; a label that is no whole number; a negative one.
    """
    y = as_tensor(op, "labels", value)
    if y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dim() == 2:
        raise ValueError(
            f"{op}: 'labels' must be classes [N], got shape {list(y.shape)}; for one-hot labels pass labels.argmax(1), for "
            "several labels a sample task='multilabel', for values task='regression' (LogME: regression=True)"
        )
    if y.dim() != 1:
        raise ValueError(f"{op}: 'labels' must be classes [N], got shape {list(y.shape)}")
    check_length(op, y, samples)
    if y.is_floating_point():
        whole = y.round()
        wrong = ~((y == whole) & y.isfinite())
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"{op}: 'labels' must be whole numbers, got {float(y[i])} in row {i}; for values use regression"
            )
        y = whole
    y = y.long()
    negative = y < 0 if ignore_index is None else (y < 0) & (y != ignore_index)
    if y.numel() and bool(negative.any()):
        i = int(negative.nonzero()[0])
        raise ValueError(
            f"{op}: 'labels' must be classes from 0, got {int(y[i])} in row {i}; rows to leave out are named by ignore_index"
        )
    return y


def as_targets(op: str, value: Any, task: Task, samples: int | None = None, ignore_index: int | None = None) -> Targets:
    """Labels of any task; in regression [N] is taken as [N, 1].

    Raises:
        TypeError, ValueError: see :func:`as_classes`; values that are not finite; multi-label values other than 0 and 1.
    """
    if task == "classification":
        y = as_classes(op, value, samples, ignore_index)
        kept = y if ignore_index is None else y[y != ignore_index]
        return Targets(task, y, int(kept.max()) + 1 if kept.numel() else 0)
    y = as_tensor(op, "labels", value)
    y = y[:, None] if y.dim() == 1 and task == "regression" else y
    if y.dim() != 2 or y.shape[1] == 0:
        wanted = "[N] or [N, K] values" if task == "regression" else "[N, K] of 0 and 1"
        raise ValueError(f"{op}: 'labels' must be {wanted}, got shape {list(y.shape)}")
    check_length(op, y, samples)
    y = y.double()
    if y.numel():
        check_finite(op, y, "labels")
    if task == "multilabel" and not bool(((y == 0) | (y == 1)).all()):
        raise ValueError(
            f"{op}: 'labels' must be 0 or 1 for task='multilabel', got other values; see task='regression'"
        )
    return Targets(task, y, y.shape[1])


def check_length(op: str, y: Tensor, samples: int | None) -> None:
    if samples is not None and y.shape[0] != samples:
        raise ValueError(f"{op}: 'labels' must have one entry per row of the features ({samples}), got {y.shape[0]}")
