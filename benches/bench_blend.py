# SPDX-License-Identifier: Apache-2.0
"""``blend_``: the weighted sum of eight vision transformers, 154 tensors of 20 M parameters in all, in one call.

On a GPU also of 100 M parameters, far beyond its cache.

Peers do the same sums with what torch offers, in float32 buffers that are there beforehand: ``add_`` tensor by tensor,
``_foreach_add_`` model by model, and the reference.  None of them looks for values that are not finite, except the
reference.  The floor is reading the inputs and writing the output once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peers
import torch
from harness import Job, Peer, Row, Run, main, parametrize
from torch import Tensor

import zipfast

OP = "blend"
MODELS = 8
FINITE = torch.iinfo(torch.int64).max
TOLERATED = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # of the largest value; the peers fuse product and sum


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    width: int = 360
    size: str = " of 20 M"

    @property
    def name(self) -> str:
        return f"{MODELS} models{self.size}, {str(self.dtype).removeprefix('torch.')}"


CASES = [Case(torch.float32), Case(torch.bfloat16)]
WIDE = 816  # 100 M parameters
CUDA_CASES = [Case(torch.float32, WIDE, ", 100M"), Case(torch.bfloat16, WIDE, ", 100M")]


def transformer(width: int) -> list[tuple[int, ...]]:
    """Shapes of the 154 tensors of a ViT-B/32: width 768 there, less here to fit into memory."""
    w = width
    block = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    stem = [(w, 3, 32, 32), (w,), (50, w), (w,), (w,)]
    return [*stem, *block * 12, (w,), (w,), (w, 512), (1000, 512), (1000,)]


def models(width: int, count: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """All tensors of ``count`` models, those of model 0 first."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = transformer(width) * count
    return [torch.randn(s, generator=generator, device=device).mul_(0.02).to(dtype) for s in shapes]


def agree(ours: list[Tensor], theirs: list[Tensor], name: str) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        if name == peers.REFERENCE:
            assert torch.equal(a, b), "bits differ from the reference"
        peers.close(a, b, TOLERATED[a.dtype])


def job(case: Case, device: str) -> Job:
    x = models(case.width, MODELS, case.dtype, device)
    count = len(x) // MODELS
    alpha = torch.softmax(torch.arange(MODELS) / 4, 0).double()
    weight = alpha[:, None].repeat(1, count).to(device)
    bad = torch.full((MODELS + 1, count), FINITE, device=device)
    ours, theirs = ([torch.empty_like(t) for t in x[:count]] for _ in range(2))
    exact = case.dtype == torch.float32
    buffers = theirs if exact else [torch.empty_like(t, dtype=torch.float32) for t in theirs]

    def blend(out: list[Tensor]) -> list[Tensor]:
        zipfast.ops.blend_(out, bad, x, weight)
        return out

    def stored() -> list[Tensor]:
        if not exact:
            torch._foreach_copy_(theirs, buffers)
        return theirs

    def add() -> list[Tensor]:
        for j, total in enumerate(buffers):
            torch.mul(x[j], float(alpha[0]), out=total)
            for i in range(1, MODELS):
                total.add_(x[i * count + j], alpha=float(alpha[i]))
        return stored()

    def foreach_add() -> list[Tensor]:
        torch._foreach_copy_(buffers, x[:count])
        torch._foreach_mul_(buffers, float(alpha[0]))
        for i in range(1, MODELS):
            torch._foreach_add_(buffers, x[i * count : (i + 1) * count], alpha=float(alpha[i]))
        return stored()

    found = {
        "add_": Peer(add),
        "_foreach_add_": Peer(foreach_add),
        peers.REFERENCE: Peer(peers.by_reference(lambda: blend(theirs))),
    }
    size = float(sum(t.numel() * t.element_size() for t in x)) * (1 + 1 / MODELS)
    options = {"bytes": size, "extra": {"models": MODELS, "tensors": count}}
    return Job(OP, case.name, Peer(lambda: blend(ours)), found, agree, options)


@parametrize("case", CASES, ids=lambda c: c.name)
def test_blend(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in [*CASES, *(CUDA_CASES if torch.device(device).type == "cuda" else [])]:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
