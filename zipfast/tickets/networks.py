# SPDX-License-Identifier: Apache-2.0
"""The networks of the lottery-ticket papers, how they are trained, and what fraction of them a round of pruning leaves.

LeNet-300-100, Conv-2/4/6, ResNet-20 (called ResNet-18 there) and VGG-19 are figure 2 of Frankle & Carbin 2019; the real
ResNet-18 is beside them. `PRESETS` holds their figures, each with a mark of where it comes from:

    [S] from secondary notes and reproductions; the paper itself was not checked
    [M] from memory: verify before printing it as a paper's figure
    [R] read in the source of an open implementation
    [C] computed from the others

Networks take the same three arguments, so that one call serves all of them. Weights are drawn under the global seed.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from .. import zoo

Net = TypeVar("Net", bound=nn.Module)
Rates: TypeAlias = Sequence[tuple[str, float]]
Layers: TypeAlias = OrderedDict[str, nn.Module]
Size: TypeAlias = int | tuple[int, int]  # of images: one side, or height and width
OPTIMIZERS = ("adam", "sgd")
SCOPES = ("layer", "global")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
STAGES = {2: (64,), 4: (64, 128), 6: (64, 128, 256)}  # Conv-N: channels of each pair of convolutions
VGG_19 = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)
LISTED = 20  # weights that an error message names


def glorot_normal_(model: Net) -> Net:
    """Draw the weights of convolutions and linear layers from N(0, 2 / (fan in + fan out)); their biases become 0.

    The papers' own code draws from a truncated normal of about that spread (tf.contrib's xavier_initializer) [R].
    """
    for module in model.modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def kaiming_normal_(model: Net) -> Net:
    """Draw the weights of convolutions and linear layers from N(0, 2 / fan in), as open_lth's `kaiming_normal` does [R].

    The rest keeps PyTorch's initialisation: norms start at 1 and 0, where open_lth's presets draw their weights from
    U(0, 1).
    """
    for module in model.modules():
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return model


def lenet_300_100(*, in_channels: int = 1, out_features: int = 10, image_size: Size = 28) -> nn.Sequential:
    """LeNet-300-100 for images of any size, Glorot normal: 266 200 weights on MNIST; layers fc1, fc2 and out."""
    height, width = _sides("lenet_300_100", image_size)
    layers: Layers = OrderedDict(flatten=nn.Flatten())
    _append_linear(layers, (in_channels * height * width, 300, 100), out_features)
    return glorot_normal_(nn.Sequential(layers))


def conv_net(depth: int, *, in_channels: int = 3, out_features: int = 10, image_size: Size = 32) -> nn.Sequential:
    """Conv-`depth`, which is 2, 4 or 6 convolutions: VGG cut down for CIFAR-10, Glorot normal, without norms.

    Pairs of 3x3 convolutions with 64, 128 and 256 channels, each pair ending in a 2x2 max pool, then linear layers of
    256, 256 and the output; named conv1 ..., fc1, fc2 and out.

    Pools round up, so that a side of s becomes ceil(s / 2) and any size will do: 32 gives fc1 an 8x8 map of 128 channels
    in Conv-4, and 8 a 2x2 map. The smaller map makes fc1 smaller; the counts of the paper hold for 32x32 alone.
    """
    if depth not in STAGES:
        raise ValueError(f"conv_net: 'depth' must be one of {tuple(STAGES)}, got {depth!r}")
    height, width = _sides("conv_net", image_size)
    layers: Layers = OrderedDict()
    channels = in_channels
    for stage, wide in enumerate(STAGES[depth], 1):
        channels = _append_stage(layers, channels, (wide, wide), batch_norm=False)
        layers[f"pool{stage}"] = nn.MaxPool2d(2, ceil_mode=True)
        height, width = -(-height // 2), -(-width // 2)
    layers["flatten"] = nn.Flatten()
    _append_linear(layers, (channels * height * width, 256, 256), out_features)
    return glorot_normal_(nn.Sequential(layers))


def resnet_20(*, in_channels: int = 3, out_features: int = 10, image_size: Size = 32) -> zoo.ResNet:
    """The CIFAR ResNet-20 (`zipfast.zoo.resnet`), Kaiming normal: 270 896 weights with those of two 1x1 shortcuts.

    Frankle & Carbin 2019 call it ResNet-18. It ends in a global average pool and takes images of any size: `image_size`
    is there for the one call that serves all networks. On 8x8 images the last maps are 2x2.
    """
    _sides("resnet_20", image_size)
    return kaiming_normal_(zoo.resnet(3, classes=out_features, in_channels=in_channels))


def resnet_18(*, in_channels: int = 3, out_features: int = 10, image_size: Size = 32) -> zoo.ResNet:
    """ResNet-18 with the stem of CIFAR (one 3x3 convolution, no pool), Kaiming normal: 11.2 M parameters.

    Four stages of two blocks with 64, 128, 256 and 512 channels, a global average pool and a linear layer. Takes images
    of any size, as `resnet_20` does. On 8x8 images the last maps are 1x1, and training needs batches of two or more
    (batch norm).
    """
    _sides("resnet_18", image_size)
    return kaiming_normal_(zoo.ResNet(zoo.BasicBlock, [2] * 4, (64, 128, 256, 512), in_channels, out_features))


def vgg_19(*, in_channels: int = 3, out_features: int = 10, image_size: Size = 32) -> nn.Sequential:
    """VGG-19 in its CIFAR form: 16 convolutions with batch norm and one linear layer, Kaiming normal: 20.02 M weights.

    Max pools after the first four stages, a global average pool after the fifth. Takes images of any size, as
    `resnet_20` does: pools round up, a 1x1 map stays one pixel. On 8x8 images the last two stages see 1x1 maps, and
    training needs batches of two or more (batch norm). Layers are conv1 to conv16, with bn1 ..., and out.
    """
    _sides("vgg_19", image_size)
    layers: Layers = OrderedDict()
    channels = in_channels
    for stage, widths in enumerate(VGG_19, 1):
        if stage > 1:
            layers[f"pool{stage - 1}"] = nn.MaxPool2d(2, ceil_mode=True)
        channels = _append_stage(layers, channels, widths, batch_norm=True)
    layers |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "out": nn.Linear(channels, out_features)}
    return kaiming_normal_(nn.Sequential(layers))


@dataclass(frozen=True)
class Preset:
    """One network's training and pruning, as a paper describes it.

    Attributes:
        iterations: optimizer steps of one training.
        optimizer: "adam" or "sgd".
        lr: the rate that `schedule` multiplies.
        momentum: of "sgd".
        warmup: iterations in which the rate rises from 0 to `lr`; 0 is none.
        milestones: iterations from each of which on the rate is multiplied by `gamma` once more.
        scope: "layer" ranks the weights of each layer by themselves, "global" those of all layers together.
        rates: (regular expression, fraction of the survivors that a round prunes), see `rates_of`. With the scope
            "global" all fractions are one.
        build: makes the network; takes `in_channels`, `out_features` and `image_size`.
        sources: field -> where its figure comes from, marked as the head of this file says.
    """

    name: str
    iterations: int
    batch_size: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    warmup: int
    milestones: tuple[int, ...]
    gamma: float
    scope: str
    rates: tuple[tuple[str, float], ...]
    build: Callable[..., nn.Module]
    sources: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"Preset: 'optimizer' must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"Preset: 'scope' must be one of {SCOPES}, got {self.scope!r}")
        _check_rates("Preset", self.rates)
        fractions = sorted({rate for _, rate in self.rates})
        if self.scope == "global" and len(fractions) > 1:
            raise ValueError(f"Preset: 'rates' must be one rate where the scope is 'global', got {fractions}")

    def optimizer_for(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """A fresh optimizer; multiply its rate by `schedule`, for instance with `torch.optim.lr_scheduler.LambdaLR`."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def schedule(self, iteration: int) -> float:
        """min(1, iteration / warmup) · gamma^(number of milestones ≤ iteration): what `lr` is multiplied by."""
        if iteration < 0:
            raise ValueError(f"schedule: 'iteration' must be at least 0, got {iteration}")
        rising = min(1.0, iteration / self.warmup) if self.warmup else 1.0
        return rising * self.gamma ** sum(milestone <= iteration for milestone in self.milestones)


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The weights that pruning may touch, by their names in `model.named_parameters()`, whose order they keep.

    These are the weights of convolutions, transposed convolutions, linear layers and the `Conv1D` of transformers (by
    its class name): never biases, norms or embeddings. A weight that several layers share is listed once, under its first
    name, and not at all where one of them is an embedding. Parameters that are no layer's `weight`, such as
    `in_proj_weight` of `nn.MultiheadAttention`, are left out. The tensors are the parameters themselves, not copies.
    """
    wanted, embedded = set[int](), set[int]()
    for module in model.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) or type(module).__name__ == "Conv1D":
            wanted.add(id(weight))
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            embedded.add(id(weight))
    return {name: weight for name, weight in model.named_parameters() if id(weight) in wanted - embedded}


def rates_of(rates: Preset | Rates, names: Iterable[str]) -> dict[str, float]:
    """The rate of each weight that is pruned, in the order of `names`.

    Args:
        rates: a preset, or pairs of a regular expression over whole names and a rate in [0, 1]. The first that matches
            decides; a name that none matches is not pruned and not returned.
        names: of the weights there are, for instance `prunable(model)`.

    Raises:
        ValueError: a regular expression matches no name, or a rate is none.

    >>> rates_of([(r"out.*", 0.1), (r"fc.*", 0.2)], ["fc1.weight", "out.weight", "head.weight"])
    {'fc1.weight': 0.2, 'out.weight': 0.1}
    """
    pairs = rates.rates if isinstance(rates, Preset) else rates
    _check_rates("rates_of", pairs)
    names = list(names)
    for pattern, _ in pairs:
        if not any(re.fullmatch(pattern, name) for name in names):
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            raise ValueError(
                f"rates_of: 'rates' must match a weight each, got {pattern!r}, which matches none of "
                f"{', '.join(names[:LISTED]) or '(no weights)'}{more}"
            )
    found = {name: next((rate for pattern, rate in pairs if re.fullmatch(pattern, name)), None) for name in names}
    return {name: rate for name, rate in found.items() if rate is not None}


def ladder(model: nn.Module, rates: Preset | Rates | Mapping[str, float], level: int) -> float:
    """Per cent of the weights that remain after `level` rounds: 100 · Σ nᵢ (1 − pᵢ)^level / Σ nᵢ over those with a rate.

    This is P_m of the papers, before each round is cut to whole weights. With one rate for all, layer-wise and global
    pruning agree on it.

    Args:
        rates: as in `rates_of`, or what it returns.

    >>> [round(ladder(lenet_300_100(), PRESETS["lenet-300-100"], level), 1) for level in (0, 1, 7)]
    [100.0, 80.0, 21.1]
    """
    if level < 0:
        raise ValueError(f"ladder: 'level' must be at least 0, got {level}")
    sizes = {name: weight.numel() for name, weight in prunable(model).items()}
    by_name = dict(rates) if isinstance(rates, Mapping) else rates_of(rates, sizes)
    _check_range("ladder", by_name.items())
    if unknown := sorted(set(by_name) - set(sizes)):
        raise ValueError(f"ladder: 'rates' must name weights of the model, got {', '.join(unknown[:LISTED])}")
    total = sum(sizes[name] for name in by_name)
    if not total:
        raise ValueError("ladder: 'rates' must prune at least one weight, got none")
    return 100 * sum(sizes[name] * (1 - rate) ** level for name, rate in by_name.items()) / total


def _sides(op: str, image_size: Size) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"{op}: 'image_size' must be at least 1, got {image_size}")
    return height, width


def _append_stage(layers: Layers, channels: int, widths: Sequence[int], *, batch_norm: bool) -> int:
    """Append 3x3 convolutions numbered on from those already there; return the channels they leave."""
    first = 1 + sum(name.startswith("conv") for name in layers)
    for i, width in enumerate(widths, first):
        layers[f"conv{i}"] = nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm)
        if batch_norm:
            layers[f"bn{i}"] = nn.BatchNorm2d(width)
        layers[f"relu{i}"] = nn.ReLU()
        channels = width
    return channels


def _append_linear(layers: Layers, sizes: Sequence[int], out_features: int) -> None:
    for i, (size, wide) in enumerate(pairwise(sizes), 1):
        layers[f"fc{i}"] = nn.Linear(size, wide)
        layers[f"fc{i}_relu"] = nn.ReLU()
    layers["out"] = nn.Linear(sizes[-1], out_features)


def _check_rates(op: str, rates: Rates) -> None:
    _check_range(op, rates)
    for pattern, _ in rates:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{op}: 'rates' must be regular expressions, got {pattern!r}: {error}") from None


def _check_range(op: str, rates: Iterable[tuple[str, float]]) -> None:
    for key, rate in rates:
        if not 0 <= rate <= 1:
            raise ValueError(f"{op}: 'rates' must be in [0, 1], got {rate} for {key!r}")


def _sources(**other: str) -> dict[str, str]:
    """Figure 2 of the first paper by way of secondary notes, but for the fields given."""
    figures = [f.name for f in fields(Preset) if f.name not in ("name", "build", "sources")]
    return {name: f"[S] {_PAPER}" for name in figures} | other


_PAPER = "Frankle & Carbin 2019, fig. 2"
_NONE = "[M] none is named"
_MEMORY = f"[M] {_PAPER}"
_CONSTANT = {"momentum": "[C] not of Adam", "weight_decay": _NONE, "warmup": _NONE, "milestones": _NONE, "gamma": _NONE}
_WARM = "[S] Frankle & Carbin 2019, with warm-up"

_LENET = Preset(
    name="lenet-300-100",
    iterations=50_000,
    batch_size=60,
    optimizer="adam",
    lr=1.2e-3,
    momentum=0.0,
    weight_decay=0.0,
    warmup=0,
    milestones=(),
    gamma=1.0,
    scope="layer",
    rates=((r"fc\d+\.weight", 0.2), (r"out\.weight", 0.1)),
    build=lenet_300_100,
    sources=_sources(**_CONSTANT),
)


def _conv_preset(depth: int, iterations: int, lr: float, conv_rate: float) -> Preset:
    return replace(
        _LENET,
        name=f"conv-{depth}",
        iterations=iterations,
        lr=lr,
        rates=((r"conv\d+\.weight", conv_rate), *_LENET.rates),
        build=partial(conv_net, depth),
        sources=_sources(lr=_MEMORY, **_CONSTANT),
    )


_RESNET_20 = Preset(
    name="resnet-20",
    iterations=30_000,
    batch_size=128,
    optimizer="sgd",
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    warmup=0,
    milestones=(20_000, 25_000),
    gamma=0.1,
    scope="global",
    rates=((r"(conv1|stages\..*)\.weight", 0.2),),
    build=resnet_20,
    sources=_sources(weight_decay=_MEMORY, warmup=_NONE),
)
_BORROWED = "[C] as resnet-20: no paper's figure for this network"
_RESNET_18 = replace(
    _RESNET_20, name="resnet-18", build=resnet_18, sources=dict.fromkeys(_RESNET_20.sources, _BORROWED)
)
_SHARES = f"[C] epochs 80 and 120 [S] of 160 (open_lth, [R]) as shares of 112K iterations; {_PAPER}"
_VGG_19 = replace(
    _RESNET_20,
    name="vgg-19",
    iterations=112_000,
    batch_size=64,
    milestones=(56_000, 84_000),
    rates=((r"conv\d+\.weight", 0.2),),
    build=vgg_19,
    sources=_sources(batch_size=_MEMORY, weight_decay=_MEMORY, warmup=_NONE, milestones=_SHARES),
)


def _warm(preset: Preset, lr: float, warmup: int) -> Preset:
    sources = preset.sources | {"lr": _WARM, "warmup": _WARM}
    return replace(preset, name=f"{preset.name}-warmup", lr=lr, warmup=warmup, sources=sources)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _LENET,
        _conv_preset(2, 20_000, 2e-4, 0.10),
        _conv_preset(4, 25_000, 3e-4, 0.10),
        _conv_preset(6, 30_000, 3e-4, 0.15),
        _RESNET_20,
        _warm(_RESNET_20, 0.03, 20_000),
        _RESNET_18,
        _VGG_19,
        _warm(_VGG_19, 0.1, 10_000),
    )
}
"""Networks of the papers and how they are trained, by name, each number with its source."""
