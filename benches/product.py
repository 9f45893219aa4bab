# SPDX-License-Identifier: Apache-2.0
"""One op or one system measured for ``zipfast bench``, in a process of its own; or the machine's ceilings.

    python product.py TARGET --out FILE --ceilings FILE --peers torch,scipy [--quick] [--device cpu] [--memory BYTES]
    python product.py ceilings --out FILE [--quick] [--again FOLDER]

A peer that disagrees, a case that fails and a case for which there is no memory are part of the document that is
written, each with its reason; what is agreed on is timed as everywhere here (harness.py). Exit code 0 wherever a document
was written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ceilings
import offers
import peers
import torch
from files import SCHEMA, write_json
from harness import Job, Peer, Row, Run, against_ceiling, bench_threads, machine, threads
from plan import PROCESS, Planned, of

import zipfast

QUICK = {"repeats": 3, "budget_s": 0.15}


class Once(Run):
    """A run whose rows go into one document at the end."""

    def add(self, row: Row) -> None:
        self.rows.append(row)


def sentence(error: BaseException) -> str:
    """An error in one line."""
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def importable(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """The peers that can be imported here, and why not of the others."""
    use, broken = [], {}
    for name in names:
        offer = offers.PEERS[name]
        try:
            if offer.module:
                importlib.import_module(offer.module)
            if offer.variable:
                peers.module_of(Path(os.environ[offer.variable]) / offer.holds, offer.variable)
            use.append(name)
        except Exception as e:  # whatever another package raises while it is imported
            broken[name] = f"cannot be imported: {sentence(e)}"
    return use, broken


def agreed(job: Job) -> tuple[dict[str, Peer], list[dict[str, str]], list[dict[str, str]]]:
    """The peers whose result is ours; those with another one; those that raised."""
    result = job.ours.call()
    fit: dict[str, Peer] = {}
    other: list[dict[str, str]] = []
    failed: list[dict[str, str]] = []
    for name, peer in job.peers.items():
        where = {"case": job.case, "peer": name}
        try:
            found = peer.call()
        except Exception as e:
            failed.append(where | {"why": sentence(e)})
            continue
        try:
            if job.agree is not None:
                job.agree(result, found, name)
        except AssertionError as e:
            other.append(where | {"why": " ".join(str(e).split())[:300] or "results differ"})
            continue
        fit[name] = peer
    return fit, other, failed


@contextlib.contextmanager
def mode(inference: bool) -> Iterator[None]:
    with torch.inference_mode(inference):
        yield


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


class Target:
    """The document of one target while it grows."""

    def __init__(self, options: argparse.Namespace, found: list[dict[str, Any]]) -> None:
        self.options = options
        self.run = Once(options.device, found)
        self.skipped: list[dict[str, str]] = []
        self.disagreements: list[dict[str, str]] = []
        self.failures: list[dict[str, str]] = []

    def measure(self, planned: Planned, use: list[str]) -> None:
        need, free = planned.need + PROCESS, self.options.memory
        if free is not None and need > free:
            why = f"needs {gigabytes(need)}, {gigabytes(free)} free"
            self.skipped.append({"case": planned.case, "why": why})
            return
        try:
            with mode(planned.inference):
                self.timed(planned.make(), use)
        except Exception as e:  # the case's, which must not cost the others
            traceback.print_exc()
            self.failures.append({"case": planned.case, "peer": "", "why": sentence(e)})

    def timed(self, job: Job, use: list[str]) -> None:
        count = job.options.get("threads", bench_threads())
        with threads(count):
            chosen = dataclasses.replace(job, peers={n: p for n, p in job.peers.items() if p.package in use})
            fit, other, failed = agreed(chosen)
        self.disagreements += other
        self.failures += failed
        options = job.options | (QUICK if self.options.quick else {})
        row = self.run.measure(dataclasses.replace(job, peers=fit, agree=None, options=options, after=None))
        if job.after is not None:
            try:
                job.after(self.run, row)
            except (OSError, subprocess.SubprocessError) as e:  # memory of a process, as only Linux tells it
                row.extra["not measured"] = sentence(e)
        print(row.summary(), file=sys.stderr, flush=True)

    def document(self, seconds: float, broken: dict[str, str]) -> dict[str, Any]:
        o = self.options
        return {
            "schema": SCHEMA,
            "op": o.target,
            "kind": offers.targets()[o.target],
            "machine": self.run.machine,
            "ceilings": self.run.ceilings,
            "rows": [vars(r) for r in self.run.rows],
            "skipped": self.skipped,
            "disagreements": self.disagreements,
            "failures": self.failures,
            "broken": broken,
            "seconds": seconds,
        }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    found = json.loads(Path(options.ceilings).read_text())["ceilings"]
    use, broken = importable([n for n in options.peers.split(",") if n])
    for name, offer in offers.PEERS.items():
        if name not in use:
            os.environ.pop(offer.variable, None)  # a bench takes along what these name
    if options.target in offers.ON_HOST and torch.device(options.device).type != "cpu":
        options.device, found = "cpu", []  # the ceilings are those of the GPU
    target = Target(options, found)
    host_only = [op.host_only for op in zipfast.ops.OPS.values() if op.stem == options.target and op.host_only]
    if host_only and torch.device(options.device).type != "cpu":
        target.skipped.append({"case": "all", "why": f"not for a GPU: {host_only[0]}"})
        return target.document(time.perf_counter() - begin, broken)
    for planned in of(options.target, options.device, options.quick, use):
        target.measure(planned, use)
    return target.document(time.perf_counter() - begin, broken)


def ceilings_of(device: str, quick: bool) -> list[dict[str, Any]]:
    """All of them; quick: those on the bench's threads that rows are held against, from smaller inputs."""
    if not quick or torch.device(device).type != "cpu":
        return ceilings.measure(device, skinny=False)
    from harness import Clock

    clock, count = Clock("cpu"), bench_threads()
    with threads(count):
        found = ceilings.bandwidth(clock, "cpu", 64 << 20, count)
        for name, n, dtype in (("fp32", 768, torch.float32), ("fp64", 512, torch.float64)):
            found.append(ceilings.gemm(clock, name, n, dtype, "cpu", count))
    return found


def again(options: argparse.Namespace) -> dict[str, Any]:
    """Measured once more: the better value counts, and the shares of all results follow it."""
    document = json.loads(Path(options.out).read_text())
    run = Once(options.device, document["ceilings"])
    run.finish(ceilings_of(options.device, options.quick))
    for path in sorted(Path(options.again).glob("*.json")):
        result = json.loads(path.read_text())
        if path == Path(options.out) or "rows" not in result:
            continue
        rows = [Row(**r) for r in result["rows"]]
        for row in rows:
            against_ceiling(row, run.rates(row.threads))
        write_json(path, result | {"ceilings": run.ceilings, "rows": [vars(r) for r in rows]})
    return document | {"ceilings": run.ceilings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["ceilings", *offers.targets()])
    parser.add_argument("--out", required=True)
    parser.add_argument("--ceilings")
    parser.add_argument("--peers", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=float)
    parser.add_argument("--again", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(bench_threads())
    if options.target != "ceilings":
        document = measure(options)
    elif options.again:
        document = again(options)
    else:
        with threads(bench_threads()):
            document = {"ceilings": ceilings_of(options.device, options.quick), "machine": machine(options.device)}
    write_json(Path(options.out), document)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())
