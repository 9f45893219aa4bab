# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: each op follows the current stream, is captured by CUDA graphs, serves host threads."""

from __future__ import annotations

import threading

import gpu_cases
import pytest
import torch
from gpu_cases import Case

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu() -> None:
    gpu_cases.need_gpu()


@pytest.fixture(params=gpu_cases.CASES, ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> Case:
    return request.param


def delay(stream: torch.cuda.Stream) -> None:
    """Tens of milliseconds of work on a stream: whoever does not wait for the stream reads what was there before."""
    with torch.cuda.stream(stream):
        x = torch.full((4096, 4096), 1 / 4096, device="cuda", dtype=torch.float64)
        for _ in range(8):
            x = x @ x
    x.record_stream(stream)


def test_side_stream_sees_late_inputs(op: Case) -> None:
    fresh = op.inputs(1)
    wanted = op.reference(fresh)
    late = [
        t.cuda() for t in op.inputs(0)
    ]  # values that give another, valid result: a wrong order shows as a difference
    source = [t.pin_memory() for t in fresh]
    op.call(late)  # first-use allocations and module loading synchronise, and would hide a missing dependency
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    delay(side)
    with torch.cuda.stream(side):
        for target, value in zip(late, source):
            target.copy_(value, non_blocking=True)
        ours = op.call(late)
    side.synchronize()
    op.check(ours, wanted)


def test_graph_replays_with_new_inputs(op: Case) -> None:
    static = [t.cuda() for t in op.inputs(0)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            op.call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.call(static)
    for seed in (1, 2):
        fresh = [t.cuda() for t in op.inputs(seed)]
        eager = op.call(fresh)
        for target, value in zip(static, fresh):
            target.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, eager, strict=True):
            assert torch.equal(a, b)
        op.check(captured, op.reference(op.inputs(seed)))


def test_host_threads_with_their_own_streams(op: Case) -> None:
    count, rounds = 4, 5
    inputs = [[t.cuda() for t in op.inputs(seed)] for seed in range(count)]
    serial = [op.call(x) for x in inputs]
    torch.cuda.synchronize()
    barrier = threading.Barrier(count)
    problems: list[str] = []

    def work(index: int) -> None:
        try:
            stream = torch.cuda.Stream()
            for _ in range(rounds):
                barrier.wait(60)
                with torch.cuda.stream(stream):
                    ours = op.call(inputs[index])
                stream.synchronize()
                if not all(torch.equal(a, b) for a, b in zip(ours, serial[index], strict=True)):
                    problems.append(f"thread {index} got another result than the serial run")
        except Exception as e:
            problems.append(f"thread {index}: {type(e).__name__}: {e}")
            barrier.abort()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(120)
    assert not any(w.is_alive() for w in workers), "a thread did not come back"
    assert not problems, problems
