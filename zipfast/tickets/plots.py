# SPDX-License-Identifier: Apache-2.0
"""Pictures of experiments, by matplotlib: the papers' figures, densities per layer, overlap of masks, lines of copies."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from ..soups.plots import _pyplot, _save
from .connectivity import Connectivity
from .results import Lottery, Training

COLORS = {"ticket": "tab:blue", "reinit": "tab:orange", "random": "tab:green", "oneshot": "tab:red"}
NAMES = {
    "ticket": "winning ticket",
    "reinit": "random re-initialisation",
    "random": "random mask",
    "oneshot": "one-shot",
}


def plot_levels(found: Lottery, path: str | os.PathLike[str]) -> None:
    """Accuracy at the end and at early stopping, and the early-stop iteration, against the weights that remain.

    Lines are means over seeds, bands from least to most (Frankle & Carbin 2019, figures 3 to 5, have it so).
    """
    if not found.trainings:
        raise ValueError(f"plot_levels: there must be a finished training in {found.folder}, got none")
    figure, axes = _pyplot().subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    values: tuple[tuple[str, Callable[[Training], float]], ...] = (
        ("accuracy at the end (%)", lambda t: t.end_test),
        ("accuracy at early stop (%)", lambda t: t.early_test),
        ("early-stop iteration", lambda t: float(t.early)),
    )
    for axis, (label, value) in zip(axes, values):
        for kind in dict.fromkeys(t.kind for t in found.trainings):
            levels: dict[int, list[Training]] = {}
            for t in found.trainings:
                if t.kind == kind:
                    levels.setdefault(t.level, []).append(t)
            groups = [group for _, group in sorted(levels.items())]
            x = [100 * group[0].density for group in groups]
            y = [[value(t) for t in group] for group in groups]
            axis.plot(x, [sum(v) / len(v) for v in y], ".-", color=COLORS[kind], label=NAMES[kind])
            axis.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=COLORS[kind], alpha=0.15, lw=0)
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.set_xlabel("weights remaining (%)")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=8)
    _save(figure, path)


def plot_layers(found: Lottery, path: str | os.PathLike[str], *, seed: int = 0) -> None:
    """Density of each layer at each level."""
    tickets = [t for t in found.trainings if t.kind == "ticket" and t.seed == seed]
    if not tickets:
        raise ValueError(f"plot_layers: 'seed' must be one of {_there(found, 'seed')}, got {seed}")
    figure, axes = _pyplot().subplots(figsize=(6, 3.8), layout="constrained")
    for name in tickets[0].densities:
        axes.plot([t.level for t in tickets], [100 * t.densities[name] for t in tickets], ".-", label=name)
    axes.set_yscale("log")
    axes.set_xlabel("level")
    axes.set_ylabel("weights remaining (%)")
    axes.legend(fontsize=7)
    _save(figure, path)


def plot_overlap(found: Lottery, level: int, path: str | os.PathLike[str]) -> None:
    """Intersection over union of the masks of each two seeds at a level."""
    seeds = [t.seed for t in found.trainings if t.kind == "ticket" and t.level == level]
    if not seeds:
        raise ValueError(f"plot_overlap: 'level' must be one of {_there(found, 'level')}, got {level}")
    masks = [found.masks(level, seed=seed) for seed in seeds]
    figure, axes = _pyplot().subplots(figsize=(4.5, 3.8), layout="constrained")
    image = axes.imshow([[a.overlap(b) for b in masks] for a in masks], vmin=0, vmax=1)
    axes.set_xticks(range(len(seeds)), seeds)
    axes.set_yticks(range(len(seeds)), seeds)
    axes.set_xlabel("seed")
    axes.set_ylabel("seed")
    figure.colorbar(image, label="overlap of survivors")
    _save(figure, path)


def plot_lines(lines: Sequence[Connectivity], path: str | os.PathLike[str]) -> None:
    """Accuracy along the line between two copies."""
    if not lines:
        raise ValueError("plot_lines: 'lines' must hold a line, got none")
    figure, axes = _pyplot().subplots(figsize=(6, 3.8), layout="constrained")
    for line in lines:
        label = f"{NAMES[line.kind]}, {100 * line.density:.1f} %" if line.level else "dense network"
        color = COLORS[line.kind] if line.level else "0.4"
        axes.plot(line.barrier.alphas, line.barrier.scores, ".-", color=color, label=label)
    axes.set_xlabel("from one copy to the other")
    axes.set_ylabel("test accuracy (%)")
    axes.legend(fontsize=8)
    _save(figure, path)


def _there(found: Lottery, what: str) -> str:
    """The seeds or levels of the tickets, in words."""
    return ", ".join(map(str, sorted({getattr(t, what) for t in found.trainings if t.kind == "ticket"}))) or "(none)"
