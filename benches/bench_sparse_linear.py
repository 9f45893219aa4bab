# SPDX-License-Identifier: Apache-2.0
"""``sparse_linear`` and its gradients against the dense layer, in float32 and in bfloat16, and against torch's CSR product.

Forward: a layer of 4096 x 4096 and one of 300 x 784 at 80, 90 and 95 % sparsity; training: forward and both gradients at
a batch of 64.  The dense peers multiply the masked matrix, mask already applied; CSR is MKL's where torch has it.  The
floor is reading values and columns once, or two operations for each weight and sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from harness import Job, Peer, Row, Run, main
from torch import Tensor
from torch.nn import functional as F

from zipfast import ops
from zipfast.ops.sparse_linear import columns_of, rows_of, transpose_layout, unpack_weight

OP = "sparse_linear"


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


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_sparse_linear(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in CASES:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
