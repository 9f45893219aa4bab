# SPDX-License-Identifier: Apache-2.0
"""Everything that only a GPU can answer, in order and within a deadline; ``make gpu`` calls this after the build.

Steps: info, the ops' tests on CUDA, streams (side stream, CUDA graphs, host threads), ceilings, benches, report, and last
compute-sanitizer, as a hung or crashed tool must not cost the results before it.  Each step is a process of its own
with a budget and leaves a row {step, status, seconds, tail} in RESULTS/gpu.json, which is written after each; status is
``ok``, ``failed: why`` or ``not run: why``.  Exit code 1 if a step failed, 2 with ``--require`` if one was not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import ROOT, results_folder, write_json
from report import PAGE

import zipfast

TAIL = 4000
SANITIZER_FOUND = 9  # --error-exitcode: tells a finding of the tool from a tool that could not work
OK = "ok"
BENCHES = (  # seconds
    ("moments", 120),
    ("correlate", 30),
    ("zip_match", 60),
    ("regroup", 30),
    ("evidence", 45),
    ("blend", 45),
    ("multidot", 30),
    ("gram", 30),
    ("threshold", 45),
    ("apply_mask", 20),
    ("masked_step", 30),
    ("sparse_linear", 45),
)


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    budget_s: float
    command: list[str]
    judge: Callable[[int, str], str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Outcome:
    step: str
    status: str
    seconds: float = 0.0
    tail: str = ""


# ------------------------------------------------------------------------------------------------------------- judges


def judge_exit(code: int, output: str) -> str:
    return OK if code == 0 else f"failed: exit code {code}"


def judge_pytest(code: int, output: str) -> str:
    """A run in which nothing was executed is not a success."""
    if "No module named pytest" in output:
        return "not run: pytest is not installed"
    if code == 5:
        return "not run: no test was selected"
    if code != 0:
        return f"failed: pytest exit code {code}"
    return OK if re.search(r"\d+ passed", output) else "not run: every selected test was skipped"


def judge_sanitizer(code: int, output: str) -> str:
    if code == SANITIZER_FOUND:
        return "failed: the tool reports errors"
    if code == 0 and "ERROR SUMMARY: 0 errors" in output:
        return OK
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if "touched every op" in output:
        return "not run: the program ran, but the tool gave no summary"
    return f"not run: the tool refused (exit code {code}): {lines[-1] if lines else 'no output'}"


# -------------------------------------------------------------------------------------------------------------- steps


def pytest_step(name: str, budget: float, *arguments: str) -> Step:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *arguments]
    return Step(name, budget, command, judge_pytest)


def sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.path.join(h, folder) for h in homes if h for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next(
        (found for p in places if (found := shutil.which("compute-sanitizer", path=p))), None
    )


def steps() -> list[Step]:
    here = Path(__file__).resolve()
    python = [sys.executable]
    tool = sanitizer() or "compute-sanitizer"
    folder = results_folder().resolve()
    page = PAGE if folder == ROOT / "benches" / "results" else folder / "benchmarks.md"
    check = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a neighbour in torch's pool hides an overrun
    return [
        Step("touch", 60, [*python, str(here), "--touch"], judge_exit),
        pytest_step("tests", 150, "tests", "--ignore=tests/gpu", "-m", "gpu or not slow", "-k", "cuda"),
        pytest_step("streams", 60, "tests/gpu", "-m", "gpu"),
        Step("ceilings", 45, [*python, str(here.parent / "ceilings.py"), "--device", "cuda", "--eigh"], judge_exit),
        # As scripts: a machine that only lends its GPU need not have pytest-benchmark.
        *[
            Step(f"bench {op}", budget, [*python, str(here.parent / f"bench_{op}.py"), "--device", "cuda"], judge_exit)
            for op, budget in BENCHES
        ],
        # Results beside the committed ones belong on the committed page; others get a page of their own.
        Step("report", 20, [*python, str(here.parent / "report.py"), "--page", str(page)], judge_exit),
        *[
            Step(
                f"sanitizer {kind}",
                45,
                [tool, "--tool", kind, "--error-exitcode", str(SANITIZER_FOUND), *python, str(here), "--touch"],
                judge_sanitizer,
                check,
            )
            for kind in ("memcheck", "racecheck", "synccheck")
        ],
    ]


def touch() -> None:
    """Each op once, small, results checked against the reference: what the sanitizer tools run over."""
    from peers import by_reference

    generator = torch.Generator().manual_seed(0)

    def features(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(3, 20, 5, 5, generator=generator).to(dtype) for _ in range(2)]

    def moments(x: list[torch.Tensor], device: str) -> list[torch.Tensor]:
        f = 2 * x[0].shape[1]
        comoment = torch.zeros(f, f, dtype=torch.float64, device=device)
        total, shift = (torch.zeros(f, dtype=torch.float64, device=device) for _ in range(2))
        bad = torch.full((2,), torch.iinfo(torch.int64).max, device=device)
        zipfast.ops.moments_([comoment], [total], [bad], [t.to(device) for t in x], [shift], [1], [0])
        return [torch.triu(comoment.cpu()), total.cpu(), bad.cpu()]

    for dtype in (torch.float32, torch.float16, torch.float64):
        x = features(dtype)
        wanted = by_reference(partial(moments, x, "cpu"))()
        for ours, theirs in zip(moments(x, "cuda"), wanted):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)

    rows = [torch.randn(n, 50, generator=generator).double().index_fill_(0, torch.tensor([1]), 3.0) for n in (132, 67)]
    sums = [[x @ x.T for x in rows], [x.sum(1) for x in rows], [torch.zeros(len(x)).double() for x in rows]]
    wanted = by_reference(partial(zipfast.ops.correlate, *sums, [50, 50], False, True))()
    ours = zipfast.ops.correlate(*([t.cuda() for t in part] for part in sums), [50, 50], False, True)
    for a, b in zip((*ours[0], ours[1]), (*wanted[0], wanted[1]), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=2e-7)

    sim = torch.corrcoef(torch.randn(66, 200, generator=generator))
    sim = torch.triu(sim) + torch.triu(sim, 1).T
    for compat in (True, False):
        wanted = by_reference(partial(zipfast.ops.zip_match, [sim], 2, [33], [4], 0.3, compat))()
        for ours, theirs in zip(zipfast.ops.zip_match([sim.cuda()], 2, [33], [4], 0.3, compat), wanted):
            assert torch.equal(ours.cpu(), theirs), "zip_match: CUDA differs from the reference"

    x = features(torch.float32)
    order, start = torch.randperm(40, generator=generator), torch.arange(0, 41, 2)
    divisor = torch.full((20,), 2.0, dtype=torch.float64)
    wanted = by_reference(lambda: zipfast.ops.regroup(x, order, start, divisor, 1))()
    ours = zipfast.ops.regroup([t.cuda() for t in x], order.cuda(), start.cuda(), divisor.cuda(), 1).cpu()
    torch.testing.assert_close(ours, wanted)

    sigma = torch.rand(40, generator=generator, dtype=torch.float64) + 1
    z = torch.randn(40, 35, generator=generator, dtype=torch.float64)
    square, off = (z * z).sum(0) + 9, 0.1 * sigma[1:]
    for mode, tolerance, rounds in ((0, 1e-3, 11), (2, 1e-10, 100)):
        for offs in ([], [off]):
            options = ([60], [40], mode, tolerance, rounds, 1e-5, 1e-10, True)
            wanted = by_reference(partial(zipfast.ops.evidence, [sigma], offs, [z], [square], *options))()
            ours = zipfast.ops.evidence([sigma.cuda()], [t.cuda() for t in offs], [z.cuda()], [square.cuda()], *options)
            torch.testing.assert_close(ours[0].cpu(), wanted[0], rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(ours[2].cpu(), wanted[2], rtol=1e-6, atol=1e-9)

    touch_soups(generator)
    touch_tickets(generator)
    print("touched every op")


def touch_soups(generator: torch.Generator) -> None:
    """blend_, multidot and gram, on tensors of several blocks and lists of several launches."""
    from peers import by_reference

    models, sizes = 7, [20_000, 8192, 0, 1, 100] + [33] * 300
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    x = [torch.randn(n, generator=generator).to(kinds[(i + n) % 4]) for i in range(models) for n in sizes]
    x[0][9000] = torch.nan
    weight = torch.randn(models, len(sizes), generator=generator, dtype=torch.float64)

    def blended(device: str) -> list[torch.Tensor]:
        out = [torch.empty(n, dtype=(torch.float32, torch.bfloat16)[n % 2], device=device) for n in sizes]
        bad = torch.full((models + 1, len(sizes)), torch.iinfo(torch.int64).max, device=device)
        zipfast.ops.blend_(out, bad, [t.to(device) for t in x], weight.to(device))
        return [t.cpu() for t in (*out, bad)]

    for ours, theirs in zip(blended("cuda"), by_reference(lambda: blended("cpu"))(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)

    x[0][9000] = 1.0
    on_gpu, count = [t.cuda() for t in x], len(sizes)
    for call in (lambda x: zipfast.ops.multidot(x[:count], x), lambda x: zipfast.ops.gram(x, models, x[:count])):
        torch.testing.assert_close(call(on_gpu).cpu(), by_reference(partial(call, x))(), rtol=1e-9, atol=1e-9)


def touch_tickets(generator: torch.Generator) -> None:
    """threshold, apply_mask_, masked_step_ and sparse_linear with its gradients."""
    from peers import by_reference

    from zipfast.ops._mask import pack
    from zipfast.ops.sparse_linear import pack_weight, transpose_layout

    sizes = [20_000, 8192, 0, 1, 100] + [33] * 500
    x = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(4)]
    masks = [pack(torch.rand(n, generator=generator) < 0.4) for n in sizes]

    def masked(device: str) -> list[torch.Tensor]:
        param, first, second, grad = ([t.to(device, copy=True) for t in part] for part in x)
        mask = [m.to(device) for m in masks]
        kept, status = zipfast.ops.threshold(param, mask, [900, 4000], [i % 2 for i in range(len(sizes))])
        zipfast.ops.apply_mask_(first, kept, [])
        second = [t.square() for t in second]
        zipfast.ops.masked_step_(
            param, first, second, grad, kept, "adam", 2, 0.1, 0.0, 0.0, 0.0, False, 0.9, 0.99, 1e-8, False
        )
        return [t.cpu() for t in (*kept, status, *param, *first, *second)]

    for ours, theirs in zip(masked("cuda"), by_reference(lambda: masked("cpu"))(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    weight = torch.randn(70, 130, generator=generator)
    layout = pack_weight(weight, pack(torch.rand(70, 130, generator=generator) < 0.2))
    transposed = list(transpose_layout(layout[0], layout[1], 130))

    def sparse(device: str, batch: int) -> list[torch.Tensor]:
        seeded = torch.Generator().manual_seed(batch)
        given, grad = (torch.randn(batch, n, generator=seeded).to(device) for n in (130, 70))
        row_start, column, value, *back = (t.to(device) for t in (*layout, *transposed))
        return [
            zipfast.ops.sparse_linear(row_start, column, value, given, None).cpu(),
            zipfast.ops.sparse_linear_input(row_start, column, value, back, grad, 130).cpu(),
            zipfast.ops.sparse_linear_weight(row_start, column, grad, given).cpu(),
        ]

    for batch in (1, 5, 40):
        for ours, theirs in zip(sparse("cuda", batch), by_reference(partial(sparse, "cpu", batch))(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ running


def execute(step: Step, limit_s: float, environment: dict[str, str]) -> Outcome:
    begin = time.perf_counter()
    # To a file, not a pipe: what a killed step had printed by then is still there.
    with tempfile.TemporaryFile("w+", errors="replace") as log:
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
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read()
    late = f"failed: no end within {limit_s:.0f} s"
    if code is None and step.judge is judge_sanitizer:
        late = f"not run: no end within {limit_s:.0f} s"  # the tools slow a program down without bound
    status = late if code is None else step.judge(code, output)
    return Outcome(step.name, status, round(time.perf_counter() - begin, 1), output[-TAIL:])


def info() -> Outcome:
    begin = time.perf_counter()
    lines = [f"python {sys.version.split()[0]}", f"torch {torch.__version__}, CUDA {torch.version.cuda}"]
    for command in (["nvidia-smi"], ["nvcc", "--version"], [sanitizer() or "compute-sanitizer", "--version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
            lines.append(f"$ {' '.join(command)}\n{(done.stdout or done.stderr).strip()}")
        except (OSError, subprocess.TimeoutExpired) as e:
            lines.append(f"$ {' '.join(command)}\n{type(e).__name__}: {e}")
    for backend in ("cpu", "cuda"):
        lines.append(f"zipfast backend {backend}: {zipfast.ops.why_not(backend) or 'usable'}")
    return Outcome("info", OK, round(time.perf_counter() - begin, 1), "\n".join(lines)[-TAIL:])


def unusable() -> str | None:
    """Why nothing below can run: no GPU (``not run``), or a GPU that the built library cannot use (``failed``)."""
    reason = zipfast.ops.why_not("cuda")
    if reason is None:
        return None
    return f"failed: there is a GPU, but {reason}" if torch.cuda.is_available() else f"not run: {reason}"


def run_all(deadline_s: float, only: list[str]) -> list[Outcome]:
    begin = time.perf_counter()
    path = results_folder() / "gpu.json"
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search, "ZIPFAST_RUN": f"{time.time():.0f}-{os.getpid()}"}
    environment["RESULTS"] = str(results_folder().resolve())  # the steps run in the root, whatever the caller's folder
    outcomes: list[Outcome] = []

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"== {outcome.step:<20} {outcome.seconds:6.1f} s  {outcome.status}", flush=True)
        if outcome.status != OK and outcome.tail:
            print(outcome.tail, flush=True)
        write_json(path, {"deadline_s": deadline_s, "steps": [dataclasses.asdict(o) for o in outcomes]})

    first = info()
    print(first.tail, flush=True)
    note(first)
    obstacle = unusable()
    for step in steps():
        left = deadline_s - (time.perf_counter() - begin)
        if only and step.name.split()[0] not in only:
            note(Outcome(step.name, "not run: not asked for"))
        elif obstacle is not None:
            note(Outcome(step.name, obstacle))
        elif left < 5:
            note(Outcome(step.name, f"not run: the deadline of {deadline_s:.0f} s has passed"))
        else:
            print(f"-- {step.name}: at most {min(step.budget_s, left):.0f} s", flush=True)
            note(execute(step, min(step.budget_s, left), environment))
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, default=460, help="seconds for everything (default 460)")
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of steps, by their first word, e.g. tests bench sanitizer"
    )
    parser.add_argument("--require", action="store_true", help="exit code 2 if something was not run")
    parser.add_argument("--touch", action="store_true", help="only run each op once on the GPU")
    options = parser.parse_args(arguments)
    if options.touch:
        touch()
        return 0
    outcomes = run_all(options.deadline, options.only)
    failed = [o.step for o in outcomes if o.status.startswith("failed")]
    missing = [o.step for o in outcomes if o.status.startswith("not run")]
    print(
        f"\n{len(outcomes) - len(failed) - len(missing)} ok; failed: {', '.join(failed) or 'none'}; "
        f"NOT RUN: {', '.join(missing) or 'none'}"
    )
    return 1 if failed else 2 if missing and options.require else 0


if __name__ == "__main__":
    sys.exit(main())
