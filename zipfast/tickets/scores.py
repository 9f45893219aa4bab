# SPDX-License-Identifier: Apache-2.0
"""What is pruned first: scores for :meth:`zipfast.tickets.Masks.prune`, the smallest magnitude of which goes first.

A score of one's own is any mapping from the names of the masks to tensors of the weights' shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .masks import Masks


def magnitude(model: nn.Module | Mapping[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """|w|, the score of the lottery-ticket papers (Frankle & Carbin 2019, §1)."""
    return {name: weight.detach().abs() for name, weight in masks.check(model, "magnitude").items()}


def random(masks: Masks, seed: int) -> dict[str, Tensor]:
    """Uniform in (0, 1), by seed and place of the tensor: random pruning, the lower bound of any score."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 1 - torch.rand(masks.shapes[name], generator=generator) for name in sorted(masks.shapes)}
