# SPDX-License-Identifier: Apache-2.0
"""``mlp_steps_``: training of LeNet-300-100 (batch 60, Adam) on images of 64 and of 784 pixels, at falling density.

The peer is the loop one writes in torch: an ``nn.Sequential`` of dense layers, autograd, ``Adam(fused=True)`` and one
``_foreach_mul_`` by float masks after each step, on one thread and on two.  A call is 100 iterations, as between two
evaluations; ours packs and unpacks the layers within.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import harness
import torch
from harness import Job, Peer, Row, Run, main, parametrize
from torch import Tensor, nn

import zipfast

OP = "mlp_steps"
STEPS, BATCH, ROWS, LR = 100, 60, 4000, 1.2e-3
SPARSE_BELOW = 0.5
TOLERATED = 1e-2  # of the first loss: Adam amplifies the rounding of its first steps


@dataclass(frozen=True)
class Case:
    pixels: int
    density: float

    @property
    def name(self) -> str:
        return f"{self.pixels}-300-100-10, density {self.density:g}"


CASES = [Case(pixels, density) for pixels in (64, 784) for density in (1.0, 0.2, 0.05, 0.02)]


def pack(alive: Tensor) -> Tensor:
    """Bits, least significant first, in whole blocks of 64 bytes; nothing where all are alive."""
    if alive.all():
        return torch.empty(0, dtype=torch.uint8)
    bits = torch.zeros(512 * ((alive.numel() + 511) // 512), dtype=torch.uint8)
    bits[: alive.numel()] = alive.reshape(-1)
    return (bits.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def agree(ours: Tensor, theirs: Tensor, name: str) -> None:
    error = float((ours - theirs).abs().max() / theirs[0])
    assert error <= TOLERATED, f"losses differ by {error:.2g} of the first one"


def job(case: Case, device: str) -> Job:
    torch.manual_seed(0)
    sizes = (case.pixels, 300, 100, 10)
    linear = [nn.Linear(a, b, device=device) for a, b in itertools.pairwise(sizes)]
    alive = [torch.rand_like(layer.weight) < case.density for layer in linear]
    for layer, a in zip(linear, alive):
        layer.weight.data.mul_(a)
    begin = [p.detach().clone() for p in (*[f.weight for f in linear], *[f.bias for f in linear])]
    data, label = torch.rand(ROWS, case.pixels, device=device), torch.randint(0, 10, (ROWS,), device=device)
    order = torch.randint(0, ROWS, (STEPS, BATCH), device=device)
    mask, factor = [pack(a.cpu()).to(device) for a in alive], [a.float() for a in alive]
    lr = torch.full((STEPS,), LR, dtype=torch.float64, device=device)

    def fresh() -> tuple:
        parameters = [p.clone() for p in begin]
        first, second = ([torch.zeros_like(p) for p in begin] for _ in range(2))
        return parameters[:3], parameters[3:], mask, first, second

    def ours(state: tuple) -> Tensor:
        options = ("adam", 0.9, 0.999, 1e-8, 0.0, False, 0, SPARSE_BELOW)
        return zipfast.ops.mlp_steps_(*state, data, label, order, lr, *options)

    net = nn.Sequential(*[m for layer in linear for m in (layer, nn.ReLU())][:-1])
    weights = [layer.weight for layer in linear]

    def reset() -> torch.optim.Optimizer:
        with torch.no_grad():
            torch._foreach_copy_([*weights, *[layer.bias for layer in linear]], begin)
        return torch.optim.Adam(net.parameters(), lr=LR, fused=True)

    def loop(optimizer: torch.optim.Optimizer) -> Tensor:
        losses = []
        with torch.inference_mode(False), torch.enable_grad():
            for rows in order:
                loss = nn.functional.cross_entropy(net(data[rows]), label[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if case.density < 1:
                    with torch.no_grad():
                        torch._foreach_mul_(weights, factor)
                losses.append(loss.detach())
        return torch.stack(losses).double()

    def on_two(optimizer: torch.optim.Optimizer) -> Tensor:
        with harness.threads(2):
            return loop(optimizer)

    found = {"torch loop, 1 thread": Peer(loop, reset), "torch loop, 2 threads": Peer(on_two, reset)}
    weights_alive = float(sum(a.sum() for a in alive))
    flops = 2 * BATCH * STEPS * (3 * weights_alive - float(alive[0].sum()))
    return Job(OP, case.name, Peer(ours, fresh), found, agree, {"flops": flops, "extra": {"steps": STEPS}})


@parametrize("case", CASES, ids=lambda c: c.name)
def test_mlp_steps(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in CASES:
        with torch.inference_mode(False):
            yield job(case, device)


if __name__ == "__main__":
    main(jobs)
