# SPDX-License-Identifier: Apache-2.0
"""Makes ``pytest benches`` find bench_*.py, on the CPU or, with ``--device cuda``, a GPU; nothing asserts on time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):  # the harness, and zipfast from a checkout that was built in place
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402
from harness import Job, Row, Run, threads  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the benches run: cpu (default) or cuda")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    # Files named on the command line are collected by pytest itself.
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    from ceilings import measure, of_run

    device = request.config.getoption("--device")
    if device != "cpu" and not torch.cuda.is_available():
        pytest.exit(f"--device {device}: torch sees no CUDA device", returncode=4)
    run = Run(device, of_run(device))
    yield run
    run.finish(measure(device))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def timed(request: pytest.FixtureRequest, run: Run) -> Callable[[Job], Row]:
    """Measures a job in pairs, then hands our op alone to pytest-benchmark, with the comparison in ``extra_info``.

    Without that plugin the paired numbers, which are the ones reported, are all there is.
    """
    has_plugin = request.config.pluginmanager.hasplugin("benchmark")
    benchmark = request.getfixturevalue("benchmark") if has_plugin else None

    def call(job: Job) -> Row:
        row = run.measure(job)
        print(row.summary())
        if benchmark is None:
            return row
        for name, peer in row.peers.items():
            benchmark.extra_info[f"ratio {name}"] = peer["ratio"]
        benchmark.extra_info |= {"percent_of_ceiling": row.percent_of_ceiling, "ms_paired": row.ours["ms"]}
        wait = torch.cuda.synchronize if run.device != "cpu" else lambda: None

        def once(*argument: object) -> None:
            job.ours.run(*argument)
            wait()

        def prepare() -> tuple[tuple[object, ...], dict[str, object]]:
            argument = () if job.ours.prepare is None else (job.ours.prepare(),)
            wait()
            return argument, {}

        with threads(row.threads):
            benchmark.pedantic(once, setup=prepare, rounds=3, iterations=1, warmup_rounds=1)
        return row

    return call
