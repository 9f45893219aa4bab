# SPDX-License-Identifier: Apache-2.0
"""What averaging k checkpoints on disk costs beside the physical limit: every byte read once, the result written once.

Eight files with the shapes of a ViT-B/32 at half width (22 M numbers), from the page cache, one thread; pairs A B A B
against the limit (reading all files into one buffer and writing one, to the disk), a torch loop that streams tensors with
safetensors and sums in float32, and one that loads state dicts one after the other. Ours and the limit wait until the file
is on the disk, the others do not. Memory is that of a process of its own.

``python benches/soup_cost.py`` writes soup_cost.json into the results; `report.py` puts it on the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import bench_threads, commit, machine, results_folder, spread, threads, write_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zipfast

WIDTH, LAYERS, MODELS = 384, 12, 8
CASES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shapes() -> dict[str, tuple[int, ...]]:
    """A transformer's list of tensors, large and small."""
    found: dict[str, tuple[int, ...]] = {"patch.weight": (WIDTH, 3, 32, 32), "position": (50, WIDTH), "class": (WIDTH,)}
    for i in range(LAYERS):
        for name, rows in (("qkv", 3 * WIDTH), ("out", WIDTH), ("fc1", 4 * WIDTH)):
            found[f"{i}.{name}.weight"], found[f"{i}.{name}.bias"] = (rows, WIDTH), (rows,)
        found[f"{i}.fc2.weight"], found[f"{i}.fc2.bias"] = (WIDTH, 4 * WIDTH), (WIDTH,)
        for norm in ("norm1", "norm2"):
            found[f"{i}.{norm}.weight"], found[f"{i}.{norm}.bias"] = (WIDTH,), (WIDTH,)
    return found


def write_models(folder: Path, dtype: torch.dtype) -> list[Path]:
    paths = []
    for i in range(MODELS):
        generator = torch.Generator().manual_seed(i)
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes().items()}
        paths.append(folder / f"{i}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def limit(paths: list[Path], out: Path) -> None:
    """Read every byte into a buffer, write one file's."""
    buffer = bytearray(4 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    size = paths[0].stat().st_size
    with open(out, "wb", buffering=0) as file:
        for start in range(0, size, len(buffer)):
            file.write(memoryview(buffer)[: min(len(buffer), size - start)])
        os.fsync(file.fileno())


def streamed(paths: list[Path], out: Path) -> None:
    """Tensor by tensor, summed in float32."""
    files = [safe_open(path, framework="pt") for path in paths]
    result = {}
    for name in files[0].keys():  # noqa: SIM118  (it is no dict)
        first = files[0].get_tensor(name)
        total = first.float() * (1 / len(files))
        for file in files[1:]:
            total.add_(file.get_tensor(name).float(), alpha=1 / len(files))
        result[name] = total.to(first.dtype)
    save_file(result, out)


def whole(paths: list[Path], out: Path) -> None:
    """State dict after state dict, as scripts do."""
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        state = load_file(path)
        for name, value in state.items():
            part = value * (1 / len(paths))
            total[name] = total[name] + part if name in total else part
    save_file(total, out)


def ours(paths: list[Path], out: Path) -> None:
    zipfast.uniform_soup(paths, out=out)


PEERS: dict[str, Callable[[list[Path], Path], None]] = {
    "limit": limit,
    "torch, streamed": streamed,
    "torch, whole": whole,
}


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure(name: str, pairs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        paths, out, other = write_models(folder, CASES[name]), folder / "ours.safetensors", folder / "other.safetensors"
        ours(paths, out)
        streamed(paths, other)
        a, b = load_file(out), load_file(other)
        for key in a:  # the loop rounds another sum: the last bit may differ
            torch.testing.assert_close(a[key], b[key], rtol=1e-2 if name == "bfloat16" else 1e-5, atol=1e-6)
        times: dict[str, list[float]] = {"ours": []} | {peer: [] for peer in PEERS}
        for _ in range(pairs):
            for peer, call in PEERS.items():
                times["ours"].append(seconds(lambda: ours(paths, out)))
                times[peer].append(seconds(lambda call=call: call(paths, other)))
        own = subprocess.run(
            [sys.executable, __file__, "--memory", *map(str, paths)], capture_output=True, text=True, check=True
        )
        size = sum(path.stat().st_size for path in paths)
    middle = {key: spread(value)[0] for key, value in times.items()}
    return {"dtype": name, "models": MODELS, "input_mb": size / 2**20, "seconds": middle, **json.loads(own.stdout)}


def memory(paths: list[str]) -> dict[str, float]:
    """MB that the process takes, at its peak, beyond what it had before."""

    def peak() -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        ours([Path(path) for path in paths], Path(folder) / "out.safetensors")
    return {"before_mb": before, "peak_mb": peak()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory", nargs="+", metavar="FILE", help="average these and print this process's memory")
    options = parser.parse_args()
    with threads(bench_threads()):
        if options.memory:
            print(json.dumps(memory(options.memory)))
            return
        result: dict[str, Any] = {
            "what": "soup_cost",
            "machine": machine("cpu"),
            "commit": commit(),
            "pairs": options.pairs,
        }
        result["rows"] = [measure(name, options.pairs) for name in CASES]
    write_json(results_folder() / "soup_cost.json", result)
    print(json.dumps(result["rows"], indent=1))


if __name__ == "__main__":
    main()
