# SPDX-License-Identifier: Apache-2.0
"""Transformers from tiny configurations, with what their forward is called with."""

from __future__ import annotations

import pytest
import torch
from nets import NETS, build, randomise
from torch import Tensor, nn
from torch.utils._pytree import tree_map

WORDS, LENGTH = 30, 7
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}


def transformer(name: str, seed: int = 0) -> tuple[nn.Module, tuple, dict]:
    """(model, args, kwargs): double precision, eval mode, large random weights, a batch of 3."""
    torch.manual_seed(seed)
    if name == "encoder_layer":
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
        net, args, kwargs = nn.Sequential(layer, nn.Linear(12, 4)), (torch.randn(3, 5, 12, dtype=torch.float64),), {}
    else:
        t = pytest.importorskip("transformers")
        words = {"input_ids": torch.randint(WORDS, (3, LENGTH))}
        if name == "vit":
            config = t.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=4)
            net, args, kwargs = t.ViTForImageClassification(config), (torch.randn(3, 1, 8, 8).double(),), {}
        elif name == "bert":
            config = t.BertConfig(**SIZES, vocab_size=WORDS, max_position_embeddings=16, num_labels=4)
            net, args, kwargs = t.BertForSequenceClassification(config), (), {**words, "attention_mask": masks(3)}
        elif name == "gpt2":
            config = t.GPT2Config(
                vocab_size=WORDS, n_embd=12, n_layer=2, n_head=3, n_positions=16, use_cache=False, **NO_SPECIAL
            )
            net, args, kwargs = t.GPT2LMHeadModel(config), (), words
        else:
            assert name == "llama"
            config = t.LlamaConfig(
                **{**SIZES, "num_attention_heads": 6},
                vocab_size=WORDS,
                num_key_value_heads=3,
                max_position_embeddings=16,
                use_cache=False,
                **NO_SPECIAL,
            )
            net, args, kwargs = t.LlamaForCausalLM(config), (), words
    net = randomise(net.double().eval())
    with torch.no_grad():  # the usual initialisation is so small that outputs hardly depend on inputs
        for value in net.parameters():
            if value.dim() > 1:
                value.normal_(std=0.4)
    return net, args, kwargs


NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}
TRANSFORMERS = ("encoder_layer", "vit", "bert", "gpt2", "llama")


def masks(count: int) -> Tensor:
    """Attention masks of several lengths, at least one full."""
    length = torch.arange(count) % (LENGTH - 1) + 2
    return (torch.arange(LENGTH) < length.flip(0)[:, None]).long()


def case(name: str, seed: int = 0) -> tuple[nn.Module, tuple, dict]:
    """A net of `nets.NETS` or a transformer, with its arguments."""
    if name not in NETS:
        return transformer(name, seed)
    net, x = build(name, seed)
    return net, (x,), {}


def others(args: tuple, kwargs: dict, batch: int, seed: int = 5) -> tuple[tuple, dict]:
    """Arguments of the same form with other values, for `batch` samples."""
    generator = torch.Generator().manual_seed(seed)

    def other(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(batch, *value.shape[1:], dtype=value.dtype, generator=generator)
        return torch.randint(WORDS, (batch, *value.shape[1:]), generator=generator)

    new = tree_map(other, (args, kwargs))
    if "attention_mask" in kwargs:
        new[1]["attention_mask"] = masks(batch)
    return new


def tensor_of(output) -> Tensor:
    """The tensor of a model's or a part's answer."""
    if isinstance(output, Tensor):
        return output
    return output["logits"] if "logits" in output else next(iter(output.values()))
