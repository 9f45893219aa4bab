# SPDX-License-Identifier: Apache-2.0
"""Which cases ``zipfast bench`` measures of each op, at full size and quick, and what memory a case needs.

The cases are those of bench_<op>.py, and those of rivals.py, where other packages take part. A need is an estimate from
above, in bytes: inputs, results and what the hungriest peer holds besides, at once.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from harness import Job

PROCESS = 400 << 20  # torch, the cache-flushing buffer, the ceilings' inputs
Make = Callable[[], Job]


@dataclass(frozen=True)
class Planned:
    """A case that can be built when it is its turn. ``inference``: built and measured in inference mode."""

    case: str
    need: float
    make: Make
    inference: bool = True


def models_bytes(bench: ModuleType, models: int, width: int, itemsize: int) -> float:
    """That of ``models`` transformers of a width."""
    return float(models * itemsize * sum(map(math.prod, bench.transformer(width))))


def shapes_bytes(shapes: list[tuple[int, ...]], tensors: int) -> float:
    return float(4 * tensors * sum(map(math.prod, shapes)))


def blend() -> ModuleType:
    """Whose transformers other benches of soups use, too."""
    return importlib.import_module("bench_blend")


NEED: dict[str, Callable[[ModuleType, Any], float]] = {
    # peers hold the features as float32 rows, several times over
    "moments": lambda b, c: 10 * 4.0 * c.samples * c.features + 60.0 * c.features**2,
    "correlate": lambda b, c: sum(60.0 * n**2 for n in c.features),
    "zip_match": lambda b, c: 90.0 * c.n**2,
    "regroup": lambda b, c: 9 * 4 * 16.0 * c.channels**2,
    "evidence": lambda b, c: 8.0 * (20 * c.k * c.outputs + 4 * c.k**2 * c.tridiagonal),
    "blend": lambda b, c: models_bytes(b, b.MODELS + 6, c.width, 4),
    "multidot": lambda b, c: models_bytes(blend(), c.models + 4, c.width, 4),
    "gram": lambda b, c: 1.5 * models_bytes(blend(), c.models + 1, c.width, 4),
    "threshold": lambda b, c: shapes_bytes(b.transformer() if c.large else b.resnet(c.width), 12),
    "masked_step": lambda b, c: shapes_bytes(c.shapes, 24),
    "apply_mask": lambda b, c: shapes_bytes(b.resnet18(c.width), 10),
    "sparse_linear": lambda b, c: 40.0 * c.out * c.columns,
    "mlp_steps": lambda b, c: 64e6 + 16.0 * b.ROWS * c.pixels,
}

QUICK: dict[str, Callable[[ModuleType], list[Any]]] = {
    "moments": lambda b: [b.Case(16, 32, 8), b.Case(256, 7, 16)],
    "correlate": lambda b: [b.Case("F=256", (256,))],
    "zip_match": lambda b: [b.Case(128, True), b.Case(128, False)],
    "regroup": lambda b: [b.Case(64, "merge"), b.Case(64, "unmerge")],
    "evidence": lambda b: [b.Case(128, 10), b.Case(128, 10, mode=b.EXACT), b.Case(128, 10, tridiagonal=True)],
    "blend": lambda b: [b.Case(torch.float32, 64, ", width 64")],
    "multidot": lambda b: [b.Case(torch.float32, 4, 64, ", width 64")],
    "gram": lambda b: [b.Case(4, 64, ", width 64")],
    "threshold": lambda b: [b.Case(0.2, width=16), b.Case(0.2, alive=0.2, width=16)],
    "masked_step": lambda b: [b.Case("sgd", 0.2, width=16), b.Case("adam", 0.2, width=16)],
    "apply_mask": lambda b: [b.Case(0.2, False, 16), b.Case(0.2, True, 16)],
    "sparse_linear": lambda b: [b.Case(512, 512, 90, 8), b.Case(512, 512, 90, 64, True)],
    "mlp_steps": lambda b: [b.Case(64, 0.2)],
}


def full(bench: ModuleType, device: str) -> list[Any]:
    """The cases of a bench that a device is measured on."""
    if torch.device(device).type == "cpu":
        return {"moments": lambda: bench.CPU, "correlate": lambda: bench.CASES["cpu"]}.get(
            bench.OP, lambda: bench.CASES
        )()
    if bench.OP == "moments":
        return bench.CUDA
    if bench.OP == "correlate":
        return bench.CASES["cuda"]
    if bench.OP == "threshold":
        return bench.cases(device)
    return [*bench.CASES, *getattr(bench, "CUDA_CASES", [])]


def more(bench: ModuleType, device: str) -> list[Planned]:
    """Jobs of a bench that no single case stands for."""
    found: list[Planned] = []
    gpu = torch.device(device).type != "cpu"
    if bench.OP == "zip_match":
        name, n = f"{bench.SPACES} spaces of n={bench.SPACE_SIZE}", bench.SPACE_SIZE
        found.append(Planned(name, 90.0 * n**2 + 12.0 * bench.SPACES * n**2, functools.partial(bench.list_job, device)))
        if gpu:
            sizes = [*bench.CUDA_SIZES]
            found += [Planned(f"n={n}", 90.0 * n**2, functools.partial(bench.free_job, n, device)) for n in sizes]
            found.append(Planned("ResNet-50", 4e9, functools.partial(bench.network_job, device)))
    if gpu and bench.OP == "moments":
        for dtype in (torch.float32, torch.float16):
            found.append(Planned(f"ResNet-50 {dtype}", 24e9, functools.partial(bench.network, device, dtype)))
    if gpu and bench.OP == "evidence":
        for case in bench.WHOLE:
            need = 8.0 * 4 * case.features * (3 * case.features + 3 * case.outputs)
            found.append(Planned(case.name, need, functools.partial(bench.whole_job, case, device)))
    if gpu and bench.OP == "sparse_linear":
        for case in bench.DECODE:
            need = 40.0 * case.out * case.columns + 4 * bench.ROTATED
            found.append(Planned(case.name, need, functools.partial(bench.decode_job, case, device)))
    return found


def outside(make: Make) -> Make:
    """Builds outside of inference mode, for a job whose peers train."""

    def build() -> Job:
        with torch.inference_mode(False):
            return make()

    return build


def of_op(op: str, device: str, quick: bool, use: Collection[str]) -> list[Planned]:
    """The cases of an op, small ones first."""
    import rivals

    bench = importlib.import_module(f"bench_{op}")
    trains = op == "mlp_steps"
    found = []
    for case in QUICK[op](bench) if quick else full(bench, device):
        make: Make = functools.partial(bench.job, case, device)
        found.append(Planned(case.name, NEED[op](bench, case), outside(make) if trains else make))
    found += [] if quick else more(bench, device)
    return found + rivals.of_op(op, device, quick, use)


def of(target: str, device: str, quick: bool, use: Collection[str]) -> list[Planned]:
    """The cases of an op or a system beside those peers that are in ``use``."""
    import offers

    if target in offers.SYSTEMS:
        system = importlib.import_module(f"system_{target}")
        return system.planned(device, quick, use)
    return of_op(target, device, quick, use)
