# SPDX-License-Identifier: Apache-2.0
"""``multidot``: inner products of one list of tensors with those of k models, in one pass (learned soups)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._registry import op

NAME = "multidot"


def _contract(g: list[Tensor], x: list[Tensor]) -> None:
    check.check_tensors(NAME, "g", g)
    check.check_tensors(NAME, "x", x)
    count, device = len(g), g[0].device
    if len(x) % count:
        raise ValueError(f"{NAME}: 'x' must hold k tensors for each of {count} in 'g', got {len(x)}")
    for name, tensors in (("g", g), ("x", x)):
        for i, t in enumerate(tensors):
            check.check_dtype(NAME, f"{name}[{i}]", t, check.FLOATING)
            check.check_device(NAME, f"{name}[{i}]", t, device)
    for i, t in enumerate(x):
        if t.shape != g[i % count].shape:
            wanted = list(g[i % count].shape)
            where = f"'x[{i}]' (model {i // count}, tensor {i % count})"
            raise ValueError(f"{NAME}: {where} must have the shape {wanted} of 'g', got {list(t.shape)}")


def _fake(g: list[Tensor], x: list[Tensor]) -> Tensor:
    return g[0].new_empty((len(x) // len(g), len(g)), dtype=torch.float64)


@op("multidot(Tensor[] g, Tensor[] x) -> Tensor", contract=_contract, fake=_fake)
def multidot(g: list[Tensor], x: list[Tensor]) -> Tensor:
    r"""Inner products of each tensor of ``g`` with the same tensor of k models.

    .. math:: out_{ij} = \langle g_j, x_{i \cdot tensors + j} \rangle

    With g the gradient of a loss at θ = Σ αᵢ θᵢ these are the derivatives by α: no graph over k models is needed.

    Args:
        g: tensors, float32, float64, float16 or bfloat16.
        x: k · tensors, those of model 0 first; dtypes may differ.

    Returns:
        float64 [k, tensors].

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device.

    Cost and determinism: every element of ``x`` read once; products and sums in float64, cut into chunks by shape alone:
    equal on every run and thread count.

    Example:
        >>> import torch
        >>> multidot([torch.ones(3)], [torch.tensor([1., 2., 3.]), torch.tensor([0., 0., 4.])])
        tensor([[6.],
                [4.]], dtype=torch.float64)

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §2 (learned soup), by the chain rule.
    """
    count = len(g)
    flat = [t.reshape(-1).double() for t in g]
    rows = [
        torch.stack([a @ t.reshape(-1).double() for a, t in zip(flat, x[i : i + count])])
        for i in range(0, len(x), count)
    ]
    return torch.stack(rows)
