# SPDX-License-Identifier: Apache-2.0
"""``threshold``: the fifth of smallest magnitude dropped from a ResNet-18, 21 tensors of 11.7 M weights, over all of them;
on a GPU also from the 49 tensors of a transformer of 100 M weights.

Peers drop the same from one-byte or float masks: ``torch.nn.utils.prune.global_unstructured`` on fresh modules; what
research code does, all survivors in one numpy array, sorted, and every tensor compared with the entry of rank k (which it
drops too, so that one more is gone); ``kthvalue`` and a stable ``argsort`` on one vector; and the reference.  The floor is
reading the weights once and writing a bit each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import peers
import torch
from harness import Job, Peer, Row, Run, main, parametrize, skip
from torch import Tensor
from torch.nn.utils import prune

import zipfast

OP = "threshold"
SORTED = "numpy sort"
KTH = "kthvalue"


@dataclass(frozen=True)
class Case:
    share: float  # dropped, of the survivors
    dtype: torch.dtype = torch.float32
    alive: float = 1.0  # before
    large: bool = False  # 100 M weights, for a GPU
    width: int = 64  # of the first convolution

    @property
    def name(self) -> str:
        before = f" of {self.alive:.0%} alive" if self.alive < 1 else ""
        network = "100M" if self.large else "ResNet-18" + (f" of width {self.width}" if self.width != 64 else "")
        return f"{network}, {self.share:.0%} dropped{before}, {str(self.dtype).removeprefix('torch.')}"


CASES = [Case(0.2), Case(0.9), Case(0.2, alive=0.2), Case(0.2, torch.bfloat16)]
LARGE = [Case(0.2, large=True)]


def cases(device: str) -> list[Case]:
    return CASES if torch.device(device).type == "cpu" else CASES + LARGE


def resnet(first: int = 64) -> list[tuple[int, ...]]:
    """Shapes of the weights of the convolutions and the head of a ResNet-18."""
    shapes: list[tuple[int, ...]] = [(first, 3, 7, 7), *[(first, first, 3, 3)] * 4]
    for width in (2 * first, 4 * first, 8 * first):
        half = width // 2
        shapes += [(width, half, 3, 3), (width, width, 3, 3), (width, half, 1, 1), *[(width, width, 3, 3)] * 2]
    return [*shapes, (1000, 8 * first)]


def transformer() -> list[tuple[int, ...]]:
    """Shapes of the matrices of twelve blocks of width 768 and an embedding."""
    block = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    return [(19712, 768), *block * 12]


def weights(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Each tensor at the scale of its fan-in."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(s, generator=generator, device=device).mul_((2 / (np.prod(s[1:]))) ** 0.5).to(dtype) for s in shapes
    ]


def bits(kept: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Flat bool masks of packed ones."""
    place = torch.arange(8, dtype=torch.uint8, device=kept[0].device)
    return [((k[:, None] >> place) & 1).reshape(-1)[: t.numel()].bool() for k, t in zip(kept, like)]


def job(case: Case, device: str) -> Job:
    x = weights(transformer() if case.large else resnet(case.width), case.dtype, device)
    group, total = [0] * len(x), sum(t.numel() for t in x)
    before: list[Tensor] = []
    if case.alive < 1:
        before, _ = zipfast.ops.threshold(x, [], [round(total * (1 - case.alive))], group)
    alive = bits(before, x) if before else [torch.ones(t.numel(), dtype=torch.bool, device=device) for t in x]
    dense = [a.view(t.shape).to(t.dtype) for a, t in zip(alive, x)]
    drop = round(sum(int(a.sum()) for a in alive) * case.share)

    def packed() -> list[Tensor]:
        return zipfast.ops.threshold(x, before, [drop], group)[0]

    def modules() -> list[tuple[torch.nn.Module, str]]:
        found = []
        for t, m in zip(x, dense):
            module = torch.nn.Module()
            module.register_parameter("weight", torch.nn.Parameter(t.clone()))
            if before:
                prune.custom_from_mask(module, "weight", m)
            found.append((module, "weight"))
        return found

    def torch_prune(found: list[tuple[torch.nn.Module, str]]) -> list[Tensor]:
        prune.global_unstructured(found, pruning_method=prune.L1Unstructured, amount=drop)
        return [module.weight_mask for module, _ in found]

    def by_sorting() -> list[Tensor]:
        weight = [t.cpu().numpy() for t in x]
        mask = [m.cpu().numpy() for m in dense]
        every = np.concatenate([w[m == 1] for w, m in zip(weight, mask)])
        least = np.sort(np.abs(every))[drop]
        return [torch.from_numpy(np.where(np.abs(w) > least, m, np.zeros_like(w))) for w, m in zip(weight, mask)]

    def by_kthvalue() -> list[Tensor]:
        every = (
            torch.cat([t.reshape(-1)[a] for t, a in zip(x, alive)]) if before else torch.cat([t.flatten() for t in x])
        )
        least = every.abs().kthvalue(drop).values
        return [(t.abs() > least) & m.bool() for t, m in zip(x, dense)]

    def agree(ours: list[Tensor], theirs: list[Tensor], name: str) -> None:
        if name == peers.REFERENCE:
            assert all(map(torch.equal, ours, theirs)), "masks differ from the reference"
            return
        # Peers may take other ones of equal magnitude, or all of them, or one more: of one magnitude, and no other.
        differ = [a != b.reshape(-1).bool().to(a.device) for a, b in zip(bits(ours, x), theirs, strict=True)]
        odd = torch.cat([t.reshape(-1)[d].abs() for t, d in zip(x, differ)])
        assert odd.unique().numel() <= 1, f"{odd.numel()} weights of several magnitudes"

    found = {"prune.global_unstructured": Peer(torch_prune, modules, "torch.nn.utils.prune"), KTH: Peer(by_kthvalue)}
    if case.dtype == torch.float32 and not case.large:  # ten seconds for 100 M
        found[SORTED] = Peer(by_sorting, package="numpy")
    if case is CASES[0]:  # it sorts twice
        found[peers.REFERENCE] = Peer(peers.by_reference(packed))
    size = float(sum(t.numel() * t.element_size() for t in x)) + total / 8 * (2 if before else 1)
    return Job(OP, case.name, Peer(packed), found, agree, {"bytes": size, "extra": {"weights": total, "dropped": drop}})


@parametrize("case", CASES + LARGE, ids=lambda c: c.name)
def test_threshold(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    if case not in cases(run.device):
        skip("100 M weights are for a GPU")
    timed(job(case, run.device))


def jobs(device: str) -> Iterator[Job]:
    for case in cases(device):
        yield job(case, device)


if __name__ == "__main__":
    main(jobs)
