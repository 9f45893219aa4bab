# SPDX-License-Identifier: Apache-2.0
"""Pictures of experiments: each is a PNG, written whole, of whatever kinds, seeds and levels there are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zipfast.soups import Barrier
from zipfast.tickets import Connectivity, Lottery, Masks, Training

pytest.importorskip("matplotlib")

from zipfast.tickets import plots

KINDS = ("ticket", "reinit", "random", "oneshot")
NAN = float("nan")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Empty legends, glyphs that are missing and the like."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def training(kind: str, seed: int, level: int) -> Training:
    density = 0.8**level
    return Training(
        kind, seed, level, density, {"fc1.weight": density, "out.weight": 0.9**level}, 100 + seed + 10 * level, 0.1,
        95.0, 94.0 - level + seed, 500, 0.2, 96.0, 95.0 - level, 2.0, "torch",
    )  # fmt: skip


def lottery(folder: Path, kinds: tuple[str, ...] = KINDS, seeds: int = 3, levels: int = 4) -> Lottery:
    found = [training(k, s, n) for k in kinds for s in range(seeds) for n in range(k != "ticket", levels)]
    return Lottery(folder, {"rewind": 0}, tuple(found))


def is_png(path: Path) -> bool:
    """A whole one: it starts and ends as PNG does; and nothing is left beside it."""
    data = path.read_bytes()
    left = [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")]
    return data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82") and len(data) > 2000 and not left


@pytest.mark.parametrize(
    ("kinds", "seeds", "levels"), [(KINDS, 3, 4), (("ticket",), 1, 1), (("ticket", "random"), 1, 3)]
)
def test_levels(tmp_path: Path, kinds: tuple[str, ...], seeds: int, levels: int) -> None:
    plots.plot_levels(lottery(tmp_path, kinds, seeds, levels), tmp_path / "levels.png")
    assert is_png(tmp_path / "levels.png")


def test_levels_of_seeds_that_have_not_the_same(tmp_path: Path) -> None:
    found = [training("ticket", 0, n) for n in (0, 3)] + [training("ticket", 1, n) for n in (0, 1, 2, 3)]
    plots.plot_levels(Lottery(tmp_path, {}, tuple(found)), tmp_path / "levels.png")
    assert is_png(tmp_path / "levels.png")


def test_layers(tmp_path: Path) -> None:
    plots.plot_layers(lottery(tmp_path), tmp_path / "layers.png", seed=1)
    assert is_png(tmp_path / "layers.png")


def test_overlap(tmp_path: Path) -> None:
    found = lottery(tmp_path, ("ticket",))
    for seed in range(3):
        place = tmp_path / f"seed-{seed}" / "ticket" / "level-02"
        place.mkdir(parents=True)
        masks = Masks.ones({"w": torch.ones(500)}).prune({"w": torch.arange(500.0).roll(100 * seed)}, 0.36)
        masks.save(place / "masks.safetensors")
    plots.plot_overlap(found, 2, tmp_path / "overlap.png")
    assert is_png(tmp_path / "overlap.png")
    with pytest.raises(FileNotFoundError, match="no level 1 of ticket, seed 0"):
        plots.plot_overlap(found, 1, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_lines(tmp_path: Path) -> None:
    alphas = tuple(i / 10 for i in range(11))
    scores = tuple(95 - 20 * a * (1 - a) for a in alphas)
    lines = [
        Connectivity(kind, level, 0, 0.8**level, (scores[0], scores[-1]), Barrier(alphas, scores, 5.0, 5.0, -5.0))
        for level, kind in enumerate(KINDS)
    ]
    assert not lines[0].stable
    plots.plot_lines(lines, tmp_path / "lines.png")
    assert is_png(tmp_path / "lines.png")


def test_a_picture_replaces_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "layers.png").write_text("old")
    plots.plot_layers(lottery(tmp_path, levels=2), tmp_path / "layers.png")
    assert is_png(tmp_path / "layers.png")
    with pytest.raises(OSError, match="cannot write"):
        plots.plot_layers(lottery(tmp_path, levels=2), tmp_path / "none" / "layers.png")


def test_all_figures_are_closed(tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()  # of other tests
    plots.plot_levels(lottery(tmp_path), tmp_path / "levels.png")
    assert pyplot.get_fignums() == before


def test_nothing_to_draw(tmp_path: Path) -> None:
    empty, found = Lottery(tmp_path, {}, ()), lottery(tmp_path)
    with pytest.raises(ValueError, match=r"plot_levels: there must be a finished training in .*, got none"):
        plots.plot_levels(empty, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"plot_layers: 'seed' must be one of 0, 1, 2, got 9"):
        plots.plot_layers(found, tmp_path / "x.png", seed=9)
    with pytest.raises(ValueError, match=r"plot_overlap: 'level' must be one of 0, 1, 2, 3, got 9"):
        plots.plot_overlap(found, 9, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"plot_lines: 'lines' must hold a line, got none"):
        plots.plot_lines([], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
