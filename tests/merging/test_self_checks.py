# SPDX-License-Identifier: Apache-2.0
"""`verify` says yes to plans that are right, and no where a rule is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from variety import build

from zipfast.merging.rules import RULES
from zipfast.merging.verify import verify


@pytest.mark.parametrize("name", ["vgg_bn", "gated", "fused_qkv"])
def test_right_plans_pass_and_the_model_is_left_alone(name):
    case = build(name)
    before = copy.deepcopy(case.net.state_dict())
    case.net.train()
    found = verify(case.net, case.args, [case.batch()], example_kwargs=case.kwargs)
    assert found.ok, str(found)
    assert [check.name for check in found.checks] == ["permuted", "left out", "roles", "recovered", "cuts"]
    assert case.net.training and all(torch.equal(v, before[k]) for k, v in case.net.state_dict().items())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.norm(self.a(x))))


def small() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = Small()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5)
        net.norm.bias.normal_()
    return net, torch.randn(64, 6)


def test_a_rule_that_forgets_parameters_is_found(monkeypatch):
    net, x = small()
    assert verify(net, (x,), [x]).ok
    monkeypatch.setitem(RULES, "layer_norm", lambda flow, node, x, *args: list(flow.axes(x)))
    found = verify(net, (x,), [x])
    assert not found.ok and "NOT ok: permuted" in str(found)


def test_bad_data_gets_one_sentence():
    net, x = small()
    with pytest.raises(ValueError, match="verify: 'data' must hold at least one batch, got none"):
        verify(net, (x,), [])
