# SPDX-License-Identifier: Apache-2.0
"""``zip_match``: half of the features of two models merged away, on correlations of synthetic ReLU features.

On a GPU also against our own kernel of one block that makes one merge after the other, with and without budgets, and
all spaces of a ResNet-50 in one call against one call each.

Two rules at α = 0.3, β = 0.125: ``compat`` (the public code's, so that merges can be held against it one by one) and
``strict`` (the default).  The floor is one copy of the matrix.  Timing is one half; the memory beyond the input and the
exponent of growth are the other, as the public loop's O(n³) bytes are what users meet first.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
from harness import ROOT, Job, Peer, Row, Run, main, parametrize, skip
from torch import Tensor

import zipfast

OP = "zip_match"
MODELS, ALPHA, BETA = 2, 0.3, 0.125
SIZES = [256, 512, 1024, 2048, 4096]
REFERENCE_UP_TO = 512
SPACES, SPACE_SIZE = 12, 512
SEQUENTIAL = "sequential"
CUDA_SIZES = [1024, 2048, 4096, 8192]
RESNET50 = {128: 7, 256: 8, 512: 13, 1024: 7, 2048: 1, 4096: 1}  # two models: features of its 37 spaces


@dataclass(frozen=True)
class Case:
    n: int
    compat: bool

    @property
    def name(self) -> str:
        return f"n={self.n} {'compat' if self.compat else 'strict'}"


CASES = [Case(n, compat) for compat in (True, False) for n in SIZES]


def zipit_up_to() -> int:
    return 2048 if os.environ.get("ZIPFAST_BENCH_LONG") == "1" else 1024


def similarity(n: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Exactly symmetric float32 correlations of ReLU features; half of the factors are shared by both models."""
    generator = torch.Generator().manual_seed(1000 * n + seed)
    rank, samples = n // 4, 2 * n
    factors = torch.randn(rank, samples, generator=generator).to(device)
    rows = []
    for _ in range(MODELS):
        mix = torch.randn(n // MODELS, rank, generator=generator).to(device) / math.sqrt(rank)
        noise = torch.randn(n // MODELS, samples, generator=generator).to(device)
        rows.append(torch.relu(mix @ factors + 0.5 * noise - 0.2))
    sim = torch.corrcoef(torch.cat(rows).double()).float()
    upper = torch.triu(sim, 1)
    return (upper + upper.T).fill_diagonal_(1)


def budget_of(n: int) -> int:
    return int((n // 2) // MODELS * BETA + 1e-4)


def match(sim: list[Tensor], compat: bool, path: str = "auto", free: bool = False) -> tuple[Tensor, ...]:
    """``free``: with budgets that nothing can use up."""
    keep = [t.shape[0] // 2 for t in sim]
    budget = [t.shape[0] if free else budget_of(t.shape[0]) for t in sim]
    return zipfast.ops.zip_match(sim, MODELS, keep, budget, ALPHA, compat, path)


def agree(ours: tuple[Tensor, ...], theirs: Any, name: str) -> None:
    if name == peers.ZIPIT:
        if int(ours[3][0, 1]) != -1:
            raise AssertionError("ours reports a deadlock, where the public code's result is undefined")
        peers.same_groups(ours[0], peers.groups_of(theirs[1]))
        return
    for part, (a, b) in zip(("group", "pair", "value", "status"), zip(ours, theirs)):
        if not torch.equal(a, b):
            raise AssertionError(f"'{part}' differs")


def job(case: Case, device: str) -> Job:
    sim = similarity(case.n, device)

    def ours() -> tuple[Tensor, ...]:
        return match([sim], case.compat)

    found = {}
    if case.n <= REFERENCE_UP_TO:
        found[peers.REFERENCE] = Peer(peers.by_reference(ours))
    public = peers.zipit("matching_functions") if case.compat and case.n <= zipit_up_to() else None
    if public is not None:
        # It writes into its argument, hence a fresh clone for each call, made outside the timed region.
        found[peers.ZIPIT] = Peer(
            lambda metric: public.match_tensors_zipit(metric, r=0.5, a=ALPHA, b=BETA),
            lambda: {"cossim": sim.clone()},
            "ZipIt",
        )
    if device != "cpu" and not case.compat:
        found[SEQUENTIAL] = Peer(lambda: match([sim], case.compat, SEQUENTIAL))
    extra = {"budget": budget_of(case.n), "merges": case.n // 2, "lifted": int(ours()[3][0, 0])}
    options = {"bytes": 2.0 * sim.numel() * sim.element_size(), "budget_s": 6.0, "extra": extra}
    return Job(OP, case.name, Peer(ours), found, agree, options, annotate if case.n == max(SIZES) else None)


def list_job(device: str) -> Job:
    """Twelve spaces in one call against twelve calls, with all threads, as the spaces are what is shared out."""
    sims = [similarity(SPACE_SIZE, device, seed) for seed in range(SPACES)]

    def each() -> tuple[Tensor, ...]:
        return tuple(torch.cat(part) for part in zip(*[match([t], False) for t in sims]))

    options = {
        "bytes": 2.0 * sum(t.numel() * t.element_size() for t in sims),
        "threads": os.cpu_count() or 1,
        "extra": {"spaces": SPACES},
    }
    name = f"{SPACES} spaces of n={SPACE_SIZE} strict, one call"
    return Job(OP, name, Peer(lambda: match(sims, False)), {f"{SPACES} calls": Peer(each)}, agree, options)


def free_job(n: int, device: str) -> Job:
    """With budgets that never run out, rounds on the whole GPU against one block that makes one merge after the other."""
    sim = similarity(n, device)
    found = {SEQUENTIAL: Peer(lambda: match([sim], False, SEQUENTIAL, True))}
    options = {"bytes": 2.0 * sim.numel() * sim.element_size(), "extra": {"merges": n // 2}}
    return Job(OP, f"n={n} no budget", Peer(lambda: match([sim], False, "rounds", True)), found, agree, options)


def network_job(device: str) -> Job:
    """All spaces of a ResNet-50 in one call against one call each."""
    sims = [similarity(n, device, seed) for n, times in RESNET50.items() for seed in range(times)]

    def each(path: str) -> tuple[Tensor, ...]:
        return tuple(torch.cat(part) for part in zip(*[match([t], False, path) for t in sims]))

    found = {
        f"{len(sims)} calls": Peer(lambda: each("rounds")),
        SEQUENTIAL: Peer(lambda: match(sims, False, SEQUENTIAL)),
    }
    options = {
        "bytes": 2.0 * sum(t.numel() * t.element_size() for t in sims),
        "extra": {"spaces": len(sims)},
    }
    return Job(OP, f"ResNet-50, {len(sims)} spaces", Peer(lambda: match(sims, False)), found, agree, options)


def cuda_jobs(device: str) -> list[Callable[[], Job]]:
    return [*(functools.partial(free_job, n, device) for n in CUDA_SIZES), functools.partial(network_job, device)]


# ---------------------------------------------------------------------------------------------------- memory and growth


def high_water() -> int:
    """Peak resident bytes of this process since the last ``reset_high_water``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def reset_high_water() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def print_memory(n: int) -> None:
    """In a process of its own: nothing that was freed before can serve the measured call, nor hide in an older peak."""
    torch.set_num_threads(1)
    match([similarity(64)], True)
    sim = similarity(n)
    reset_high_water()
    before = high_water()
    match([sim], True)
    print(json.dumps({"extra_bytes": high_water() - before, "input_bytes": sim.numel() * sim.element_size()}))


def memory(n: int) -> dict[str, int]:
    out = subprocess.run(
        [sys.executable, __file__, "--memory", str(n)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return json.loads(out.stdout.splitlines()[-1])


def cuda_memory(n: int, device: str) -> dict[str, int]:
    sim = similarity(n, device)
    match([sim], True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    match([sim], True)
    extra = torch.cuda.max_memory_allocated() - before
    return {"extra_bytes": extra, "input_bytes": sim.numel() * sim.element_size()}


def annotate(run: Run, row: Row) -> None:
    """Adds peak memory and, where a smaller case of the same rule was measured, the exponent of growth, to a row."""
    n = max(SIZES)
    row.extra |= memory(n) if run.device == "cpu" else cuda_memory(n, run.device)
    row.extra["extra_over_input"] = row.extra["extra_bytes"] / row.extra["input_bytes"]
    rule = row.case.split()[-1]
    small = next((r for r in run.rows if r.op == OP and r.case == f"n=1024 {rule}"), None)
    if small is not None:
        row.extra["growth_exponent"] = math.log(row.ours["ms"] / small.ours["ms"]) / math.log(n / 1024)


@parametrize("case", CASES, ids=lambda c: c.name)
def test_zip_match(case: Case, run: Run, timed: Callable[[Job], Row]) -> None:
    timed(job(case, run.device))


def test_zip_match_list(run: Run, timed: Callable[[Job], Row]) -> None:
    timed(list_job(run.device))


@parametrize("number", range(len(CUDA_SIZES) + 1))
def test_zip_match_cuda(number: int, run: Run, timed: Callable[[Job], Row]) -> None:
    if run.device == "cpu":
        skip("compares CUDA kernels")
    timed(cuda_jobs(run.device)[number]())


def jobs(device: str) -> Iterator[Job]:
    for case in CASES:
        yield job(case, device)
    yield list_job(device)
    if device != "cpu":
        for make in cuda_jobs(device):
            yield make()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        print_memory(int(sys.argv[2]))
    else:
        main(jobs)
