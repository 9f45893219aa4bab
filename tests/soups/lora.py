# SPDX-License-Identifier: Apache-2.0
"""Small LoRA adapters as PEFT saves them, and what they change, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."
# Module -> shape of its weight in `base`. "turned" is stored [in, out], as GPT-2's Conv1D is.
SHAPES = {
    "block.0.wide": (5, 3), "block.0.square": (4, 4), "block.1.wide": (5, 3), "words": (7, 4), "conv": (6, 2, 3, 3),
}  # fmt: skip


def write(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {PREFIX + key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    whole = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["wide"],
    }
    (folder / "adapter_config.json").write_text(json.dumps({**whole, **config}))
    return folder


def factors(seed: int, rank: int, modules=tuple(SHAPES), ranks=None, dtype=torch.float32) -> dict[str, Tensor]:
    """Random factors under PEFT's names."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for module in modules:
        shape, r = SHAPES[module], (ranks or {}).get(module, rank)
        if module == "words":
            found[f"{module}.lora_embedding_A"] = torch.randn(r, shape[0], generator=g).to(dtype)
            found[f"{module}.lora_embedding_B"] = torch.randn(shape[1], r, generator=g).to(dtype)
            continue
        ones = (1,) * (len(shape) - 2)
        found[f"{module}.lora_A.weight"] = torch.randn(r, *shape[1:], generator=g).to(dtype)
        found[f"{module}.lora_B.weight"] = torch.randn(shape[0], r, *ones, generator=g).to(dtype)
    return found


def changes(tensors: dict[str, Tensor], scale) -> dict[str, np.ndarray]:
    """By module s·B·A in float64, laid out as the weight; scale: module -> number. Written apart from the code it checks."""
    found = {}
    tensors = {key.removeprefix(PREFIX): value.double().numpy() for key, value in tensors.items()}
    for key, a in tensors.items():
        module = key.rsplit(".lora_", 1)[0]
        if key.endswith("lora_embedding_A"):
            found[module] = scale(module) * (tensors[f"{module}.lora_embedding_B"] @ a).T
        elif key.endswith("lora_A.weight"):
            b = tensors[f"{module}.lora_B.weight"]
            b = b.reshape(b.shape[0], -1)
            found[module] = scale(module) * np.einsum("or,r...->o...", b, a)
    return found


def base_state(dtype=torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(99)
    found = {f"{module}.weight": torch.randn(*shape, generator=g).to(dtype) for module, shape in SHAPES.items()}
    return found | {
        "block.0.wide.bias": torch.randn(5, generator=g).to(dtype),
        "head.weight": torch.randn(2, 4, generator=g).to(dtype),
    }
