# SPDX-License-Identifier: Apache-2.0
"""Sparse linear layers: only weights that are alive are stored, multiplied and trained.

``SparseLinear.from_linear(linear, packed_mask)`` takes the place of an ``nn.Linear``; its parameter ``value`` holds the
alive weights, so that gradients and optimizer state have that size too.  ``prefer_sparse`` says whether it pays: from a
crossover that is measured once for each kind of shape, then remembered.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .._version import __version__
from ..checkpoint import atomic_write
from ..ops._check import FLOATING, words
from ..ops.sparse_linear import NARROW, pack_weight, transpose_layout, unpack_weight

__all__ = ["Crossover", "SparseLinear", "SparseWeight", "linear", "measure_crossover", "prefer_sparse"]


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
        return ops.sparse_linear(row_start, column, value, x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
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
        return ops.sparse_linear_input(row_start, column, value, list(transposed), grad, in_features)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple:  # type: ignore[override]
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
        return ops.sparse_linear_weight(row_start, column, grad, x)

    @staticmethod
    def backward(ctx: Any, value: Tensor) -> tuple:  # type: ignore[override]
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
        transposed: what ``zipfast.ops.sparse_linear.transpose_layout`` returns; gradients by ``x`` on a GPU need it.

    Raises:
        TypeError, ValueError, RuntimeError: as the operator ``sparse_linear``.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = _Forward.apply(weight.row_start, weight.column, weight.value, flat, bias, *transposed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# ---------------------------------------------------------------------------------------------------------------- layer


class SparseLinear(nn.Module):
    """A linear layer that holds its alive weights only; made by ``from_linear``.

    ``value`` [alive] and ``bias`` are parameters, ``row_start`` and ``column`` buffers; all four make the state dict, and
    one with another mask of the same layer may be loaded (``value`` is then a new parameter: make optimizers after it).

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
        """The same layer without its dead weights; parameters are copies."""
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(SparseWeight.from_dense(linear.weight, packed_mask), bias).train(linear.training)

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
        y = _Forward.apply(self.row_start, self.column, self.value, flat, self.bias, *self._transposed())
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, alive={self.value.numel()}, "
            f"bias={self.bias is not None}"
        )

    # Only GPUs gather the gradient by the input from a transposed layout: there it is kept beside, out of the state dict.

    def _transpose(self) -> None:
        parts: Sequence[Tensor | None] = (None, None, None)
        if self.row_start.is_cuda:
            parts = transpose_layout(self.row_start, self.column, self.in_features)
        for name, t in zip(("t_row_start", "t_column", "t_order"), parts, strict=True):
            self.register_buffer(name, t, persistent=False)

    def _transposed(self) -> tuple[Tensor, ...]:
        if self.t_row_start is None or self.t_column is None or self.t_order is None:
            return ()
        return self.t_row_start, self.t_column, self.t_order

    def _apply(self, fn: Callable, recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        if self.row_start.is_cuda != (self.t_row_start is not None):
            self._transpose()
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        value, column = state_dict.get(prefix + "value"), state_dict.get(prefix + "column")
        if value is not None and column is not None and value.shape == column.shape != self.column.shape:
            self.value = nn.Parameter(self.value.new_empty(value.shape), self.value.requires_grad)
            self.column = self.column.new_empty(column.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._transpose()


# ------------------------------------------------------------------------------------------------------------- crossover

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
PROBE_ELEMENTS = 1 << 24  # of the dense weight that is timed: larger layers are timed by some of their rows
_known: dict[str, Crossover] = {}


@dataclass(frozen=True)
class Crossover:
    """What was measured: below ``density`` the sparse forward pass was faster than the dense one."""

    density: float
    dense_ms: float
    sparse_ms: dict[str, float]  # density -> time


def measure_crossover(
    out_features: int,
    in_features: int,
    batch: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    densities: Sequence[float] = DENSITIES,
    budget_s: float = 0.05,
) -> Crossover:
    """Time the dense forward pass against the sparse one at a few densities; nothing is remembered.

    Args:
        out_features, in_features, batch, dtype, device: the layer and how it is called.
        densities: ascending, in (0, 1].
        budget_s: seconds of timed calls, about; every call runs at least twice.

    Returns:
        the density at which the times, joined by straight lines, meet: 0 if dense always wins, 1 if sparse does.

    Raises:
        ValueError: shapes or densities out of range.
    """
    if min(out_features, in_features, batch) < 1:
        shape = [out_features, in_features, batch]
        raise ValueError(f"measure_crossover: 'out_features', 'in_features', 'batch' must be at least 1, got {shape}")
    if not densities or list(densities) != sorted(densities) or not 0 < densities[0] <= densities[-1] <= 1:
        raise ValueError(f"measure_crossover: 'densities' must ascend in (0, 1], got {list(densities)}")
    rows = max(1, min(out_features, PROBE_ELEMENTS // in_features))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, in_features, generator=generator).to(device, dtype)
    share = budget_s / (len(densities) + 1)
    with torch.no_grad():
        weight = torch.zeros(rows, in_features, dtype=dtype, device=device)
        dense = _time(lambda: F.linear(x, weight), share, x.device)
        times = {}
        for density in densities:
            layout = _regular(rows, in_features, density, generator, dtype, device)
            times[density] = _time(functools.partial(ops.sparse_linear, *layout, x, None), share, x.device)
    before, at = 0.0, 0.0  # density and time of the sparse pass: nothing takes no time
    found = 1.0
    for density, t in times.items():
        if t >= dense:
            found = 0.0 if before == 0.0 else before + (density - before) * (dense - at) / max(t - at, 1e-12)
            break
        before, at = density, t
    return Crossover(found, dense * 1e3, {str(d): t * 1e3 for d, t in times.items()})


def prefer_sparse(
    out_features: int,
    in_features: int,
    density: float,
    batch: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
) -> tuple[bool, str]:
    """Whether ``SparseLinear`` is faster than ``nn.Linear`` here, and why.

    Answers from a crossover measured once (``measure_crossover``) for each bucket of shapes (powers of 2), batch, dtype,
    number of threads and machine, kept in ``$XDG_CACHE_HOME/zipfast/crossover.json``.

    Returns:
        (decision, one sentence).

    Raises:
        ValueError: a shape below 1, a density outside [0, 1].
    """
    if min(out_features, in_features, batch) < 1:
        shape = [out_features, in_features, batch]
        raise ValueError(f"prefer_sparse: 'out_features', 'in_features', 'batch' must be at least 1, got {shape}")
    if not 0 <= density <= 1:
        raise ValueError(f"prefer_sparse: 'density' must be in [0, 1], got {density}")
    place = torch.device(device)
    if dtype not in FLOATING:
        return False, f"dense: sparse layers are {words(FLOATING)}, not {words([dtype])}"
    if place.type not in ("cpu", "cuda") or not ops.available(place.type):
        reason = ops.why_not(place.type) if place.type in ("cpu", "cuda") else "no kernels for it"
        return False, f"dense: sparse layers need compiled kernels, and there are none for {place.type}: {reason}"
    rows, columns, samples = _bucket(out_features), _bucket(in_features), min(_bucket(batch), 256)
    threads = torch.get_num_threads() if place.type == "cpu" else 0
    where = platform.processor() or platform.machine() if place.type == "cpu" else torch.cuda.get_device_name(place)
    key = f"{rows}x{columns} b{samples} {words([dtype])} t{threads} {where} {torch.__version__} {__version__}"
    if key not in _known:
        _known.update(_read())
    if key not in _known:
        _known[key] = measure_crossover(rows, columns, samples, dtype, device=device)
        _write(key, _known[key])
    limit = _known[key].density
    sparse = density < limit
    said = "below" if sparse else "not below"
    name = f"{rows}x{columns}, batch {samples}, {words([dtype])}" + (f", {threads} threads" if threads else "")
    return (
        sparse,
        f"{'sparse' if sparse else 'dense'}: density {density:.3g} is {said} {limit:.3g}, measured for {name}",
    )


def _bucket(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _regular(
    rows: int,
    columns: int,
    density: float,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: str | torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layout whose rows have the same length: cheap to make, as fast as a random mask."""
    each = max(1, round(columns * density))
    place = (torch.arange(each) + torch.rand(rows, each, generator=generator)) * (columns / each)
    column = place.long().clamp(max=columns - 1).flatten()
    narrow = (column - (column >> 15 << 16)).short() if columns <= NARROW else column.int()
    row_start = torch.arange(rows + 1, dtype=torch.int32) * each
    return row_start.to(device), narrow.to(device), torch.ones(len(column), dtype=dtype, device=device)


def _time(call: Callable[[], Any], share_s: float, device: torch.device) -> float:
    """The least of a few runs: neighbours only ever add time."""
    call()
    best, begin = float("inf"), time.perf_counter()
    for _ in range(50):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.perf_counter()
        best = min(best, end - start)
        if end - begin > share_s:
            break
    return best


def _path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zipfast" / "crossover.json"


def _read() -> dict[str, Crossover]:
    """What is remembered; a file that cannot be read is one that remembers nothing, as all of it can be measured again."""
    try:
        entries = json.loads(_path().read_text(encoding="utf-8"))
        return {
            str(key): Crossover(float(e["density"]), float(e["dense_ms"]), dict(e["sparse_ms"]))
            for key, e in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(key: str, found: Crossover) -> None:
    entries = {k: vars(c) for k, c in (_read() | {key: found}).items()}
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as f:
            json.dump(entries, f, indent=1)
    except OSError:  # a folder that cannot be written: it is measured again next time
        pass
