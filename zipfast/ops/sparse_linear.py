# SPDX-License-Identifier: Apache-2.0
"""``sparse_linear`` and its gradients: a linear layer whose dead weights are neither stored nor multiplied.

The layout is compressed rows: ``row_start`` [out + 1], ``column`` [alive], ``value`` [alive], where a column is the bit
pattern of a uint16 held as int16 if there are at most 65536 of them, else int32.  ``pack_weight`` makes it from a weight
and a packed mask, ``transpose_layout`` that of the transposed weight, over the same values, and ``bank_layout`` puts the
entries of each row in the order in which a GPU reads its input best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._mask import unpack
from ._paths import Paths
from ._registry import op

STEM = "sparse_linear"
NARROW = 1 << 16  # columns that 16 bits tell apart
MAX_ALIVE = (1 << 31) - 1
BANKS, LANES, EACH = 16, 16, 8  # of bank_layout: residues kept apart, lanes that load together, entries that each loads


# -------------------------------------------------------------------------------------------------------------- layout


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
    mask = unpack(packed_mask, weight.shape)
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
    """(row_start, column, order) of the transposed matrix: its entry i is ``value[order[i]]`` of the matrix itself.

    Raises:
        ValueError: ``row_start`` or ``column`` is out of range, which GPUs do not see.
    """
    _check_indices("transpose_layout", row_start, column, in_features)
    old = columns_of(column)
    order = old.argsort(stable=True)  # entries lie row by row: a stable sort keeps rows ascending in a column
    row = rows_of(row_start, column)[order]
    return _row_start(old[order], in_features), _narrow(row, len(row_start) - 1), order.int()


def bank_layout(row_start: Tensor, column: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """(column, order) of the same matrix with the entries of each row in another order: entry i is ``value[order[i]]``.

    On a GPU the lanes of a warp look up, at the same time, one entry each of 8 that they have loaded.  Lanes whose columns
    leave the same remainder by 16 would wait for each other; in this order 16 of them, as far as a row has them, are
    different.  Any order gives the same sums up to rounding; ``sparse_linear_input`` in C++ needs the ascending one.

    Raises:
        ValueError: ``row_start`` or ``column`` is out of range, which GPUs do not see.

    Example:
        >>> import torch
        >>> row_start, column = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 1, 16, 17], dtype=torch.int16)
        >>> bank_layout(row_start, column, 32)
        (tensor([ 0,  1, 16, 17], dtype=torch.int16), tensor([0, 1, 2, 3], dtype=torch.int32))
    """
    _check_indices("bank_layout", row_start, column, in_features)
    row, columns = rows_of(row_start, column), columns_of(column)
    # one column of each residue, then the next of each
    kind = row * BANKS + columns % BANKS
    by_kind = kind.argsort(stable=True)
    count = torch.bincount(kind, minlength=(len(row_start) - 1) * BANKS)
    rank = torch.empty_like(row)
    rank[by_kind] = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[kind[by_kind]]
    wanted = ((row * (in_features + 1) + rank) * BANKS + columns % BANKS).argsort()
    # places in the order in which they are multiplied: rounds of LANES loads, in each the first entry of every lane, ...
    start = row_start[:-1].long()[row]
    place = torch.arange(len(row), device=row.device) - start // EACH * EACH
    lane, entry, turn = place // EACH % LANES, place % EACH, place // (LANES * EACH)
    met = (((row * (in_features + LANES * EACH) + turn) * EACH + entry) * LANES + lane).argsort()
    order = torch.empty_like(row)
    order[met] = wanted
    return column[order], order.int()


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


def _check_indices(name: str, row_start: Tensor, column: Tensor, in_features: int) -> None:
    alive = column.numel()
    step = row_start.diff()
    if bool((row_start[:1] != 0).any() | (row_start[-1:] != alive).any() | (step < 0).any()):
        raise ValueError(f"{name}: 'row_start' must ascend from 0 to {alive}")
    columns = columns_of(column)
    if bool(((columns < 0) | (columns >= in_features)).any()):
        worst = int(columns.max()) if int(columns.max()) >= in_features else int(columns.min())
        raise ValueError(f"{name}: 'column' must be in [0, {in_features}), got {worst}")


# ----------------------------------------------------------------------------------------------------------- contracts


def _check_layout(name: str, row_start: Tensor, column: Tensor, other: Tensor, in_features: int) -> None:
    check.check_dtype(name, "row_start", row_start, (torch.int32,))
    check.check_device(name, "row_start", row_start, other.device)
    if row_start.dim() != 1 or row_start.shape[0] < 1:
        raise ValueError(f"{name}: 'row_start' must be [out + 1], got {list(row_start.shape)}")
    check.check_dtype(name, "column", column, (torch.int16, torch.int32))
    check.check_device(name, "column", column, other.device)
    if column.dim() != 1:
        raise ValueError(f"{name}: 'column' must be [alive], got {list(column.shape)}")
    if column.dtype == torch.int16 and in_features > NARROW:
        raise TypeError(f"{name}: 'column' must be int32 for {in_features} input features, got int16")


def _check_value(name: str, value: Tensor, column: Tensor, other: Tensor) -> None:
    check.check_dtype(name, "value", value, (other.dtype,))
    check.check_device(name, "value", value, other.device)
    check.check_shape(name, "value", value, [column.numel()], "[alive]")


def _contract(row_start: Tensor, column: Tensor, value: Tensor, x: Tensor, bias: Tensor | None) -> None:
    check.check_dtype(STEM, "x", x, check.FLOATING)
    if x.dim() != 2:
        raise ValueError(f"{STEM}: 'x' must be [batch, in], got {list(x.shape)}")
    _check_layout(STEM, row_start, column, x, x.shape[1])
    _check_value(STEM, value, column, x)
    if bias is not None:
        check.check_dtype(STEM, "bias", bias, (x.dtype,))
        check.check_device(STEM, "bias", bias, x.device)
        check.check_shape(STEM, "bias", bias, [row_start.shape[0] - 1], "[out]")


def _fake(
    row_start: Tensor, column: Tensor, value: Tensor, x: Tensor, bias: Tensor | None, path: str = "auto"
) -> Tensor:
    return x.new_empty((x.shape[0], row_start.shape[0] - 1))


def _input_contract(
    row_start: Tensor, column: Tensor, value: Tensor, transposed: list[Tensor], grad: Tensor, in_features: int
) -> None:
    name = "sparse_linear_input"
    check.check_dtype(name, "grad", grad, check.FLOATING)
    if in_features < 0:
        raise ValueError(f"{name}: 'in_features' must be at least 0, got {in_features}")
    _check_layout(name, row_start, column, grad, in_features)
    _check_value(name, value, column, grad)
    rows = row_start.shape[0] - 1
    if grad.dim() != 2 or grad.shape[1] != rows:
        raise ValueError(f"{name}: 'grad' must be [batch, out] = [batch, {rows}], got {list(grad.shape)}")
    if not isinstance(transposed, (list, tuple)) or len(transposed) not in (0, 3):
        seen = len(transposed) if isinstance(transposed, (list, tuple)) else type(transposed).__name__
        raise ValueError(f"{name}: 'transposed' must be empty or what transpose_layout returns, got {seen}")
    if not transposed:
        if grad.is_cuda:
            raise ValueError(f"{name}: 'transposed' must be what transpose_layout returns on a GPU, got an empty list")
        return
    shapes = [in_features + 1], [column.shape[0]], [column.shape[0]]
    narrow = torch.int16 if rows <= NARROW else torch.int32
    for i, (t, dtype, shape) in enumerate(zip(transposed, (torch.int32, narrow, torch.int32), shapes, strict=True)):
        check.check_dtype(name, f"transposed[{i}]", t, (dtype,))
        check.check_device(name, f"transposed[{i}]", t, grad.device)
        check.check_shape(name, f"transposed[{i}]", t, shape, ("[in + 1]", "[alive]", "[alive]")[i])


def _input_fake(
    row_start: Tensor, column: Tensor, value: Tensor, transposed: list[Tensor], grad: Tensor, in_features: int
) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


def _weight_contract(row_start: Tensor, column: Tensor, grad: Tensor, x: Tensor) -> None:
    name = "sparse_linear_weight"
    check.check_dtype(name, "x", x, check.FLOATING)
    if x.dim() != 2:
        raise ValueError(f"{name}: 'x' must be [batch, in], got {list(x.shape)}")
    _check_layout(name, row_start, column, x, x.shape[1])
    check.check_dtype(name, "grad", grad, (x.dtype,))
    check.check_device(name, "grad", grad, x.device)
    check.check_shape(name, "grad", grad, [x.shape[0], row_start.shape[0] - 1], "[batch, out]")


def _weight_fake(row_start: Tensor, column: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((column.shape[0],))


# ------------------------------------------------------------------------------------------------------------ operators


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@op(
    'sparse_linear(Tensor row_start, Tensor column, Tensor value, Tensor x, Tensor? bias, str path="auto") -> Tensor',
    contract=_contract,
    fake=_fake,
    paths=Paths(("gather", "staged")),
)
def sparse_linear(
    row_start: Tensor, column: Tensor, value: Tensor, x: Tensor, bias: Tensor | None, path: str = "auto"
) -> Tensor:
    r"""A linear layer by its alive weights only.

    .. math:: y_{bo} = bias_o + \sum_{i = row\_start_o}^{row\_start_{o+1} - 1} value_i \, x_{b, column_i}

    Args:
        row_start: int32 [out + 1], ascending from 0 to ``alive``.
        column: [alive], int16 (read as unsigned; at most 65536 input features) or int32, in any order within a row.
        value: [alive], of the dtype of ``x``.
        x: [batch, in], float32, float64, float16 or bfloat16, any strides.
        bias: [out], of the dtype of ``x``, or None.
        path: which CUDA kernel (see ``docs/kernels.md``): ``"gather"``, for everything; ``"staged"``, the input in shared
            memory: 1 to 16 samples, int16 columns, not float64.

    Returns:
        [batch, out], contiguous, of the dtype of ``x``.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device; C++ also refuses columns that are out of range.

    Cost and determinism: alive · batch multiply-adds, in float32 (float64 for float64) with one rounding at the end; 6 bytes
    read per weight in float32.  Each sum has one owner and one order: equal on every run and thread count.  A NaN or an
    infinity of ``x`` reaches the outputs that have a weight for it (the torch reference: all of that sample).

    Example:
        >>> import torch
        >>> row_start, column = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, 2, 2], dtype=torch.int16)
        >>> sparse_linear(row_start, column, torch.tensor([2.0, 3.0, 6.0]), torch.tensor([[1.0, 10.0, 100.0]]), None)
        tensor([[320., 600.]])

    Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), §2: f(x; m ⊙ θ).
    """
    wide = _wide(x.dtype)
    y = x.to(wide) @ unpack_weight(row_start, column, value.to(wide), x.shape[1]).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


@op(
    "sparse_linear_input(Tensor row_start, Tensor column, Tensor value, Tensor[] transposed, Tensor grad, int in_features)"
    " -> Tensor",
    contract=_input_contract,
    fake=_input_fake,
    stem=STEM,
)
def sparse_linear_input(
    row_start: Tensor, column: Tensor, value: Tensor, transposed: list[Tensor], grad: Tensor, in_features: int
) -> Tensor:
    r"""The gradient of a sparse linear layer by its input.

    .. math:: dx_{bj} = \sum_{i : column_i = j} value_i \, grad_{b, row_i}

    Args:
        row_start: int32 [out + 1], ascending from 0 to ``alive``.
        column: [alive], int16 (read as unsigned; at most 65536 input features) or int32, ascending in each row.
        value: [alive], of the dtype of ``grad``.
        transposed: what ``transpose_layout`` returns; only CUDA, which gathers, needs it: C++ scatters and takes [] too.
        grad: [batch, out], the gradient by the outputs, float32, float64, float16 or bfloat16, any strides.
        in_features: columns of the result.

    Returns:
        [batch, in_features], contiguous, of the dtype of ``grad``.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device; C++ also refuses columns that are out of range.

    Cost and determinism: alive · batch multiply-adds, in float32 (float64 for float64) with one rounding at the end.  Each
    sum has one owner, which adds row after row, without atomics: equal on every run and thread count.

    Example:
        >>> import torch
        >>> row_start, column = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, 2, 2], dtype=torch.int16)
        >>> sparse_linear_input(row_start, column, torch.tensor([2.0, 3.0, 6.0]), [], torch.tensor([[1.0, 10.0]]), 3)
        tensor([[ 0.,  2., 63.]])

    Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), §2: f(x; m ⊙ θ).
    """
    wide = _wide(grad.dtype)
    return (grad.to(wide) @ unpack_weight(row_start, column, value.to(wide), in_features)).to(grad.dtype)


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
        TypeError, ValueError, RuntimeError: dtype, shape, device; C++ also refuses columns that are out of range.

    Cost and determinism: alive · batch multiply-adds, in float32 (float64 for float64) with one rounding at the end.  Each
    sum has one owner and one order: equal on every run and thread count.

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
