# SPDX-License-Identifier: Apache-2.0
"""The choice of backend: by device, by ``with zipfast.backend(...)``, by ``ZIPFAST_BACKEND``, and without any library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zipfast
from zipfast.ops import _loader, _registry, regroup

PACKAGE = Path(zipfast.__file__).resolve().parent
NAMES = "torch, cpu, cuda, emu"


def call(device: str = "cpu", **how) -> torch.Tensor:
    x = torch.eye(2, device=device, **how)
    return regroup([x], torch.tensor([0, 1], device=device), torch.tensor([0, 2], device=device), None, 0)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def served_by() -> str:
    """``native``, ``emu`` or ``reference``: what a call dispatches to."""
    with Recorder() as recorder:
        call()
    for name in recorder.seen:
        if name.startswith("zipfast."):
            return "native"
        if name.startswith("zipfast_emu."):
            return "emu"
    return "reference"


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    """No override, whatever the environment of this test run says."""
    monkeypatch.setattr(_registry, "_forced", None)


def missing(monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    monkeypatch.setitem(_loader.LOADED, name, False)
    monkeypatch.setitem(_loader.ERRORS, name, reason)


def python(code: str, path: Path = PACKAGE.parent, **env: str) -> subprocess.CompletedProcess:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("ZIPFAST_")}
    keep["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], env={**keep, **env}, cwd=path, capture_output=True, text=True, timeout=120
    )


# --- the context manager ----------------------------------------------------------------------------------------------


def test_the_reference_always_runs(automatic: None) -> None:
    assert zipfast.available("torch") and zipfast.ops.why_not("torch") is None
    with zipfast.backend("torch"):
        assert served_by() == "reference"
        assert call().tolist() == [[1.0, 1.0]]


def test_each_name_chooses_its_implementation(automatic: None) -> None:
    served = {"torch": "reference", "cpu": "native", "emu": "emu"}
    for name in ("torch", "cpu", "emu"):
        if zipfast.available(name):
            with zipfast.backend(name):
                assert served_by() == served[name]
    assert served_by() == "native"


def test_nesting_restores(automatic: None) -> None:
    with zipfast.backend("torch"):
        with zipfast.backend(None):
            assert served_by() == "native"
            with zipfast.backend("torch"):
                assert served_by() == "reference"
            assert served_by() == "native"
        assert served_by() == "reference"
    assert served_by() == "native"


def test_an_exception_restores(automatic: None) -> None:
    with pytest.raises(KeyError), zipfast.backend("torch"):
        raise KeyError
    assert served_by() == "native"


def test_an_unusable_backend_leaves_the_choice_as_it_was(automatic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "cpu", "_cpu.so was not built")
    with zipfast.backend("torch"):
        with pytest.raises(RuntimeError), zipfast.backend("cpu"):
            pass
        assert served_by() == "reference"


@pytest.mark.parametrize("name", ["numpy", "", "CPU", "Torch"])
def test_unknown_names(name: str) -> None:
    for ask in (zipfast.available, zipfast.ops.why_not):
        with pytest.raises(ValueError, match=f"^backend must be one of {NAMES}, got {name!r}$"):
            ask(name)
    with pytest.raises(ValueError, match=f"^backend must be one of {NAMES}, got {name!r}$"), zipfast.backend(name):
        pass


def test_a_backend_that_is_not_there_says_why(automatic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    missing(monkeypatch, "cpu", "_cpu.so was not built")
    assert not zipfast.available("cpu") and zipfast.ops.why_not("cpu") == "_cpu.so was not built"
    message = "^backend 'cpu' is not usable here: _cpu.so was not built$"
    with pytest.raises(RuntimeError, match=message), zipfast.backend("cpu"):
        pass
    monkeypatch.delitem(_loader.ERRORS, "cpu")
    assert zipfast.ops.why_not("cpu") == "_cpu.so is not loaded"


def test_cuda_without_a_device_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_loader.LOADED, "cuda", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert zipfast.ops.why_not("cuda") == "torch sees no CUDA device"
    with pytest.raises(RuntimeError, match=r"^backend 'cuda' is not usable here: torch sees no CUDA device$"):
        zipfast.backend("cuda").__enter__()


@pytest.mark.parametrize("name", ["cpu", "emu"])
def test_a_forced_backend_that_vanished_says_why(automatic: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    zipfast.available("emu")  # defines the emulator's schemas
    monkeypatch.setattr(_registry, "_forced", name)
    missing(monkeypatch, name, "gone")
    with pytest.raises(RuntimeError, match=f"^regroup: backend '{name}' is not usable here: gone$"):
        call()


def test_a_forced_backend_refuses_other_devices(automatic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_forced", "cpu")
    with pytest.raises(
        RuntimeError, match=r"^regroup: backend 'cpu' is forced, but an argument is on meta; move it with "
    ):
        call("meta")
    monkeypatch.setattr(_registry, "_forced", "cuda")
    message = r"backend 'cuda' is forced, but an argument is on cpu; move it with .to\('cuda'\) or lift the override"
    with pytest.raises(RuntimeError, match=message):
        call()
    monkeypatch.setattr(_registry, "_forced", None)
    assert call("meta").shape == (1, 2)


def test_the_contract_comes_first(automatic: None) -> None:
    for name in ("torch", "cpu", "emu"):
        if zipfast.available(name):
            with zipfast.backend(name), pytest.raises(TypeError, match="regroup: 'x' must be float32"):
                call(dtype=torch.int32)


@pytest.mark.parametrize("name", sorted(zipfast.ops.OPS))
def test_has(name: str, automatic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    op = zipfast.ops.OPS[name]
    assert op.has("torch")
    assert op.has("cpu") == zipfast.available("cpu")
    assert op.has("emu") == (zipfast.available("emu") and op.host_only is None)
    missing(monkeypatch, "cpu", "gone")
    assert not op.has("cpu")


# --- the environment, and a package without libraries -----------------------------------------------------------------

SERVED = """
import torch, zipfast
from torch.utils._python_dispatch import TorchDispatchMode
seen = []
class Recorder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen.append(str(func))
        return func(*args, **(kwargs or {}))
with Recorder():
    zipfast.ops.regroup([torch.eye(2)], torch.tensor([0, 1]), torch.tensor([0, 2]), None, 0)
print(*[name.split(".")[0] for name in seen if name.startswith("zipfast")] or ["reference"])
"""


@pytest.mark.parametrize(
    ("name", "served"), [("torch", "reference"), ("cpu", "zipfast"), ("emu", "zipfast_emu"), ("", "zipfast")]
)
def test_environment(name: str, served: str) -> None:
    if name and not zipfast.available(name):
        pytest.skip(f"backend {name!r}: {zipfast.ops.why_not(name)}")
    done = python(SERVED, ZIPFAST_BACKEND=name)
    assert (done.returncode, done.stdout.strip()) == (0, served), done.stderr


def test_environment_torch_loads_nothing() -> None:
    done = python(
        "import zipfast; print(zipfast.ops.why_not('cpu'), zipfast.ops.why_not('cuda'), sep='|')",
        ZIPFAST_BACKEND="torch",
    )
    assert done.stdout.strip() == "|".join(["not loaded, as ZIPFAST_BACKEND=torch"] * 2), done.stderr
    assert "Warning" not in done.stderr


def test_environment_of_an_unknown_name() -> None:
    done = python("import zipfast", ZIPFAST_BACKEND="numpy")
    assert done.returncode != 0
    assert done.stderr.strip().endswith(f"ValueError: ZIPFAST_BACKEND must be one of {NAMES}, got 'numpy'")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package without its compiled libraries."""
    root = tmp_path_factory.mktemp("bare")
    shutil.copytree(PACKAGE, root / "zipfast", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return root


WARNS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import zipfast
ours = [w for w in caught if "zipfast" in str(w.message)]
print(len(ours), *(w.category.__name__ for w in ours))
print(ours[0].message if ours else "")
print(zipfast.ops.why_not("cpu"), zipfast.ops.why_not("emu"), sep="|")
"""


def test_missing_libraries_give_one_plain_warning(bare: Path) -> None:
    done = python(WARNS, bare)
    assert done.returncode == 0, done.stderr
    count, message, reasons = done.stdout.strip().splitlines()
    assert count == "1 RuntimeWarning"
    assert message.startswith("zipfast: the compiled CPU kernels are missing (_cpu.so was not built)")
    assert "pip install" in message and "\n" not in message
    assert reasons == "_cpu.so was not built|_emu.so was not built"


def test_missing_libraries_are_shown_once_by_default(bare: Path) -> None:
    done = python("import zipfast\nimport zipfast.ops", bare)
    assert done.returncode == 0
    assert done.stderr.count("RuntimeWarning") == 1
    assert "<string>:1: RuntimeWarning" in done.stderr  # it points at the user's import, not into the package


def test_no_warning_where_libraries_are_there() -> None:
    if not zipfast.available("cpu"):
        pytest.skip(f"backend 'cpu': {zipfast.ops.why_not('cpu')}")
    done = python("import zipfast", PYTHONWARNINGS="error::RuntimeWarning")
    assert done.returncode == 0, done.stderr


def test_no_warning_where_the_reference_was_asked_for(bare: Path) -> None:
    done = python("import zipfast", bare, ZIPFAST_BACKEND="torch")
    assert (done.returncode, done.stderr) == (0, "")


def test_without_libraries_the_reference_serves(bare: Path) -> None:
    code = """
import warnings; warnings.simplefilter("ignore")
import torch, zipfast
x = torch.ones(4, 3, requires_grad=True)
got = zipfast.ops.regroup([x], torch.arange(4), torch.tensor([0, 2, 4]), None, 0)
print(got.tolist(), got.requires_grad)
comoment, total = torch.zeros(3, 3).double(), torch.zeros(3).double()
zipfast.ops.moments_([comoment], [total], [torch.zeros(1).long()], [x], [torch.zeros(3).double()], [1], [0])
print(total.tolist(), comoment.requires_grad, total.requires_grad)
sim = torch.tensor([[0.0, 0.5, 0.1], [0.5, 0.0, 0.2], [0.1, 0.2, 0.0]])
print([v.tolist() for v in zipfast.ops.zip_match([sim], 1, [2], [9], 1.0, False)])
try:
    zipfast.ops.zip_match([sim], 1, [4], [9], 1.0, False)
except ValueError as e:
    print(e)
try:
    zipfast.backend("cpu").__enter__()
except RuntimeError as e:
    print(e)
"""
    done = python(code, bare)
    assert done.stdout.splitlines() == [
        "[[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]] False",
        "[4.0, 4.0, 4.0] False False",
        "[[0, 0, 1], [[0, 1]], [0.5], [[0, -1, -1, -1]]]",
        "zip_match: 'keep' must be in [1, 3], got 4",
        "backend 'cpu' is not usable here: _cpu.so was not built",
    ], done.stderr


def test_a_library_that_does_not_load_says_why(bare: Path, tmp_path: Path) -> None:
    shutil.copytree(bare / "zipfast", tmp_path / "zipfast")
    (tmp_path / "zipfast" / "_cpu.so").write_bytes(b"not a library")
    done = python(WARNS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 RuntimeWarning\n")
    assert "(_cpu.so was built but does not load: " in done.stdout


def test_import_draws_no_random_numbers_and_sets_no_flags() -> None:
    code = """
import torch
before = torch.random.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
import zipfast
after = torch.random.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
print(torch.equal(before[0], after[0]), before[1:] == after[1:], torch.is_grad_enabled())
"""
    done = python(code)
    assert done.stdout.strip() == "True True True", done.stderr


# --- ZIPFAST_REQUIRE --------------------------------------------------------------------------------------------------


def test_a_required_backend_may_not_skip(pytestconfig: pytest.Config) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_regroup.py", "-k", "table"],
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "ZIPFAST_REQUIRE": "cpu,emu,cuda", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if all(zipfast.available(name) for name in ("cpu", "emu", "cuda")):
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        assert "is required by ZIPFAST_REQUIRE, but: " in done.stdout
