# SPDX-License-Identifier: Apache-2.0
"""The benches' CUDA cases without a GPU: every job built and measured once, small, on the CPU; its times mean nothing.

A slip in a case that only a GPU would meet shows here: ``jobs("cuda")`` of a bench runs as it stands, while "cuda" means
the CPU, sizes are cut by the names that the benches give them, and a tensor that is still large is refused.  Goals
(goals.py) whose case or peer no job has are named, too.

    python benches/rehearse.py [--goals] ceilings moments blend ...
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import ceilings
import goals
import torch
from harness import Clock, Job, Peer, Run
from torch.overrides import TorchFunctionMode

MOST = 1 << 21  # elements of a tensor in a rehearsal
# What a size is called in a bench -> the most that it may be here; of a case's fields and of a module's constants.
FIELDS = {
    "channels": 6,
    "side": 3,
    "batch": 8,
    "features": 64,
    "n": 64,
    "k": 128,
    "outputs": 5,
    "out": 48,
    "columns": 96,
    "samples": 200,
}
SHAPES = [(16, 3, 3, 3), (40,), (24, 16), (7,)]
CONSTANTS: dict[str, Any] = {"SIZES": [48, 64], "SPACE_SIZE": 64, "SPACES": 3, "ROTATED": 1 << 16}
SHAPE_FUNCTIONS = ("resnet18", "resnet", "transformer")


class TooLarge(AssertionError):
    """A case whose sizes are not cut by the tables above."""


class OnCpu(TorchFunctionMode):
    """Whatever asks for "cuda" gets the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.device:  # its type is looked at: benches ask it which cases there are
            return function(*args, **(kwargs or {}))
        args = tuple(here(a) for a in args)
        kwargs = {name: here(value) for name, value in (kwargs or {}).items()}
        wide = kwargs.pop("out_dtype", None)
        if wide is not None:  # a library's product of halves with float32 sums, which only a GPU has
            args = tuple(a.to(wide) if isinstance(a, torch.Tensor) else a for a in args)
        found = function(*args, **kwargs)
        if isinstance(found, torch.Tensor) and found.numel() > MOST:
            raise TooLarge(
                f"{function.__name__} makes a tensor of shape {list(found.shape)}; say in rehearse.py what to cut"
            )
        return found


def here(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """A torch without a GPU that lets benches believe in one."""

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, here(device))

    nothing = {name: lambda *a, **k: None for name in ("synchronize", "reset_peak_memory_stats", "empty_cache")}
    zero = {name: lambda *a, **k: 0 for name in ("memory_allocated", "max_memory_allocated")}
    properties = SimpleNamespace(total_memory=1 << 30, L2_cache_size=1 << 20, multi_processor_count=2, major=9, minor=0)
    with contextlib.ExitStack() as stack:
        for name, stand_in in (nothing | zero).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *a: properties))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(OnCpu())
        yield


class Untimed(Clock):
    """A clock that only calls."""

    def __init__(self) -> None:
        self.cuda = False

    def time(self, peer: Peer) -> float:
        peer.call()
        return 1e-3


def smaller(case: Any) -> Any:
    """A case with its sizes cut."""
    if not dataclasses.is_dataclass(case):
        return case

    def cut(value: Any, most: int) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(v, most) for v in value)
        return min(value, most) if isinstance(value, int) and not isinstance(value, bool) else value

    own = [f.name for f in dataclasses.fields(case) if f.init and f.name in FIELDS]
    return dataclasses.replace(case, **{name: cut(getattr(case, name), FIELDS[name]) for name in own})


def with_smaller_case(make: Callable[..., Any], parameter: str) -> Callable[..., Any]:
    """A function from a case, or from a size, to a job, which keeps the name that the goals know."""

    def job(case: Any, *more: Any, **options: Any) -> Any:
        size = parameter in FIELDS
        small = min(case, FIELDS[parameter]) if size else smaller(case)
        made = make(small, *more, **options)
        if not isinstance(made, Job) or not (size or hasattr(case, "name")):
            return made
        short, full = (str(small), str(case)) if size else (small.name, case.name)
        return dataclasses.replace(made, case=re.sub(rf"(?<!\w){re.escape(short)}(?!\w)", lambda m: full, made.case))

    return job


def shrink(bench: ModuleType) -> None:
    """Cuts the sizes of a bench: fields of its cases, its constants, its lists of shapes."""
    for name, make in list(vars(bench).items()):
        if name.endswith("job") and inspect.isfunction(make):
            first = next(iter(inspect.signature(make).parameters), "")
            if first == "case" or first in FIELDS:
                setattr(bench, name, with_smaller_case(make, first))
    others = [m for name, m in sys.modules.items() if name.startswith("bench_")]  # those that it took functions from
    for module in others:
        for name in SHAPE_FUNCTIONS:
            if hasattr(module, name):
                setattr(module, name, lambda *a: list(SHAPES))
    for name, value in CONSTANTS.items():
        if hasattr(bench, name):
            setattr(bench, name, value)
    if hasattr(bench, "RESNET50"):
        spaces = bench.RESNET50
        bench.RESNET50 = (  # as many spaces as there are
            {16 + 2 * i: times for i, times in enumerate(spaces.values())}
            if isinstance(spaces, dict)
            else [(min(c, 4), min(s, 3), times) for c, s, times in spaces]
        )


def rehearse(op: str) -> list[Job]:
    """Runs each CUDA job of a bench once; the jobs, without what they held."""
    bench = importlib.import_module(f"bench_{op}")
    shrink(bench)
    made_up = [ceilings.row(name, 1e12, "flop/s", None, "made up") for name in ("fp32", "tf32", "fp16", "fp64")]
    run = Run("cpu", [ceilings.row("copy", 1e12, "B/s", None, "made up"), *made_up])
    run.device, run.clock = "cuda", Untimed()
    seen = []
    with torch.inference_mode(), pretended():
        for job in bench.jobs("cuda"):
            print(f"{op} {job.case}: {', '.join(job.peers) or 'no peer'}", flush=True)
            job.options["repeats"] = 1
            run.measure(job)
            seen.append(dataclasses.replace(job, ours=Peer(int), peers={n: Peer(int) for n in job.peers}, agree=None))
    if not seen:
        raise AssertionError(f"bench_{op}.jobs('cuda') has no job")
    return seen


def unserved(op: str, jobs: list[Job]) -> list[str]:
    """The goals of an op that no job can answer."""
    rows = [{"case": job.case, "peers": {name: {"ratio": 1.0} for name in job.peers}} for job in jobs]
    found = []
    for goal in goals.GOALS:
        if goal.op != op:
            continue
        fit = goals.cases(goal, rows)
        if len(fit) != 1:
            found.append(f"{op}: {len(fit)} cases are called {goal.case!r}")
        elif goal.quantity == "ratio" and not goals.peers(goal, fit[0]):
            if goal.peer == goals.PUBLIC and not os.environ.get("ZIPFAST_ZIPIT"):
                print(f"{goal.case}: the public code takes part where ZIPFAST_ZIPIT names its checkout")
            else:
                found.append(
                    f"{op}: case {goal.case!r} has no peer {goal.peer[0]!r}, only {', '.join(fit[0]['peers'])}"
                )
    return found


def rehearse_ceilings() -> None:
    with pretended():
        for skinny in (True, False):
            rows = ceilings.measure("cuda", eigh=True, quick=True, skinny=skinny, clock=Untimed())
    print(f"ceilings: {', '.join(r['name'] for r in rows)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="ceilings, or ops that have a bench")
    options = parser.parse_args()
    missing = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RESULTS"] = folder  # what is written here is no measurement
        for name in options.names:
            if name == "ceilings":
                rehearse_ceilings()
            else:
                missing += unserved(name, rehearse(name))
    for sentence in dict.fromkeys(missing):
        print(f"goal without a case: {sentence}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
