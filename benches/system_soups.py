# SPDX-License-Identifier: Apache-2.0
"""The average of checkpoints on disk: files in, one file out, from the page cache.

Beside two loops that users write with safetensors (tensor by tensor in float32; state dict after state dict),
mergekit (``mergekit-pytorch``, method linear) and timm's avg_checkpoints.py, where ZIPFAST_TIMM names a checkout. Ours waits
until its file is on the disk and refuses values that are not finite; the others do neither.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import peers
import soup_cost
import torch
from harness import Job, Peer, guarded
from plan import Planned
from safetensors.torch import load_file, save_file
from torch import Tensor

OP = "soups"


@dataclass(frozen=True)
class Case:
    models: int
    layers: int
    width: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.models} x {self.numbers / 1e6:.1f} M numbers, {kind}"

    @property
    def numbers(self) -> int:
        return sum(map(math.prod, self.shapes().values()))

    @property
    def need(self) -> float:
        """The files lie in the page cache, which counts; and what averages state dicts holds two of them in float64."""
        return self.numbers * (self.models + 4) * self.dtype.itemsize + 24.0 * self.numbers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        with mock.patch.multiple(soup_cost, WIDTH=self.width, LAYERS=self.layers):
            return soup_cost.shapes()


FULL = [Case(8, 12, 384, torch.float32), Case(8, 12, 384, torch.bfloat16)]
QUICK = [Case(3, 2, 64, torch.float32), Case(3, 2, 64, torch.bfloat16)]


def write_models(case: Case, folder: Path) -> list[Path]:
    paths = []
    for i in range(case.models):
        generator = torch.Generator().manual_seed(i)
        tensors = {n: torch.randn(s, generator=generator).to(case.dtype) for n, s in case.shapes().items()}
        paths.append(folder / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    return paths


@contextlib.contextmanager
def silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def by_mergekit(paths: list[Path], folder: Path, dtype: str) -> Peer:
    from mergekit.scripts import merge_raw_pytorch

    config = folder / "mergekit.yml"
    models = "".join(f"  - model: {path}\n    parameters:\n      weight: 1.0\n" for path in paths)
    config.write_text(f"merge_method: linear\nmodels:\n{models}dtype: float32\nout_dtype: {dtype}\n")
    out = folder / "mergekit"

    def call(_: None) -> Path:
        with silent():
            merge_raw_pytorch.main.main([str(config), str(out)], standalone_mode=False)
        return next(iter(sorted(out.glob("*.safetensors"))))

    def forget() -> None:  # a second call would find the files open
        merge_raw_pytorch.SimpleLoaderCache().loaders.clear()

    return Peer(call, forget, "mergekit")


def by_timm(paths: list[Path], folder: Path) -> Peer:
    """Its script's main, in this process."""
    script = Path(os.environ["ZIPFAST_TIMM"]) / "avg_checkpoints.py"
    module = peers.module_of(script, "ZIPFAST_TIMM")
    out = folder / "timm.pth"
    arguments = ["--input", str(paths[0].parent), "--filter", "[0-9]*.safetensors", "--output", str(out), "--no-sort"]

    def call(_: None) -> Path:
        with silent(), mock.patch.object(sys, "argv", [script.name, *arguments]):
            module.main()
        return out

    return Peer(call, lambda: out.unlink(missing_ok=True), "timm")


def read(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def job(case: Case, device: str, use: Collection[str]) -> Job:
    holder = tempfile.TemporaryDirectory(prefix="zipfast-bench-")
    atexit.register(holder.cleanup)
    folder = Path(holder.name)
    paths = write_models(case, folder)
    kind = str(case.dtype).removeprefix("torch.")

    def writes(call: Callable[[list[Path], Path], Any], name: str) -> Callable[[], Path]:
        out = folder / f"{name}.safetensors"

        def run() -> Path:
            call(paths, out)
            return out

        return run

    found = {
        "torch, tensor by tensor": Peer(writes(soup_cost.streamed, "streamed")),
        "torch, state dict after state dict": Peer(writes(soup_cost.whole, "whole")),
    }
    if "mergekit" in use:
        found["mergekit-pytorch, linear"] = guarded(lambda: by_mergekit(paths, folder, kind), "mergekit")
    if "timm" in use:
        found["timm avg_checkpoints"] = guarded(lambda: by_timm(paths, folder), "timm")

    def agree(ours: Path, theirs: Path, name: str) -> None:
        """Within the rounding of the dtype that the slackest of them sums in."""
        a, b = read(ours), read(theirs)
        assert a.keys() == b.keys(), "the files hold other tensors"
        near = 3e-2 if case.dtype == torch.bfloat16 else 1e-5
        for key in a:
            torch.testing.assert_close(a[key].float(), b[key].float(), rtol=near, atol=near)

    size = sum(path.stat().st_size for path in paths)
    options = {"bytes": float(size) * (1 + 1 / case.models), "extra": {"models": case.models}}
    options |= {"repeats": 7, "budget_s": 15.0}
    return Job(OP, case.name, Peer(writes(soup_cost.ours, "ours")), found, agree, options)


def planned(device: str, quick: bool, use: Collection[str]) -> list[Planned]:
    cases = QUICK if quick else FULL
    return [Planned(c.name, c.need, functools.partial(job, c, device, use), inference=False) for c in cases]
