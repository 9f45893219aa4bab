# SPDX-License-Identifier: Apache-2.0
"""``moments_``: one batch of two models, per shape, against what a user would call on the same activations.

The floor is the larger of reading the features once (copy rate) and S·F·(F+1) flops, the symmetric half, at GEMM rate.
``bare mm`` multiplies a matrix that is already stacked, contiguous and float32: it has no reshape to pay for, computes
both halves and keeps no mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peers
import torch
from harness import Agree, Job, Peer, Row, Run, main, parametrize, skip
from torch import Tensor

import zipfast

OP = "moments"
MODELS = 2
NO_BAD_VALUE = torch.iinfo(torch.int64).max


# Of the spaces of a ResNet-50, those by which many features are judged: (channels, side).
LARGEST = ((512, 28), (1024, 14), (2048, 7))


@dataclass(frozen=True)
class Case:
    channels: int
    side: int
    batch: int = 64
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """For instance ``64@56² B=64 float16``."""
        shape = f"{self.channels}@{self.side}² B={self.batch}"
        if self.dtype == torch.float32:
            return shape
        kind = str(self.dtype)[6:]
        return f"n={self.features} {kind}, {shape}" if (self.channels, self.side) in LARGEST else f"{shape} {kind}"

    @property
    def features(self) -> int:
        return MODELS * self.channels

    @property
    def samples(self) -> int:
        return self.batch * self.side**2

    @property
    def flops(self) -> float:
        return float(self.samples * self.features * (self.features + 1))

    @property
    def bytes(self) -> float:
        return float(self.samples * self.features * self.dtype.itemsize)


CPU = [
    Case(16, 32),
    Case(64, 32),
    Case(64, 56),
    Case(256, 56, batch=32),
    Case(256, 14),
    Case(512, 7),
    Case(2048, 7),
]
# The spaces of a ResNet-50 at batch 64: (channels, side, how often).
RESNET50 = [
    (64, 56, 7),
    (128, 56, 1),
    (256, 56, 1),
    (128, 28, 7),
    (256, 28, 1),
    (512, 28, 1),
    (256, 14, 11),
    (512, 14, 1),
    (1024, 14, 1),
    (512, 7, 5),
    (2048, 7, 1),
]
HALF = [Case(c, s, dtype=torch.float16) for c, s, _ in RESNET50]
CUDA = CPU + [Case(512, 28), Case(1024, 14)] + HALF


class State:
    """The running sums of a list of spaces, and the call that adds a batch to them."""

    def __init__(self, features: list[Tensor], channels: list[int], device: str) -> None:
        sizes = [MODELS * c for c in channels]
        self.features = features
        self.comoment = [torch.zeros(f, f, dtype=torch.float64, device=device) for f in sizes]
        self.total = [torch.zeros(f, dtype=torch.float64, device=device) for f in sizes]
        self.bad = [torch.full((MODELS,), NO_BAD_VALUE, device=device) for _ in sizes]
        self.shift = [torch.zeros(f, dtype=torch.float64, device=device) for f in sizes]

    def reset(self) -> State:
        for t in (*self.comoment, *self.total):
            t.zero_()
        return self

    def update(self) -> State:
        spaces = len(self.comoment)
        zipfast.ops.moments_(self.comoment, self.total, self.bad, self.features, self.shift, [1] * spaces, [0] * spaces)
        return self


def activations(case: Case, device: str) -> list[Tensor]:
    """Synthetic post-ReLU maps; channels differ in mean and scale, as real ones do."""
    generator = torch.Generator(device).manual_seed(case.channels + case.side)
    shape = (case.batch, case.channels, case.side, case.side)
    out = []
    for _ in range(MODELS):
        x = torch.randn(shape, generator=generator, device=device)
        scale = torch.rand(case.channels, 1, 1, generator=generator, device=device) + 0.5
        out.append(x.sub_(0.3).mul_(scale).relu_().to(case.dtype))
    return out


def agreement(case: Case) -> Agree:
    s = case.samples

    def agree(ours: State, theirs: Any, name: str) -> None:
        comoment, total = ours.comoment[0], ours.total[0]
        if name == peers.REFERENCE:
            # ``theirs`` is another State, added to once.
            peers.close(torch.triu(comoment), torch.triu(theirs.comoment[0]), 1e-6)
            peers.close(total, theirs.total[0], 1e-6)
        elif name == "torch.cov":
            peers.close(peers.cov_of(comoment, total, s), theirs, 1e-4)
        elif name in (peers.ZIPIT, peers.ZIPIT_STEPS):
            peers.close(torch.triu(comoment) / s * case.batch, torch.triu(theirs.outer), 1e-4)
            peers.close(total / s * case.batch, theirs.mean, 1e-4)
        else:
            # Plain products.  TF32 keeps 10 bits of mantissa, and tensor cores round their long sums towards zero.
            peers.close(torch.triu(comoment), torch.triu(theirs), 2e-3 if "tf32" in name or "half" in name else 1e-4)

    return agree


def plain_products(features: list[Tensor], cuda: bool) -> dict[str, Peer]:
    """Matrix products of ready or half-ready matrices: the library's best, without means."""
    ready = torch.cat([peers.as_rows(x, 1).float() for x in features])

    def mm(precision: str) -> Tensor:
        with peers.fp32_precision(precision):
            return torch.mm(ready, ready.T)

    def half() -> Tensor:
        stacked = torch.cat([peers.as_rows(x, 1) for x in features])
        return torch.mm(stacked, stacked.T, out_dtype=torch.float32)

    found = {"bare mm": Peer(lambda: mm("ieee"))}
    if cuda:
        found["bare mm, tf32"] = Peer(lambda: mm("tf32"))
        if features[0].dtype == torch.float16:
            found["cat + mm(half, half)"] = Peer(half)
    return found


def job(case: Case, device: str) -> Job:
    features = activations(case, device)
    state, theirs = (State(features, [case.channels], device) for _ in range(2))
    found = {
        "torch.cov": Peer(lambda: peers.torch_cov(features, 1), package="torch.cov"),
        **plain_products(features, device != "cpu"),
        peers.REFERENCE: Peer(lambda s: peers.by_reference(s.update)(), theirs.reset),
    }
    public = peers.zipit("metric_calculators")
    if public is not None:
        fresh = public.CovarianceMetric
        found[peers.ZIPIT] = Peer(lambda metric: peers.zipit_update(metric, features, 1), fresh, "ZipIt")
    if device != "cpu":
        found[peers.ZIPIT_STEPS] = Peer(lambda steps: steps.update(features, 1), peers.StepsOfZipit)
    options = {
        "bytes": case.bytes,
        "flops": case.flops,
        "rate": rate(case.dtype, device),
        "extra": {"F": case.features, "samples": case.samples, "dtype": str(case.dtype)[6:]},
    }
    return Job(OP, case.name, Peer(State.update, state.reset), found, agreement(case), options)


def rate(dtype: torch.dtype, device: str) -> str:
    """The GEMM ceiling of the arithmetic used; a CPU widens halves to float32."""
    return "fp16" if dtype == torch.float16 and device != "cpu" else "fp32"


def network(device: str, dtype: torch.dtype, batch: int = 64) -> Job:
    """All spaces of a ResNet-50 in one call, as the class that streams batches makes it."""
    cases = [Case(c, s, batch, dtype) for c, s, times in RESNET50 for _ in range(times)]
    per_space = [activations(c, device) for c in cases]
    state = State([x for own in per_space for x in own], [c.channels for c in cases], device)
    found = {"torch.cov": Peer(lambda: [peers.torch_cov(own, 1) for own in per_space], package="torch.cov")}
    public = peers.zipit("metric_calculators")
    if public is not None:

        def each_update(metrics: list[Any]) -> list[Any]:
            return [peers.zipit_update(m, own, 1) for m, own in zip(metrics, per_space)]

        found[peers.ZIPIT] = Peer(each_update, lambda: [public.CovarianceMetric() for _ in cases], "ZipIt")

    def each_step(steps: list[peers.StepsOfZipit]) -> list[peers.StepsOfZipit]:
        return [s.update(own, 1) for s, own in zip(steps, per_space)]

    found[peers.ZIPIT_STEPS] = Peer(each_step, lambda: [peers.StepsOfZipit() for _ in cases])

    def agree(ours: State, theirs: list[Any], name: str) -> None:
        for case, comoment, total, other in zip(cases, ours.comoment, ours.total, theirs):
            if name == "torch.cov":
                peers.close(peers.cov_of(comoment, total, case.samples), other, 1e-4)
            else:
                peers.close(torch.triu(comoment) / case.samples * case.batch, torch.triu(other.outer), 1e-4)

    options = {
        "bytes": math.fsum(c.bytes for c in cases),
        "flops": math.fsum(c.flops for c in cases),
        "rate": rate(dtype, device),
        "repeats": 7,
        "extra": {"dtype": str(dtype)[6:], "batch": batch},
    }
    name = f"ResNet-50, {len(cases)} spaces, {str(dtype)[6:]}"
    return Job(OP, name, Peer(State.update, state.reset), found, agree, options)


@parametrize("case", CUDA, ids=lambda c: c.name)
def test_moments(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    if run.device == "cpu" and case.dtype == torch.float16:
        skip("the half-precision shapes are those of a GPU's autocast features")
    timed(job(case, run.device))


@parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_moments_network(dtype: torch.dtype, run: Run, timed: Callable[[Job], Row]) -> None:
    if run.device == "cpu":
        skip("a whole ResNet-50 takes seconds per call on a CPU; its shapes are above, one by one")
    timed(network(run.device, dtype))


def jobs(device: str) -> Iterator[Job]:
    """Every job of this bench, built when it is its turn (some hold gigabytes)."""
    for case in CUDA if device != "cpu" else CPU:
        yield job(case, device)
    if device != "cpu":
        for dtype in (torch.float32, torch.float16):
            yield network(device, dtype)


if __name__ == "__main__":
    main(jobs)
