# SPDX-License-Identifier: Apache-2.0
"""Words of the contracts: each raises one sentence, ``op: 'argument' must be <wanted>, got <seen>``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_TENSORS = 64  # models in one call: kernel arguments are limited in size
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def words(dtypes: Sequence[torch.dtype]) -> str:
    names = [str(d).removeprefix("torch.") for d in dtypes]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def check_tensors(op: str, name: str, value: Sequence[Tensor]) -> None:
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{op}: '{name}' must be a non-empty list of tensors, got {type(value).__name__}")
    for i, t in enumerate(value):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: '{name}[{i}]' must be a tensor, got {type(t).__name__}")


def check_dtype(op: str, name: str, t: Tensor, wanted: Sequence[torch.dtype]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: '{name}' must be a tensor, got {type(t).__name__}")
    if t.dtype not in wanted:
        raise TypeError(f"{op}: '{name}' must be {words(wanted)}, got {words([t.dtype])}")


def check_same(op: str, name: str, tensors: Sequence[Tensor], start: int = 0) -> None:
    """All of one dtype and device; ``start`` is the place of the first one in the argument ``name``."""
    first = tensors[0]
    for i, t in enumerate(tensors, start):
        if t.dtype != first.dtype:
            raise TypeError(
                f"{op}: '{name}[{i}]' must be {words([first.dtype])} as the first one, got {words([t.dtype])}"
            )
        check_device(op, f"{name}[{i}]", t, first.device)


def check_device(op: str, name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise RuntimeError(f"{op}: '{name}' must be on {device} as the other arguments, got {t.device}")


def check_shape(op: str, name: str, t: Tensor, wanted: Sequence[int], letters: str) -> None:
    if tuple(t.shape) != tuple(wanted):
        raise ValueError(f"{op}: '{name}' must be {letters} = {list(wanted)}, got {list(t.shape)}")
