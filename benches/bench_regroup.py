# SPDX-License-Identifier: Apache-2.0
"""``regroup``: merging the output axis and unmerging the input axis of 3×3 convolutions of two models.

Peers do the same sums with what torch offers: einsum with the dense matrices (they are ready, only their product is
timed) and ``index_add_``.  The floor is reading the inputs and writing the output once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peers
import torch
from harness import Job, Peer, Row, Run, main, parametrize
from torch import Tensor

import zipfast

OP = "regroup"
MODELS = 2


@dataclass(frozen=True)
class Case:
    channels: int
    use: str  # "merge" the output axis, "unmerge" the input axis

    @property
    def name(self) -> str:
        axis = "axis 0" if self.use == "merge" else "axis 1"
        return f"{self.use} {axis} of {self.channels}x{self.channels}x3x3"


CASES = [Case(c, use) for use in ("merge", "unmerge") for c in (128, 256, 512)]


def groups(channels: int, generator: torch.Generator) -> list[Tensor]:
    """2·C features in C groups of one to three, as a match leaves them."""
    members = torch.randperm(MODELS * channels, generator=generator)
    cuts = torch.randperm(MODELS * channels - 1, generator=generator)[: channels - 1].sort().values + 1
    return list(torch.tensor_split(members, cuts))


def flat(parts: list[Tensor], device: str) -> tuple[Tensor, Tensor]:
    """(order, start) of a list of groups."""
    sizes = torch.tensor([0, *map(len, parts)])
    return torch.cat(parts).to(device), sizes.cumsum(0).to(device)


def agree(ours: list[Tensor], theirs: list[Tensor], name: str) -> None:
    for a, b in zip(ours, theirs):
        peers.close(a, b, 1e-5)


def job(case: Case, device: str) -> Job:
    generator = torch.Generator().manual_seed(case.channels)
    shape = (case.channels, case.channels, 3, 3)
    weights = [torch.randn(shape, generator=generator).to(device) for _ in range(MODELS)]
    parts = groups(case.channels, generator)
    return merge_job(case, weights, parts, device) if case.use == "merge" else unmerge_job(case, weights, parts, device)


def merge_job(case: Case, weights: list[Tensor], parts: list[Tensor], device: str) -> Job:
    c = case.channels
    order, start = flat(parts, device)
    divisor = (start[1:] - start[:-1]).double()
    whole = peers.dense_groups(order, start, MODELS * c, divisor, torch.float32)
    dense = [d.contiguous() for d in whole.split(c, 1)]
    owner = peers.owners(order, start, MODELS * c)
    found = {
        "einsum, dense": Peer(lambda: [sum(torch.einsum("gf,fcij->gcij", d, w) for d, w in zip(dense, weights))]),
        "cat + index_add_": Peer(lambda: [peers.index_add(weights, owner, divisor, 0, c)]),
    }
    return finish(case, lambda: [zipfast.ops.regroup(weights, order, start, divisor, 0)], found, weights, outputs=1)


def unmerge_job(case: Case, weights: list[Tensor], parts: list[Tensor], device: str) -> Job:
    c = case.channels
    own = [[p[p // c == m] - m * c for p in parts] for m in range(MODELS)]
    index = [flat(o, device) for o in own]
    dense = [peers.dense_groups(order, start, c, None, torch.float32) for order, start in index]
    owner = [peers.owners(order, start, c) for order, start in index]
    found = {
        "einsum, dense": Peer(lambda: [torch.einsum("ocij,gc->ogij", w, d) for w, d in zip(weights, dense)]),
        "cat + index_add_": Peer(lambda: [peers.index_add([w], o, None, 1, c) for w, o in zip(weights, owner)]),
    }

    def ours() -> list[Tensor]:
        return [zipfast.ops.regroup([w], order, start, None, 1) for w, (order, start) in zip(weights, index)]

    return finish(case, ours, found, weights, outputs=MODELS)


def finish(case: Case, ours: Callable[[], Any], found: dict[str, Peer], weights: list[Tensor], outputs: int) -> Job:
    size = float(weights[0].numel() * weights[0].element_size())
    options = {"bytes": size * (MODELS + outputs), "extra": {"models": MODELS}}
    return Job(OP, case.name, Peer(ours), found, agree, options)


@parametrize("case", CASES, ids=lambda c: c.name)
def test_regroup(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in CASES:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
