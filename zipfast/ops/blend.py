# SPDX-License-Identifier: Apache-2.0
"""``blend_``: weighted sums over k models of lists of tensors, each input read once (model soups, Wortsman et al. 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._registry import op

NAME = "blend_"
FINITE = torch.iinfo(torch.int64).max  # in `bad`: nothing to report


def _contract(out: list[Tensor], bad: Tensor, x: list[Tensor], weight: Tensor) -> None:
    check.check_tensors(NAME, "out", out)
    check.check_tensors(NAME, "x", x)
    count, device = len(out), out[0].device
    if len(x) % count:
        raise ValueError(f"{NAME}: 'x' must hold k tensors for each of {count} in 'out', got {len(x)}")
    models = len(x) // count
    for name, tensors in (("out", out), ("x", x)):
        for i, t in enumerate(tensors):
            check.check_dtype(NAME, f"{name}[{i}]", t, check.FLOATING)
            check.check_device(NAME, f"{name}[{i}]", t, device)
    for i, t in enumerate(out):
        if not t.is_contiguous():
            raise ValueError(f"{NAME}: 'out[{i}]' must be contiguous, got strides {list(t.stride())}")
    for i, t in enumerate(x):
        wanted = out[i % count]
        if t.shape != wanted.shape:
            where = f"'x[{i}]' (model {i // count}, tensor {i % count})"
            raise ValueError(f"{NAME}: {where} must have the shape {list(wanted.shape)} of 'out', got {list(t.shape)}")
    check.check_dtype(NAME, "weight", weight, (torch.float64,))
    check.check_device(NAME, "weight", weight, device)
    check.check_shape(NAME, "weight", weight, [models, count], "[k, tensors]")
    check.check_dtype(NAME, "bad", bad, (torch.int64,))
    check.check_device(NAME, "bad", bad, device)
    check.check_shape(NAME, "bad", bad, [models + 1, count], "[k + 1, tensors]")
    if not bad.is_contiguous():
        raise ValueError(f"{NAME}: 'bad' must be contiguous, got strides {list(bad.stride())}")


def _fake(out: list[Tensor], bad: Tensor, x: list[Tensor], weight: Tensor) -> None:
    return None


@op("blend_(Tensor(a!)[] out, Tensor(b!) bad, Tensor[] x, Tensor weight) -> ()", contract=_contract, fake=_fake)
def blend_(out: list[Tensor], bad: Tensor, x: list[Tensor], weight: Tensor) -> None:
    r"""Write weighted sums over k models into ``out``, for many tensors in one call.

    .. math:: out_j = \sum_{i=0}^{k-1} weight_{ij} \, x_{i \cdot tensors + j}

    Terms are formed and added in float32 (float64 where ``out[j]`` or one of its inputs is float64), model after model,
    each product rounded before it is added, and rounded once to the dtype of ``out[j]``: what a loop over float32 copies
    gives, to the bit.  Inputs may differ in dtype.

    Args:
        out: tensors to write, contiguous, float32, float64, float16 or bfloat16; no memory shared with ``x``, unless
            ``out[j]`` is one of its own inputs, of the same dtype.
        bad: int64 [k + 1, tensors], filled with the largest int64 by the caller: gets, for each input, the flat index of
            its first NaN or infinity, if it has one; the last row that of the first output that is not finite although its
            own inputs are; what is there is only ever lowered.
        x: k · tensors inputs, those of model 0 first.
        weight: float64 [k, tensors].

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device.  Values raise nothing: see ``bad``.

    Cost and determinism: every input element read once, every output written once; bandwidth-bound.  The same bits on every
    backend, run and thread count.

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §2, eq. for uniform and learned soups.
    """
    count = len(out)
    for j, target in enumerate(out):
        inputs = x[j::count]
        wide = torch.float64 in (target.dtype, *(t.dtype for t in inputs))
        dtype = torch.float64 if wide else torch.float32
        total = torch.zeros((), dtype=dtype, device=target.device)
        for i, t in enumerate(inputs):
            term = t.to(dtype) * weight[i, j].to(dtype)
            total = total + term if i else term
        result = total.to(target.dtype).expand(target.shape)
        clean = torch.ones(target.numel(), dtype=torch.bool, device=target.device)
        for i, t in enumerate(inputs):
            wrong = ~torch.isfinite(t.reshape(-1))
            bad[i, j] = torch.minimum(bad[i, j], _first(wrong))
            clean = clean & ~wrong
        overflow = clean & ~torch.isfinite(result.reshape(-1))
        bad[-1, j] = torch.minimum(bad[-1, j], _first(overflow))
        target.copy_(result)


def _first(wrong: Tensor) -> Tensor:
    """The first index that is true."""
    if not wrong.numel():
        return torch.tensor(FINITE, device=wrong.device)
    return torch.where(wrong.any(), wrong.to(torch.uint8).argmax(), FINITE)
