# SPDX-License-Identifier: Apache-2.0
"""Paired timing: agree first, then A B A B with a cold cache; medians, spread and percent of a measured ceiling.

``compare`` times our op against each peer in turn, ours first in every pair, so that a drifting clock or a noisy
neighbour meets both sides of a ratio.  The reported ratio is the median of the per-pair ratios, not the ratio of the
medians.  ``Run`` holds what belongs to one run (machine, ceilings, rows) and writes it as JSON after every row: to a
temporary file, then renamed, so that an aborted run leaves whole files.

Environment: RESULTS (folder of the JSON, default benches/results), ZIPFAST_COMMIT (else git is asked),
ZIPFAST_BENCH_THREADS (CPU threads, default 1: on shared machines ratios of one thread repeat best).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from files import ROOT, SCHEMA, commit, results_folder, validate, write_json  # noqa: F401 (benches take ROOT from here)

import zipfast

Agree = Callable[[Any, Any, str], None]


class Disagreement(AssertionError):
    """Our result and a peer's are not the same; nothing was timed."""


@dataclass(frozen=True)
class Peer:
    """What a user would call otherwise.  ``prepare`` runs untimed before each call; its result is the argument.

    ``package``: whose code it is, one of ``offers.PEERS``.
    """

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    package: str = "torch"

    def call(self) -> Any:
        return self.run() if self.prepare is None else self.run(self.prepare())


def parametrize(*arguments: Any, **options: Any) -> Callable[[Any], Any]:
    """``pytest.mark.parametrize`` in a run of pytest; elsewhere pytest need not be installed, and tests are not called."""
    pytest = sys.modules.get("pytest")
    return (lambda test: test) if pytest is None else pytest.mark.parametrize(*arguments, **options)


def skip(reason: str) -> None:
    """Skip the test that is running, with its reason."""
    import pytest

    pytest.skip(reason)


def as_peer(p: Peer | Callable[[], Any]) -> Peer:
    return p if isinstance(p, Peer) else Peer(p)


def guarded(build: Callable[[], Peer], package: str) -> Peer:
    """What ``build`` makes; where it raises, a peer that raises the same when it is called, and costs no other peer."""
    try:
        return build()
    except Exception as e:
        error = e

    def fail(*_: Any) -> None:
        raise error

    return Peer(fail, package=package)


@dataclass(frozen=True)
class Job:
    """One case, ready to run: ``options`` as ``Run.measure`` takes them, ``after`` may add to the row's ``extra``."""

    op: str
    case: str
    ours: Peer
    peers: dict[str, Peer]
    agree: Agree | None
    options: dict[str, Any] = field(default_factory=dict)
    after: Callable[[Run, Row], None] | None = None


# ------------------------------------------------------------------------------------------------------ clock and cache


class Clock:
    """Times one call on one device with a cold cache, in seconds."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            # Far above the L2.  The long memset has a second use: the host enqueues the timed call meanwhile, so that
            # the events measure the device and not the launch latency of an empty queue.
            memory = torch.cuda.get_device_properties(device).total_memory
            self._buffer = torch.zeros(min(1 << 30, memory // 16), dtype=torch.uint8, device=device)
        else:
            self._buffer = torch.zeros(2 * last_level_cache(), dtype=torch.uint8)
        self._turn = 0

    def flush(self) -> None:
        self._turn = (self._turn + 1) % 100
        self._buffer.fill_(self._turn)

    def time(self, peer: Peer) -> float:
        argument = () if peer.prepare is None else (peer.prepare(),)
        self.flush()
        if not self.cuda:
            begin = time.perf_counter()
            peer.run(*argument)
            return time.perf_counter() - begin
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        peer.run(*argument)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0, 32 MiB where the system does not say."""
    sizes = [32 << 20]
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if m := re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()):
            sizes.append(int(m[1]) * unit[m[2]])
    return max(sizes)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bench_threads() -> int:
    return int(os.environ.get("ZIPFAST_BENCH_THREADS", "1"))


# ------------------------------------------------------------------------------------------------------------ measuring


@dataclass
class Row:
    """One case of one op: medians in milliseconds, the ratio of each peer to ours, and the distance to the ceiling."""

    op: str
    case: str
    device: str
    threads: int
    backend: str
    ours: dict[str, float]
    peers: dict[str, dict[str, float]]
    bytes: float | None = None
    flops: float | None = None
    rate: str | None = None
    bound: str | None = None
    floor_ms: float | None = None
    percent_of_ceiling: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        ratios = ", ".join(f"{name} {p['ratio']:.2f}x" for name, p in self.peers.items())
        share = self.percent_of_ceiling
        of_ceiling = "" if share is None else f", {share:.0f} % of the {self.bound} ceiling"
        return f"{self.op} {self.case}: {self.ours['ms']:.3f} ms{of_ceiling}; {ratios or 'no peer'}"


def spread(values: list[float]) -> tuple[float, float, float]:
    """(median, first quartile, third quartile); with fewer than three values the quartiles are the extremes."""
    if len(values) < 3:
        return statistics.median(values), min(values), max(values)
    q1, q2, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q2, q1, q3


def timing(seconds: list[float]) -> dict[str, float]:
    middle, q1, q3 = spread(seconds)
    return {"ms": middle * 1e3, "iqr_ms": (q3 - q1) * 1e3, "runs": len(seconds)}


def pairs(clock: Clock, a: Peer, b: Peer, most: int, budget_s: float) -> tuple[list[float], list[float]]:
    """Times A B A B ...: up to ``most`` pairs, fewer where the budget runs out, at least one."""
    times_a: list[float] = []
    times_b: list[float] = []
    begin = time.perf_counter()
    while len(times_a) < most and (not times_a or time.perf_counter() - begin < budget_s):
        times_a.append(clock.time(a))
        times_b.append(clock.time(b))
    return times_a, times_b


def compare(
    name: str,
    shape: str,
    ours: Peer | Callable[[], Any],
    peers: Mapping[str, Peer | Callable[[], Any]],
    *,
    agree: Agree | None,
    bytes: float | None = None,
    flops: float | None = None,
    rate: str = "fp32",
    device: str = "cpu",
    repeats: int = 15,
    budget_s: float = 4.0,
    ceilings: dict[str, float] | None = None,
    clock: Clock | None = None,
) -> Row:
    """Check, then time, one case against each peer.

    Args:
        name, shape: op and case, as the tables show them.
        ours: our call; a ``Peer`` where something must be set up untimed before each call.
        peers: name -> call.
        agree: ``agree(our_result, peer_result, peer_name)``, raises where they differ; None: nothing to compare.
        bytes, flops: what the case cannot do without; the larger of the two times at ceiling rate is the floor.
        rate: which GEMM ceiling the flops are held against.
        repeats, budget_s: pairs per peer, and after how many seconds no further pair begins.
        ceilings: from ``ceilings.measure``, in bytes/s and flop/s.

    Raises:
        Disagreement: a peer's result differs; nothing has been timed then.
    """
    mine, others = as_peer(ours), {n: as_peer(p) for n, p in peers.items()}
    result = mine.call()  # also the warm-up
    if agree is not None:
        for n, peer in others.items():
            try:
                agree(result, peer.call(), n)
            except AssertionError as e:
                raise Disagreement(f"{name} {shape}: ours and {n} disagree: {e}") from e
    del result
    clock = clock or Clock(device)
    mine.call()

    all_ours: list[float] = []
    measured: dict[str, dict[str, float]] = {}
    for n, peer in others.items():
        if agree is None:
            peer.call()
        a, b = pairs(clock, mine, peer, repeats, budget_s)
        all_ours += a
        ratio, q1, q3 = spread([y / x for x, y in zip(a, b)])
        measured[n] = timing(b) | {"ratio": ratio, "ratio_q1": q1, "ratio_q3": q3}
    begin = time.perf_counter()
    while len(all_ours) < 3 or (not others and len(all_ours) < repeats and time.perf_counter() - begin < budget_s):
        all_ours.append(clock.time(mine))

    row = Row(name, shape, device, torch.get_num_threads(), served_by(device), timing(all_ours), measured)
    row.bytes, row.flops, row.rate = bytes, flops, rate if flops is not None else None
    against_ceiling(row, ceilings or {})
    return row


def against_ceiling(row: Row, ceilings: dict[str, float]) -> None:
    floors = []
    if row.bytes is not None and ceilings.get("copy"):
        floors.append((row.bytes / ceilings["copy"] * 1e3, "copy"))
    if row.flops is not None and row.rate is not None and ceilings.get(row.rate):
        floors.append((row.flops / ceilings[row.rate] * 1e3, row.rate))
    if floors:
        row.floor_ms, row.bound = max(floors)
        row.percent_of_ceiling = 100 * row.floor_ms / row.ours["ms"]


def served_by(device: str) -> str:
    kind = torch.device(device).type
    return kind if kind in ("cpu", "cuda") and zipfast.available(kind) else "torch"


# -------------------------------------------------------------------------------------------------------------- results


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "device": torch.device(device).type,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "run": os.environ.get("ZIPFAST_RUN"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


class Run:
    """What one run of the benches knows: the machine, its ceilings, the rows so far; one file per op and machine."""

    def __init__(self, device: str = "cpu", ceilings: list[dict[str, Any]] | None = None) -> None:
        self.device = device
        with threads(bench_threads()):
            self.machine = machine(device)
        self.ceilings = ceilings or []
        self.rows: list[Row] = []
        self.clock = Clock(device)

    def rates(self, count: int) -> dict[str, float]:
        """Ceiling name -> rate at this thread count."""
        return {c["name"]: c["value"] for c in self.ceilings if c["unit"] != "s" and c["threads"] in (None, count)}

    def measure(self, job: Job) -> Row:
        """Measure a job; its options are those of ``compare``, and ``threads`` and ``extra`` besides."""
        # A GPU is lent by the minute, and its medians settle sooner.
        budget = {"budget_s": 1.5} if self.clock.cuda else {}
        options: dict[str, Any] = {"device": self.device, "clock": self.clock} | job.options | budget
        extra, count = options.pop("extra", {}), options.pop("threads", bench_threads())
        with threads(count):
            row = compare(job.op, job.case, job.ours, job.peers, agree=job.agree, ceilings=self.rates(count), **options)
        row.extra = extra
        if job.after is not None:
            job.after(self, row)
        self.add(row)
        return row

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.save(row.op)

    def save(self, op: str) -> None:
        write_json(self.path(op), self.document(op))

    def finish(self, again: list[dict[str, Any]]) -> None:
        """Keep the better of two measurements of each ceiling, as a busy neighbour only lowers them; state shares anew.

        Without this a ceiling taken in a bad second makes every row of the run look too good.
        """
        for c in self.ceilings:
            other = next((a for a in again if (a["name"], a["threads"]) == (c["name"], c["threads"])), None)
            if other is not None:
                c["value"] = (min if c["unit"] == "s" else max)(c["value"], other["value"])
        for row in self.rows:
            against_ceiling(row, self.rates(row.threads))
        for op in dict.fromkeys(r.op for r in self.rows):
            self.save(op)

    def path(self, op: str) -> Path:
        m = self.machine
        host = f"{m['gpu']}" if m["gpu"] else f"{m['cpu']}-{m['cores']}c-t{m['threads']}"
        return results_folder() / f"{m['device']}-{slug(host)}-{op}.json"

    def document(self, op: str) -> dict[str, Any]:
        rows = [vars(r) for r in self.rows if r.op == op]
        document = {"schema": SCHEMA, "op": op, "machine": self.machine, "ceilings": self.ceilings, "rows": rows}
        validate(document)
        return document


def main(jobs: Callable[[str], Iterable[Job]]) -> None:
    """A bench as a script: every job of a device, without pytest."""
    from ceilings import measure, of_run  # here, as ceilings are measured with this module's clock

    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    run = Run(device, of_run(device))
    with torch.inference_mode():
        for job in jobs(device):
            print(run.measure(job).summary(), flush=True)
    run.finish(measure(device, skinny=False))
