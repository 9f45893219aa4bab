# SPDX-License-Identifier: Apache-2.0
"""``regroup``: merge and unmerge as gathered segment sums along one axis (Stoica et al. 2024, §4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._registry import op

NAME = "regroup"


def _contract(x: list[Tensor], order: Tensor, start: Tensor, divisor: Tensor | None, axis: int) -> None:
    check.check_tensors(NAME, "x", x)
    check.check_dtype(NAME, "x", x[0], check.FLOATING)
    check.check_same(NAME, "x", x)
    if len(x) > check.MAX_TENSORS:
        raise ValueError(f"{NAME}: 'x' must hold at most {check.MAX_TENSORS} tensors, got {len(x)}")
    for i, t in enumerate(x):
        if t.shape != x[0].shape:
            raise ValueError(f"{NAME}: 'x[{i}]' must have the shape of x[0], {list(x[0].shape)}, got {list(t.shape)}")
    if not 0 <= axis < x[0].dim():
        raise ValueError(f"{NAME}: 'axis' must be in [0, {x[0].dim()}), got {axis}")
    for name, t in (("order", order), ("start", start)):
        check.check_dtype(NAME, name, t, (torch.int64,))
        check.check_device(NAME, name, t, x[0].device)
        if t.dim() != 1:
            raise ValueError(f"{NAME}: '{name}' must have one axis, got shape {list(t.shape)}")
    if start.shape[0] < 1:
        raise ValueError(f"{NAME}: 'start' must be [groups + 1], got an empty tensor")
    if divisor is not None:
        check.check_dtype(NAME, "divisor", divisor, (torch.float64,))
        check.check_device(NAME, "divisor", divisor, x[0].device)
        check.check_shape(NAME, "divisor", divisor, [start.shape[0] - 1], "[groups]")


def _fake(x: list[Tensor], order: Tensor, start: Tensor, divisor: Tensor | None, axis: int) -> Tensor:
    shape = list(x[0].shape)
    shape[axis] = start.shape[0] - 1
    return x[0].new_empty(shape)


@op(
    "regroup(Tensor[] x, Tensor order, Tensor start, Tensor? divisor, int axis) -> Tensor",
    contract=_contract,
    fake=_fake,
)
def regroup(x: list[Tensor], order: Tensor, start: Tensor, divisor: Tensor | None, axis: int) -> Tensor:
    r"""Sum the members of each group along an axis.

    With the features of all M tensors stacked along ``axis`` (feature f = m·D + k is entry k of ``x[m]``),

    .. math:: out[.., g, ..] = \frac{1}{divisor_g} \sum_{p = start_g}^{start_{g+1} - 1} stacked[.., order_p, ..]

    One form serves three uses.  *Merge* an output axis: the groups of the match over all M models, divisor = group size.
    *Unmerge* an input axis: the members of one model, no divisor.  *Gather* (hand a merged feature back to its members, or
    permute): one source per output, ``start = arange``.  Members are indices, never a dense 0/1 matrix.

    Args:
        x: M tensors of one shape, dtype (float32, float64, float16, bfloat16) and device; D entries along ``axis``.
        order: int64 [members], stacked feature indices in [0, M·D), group after group.
        start: int64 [groups + 1], ascending, from 0 to ``len(order)``.
        divisor: float64 [groups] or None.
        axis: which axis, not negative.

    Returns:
        Tensor like ``x[0]`` with ``groups`` entries along ``axis``; a group without members is 0.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device.  Indices out of range raise RuntimeError on the CPU;
        the CUDA kernel, which must not synchronise, writes NaN for that group.

    Cost and determinism: each input element read once per membership, each output written once.  Sums run in float64, in
    the order given, and are rounded once (to 16 bits by way of float32); no atomics, so equal on every run, thread count
    and backend.

    Example:
        >>> import torch
        >>> w = [torch.tensor([[1., 2.], [3., 4.]]), torch.tensor([[5., 6.], [7., 8.]])]
        >>> regroup(w, torch.tensor([0, 2, 1, 3]), torch.tensor([0, 2, 4]), torch.tensor([2., 2.], dtype=torch.float64), 0)
        tensor([[3., 4.],
                [5., 6.]])

    Reference: Stoica et al. 2024 (ZipIt!, arXiv 2305.03053), §4.2, eq. 2 to 4.
    """
    if start.shape[0] == 1:
        return _fake(x, order, start, divisor, axis)
    stacked = torch.cat(x, axis).movedim(axis, 0).double()
    inside = ((order >= 0) & (order < stacked.shape[0])).all()
    torch._assert_async(inside, f"regroup: 'order' must be in [0, {stacked.shape[0]})")
    torch._assert_async(
        (start[0] == 0) & (start[-1] == order.shape[0]), "regroup: 'start' must run from 0 to len(order)"
    )
    out = torch.segment_reduce(stacked[order], "sum", lengths=start[1:] - start[:-1], axis=0, unsafe=False)
    if divisor is not None:
        out = out / divisor.reshape(-1, *[1] * (out.dim() - 1))
    return out.to(x[0].dtype).movedim(0, axis).contiguous()
