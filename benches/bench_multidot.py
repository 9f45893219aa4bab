# SPDX-License-Identifier: Apache-2.0
"""``multidot``: derivatives by the weights of a soup: a gradient against 16 vision transformers, 154 tensors each.

On a GPU also 8 models of 100 M parameters, far beyond its cache.  Peers: ``torch.dot`` tensor by tensor (it sums in the
dtype of its arguments, so for bfloat16 also over float32 copies), and the reference, in float64 as ours.  The floor is
reading the gradient and the models once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peers
import torch
from bench_blend import WIDE, models
from harness import Job, Peer, Row, Run, main, parametrize
from torch import Tensor

import zipfast

OP = "multidot"


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    models: int = 16
    width: int = 256
    size: str = " of 10 M"

    @property
    def name(self) -> str:
        return f"{self.models} models{self.size}, {str(self.dtype).removeprefix('torch.')}"


CASES = [Case(torch.float32), Case(torch.bfloat16)]
CUDA_CASES = [Case(torch.float32, 8, WIDE, ", 100M"), Case(torch.bfloat16, 8, WIDE, ", 100M")]


def agree(ours: Tensor, theirs: Tensor, name: str) -> None:
    tolerated = {"torch.dot": 1e-5, peers.REFERENCE: 1e-12}
    peers.close(ours, theirs, tolerated.get(name, 0.1 if "bfloat16" in name else 1e-5))


def job(case: Case, device: str) -> Job:
    x = models(case.width, case.models + 1, case.dtype, device)
    count = len(x) // (case.models + 1)
    g, x = x[:count], x[count:]
    # As a gradient does, g points along the models: sums that cancel to nothing would compare rounding only.
    for a, b in zip(g, x):
        a.add_(b)

    def ours() -> Tensor:
        return zipfast.ops.multidot(g, x)

    def dots(convert: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            flat = [convert(t).flatten() for t in g]
            rows = [torch.dot(flat[i % count], convert(t).flatten()) for i, t in enumerate(x)]
            return torch.stack(rows).reshape(case.models, count)

        return call

    if case.dtype == torch.float32:
        found = {"torch.dot": Peer(dots(lambda t: t))}
    else:
        found = {"torch.dot of bfloat16": Peer(dots(lambda t: t)), "float() + torch.dot": Peer(dots(Tensor.float))}
    found[peers.REFERENCE] = Peer(peers.by_reference(ours))
    size = float(sum(t.numel() * t.element_size() for t in (*g, *x)))
    extra = {"models": case.models, "tensors": count}
    return Job(OP, case.name, Peer(ours), found, agree, {"bytes": size, "extra": extra})


@parametrize("case", CASES, ids=lambda c: c.name)
def test_multidot(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in [*CASES, *(CUDA_CASES if torch.device(device).type == "cuda" else [])]:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
