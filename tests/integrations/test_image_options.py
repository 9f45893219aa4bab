# SPDX-License-Identifier: Apache-2.0
"""What preprocessor_config.json says of images, as arguments of load_data: the same pixels as transformers' processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zipfast.sources import load_data

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from zipfast.integrations.transformers import data_options  # noqa: E402


def folder(tmp_path: Path, **entries: Any) -> Path:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entries))
    return tmp_path


def test_the_forms_that_are_in_use(tmp_path: Path) -> None:
    norm = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    want = {"image_size": 24, "mean": [0.4] * 3, "std": [0.2] * 3}
    for size in (24, {"height": 24, "width": 24}, {"shortest_edge": 24}):
        assert data_options(folder(tmp_path, size=size, **norm)) == want
    cut = {"height": 24, "width": 24}
    assert (
        data_options(folder(tmp_path, size={"shortest_edge": 32}, do_center_crop=True, crop_size=cut, **norm)) == want
    )
    assert data_options(folder(tmp_path, size=24, do_normalize=False, **norm)) == {"image_size": 24}
    assert data_options(folder(tmp_path, size=24, image_mean=[0.0] * 3))["std"] == [1.0] * 3


def test_pixels_are_those_of_the_processor(tmp_path: Path) -> None:
    """Without resizing, of which there are several kinds."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    processor_type = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    try:
        processor = processor_type(size={"height": 16, "width": 16}, image_mean=mean, image_std=std)
    except ImportError as e:
        pytest.skip(f"transformers' processor cannot run here: {str(e).strip().splitlines()[0]}")
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    image.fromarray(pixels).save(tmp_path / "images" / "one.png")
    ((found, _),) = load_data(str(tmp_path / "images"), **data_options(tmp_path))
    want = torch.as_tensor(np.asarray(processor(image.fromarray(pixels))["pixel_values"][0]))
    torch.testing.assert_close(found[0], want.float(), rtol=0, atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"data_options: 'folder' must hold preprocessor_config.json, got none in"
    ):
        data_options(tmp_path)
    for size in (None, {"height": 24, "width": 32}, {}, 0, "24"):
        with pytest.raises(ValueError, match="must make images square, of one size, got"):
            data_options(folder(tmp_path, size=size))
    for entries in ({"do_rescale": False}, {"rescale_factor": 1 / 127.5}):
        with pytest.raises(
            ValueError, match=r"must bring pixels to \[0, 1\], got a factor of .*; use transformers' own"
        ):
            data_options(folder(tmp_path, size=24, **entries))
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"preprocessor_config.json cannot be read as a JSON object \("):
        data_options(tmp_path)
