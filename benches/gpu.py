# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can answer, in order and within a deadline: ``make gpu``.

Steps: build; touch (each op once), the ops' tests on CUDA, streams (side stream, CUDA graphs, host threads), paths, a
second device, inputs of more than 2^31 elements; ceilings, the benches by what they are worth, the report; and last
compute-sanitizer, as a hung or crashed tool must not cost the results before it, and the report again, with its rows.
``--only`` runs some of them, by name (``bench:moments``) or by the first part of it (``bench``).

Each step is a process of its own and leaves a row {step, status, seconds, tail} in RESULTS/gpu.json, which is written
after each; status is ``ok``, ``failed: why`` or ``not run: why``.  The budgets add up to less than the deadline; what a
step does not use, the next ones may.  The clocks of the GPU are left alone.  Exit code 1 if a step failed, 2 with
``--require`` if one was not run.

``--dry-run`` goes through all of it without a GPU: each step in a form that the CPU or the emulator can do, small.  It
measures nothing, and writes nothing but into a temporary folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from files import ROOT, commit, results_folder, write_json

HERE = Path(__file__).resolve().parent
PYTHON = sys.executable
TAIL = 4000
BEAT_S = 15.0  # how often a step that takes long says what it last printed
SANITIZER_FOUND = 9  # --error-exitcode: tells a finding of the tool from a tool that could not work
SANITIZERS = ("memcheck", "racecheck", "synccheck")
OK = "ok"
DEADLINE_S = 475.0
BENCHES = (  # seconds; those of a goal first
    ("moments", 25),
    ("sparse_linear", 18),
    ("zip_match", 25),
    ("evidence", 35),
    ("threshold", 12),
    ("masked_step", 14),
    ("blend", 12),
    ("multidot", 10),
    ("correlate", 8),
    ("gram", 8),
    ("apply_mask", 8),
    ("regroup", 8),
)
Judge = Callable[[int, str], str]


@dataclasses.dataclass(frozen=True)
class Dry:
    """A stand-in for a step where there is no GPU."""

    command: list[str]
    judge: Judge
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    budget_s: float
    command: list[str]
    judge: Judge
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    dry: tuple[Dry, ...] = ()

    @property
    def part(self) -> str:
        return self.name.split(":")[0]


@dataclasses.dataclass
class Outcome:
    step: str
    status: str
    seconds: float = 0.0
    tail: str = ""


# ------------------------------------------------------------------------------------------------------------- judges


def judge_exit(code: int, output: str) -> str:
    if code == 0:
        return OK
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return f"failed: exit code {code}" + (f": {lines[-1][:200]}" if lines else "")


def judge_pytest(code: int, output: str) -> str:
    """A run in which nothing was executed is not a success."""
    if "No module named pytest" in output:
        return "not run: pytest is not installed"
    if code == 5:
        return "not run: no test was selected"
    if code != 0:
        return f"failed: pytest exit code {code}"
    if re.search(r"\d+ passed", output):
        return OK
    reason = re.search(r"^SKIPPED \[\d+\] \S+: (.*)$", output, re.MULTILINE)
    return f"not run: every selected test was skipped{f': {reason[1]}' if reason else ''}"


def judge_collected(code: int, output: str) -> str:
    """That a selection of tests, which only a GPU can run, holds some."""
    if code != 0:
        return f"failed: pytest exit code {code} while it collected"
    return OK if re.search(r"^[1-9]\d*(/\d+)? tests? collected", output, re.MULTILINE) else "failed: it selects no test"


def judge_touch(code: int, output: str) -> str:
    return judge_exit(code, output) if code or "touched every op" in output else "failed: not every op was touched"


def judge_sanitizer(code: int, output: str) -> str:
    if code == SANITIZER_FOUND:
        return "failed: the tool reports errors"
    clean = re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", output)
    if code == 0 and clean:
        return OK if "touched every op" in output else "failed: not every op was touched"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if "touched every op" in output:
        return "not run: the program ran, but the tool gave no summary"
    return f"not run: the tool refused (exit code {code}): {lines[-1] if lines else 'no output'}"


# -------------------------------------------------------------------------------------------------------------- steps


def pytest_command(*arguments: str) -> list[str]:
    return [PYTHON, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]


def pytest_step(name: str, budget: float, *arguments: str, dry: tuple[str, ...] | None = None) -> Step:
    """``dry``: tests that can run here in its place, besides the collection of its own."""
    stand_in = [Dry(pytest_command("--collect-only", *arguments), judge_collected)]
    if dry is not None:
        stand_in.append(Dry(pytest_command(*dry), judge_pytest))
    threads = {"ZIPFAST_TEST_THREADS": str(min(8, os.cpu_count() or 1))}  # most of the time the references compute
    return Step(name, budget, pytest_command(*arguments), judge_pytest, threads, tuple(stand_in))


def sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(h, folder) for h in homes if h for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next(
        (found for p in places if (found := shutil.which("compute-sanitizer", path=p))), None
    )


def sanitizer_step(kind: str) -> Step:
    tool = sanitizer() or "compute-sanitizer"
    program = [PYTHON, str(HERE / "touch.py")]
    command = [tool, "--tool", kind, "--error-exitcode", str(SANITIZER_FOUND), *program]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a neighbour in torch's pool hides an overrun
    stand_in = [PYTHON, str(HERE / "gpu.py"), "--check-sanitizer", *command[1:]]
    return Step(f"sanitizer:{kind}", 13, command, judge_sanitizer, environment, (Dry(stand_in, judge_exit),))


def check_sanitizer(arguments: list[str]) -> int:
    """Reads a command line as compute-sanitizer does; that its program runs is what the dry form of touch shows."""
    parser = argparse.ArgumentParser(prog="compute-sanitizer")
    parser.add_argument("--tool", required=True, choices=SANITIZERS)
    parser.add_argument("--error-exitcode", required=True, type=int)
    parser.add_argument("program")
    parser.add_argument("script", type=Path)
    seen = parser.parse_args(arguments)
    if not 0 < seen.error_exitcode < 126:
        parser.error(f"--error-exitcode must be in [1, 126), got {seen.error_exitcode}")
    if shutil.which(seen.program) is None or not seen.script.is_file():
        parser.error(f"there is no {seen.program} or no {seen.script}")
    return 0


def steps() -> list[Step]:
    folder = results_folder().resolve()
    report = [PYTHON, str(HERE / "report.py"), "--results", str(folder)]
    if folder != ROOT / "benches" / "results":  # other results than the committed ones get a page of their own
        report += ["--page", str(folder / "benchmarks.md")]

    def rehearsed(name: str) -> tuple[Dry, ...]:
        return (Dry([PYTHON, str(HERE / "rehearse.py"), name], judge_exit),)

    return [
        Step(
            "build",
            100,
            [PYTHON, "setup.py", "build_ext", "--inplace"],
            judge_exit,
            # For this machine's GPU, whatever an image asks for otherwise.
            {"ZIPFAST_NATIVE": "1", "ZIPFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ""},
            (Dry([PYTHON, "setup.py", "-q", "--version"], judge_exit),),
        ),
        Step(
            "touch",
            12,
            [PYTHON, str(HERE / "touch.py")],
            judge_touch,
            dry=(Dry([PYTHON, str(HERE / "touch.py"), "--backend", "emu"], judge_touch),),
        ),
        pytest_step(
            "tests",
            62,
            # where a package is missing, the files that need none are still run
            *("tests/ops", "tests/test_registry.py", "tests/test_backend.py", "--continue-on-collection-errors"),
            *("-m", "not (slow or large)", "-k", "cuda"),
            dry=("tests/ops/test_regroup.py", "-k", "emu"),
        ),
        pytest_step("streams", 20, "tests/gpu/test_streams.py", "-m", "gpu"),
        pytest_step(
            "paths",
            10,
            *("tests/gpu/test_forced_paths.py", "-m", "gpu"),
            dry=("tests/gpu/test_forced_paths.py", "-m", "not gpu", "-k", "not cases_agree"),
        ),
        pytest_step("second", 6, "tests/gpu/test_second_device.py", "-m", "gpu"),
        pytest_step(
            "large",
            16,
            *("tests/gpu/test_large.py", "-m", "large"),
            dry=("tests/gpu/test_large.py", "-k", "small and emu"),
        ),
        Step(
            "ceilings",
            12,
            [PYTHON, str(HERE / "ceilings.py"), "--device", "cuda", "--eigh"],
            judge_exit,
            dry=rehearsed("ceilings"),
        ),
        # As scripts: a machine that only lends its GPU need not have pytest-benchmark.
        *[
            Step(
                f"bench:{op}",
                budget,
                [PYTHON, str(HERE / f"bench_{op}.py"), "--device", "cuda"],
                judge_exit,
                dry=rehearsed(op),
            )
            for op, budget in BENCHES
        ],
        Step("report", 2, report, judge_exit, dry=(Dry(report, judge_exit),)),
        *map(sanitizer_step, SANITIZERS),
        Step("report:last", 2, report, judge_exit, dry=(Dry(report, judge_exit),)),  # with the steps since
    ]


def chosen(only: list[str]) -> list[Step]:
    """The steps asked for, by name or by part; all where nothing is asked for."""
    every = steps()
    known = {s.name for s in every} | {s.part for s in every}
    for name in only:
        if name not in known:
            parts = ", ".join(dict.fromkeys(s.part for s in every))
            raise SystemExit(f"--only: no step is called {name!r}; there are {parts}, and e.g. bench:moments")
    return [s for s in every if not only or s.name in only or s.part in only]


# ------------------------------------------------------------------------------------------------------------ running


def execute(step: Step, limit_s: float, environment: dict[str, str]) -> Outcome:
    """Runs a step; where it ends beyond the limit, whatever it printed and wrote by then remains."""
    begin = time.perf_counter()
    # To a file, not a pipe: what a killed step had printed by then is still there.
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment | step.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as e:
            return Outcome(step.name, f"not run: {step.command[0]}: {e.strerror}")
        code: int | None = None
        while code is None and (left := limit_s - (time.perf_counter() - begin)) > 0:
            try:
                code = process.wait(min(BEAT_S, left))
            except subprocess.TimeoutExpired:
                if left > BEAT_S:
                    lines = written(log).strip().splitlines()
                    print(f"   {limit_s - left + BEAT_S:4.0f} s: {lines[-1][:120] if lines else '...'}", flush=True)
        if code is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output = written(log)
    late = f"failed: no end within {limit_s:.0f} s"
    if code is None and (step.judge is judge_sanitizer or limit_s < step.budget_s):
        # the tools slow a program down without bound; and what had less than its budget did nothing wrong
        late = f"not run: no end within {limit_s:.0f} s"
    status = late if code is None else step.judge(code, output)
    return Outcome(step.name, status, round(time.perf_counter() - begin, 1), output[-TAIL:])


def written(log) -> str:
    """What is in the log by now; read past the position, which the process shares as the place to write at."""
    return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")


def rehearse(step: Step, environment: dict[str, str]) -> Outcome:
    """The stand-ins of a step, up to the first that does not do."""
    outcome = Outcome(step.name, "failed: there is no form of this step for a dry run")
    seconds = 0.0
    for dry in step.dry:
        form = Step(step.name, 300, dry.command, dry.judge, step.environment | dry.environment)
        outcome = execute(form, 300, environment)
        seconds += outcome.seconds
        outcome.seconds = round(seconds, 1)
        if outcome.status != OK:
            if outcome.status.startswith("not run"):  # here it could have been
                outcome.status = f"failed: {outcome.status}"
            return outcome
    if outcome.status == OK:
        outcome.status = "dry: ok"
    return outcome


PROBE = """
import json, sys, torch, zipfast
why = {b: zipfast.ops.why_not(b) for b in ("cpu", "cuda")}
lines = [f"python {sys.version.split()[0]}", f"torch {torch.__version__}, CUDA {torch.version.cuda}"]
lines += [f"zipfast backend {b}: {reason or 'usable'}" for b, reason in why.items()]
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"gpus": gpus, "why": why["cuda"], "lines": lines}))
"""


@functools.cache
def probe() -> dict:
    """What torch and zipfast say of this machine, in a process of its own: the library may be built anew after it."""
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        asked = subprocess.run(
            [PYTHON, "-W", "ignore", "-c", PROBE],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": search},
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        why = "torch did not answer within 120 s"
        return {"gpus": [], "why": why, "lines": [why]}
    try:
        return json.loads(asked.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        why = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        return {"gpus": [], "why": why, "lines": [why]}


def info() -> Outcome:
    begin = time.perf_counter()
    lines = list(probe()["lines"])
    for command in (["nvidia-smi"], ["nvcc", "--version"], [sanitizer() or "compute-sanitizer", "--version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            lines.append(f"$ {' '.join(command)}\n{(done.stdout or done.stderr).strip()}")
        except (OSError, subprocess.TimeoutExpired) as e:
            lines.append(f"$ {' '.join(command)}\n{type(e).__name__}: {e}")
    if not os.environ.get("ZIPFAST_ZIPIT"):
        lines.append("ZIPFAST_ZIPIT names no checkout of the public ZipIt code: its rows will not be measured")
    return Outcome("info", OK, round(time.perf_counter() - begin, 1), "\n".join(lines)[-TAIL:])


def unusable(*, built: bool) -> str | None:
    """Why nothing below can run: no GPU (``not run``), or a GPU that the built library cannot use (``failed``)."""
    found = probe()
    if not found["gpus"]:
        return f"not run: {found['why'] or 'torch sees no CUDA device'}"
    return f"failed: there is a GPU, but {found['why']}" if built and found["why"] else None


def before(path: Path, about: dict) -> list[Outcome]:
    """What other parts left that were run of this commit on this GPU."""
    try:
        document = json.loads(path.read_text())
        same = all(document[key] == about[key] for key in ("gpu", "commit", "dry"))
        return [Outcome(**row) for row in document["steps"]] if same else []
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or of another form
        return []


def run_all(deadline_s: float, only: list[str], dry: bool = False) -> list[Outcome]:
    begin = time.perf_counter()
    path = results_folder() / "gpu.json"
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search, "ZIPFAST_RUN": f"{time.time():.0f}-{os.getpid()}"}
    environment["RESULTS"] = str(results_folder().resolve())  # the steps run in the root, whatever the caller's folder
    outcomes: list[Outcome] = []

    def gone() -> float:
        return time.perf_counter() - begin

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"== {outcome.step:<20} {outcome.seconds:6.1f} s  {outcome.status}", flush=True)
        if outcome.status not in (OK, "dry: ok") and outcome.tail:
            print(outcome.tail, flush=True)
        write_json(path, about | {"steps": [dataclasses.asdict(o) for o in (*others, *outcomes)]})

    wanted = chosen(only)
    gpu = ", ".join(probe()["gpus"]) or None
    about = {"deadline_s": deadline_s, "dry": dry, "gpu": gpu, "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    others = [o for o in before(path, about) if o.step not in {"info", *(s.name for s in wanted)}]
    first = info()
    print(first.tail, flush=True)
    note(first)
    obstacle = None if dry else unusable(built="build" not in {s.name for s in wanted})
    for i, step in enumerate(wanted):
        later = sum(s.budget_s for s in wanted[i + 1 :])
        left = deadline_s - gone()
        # Its own budget and what those before it left, but nothing of what those behind it need.
        limit = min(left, max(step.budget_s, left - later))
        place = f"-- [{gone():3.0f} s gone, {max(left, 0):3.0f} left] {i + 1} of {len(wanted)}, {step.name}"
        if dry:
            print(place, flush=True)
            note(rehearse(step, environment))
        elif obstacle is not None:
            note(Outcome(step.name, obstacle))
        elif limit < max(5, step.budget_s / 4):
            why = f"{max(left, 0):.0f} s of {deadline_s:.0f} are left, its budget is {step.budget_s:.0f}"
            note(Outcome(step.name, f"not run: {why}"))
        else:
            print(f"{place}: at most {limit:.0f} s", flush=True)
            note(execute(step, limit, environment))
            if step.name == "build":
                probe.cache_clear()
                obstacle = unusable(built=True) if outcomes[-1].status == OK else "not run: the build did not succeed"
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    lines = [f"{o.step:<20} {o.seconds:6.1f} s  {o.status.splitlines()[0]}" for o in outcomes]
    failed = [o.step for o in outcomes if o.status.startswith("failed")]
    missing = [o.step for o in outcomes if o.status.startswith("not run")]
    lines.append(
        f"{len(outcomes) - len(failed) - len(missing)} ok; failed: {', '.join(failed) or 'none'}; "
        f"NOT RUN: {', '.join(missing) or 'none'}"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--check-sanitizer"]:
        return check_sanitizer(arguments[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--deadline", type=float, default=DEADLINE_S, help=f"seconds for everything (default {DEADLINE_S:.0f})"
    )
    parser.add_argument("--only", nargs="*", default=[], help="steps, e.g. tests ceilings bench:moments sanitizer")
    parser.add_argument("--require", action="store_true", help="exit code 2 if something was not run")
    parser.add_argument(
        "--dry-run", action="store_true", help="every step in a form that needs no GPU; measures nothing"
    )
    options = parser.parse_args(arguments)
    if options.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            before = os.environ.get("RESULTS")
            os.environ["RESULTS"] = folder
            try:
                outcomes = run_all(options.deadline, options.only, dry=True)
            finally:
                os.environ.pop("RESULTS")
                if before is not None:
                    os.environ["RESULTS"] = before
    else:
        outcomes = run_all(options.deadline, options.only)
    print(f"\n{summary(outcomes)}")
    if options.dry_run:
        print("This was a dry run: no GPU took part, and nothing was measured.")
    failed = any(o.status.startswith("failed") for o in outcomes)
    missing = any(o.status.startswith("not run") for o in outcomes)
    return 1 if failed else 2 if missing and options.require else 0


if __name__ == "__main__":
    sys.exit(main())
