# SPDX-License-Identifier: Apache-2.0
"""``masked_step_`` on the convolutions of a ResNet-18, 11.7 M weights: a step of SGD or Adam and the mask.

Peers are torch's own optimisers, fused or by ``foreach``, followed by a product of the weights with a float32 mask.  They
leave the state of dead weights alone; ours clears it.  The floor is reading weights, state, gradients and bits, and
writing weights and state once.  On a GPU also a transformer of 100 M weights, far beyond its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peers
import torch
from bench_apply_mask import masks, noise, resnet18, size
from bench_blend import WIDE, transformer
from harness import Job, Peer, Row, Run, main, parametrize
from torch import Tensor

import zipfast

OP = "masked_step"
LR, DECAY, MOMENTUM, BETAS, EPS = 1e-3, 1e-4, 0.9, (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Case:
    rule: str
    density: float
    large: bool = False
    width: int = 64

    @property
    def name(self) -> str:
        if self.large:
            alive = "" if self.density == 0.8 else f", {self.density:.0%} alive"
            return f"100M, {'sgd momentum' if self.rule == 'sgd' else self.rule}{alive}"
        return f"{self.rule} {size(self.width)} float32, {self.density:.0%} alive"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return transformer(WIDE) if self.large else resnet18(self.width)


CASES = [Case(rule, density) for rule in ("sgd", "adam") for density in (0.8, 0.2, 0.02)]
CUDA_CASES = [Case(rule, density, large=True) for rule in ("sgd", "adam") for density in (0.8, 0.02)]


def agree(ours: list[Tensor], theirs: list[Tensor], name: str) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        peers.close(a, b, 1e-5)


class Net:
    """Weights, gradients and state that one side of the comparison owns."""

    def __init__(self, case: Case, device: str, packed: list[Tensor]) -> None:
        shapes = case.shapes
        self.rule, self.packed = case.rule, packed
        self.param, self.grad = noise(1, device, shapes), noise(2, device, shapes)
        self.first = [torch.zeros_like(p) for p in self.param]
        self.second = [torch.zeros_like(p) for p in self.param] if case.rule != "sgd" else []
        self.steps = 0
        zipfast.ops.apply_mask_(self.param, packed, [])

    def step(self) -> list[Tensor]:
        self.steps += 1
        numbers = (self.steps, LR, DECAY, MOMENTUM, 0.0, False, *BETAS, EPS, False)
        zipfast.ops.masked_step_(self.param, self.first, self.second, self.grad, self.packed, self.rule, *numbers)
        return self.param


def by_torch(case: Case, device: str, packed: list[Tensor], dense: list[Tensor], **how: bool) -> Callable:
    net = Net(case, device, packed)
    params = [torch.nn.Parameter(p) for p in net.param]
    for p, g in zip(params, net.grad):
        p.grad = g
    if case.rule == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(params, LR, MOMENTUM, weight_decay=DECAY, **how)
    else:
        optimizer = torch.optim.Adam(params, LR, BETAS, EPS, DECAY, **how)
    weights = [p.detach() for p in params]

    def step() -> list[Tensor]:
        optimizer.step()
        torch._foreach_mul_(weights, dense)
        return weights

    return step


def job(case: Case, device: str) -> Job:
    alive, packed = masks(case.density, device, case.shapes)
    dense = [a.float() for a in alive]
    ours, theirs = Net(case, device, packed), Net(case, device, packed)
    found = {
        "fused=True, _foreach_mul_": Peer(by_torch(case, device, packed, dense, fused=True)),
        "foreach=True, _foreach_mul_": Peer(by_torch(case, device, packed, dense, foreach=True)),
        peers.REFERENCE: Peer(peers.by_reference(theirs.step)),
    }
    streams = 5 if case.rule == "sgd" else 7
    moved = float(sum(4 * streams * p.numel() + m.numel() for p, m in zip(ours.param, packed)))
    return Job(OP, case.name, Peer(ours.step), found, agree, {"bytes": moved})


@parametrize("case", CASES, ids=lambda c: c.name)
def test_masked_step(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in [*CASES, *(CUDA_CASES if torch.device(device).type == "cuda" else [])]:
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
