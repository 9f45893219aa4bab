# SPDX-License-Identifier: Apache-2.0
"""Which kernel `path="auto"` may take on a device, and what is refused."""

from __future__ import annotations

import contextlib
import threading
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import zipfast
from zipfast.ops import OPS
from zipfast.ops._paths import Paths

GPU = torch.device("cuda", 0)
WITH_PATHS = [op for op in OPS.values() if op.paths is not None]


@pytest.fixture(autouse=True)
def _no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


def test_a_path_is_proven_once_a_device() -> None:
    asked: list[torch.device] = []
    paths = Paths(("generic", "fast"), lambda device: asked.append(device))
    assert [paths.settle("op", "auto", GPU) for _ in range(3)] == ["auto"] * 3
    assert paths.settle("op", "auto", torch.device("cuda", 1)) == "auto"
    assert asked == [GPU, torch.device("cuda", 1)]


def test_a_path_that_differs_is_not_taken_and_said_once() -> None:
    paths = Paths(("generic", "fast"), lambda device: "path 'fast' is off by 3")
    with pytest.warns(
        RuntimeWarning, match="op: on cuda:0 path 'generic' is used for everything, as path 'fast' is off"
    ):
        assert paths.settle("op", "auto", GPU) == "generic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paths.settle("op", "auto", GPU) == "generic"
        assert paths.settle("op", "fast", GPU) == "fast"  # by name: as asked


def test_the_proof_itself_may_call_the_op() -> None:
    seen: list[str] = []
    paths = Paths(("generic", "fast"), lambda device: seen.append(paths.settle("op", "auto", device)))
    assert paths.settle("op", "auto", GPU) == "auto"
    assert seen == ["generic"]


def test_nothing_is_proven_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    paths = Paths(("generic", "fast"), lambda device: asked.append(device))
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert paths.settle("op", "auto", GPU) == "generic" and not asked
    assert paths.settle("op", "auto", GPU) == "auto" and asked == [GPU]


def test_a_proof_that_raises_is_asked_again() -> None:
    answers = iter([MemoryError("none left"), None])

    def prove(device: torch.device) -> None:
        if (answer := next(answers)) is not None:
            raise answer

    paths = Paths(("generic", "fast"), prove)
    with pytest.raises(MemoryError):
        paths.settle("op", "auto", GPU)
    assert paths.settle("op", "auto", GPU) == "auto"


def test_nothing_is_proven_on_fake_tensors() -> None:
    asked: list[torch.device] = []
    paths = Paths(("generic", "fast"), lambda device: asked.append(device))
    with FakeTensorMode():
        assert paths.settle("op", "auto", GPU) == "generic" and not asked


def test_threads_wait_for_the_proof() -> None:
    began, go_on = threading.Event(), threading.Event()

    def prove(device: torch.device) -> None:
        began.set()
        assert go_on.wait(30)

    paths, taken = Paths(("generic", "fast"), prove), []
    workers = [threading.Thread(target=lambda: taken.append(paths.settle("op", "auto", GPU))) for _ in range(2)]
    workers[0].start()
    assert began.wait(30)
    workers[1].start()
    go_on.set()
    for w in workers:
        w.join(30)
    assert taken == ["auto", "auto"]


@pytest.mark.parametrize("op", WITH_PATHS, ids=lambda op: op.name)
def test_unknown_paths_are_refused(op: zipfast.ops._registry.Op) -> None:
    names = ", ".join(("auto", *op.paths.names))
    with pytest.raises(ValueError, match=rf"^{op.name}: 'path' must be one of {names}, got 'fastest'$"):
        op.paths.check(op.name, "fastest")
    with pytest.raises(TypeError, match=rf"^{op.name}: 'path' must be a string, got int$"):
        op.paths.check(op.name, 3)


@pytest.mark.parametrize("op", WITH_PATHS, ids=lambda op: op.name)
def test_every_path_is_in_the_documents(op: zipfast.ops._registry.Op) -> None:
    assert all(f'``"{name}"``' in (op.__doc__ or "") for name in op.paths.names)
