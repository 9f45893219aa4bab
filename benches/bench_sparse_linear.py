# SPDX-License-Identifier: Apache-2.0
"""``sparse_linear`` and its gradients against the dense layer, in float32 and in bfloat16, and against torch's CSR product.

Forward: a layer of 4096 x 4096 and one of 300 x 784 at 80, 90 and 95 % sparsity; training: forward and both gradients at
a batch of 64.  The dense peers multiply the masked matrix, mask already applied; CSR is MKL's where torch has it.  The
floor is reading values and columns once, or two operations for each weight and sample.

On a GPU also what decoding needs: few samples in bfloat16, beside cuBLAS and CSR, and beside our own kernel on columns
that ascend (not in the order of ``bank_layout``) and on the path that gathers from device memory.  Such a matrix would
stay in the second cache, where no layer of a model finds it: all take turns with copies of it, 128 MB in total.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from harness import Job, Peer, Row, Run, main, parametrize, skip
from torch import Tensor
from torch.nn import functional as F

from zipfast import ops
from zipfast.ops.sparse_linear import bank_layout, columns_of, rows_of, transpose_layout, unpack_weight

OP = "sparse_linear"
ROTATED = 128 << 20  # bytes


@dataclass(frozen=True)
class Case:
    out: int
    columns: int
    sparsity: int  # percent
    batch: int
    training: bool = False

    @property
    def name(self) -> str:
        kind = "forward and gradients" if self.training else "forward"
        return f"{self.out} x {self.columns}, {self.sparsity} % sparse, batch {self.batch}, {kind}"


CASES = [Case(4096, 4096, s, b) for s in (80, 90, 95) for b in (1, 8, 64)]
CASES += [Case(300, 784, 90, b) for b in (1, 8, 64)]
CASES += [Case(n, n, s, 64, True) for n in (1024, 4096) for s in (80, 90, 95)]


@dataclass(frozen=True)
class Decode:
    """A few samples on a GPU, in bfloat16."""

    out: int
    columns: int
    sparsity: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.out}x{self.columns}, {self.sparsity} %, batch {self.batch}"


DECODE = [Decode(4096, 4096, s, b) for s in (90, 95) for b in (1, 2, 4, 8)]
DECODE += [Decode(14336, 4096, s, 1) for s in (80, 90)]


def layout(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(case.out, case.columns, generator=generator) * 100 >= case.sparsity
    column = mask.nonzero()[:, 1]
    row_start = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)]).int()
    value = torch.randn(len(column), generator=generator) / case.columns**0.5
    return row_start.to(device), column.short().to(device), value.to(device)


def agree(ours: tuple, theirs: tuple, name: str) -> None:
    near = 0.05 if "bf16" in name else 1e-3
    for a, b in zip(ours, theirs, strict=False):  # CSR is compared by its forward pass
        torch.testing.assert_close(a, b.float(), rtol=near, atol=near * float(a.abs().max()))


def job(case: Case, device: str) -> Job:
    start, column, value = layout(case, device)
    weight = unpack_weight(start, column, value, case.columns)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch, case.columns, generator=generator).to(device)
    grad = torch.randn(case.batch, case.out, generator=generator).to(device)
    transposed = list(transpose_layout(start, column, case.columns)) if device != "cpu" else []
    place = rows_of(start, column), columns_of(column)

    def ours() -> tuple:
        y = ops.sparse_linear(start, column, value, x, None)
        if not case.training:
            return (y,)
        by_x = ops.sparse_linear_input(start, column, value, transposed, grad, case.columns)
        return y, by_x, ops.sparse_linear_weight(start, column, grad, x)

    def dense() -> tuple:
        if not case.training:
            return (F.linear(x, weight),)
        return F.linear(x, weight), grad @ weight, grad.T @ x

    halves = [t.bfloat16() for t in (x, weight, grad)]

    def dense_bf16() -> tuple:
        x, weight, grad = halves
        if not case.training:
            return (F.linear(x, weight),)
        return F.linear(x, weight), grad @ weight, grad.T @ x

    def check(a: tuple, b: tuple, name: str) -> None:
        agree(a, b if len(b) < 3 else (*b[:2], b[2][place]), name)

    found = {"torch dense": Peer(dense), "torch dense bf16": Peer(dense_bf16)}
    if not case.training:
        with warnings.catch_warnings():  # that CSR is in beta
            warnings.simplefilter("ignore")
            csr, xt = weight.to_sparse_csr(), x.T.contiguous()
        found["torch CSR"] = Peer(lambda: ((csr @ xt).T,))
    alive, passes = float(len(value)), 3 if case.training else 1
    options = {"bytes": passes * 6 * alive, "flops": passes * 2 * alive * case.batch, "rate": "fp32"}
    options["extra"] = {"alive": len(value), "batch": case.batch}
    return Job(OP, case.name, Peer(ours), found, check, options)


def turns(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Equal tensors without end, of ROTATED bytes in total before the same ones come again."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    return itertools.cycle([tensors] + [[t.clone() for t in tensors] for _ in range(-(-ROTATED // size) - 1)])


def decode_job(case: Decode, device: str) -> Job:
    generator = torch.Generator(device).manual_seed(0)
    mask = torch.rand(case.out, case.columns, device=device, generator=generator) * 100 >= case.sparsity
    column = mask.nonzero()[:, 1].short()
    start = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), mask.sum(1).cumsum(0)]).int()
    value = (torch.randn(len(column), device=device, generator=generator) / case.columns**0.5).bfloat16()
    x = torch.randn(case.batch, case.columns, device=device, generator=generator).bfloat16()
    weight = unpack_weight(start, column, value, case.columns)
    apart, order = bank_layout(start, column, case.columns)
    ours, ascending = turns([start, apart, value[order.long()]]), turns([start, column, value])
    dense, gathered = turns([weight]), turns([start, column, value])
    found = {
        "cuBLAS bf16": Peer(lambda: F.linear(x, *next(dense))),
        "ours, ascending": Peer(lambda: ops.sparse_linear(*next(ascending), x, None)),
        "ours, gather": Peer(lambda: ops.sparse_linear(*next(gathered), x, None, "gather")),
    }
    with warnings.catch_warnings():  # that CSR is in beta
        warnings.simplefilter("ignore")
        csr, xt = weight.to_sparse_csr(), x.T.contiguous()
        parts = turns([csr.crow_indices().int(), csr.col_indices().int(), csr.values()])
        count = -(-ROTATED // (8 * len(value)))
        matrices = itertools.cycle([torch.sparse_csr_tensor(*next(parts), csr.shape) for _ in range(count)])
    with contextlib.suppress(RuntimeError):  # not every build multiplies CSR in bfloat16
        _ = csr @ xt
        found["torch.sparse CSR"] = Peer(lambda: (next(matrices) @ xt).T)

    def check(a: Tensor, b: Tensor, name: str) -> None:
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2 * float(a.abs().max()))

    alive = float(len(value))
    options = {"bytes": 4 * alive, "flops": 2 * alive * case.batch, "rate": "fp32"}
    options["extra"] = {"alive": len(value), "batch": case.batch}
    return Job(OP, case.name, Peer(lambda: ops.sparse_linear(*next(ours), x, None)), found, check, options)


@parametrize("case", DECODE, ids=lambda c: c.name)
def test_decoding(case: Decode, run: Run, timed: Callable[[Job], Row]) -> None:
    if not run.clock.cuda:
        skip("a case for GPUs")
    timed(decode_job(case, run.device))


@parametrize("case", CASES, ids=lambda c: c.name)
def test_sparse_linear(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    if torch.device(device).type == "cuda":
        for case in DECODE:
            yield decode_job(case, device)
    for case in CASES:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
