# SPDX-License-Identifier: Apache-2.0
"""One small random network per architecture, with the inputs it takes: what the proofs of merging are run on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipfast import zoo

BATCH = 24


@dataclass(frozen=True)
class Case:
    """A network in eval mode, and its inputs: positional or by keyword."""

    net: nn.Module
    args: tuple[Tensor, ...] = ()
    kwargs: dict[str, Tensor] = field(default_factory=dict)

    def batch(self) -> Any:
        return self.kwargs or self.args

    def run(self, net: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            return output_of((self.net if net is None else net)(*self.args, **self.kwargs)).double()


def output_of(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value.logits


class UNet(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()

        def block(i: int, o: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), norm(o), nn.ReLU(inplace=True))

        self.a, self.b, self.c = block(3, 8), block(8, 16), block(16, 24)
        self.up2, self.d2 = nn.ConvTranspose2d(24, 16, 2, stride=2), block(32, 16)
        self.d1, self.out, self.pool = block(24, 8), nn.Conv2d(8, 4, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(self.pool(a))
        c = self.c(self.pool(b))
        b = self.d2(torch.cat([self.up2(c), b], 1))
        return self.out(self.d1(torch.cat([F.interpolate(b, scale_factor=2), a], 1)))


class Shuffle(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=4)
        self.b, self.head = nn.Conv2d(32, 12, 1, groups=2), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.g(self.a(x).tanh()).tanh()
        b, c, h, w = x.shape
        x = x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.b(x).tanh().mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.reduce, self.gate = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.project, self.head = nn.Conv2d(16, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x)))
        x = x * self.gate(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.head(F.silu(self.project(x)).mean((2, 3)))


class Fused(nn.Module):
    """One projection for q, k and v, taken apart by reshape, permute and unbind."""

    def __init__(self, d: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.stem, self.norm = heads, nn.Linear(96, d), nn.LayerNorm(d)
        self.qkv, self.proj, self.head = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).transpose(1, 2).reshape(-1, 32, 96))
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).reshape(b, t, d))).mean(1))


class Einsum(nn.Module):
    """Attention written with einsum, heads on axes of their own in the weights."""

    def __init__(self, d: int = 24, heads: int = 3, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(96, d)
        self.q, self.k, self.v = (nn.Linear(d, heads * width) for _ in range(3))
        self.o, self.head = nn.Linear(heads * width, d), nn.Linear(d, 5)
        self.heads, self.width = heads, width

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1).view(-1, 32, 96))
        q, k, v = (f(x).unflatten(-1, (self.heads, self.width)) for f in (self.q, self.k, self.v))
        scores = torch.einsum("bqhw,bkhw->bhqk", q, k).softmax(-1)
        y = torch.einsum("bhqk,bkhw->bqhw", scores, v).flatten(2)
        return self.head((x + self.o(y)).tanh().mean(1))


class Dense(nn.Module):
    """Each layer sees the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 6 * i), nn.SiLU(), nn.Conv2d(8 + 6 * i, 6, 3, padding=1)) for i in range(3)
        )
        self.head = nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(F.silu(x).mean((2, 3)))


class Gated(nn.Module):
    """RMS norm, a gated unit by chunk, pixel shuffle and a transposed depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(32, 20), nn.RMSNorm(20)
        self.up, self.down = nn.Linear(20, 48), nn.Linear(24, 32)
        self.spread = nn.ConvTranspose2d(8, 8, 2, 2, groups=8)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(self.norm(self.stem(x))).chunk(2, -1)  # [N, 3, 32, *] by the last axis
        y = self.down(F.silu(a) * b).mean(1).reshape(-1, 8, 4, 32)
        return self.out(self.spread(y.tanh())).mean((2, 3))


class Bag(nn.Module):
    """The mean of token embeddings, with a tied output table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 50, bias=False)
        self.out.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index)
        return self.out((x + self.mix(x.mean(1, keepdim=True)).tanh()).mean(1))


class Sequence(nn.Module):
    """1-d convolutions with group norm, and batch norm over [N, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n1 = nn.Conv1d(3, 12, 5, padding=2), nn.GroupNorm(3, 12)
        self.b, self.n2, self.head = nn.Conv1d(12, 10, 5, stride=2), nn.BatchNorm1d(10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.n1(self.a(x.flatten(2))))
        return self.head(self.n2(F.gelu(self.b(x)).mean(2)))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.b, self.head = nn.Conv3d(8, 6, 3, stride=2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.n(self.a(x[:, :, :12, :12].mean(1).unflatten(1, (2, 6)).unsqueeze(1))))
        return self.head(F.silu(self.b(F.pad(x, (0, 0, 0, 0, 1, 1)))).mean((2, 3, 4)))


def _image(generator: torch.Generator, size: int = 32) -> Tensor:
    return torch.randn(BATCH, 3, size, size, generator=generator)


def build(name: str, seed: int = 0) -> Case:
    """The case of that name; norms and statistics are away from their defaults, under which mistakes would not show."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    case = CASES[name](generator)
    randomise(case.net.eval(), generator)
    calibrate(case)
    return case


def randomise(net: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for key, p in [*net.named_parameters(), *net.named_buffers()]:
            if not p.is_floating_point():
                continue
            if key.endswith("running_var"):
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
            elif p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
            elif p.std() == 0:
                p.add_(torch.randn(p.shape, generator=generator))
            elif p.std() < 0.05:
                p.mul_(4)


def calibrate(case: Case) -> None:
    """Batch norms fitted to the data: deep random networks would be dead otherwise."""
    norms = [m for m in case.net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    if norms:
        case.run()
    case.net.eval()


def _transformers() -> Any:
    return pytest.importorskip("transformers")


SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 5,
}
TEXT: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 16, **SMALL}


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 50, (BATCH, 12), generator=generator)


def _resnet(kind: str) -> Callable[[torch.Generator], Case]:
    def make(generator: torch.Generator) -> Case:
        t = _transformers()
        config = t.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type=kind, num_labels=5)
        return Case(t.ResNetForImageClassification(config), (_image(generator),))

    return make


def _convnext(generator: torch.Generator) -> Case:
    t = _transformers()
    config = t.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, num_labels=5)
    return Case(t.ConvNextForImageClassification(config), (_image(generator),))


def _mobilenet(generator: torch.Generator) -> Case:
    t = _transformers()
    config = t.MobileNetV2Config(depth_multiplier=0.35, image_size=64, num_labels=5)
    return Case(t.MobileNetV2ForImageClassification(config), (_image(generator, 64),))


def _vit(generator: torch.Generator) -> Case:
    t = _transformers()
    return Case(t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, **SMALL)), (_image(generator),))


def _swin(generator: torch.Generator) -> Case:
    t = _transformers()
    config = t.SwinConfig(
        image_size=32, patch_size=2, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], num_labels=5
    )
    return Case(t.SwinForImageClassification(config), (_image(generator),))


def _bert(generator: torch.Generator) -> Case:
    t = _transformers()
    return Case(t.BertForSequenceClassification(t.BertConfig(**TEXT)), (_tokens(generator),))


def _bert_mask(generator: torch.Generator) -> Case:
    t = _transformers()
    mask = torch.ones(BATCH, 12, dtype=torch.long)
    mask[:5, 8:] = 0
    net = t.BertForSequenceClassification(t.BertConfig(**TEXT))
    return Case(net, kwargs={"input_ids": _tokens(generator), "attention_mask": mask})


def _bert_tied(generator: torch.Generator) -> Case:
    t = _transformers()
    return Case(t.BertForMaskedLM(t.BertConfig(**TEXT)), (_tokens(generator),))


def _gpt2(**options: Any) -> Callable[[torch.Generator], Case]:
    def make(generator: torch.Generator) -> Case:
        t = _transformers()
        config = t.GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=16,
            use_cache=False,
            bos_token_id=1,
            eos_token_id=2,
            **options,
        )
        return Case(t.GPT2LMHeadModel(config), (_tokens(generator),))

    return make


def _llama(generator: torch.Generator) -> Case:
    t = _transformers()
    config = t.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return Case(t.LlamaForCausalLM(config), (_tokens(generator),))


def _torch_transformer(generator: torch.Generator) -> Case:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return Case(nn.Sequential(nn.Flatten(2), nn.Linear(1024, 32), layer, nn.Linear(32, 5)), (_image(generator),))


def _plain(make: Callable[[], nn.Module]) -> Callable[[torch.Generator], Case]:
    return lambda generator: Case(make(), (_image(generator),))


CASES: dict[str, Callable[[torch.Generator], Case]] = {
    "mlp": _plain(lambda: zoo.mlp(3072, (32, 24), 5)),
    "vgg": _plain(
        lambda: zoo.VGG(((8,), (16, 12)), in_channels=3, grid=2, hidden=24, batch_norm=False, out_features=5)
    ),
    "vgg_bn": _plain(lambda: zoo.VGG(((8,), (16, 12)), in_channels=3, hidden=24, out_features=5)),
    "resnet_basic": _resnet("basic"),
    "resnet_bottleneck": _resnet("bottleneck"),
    "mobilenet_v2": _mobilenet,
    "convnext": _convnext,
    "unet": _plain(UNet),
    "unet_groupnorm": _plain(lambda: UNet(lambda channels: nn.GroupNorm(4, channels))),
    "groups_and_shuffle": _plain(Shuffle),
    "squeeze_excite": _plain(SqueezeExcite),
    "densenet": _plain(Dense),
    "conv1d": _plain(Sequence),
    "conv3d": _plain(Volume),
    "gated": _plain(Gated),
    "bag_of_tokens": lambda generator: Case(Bag(), (_tokens(generator),)),
    "vit": _vit,
    "swin": _swin,
    "bert": _bert,
    "bert_mask": _bert_mask,
    "bert_tied": _bert_tied,
    "gpt2": _gpt2(),
    "gpt2_eager": _gpt2(attn_implementation="eager"),
    "llama": _llama,
    "fused_qkv": _plain(Fused),
    "einsum": _plain(Einsum),
    "torch_transformer": _torch_transformer,
}


def twin(case: Case, state: dict[str, Tensor]) -> nn.Module:
    """A copy of the network with other weights."""
    other = copy.deepcopy(case.net)
    other.load_state_dict(state)
    return other
