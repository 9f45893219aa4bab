# SPDX-License-Identifier: Apache-2.0
"""Small networks for the demo and the tests: an MLP, a VGG-like net and the CIFAR ResNets of He et al. 2016, §4.2.

All take inputs of any size (the ResNets and the VGG end in a global pool unless told otherwise), so that the same net
runs on 8x8 digits and on 32x32 images. Weights come from PyTorch's default initialisation under the global seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(in_features: int = 64, hidden: Sequence[int] = (64, 64), out_features: int = 10) -> nn.Sequential:
    """Linear layers with ReLU between them; images are flattened."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = in_features
    for wide in hidden:
        layers += [nn.Linear(size, wide), nn.ReLU()]
        size = wide
    return nn.Sequential(*layers, nn.Linear(size, out_features))


class VGG(nn.Module):
    """3x3 convolutions in stages, each stage ending in a 2x2 max pool, then a hidden linear layer and the classifier.

    Args:
        stages: output channels of the convolutions, per stage.
        grid: pixels per side that the linear layer sees; 1 is a global average pool, more keeps [C, grid, grid]
            flattened.
        batch_norm: a norm after each convolution.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]] = ((16,), (32,), (64, 64)),
        *,
        in_channels: int = 1,
        out_features: int = 10,
        hidden: int = 64,
        grid: int = 1,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in stages:
            for width in stage:
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2, ceil_mode=True))  # ceil: a 1-pixel map stays one pixel
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = nn.Sequential(
            nn.Linear(channels * grid * grid, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out_features)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return y


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; a 1x1 convolution on the shortcut where the shape changes (option B)."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the channels, each with batch norm."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        wide = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != wide:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, three stages of residual blocks at full, half and quarter resolution, a global pool and a linear head.

    Build it with `resnet` or `resnet_bottleneck`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        widths: Sequence[int],
        in_channels: int,
        out_features: int,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels, stages = widths[0], []
        for i, (count, width) in enumerate(zip(blocks, widths)):
            layers = []
            for j in range(count):
                layers.append(block(channels, width, stride=2 if i > 0 and j == 0 else 1))
                channels = width * getattr(block, "expansion", 1)
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y: Tensor = self.linear(self.stages(x).mean((2, 3)))
        return y


def resnet(depth_n: int = 3, *, width: float = 1.0, classes: int = 10, in_channels: int = 1) -> ResNet:
    """The CIFAR ResNet with 6n+2 layers of He et al. 2016, §4.2: n = 3 is ResNet-20, 5 is ResNet-32, 9 is ResNet-56.

    Args:
        depth_n: blocks per stage.
        width: multiplies the paper's 16, 32 and 64 channels (rounded, at least 1).
        classes: size of the output; also the length of the target vectors when training against embeddings.
        in_channels: 1 for digits, 3 for colour images.

    The shortcut that changes shape is a 1x1 convolution with batch norm (option B), so that it can be merged as well.
    """
    return ResNet(BasicBlock, [depth_n] * 3, _widths(width), in_channels, classes)


def resnet_bottleneck(depth_n: int = 2, *, width: float = 1.0, classes: int = 10, in_channels: int = 1) -> ResNet:
    """As `resnet`, with 9n+2 layers in bottleneck blocks (He et al. 2016, §4.1)."""
    return ResNet(Bottleneck, [depth_n] * 3, _widths(width), in_channels, classes)


def _widths(width: float) -> list[int]:
    return [max(1, round(channels * width)) for channels in (16, 32, 64)]
