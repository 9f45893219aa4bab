# SPDX-License-Identifier: Apache-2.0
"""Pictures of soups, by matplotlib: a greedy soup's steps, a curve between models, a plane through three."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from .. import checkpoint
from .geometry import Plane
from .recipes import Soup


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as e:
        raise ImportError("soup: matplotlib must be installed for pictures; pip install 'zipfast[plots]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    try:
        with checkpoint.atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=100)
    finally:
        _pyplot().close(figure)


def plot_greedy(soup: Soup, path: str | os.PathLike[str]) -> None:
    """Each model tried: its own score, the soup's with it, and whether it stayed."""
    figure, axes = _pyplot().subplots(figsize=(7, 3.5), layout="constrained")
    places = range(len(soup.tried))
    axes.plot(places, [soup.scores[t.model] for t in soup.tried], "o", color="0.6", label="the model alone")
    axes.plot(places, [t.score for t in soup.tried], "x", color="tab:red", label="soup with it, refused")
    kept = [i for i in places if soup.tried[i].accepted]
    axes.plot(kept, [soup.tried[i].score for i in kept], "o-", color="tab:green", label="soup")
    axes.set_xlabel("models in the order tried")
    axes.set_ylabel("held-out score")
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_curve(alphas: Sequence[float], scores: Sequence[float], path: str | os.PathLike[str]) -> None:
    """Scores between two models."""
    figure, axes = _pyplot().subplots(figsize=(5, 3.5), layout="constrained")
    axes.plot(alphas, scores, "o-")
    axes.plot([alphas[0], alphas[-1]], [scores[0], scores[-1]], ":", color="0.6")
    axes.set_xlabel("part of the second model")
    axes.set_ylabel("score")
    _save(figure, path)


def plot_plane(plane: Plane, path: str | os.PathLike[str], labels: Sequence[str] = ("base", "one", "two")) -> None:
    """Scores on a plane, as contours."""
    figure, axes = _pyplot().subplots(figsize=(5.5, 4.5), layout="constrained")
    drawn = axes.contourf(plane.x, plane.y, plane.scores.numpy(), levels=20, cmap="viridis")
    figure.colorbar(drawn, label="score")
    for (x, y), label in zip(plane.points, labels):
        axes.plot(x, y, "o", color="white", markeredgecolor="black")
        axes.annotate(label, (x, y), color="white", xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("distance from the base towards the first model")
    axes.set_ylabel("distance across")
    _save(figure, path)
