# SPDX-License-Identifier: Apache-2.0
"""A whole merge of two CIFAR ResNets: statistics, matching, weights; as models and data in memory, to a merged network.

The authors' code takes part where ZIPFAST_ZIPIT names its checkout; then ours follows its rules (``compat=True``), both
leave batch-norm statistics as the merge gives them, and the merged networks must be alike: four fifths of their tensors
equal, answers within 20 % of the largest, as the rounding of the authors' float32 sums decides a merge or two. The
forward passes of both models, which no merge can do without, stand beside it as what remains to be gained.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import os
import sys
import types
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import Job, Peer, guarded
from plan import Planned
from torch import Tensor, nn

import zipfast

OP = "zipit"
ALPHA, BETA = 1.0, 1.0
EQUAL, ANSWERS = 0.8, 0.2  # see ``agree``
MOVED = 0.1  # of the standard deviation of the weights
FORWARD = "forward passes of both models"


@dataclass(frozen=True)
class Case:
    depth_n: int
    width: int
    batches: int
    batch: int
    pixels: int = 32

    @property
    def name(self) -> str:
        layers = 6 * self.depth_n + 2
        return f"two ResNet-{layers}, width {self.width}, {self.batches} batches of {self.batch} at {self.pixels}²"

    @property
    def need(self) -> float:
        """Features of a batch in float32, several times over, for each of the blocks; and the moments."""
        features = 16 * self.width * self.batch * self.pixels**2 * 4.0
        return 2 * features * (2 * self.depth_n + 1) + 3 * 60.0 * (2 * 64 * self.width) ** 2 * (2 * self.depth_n)


FULL = [Case(3, 1, 4, 128), Case(3, 4, 2, 64)]
QUICK = [Case(1, 1, 2, 32, 16)]


class ResNet(nn.Module):
    """One of ``zipfast.zoo`` under the names of modules that the public code's graphs know."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        net = zipfast.zoo.resnet(case.depth_n, width=case.width, in_channels=3)
        self.conv1, self.bn1 = net.conv1, net.bn1
        self.layer1, self.layer2, self.layer3 = net.stages
        self.avgpool, self.linear = nn.AdaptiveAvgPool2d(1), net.linear
        for block in net.stages.modules():
            if isinstance(getattr(block, "shortcut", None), nn.Identity):
                block.shortcut = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def networks(case: Case, device: str) -> tuple[list[nn.Module], list[Tensor]]:
    """A network and one that was moved a little from it, whose batch norms have seen data; and the batches.

    Of networks that share nothing, correlations lie so near to each other that the rounding of sums decides on merges.
    """
    torch.manual_seed(0)
    data = [torch.randn(case.batch, 3, case.pixels, case.pixels).to(device) for _ in range(case.batches)]
    first = ResNet(case).to(device)
    found: list[nn.Module] = [first, copy.deepcopy(first)]
    with torch.no_grad():
        for weight in found[1].parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn_like(weight), alpha=MOVED * float(weight.std()))
        for model in found:
            for x in data:
                model(x)
    return [model.eval() for model in found], data


@contextlib.contextmanager
def public() -> Iterator[types.SimpleNamespace]:
    """The authors' modules. What they import for other experiments need not be installed: it is never called here."""
    folder = os.environ["ZIPFAST_ZIPIT"]
    before = set(sys.modules)
    for name, member in (("clip", ""), ("fvcore", ""), ("fvcore.nn", ""), ("fvcore.nn.flop_count", "flop_count")):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            if member:
                setattr(sys.modules[name], member, None)
    if "einops" not in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module("einops")
        sys.modules.setdefault("einops", types.ModuleType("einops"))
    sys.path.insert(0, folder)
    try:
        yield types.SimpleNamespace(
            merger=importlib.import_module("model_merger"), graph=importlib.import_module("graphs.resnet_graph")
        )
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("clip", "fvcore", "einops", "utils", "graphs"):
                del sys.modules[name]


def by_authors(modules: types.SimpleNamespace, models: list[nn.Module], data: list[Tensor], device: str) -> nn.Module:
    """Consumes the models."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        graphs = [modules.graph.resnet20(m).graphify() for m in models]
        merger = modules.merger.ModelMerge(*graphs, device=device)
        target = copy.deepcopy(models[0])
        merger.transform(target, [[(x, None) for x in data]], a=ALPHA, b=BETA)
        for graph in graphs:
            graph.clear_hooks()
    return merger.merged_model.eval()


def job(case: Case, device: str, use: Collection[str]) -> Job:
    models, data = networks(case, device)

    def ours() -> nn.Module:
        options = {"alpha": ALPHA, "beta": BETA, "compat": True, "reestimate": False}
        return zipfast.merge(models, (data[0][:2],), data, **options).module.eval()

    def forward() -> None:
        with torch.no_grad():
            for model in models:
                for x in data:
                    model(x)

    found: dict[str, Peer] = {FORWARD: Peer(forward)}
    if "ZipIt" in use:

        def authors() -> Peer:
            with public() as modules:
                return Peer(
                    lambda own: by_authors(modules, own, data, device), lambda: copy.deepcopy(models), package="ZipIt"
                )

        found["ZipIt"] = guarded(authors, "ZipIt")

    def agree(a: nn.Module, b: Any, name: str) -> None:
        if name == FORWARD:
            return
        one, other = ({k: v for k, v in m.state_dict().items() if v.is_floating_point()} for m in (a, b))
        equal = sum(torch.allclose(one[k], other[k], rtol=1e-3, atol=1e-3) for k in other) / len(other)
        assert equal >= EQUAL, (
            f"{100 * equal:.0f} % of the merged networks' tensors are equal, wanted {100 * EQUAL:.0f}"
        )
        with torch.no_grad():
            x, y = a(data[0]), b(data[0])
        error = float((x - y).abs().max() / y.abs().max())
        assert error < ANSWERS, f"answers of the merged networks differ by {error:.3g} of the largest"

    return Job(OP, case.name, Peer(ours), found, agree, {"repeats": 5, "budget_s": 20.0})


def planned(device: str, quick: bool, use: Collection[str]) -> list[Planned]:
    cases = QUICK if quick else FULL
    return [Planned(c.name, c.need, functools.partial(job, c, device, use), inference=False) for c in cases]
