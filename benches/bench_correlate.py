# SPDX-License-Identifier: Apache-2.0
"""``correlate``: co-moments of a layer, or of all 37 spaces of a ResNet-50, into correlations.

Peers form the same in float64 with what torch offers: a panel of 256 rows at a time, which needs no further matrix of this
size, and all at once, as ``torch.corrcoef`` ends.  Both know no dead features.  The floor is reading the upper triangle of
the float64 co-moments and writing the float32 result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peers
import torch
from bench_moments import RESNET50
from harness import Job, Peer, Row, Run, main, parametrize, skip
from torch import Tensor

import zipfast

OP = "correlate"
MODELS, PANEL = 2, 256


@dataclass(frozen=True)
class Case:
    name: str
    features: tuple[int, ...]


FEW = [Case(f"F={n}", (n,)) for n in (512, 2048)]
LARGE = Case("F=4096", (4096,))
NETWORK = Case("ResNet-50, 37 spaces", tuple(MODELS * c for c, _, times in RESNET50 for _ in range(times)))
CASES = {"cpu": [*FEW, LARGE], "cuda": [*FEW, LARGE, NETWORK]}
Sums = tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]


def sums(case: Case, device: str) -> Sums:
    """Of 500 samples with a spread mean; the shift is 0."""
    generator = torch.Generator(device).manual_seed(0)
    comoment, total = [], []
    for n in case.features:
        x = torch.randn(n, 500, generator=generator, device=device, dtype=torch.float64)
        x += torch.linspace(-1, 1, n, device=device, dtype=torch.float64)[:, None]
        comoment.append(x @ x.T)
        total.append(x.sum(1))
    return comoment, total, [torch.zeros_like(t) for t in total], [500] * len(total)


def panels(comoment: Tensor, total: Tensor, count: int) -> Tensor:
    n, mean = len(total), total / count
    inverse = (comoment.diagonal() / count - mean * mean).rsqrt()
    result = torch.empty(n, n, device=total.device)
    for start in range(0, n, PANEL):
        rows = slice(start, start + PANEL)
        part = torch.addr(comoment[rows, start:] / count, mean[rows], mean[start:], alpha=-1)
        part.mul_(inverse[rows, None]).mul_(inverse[start:]).clamp_(-1, 1)
        square = part[:, : part.shape[0]]
        square.copy_(square.triu(1) + square.triu(1).T).fill_diagonal_(1)
        result[rows, start:] = part
        result[start + PANEL :, rows] = result[rows, start + PANEL :].T
    return result


def whole(comoment: Tensor, total: Tensor, count: int) -> Tensor:
    mean = total / count
    covariance = comoment / count - torch.outer(mean, mean)
    deviation = covariance.diagonal().sqrt()
    return covariance.div_(deviation[:, None]).div_(deviation).clamp_(-1, 1).float()


def agree(ours: list[Tensor], theirs: list[Tensor], name: str) -> None:
    for a, b in zip(ours, theirs, strict=True):
        peers.close(a, b, 2e-7)


def job(case: Case, device: str) -> Job:
    given = sums(case, device)

    def ours() -> list[Tensor]:
        return zipfast.ops.correlate(*given, False, False)[0]

    def each(form: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [form(c, t, count) for c, t, _, count in zip(*given, strict=True)]

    found = {
        "torch, by panels": Peer(each(panels)),
        "torch, whole": Peer(each(whole)),
        peers.REFERENCE: Peer(peers.by_reference(ours)),
    }
    pairs = sum(float(n) * (n + 1) / 2 for n in case.features)
    options = {"bytes": 16 * pairs, "extra": {"spaces": len(case.features)}}
    return Job(OP, case.name, Peer(ours), found, agree, options)


@parametrize("case", CASES["cuda"], ids=lambda c: c.name)
def test_correlate(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    if case not in CASES[torch.device(run.device).type]:
        skip("for a GPU")
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in CASES[torch.device(device).type]:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
