# SPDX-License-Identifier: Apache-2.0
"""sparse_linear and its gradients: alive weights only, held against float64 products of the dense matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import zipfast
from zipfast.ops import sparse_linear, sparse_linear_input, sparse_linear_weight
from zipfast.ops._mask import unpack
from zipfast.ops.sparse_linear import bank_layout, columns_of, pack_weight, rows_of, transpose_layout, unpack_weight

F32, F64, F16, BF16 = DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ROUNDING = {F32: 0.0, F64: 0.0, F16: 2.0**-11, BF16: 2.0**-8}  # of the one rounding of the result
# C++ chunks are 8, 16, 32, 64 samples wide in float32, half of it in float64; CUDA gathers up to 16 and tiles by 32
BATCHES = (0, 1, 2, 5, 8, 9, 16, 17, 31, 32, 33, 65)
SHAPES = [(0, 4), (4, 0), (1, 1), (31, 33), (32, 32), (33, 31), (65, 130)]


def noise(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def packed(mask: Tensor) -> Tensor:
    bits = torch.zeros(-(-mask.numel() // 512) * 512, dtype=torch.uint8)
    bits[: mask.numel()] = mask.flatten()
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8)


class Case:
    """A layer with rows of many lengths, the first full and the last empty, and all that is fed to it."""

    def __init__(self, out: int, columns: int, batch: int, dtype: torch.dtype = F32, wide: bool = False) -> None:
        mask = (
            torch.rand(out, columns, generator=torch.Generator().manual_seed(out))
            < torch.linspace(0, 0.9, out)[:, None]
        )
        mask[-1:] = False
        mask[:1] = True
        self.mask, self.weight = mask, noise(out, columns, seed=1, dtype=dtype) * mask
        self.layout = pack_weight(self.weight, packed(mask))
        if wide:
            self.layout = (self.layout[0], columns_of(self.layout[1]).int(), self.layout[2])
        self.transposed = list(transpose_layout(*self.layout[:2], columns))
        self.x, self.grad = noise(batch, columns, seed=2, dtype=dtype), noise(batch, out, seed=3, dtype=dtype)
        self.bias, self.columns, self.dtype = noise(out, seed=4, dtype=dtype), columns, dtype

    def run(self, device: str) -> list[Tensor]:
        """Forward with and without bias, both gradients."""
        start, column, value = (t.to(device) for t in self.layout)
        x, grad, bias = (t.to(device) for t in (self.x, self.grad, self.bias))
        transposed = [t.to(device) for t in self.transposed]
        found = [
            sparse_linear(start, column, value, x, bias),
            sparse_linear(start, column, value, x, None),
            sparse_linear_input(start, column, value, transposed, grad, self.columns),
            sparse_linear_weight(start, column, grad, x),
        ]
        assert all(t.dtype == self.dtype and t.is_contiguous() and t.device.type == device for t in found)
        return [t.cpu() for t in found]

    def check(self, device: str, tolerance) -> list[Tensor]:
        weight, x, grad, bias = (t.double() for t in (self.weight, self.x, self.grad, self.bias))
        a, b, c = weight.abs(), x.abs(), grad.abs()
        want = [(x @ weight.T + bias, b @ a.T + bias.abs()), (x @ weight.T, b @ a.T), (grad @ weight, c @ a)]
        want.append(((grad.T @ x)[self.mask], (c.T @ b)[self.mask]))
        found = self.run(device)
        wide = F64 if self.dtype == F64 else F32
        for got, (value, scale) in zip(found, want, strict=True):
            assert got.shape == value.shape
            error = (got.double() - value).abs() - ROUNDING[self.dtype] * (value.abs() + 2.0**-13)
            share = error / scale.clamp(min=1e-30)
            zero = torch.zeros_like(share)
            torch.testing.assert_close(share.clamp(min=0), zero, **tolerance("sparse_linear", "sum", wide))
        return found


@pytest.mark.parametrize("batch", [1, 2, 17])
def test_table(backend: str, device: str, batch: int) -> None:
    start = torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=device)
    column = torch.tensor([0, 2, 1], dtype=torch.int16, device=device)
    value, bias = torch.tensor([2.0, 3.0, -1.0], device=device), torch.tensor([100.0, 200.0, 300.0], device=device)
    x = torch.tensor([[1.0, 10.0, 1000.0]], device=device).expand(batch, 3)
    grad = torch.tensor([[1.0, 5.0, 10.0]], device=device).expand(batch, 3)
    assert sparse_linear(start, column, value, x, None).tolist() == [[3002.0, 0.0, -10.0]] * batch
    assert sparse_linear(start, column, value, x, bias).tolist() == [[3102.0, 200.0, 290.0]] * batch
    transposed = list(transpose_layout(start, column, 3))
    assert sparse_linear_input(start, column, value, transposed, grad, 3).tolist() == [[2.0, -10.0, 3.0]] * batch
    assert sparse_linear_weight(start, column, grad, x).tolist() == [batch * v for v in (1.0, 1000.0, 100.0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_batches(backend: str, device: str, batch: int, dtype: torch.dtype, tolerance) -> None:
    if backend == "emu" and (dtype != F32 or batch == 65) and batch not in (1, 9, 33):
        pytest.skip("the emulator sees every kernel of this dtype in the other batches")
    Case(33, 40, batch, dtype).check(device, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_shapes(backend: str, device: str, shape: tuple, batch: int, tolerance) -> None:
    if backend == "emu" and (shape == (65, 130) or batch == 3):
        pytest.skip("too slow there, and no other kernel")
    Case(*shape, batch).check(device, tolerance)


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_wide_columns(backend: str, device: str, batch: int) -> None:
    narrow, wide = Case(20, 50, batch), Case(20, 50, batch, wide=True)
    assert narrow.layout[1].dtype == torch.int16 and wide.layout[1].dtype == torch.int32
    for got, want in zip(narrow.run(device), wide.run(device), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("columns", "dtype"), [(65536, torch.int16), (65537, torch.int32), (40000, torch.int16)])
@pytest.mark.parametrize("batch", [1, 2])
def test_unsigned_columns(fast_backend: str, device: str, columns: int, dtype: torch.dtype, batch: int) -> None:
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask[0, [0, 32767, 32768, columns - 1]] = mask[1, [39999]] = True
    weight = torch.arange(2 * columns).reshape(2, columns).float() * mask
    start, column, value = pack_weight(weight, packed(mask))
    assert column.dtype == dtype and columns_of(column).tolist() == [0, 32767, 32768, columns - 1, 39999]
    transposed = [t.to(device) for t in transpose_layout(start, column, columns)]
    start, column, value = (t.to(device) for t in (start, column, value))
    x = torch.ones(batch, columns, device=device)
    want = torch.stack([weight[0].double().sum(), weight[1].double().sum()]).float().expand(batch, 2)
    torch.testing.assert_close(sparse_linear(start, column, value, x, None).cpu(), want, rtol=1e-6, atol=0)
    found = sparse_linear_input(start, column, value, transposed, torch.ones(batch, 2, device=device), columns)
    assert torch.equal(found.cpu(), weight.sum(0).expand(batch, columns))
    found = sparse_linear_weight(start, column, torch.ones(batch, 2, device=device), x)
    assert found.tolist() == [float(batch)] * 5


def test_unsigned_columns_on_the_emulator(emu_backend: str) -> None:
    start, x = torch.tensor([0, 3], dtype=torch.int32), torch.arange(65536).float()[None]
    column = torch.tensor([0, 40000 - 65536, -1], dtype=torch.int16)
    assert sparse_linear(start, column, torch.ones(3), x, None).tolist() == [[40000.0 + 65535.0]]
    assert sparse_linear_weight(start, column, torch.ones(1, 1), x).tolist() == [0.0, 40000.0, 65535.0]


def test_layout() -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    weight = torch.tensor([[9.0, 0.0, 2.0], [9.0, 9.0, 9.0], [3.0, 9.0, -0.0]])
    start, column, value = pack_weight(weight, packed(mask))
    assert start.tolist() == [0, 2, 2, 4] and column.tolist() == [1, 2, 0, 2] and value.tolist() == [0.0, 2.0, 3.0, 0.0]
    assert rows_of(start, column).tolist() == [0, 0, 2, 2]
    assert torch.equal(unpack(packed(mask), (3, 3)), mask)
    dense = unpack_weight(start, column, value, 3)
    assert torch.equal(dense, weight.where(mask, torch.zeros(())))
    assert not dense[~mask].signbit().any()
    start, column, order = transpose_layout(start, column, 3)
    assert start.tolist() == [0, 1, 2, 4] and column.tolist() == [2, 0, 0, 2] and order.tolist() == [2, 0, 1, 3]
    assert torch.equal(unpack_weight(start, column, value[order.long()], 3), dense.T)


def test_strided(backend: str, device: str) -> None:
    case = Case(12, 10, 6)
    want = case.run(device)
    case.x, case.grad = (t.T.contiguous().T for t in (case.x, case.grad))
    case.bias = torch.stack([case.bias] * 2, 1)[:, 0]
    case.layout = tuple(torch.stack([t] * 2, 1)[:, 0] for t in case.layout)
    assert not any(t.is_contiguous() for t in (case.x, case.bias, *case.layout))
    for got, expected in zip(case.run(device), want, strict=True):
        if backend == "torch":  # whose products may depend on strides
            torch.testing.assert_close(got, expected)
        else:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_what_is_not_finite_stays_with_its_weights(backend: str, device: str, batch: int) -> None:
    if backend == "torch":
        pytest.skip("the reference multiplies dense: a NaN reaches all of its sample")
    case = Case(20, 30, batch)
    case.x[0, 7] = torch.nan
    y, _, _, by_weight = case.run(device)
    assert torch.equal(y[0].isnan(), case.mask[:, 7]) and y[1:].isfinite().all()
    assert torch.equal(by_weight.isnan(), (case.mask & (torch.arange(30) == 7))[case.mask])


def test_inputs_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    case = Case(20, 30, 18)
    before = [t.clone() for t in (*case.layout, *case.transposed, case.x, case.grad, case.bias)]
    first = case.run(device)
    assert all(map(torch.equal, case.run(device), first))
    after = (*case.layout, *case.transposed, case.x, case.grad, case.bias)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_equal_for_every_thread_count(cpu_backend: str, threads, batch: int, tolerance) -> None:
    case = Case(100, 2000, batch)  # the tile of a whole input gradient is cut where threads begin
    results = []
    for n in (1, 2, 3, 4):
        threads(n)
        results.append(case.run("cpu"))
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))
    case.check("cpu", tolerance)


def test_more_than_one_tile(cpu_backend: str, tolerance) -> None:
    Case(5, 40_000, 1).check("cpu", tolerance)
    Case(5, 3000, 70).check("cpu", tolerance)
    Case(5, 70_000, 1).check("cpu", tolerance)  # more columns than a tile, and than 16 bits tell apart


def test_cpu_needs_no_transposed_layout(cpu_backend: str) -> None:
    case = Case(20, 30, 5)
    assert torch.equal(sparse_linear_input(*case.layout, [], case.grad, 30), case.run("cpu")[2])


def test_emulator_needs_the_transposed_layout(emu_backend: str) -> None:
    case = Case(20, 30, 5)
    with pytest.raises(
        RuntimeError, match="'transposed' must be what transpose_layout returns on a GPU, got 0 tensors"
    ):
        sparse_linear_input(*case.layout, [], case.grad, 30)


def test_equal_for_every_emulator_schedule(emu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (Case(9, 10, 3), Case(9, 10, 18)):
        want = case.run("cpu")
        for seed in range(3):
            monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
            assert all(map(torch.equal, case.run("cpu"), want))


@pytest.mark.parametrize("batch", [1, 3])
def test_indices_out_of_range_are_refused(cpu_backend: str, batch: int) -> None:
    start, column = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 4, 1], dtype=torch.int16)
    value, x, grad = torch.ones(3), torch.ones(batch, 4), torch.ones(batch, 2)
    for c in (column, column.int(), torch.tensor([0, -1, 1], dtype=torch.int32), torch.tensor([0, -1, 1]).short()):
        with pytest.raises(RuntimeError, match=r"sparse_linear: 'column' must be in \[0, 4\)"):
            sparse_linear(start, c, value, x, None)
        with pytest.raises(RuntimeError, match=r"'column' must ascend in each row and be in \[0, 4\)"):
            sparse_linear_input(start, c, value, [], grad, 4)
        with pytest.raises(RuntimeError, match=r"sparse_linear_weight: 'column' must be in \[0, 4\)"):
            sparse_linear_weight(start, c, grad, x)
    with pytest.raises(RuntimeError, match="'row_start' must run from 0 to 3"):
        sparse_linear(start - 1, column, value, x, None)
    with pytest.raises(RuntimeError, match="'row_start' must ascend"):
        sparse_linear(torch.tensor([0, 4, 3], dtype=torch.int32), column, value, x, None)


# ------------------------------------------------------------------------------------------------------ the staged path

STAGED_BATCHES = (1, 2, 3, 4, 5, 8, 9, 16)
# entries of a row: around 8 (a load), 16 lanes' worth (128) and what is loaded at once (512), and where rows begin
LENGTHS = (0, 1, 7, 8, 9, 31, 33, 127, 128, 129, 255, 257, 0, 513, 3)


@pytest.fixture(params=["emu", "cuda"])
def gpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where arguments live for the CUDA kernels, emulated or not."""
    if not zipfast.available(request.param):
        pytest.skip(f"backend {request.param!r}: {zipfast.ops.why_not(request.param)}")
    with zipfast.backend(request.param):
        yield "cuda" if request.param == "cuda" else "cpu"


class Staged:
    """Rows of given lengths, a batch, and what `gather` and the float64 product make of it."""

    def __init__(self, lengths: tuple, columns: int, batch: int, dtype: torch.dtype = F32) -> None:
        generator = torch.Generator().manual_seed(len(lengths) + batch)
        mask = torch.zeros(len(lengths), columns, dtype=torch.bool)
        for row, n in zip(mask, lengths, strict=True):
            row[torch.randperm(columns, generator=generator)[:n]] = True
        self.mask, self.weight = mask, noise(len(lengths), columns, seed=1, dtype=dtype) * mask
        self.layout = pack_weight(self.weight, packed(mask))
        self.x, self.bias = noise(batch, columns, seed=2, dtype=dtype), noise(len(lengths), seed=4, dtype=dtype)

    def run(self, device: str, path: str = "staged", bias: bool = True) -> Tensor:
        args = [t.to(device) for t in (*self.layout, self.x, self.bias)]
        return sparse_linear(*args[:4], args[4] if bias else None, path).cpu()

    def check(self, device: str, tolerance, **how) -> Tensor:
        found, x, weight, bias = self.run(device, **how), *(t.double() for t in (self.x, self.weight, self.bias))
        bias = bias if how.get("bias", True) else torch.zeros_like(bias)
        want, scale = x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()
        assert found.shape == want.shape and found.dtype == self.x.dtype
        error = (found.double() - want).abs() - ROUNDING[self.x.dtype] * (want.abs() + 2.0**-13)
        share = (error / scale.clamp(min=1e-30)).clamp(min=0)
        torch.testing.assert_close(share, torch.zeros_like(share), **tolerance("sparse_linear", "sum", F32))
        return found


@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
@pytest.mark.parametrize("batch", STAGED_BATCHES)
def test_staged_batches(gpu: str, batch: int, dtype: torch.dtype, tolerance) -> None:
    Staged((33, 0, 40, 8, 1, 17, 30), 40, batch, dtype).check(gpu, tolerance)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("columns", [601, 770])  # more columns: fewer samples at a time on the emulator
def test_staged_rows_of_all_lengths(gpu: str, columns: int, dtype: torch.dtype, tolerance) -> None:
    Staged(LENGTHS, columns, 3, dtype).check(gpu, tolerance, bias=False)
    Staged((601, 590, 520, 600, 5), columns, 1, dtype).check(gpu, tolerance)  # long rows: all lanes of a warp


@pytest.mark.parametrize("columns", [1, 2, 7, 31, 32, 33, 127, 128, 129])
def test_staged_columns(gpu: str, columns: int, tolerance) -> None:
    for dtype, batch in ((BF16, 1), (BF16, 7), (F16, 2), (F32, 5)):
        Staged((columns, columns // 2, 1), columns, batch, dtype).check(gpu, tolerance)


@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
def test_staged_sums_do_not_depend_on_the_batch(gpu: str, dtype: torch.dtype) -> None:
    case = Staged((33, 40, 8, 300, 290), 300, 16, dtype)
    want, x = case.run(gpu), case.x
    for batch in (1, 2, 3, 8):
        case.x = x[:batch]
        assert torch.equal(case.run(gpu), want[:batch])


@pytest.mark.parametrize("batch", [1, 6])
def test_staged_is_exact_where_sums_are(gpu: str, batch: int) -> None:
    for dtype in (F32, F16, BF16):
        case = Staged((33, 0, 40, 129), 150, batch, dtype)
        start, column, value = case.layout
        case.layout = start, column, torch.arange(len(value)).remainder(3).to(dtype)
        case.x, case.bias = (noise(*t.shape, seed=7).sign().to(dtype) for t in (case.x, case.bias))
        dense = unpack_weight(start, column, case.layout[2], 150).double()
        assert torch.equal(case.run(gpu).double(), case.x.double() @ dense.T + case.bias.double())


@pytest.mark.parametrize("batch", [1, 3])
def test_staged_rows_keep_to_themselves(gpu: str, batch: int) -> None:
    """What is loaded with a row and belongs to another one, or to none, is not added: not even 0 times it."""
    for dtype in (F32, BF16, F16):
        case = Staged((3, 5, 0, 9, 2, 14), 20, batch, dtype)
        start, column, value = case.layout
        value[start[1] : start[2]] = torch.inf
        value[start[4] : start[5]] = torch.nan
        case.x[0, columns_of(column)[start[3]]] = torch.nan
        y = case.run(gpu)
        by_x = case.mask[:, columns_of(column)[start[3]]]
        by_value = torch.tensor([False, True, False, False, True, False])
        assert torch.equal(y[0].isfinite(), ~(by_x | by_value))
        assert torch.equal(y[1:].isfinite(), (~by_value).expand(batch - 1, 6))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_staged_input_on_odd_places(gpu: str, dtype: torch.dtype) -> None:
    case = Staged((9, 20, 31), 33, 4, dtype)
    want = case.run(gpu)
    case.x = torch.cat([torch.zeros(1, dtype=dtype), case.x.flatten()])[1:].view(4, 33)
    assert case.x.data_ptr() % 4 == dtype.itemsize % 4
    assert torch.equal(case.run(gpu), want)
    case.x = case.x.T.contiguous().T
    assert torch.equal(case.run(gpu), want)


def test_staged_equal_for_every_emulator_schedule(emu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in (Staged(LENGTHS, 601, 1), Staged((40, 33, 9) * 5, 50, 16, BF16)):
        want = case.run("cpu")
        for seed in range(4):
            monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
            assert torch.equal(case.run("cpu"), want)


def test_staged_and_gather_are_near(gpu: str) -> None:
    case = Staged(LENGTHS, 601, 4)
    torch.testing.assert_close(case.run(gpu), case.run(gpu, "gather"), rtol=1e-5, atol=1e-5)
    assert not torch.equal(case.run(gpu), case.run(gpu, "gather"))  # else one of them did not run


@pytest.mark.parametrize("batch", [0, 17])
def test_staged_is_refused(gpu: str, batch: int) -> None:
    case = Staged((3, 2), 9, 4)
    start, column, value = (t.to(gpu) for t in case.layout)
    x, refused = case.x.to(gpu), r"sparse_linear: path 'staged' must have "

    def run(column: Tensor, value: Tensor, x: Tensor) -> Tensor:
        return sparse_linear(start, column, value, x, None, "staged")

    with pytest.raises(RuntimeError, match=refused + "float32, float16 or bfloat16"):
        run(column, value.double(), x.double())
    with pytest.raises(RuntimeError, match=refused + "int16 columns"):
        run(column.int(), value, x)
    with pytest.raises(RuntimeError, match=refused + "1 to 16 samples"):
        run(column, value, x[:1].expand(batch, 9))
    with pytest.raises(RuntimeError, match=refused + "'column' and 'value' that begin on 16 bytes"):
        run(column, torch.cat([value[:1], value])[1:], x)
    with pytest.raises(RuntimeError, match=refused + "samples that fit in shared memory"):
        sparse_linear(start, column, value, x.new_zeros(1, 65536), None, "staged")


# ---------------------------------------------------------------------------------------------------------- bank_layout


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("columns", [1, 16, 40, 300])
def test_bank_layout_is_the_same_matrix(columns: int, wide: bool) -> None:
    mask = torch.rand(20, columns, generator=torch.Generator().manual_seed(columns)) < torch.linspace(0, 1, 20)[:, None]
    start, column, value = pack_weight(noise(20, columns, seed=1), packed(mask))
    column = columns_of(column).int() if wide else column
    found, order = bank_layout(start, column, columns)
    assert found.dtype == column.dtype and order.dtype == torch.int32 and torch.equal(found, column[order.long()])
    assert torch.equal(order.sort().values.long(), torch.arange(len(value)))
    assert torch.equal(rows_of(start, column)[order.long()], rows_of(start, column))
    dense = unpack_weight(start, found, value[order.long()], columns)
    assert torch.equal(dense, unpack_weight(start, column, value, columns))


def test_bank_layout_keeps_lanes_apart() -> None:
    """Rows with the same number of columns of each residue: no two of 16 lanes that meet share one."""
    rows, columns = 6, 256
    rank = torch.rand(rows, 16, 16, generator=torch.Generator().manual_seed(0)).argsort(1).argsort(1)
    mask = (rank < torch.arange(2, 14, 2)[:, None, None]).view(rows, columns)  # [row, column / 16, residue]
    start, column, _ = pack_weight(torch.zeros(rows, columns), packed(mask))
    found, place = columns_of(bank_layout(start, column, columns)[0]), torch.arange(len(column))
    row = rows_of(start, column)
    place = place - start.long()[row] // 8 * 8
    meeting = ((row * 10 + place // 128) * 8 + place % 8) * 16 + found % 16  # row, round, entry of a lane, residue
    assert len(meeting.unique()) == len(meeting)
    ascending = ((row * 10 + place // 128) * 8 + place % 8) * 16 + columns_of(column) % 16
    assert len(ascending.unique()) < 0.8 * len(ascending)


@pytest.mark.parametrize("batch", [1, 5, 20])
def test_any_order_within_a_row(backend: str, device: str, batch: int) -> None:
    case = Staged((33, 0, 40, 129, 8), 150, batch)
    want = case.run(device, "auto")
    column, order = bank_layout(*case.layout[:2], 150)
    case.layout = case.layout[0], column, case.layout[2][order.long()]
    torch.testing.assert_close(case.run(device, "auto"), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [bank_layout, transpose_layout])
def test_layouts_of_wrong_indices_are_refused(make) -> None:
    start, column = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 4, 1], dtype=torch.int16)
    with pytest.raises(ValueError, match=rf"^{make.__name__}: 'column' must be in \[0, 4\), got 4$"):
        make(start, column, 4)
    with pytest.raises(ValueError, match=r"'column' must be in \[0, 4\), got -1$"):
        make(start, torch.tensor([0, -1, 1], dtype=torch.int32), 4)
    for wrong in ([0, 4, 3], [1, 2, 3], [0, 2, 4]):
        with pytest.raises(ValueError, match=rf"^{make.__name__}: 'row_start' must ascend from 0 to 3$"):
            make(torch.tensor(wrong, dtype=torch.int32), column, 5)


S, C = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 3, 1], dtype=torch.int16)
V, X, G, B = torch.ones(3), torch.ones(5, 4), torch.ones(5, 2), torch.ones(2)
T = list(transpose_layout(S, C, 4))
META = X.to("meta")


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "sparse_linear: 'x' must be float32, .* or bfloat16, got int64", (S, C, V, X.long(), B)),
        (ValueError, r"'x' must be \[batch, in\], got \[4\]", (S, C, V, X[0], B)),
        (TypeError, "'row_start' must be int32, got int64", (S.long(), C, V, X, B)),
        (RuntimeError, "'row_start' must be on meta as the other arguments, got cpu", (S, C, V, META, B)),
        (ValueError, r"'row_start' must be \[out \+ 1\], got \[0\]", (S[:0], C, V, X, B)),
        (TypeError, "'column' must be int16 or int32, got int64", (S, C.long(), V, X, B)),
        (RuntimeError, "'column' must be on cpu as the other arguments, got meta", (S, C.to("meta"), V, X, B)),
        (ValueError, r"'column' must be \[alive\], got \[1, 3\]", (S, C[None], V, X, B)),
        (TypeError, "'column' must be int32 for 65537 input features, got int16", (S, C, V, torch.ones(1, 65537), B)),
        (TypeError, "'value' must be float32, got float64", (S, C, V.double(), X, B)),
        (RuntimeError, "'value' must be on cpu as the other arguments, got meta", (S, C, V.to("meta"), X, B)),
        (ValueError, r"'value' must be \[alive\] = \[3\], got \[2\]", (S, C, V[:2], X, B)),
        (TypeError, "'bias' must be float32, got float16", (S, C, V, X, B.half())),
        (RuntimeError, "'bias' must be on cpu as the other arguments, got meta", (S, C, V, X, B.to("meta"))),
        (ValueError, r"'bias' must be \[out\] = \[2\], got \[3\]", (S, C, V, X, V)),
    ],
)
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        sparse_linear(*args)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "sparse_linear_input: 'grad' must be float32, .* got bool", (S, C, V, T, G.bool(), 4)),
        (ValueError, "'in_features' must be at least 0, got -1", (S, C, V, [], G, -1)),
        (TypeError, "'row_start' must be int32, got float32", (V, C, V, T, G, 4)),
        (TypeError, "'value' must be float32, got float64", (S, C, V.double(), T, G, 4)),
        (ValueError, r"'grad' must be \[batch, out\] = \[batch, 2\], got \[5, 4\]", (S, C, V, T, X, 4)),
        (ValueError, "'transposed' must be empty or what transpose_layout returns, got 2", (S, C, V, T[:2], G, 4)),
        (ValueError, "'transposed' must be empty or what transpose_layout returns, got Tensor", (S, C, V, S, G, 4)),
        (TypeError, r"'transposed\[1\]' must be int16, got int32", (S, C, V, [T[0], T[2], T[2]], G, 4)),
        (ValueError, r"'transposed\[0\]' must be \[in \+ 1\] = \[4\], got \[5\]", (S, C, V, T, G, 3)),
        (ValueError, r"'transposed\[2\]' must be \[alive\] = \[3\], got \[2\]", (S, C, V, [*T[:2], T[2][:2]], G, 4)),
        (RuntimeError, r"'transposed\[2\]' must be on cpu .* got meta", (S, C, V, [*T[:2], T[2].to("meta")], G, 4)),
    ],
)
def test_errors_of_the_input_gradient(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        sparse_linear_input(*args)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "sparse_linear_weight: 'x' must be float32, .* got int32", (S, C, G, X.int())),
        (ValueError, r"'x' must be \[batch, in\], got \[3\]", (S, C, G, V)),
        (TypeError, "'column' must be int16 or int32, got uint8", (S, C.byte(), G, X)),
        (TypeError, "'grad' must be float32, got float64", (S, C, G.double(), X)),
        (RuntimeError, "'grad' must be on cpu as the other arguments, got meta", (S, C, G.to("meta"), X)),
        (ValueError, r"'grad' must be \[batch, out\] = \[5, 2\], got \[5, 4\]", (S, C, X, X)),
    ],
)
def test_errors_of_the_weight_gradient(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        sparse_linear_weight(*args)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "pack_weight: 'weight' must be float32, .* got int64", (X.long(), packed(X))),
        (ValueError, r"'weight' must be \[out, in\], got \[3\]", (V, packed(V))),
        (TypeError, "'packed_mask' must be uint8, got bool", (X, X.bool())),
        (RuntimeError, "'packed_mask' must be on cpu as the other arguments, got meta", (X, packed(X).to("meta"))),
        (ValueError, r"'packed_mask' must be \[64·ceil.*\] = \[64\], got \[3\]", (X, packed(X)[:3])),
    ],
)
def test_errors_of_packing(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        pack_weight(*args)


def test_automatic_choice_serves_the_cpu() -> None:
    with zipfast.backend(None):
        assert sparse_linear(S, C, V, X, None).tolist() == [[2.0, 1.0]] * 5
