# SPDX-License-Identifier: Apache-2.0
"""How images have to be prepared for a model of transformers, from the file beside its weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "preprocessor_config.json"


def data_options(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What an image model was trained to see: arguments of :func:`zipfast.sources.load_data`.

    Args:
        folder: with preprocessor_config.json.

    Returns:
        image_size, and mean and std if images are normalised. The centre square is taken whole: where the processor resizes
        to more than it cuts out, the border that it drops stays in.

    Raises:
        FileNotFoundError: no such file. ValueError: no JSON object; images that are not square; values that are not in
        [0, 1] before they are normalised.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        ...     _ = Path(folder, "preprocessor_config.json").write_text(json.dumps(config))
        ...     data_options(folder)
        {'image_size': 32, 'mean': [0.5, 0.5, 0.5], 'std': [0.25, 0.25, 0.25]}
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"data_options: 'folder' must hold {FILE}, got none in {folder}")
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise ValueError(f"data_options: {path} cannot be read as a JSON object ({e})") from None
    factor = known.get("rescale_factor", 1 / 255)
    if not known.get("do_rescale", True) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        seen = f"a factor of {factor} or none"
        raise ValueError(
            f"data_options: {path} must bring pixels to [0, 1], got {seen}; use transformers' own processor"
        )
    cut = known.get("crop_size") if known.get("do_center_crop") else None
    options: dict[str, Any] = {"image_size": _side(path, cut if cut is not None else known.get("size"))}
    if known.get("do_normalize", True) and "image_mean" in known:
        mean = list(known["image_mean"])
        options |= {"mean": mean, "std": list(known.get("image_std", [1.0] * len(mean)))}
    return options


def _side(path: Path, size: Any) -> int:
    named = ("height", "width", "shortest_edge")
    sides = {size[name] for name in named if name in size} if isinstance(size, Mapping) else {size}
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"data_options: {path} must make images square, of one size, got {size!r}")
    return int(sides.pop())
