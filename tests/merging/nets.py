# SPDX-License-Identifier: Apache-2.0
"""Networks and helpers shared by the merging tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipfast import zoo
from zipfast.merging import permute, random_permutations


class UNet(nn.Module):
    """One level down and up, joined by a concatenation on either side of which the halves differ in size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.down = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.BatchNorm2d(10), nn.LeakyReLU(inplace=True))
        self.up = nn.ConvTranspose2d(10, 5, 2, 2)
        self.join = nn.Sequential(nn.Conv2d(11, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(inplace=True))
        self.out = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        return self.out(self.join(torch.cat([skip, self.up(self.down(skip))], 1)))


class Separable(nn.Module):
    """Inverted residual blocks: expand, depthwise (one with a multiplier of 2), project; and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.expand = nn.Sequential(nn.Conv2d(6, 9, 1, bias=False), nn.BatchNorm2d(9), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(9, 9, 3, 1, 1, groups=9), nn.BatchNorm2d(9), nn.Hardswish(inplace=True)
        )
        self.project = nn.Sequential(nn.Conv2d(9, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.widen = nn.Conv2d(6, 12, 3, 2, 1, groups=6)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(F.adaptive_avg_pool2d(F.gelu(self.widen(x)), 1).flatten(1))


class SqueezeExcite(nn.Module):
    """Channels rescaled by a gate computed from their means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.reduce, self.gate = nn.Linear(8, 3), nn.Linear(3, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        gate = torch.sigmoid(self.gate(F.relu(self.reduce(x.mean((2, 3))))))
        x = F.max_pool2d(x * gate[:, :, None, None], 2)
        return self.head(self.drop(x.reshape(x.shape[0], -1)))


class OptionA(nn.Module):
    """A residual sum whose shortcut is strided and padded with zero channels (He et al. 2016, option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1), nn.Linear(8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.norm(self.conv(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head(F.relu(y).mean((-2, -1)))


class Sequence1d(nn.Module):
    """1-d convolutions, a transpose to [N, T, C], PReLU, split halves multiplied (a gated unit), a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.slope = nn.Conv1d(2, 6, 3, padding=1), nn.PReLU(6)
        self.mix, self.norm = nn.Linear(6, 10), nn.GroupNorm(2, 8)
        self.conv2, self.head = nn.Conv1d(5, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.slope(self.conv1(x)).transpose(1, 2))
        a, b = x.chunk(2, dim=-1)
        x = F.silu(self.norm(self.conv2((a * torch.sigmoid(b)).permute(0, 2, 1))))
        return self.head(x.amax(-1))


class Volume(nn.Module):
    """3-d convolutions with a grouped one, whose groups are permuted as blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, 4, 3, padding=1)
        self.grouped, self.conv3 = nn.Conv3d(4, 4, 3, padding=1, groups=2), nn.Conv3d(4, 5, 1)
        self.norm, self.head = nn.BatchNorm3d(6), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))))
        x = F.relu(self.conv3(F.avg_pool3d(self.grouped(x), 2)))
        return self.head(x.mean((2, 3, 4)))


def hf_resnet() -> nn.Module:
    """Hugging Face's ResNet classifier from a tiny configuration, bottleneck blocks."""
    import pytest

    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=6,
        hidden_sizes=[8, 12],
        depths=[1, 2],
        layer_type="bottleneck",
        num_labels=4,
    )
    return transformers.ResNetForImageClassification(config)


IMAGE = (1, 8, 8)
# name -> (constructor, shape of one input, number of mergeable spaces)
NETS = {
    "mlp": (lambda: zoo.mlp(64, (9, 7), 5), IMAGE, 2),
    "vgg": (lambda: zoo.VGG(((4,), (6, 5)), hidden=7, grid=1, batch_norm=False), IMAGE, 4),
    "vgg_bn_flatten": (lambda: zoo.VGG(((4,), (6, 5)), hidden=7, grid=2), IMAGE, 4),
    "resnet_basic": (lambda: zoo.resnet(2, width=0.25, classes=5), IMAGE, 9),
    "resnet_bottleneck": (lambda: zoo.resnet_bottleneck(1, width=0.25, classes=5), IMAGE, 10),
    "resnet_hf": (hf_resnet, (3, 32, 32), 9),
    "unet": (UNet, IMAGE, 4),
    "separable": (Separable, (2, 8, 8), 3),
    "squeeze_excite": (SqueezeExcite, IMAGE, 2),
    "option_a": (OptionA, IMAGE, 3),
    "sequence_1d": (Sequence1d, (2, 12), 4),
    "volume": (Volume, (1, 6, 6, 6), 5),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A net in double precision and eval mode, norms and statistics away from their defaults, and a batch of 3."""
    torch.manual_seed(seed)
    constructor, shape, _ = NETS[name]
    net = randomise(constructor().double().eval())
    return net, torch.randn(3, *shape, dtype=torch.float64)


def randomise(net: nn.Module) -> nn.Module:
    """Default norms are all ones and zeros, under which most mistakes would not show."""
    with torch.no_grad():
        for key, value in net.state_dict(keep_vars=True).items():
            if value.dim() == 1 and value.is_floating_point():
                positive = key.endswith(("weight", "running_var"))
                value.copy_(torch.rand_like(value) + 0.5 if positive else 0.5 * torch.randn_like(value))
    return net


__all__ = ["NETS", "build", "output_of", "permute_state", "random_permutations", "randomise"]


def permute_state(state, plan, permutations, skip=None) -> dict[str, Tensor]:
    """A state dict with spaces reordered along all their uses, but for (space name, use index) `skip`."""
    if skip is not None:
        name, left_out = skip
        spaces = [
            replace(space, uses=tuple(use for i, use in enumerate(space.uses) if space.name != name or i != left_out))
            for space in plan.spaces
        ]
        plan = replace(plan, spaces=tuple(spaces))
    return permute(plan, permutations, state)


def output_of(value) -> Tensor:
    """The tensor of a model's answer; Hugging Face models answer with a record."""
    return value if isinstance(value, Tensor) else value.logits
