# SPDX-License-Identifier: Apache-2.0
"""``gram``: inner products of the task vectors of k models with each other, tensor by tensor, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._paths import Paths
from ._registry import op

NAME = "gram"
MAX_MODELS = 256


def _contract(x: list[Tensor], models: int, base: list[Tensor]) -> None:
    check.check_tensors(NAME, "x", x)
    if not 1 <= models <= MAX_MODELS or len(x) % models:
        raise ValueError(
            f"{NAME}: 'models' must be in [1, {MAX_MODELS}] and divide the {len(x)} tensors of 'x', got {models}"
        )
    count, device = len(x) // models, x[0].device
    if base and len(base) != count:
        raise ValueError(f"{NAME}: 'base' must be empty or hold {count} tensors, got {len(base)}")
    for name, tensors in (("x", x), ("base", base)):
        for i, t in enumerate(tensors):
            check.check_dtype(NAME, f"{name}[{i}]", t, check.FLOATING)
            check.check_device(NAME, f"{name}[{i}]", t, device)
            if t.shape != x[i % count].shape:
                wanted = list(x[i % count].shape)
                raise ValueError(f"{NAME}: '{name}[{i}]' must have the shape {wanted} of model 0, got {list(t.shape)}")


def _fake(x: list[Tensor], models: int, base: list[Tensor], path: str = "auto") -> Tensor:
    return x[0].new_empty((len(x) // models, models, models), dtype=torch.float64)


def _prove(device: torch.device) -> str | None:
    """Path "tensor" against the first one, on whole numbers, whose sums are exact: operands of every number of models."""
    for models in (5, 13, 29, 70):
        whole = torch.arange(models * 304, device=device).mul(40503).remainder(8191) - 4095
        x = list(whole.reshape(models, 304).float().unbind())
        plain, tensor = (gram(x, models, x[1:2], path) for path in PATHS.names)
        if not torch.equal(plain, tensor):
            return f"path 'tensor' differs for {models} models"
    return None


PATHS = Paths(("plain", "tensor"), _prove)


@op(
    'gram(Tensor[] x, int models, Tensor[] base, str path="auto") -> Tensor',
    contract=_contract,
    fake=_fake,
    paths=PATHS,
)
def gram(x: list[Tensor], models: int, base: list[Tensor], path: str = "auto") -> Tensor:
    r"""Inner products of the differences of k models from a base, for each tensor.

    .. math:: out_{jab} = \langle x_{a,j} - base_j, \; x_{b,j} - base_j \rangle

    Summed over j it gives norms, cosines and distances of task vectors, the coordinates of a plane through three models, and
    the distance of any soup from any model.

    Args:
        x: k · tensors, those of model 0 first: float32, float64, float16 or bfloat16; dtypes may differ.
        models: k, up to 256.
        base: a tensor for each, or an empty list for 0.
        path: which CUDA kernel: ``"plain"`` runs on every GPU, ``"tensor"`` has the tensor cores multiply float64 numbers;
            ``"auto"`` takes it where these are fast (A100, H100, H200) and there are four models or more.

    Returns:
        float64 [tensors, k, k], symmetric to the bit.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, range, device.

    Cost and determinism: every element read once, k²/2 multiply-adds each.  Differences are rounded to float32 (float64
    inputs: to float64), products and sums in float64; chunks are cut by shape alone: equal on every run and thread count.

    Example:
        >>> import torch
        >>> gram([torch.tensor([1., 0.]), torch.tensor([1., 2.])], 2, [])
        tensor([[[1., 1.],
                 [1., 5.]]], dtype=torch.float64)

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §4 (angles between solutions).
    """
    count = len(x) // models
    parts = []
    for j in range(count):
        own = x[j::count]
        wide = any(t.dtype == torch.float64 for t in (*own, *base[j : j + 1]))
        dtype = torch.float64 if wide else torch.float32
        rows = torch.stack([t.reshape(-1).to(dtype) for t in own])
        if base:
            rows = rows - base[j].reshape(-1).to(dtype)
        rows = rows.double()
        found = rows @ rows.T
        parts.append(found.triu() + found.triu(1).T)
    return torch.stack(parts)
