# SPDX-License-Identifier: Apache-2.0
"""Every path of every op that has several, on the GPU at hand: as the first one, or a skip with what the op says."""

from __future__ import annotations

import sys
from pathlib import Path

import gpu_cases
import pytest
import torch
from gpu_cases import CASES, Case

from zipfast.ops import OPS

BENCHES = Path(__file__).resolve().parents[2] / "benches"
if str(BENCHES) not in sys.path:
    sys.path.insert(0, str(BENCHES))

from touch import forced, refusal  # noqa: E402

WAYS = [
    pytest.param(case, name, path, id=f"{case.name}: {name} {path}")
    for case in CASES
    for name in case.ops
    if OPS[name].paths is not None
    for path in OPS[name].paths.names
]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "name", "path"), WAYS)
def test_path(case: Case, name: str, path: str) -> None:
    gpu_cases.need_gpu()
    op, fresh = OPS[name], case.inputs(1)
    x = [t.cuda() for t in fresh]
    first = op.paths.names[0]
    with forced(op, first):
        wanted = case.call(x)
    try:
        with forced(op, path):
            ours = case.call(x)
    except RuntimeError as e:
        reason = refusal(op, e)
        if reason is None or path == first:
            raise
        pytest.skip(reason)
    case.check(ours, wanted)
    case.check(ours, case.reference(fresh))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_cases_agree_where_there_is_no_gpu(case: Case) -> None:
    """What the tests on a GPU compare with is what the C++ kernels, or the reference, give."""
    fresh = case.inputs(1)
    case.check(case.call(fresh), case.reference(fresh))


def test_every_op_has_a_case() -> None:
    assert {n for c in CASES for n in c.ops} == {n for n, op in OPS.items() if op.host_only is None}


def test_a_forced_path_lasts_for_its_block() -> None:
    op = OPS["moments_"]
    before = op.paths
    with forced(op, "fast"):
        assert op.paths.settle(op.name, "auto", torch.device("cuda")) == "fast"
    assert op.paths is before


def test_only_a_sentence_on_the_path_is_a_refusal() -> None:
    op = OPS["moments_"]
    said = "moments_cuda, moments.cpp:20, moments_: path 'mma' cannot run here"
    assert refusal(op, RuntimeError(f"{said}\nfrom somewhere")) == "moments_: path 'mma' cannot run here"
    assert refusal(op, ValueError("moments_: path 'mma' cannot run here")) is None
    assert refusal(op, RuntimeError("moments_: out of memory")) is None and refusal(op, RuntimeError("")) is None
