# SPDX-License-Identifier: Apache-2.0
"""timm's models by name, and the data that they were trained to see.

Models come as ``timm:NAME`` wherever zipfast takes the name of a model (``rank``, ``features_of``, the command line); a
merged one or a soup is saved as .safetensors, which ``timm.create_model(name, checkpoint_path=...)`` loads. This module adds
how images have to be prepared. Needs timm >= 0.9, < 2, and torchvision, which timm imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..ranking import load_candidate

__all__ = ["data_options", "load"]


def load(name: str) -> nn.Module:
    """A pre-trained model of timm in eval mode, with its classes.

    Args:
        name: as ``timm.create_model`` takes it: "resnet18", "resnet18.a1_in1k", "hf-hub:OWNER/NAME@REVISION".

    Raises:
        ImportError: no timm, or an unsupported version. ValueError: timm cannot load it.
    """
    return load_candidate(f"timm:{name.removeprefix('timm:')}")


def data_options(model: nn.Module) -> dict[str, Any]:
    """How images must be prepared for a model of timm: arguments of :func:`zipfast.sources.load_data`.

    Args:
        model: with the ``pretrained_cfg`` that timm writes there.

    Returns:
        image_size, mean and std. The centre square is taken whole; timm's own evaluation resizes images to
        image_size / ``crop_pct`` first, and so cuts off their border.

    Raises:
        ValueError: no such entry; images that are not square, or of other channels than 1 and 3.

    Example:
        >>> net = nn.Identity()
        >>> net.pretrained_cfg = {"input_size": (3, 160, 160), "mean": (0.5,) * 3, "std": (0.25,) * 3}
        >>> data_options(net)
        {'image_size': 160, 'mean': [0.5, 0.5, 0.5], 'std': [0.25, 0.25, 0.25]}
    """
    known: Any = getattr(model, "pretrained_cfg", None)
    known = known if isinstance(known, Mapping) else getattr(known, "__dict__", {})
    try:
        channels, high, wide = (int(n) for n in known["input_size"])
        mean, std = ([float(v) for v in known[name]] for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        kind = type(model).__name__
        raise ValueError(
            f"data_options: 'model' must have timm's pretrained_cfg, got a {kind} without input_size, mean and std there"
        ) from None
    if high != wide or channels not in (1, 3) or not len(mean) == len(std) == channels:
        seen = f"{channels} x {high} x {wide} with {len(mean)} means"
        raise ValueError(f"data_options: images must be square, of 1 or 3 channels with a mean each, got {seen}")
    return {"image_size": high, "mean": mean, "std": std, **({"grayscale": True} if channels == 1 else {})}
