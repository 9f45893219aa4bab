# SPDX-License-Identifier: Apache-2.0
"""cuSOLVER's reduction, called through a library of the same interface that runs on the host, and in earnest on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from zipfast.ops import evidence
from zipfast.ranking import Basis, FeatureStats, cusolver, spectrum
from zipfast.ranking.cusolver import CusolverError, Solver, candidates, why_not_cusolver
from zipfast.ranking.spectrum import all_above, of_gram

CALLS = ("Create", "SetStream", "Dsytrd_bufferSize", "Dsytrd", "Dormtr_bufferSize", "Dormtr")


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("cusolver") / "libcusolver.so"
    source = Path(__file__).parent / "fake_cusolver.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", path, source, "-lm"], check=True)
    return str(path)


@pytest.fixture
def fake(library):
    """The library's own variables, as they were after the test."""
    loaded = ctypes.CDLL(library)
    names = {"fake_info": ctypes.c_int, "fake_error": ctypes.c_double, "fake_ormtr_info": ctypes.c_int}
    values = {name: kind.in_dll(loaded, name) for name, kind in names.items()}
    values["fake_status"] = (ctypes.c_int * 6).in_dll(loaded, "fake_status")
    values["fake_handles"] = ctypes.c_int.in_dll(loaded, "fake_handles")
    yield values
    for name in names:
        values[name].value = 0
    values["fake_status"][:] = [0] * 6


@pytest.fixture(params=["fake", "cuda"])
def place(request) -> tuple[Solver, torch.device]:
    """A solver and the device of its matrices."""
    if request.param == "fake":
        return Solver(request.getfixturevalue("library")), torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    if reasons := why_not_cusolver(device):
        pytest.skip("; ".join(reasons))
    return cusolver.solver(), device


@pytest.fixture
def on_cpu(library, monkeypatch):
    """The route of a GPU for matrices on the CPU."""
    found = Solver(library)
    monkeypatch.setattr(spectrum, "_tridiagonal", lambda *rest: spectrum._on_gpu(*rest, found))
    return found


def symmetric(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + 20, n, generator=g, dtype=torch.float64) + 1
    return x.T @ x


def dense(reduced) -> torch.Tensor:
    d, e = reduced.diagonal, reduced.offdiagonal
    return torch.diag(d) + torch.diag(e, 1) + torch.diag(e, -1)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 64])
def test_reduction_and_rotation(place, n):
    solver, device = place
    matrix = symmetric(n).to(device)
    before = matrix.clone()
    reduced = solver.reduce(matrix)
    assert reduced.info.tolist() == [0] and torch.equal(matrix, before)
    assert reduced.diagonal.shape == (n,) and reduced.offdiagonal.shape == (n - 1,)
    eye = torch.eye(n, dtype=torch.float64, device=device)
    q = solver.rotate(reduced, eye, False)
    assert (q.T @ q - eye).abs().max() <= 1e-12
    assert (q @ dense(reduced) @ q.T - matrix).abs().max() <= 1e-12 * matrix.abs().max()
    for columns in (0, 1, 2, n + 3):
        x = torch.randn(n, columns, dtype=torch.float64, device=device)
        kept = x.clone()
        for transposed, want in ((True, q.T @ x), (False, q @ x)):
            for given in (x, x.T.contiguous().T):  # row- and column-major
                got = solver.rotate(reduced, given, transposed)
                torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert torch.equal(x, kept)


def test_strided_matrix(place):
    solver, device = place
    wide = torch.stack([symmetric(9), symmetric(9, 1)], -1).to(device)
    for part in range(2):
        got, want = solver.reduce(wide[..., part]), solver.reduce(wide[..., part].contiguous())
        assert torch.equal(got.diagonal, want.diagonal) and torch.equal(got.offdiagonal, want.offdiagonal)


def test_a_handle_for_each_thread(library, fake):
    solver, matrix = Solver(library), symmetric(5)
    before = fake["fake_handles"].value
    for _ in range(3):
        solver.reduce(matrix)
    assert fake["fake_handles"].value == before + 1
    worker = threading.Thread(target=solver.reduce, args=(matrix,))
    worker.start()
    worker.join()
    assert fake["fake_handles"].value == before + 2


def test_on_the_current_stream(library):
    solver, stream = Solver(library), ctypes.c_void_p.in_dll(ctypes.CDLL(library), "fake_stream")
    stream.value = 5
    solver.reduce(symmetric(4))
    assert stream.value is None  # set to that of the CPU: none


@pytest.mark.gpu
def test_on_a_side_stream(place):
    solver, device = place
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    matrix = symmetric(300).to(device)
    want = solver.reduce(matrix).diagonal.clone()
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        got = solver.reduce(matrix.clone())
    torch.cuda.synchronize(device)
    assert torch.equal(got.diagonal, want)


@pytest.mark.parametrize("call", range(6))
def test_errors(library, fake, call):
    solver, matrix = Solver(library), symmetric(6)
    reduced = solver.reduce(matrix) if call > 3 else None
    fake["fake_status"][call] = 7
    solver = Solver(library) if call == 0 else solver  # a new one has no handle yet
    with pytest.raises(CusolverError, match=rf"^cusolverDn{CALLS[call]} failed with status 7 \(internal error\)$"):
        solver.rotate(reduced, matrix, True) if reduced else solver.reduce(matrix)


def test_a_failed_rotation_is_not_a_number(library, fake):
    solver, matrix = Solver(library), symmetric(6)
    reduced = solver.reduce(matrix)
    fake["fake_ormtr_info"].value = -5
    assert bool(solver.rotate(reduced, matrix, True).isnan().all())


# ------------------------------------------------------------------------------------------ as a route to the spectrum


def draw(n=300, d=70, k=4):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % k
    return torch.randn(n, d, generator=g, dtype=torch.float64) + torch.randn(k, d, generator=g)[y] / d**0.5 + 0.2, y


@pytest.mark.parametrize("mode", ["exact", "corrected", "reference"])
def test_the_route_gives_the_same_scores(on_cpu, monkeypatch, mode):
    x, y = draw()
    basis = Basis(x)
    assert basis.spectrum().offdiagonal is not None
    got = basis.score(y, mode=mode, mean=True)
    monkeypatch.setattr(spectrum, "why_not_tridiagonal", lambda gram, samples: ["switched off"])
    want = Basis(x).score(y, mode=mode, mean=True)
    assert abs(got.score - want.score) <= 1e-12
    torch.testing.assert_close(got.mean, want.mean, rtol=0, atol=1e-9 * float(want.mean.abs().max()))


def test_ranks_and_rounding_as_on_the_cpu(on_cpu):
    x, y = draw(300, 80)
    assert Basis(x).spectrum(public=True).offdiagonal is not None
    x[:, :10] = 0
    assert Basis(x).spectrum().offdiagonal is not None
    assert Basis(x).spectrum(public=True).offdiagonal is None
    tied = torch.cat([x[:, 10:], x[:, 10:40] @ torch.full((30, 3), 0.1, dtype=torch.float64)], 1)
    exact = FeatureStats().update(tied, y).score()
    assert abs(FeatureStats(precision="auto").update(tied.float(), y).score() - exact) <= 1e-4


@pytest.mark.parametrize(
    ("break_it", "match"),
    [
        (
            lambda fake: fake["fake_status"].__setitem__(3, 6),
            r"cusolverDnDsytrd failed with status 6 \(execution failed\)",
        ),
        (lambda fake: setattr(fake["fake_info"], "value", -3), r"cuSOLVER's tridiagonal form \(info -3\) is off by"),
        (
            lambda fake: setattr(fake["fake_error"], "value", 1e-2),
            r"\(info 0\) is off by [0-9.e-]+ on a vector of ones",
        ),
        (lambda fake: setattr(fake["fake_error"], "value", np.nan), r"\(info 0\) is off by nan on a vector of ones"),
        (lambda fake: setattr(fake["fake_ormtr_info"], "value", -9), r"\(info 0\) is off by nan on a vector of ones"),
    ],
    ids=["status", "info", "wrong", "nan", "rotation"],
)
def test_what_is_not_believed_ends_in_eigenvectors(on_cpu, fake, break_it, match):
    x, y = draw()
    want = Basis(x).score(y)
    break_it(fake)
    basis = Basis(x)
    with pytest.warns(RuntimeWarning, match=f"^of_gram: eigenvectors are formed on cpu, as .*{match}"):
        assert basis.spectrum().offdiagonal is None
    assert abs(basis.score(y).score - want.score) <= 1e-12


def test_routes():
    gram = symmetric(20)
    assert of_gram(gram, 40, route="tridiagonal").offdiagonal is not None
    assert of_gram(gram, 40).offdiagonal is None
    large = symmetric(64)
    assert of_gram(large, 90).offdiagonal is not None
    assert of_gram(large, 90, route="eigh").offdiagonal is None
    with pytest.raises(ValueError, match=r"^of_gram: 'route' must be one of auto, eigh, tridiagonal, got 'other'$"):
        of_gram(gram, 40, route="other")
    with pytest.raises(ValueError, match=r"^of_gram: 'route' must be eigh here, got 'tridiagonal': N <= D: null"):
        of_gram(gram, 20, route="tridiagonal")


def test_both_routes_on_the_device(place):
    _, device = place
    x, y = draw(900, 300)
    columns = torch.nn.functional.one_hot(y).double()
    gram, cross, square = (t.to(device) for t in (x.T @ x, x.T @ columns, (columns * columns).sum(0)))
    values = []
    for route in ("eigh", "tridiagonal"):
        s = of_gram(gram, 900, route=route)
        assert (s.offdiagonal is None) == (route == "eigh")
        off = [] if s.offdiagonal is None else [s.offdiagonal]
        options = ([900], [300], 2, 1e-10, 100, 0.0, 1e-10, True)
        value, status, mean = evidence([s.diagonal], off, [s.project(cross).contiguous()], [square], *options)
        assert (status[2] == 0).all()
        values.append((value[0], s.expand(mean.reshape(300, -1))))
    torch.testing.assert_close(values[0][0], values[1][0], rtol=0, atol=1e-12)
    torch.testing.assert_close(values[0][1], values[1][1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_all_above(n):
    g = np.random.default_rng(n)
    diagonal, off = g.standard_normal(n), g.standard_normal(n - 1)
    sigma = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    for limit, want in (
        (sigma[0] - 1e-9, True),
        (sigma[0] + 1e-9, False),
        (sigma[0] - 5, True),
        (sigma[-1] + 1, False),
    ):
        assert all_above(torch.from_numpy(diagonal), torch.from_numpy(off), float(limit)) is want
    assert not all_above(torch.tensor([1.0, np.nan]), torch.tensor([0.5]), 0.0)


# ------------------------------------------------------------------------------------------ where it is found


def test_candidates(monkeypatch, tmp_path):
    monkeypatch.setattr(cusolver, "loaded", lambda: ["/a/libcusolver.so.11.6.1", "/a/libcusolver.so.12"])
    (tmp_path / "lib64").mkdir()
    for suffix in (11, 12):
        (tmp_path / "lib64" / f"libcusolver.so.{suffix}").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    for version, suffix, first in (("12.8", 11, "/a/libcusolver.so.11.6.1"), ("13.0", 12, "/a/libcusolver.so.12")):
        found = candidates(version)
        assert found[0] == first and found[-1] == f"libcusolver.so.{suffix}"
        assert str(tmp_path / "lib64" / f"libcusolver.so.{suffix}") in found
    assert candidates("10.2") == []


def test_what_is_loaded(tmp_path, library):
    ctypes.CDLL(library)
    assert library in cusolver.loaded()


def test_reasons(monkeypatch, library):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    cusolver.solver.cache_clear()
    try:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert why_not_cusolver(gpu) == ["torch is built without CUDA"] and cusolver.solver() is None
        assert why_not_cusolver(cpu)[0] == "cuSOLVER does not run on cpu"
        cusolver.solver.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(cusolver, "candidates", lambda version: ["/nowhere/libcusolver.so.12", "libm.so.6"])
        assert why_not_cusolver(gpu) == ["none of these is cuSOLVER: /nowhere/libcusolver.so.12, libm.so.6"]
        cusolver.solver.cache_clear()
        monkeypatch.setattr(cusolver, "candidates", lambda version: ["libm.so.6", library])
        assert why_not_cusolver(gpu) == [] and cusolver.solver().path == library
    finally:
        cusolver.solver.cache_clear()
