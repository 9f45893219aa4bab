# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the backends to run on, two threads, and one table of tolerances.

A backend that cannot run here skips, with the reason.  ``ZIPFAST_REQUIRE=cpu,emu`` turns that skip into a failure, so
that a machine which must have the compiled kernels cannot pass without them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
import torch

import zipfast

torch.set_num_threads(int(os.environ.get("ZIPFAST_TEST_THREADS", "2")))  # 1 under the thread sanitizer

REQUIRED = tuple(filter(None, os.environ.get("ZIPFAST_REQUIRE", "").replace(" ", "").split(",")))

# (op, quantity, dtype of the input) -> absolute tolerance, behind it the worst error seen and where.  Sums and
# co-moments are compared after division by their own scale, total_i / sqrt(samples · square_i) and
# comoment_ij / sqrt(square_i · square_j), with square_i the float64 sum of (x_i - c_i)²; correlations are compared as
# they are.  Sums of sparse_linear are divided by the sum of the magnitudes of their terms.  What has no row is compared
# bitwise: regroup and zip_match altogether.
TOLERANCES: dict[tuple[str, str, torch.dtype], float] = {
    ("moments_", "total", torch.float64): 1e-13,  # 0: these sums come out exact
    ("moments_", "total", torch.float32): 5e-7,  # 1.5e-7: test_sizes, cpu, 31 features
    ("moments_", "total", torch.float16): 1e-7,  # 2.0e-8: test_layouts, cpu, 3 models
    ("moments_", "total", torch.bfloat16): 1e-7,  # 1.8e-8: test_layouts, cpu, 3 models
    ("moments_", "comoment", torch.float64): 1e-13,  # 2.2e-14: test_many_samples, torch, 14700 samples
    ("moments_", "comoment", torch.float32): 1e-6,  # 4.8e-7: test_few_and_many_features, cpu, 3 x 129 features
    ("moments_", "comoment", torch.float16): 2e-6,  # 6.3e-7: test_random, cpu
    ("moments_", "comoment", torch.bfloat16): 2e-6,  # 7.9e-7: test_random, cpu
    ("moments_", "correlation", torch.float32): 1e-6,  # 6.7e-8: test_correlation_of_nasty_channels, cpu, tokens
    ("evidence", "value", torch.float64): 5e-12,  # 4.6e-13: test_definition, cpu, 17 samples of 30 features
    ("evidence", "precision", torch.float64): 5e-10,  # 6.6e-11: there, of alpha, beta and their ratio
    ("evidence", "exact", torch.float64): 2e-14,  # 2.5e-15: test_sizes, torch, 31 features
    # masked_step_: only Adam's weights (and what follows from them), as torch's square root on a CPU is not the nearest
    ("masked_step_", "weight", torch.float64): 5e-15,  # 4.4e-16: test_sizes, cpu, adam
    (
        "masked_step_",
        "weight",
        torch.float32,
    ): 1e-5,  # 3.8e-6: test_large, cpu, adam: a weight moved far by a small root
    ("masked_step_", "weight", torch.float16): 2e-3,  # 0; one rounding is 1e-3
    ("masked_step_", "weight", torch.bfloat16): 2e-2,  # 0; one rounding is 8e-3
    ("sparse_linear", "sum", torch.float64): 2e-15,  # 4.6e-16: test_batches, emu, 33 samples
    ("sparse_linear", "sum", torch.float32): 1e-6,  # 3.0e-7: test_equal_for_every_thread_count, cpu, 200 samples
}


def need(name: str) -> None:
    """Skip the test, or fail it where ``ZIPFAST_REQUIRE`` says so, if a backend cannot run here."""
    reason = zipfast.ops.why_not(name)
    if reason is None:
        return
    if name in REQUIRED:
        pytest.fail(f"backend {name!r} is required by ZIPFAST_REQUIRE, but: {reason}")
    pytest.skip(f"backend {name!r}: {reason}")


@contextlib.contextmanager
def forced(name: str) -> Iterator[str]:
    """A backend while the block runs; skips (or fails) where it cannot run."""
    need(name)
    with zipfast.backend(name):
        yield name


@pytest.fixture(params=["torch", "cpu", "emu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation in turn, forced while the test runs."""
    with forced(request.param) as name:
        yield name


@pytest.fixture(params=["torch", "cpu", "cuda"])
def fast_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``backend``, without the emulator: for sizes that it would need minutes for."""
    with forced(request.param) as name:
        yield name


@pytest.fixture
def cpu_backend() -> Iterator[str]:
    with forced("cpu") as name:
        yield name


@pytest.fixture
def emu_backend() -> Iterator[str]:
    with forced("emu") as name:
        yield name


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the arguments of the backend at hand live."""
    names = [request.getfixturevalue(f) for f in ("backend", "fast_backend") if f in request.fixturenames]
    return "cuda" if names == ["cuda"] else "cpu"


@pytest.fixture(scope="session")
def tolerance() -> Callable[[str, str, torch.dtype], dict[str, float]]:
    """``assert_close(got, want, **tolerance(op, quantity, dtype))``."""
    return lambda op, quantity, dtype: {"rtol": 0.0, "atol": TOLERANCES[op, quantity, dtype]}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``threads(n)`` sets torch's thread count until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
