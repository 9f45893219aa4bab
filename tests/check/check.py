# SPDX-License-Identifier: Apache-2.0
"""`make check`: what a test suite cannot see. Each step alone: ``python tests/check/check.py STEP ...``.

lint       ruff, mypy, clang-format
cuda       every .cu compiled for all architectures, warnings and register spills are errors; registers, stack and shared
           memory of each kernel are printed and held against kernels.py
load       the CUDA library loads under a torch without CUDA and has a kernel for each op that is not host-only
symbols    the libraries use torch's stable ABI only, and no Python
install    a machine without a compiler gets a pure wheel, and the package warns once and works
simd       the C++ product kernels for AVX2 and for the baseline, whatever this processor has
seeds      the emulated CUDA kernels under several schedules
sanitize   C++ kernels under address and undefined-behaviour sanitizers, with assertions on
races      CUDA kernels on the emulator under the thread sanitizer
docs       the site, built with warnings as errors: links, anchors, arguments that docstrings name; every public name is in
           the reference, and nothing comes from elsewhere
mergekit   real merges through mergekit's own commands and PEFT's own classes, in an environment of their own
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import kernels
import site_check

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "check"
OP_TESTS = str(ROOT / "tests" / "ops")
BAD_SYMBOL = re.compile(r"_ZNK?(2at|3c10|5torch)| Py[A-Z_]")
# Every kernel and path on the emulator, without what only repeats them: for further schedules, and under a sanitizer,
# where a test takes ten times as long.
EVERY_KERNEL = (
    "emu and (apply_mask or regroup or test_blend or correlate or (masked_step and not ten_steps)"
    " or (threshold and (brackets or ties or groups or table))"
    " or (multidot and (table or test_sizes)) or (test_gram and (many_models or table or integers or position))"
    " or (sparse_linear and batches) or (zip_match and (test_table or misaligned or whatever or test_sizes))"
    " or (test_evidence and (definition or same_steps))"
    " or (test_moments and (test_sizes or halves or test_features or several_parts or two_calls)))"
)
PARALLEL = ("-p", "no:benchmark", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal")  # as `make test`
ONE_THREAD = {"ZIPFAST_TEST_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SPILLS = "-Xptxas=--warn-on-spills,--warning-as-error"


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Run a command; its output, or SystemExit with the end of it."""
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**os.environ, **(env or {})}, text=True, capture_output=True
    )
    output = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(f"{output[-6000:]}\nfailed ({done.returncode}): {' '.join(map(str, command))}")
    return output


def tool(name: str) -> str:
    """A program of this environment, or of the machine."""
    for folder in (Path(sys.executable).parent, None):
        found = shutil.which(name, path=str(folder) if folder else None)
        if found:
            return found
    raise SystemExit(f"{name} is not installed; pip install 'zipfast[check]' brings the linters, nvcc comes with CUDA")


def build(folder: str, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """A copy of the package with libraries of its own, built with these options; the copy's folder."""
    place = BUILD / folder
    shutil.rmtree(place / "zipfast", ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "zipfast", place / "zipfast", ignore=ignore)
    run(
        tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", place / "build", f"-DZIPFAST_OUTPUT_DIR={place / 'zipfast'}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DZIPFAST_WERROR=ON", *options,
    )  # fmt: skip
    log = run(tool("cmake"), "--build", place / "build", *[f"--target={t}" for t in targets])
    (place / "build.log").write_text(log)
    return place


def pytest(place: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run tests against the package in ``place``; from there, as Python looks in the current folder first."""
    settings = {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    code = "import zipfast; print(zipfast.__file__)"
    used = run(sys.executable, "-c", code, env=settings, cwd=place).splitlines()[-1]
    if not Path(used).is_relative_to(place):
        raise SystemExit(f"the tests would run against {used}, not against {place}")
    output = run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PARALLEL, *arguments, env=settings, cwd=place
    )
    print("   ", output.strip().splitlines()[-1])


def lint() -> None:
    run(tool("ruff"), "check", ".")
    run(tool("ruff"), "format", "--check", ".")
    run(tool("mypy"))
    sources = [str(p) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    run(tool("clang-format"), "--dry-run", "-Werror", *sources)


def cuda() -> Path:
    # What ptxas says of a kernel is in the log of its compilation only: each is compiled again.
    shutil.rmtree(BUILD / "cuda" / "build" / "CMakeFiles" / "cuda.dir", ignore_errors=True)
    place = build("cuda", "-DZIPFAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={tool('nvcc')}", f"-DCMAKE_CUDA_FLAGS={SPILLS}")
    used = kernels.read((place / "build.log").read_text())
    for line in kernels.table(used):
        print("   ", line)
    if wrong := kernels.problems(used):
        raise SystemExit("\n".join(wrong))
    return place


def load() -> None:
    place = BUILD / "cuda"
    if not (place / "zipfast" / "_cuda.so").exists():
        cuda()
    code = (
        "import torch, zipfast\n"
        "from zipfast.ops import OPS\n"
        "device = {n: op for n, op in OPS.items() if op.host_only is None}\n"
        "missing = [n for n, op in device.items() if not op.has('cuda')]\n"
        "assert not missing, f'no CUDA kernel registered for {missing}'\n"
        "print(len(device), 'ops have a CUDA kernel,', len(OPS) - len(device), 'are host-only')"
    )
    print(
        "   ",
        run(sys.executable, "-c", code, env={"PYTHONPATH": str(place), "ZIPFAST_LOAD_CUDA": "1"}, cwd=place).strip(),
    )


def symbols() -> None:
    for name in ("_cpu.so", "_cuda.so"):
        undefined = run("nm", "-D", "--undefined-only", BUILD / "cuda" / "zipfast" / name).splitlines()
        bad = [line.strip() for line in undefined if BAD_SYMBOL.search(line)]
        if bad:
            raise SystemExit(f"{name} must use the stable ABI only, got {bad[:5]}")
        print(f"    {name}: {len(undefined)} undefined symbols, none of ATen, c10 or Python")


def install() -> None:
    wheels = BUILD / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    # No compiler: a PATH with nothing but the interpreter.
    env = {"PATH": str(Path(sys.executable).parent), "CXX": "", "ZIPFAST_NATIVE": "auto"}
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, ".", env=env)
    wheel = next(wheels.glob("*.whl"))
    if not wheel.name.endswith("py3-none-any.whl"):
        raise SystemExit(f"without a compiler the wheel must be pure, got {wheel.name}")
    place = BUILD / "pure"
    shutil.rmtree(place, ignore_errors=True)
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, wheel)
    code = (
        "import warnings, torch\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import zipfast\n"
        "assert len(seen) == 1 and 'pure-torch' in str(seen[0].message), [str(w.message) for w in seen]\n"
        "assert zipfast.match(torch.eye(4)).keep == 2\n"
        "print('pure install: one warning, and it works')"
    )
    print("   ", run(sys.executable, "-c", code, env={"PYTHONPATH": str(place)}, cwd=place).strip())


def as_built() -> Path:
    """A copy of the package with the libraries that lie in it, which ``make check`` brings up to date first."""
    place = BUILD / "as-built"
    if not (ROOT / "zipfast" / "_emu.so").exists():
        return build("as-built", "-DZIPFAST_EMU=ON")
    shutil.rmtree(place / "zipfast", ignore_errors=True)
    shutil.copytree(ROOT / "zipfast", place / "zipfast", ignore=shutil.ignore_patterns("__pycache__"))
    return place


def simd() -> None:
    place = as_built()
    for level in ("avx2", "baseline"):
        env = {"ZIPFAST_SIMD": level, "ZIPFAST_REQUIRE": "cpu", **ONE_THREAD}
        pytest(place, f"{OP_TESTS}/test_moments.py", "-k", "cpu", env=env)


def seeds() -> None:
    place = as_built()
    for seed in (0, 3):  # the suite itself has run seed 1
        env = {"CUDA_EMU_SEED": str(seed), "ZIPFAST_REQUIRE": "emu", **ONE_THREAD}
        pytest(place, OP_TESTS, "-k", EVERY_KERNEL, env=env)


def sanitize() -> None:
    # No NDEBUG: the numbered rules of the kernels are asserted.
    place = build("asan", "-DZIPFAST_EMU=ON", "-DZIPFAST_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=Check",
                  "-DCMAKE_CXX_FLAGS=-O1")  # fmt: skip
    libraries = [run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    env = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        **ONE_THREAD,
    }
    pytest(place, OP_TESTS, "-k", "cpu", env={**env, "ZIPFAST_REQUIRE": "cpu"})
    pytest(place, OP_TESTS, "-k", EVERY_KERNEL, env={**env, "ZIPFAST_REQUIRE": "emu"})


def races() -> None:
    place = build("tsan", "-DZIPFAST_EMU=ON", "-DZIPFAST_SANITIZE=thread", targets=("emu", "cpu"))
    library = run("g++", "-print-file-name=libtsan.so").strip()
    # One torch thread, and one of NumPy's and SciPy's BLAS (the oracles): their thread pools are not built for the
    # sanitizer, which takes their hand-overs for races. The emulator's threads are.
    env = {
        "LD_PRELOAD": library,
        "TSAN_OPTIONS": "halt_on_error=1",
        "ZIPFAST_REQUIRE": "emu",
        **ONE_THREAD,
    }
    pytest(place, OP_TESTS, "-k", EVERY_KERNEL, env=env)


def docs() -> None:
    # python -m: an environment that has the packages without their scripts serves as well
    place = ROOT / "build" / "site"
    if missing := site_check.missing():
        raise SystemExit(f"{missing} is not installed; pip install 'zipfast[docs]' brings what the site needs")
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "tests/check/test_site.py")
    # not --quiet: what is not shown is not counted, and strict lets it pass
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "-d", place, env={"NO_MKDOCS_2_WARNING": "1"})
    if wrong := site_check.problems(place):
        raise SystemExit("\n".join(wrong))
    print(f"    {place / 'index.html'}: {len(list(place.rglob('*.html')))} pages")


def mergekit() -> None:
    print("   ", run(sys.executable, ROOT / "tests" / "check" / "mergekit_env.py").strip().splitlines()[-1])


STEPS: dict[str, Callable[[], object]] = {
    f.__name__: f for f in (lint, cuda, load, symbols, install, simd, seeds, sanitize, races, docs, mergekit)
}


def main() -> None:
    wanted = sys.argv[1:] or list(STEPS)
    unknown = [w for w in wanted if w not in STEPS]
    if unknown:
        raise SystemExit(f"unknown step {unknown[0]!r}; there are {', '.join(STEPS)}")
    for name in wanted:
        start = time.perf_counter()
        print(f"check {name}", flush=True)
        STEPS[name]()
        print(f"    ok, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(wanted)} passed, 0 failed")


if __name__ == "__main__":
    main()
