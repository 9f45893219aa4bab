# SPDX-License-Identifier: Apache-2.0
"""The machine's ceilings: copy and read bandwidth, GEMM rates, symmetric eigensolver.

They are measured in the run of the benches, at its beginning and its end, and each is the best that was seen: a ceiling
is what the machine *can* do.  A row: name, value, unit ("B/s", "flop/s" or
"s"), threads (None where threads mean nothing).  Copies count bytes read plus bytes written.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Clock, Peer, Run, as_peer, bench_threads, results_folder, threads
from peers import fp32_precision

OP = "ceilings"
Ceiling = dict[str, Any]


def best(clock: Clock, call: Callable[[], Any], runs: int = 5) -> float:
    """Seconds of the fastest of ``runs`` cold runs, after a warm-up."""
    peer: Peer = as_peer(call)
    peer.call()
    return min(clock.time(peer) for _ in range(runs))


def measure(
    device: str = "cpu", *, eigh: bool = False, quick: bool = False, skinny: bool = True, clock: Clock | None = None
) -> list[Ceiling]:
    """All ceilings of a device.

    ``quick`` shrinks every size (for tests), ``eigh`` adds the eigensolver; without ``skinny`` only what the rows of the
    benches are held against, for the second measurement of a run on a GPU.
    """
    clock = clock or Clock(device)
    if torch.device(device).type == "cuda":
        return measure_cuda(device, clock, eigh, quick, skinny)
    return measure_cpu(clock, eigh, quick)


def row(name: str, value: float, unit: str, count: int | None, detail: str) -> Ceiling:
    return {"name": name, "value": value, "unit": unit, "threads": count, "detail": detail}


def bandwidth(clock: Clock, device: str, size: int, count: int | None) -> list[Ceiling]:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / best(clock, lambda: target.copy_(source))
    read = size / best(clock, lambda: source.amax())
    detail = f"{size >> 20} MiB, float32"
    return [row("copy", copy, "B/s", count, detail), row("read", read, "B/s", count, detail)]


def gemm(clock: Clock, name: str, n: int, dtype: torch.dtype, device: str, count: int | None, **mm: Any) -> Ceiling:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return row(name, 2 * n**3 / best(clock, lambda: torch.mm(a, b, **mm)), "flop/s", count, f"torch.mm, {n}^3")


def eigensolver(clock: Clock, device: str, sizes: tuple[int, ...], count: int | None) -> list[Ceiling]:
    rows = []
    for n in sizes:
        for dtype in (torch.float64, torch.float32):
            x = torch.randn(n, 2 * n, device=device, dtype=dtype)
            gram = x @ x.T
            for name, call in (("eigh", torch.linalg.eigh), ("eigvalsh", torch.linalg.eigvalsh)):
                seconds = best(clock, partial(call, gram), runs=2)
                rows.append(row(f"{name} {str(dtype)[6:]} D={n}", seconds, "s", count, "torch.linalg"))
    return rows


def measure_cpu(clock: Clock, eigh: bool, quick: bool) -> list[Ceiling]:
    rows = []
    everything = os.cpu_count() or 1
    n = 128 if quick else 2048
    for count in sorted({1, bench_threads(), everything}):
        with threads(count):
            rows += bandwidth(clock, "cpu", (1 if quick else 256) << 20, count)
            rows.append(gemm(clock, "fp32", n, torch.float32, "cpu", count))
            rows.append(gemm(clock, "fp64", n // 2, torch.float64, "cpu", count))
            if eigh:
                rows += eigensolver(clock, "cpu", (64,) if quick else (512, 1024), count)
    return rows


COPIED = 2048 << 20  # bytes read, and as many written
SIDE = 4096  # of the square products; the smallest, float16 into float32, moves 8 bytes for each of SIDE² places


def beyond_cache(device: str) -> None:
    """A ceiling is one of the memory only if nothing that it moves is in the L2 already."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if min(COPIED, 8 * SIDE**2) < 2 * cache:
        raise RuntimeError(f"ceilings: buffers must be larger than twice the L2 of {device}, {cache >> 20} MiB")


def measure_cuda(device: str, clock: Clock, eigh: bool, quick: bool, skinny: bool = True) -> list[Ceiling]:
    n = 256 if quick else SIDE
    if not quick:
        beyond_cache(device)
    rows = bandwidth(clock, device, 4 << 20 if quick else COPIED, None)
    with fp32_precision("ieee"):
        rows.append(gemm(clock, "fp32", n, torch.float32, device, None))
    with fp32_precision("tf32"):
        rows.append(gemm(clock, "tf32", n, torch.float32, device, None))
    rows.append(gemm(clock, "fp16", n, torch.float16, device, None, out_dtype=torch.float32))
    rows.append(gemm(clock, "fp64", n, torch.float64, device, None))
    # Skinny products, as moments would ask a library for them: [n, K] x [K, n] with a long K.
    sides = (64, 128, 256, 512) if skinny else ()
    for m in sides[:1] if quick else sides:
        k = 4096 if quick else 200_000
        x, half = torch.randn(m, k, device=device), torch.randn(m, k, device=device).half()
        for name, precision in (("fp32", "ieee"), ("tf32", "tf32")):
            with fp32_precision(precision):
                seconds = best(clock, partial(torch.mm, x, x.T))
            rows.append(row(f"{name} skinny n={m}", 2 * m * m * k / seconds, "flop/s", None, f"X X^T, K={k}"))
        seconds = best(clock, partial(torch.mm, half, half.T, out_dtype=torch.float32))
        rows.append(row(f"fp16 skinny n={m}", 2 * m * m * k / seconds, "flop/s", None, f"X X^T, K={k}"))
    if eigh:
        rows += eigensolver(clock, device, (64,) if quick else (512, 1024, 2048), None)
    return rows


def of_run(device: str) -> list[Ceiling]:
    """The ceilings for a run: what an earlier step of the same ZIPFAST_RUN left in the results, else measured now."""
    run = Run(device)
    path = results_folder() / run.path(OP).name
    if os.environ.get("ZIPFAST_RUN") and path.exists():
        document = json.loads(path.read_text())
        if document["machine"].get("run") == os.environ["ZIPFAST_RUN"]:
            return document["ceilings"]
    return measure(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eigh", action="store_true", help="time the symmetric eigensolver too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks the script, measures nothing")
    options = parser.parse_args()
    run = Run(options.device, measure(options.device, eigh=options.eigh, quick=options.quick))
    run.save(OP)
    for c in run.ceilings:
        shown = f"{c['value'] * 1e3:.2f} ms" if c["unit"] == "s" else f"{c['value'] / 1e9:.1f} G{c['unit']}"
        print(f"{c['name']:<28}{shown:>18}  threads={c['threads']}  {c['detail']}")


if __name__ == "__main__":
    main()
