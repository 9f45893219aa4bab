# SPDX-License-Identifier: Apache-2.0
"""Sparse linear layers: only weights that are alive are stored, multiplied and trained.

``SparseLinear.from_linear(linear, packed_mask)`` takes the place of an ``nn.Linear``; its parameter ``value`` holds the
alive weights, so that gradients and optimizer state have that size too.  ``prefer_sparse`` says whether it pays: from a
crossover that is measured once for each kind of shape, then remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.sparse_linear import bank_layout, columns_of, pack_weight, rows_of, transpose_layout, unpack_weight

__all__ = ["SparseLinear", "SparseWeight", "linear"]


def on_gpu(t: Tensor) -> bool:
    return t.is_cuda


# -------------------------------------------------------------------------------------------------------------- weights


@dataclass(frozen=True)
class SparseWeight:
    """The alive entries of a matrix [out, in] in compressed rows; ``zipfast/ops/sparse_linear.py`` has the layout."""

    row_start: Tensor
    column: Tensor
    value: Tensor
    in_features: int

    @classmethod
    def from_dense(cls, weight: Tensor, packed_mask: Tensor) -> SparseWeight:
        """Those entries of ``weight`` whose bit in ``packed_mask`` is set, even where they are 0."""
        return cls(*pack_weight(weight.detach(), packed_mask), weight.shape[1])

    def to_dense(self) -> Tensor:
        """The matrix; dead entries are +0."""
        return unpack_weight(self.row_start, self.column, self.value, self.in_features)

    def for_gpu(self) -> SparseWeight:
        """The same matrix with the entries of each row in the order in which a GPU multiplies them fastest (a copy)."""
        column, order = bank_layout(self.row_start, self.column, self.in_features)
        return SparseWeight(self.row_start, column, self.value[order.long()], self.in_features)

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_start.numel() - 1, self.in_features

    @property
    def density(self) -> float:
        """Alive entries per entry; 0 of an empty matrix."""
        size = self.shape[0] * self.shape[1]
        return self.value.numel() / size if size else 0.0

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.row_start, self.column, self.value))


# ------------------------------------------------------------------------------------------------------------- gradients
# T(value, x, grad) = sum_i value_i sum_b x[b, column_i] grad[b, row_i] is linear in each of its three arguments, and each of
# the three operators is its derivative by one of them.  So they are each other's gradients, to any order.


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, row_start: Tensor, column: Tensor, value: Tensor, x: Tensor, bias: Tensor | None, *transposed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(row_start, column, value, x, *transposed)
        ctx.has_bias = bias is not None
        y: Tensor = ops.sparse_linear(row_start, column, value, x, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row_start, column, value, x, *transposed = ctx.saved_tensors
        by_value = by_x = by_bias = None
        if ctx.needs_input_grad[2]:
            by_value = _Weight.apply(row_start, column, grad, x, *transposed)
        if ctx.needs_input_grad[3]:
            by_x = _Input.apply(row_start, column, value, grad, x.shape[1], *transposed)
        if ctx.has_bias and ctx.needs_input_grad[4]:
            by_bias = grad.sum(0)
        return None, None, by_value, by_x, by_bias, *[None for _ in transposed]


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, row_start: Tensor, column: Tensor, value: Tensor, grad: Tensor, in_features: int, *transposed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(row_start, column, value, grad, *transposed)
        if transposed and not on_gpu(grad):  # the kernel in C++ wants ascending columns; this product takes any
            product: Tensor = ops.sparse_linear(transposed[0], transposed[1], value[transposed[2].long()], grad, None)
            return product
        by_x: Tensor = ops.sparse_linear_input(row_start, column, value, list(transposed), grad, in_features)
        return by_x

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        row_start, column, value, grad, *transposed = ctx.saved_tensors
        by_value = by_grad = None
        if ctx.needs_input_grad[2]:
            by_value = _Weight.apply(row_start, column, grad, x, *transposed)
        if ctx.needs_input_grad[3]:
            by_grad = _Forward.apply(row_start, column, value, x, None, *transposed)
        return None, None, by_value, by_grad, None, *[None for _ in transposed]


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row_start: Tensor, column: Tensor, grad: Tensor, x: Tensor, *transposed: Tensor) -> Tensor:
        ctx.save_for_backward(row_start, column, grad, x, *transposed)
        by_value: Tensor = ops.sparse_linear_weight(row_start, column, grad, x)
        return by_value

    @staticmethod
    def backward(ctx: Any, value: Tensor) -> tuple[Tensor | None, ...]:
        row_start, column, grad, x, *transposed = ctx.saved_tensors
        by_grad = by_x = None
        if ctx.needs_input_grad[2]:
            by_grad = _Forward.apply(row_start, column, value, x, None, *transposed)
        if ctx.needs_input_grad[3]:
            by_x = _Input.apply(row_start, column, value, grad, x.shape[1], *transposed)
        return None, None, by_grad, by_x, *[None for _ in transposed]


def linear(weight: SparseWeight, x: Tensor, bias: Tensor | None = None, *, transposed: Sequence[Tensor] = ()) -> Tensor:
    """``x @ weight.T + bias`` with gradients, of any order, by ``weight.value``, ``x`` and ``bias``.

    Args:
        weight: the alive entries.
        x: [..., in], of the dtype of ``weight.value``.
        bias: [out] or None.
        transposed: what ``zipfast.ops.sparse_linear.transpose_layout`` returns; gradients by ``x`` need it on a GPU, and
            where columns do not ascend.

    Raises:
        TypeError, ValueError, RuntimeError: as the operator ``sparse_linear``.
    """
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _Forward.apply(weight.row_start, weight.column, weight.value, flat, bias, *transposed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# ---------------------------------------------------------------------------------------------------------------- layer


class SparseLinear(nn.Module):
    """A linear layer that holds its alive weights only; made by ``from_linear``.

    ``value`` [alive] and ``bias`` are parameters, ``row_start`` and ``column`` buffers; all four make the state dict, and
    one with another mask of the same layer may be loaded (``value`` is then a new parameter: make optimizers after it).
    ``column`` says where each entry of ``value`` belongs; within a row they may be in any order, and ``for_gpu_`` puts them
    in the one that GPUs multiply fastest.  No copy of the weights is kept that could differ from them.

    Example:
        >>> import torch
        >>> layer = SparseLinear.from_linear(torch.nn.Linear(3, 2), torch.tensor([0b100110] + [0] * 63, dtype=torch.uint8))
        >>> layer
        SparseLinear(in_features=3, out_features=2, alive=3, bias=True)
        >>> layer(torch.randn(5, 7, 3)).shape
        torch.Size([5, 7, 2])
    """

    row_start: Tensor
    column: Tensor
    bias: nn.Parameter | None
    t_row_start: Tensor | None
    t_column: Tensor | None
    t_order: Tensor | None

    def __init__(self, weight: SparseWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.value = nn.Parameter(weight.value)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.register_buffer("row_start", weight.row_start)
        self.register_buffer("column", weight.column)
        self._transpose()

    @classmethod
    def from_linear(cls, linear: nn.Linear, packed_mask: Tensor) -> SparseLinear:
        """The same layer without its dead weights; parameters are copies, on a GPU as ``for_gpu_`` orders them."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        weight = SparseWeight.from_dense(linear.weight, packed_mask)
        return cls(weight.for_gpu() if on_gpu(linear.weight) else weight, bias).train(linear.training)

    def for_gpu_(self) -> SparseLinear:
        """Order the entries of each row as GPUs multiply them fastest, for a layer made elsewhere; returns the layer.

        ``value`` keeps its place and changes its order: make optimizers after it.
        """
        with torch.no_grad():
            weight = self.weight.for_gpu()
            self.value.copy_(weight.value)
            self.column.copy_(weight.column)
        self._transpose()
        return self

    def to_linear(self) -> nn.Linear:
        """A dense layer; dead weights are +0."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.to_dense().detach())
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())
        return dense.train(self.training)

    @property
    def weight(self) -> SparseWeight:
        return SparseWeight(self.row_start, self.column, self.value, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.value.dtype and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.value.dtype)
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _Forward.apply(self.row_start, self.column, self.value, flat, self.bias, *self._transposed())
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, alive={self.value.numel()}, "
            f"bias={self.bias is not None}"
        )

    # GPUs, and C++ where columns do not ascend, compute the gradient by the input from a transposed layout: it is kept
    # beside, out of the state dict.

    def _transpose(self) -> None:
        parts: Sequence[Tensor | None] = (None, None, None)
        if self._needs_transposed():
            parts = transpose_layout(self.row_start, self.column, self.in_features)
        for name, t in zip(("t_row_start", "t_column", "t_order"), parts, strict=True):
            self.register_buffer(name, t, persistent=False)

    def _needs_transposed(self) -> bool:
        if self.row_start.is_meta or on_gpu(self.row_start):
            return not self.row_start.is_meta
        place = rows_of(self.row_start, self.column) * self.in_features + columns_of(self.column)
        return bool((place.diff() <= 0).any())

    def _transposed(self) -> tuple[Tensor, ...]:
        if self.t_row_start is None or self.t_column is None or self.t_order is None:
            return ()
        return self.t_row_start, self.t_column, self.t_order

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        if self._needs_transposed() != (self.t_row_start is not None):
            self._transpose()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        value, column = state_dict.get(prefix + "value"), state_dict.get(prefix + "column")
        if value is not None and column is not None and value.shape == column.shape != self.column.shape:
            self.value = nn.Parameter(self.value.new_empty(value.shape), self.value.requires_grad)
            self.column = self.column.new_empty(column.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._transpose()
