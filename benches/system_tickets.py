# SPDX-License-Identifier: Apache-2.0
"""Lottery tickets: levels of LeNet-300-100 with rewinding, and one step of training a sparse layer.

The experiment stands beside the loop of lottery_cost.py, which is torch's own best, and beside the same loop on modules
that ``torch.nn.utils.prune`` masks. All look at the same data as often and must keep as many survivors a level; trained
numbers differ, as sums are taken in another order. The layer stands beside the masked dense layer, written out and by
``torch.nn.utils.prune``, and SparseLab's; there output and both gradients must be the same.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Job, Peer, guarded
from lottery_cost import EVERY, Loop, Ours, Parts
from plan import Planned
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import zipfast
from zipfast.tickets import SparseLinear

OP = "tickets"
PRUNED, LOOP = "loop on torch.nn.utils.prune", "torch loop, fused Adam, _foreach_mul_"


@dataclass(frozen=True)
class Levels:
    levels: int
    iterations: int

    @property
    def name(self) -> str:
        return f"LeNet-300-100, {self.levels + 1} levels of {self.iterations} iterations"


@dataclass(frozen=True)
class Layer:
    features: int
    sparsity: int
    batch: int

    @property
    def name(self) -> str:
        return f"layer of {self.features}², {self.sparsity} % sparse, batch {self.batch}, forward and backward"


FULL: list[Levels | Layer] = [Levels(9, 600), Layer(1024, 90, 64), Layer(4096, 95, 64)]
QUICK: list[Levels | Layer] = [Levels(1, 40), Layer(256, 90, 16)]


def digits() -> Parts:
    """Ten noisy patterns of 64 pixels, which a small network learns."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 64, generator=generator)
    found = []
    for count in (700, 300, 797):
        y = torch.randint(0, 10, (count,), generator=generator)
        found.append((patterns[y] + 0.3 * torch.randn(count, 64, generator=generator), y))
    return found


class Pruned(Loop):
    """The loop on modules that torch masks before each forward pass."""

    def __init__(self, folder: Path, parts: Parts) -> None:
        super().__init__(folder, parts)
        self.layers = [m for m in self.model if isinstance(m, nn.Linear)]
        self.first = [copy.deepcopy(m.weight.detach()) for m in self.layers]
        for layer in self.layers:
            prune.identity(layer, "weight")

    def level(self, level: int, iterations: int = 0) -> tuple[int, float]:
        if level:
            for layer, rate in zip(self.layers, (0.2, 0.2, 0.1)):
                prune.l1_unstructured(layer, "weight", round(rate * int(layer.weight_mask.sum())))
        with torch.no_grad():
            for layer, weight in zip(self.layers, self.first):
                layer.weight_orig.copy_(weight)
                layer.bias.copy_(self.start[next(n for n, m in self.model.named_modules() if m is layer) + ".bias"])
        optimizer = torch.optim.Adam(self.model.parameters(), 1.2e-3, fused=True)
        (x, y), best, generator = self.train, float("inf"), torch.Generator().manual_seed(1)
        order: tuple[Tensor, ...] = ()
        for iteration in range(iterations + 1):
            if iteration % EVERY == 0 or iteration == iterations:
                with torch.no_grad():
                    loss = float(F.cross_entropy(self.model(self.validation[0]), self.validation[1]))
                    if loss < best or iteration == iterations:
                        best = min(best, loss)
                        accuracy = 100 * float((self.model(self.test[0]).argmax(1) == self.test[1]).float().mean())
            if iteration == iterations:
                break
            if not order:
                order = torch.randperm(len(x), generator=generator).split(60)
            rows, *rest = order
            order = tuple(rest)
            optimizer.zero_grad()
            F.cross_entropy(self.model(x[rows]), y[rows]).backward()
            optimizer.step()
        zipfast.checkpoint.save(self.folder / f"{level}.safetensors", dict(self.model.state_dict()))
        return int(sum(int(layer.weight_mask.sum()) for layer in self.layers)), accuracy


def experiment(case: Levels, use: Collection[str]) -> Job:
    parts = digits()

    def survivors(new: Callable[[Path], Any], *more: int) -> Callable[[], list[int]]:
        def run() -> list[int]:
            with tempfile.TemporaryDirectory(prefix="zipfast-bench-") as folder:
                loop = new(Path(folder))
                return [loop.level(level, *more)[0] for level in range(case.levels + 1)]

        return run

    def ours(folder: Path) -> Ours:
        return Ours(folder / "lottery", parts, case.iterations)

    found = {LOOP: Peer(survivors(lambda folder: Loop(folder, parts), case.iterations))}
    if "torch.nn.utils.prune" in use:
        masked = survivors(lambda folder: Pruned(folder, parts), case.iterations)
        found[PRUNED] = Peer(masked, package="torch.nn.utils.prune")

    def agree(a: list[int], b: list[int], name: str) -> None:
        assert a == b, f"survivors by level are {a} and {b}"

    return Job(OP, case.name, Peer(survivors(ours)), found, agree, {"repeats": 5, "budget_s": 20.0})


def layer(case: Layer, use: Collection[str]) -> Job:
    """One forward pass and the gradients of ``sum(y * g)`` by the input and the alive weights."""
    n, generator = case.features, torch.Generator().manual_seed(0)
    alive = torch.rand(n, n, generator=generator) * 100 >= case.sparsity
    weight = torch.randn(n, n, generator=generator) / n**0.5 * alive
    x, g = (torch.randn(case.batch, n, generator=generator) for _ in range(2))
    linear = nn.Linear(n, n, bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    bits = torch.zeros((n * n + 511) // 512 * 512, dtype=torch.uint8)
    bits[: n * n] = alive.reshape(-1)
    packed = (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    own = SparseLinear.from_linear(linear, packed)

    def step(forward: Callable[[Tensor], Tensor], by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        by_x, by_weight = torch.autograd.grad(y, (leaf, by), g)
        return y.detach(), by_x, by_weight

    dense, mask = linear.weight, alive.float()

    def written_out() -> tuple[Tensor, ...]:
        y, by_x, by_weight = step(lambda v: F.linear(v, dense * mask), dense)
        return y, by_x, by_weight[alive]

    found = {"dense layer times mask": Peer(written_out)}
    if "torch.nn.utils.prune" in use:
        module = prune.custom_from_mask(copy.deepcopy(linear), "weight", mask)

        def pruned() -> tuple[Tensor, ...]:
            y, by_x, by_weight = step(module, module.weight_orig)
            return y, by_x, by_weight[alive]

        found["torch.nn.utils.prune"] = Peer(pruned, package="torch.nn.utils.prune")
    if "SparseLab" in use:
        found["SparseLab SparseLinear"] = guarded(lambda: Peer(sparselab(weight, step), None, "SparseLab"), "SparseLab")

    def agree(a: tuple[Tensor, ...], b: tuple[Tensor, ...], name: str) -> None:
        for what, one, other in zip(("outputs", "gradients by the input", "gradients by the weights"), a, b):
            error = float((one - other).abs().max() / other.abs().max())
            assert error <= 1e-4, f"{what} differ by {error:.3g} of the largest"

    ours = Peer(lambda: step(own, own.value))
    flops = 3 * 2.0 * float(alive.sum()) * case.batch
    return Job(OP, case.name, ours, found, agree, {"flops": flops, "rate": "fp32", "budget_s": 6.0})


def sparselab(weight: Tensor, step: Callable[..., tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """Its layer with our weights. Its values have spare places in each row, and its columns ascend, as in ours."""
    import numpy as np
    from sparselab import PaddedCSR
    from sparselab import SparseLinear as Theirs

    n = weight.shape[0]
    theirs = Theirs(n, n, bias=False, sparsity=0.5)
    theirs._csr = PaddedCSR.from_dense(weight)
    theirs._values = nn.Parameter(torch.from_numpy(np.asarray(theirs._csr.values)))
    start, length = (np.asarray(a).astype(np.int64) for a in (theirs._csr.row_start, theirs._csr.row_nnz))
    places = torch.from_numpy(np.concatenate([np.arange(s, s + k) for s, k in zip(start, length)]))

    def run() -> tuple[Tensor, ...]:
        y, by_x, by_values = step(theirs, theirs._values)
        return y, by_x, by_values[places]

    return run


def planned(device: str, quick: bool, use: Collection[str]) -> list[Planned]:
    """These run on the CPU, whatever the device: the loops are of its size."""
    found = []
    for case in QUICK if quick else FULL:
        if isinstance(case, Levels):
            found.append(Planned(case.name, 3e8, functools.partial(experiment, case, use), inference=False))
        else:
            need = 4.0 * 16 * case.features**2
            found.append(Planned(case.name, need, functools.partial(layer, case, use), inference=False))
    return found
