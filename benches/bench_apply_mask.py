# SPDX-License-Identifier: Apache-2.0
"""``apply_mask_`` on the convolutions of a ResNet-18, 11.7 M weights: masked where they are, and rewound.

Peers do the same with what torch offers: a float32 mask that is multiplied, a bool mask that is filled, a copy before it,
and the reference.  The floor is reading weights (or their source), the bits, and writing weights once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peers
import torch
from harness import Job, Peer, Row, Run, main, parametrize
from torch import Tensor

import zipfast

OP = "apply_mask"


@dataclass(frozen=True)
class Case:
    density: float
    rewind: bool
    width: int = 64

    @property
    def name(self) -> str:
        return f"{'rewind' if self.rewind else 'mask'} {size(self.width)} float32, {self.density:.0%} alive"


CASES = [Case(0.8, False), Case(0.2, False), Case(0.2, True), Case(0.05, True)]


def resnet18(first: int = 64) -> list[tuple[int, ...]]:
    """Shapes of the weights of a ResNet-18 that are pruned; its first convolution has 64 channels."""
    shapes: list[tuple[int, ...]] = [(first, 3, 7, 7)]
    before = first
    for width in (first, 2 * first, 4 * first, 8 * first):
        shapes += [(width, before, 3, 3), *[(width, width, 3, 3)] * 3]
        shapes += [(width, before, 1, 1)] if width != before else []
        before = width
    return [*shapes, (1000, before)]


def size(width: int) -> str:
    """In millions of weights; a name that goals and older results know, for the network itself."""
    return "11.7 M" if width == 64 else f"{sum(map(math.prod, resnet18(width))) / 1e6:.1f} M"


def noise(seed: int, device: str, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(s, generator=generator, device=device).mul_(0.02) for s in shapes]


def pack(alive: Tensor) -> Tensor:
    """One bit per entry, lowest first."""
    bits = torch.zeros((alive.numel() + 511) // 512 * 512, dtype=torch.uint8, device=alive.device)
    bits[: alive.numel()] = alive.reshape(-1)
    place = torch.arange(8, dtype=torch.uint8, device=alive.device)
    return (bits.view(-1, 8) << place).sum(1, dtype=torch.uint8)


def masks(density: float, device: str, shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:
    """Bool masks and the same packed."""
    generator = torch.Generator(device).manual_seed(7)
    alive = [torch.rand(s, generator=generator, device=device) < density for s in shapes]
    return alive, [pack(a) for a in alive]


def agree(ours: list[Tensor], theirs: list[Tensor], name: str) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs)), f"values differ from {name}"


def job(case: Case, device: str) -> Job:
    shapes = resnet18(case.width)
    alive, packed = masks(case.density, device, shapes)
    dense = [a.float() for a in alive]
    dead = [~a for a in alive]
    source = noise(1, device, shapes) if case.rewind else []
    ours, theirs = noise(2, device, shapes), noise(2, device, shapes)

    def apply(out: list[Tensor]) -> list[Tensor]:
        zipfast.ops.apply_mask_(out, packed, source)
        return out

    def multiply() -> list[Tensor]:
        if source:
            torch._foreach_copy_(theirs, source)
        torch._foreach_mul_(theirs, dense)
        return theirs

    def fill() -> list[Tensor]:
        for j, t in enumerate(theirs):
            if source:
                t.copy_(source[j])
            t.masked_fill_(dead[j], 0.0)
        return theirs

    copied = "_foreach_copy_, " if source else ""
    found = {
        f"{copied}_foreach_mul_": Peer(multiply),
        f"{'copy_, ' if source else ''}masked_fill_": Peer(fill),
        peers.REFERENCE: Peer(peers.by_reference(lambda: apply(theirs))),
    }
    moved = float(sum(8 * t.numel() + m.numel() for t, m in zip(ours, packed)))
    return Job(OP, case.name, Peer(lambda: apply(ours)), found, agree, {"bytes": moved})


@parametrize("case", CASES, ids=lambda c: c.name)
def test_apply_mask(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in CASES:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
