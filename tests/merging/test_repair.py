# SPDX-License-Identifier: Apache-2.0
"""Batch-norm re-estimation: the statistics are the plain averages, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from zipfast.merging import reestimate_batchnorm


class Net(nn.Module):
    """A norm behind a norm, dropout, and a layer without running statistics."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.mix = nn.Dropout(0.9), nn.Conv2d(4, 3, 1)
        self.bn2, self.free = nn.SyncBatchNorm(3, momentum=0.3), nn.BatchNorm2d(3, track_running_stats=False)
        self.seen = []

    def forward(self, x, double=False):
        x = self.drop(self.bn1(self.conv(x)))
        self.seen.append(self.mix(x).detach())
        return self.free(self.seen[-1])


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    net.train()
    net.mix.eval()
    net.bn1.momentum = 0.2
    net.bn1.running_mean.fill_(5)
    return net


def data(n=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 1, 5, 5, generator=generator) for _ in range(n)]


def test_statistics_are_averages_over_batches(net):
    with torch.no_grad():
        outs = [net.conv(x) for x in data()]
    assert reestimate_batchnorm(net, data()) == 2
    torch.testing.assert_close(net.bn1.running_mean, torch.stack([o.mean((0, 2, 3)) for o in outs]).mean(0))
    torch.testing.assert_close(net.bn1.running_var, torch.stack([o.var((0, 2, 3)) for o in outs]).mean(0))
    assert int(net.bn1.num_batches_tracked) == 3


def test_modes_momenta_and_parameters_are_kept(net):
    modes = [m.training for m in net.modules()]
    params = copy.deepcopy(dict(net.named_parameters()))
    reestimate_batchnorm(net, data())
    assert [m.training for m in net.modules()] == modes
    assert (net.bn1.momentum, net.bn2.momentum) == (0.2, 0.3)
    for name, value in net.named_parameters():
        assert torch.equal(value, params[name]) and value.grad is None


def test_dropout_stays_off(net):
    reestimate_batchnorm(net, data())
    assert all((values != net.mix.bias[:, None, None]).any(1).all() for values in net.seen)
    assert not any(values.requires_grad for values in net.seen)


def test_batches_may_be_tensors_tuples_or_mappings(net):
    reestimate_batchnorm(net, data())
    want = net.bn1.running_mean.clone()
    for wrap in (lambda x: (x, 1), lambda x: [x], lambda x: ((x, 2), 1), lambda x: {"x": x, "double": True}):
        net.bn1.running_mean.fill_(5)
        reestimate_batchnorm(net, (wrap(x) for x in data()))
        assert torch.equal(net.bn1.running_mean, want)


def test_max_batches_reads_no_more(net):
    feed = iter(data(5))
    reestimate_batchnorm(net, feed, max_batches=2)
    assert int(net.bn1.num_batches_tracked) == 2 and len(list(feed)) == 3
    with pytest.raises(ValueError, match="'max_batches' must be at least 1 or None, got 0"):
        reestimate_batchnorm(net, data(), max_batches=0)


def unchanged_after(net, batches, error, match):
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    with pytest.raises(error, match=match):
        reestimate_batchnorm(net, batches)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes and net.bn1.momentum == 0.2


def test_no_data_changes_nothing(net):
    unchanged_after(net, [], ValueError, "reestimate_batchnorm: 'batches' must hold at least one batch, got none")


def test_a_failing_pass_changes_nothing(net):
    unchanged_after(net, [data()[0], "text"], TypeError, "a tuple that starts with one, got str")
    unchanged_after(net, [data()[0], torch.randn(2, 3, 5, 5)], RuntimeError, "channels")


def test_without_batch_norm_no_batch_is_read():
    def never():
        raise AssertionError("a batch was read")
        yield

    assert reestimate_batchnorm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), never()) == 0
