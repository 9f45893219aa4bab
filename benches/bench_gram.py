# SPDX-License-Identifier: Apache-2.0
"""``gram``: task vectors of 8 and 16 vision transformers against each other, 154 tensors of 10 M parameters in all.

On a GPU also 25 M parameters, and each path by name.  The peer does the same with what torch offers: differences from the
base stacked in float64, times their transpose, tensor by tensor.  The floor is reading models and base once, or k·(k+1)
floating-point operations for each element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peers
import torch
from bench_blend import models
from harness import Job, Peer, Row, Run, main, parametrize
from torch import Tensor

import zipfast

OP = "gram"


@dataclass(frozen=True)
class Case:
    models: int
    width: int = 256
    size: str = " of 10 M, float32"
    path: str = "auto"

    @property
    def name(self) -> str:
        return f"{self.models} models{self.size}" + ("" if self.path == "auto" else f", path {self.path}")


CASES = [Case(8), Case(16)]
CUDA_CASES = [Case(16, 400, ", 25M", path) for path in ("auto", "plain", "tensor")] + [
    Case(8, 400, ", 25M"),
    Case(32, 400, ", 25M"),
]


def agree(ours: Tensor, theirs: Tensor, name: str) -> None:
    peers.close(ours, theirs, 1e-12)


def job(case: Case, device: str) -> Job:
    k = case.models
    x = models(case.width, k + 1, torch.float32, device)
    count = len(x) // (k + 1)
    base, x = x[:count], x[count:]

    def stacked() -> Tensor:
        found = []
        for j in range(count):
            rows = torch.stack([(t - base[j]).flatten().double() for t in x[j::count]])
            found.append(rows @ rows.T)
        return torch.stack(found)

    size = float(sum(t.numel() for t in base))
    options = {"bytes": 4 * size * (k + 1), "flops": size * k * (k + 1), "rate": "fp64"}
    options["extra"] = {"models": k, "tensors": count}
    found = {"stack float64 @ T": Peer(stacked)}
    return Job(OP, case.name, Peer(lambda: zipfast.ops.gram(x, k, base, case.path)), found, agree, options)


@parametrize("case", CASES, ids=lambda c: c.name)
def test_gram(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in [*CASES, *(CUDA_CASES if torch.device(device).type == "cuda" else [])]:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
