# SPDX-License-Identifier: Apache-2.0
"""A second data set for merging: twelve capital letters, drawn with the DejaVu fonts that matplotlib ships.

Each image is one letter in a random font, size, angle, place and brightness, with noise: light on dark and of the size
of the digits in :mod:`zipfast.demo`. Everything follows from one seed; another version of Pillow may draw edges a
little differently. Pillow comes with matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from zipfast.demo import SIZE, Digits

LETTERS = "ABCEFGHKRSTX"
FONTS = ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "SansMono-Bold", "Serif", "Serif-Bold", "Serif-Italic")
TRAIN, TEST, SEED = 1300, 500, 0
CANVAS = 64  # pixels per side; drawn large, then reduced, for smooth edges
HEIGHTS = range(48, 81)  # of the fonts on the canvas


def load_glyphs() -> Digits:
    """TRAIN and TEST letters, float32 [N, 1, SIZE, SIZE] in [0, 1]; label k is LETTERS[k]."""
    generator = np.random.default_rng(SEED)
    fonts = _fonts()
    labels = generator.integers(len(LETTERS), size=TRAIN + TEST)
    images = torch.from_numpy(np.stack([_draw(LETTERS[k], fonts, generator) for k in labels]))[:, None]
    named = torch.from_numpy(labels)
    return Digits(images[:TRAIN], named[:TRAIN], images[TRAIN:], named[TRAIN:])


def _draw(letter: str, fonts: list[ImageFont.FreeTypeFont], generator: np.random.Generator) -> np.ndarray:
    """One image, float32 [SIZE, SIZE]."""
    font = fonts[generator.integers(len(fonts))]
    x, y = CANVAS / 2 + generator.uniform(-6, 6, size=2)
    image = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(image).text((x, y), letter, fill=int(generator.integers(150, 256)), font=font, anchor="mm")
    turned = image.rotate(generator.uniform(-25, 25), Image.Resampling.BICUBIC)
    small = np.asarray(turned.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32) / 255
    return (small + generator.normal(0, 0.1, small.shape).astype(np.float32)).clip(0, 1)


def _fonts() -> list[ImageFont.FreeTypeFont]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [ImageFont.truetype(str(folder / f"DejaVu{name}.ttf"), height) for name in FONTS for height in HEIGHTS]
