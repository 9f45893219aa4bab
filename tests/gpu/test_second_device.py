# SPDX-License-Identifier: Apache-2.0
"""Tensors on a device that is not the current one: results there, and the current device stays as it is."""

from __future__ import annotations

import gpu_cases
import pytest
import torch
from gpu_cases import CASES, Case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_second_device(case: Case) -> None:
    gpu_cases.need_gpu()
    if torch.cuda.device_count() < 2:
        pytest.skip("a second CUDA device is needed, there is one")
    torch.cuda.set_device(0)
    fresh = case.inputs(1)
    ours = case.call([t.to("cuda:1") for t in fresh])
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda", 1) for t in ours)
    case.check(ours, case.reference(fresh))
    case.check(case.call([t.to("cuda:0") for t in fresh]), ours)
