# SPDX-License-Identifier: Apache-2.0
"""Packed masks, as every op reads them: one bit per weight in flat order, lowest bit first, 1 = alive.

A tensor of n elements has a mask of 64 · ⌈n / 512⌉ bytes; bit i is bit i & 7 of byte i >> 3, and the padding is 0.  A
mask without elements stands for a tensor that has none: all alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check as check


def mask_bytes(size: int) -> int:
    """Bytes of the packed mask of a tensor of ``size`` elements."""
    return 64 * ((size + 511) // 512)


def pack(alive: Tensor) -> Tensor:
    """The packed mask of booleans, in flat order."""
    flat = alive.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 512))
    place = torch.arange(8, dtype=torch.uint8, device=alive.device)
    return (padded.reshape(-1, 8) << place).sum(1, dtype=torch.uint8)


def unpack(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The booleans of this shape that a packed mask stands for."""
    size = 1
    for side in shape:
        size *= side
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits & 1).reshape(-1)[:size].bool().reshape(tuple(shape))


def popcount(mask: Tensor) -> int:
    """How many weights are alive."""
    table = torch.tensor([bin(i).count("1") for i in range(256)], device=mask.device)
    return int(table[mask.long()].sum())


def check_masks(op: str, name: str, masks: Sequence[Tensor], tensors: Sequence[Tensor], like: str) -> None:
    """One mask for each of ``tensors`` (the argument ``like``), or an empty list."""
    check_list(op, name, masks, len(tensors), like)
    for i, (m, t) in enumerate(zip(masks, tensors)):
        check.check_dtype(op, f"{name}[{i}]", m, (torch.uint8,))
        check.check_device(op, f"{name}[{i}]", m, t.device)
        if m.numel():
            check.check_shape(op, f"{name}[{i}]", m, [mask_bytes(t.numel())], "[64 ceil(n / 512)]")
            if not m.is_contiguous():
                raise ValueError(f"{op}: '{name}[{i}]' must be contiguous, got strides {list(m.stride())}")


def check_list(op: str, name: str, tensors: Sequence[Tensor], count: int, like: str) -> None:
    """A list of ``count`` tensors, or an empty one."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{op}: '{name}' must be a list of tensors, got {type(tensors).__name__}")
    for i, t in enumerate(tensors):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: '{name}[{i}]' must be a tensor, got {type(t).__name__}")
    if len(tensors) not in (0, count):
        raise ValueError(f"{op}: '{name}' must hold one tensor for each of {count} in '{like}', got {len(tensors)}")


def check_written(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Floating and contiguous, so that they can be written in place in flat order."""
    for i, t in enumerate(tensors):
        check.check_dtype(op, f"{name}[{i}]", t, check.FLOATING)
        check.check_device(op, f"{name}[{i}]", t, tensors[0].device)
        if not t.is_contiguous():
            raise ValueError(f"{op}: '{name}[{i}]' must be contiguous, got strides {list(t.stride())}")


def masked(value: Tensor, mask: Sequence[Tensor], j: int) -> Tensor:
    """``value`` where mask j says alive, +0 elsewhere (also where it is NaN)."""
    if not mask or not mask[j].numel():
        return value
    alive = unpack(mask[j], value.shape)
    return torch.where(alive, value, torch.zeros_like(value))
