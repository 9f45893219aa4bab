# SPDX-License-Identifier: Apache-2.0
"""An op is done when every room knows it: this walks the registered ops and names each empty room."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import zipfast
from zipfast.ops import OPS
from zipfast.ops._registry import Op

ROOT = Path(__file__).resolve().parent.parent
ON_DEVICE = sorted(name for name, op in OPS.items() if op.host_only is None)

# Room -> the file in it, by an op's stem.
FILES = {
    "schema, contract, reference, fake kernel": "zipfast/ops/{}.py",
    "C++ kernel": "csrc/cpu/{}.cpp",
    "CUDA kernel": "csrc/cuda/{}.cu",
    "glue of the CUDA kernel": "csrc/cuda/{}.cpp",
    "test": "tests/ops/test_{}.py",
    "bench": "benches/bench_{}.py",
}


def empty_rooms(name: str, op: Op | None) -> Iterator[str]:
    """Every room that does not know the op called ``name``."""
    stem = op.stem if op is not None and op.name == name else name.rstrip("_")
    host_only = op is not None and op.host_only is not None
    for room, pattern in FILES.items():
        there = (ROOT / pattern.format(stem)).is_file()
        if host_only and pattern.startswith("csrc/cuda/"):
            if there:
                yield f"{room}: {pattern.format(stem)} is there, but the op is declared host_only"
        elif not there:
            yield f"{room}: {pattern.format(stem)} is missing"
    docs = ROOT / "docs/ops.md"
    if not docs.is_file() or f"| `{name}` |" not in docs.read_text(encoding="utf-8"):
        yield f"docs: docs/ops.md has no row | `{name}` |"
    if op is None:
        yield "registry: not an op"
        return
    if not inspect.isfunction(op.reference) or op.reference.__module__ != f"zipfast.ops.{stem}":
        yield "reference: not a function of its own file"
    if getattr(zipfast.ops, name, None) is not op or name not in zipfast.ops.__all__:
        yield "zipfast.ops: not exported"
    qualified = f"zipfast::{name}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeExplicitAutograd"):
        yield "reference: not registered"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "Meta") and not callable(op.fake):
        yield "fake kernel: not registered"
    for backend in ("cpu",) if host_only else ("cpu", "emu"):
        if zipfast.available(backend) and not op.has(backend):
            yield f"{backend}: built, but without a kernel of it"


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_room_knows_the_op(name: str) -> None:
    missing = list(empty_rooms(name, OPS[name]))
    assert not missing, f"{name}: " + "; ".join(missing)


def test_an_unknown_op_is_missed_in_every_room() -> None:
    missing = list(empty_rooms("no_such_op_", None))
    for room in (*FILES, "docs", "registry"):
        assert any(line.startswith(room + ":") for line in missing), room


def test_an_op_of_another_file_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = list(empty_rooms("zip_match", OPS["regroup"]))
    assert "reference: not a function of its own file" in missing
    assert "zipfast.ops: not exported" in missing


@pytest.mark.parametrize(("folder", "suffix"), [("csrc/cpu", ".cpp"), ("csrc/cuda", ".cu"), ("csrc/cuda", ".cpp")])
def test_every_kernel_file_is_an_op(folder: str, suffix: str) -> None:
    stems = {path.stem for path in (ROOT / folder).glob("*" + suffix)}
    assert stems == {OPS[name].stem for name in (OPS if folder == "csrc/cpu" else ON_DEVICE)}


def test_the_build_knows_which_ops_are_host_only() -> None:
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    named = {
        key: set(re.search(rf"set\({key} ([\w ]+)\)", text)[1].split()) for key in ("ZIPFAST_OPS", "ZIPFAST_HOST_OPS")
    }
    assert named["ZIPFAST_OPS"] == {OPS[name].stem for name in ON_DEVICE}
    assert named["ZIPFAST_HOST_OPS"] == {op.stem for op in OPS.values() if op.host_only is not None}


def test_a_host_only_op_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(OPS) - set(ON_DEVICE):
        op = OPS[name]
        assert re.fullmatch(r"[a-z].*[^.]", op.host_only) and not op.has("cuda") and not op.has("emu")
        row = re.search(rf"^\| `{name}` \|.*$", (ROOT / "docs/ops.md").read_text(encoding="utf-8"), re.MULTILINE)
        assert row and "host only" in row[0]
        monkeypatch.setattr(op, "contract", lambda *args: None)
        for backend in ("cuda", "emu"):
            monkeypatch.setattr(zipfast.ops._registry, "_forced", backend)
            with pytest.raises(
                RuntimeError, match=f"^{name}: there is no '{backend}' kernel: {re.escape(op.host_only)}$"
            ):
                op()


def test_every_op_file_declares_its_op() -> None:
    stems = {path.stem for path in (ROOT / "zipfast/ops").glob("[!_]*.py")}
    assert stems == {op.stem for op in OPS.values()}


def test_every_bench_is_an_op() -> None:
    stems = {path.stem.removeprefix("bench_") for path in (ROOT / "benches").glob("bench_*.py")}
    assert stems <= {op.stem for op in OPS.values()}


def test_every_documented_row_is_an_op() -> None:
    docs = ROOT / "docs/ops.md"
    if not docs.is_file():
        pytest.fail("docs/ops.md is missing")
    rows = re.findall(r"^\| `(\w+)` \|", docs.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(OPS)


@pytest.mark.parametrize("name", sorted(OPS))
def test_names(name: str) -> None:
    op = OPS[name]
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*_?", name)
    assert op.name == op.__name__ == name
    owner = name.rstrip("_")  # the op whose files it shares: itself, or one whose name its own begins with
    assert op.stem == owner or (op.stem in OPS and owner.startswith(op.stem + "_"))
    assert op.schema.startswith(name + "(")
    arguments = [a.name for a in op.native._schema.arguments]
    for function in (op.reference, op.fake):
        assert list(inspect.signature(function).parameters) == arguments
    checked = arguments if op.paths is None else arguments[:-1]
    assert list(inspect.signature(op.contract).parameters) == checked
    assert ("path" in arguments) == (op.paths is not None) and arguments[len(checked) :] in ([], ["path"])
    assert re.search(rf"zipfast::{name}\b", str(op.native._schema))


@pytest.mark.parametrize(
    ("name", "room"),
    [(name, "csrc/cpu/{}.cpp") for name in sorted(OPS)] + [(name, "csrc/cuda/{}.cpp") for name in ON_DEVICE],
)
def test_host_functions_carry_the_stem(name: str, room: str) -> None:
    stem = OPS[name].stem
    text = (ROOT / room.format(stem)).read_text(encoding="utf-8")
    assert f"{name.rstrip('_')}_{room.split('/')[1]}(" in text
    assert f'm.impl("{name}"' in text


@pytest.mark.parametrize("name", ON_DEVICE)
def test_cuda_kernels_carry_the_stem(name: str) -> None:
    stem = OPS[name].stem
    text = (ROOT / f"csrc/cuda/{stem}.cu").read_text(encoding="utf-8")
    kernels = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text)
    assert kernels
    assert all((k.startswith(stem + "_") and k.endswith("_kernel")) or k == f"{stem}_kernel" for k in kernels), kernels
    assert "torch" not in "".join(re.findall(r"#include.*", text))
