# SPDX-License-Identifier: Apache-2.0
"""The small networks are what their papers say, at any input size."""

import pytest
import torch
from torch import nn

from zipfast import zoo


@pytest.mark.parametrize("size", [4, 8, 16, 32])
@pytest.mark.parametrize(
    "net",
    [lambda: zoo.resnet(1, width=0.5), lambda: zoo.resnet_bottleneck(1, width=0.25), zoo.VGG],
    ids=["resnet", "bottleneck", "vgg"],
)
def test_any_input_size(net, size):
    assert net().eval()(torch.randn(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize(("n", "layers"), [(3, 20), (5, 32), (9, 56)])
def test_depth_is_6n_plus_2(n, layers):
    net = zoo.resnet(n, width=0.1)
    weights = [m for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in name]
    assert len(weights) == layers


def test_resnet20_has_the_papers_size():
    # 0.27 M parameters in table 6 of He et al. 2016; by hand 269722 and 2752 in the two projection shortcuts.
    net = zoo.resnet(3, in_channels=3)
    assert sum(p.numel() for p in net.parameters()) == 269_722 + 2_752


def test_arguments():
    assert zoo.resnet(1, width=0.5, classes=7, in_channels=3)(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    assert zoo.mlp(12, (5,), 3)(torch.randn(2, 3, 2, 2)).shape == (2, 3)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in zoo.VGG(batch_norm=False).modules())
