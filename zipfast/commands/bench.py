# SPDX-License-Identifier: Apache-2.0
"""``zipfast bench``: every op and every system beside its installed peers on this machine, and one report of it.

The benches are those of the project (``benches/`` of a checkout, ``zipfast/benches`` of an installed package). Each op and
each system is measured in a process of its own: what crashes or runs out of memory there costs one line of the report. A
run that was killed goes on where it was, from the results that lie in the folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import checkpoint
from .._version import __version__
from . import common

PACKAGE = Path(__file__).resolve().parent.parent
OURS = ("offers.py", "product.py", "product_page.py", "harness.py")
SHARE = 0.9  # of the free memory
EPILOG = """\
examples:
  zipfast bench --quick                      everything, small: under two minutes
  zipfast bench zip_match soups              an op and a system at full size
  zipfast bench logme --peers numpy,LogME    beside these peers only
  zipfast bench --list                       what can be measured, and which peers are here
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="ops and systems, see --list (default: all)")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--list", action="store_true", help="print ops, systems and peers, and measure nothing")
    what.add_argument(
        "--peers", type=common.names, metavar="P,P", help="beside these only; none: ours alone (default: all here)"
    )
    what.add_argument(
        "--quick", action="store_true", help="small sizes, few repeats: that it works, not how fast it is"
    )
    what.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of ours and peers (default: 1)")
    what.add_argument(
        "--memory", type=float, metavar="GB", help="skip what needs more (default: 90 %% of what is free)"
    )
    job = parser.add_argument_group("job")
    job.add_argument(
        "--out", default="bench-out", metavar="FOLDER", help="report, pictures, JSON (default: %(default)s)"
    )
    job.add_argument("--restart", action="store_true", help="forget what a killed run left in the folder")


# ------------------------------------------------------------------------------------------------------ where things are


def benches() -> Path:
    """The folder of the benches: that of the installed package, or the one beside the package of a checkout.

    Raises:
        FileNotFoundError: there is none.
    """
    for folder in (PACKAGE / "benches", PACKAGE.parent / "benches"):
        if all((folder / name).is_file() for name in OURS):
            return folder
    raise FileNotFoundError(
        f"bench: the benches must lie in {PACKAGE / 'benches'} or, in a checkout, in {PACKAGE.parent / 'benches'}, and "
        "are in neither; install zipfast again, from a wheel or a whole checkout"
    )


def load(folder: Path, name: str) -> ModuleType:
    """A module of the benches that needs no other of them."""
    spec = importlib.util.spec_from_file_location(f"zipfast_benches_{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def commit(folder: Path) -> str:
    """Of a checkout git says it; a package has it from its build, where that was one."""
    if folder.parent != PACKAGE:
        return str(load(folder, "files").commit())
    stamp = PACKAGE / "_commit.txt"
    return stamp.read_text().strip() if stamp.is_file() else "unknown"


def total_memory() -> float | None:
    """Bytes of the host; None where the system does not say."""
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", ())):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None


def free_memory(device: Any) -> float | None:
    """Bytes that can be used here, also within a control group; None where the system does not say."""
    if device.type == "cuda":
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        found += [0.5 * size for size in (total_memory(),) if size]
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such group, or one without a limit ("max")
        found.append(float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    return min(found, default=None)


# ------------------------------------------------------------------------------------------------------------- choosing


def known(what: str, given: Sequence[str], there: Sequence[str]) -> list[str]:
    """The given names, each once.

    Raises:
        ValueError: one that is not there; the nearest is named.
    """
    for name in given:
        if name not in there:
            near = get_close_matches(name, there, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"bench: '{what}' must be of {', '.join(there)}, got {name!r}{hint}")
    return list(dict.fromkeys(given))


def peers_here(offers: ModuleType, given: list[str] | None) -> dict[str, dict[str, str]]:
    """Peer -> its version, or why it does not take part.

    Raises:
        ValueError: a peer that was asked for is unknown or not here.
    """
    there = list(offers.PEERS)
    chosen = there if given is None else known("peers", [] if given == ["none"] else given, there)
    found = {}
    for name in there:
        why = offers.missing(name)
        if why is None and name not in chosen:
            why = "here, but not asked for"
        elif why is not None and name in chosen and given is not None:
            raise ValueError(f"bench: 'peers' must be here to take part, got {name!r}, which is {why}")
        found[name] = {"version": "" if why else offers.version(name), "why": why or ""}
    return found


def show_list(offers: ModuleType, peers: dict[str, dict[str, str]], as_json: bool) -> None:
    targets = offers.targets()
    if as_json:
        ops = [name for name, kind in targets.items() if kind == "op"]
        print(json.dumps({"ops": ops, "systems": dict(offers.SYSTEMS), "peers": peers}, indent=1))
        return
    print("ops\n  " + "\n  ".join(name for name, kind in targets.items() if kind == "op"))
    print("systems\n" + "\n".join(f"  {name:<22}{what}" for name, what in offers.SYSTEMS.items()))
    print("peers\n" + "\n".join(f"  {name:<22}{p['version'] or p['why']}" for name, p in peers.items()))


# -------------------------------------------------------------------------------------------------------------- running


class Session:
    """One run of the command: its folder, its settings and the processes it starts."""

    def __init__(self, args: argparse.Namespace, folder: Path, targets: list[str], peers: dict[str, Any]) -> None:
        self.args, self.folder, self.targets = args, folder, targets
        self.device = common.use_device(args.device)
        self.out, self.results = Path(args.out), Path(args.out) / "results"
        self.use = [name for name, state in peers.items() if state["version"]]
        self.taking_part = load(folder, "offers").taking_part
        self.commit = commit(folder)
        self.settings = {
            "targets": targets,
            "quick": args.quick,
            "device": str(self.device),
            "threads": args.threads,
            "peers": {name: peers[name]["version"] for name in self.use},
            "memory": args.memory,
            "zipfast": __version__,
            "commit": self.commit,
            "torch": sys.modules["torch"].__version__,
        }

    def say(self, text: str) -> None:
        if not self.args.quiet:
            print(text, file=sys.stderr, flush=True)

    def memory(self) -> float | None:
        if self.args.memory is not None:
            result: float | None = 1e9 * self.args.memory
            return result
        free = free_memory(self.device)
        return None if free is None else SHARE * free

    def begin(self) -> list[str]:
        """Make the folder ready; the targets that a killed run with these settings has measured already."""
        self.results.mkdir(parents=True, exist_ok=True)
        marker = self.results / "run.json"
        try:
            before = json.loads(marker.read_text())
        except (OSError, ValueError):
            before = {}
        left = before.get("settings") == self.settings and not before.get("finished") and not self.args.restart
        done = [name for name in self.targets if left and self.readable(name)]
        if done and self.readable("ceilings"):
            self.say(f"going on in {self.out}: {len(done)} of {len(self.targets)} are measured")
            return done
        for name in ("ceilings", *load(self.folder, "offers").targets()):
            for suffix in (".json", ".log"):
                (self.results / f"{name}{suffix}").unlink(missing_ok=True)
        common.write_json(marker, {"settings": self.settings, "finished": False})
        return []

    def path(self, name: str) -> Path:
        return self.results / f"{name}.json"

    def readable(self, name: str) -> bool:
        """Whether there is a result of a target, and a whole one."""
        try:
            return isinstance(json.loads(self.path(name).read_text()), dict)
        except (OSError, ValueError):
            return False

    def child(self, script: str, *arguments: str) -> tuple[int, str, Path]:
        """Run a script of the benches: its exit status, what it printed, and the file with all it said besides."""
        count = str(self.args.threads)
        limits = ("OMP", "MKL", "OPENBLAS", "NUMBA", "VECLIB_MAXIMUM")
        environment = os.environ | {f"{name}_NUM_THREADS": count for name in limits}
        own = {"RESULTS": str(self.results), "ZIPFAST_COMMIT": self.commit, "ZIPFAST_BENCH_THREADS": count}
        parts = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
        own["PYTHONPATH"] = os.pathsep.join(part for part in parts if part)
        environment.pop("ZIPFAST_RUN", None)
        log = self.results / f"{arguments[0] if script == 'product.py' else 'page'}.log"
        with open(log, "wb") as said:
            done = subprocess.run(
                [sys.executable, str(self.folder / script), *arguments],
                env=environment | own,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                check=False,
            )
        return done.returncode, done.stdout.decode(errors="replace"), log

    def measure(self, name: str, *more: str) -> str | None:
        """Measure a target (or the ceilings); None, or in a few words why there is no result."""
        arguments = [name, "--out", str(self.path(name)), "--device", str(self.device), *more]
        arguments += ["--quick"] if self.args.quick else []
        code, _, log = self.child("product.py", *arguments)
        if code == 0 and self.path(name).is_file():
            log.unlink()
            return None
        self.path(name).unlink(missing_ok=True)
        return why(code, log)

    def run(self) -> dict[str, Any]:
        """Everything, as a record.

        Raises:
            RuntimeError: not even the ceilings could be measured.
        """
        begin = time.time()
        done, failed, free = self.begin(), {}, self.memory()
        if not done:
            self.say("ceilings")
            if reason := self.measure("ceilings"):
                raise RuntimeError(f"bench: the ceilings could not be measured: {reason}")
        for number, name in enumerate(self.targets, 1):
            if name in done:
                continue
            begun, limit = time.time(), self.memory()
            more = ["--ceilings", str(self.path("ceilings")), "--peers", ",".join(self.taking_part(name, self.use))]
            more += [] if limit is None else ["--memory", str(limit)]
            reason = self.measure(name, *more)
            if reason is not None:
                failed[name] = reason
            state = f"failed: {reason}" if reason else f"{time.time() - begun:.0f} s"
            self.say(f"[{number}/{len(self.targets)}] {name}: {state}")
        if not self.args.quick and (reason := self.measure_again()):
            self.say(f"ceilings, once more: failed: {reason}")
        ceilings = json.loads(self.path("ceilings").read_text())
        documents = [json.loads(self.path(name).read_text()) for name in self.targets if name not in failed]
        return {
            "zipfast": __version__,
            "settings": self.settings,
            "machine": ceilings["machine"],
            "memory": free,
            "memory_total": total_memory(),
            "ceilings": ceilings["ceilings"],
            "targets": documents,
            "failed": failed,
            "seconds": time.time() - begin,
        }

    def measure_again(self) -> str | None:
        """The ceilings once more, as a busy neighbour only lowers them; a failure leaves the first ones."""
        arguments = ("ceilings", "--out", str(self.path("ceilings")), "--device", str(self.device))
        code, _, log = self.child("product.py", *arguments, "--again", str(self.results))
        return None if code == 0 else why(code, log)

    def write(self, record: dict[str, Any]) -> str:
        """Report, pictures and record, each whole or not at all, the report last; what to print."""
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=self.out) as text:
            folder = Path(text)
            common.write_json(folder / "bench.json", record)
            code, said, log = self.child("product_page.py", str(folder / "bench.json"), str(folder))
            if code:
                raise RuntimeError(f"bench: the report could not be written: {why(code, log)}")
            log.unlink()
            pictures = sorted((folder / "plots").glob("*.png"))
            if self.args.plots is not None:
                for picture in pictures:
                    shutil.copy(picture, Path(self.args.plots) / picture.name)
            (self.out / "plots").mkdir(exist_ok=True)
            for old in (self.out / "plots").glob("*.png"):
                if not (folder / "plots" / old.name).exists():
                    old.unlink()
            for new in (*pictures, folder / "bench.json", folder / "report.md"):
                os.replace(new, self.out / new.relative_to(folder))
        common.write_json(self.results / "run.json", {"settings": self.settings, "finished": True})
        return said.rstrip("\n")


def why(code: int, log: Path) -> str:
    """A process's end in a few words."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1][:300] if lines else f'exit status {code}'} (see {log})"


def run(args: argparse.Namespace) -> int:
    """Do the command; 1 where something failed or a peer disagreed."""
    folder = benches()
    offers = load(folder, "offers")
    peers = peers_here(offers, args.peers)
    targets = known("target", args.targets, list(offers.targets())) or list(offers.targets())
    if args.list:
        show_list(offers, peers, args.json)
        return 0
    if args.threads < 1:
        raise ValueError(f"bench: 'threads' must be at least 1, got {args.threads}")
    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"bench: 'memory' must be above 0, in GB, got {args.memory:g}")
    for place in filter(None, (args.out, args.plots)):
        checkpoint.check_folder(place)
        Path(place).mkdir(exist_ok=True)
    session = Session(args, folder, targets, peers)
    record = session.run()
    broken = {name: reason for document in record["targets"] for name, reason in document["broken"].items()}
    for name, reason in broken.items():
        peers[name] = {"version": "", "why": reason}
        if args.peers is not None:
            record["failed"].setdefault(name, reason)
    record["peers"] = peers
    said = session.write(record)
    common.emit(record, f"{said}\nreport: {session.out / 'report.md'}", args.json)
    wrong = any(d["disagreements"] or d["failures"] for d in record["targets"])
    return 1 if wrong or record["failed"] else 0
