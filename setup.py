# SPDX-License-Identifier: Apache-2.0
"""Builds zipfast's compiled parts with CMake (see CMakeLists.txt) for whichever PyTorch is installed.

Environment (all optional):
  ZIPFAST_NATIVE=auto|0|1    0: pure Python; 1: fail if the C++ part cannot be built (auto: warn and go on without)
  ZIPFAST_CUDA=auto|0|1      auto: if the installed torch is a CUDA build and nvcc is found; 1 also builds for a CPU torch
  ZIPFAST_EMU=0|1            1: also build the CUDA sources for the host emulator (the tests' fourth backend)
  ZIPFAST_TORCH              the folder that holds the torch package, if it is not this interpreter's own
  TORCH_CUDA_ARCH_LIST       as elsewhere, e.g. "8.0;9.0+PTX"; default: the GPUs of this machine, else 8.0;9.0+PTX
  MAX_JOBS                   parallel compile jobs
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def env(name: str) -> str:
    v = os.environ.get(name, "auto").strip().lower()
    return {"on": "1", "true": "1", "yes": "1", "off": "0", "false": "0", "no": "0", "": "auto"}.get(v, v)


def find_torch() -> Path | None:
    """The folder of the installed torch, never imported.  Under pip's build isolation it is hidden from sys.path, but the
    interpreter is still the environment's own, so its site-packages can be looked up; with the stable ABI that is all
    a build needs, and nothing gigabyte-sized goes into the build environment."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    dirs = [
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *site.getsitepackages(),
        site.getusersitepackages(),
    ]
    if os.environ.get("ZIPFAST_TORCH"):
        dirs.insert(0, os.environ["ZIPFAST_TORCH"])
    for d in dirs:
        if (Path(d) / "torch" / "version.py").is_file():
            return Path(d) / "torch"
    return None


def torch_facts(torch: Path) -> tuple[tuple[int, int], str | None]:
    text = (torch / "version.py").read_text()
    ver = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    cuda = re.search(r"^cuda: .*= '([^']+)'", text, re.MULTILINE)
    return (int(ver[1]), int(ver[2])), cuda[1] if cuda else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for c in ([f"{home}/bin/nvcc"] if home else []) + [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]:
        if c and Path(c).exists():
            return c
    return None


def nvcc_major(nvcc: str) -> str:
    return re.search(r"release (\d+)\.", subprocess.check_output([nvcc, "--version"], text=True))[1]


def cuda_archs() -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") in CMake's words ("80-real;90-virtual;90a-real")."""
    lst = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not lst:
        try:
            caps = subprocess.check_output(
                ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], text=True, stderr=subprocess.DEVNULL
            ).split()
            lst = ";".join(sorted(set(caps)))
        except (OSError, subprocess.CalledProcessError):
            lst = ""
    out = []
    for a in re.split(r"[;, ]+", lst or "8.0;9.0+PTX"):
        m = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", a)
        if not m:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: cannot read {a!r}")
        if (m[1], m[2]) == ("9", "0"):
            # One machine code for 9.0, the one with Hopper's own instructions; PTX with those would serve no other GPU.
            out += ["90-virtual"] * bool(m[4]) + ["90a-real"]
        else:
            out.append(f"{m[1]}{m[2]}{m[3]}" + ("" if m[4] else "-real"))
    return ";".join(dict.fromkeys(out))


def plan() -> tuple[list[str] | None, str]:
    """CMake's arguments, or None and the reason why there is no native build."""
    if env("ZIPFAST_NATIVE") == "0":
        return None, "ZIPFAST_NATIVE=0"
    torch = find_torch()
    if torch is None:
        return None, "no PyTorch is installed in this environment (install torch first, then zipfast)"
    version, cuda = torch_facts(torch)
    if version < (2, 10):
        return None, f"torch {version[0]}.{version[1]} is older than 2.10"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        return None, "no C++ compiler was found"
    args = [f"-DTORCH_ROOT={torch}"]
    nvcc, want = find_nvcc(), env("ZIPFAST_CUDA")
    if want == "1" or (want == "auto" and cuda and nvcc and nvcc_major(nvcc) == cuda.split(".")[0]):
        if nvcc is None:
            raise SystemExit("ZIPFAST_CUDA=1, but no nvcc was found (set CUDA_HOME)")
        args += ["-DZIPFAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={cuda_archs()}"]
        why = f"C++ and CUDA (nvcc {nvcc_major(nvcc)}, archs {cuda_archs()})"
    else:
        args += ["-DZIPFAST_CUDA=OFF"]
        why = (
            "C++ only ("
            + (
                "ZIPFAST_CUDA=0"
                if want == "0"
                else "torch is a CPU build"
                if not cuda
                else "no nvcc was found"
                if not nvcc
                else f"nvcc {nvcc_major(nvcc)} does not match torch's CUDA {cuda}"
            )
            + ")"
        )
    return args, f"torch {version[0]}.{version[1]} at {torch}: {why}"


ARGS, WHY = plan()
BANNER = "\n" + "*" * 78 + "\n* zipfast: {}\n" + "*" * 78 + "\n"


class CMakeBuild(build_ext):
    def run(self) -> None:
        print(BANNER.format(WHY), file=sys.stderr, flush=True)
        out = ROOT / "zipfast" if self.inplace or self.editable_mode else Path(self.build_lib).resolve() / "zipfast"
        tmp = Path(self.build_temp).resolve()
        tmp.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        gen = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        try:
            import pybind11

            gen += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
            jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
            subprocess.check_call(
                [
                    "cmake",
                    "-S",
                    str(ROOT),
                    "-B",
                    str(tmp),
                    *gen,
                    *ARGS,
                    f"-DZIPFAST_OUTPUT_DIR={out}",
                    f"-DZIPFAST_EMU={'ON' if env('ZIPFAST_EMU') == '1' else 'OFF'}",
                    f"-DPython_EXECUTABLE={sys.executable}",
                ]
            )
            subprocess.check_call(["cmake", "--build", str(tmp), "-j", jobs])
        except (OSError, ImportError, subprocess.CalledProcessError) as e:
            if env("ZIPFAST_NATIVE") == "1":
                raise SystemExit(f"zipfast: the native build failed: {e}") from e
            print(
                BANNER.format(f"the native build FAILED ({e}); installing the pure-torch version"),
                file=sys.stderr,
                flush=True,
            )

    def get_outputs(self):
        return []


class BuildPython(build_py):
    """Also what ``zipfast bench`` needs of ``benches/`` and of git: an editable install finds both in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "zipfast"
        (package / "benches").mkdir(parents=True, exist_ok=True)
        for source in sorted((ROOT / "benches").glob("*.py")):
            if source.name != "conftest.py":
                self.copy_file(str(source), str(package / "benches" / source.name))
        stamp = package / "_commit.txt"
        stamp.unlink(missing_ok=True)
        if commit := git_commit():
            stamp.write_text(commit + "\n")


def git_commit() -> str | None:
    """Of this tree, if it is a checkout of its own and not only lies in one."""
    try:
        top, commit, changes = (
            subprocess.check_output(["git", *words], cwd=ROOT, text=True, stderr=subprocess.DEVNULL).strip()
            for words in (
                ["rev-parse", "--show-toplevel"],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--", "csrc", "zipfast"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "") if Path(top).resolve() == ROOT else None


if ARGS is None:
    if env("ZIPFAST_NATIVE") == "1":
        raise SystemExit(f"zipfast: ZIPFAST_NATIVE=1, but there is no native build: {WHY}")
    print(BANNER.format(f"pure-torch install, without compiled kernels: {WHY}"), file=sys.stderr, flush=True)

setup(
    ext_modules=[Extension("zipfast._C", [])] if ARGS else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    setup_requires=["cmake>=3.20"]
    if ARGS and not shutil.which("cmake")
    else [],  # PEP 517: a dynamic build requirement
)
