# SPDX-License-Identifier: Apache-2.0
"""``sparse_linear``, ``sparse_linear_weight``: a linear layer whose dead weights are neither stored nor multiplied.

The layout is compressed rows: ``row_start`` [out + 1], ``column`` [alive], ``value`` [alive], where a column is the bit
pattern of a uint16 held as int16 if there are at most 65536 of them, else int32.  ``pack_weight`` makes it from a weight
and a packed mask, ``transpose_layout`` that of the transposed weight, over the same values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._registry import op

STEM = "sparse_linear"
NARROW = 1 << 16  # columns that 16 bits tell apart
MAX_ALIVE = (1 << 31) - 1


# -------------------------------------------------------------------------------------------------------------- layout


def unpack_mask(packed_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The bool mask of ``shape`` that a packed one (LSB first, padded to 64 bytes) stands for."""
    size = shape[0] * shape[1]
    bits = packed_mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed_mask.device)
    return (bits & 1).flatten()[:size].bool().reshape(shape)


def pack_weight(weight: Tensor, packed_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The alive entries of a matrix, row by row; those that happen to be 0 are kept.

    Args:
        weight: [out, in], floating.
        packed_mask: uint8 [64·ceil(out·in / 512)] over its elements, row-major: bit i is byte i >> 3, bit i & 7.

    Returns:
        row_start int32 [out + 1]; column int16 (in <= 65536) or int32 [alive]; value [alive], of the weight's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device.

    Example:
        >>> import torch
        >>> mask = torch.zeros(64, dtype=torch.uint8)
        >>> mask[0] = 0b100110
        >>> pack_weight(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), mask)
        (tensor([0, 2, 3], dtype=torch.int32), tensor([1, 2, 2], dtype=torch.int16), tensor([2., 3., 6.]))
    """
    name = "pack_weight"
    check.check_dtype(name, "weight", weight, check.FLOATING)
    if weight.dim() != 2:
        raise ValueError(f"{name}: 'weight' must be [out, in], got {list(weight.shape)}")
    check.check_dtype(name, "packed_mask", packed_mask, (torch.uint8,))
    check.check_device(name, "packed_mask", packed_mask, weight.device)
    check.check_shape(name, "packed_mask", packed_mask, [(weight.numel() + 511) // 512 * 64], "[64·ceil(out·in / 512)]")
    mask = unpack_mask(packed_mask, (weight.shape[0], weight.shape[1]))
    row, column = mask.nonzero(as_tuple=True)
    if len(row) > MAX_ALIVE:
        raise ValueError(f"{name}: 'packed_mask' must have at most {MAX_ALIVE} bits set, got {len(row)}")
    return _row_start(row, len(weight)), _narrow(column, weight.shape[1]), weight[mask]


def unpack_weight(row_start: Tensor, column: Tensor, value: Tensor, in_features: int) -> Tensor:
    """The matrix [out, in] again; what is not stored is +0."""
    weight = value.new_zeros(len(row_start) - 1, in_features)
    weight[rows_of(row_start, column), columns_of(column)] = value
    return weight


def transpose_layout(row_start: Tensor, column: Tensor, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row_start, column, order) of the transposed matrix: its entry i is ``value[order[i]]`` of the matrix itself."""
    old = columns_of(column)
    order = old.argsort(stable=True)  # entries lie row by row: a stable sort keeps rows ascending in a column
    row = rows_of(row_start, column)[order]
    return _row_start(old[order], in_features), _narrow(row, len(row_start) - 1), order.int()


def columns_of(column: Tensor) -> Tensor:
    """int64; int16 is read as unsigned."""
    return column.long() & 0xFFFF if column.dtype == torch.int16 else column.long()


def rows_of(row_start: Tensor, column: Tensor) -> Tensor:
    """int64 [alive]: the row that each entry lies in."""
    rows = torch.arange(len(row_start) - 1, device=row_start.device)
    return rows.repeat_interleave(row_start.diff().long(), output_size=column.numel())


def _row_start(row: Tensor, rows: int) -> Tensor:
    count = torch.bincount(row, minlength=rows)
    return torch.cat([count.new_zeros(1), count.cumsum(0)]).int()


def _narrow(column: Tensor, columns: int) -> Tensor:
    # modulo 2^16 by way of subtraction, so that no out-of-range cast is asked for
    return (column - (column >> 15 << 16)).to(torch.int16) if columns <= NARROW else column.int()


# ----------------------------------------------------------------------------------------------------------- contracts


def _check_layout(name: str, row_start: Tensor, column: Tensor, x: Tensor) -> None:
    check.check_dtype(name, "x", x, check.FLOATING)
    if x.dim() != 2:
        raise ValueError(f"{name}: 'x' must be [batch, in], got {list(x.shape)}")
    check.check_dtype(name, "row_start", row_start, (torch.int32,))
    check.check_device(name, "row_start", row_start, x.device)
    if row_start.dim() != 1 or not row_start.numel():
        raise ValueError(f"{name}: 'row_start' must be [out + 1], got {list(row_start.shape)}")
    check.check_dtype(name, "column", column, (torch.int16, torch.int32))
    check.check_device(name, "column", column, x.device)
    if column.dim() != 1:
        raise ValueError(f"{name}: 'column' must be [alive], got {list(column.shape)}")
    if column.dtype == torch.int16 and x.shape[1] > NARROW:
        raise TypeError(f"{name}: 'column' must be int32 for {x.shape[1]} input features, got int16")


def _contract(
    row_start: Tensor, column: Tensor, value: Tensor, order: Tensor | None, x: Tensor, bias: Tensor | None
) -> None:
    _check_layout(STEM, row_start, column, x)
    check.check_dtype(STEM, "value", value, (x.dtype,))
    check.check_device(STEM, "value", value, x.device)
    check.check_shape(STEM, "value", value, [column.numel()], "[alive]")
    if order is not None:
        check.check_dtype(STEM, "order", order, (torch.int32,))
        check.check_device(STEM, "order", order, x.device)
        check.check_shape(STEM, "order", order, [column.numel()], "[alive]")
    if bias is not None:
        check.check_dtype(STEM, "bias", bias, (x.dtype,))
        check.check_device(STEM, "bias", bias, x.device)
        check.check_shape(STEM, "bias", bias, [row_start.numel() - 1], "[out]")


def _fake(
    row_start: Tensor, column: Tensor, value: Tensor, order: Tensor | None, x: Tensor, bias: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], row_start.shape[0] - 1))


def _weight_contract(row_start: Tensor, column: Tensor, grad: Tensor, x: Tensor) -> None:
    name = "sparse_linear_weight"
    _check_layout(name, row_start, column, x)
    check.check_dtype(name, "grad", grad, (x.dtype,))
    check.check_device(name, "grad", grad, x.device)
    check.check_shape(name, "grad", grad, [x.shape[0], row_start.numel() - 1], "[batch, out]")


def _weight_fake(row_start: Tensor, column: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((column.shape[0],))


# ------------------------------------------------------------------------------------------------------------ operators


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@op(
    "sparse_linear(Tensor row_start, Tensor column, Tensor value, Tensor? order, Tensor x, Tensor? bias) -> Tensor",
    contract=_contract,
    fake=_fake,
)
def sparse_linear(
    row_start: Tensor, column: Tensor, value: Tensor, order: Tensor | None, x: Tensor, bias: Tensor | None
) -> Tensor:
    r"""A linear layer by its alive weights only; with the transposed layout, the gradient by its input.

    .. math:: y_{bo} = bias_o + \sum_{i = row\_start_o}^{row\_start_{o+1} - 1} value_{order_i} \, x_{b, column_i}

    With W in this layout and (r, c, p) = ``transpose_layout`` of it, dL/dx is ``sparse_linear(r, c, value, p, dL/dy, None)``:
    no scatter, so no order of additions depends on threads.

    Args:
        row_start: int32 [out + 1], ascending from 0 to ``alive``.
        column: [alive], int16 (read as unsigned; at most 65536 input features) or int32.
        value: [alive], of the dtype of ``x``.
        order: int32 [alive], where each entry's value lies, or None: in its own place.
        x: [batch, in], float32, float64, float16 or bfloat16, any strides.
        bias: [out], of the dtype of ``x``, or None.

    Returns:
        [batch, out], contiguous, of the dtype of ``x``.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device; C++ also refuses indices that are out of range.

    Cost and determinism: alive · batch multiply-adds, in float32 (float64 for float64) with one rounding at the end; 6 bytes
    read per weight in float32.  The cut depends on shapes alone: equal on every run and thread count.  A NaN or an infinity
    of ``x`` reaches the outputs that have a weight for it (the torch reference: all of that sample).

    Example:
        >>> import torch
        >>> row_start, column = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, 2, 2], dtype=torch.int16)
        >>> sparse_linear(row_start, column, torch.tensor([2.0, 3.0, 6.0]), None, torch.tensor([[1.0, 10.0, 100.0]]), None)
        tensor([[320., 600.]])

    Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), §2: f(x; m ⊙ θ).
    """
    wide = _wide(x.dtype)
    weight = unpack_weight(row_start, column, (value if order is None else value[order.long()]).to(wide), x.shape[1])
    y = x.to(wide) @ weight.T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


@op(
    "sparse_linear_weight(Tensor row_start, Tensor column, Tensor grad, Tensor x) -> Tensor",
    contract=_weight_contract,
    fake=_weight_fake,
    stem=STEM,
)
def sparse_linear_weight(row_start: Tensor, column: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    r"""The gradient of a sparse linear layer by its alive weights, and by no others.

    .. math:: dvalue_i = \sum_b grad_{b, row_i} \, x_{b, column_i}

    Args:
        row_start: int32 [out + 1], ascending from 0 to ``alive``.
        column: [alive], int16 (read as unsigned; at most 65536 input features) or int32.
        grad: [batch, out], the gradient by the outputs, of the dtype of ``x``, any strides.
        x: [batch, in], float32, float64, float16 or bfloat16, any strides.

    Returns:
        [alive], of the dtype of ``x``.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device; C++ also refuses indices that are out of range.

    Cost and determinism: alive · batch multiply-adds, in float32 (float64 for float64) with one rounding at the end.  The cut
    depends on shapes alone: equal on every run and thread count.

    Example:
        >>> import torch
        >>> row_start, column = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, 2, 2], dtype=torch.int16)
        >>> sparse_linear_weight(row_start, column, torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 10.0, 100.0]]))
        tensor([ 10., 100., 200.])

    Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), §2: only m ⊙ θ is trained.
    """
    wide = _wide(x.dtype)
    dense = grad.to(wide).T @ x.to(wide)
    return dense[rows_of(row_start, column), columns_of(column)].to(x.dtype)
