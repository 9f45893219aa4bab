# SPDX-License-Identifier: Apache-2.0
"""Pictures of rankings, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .. import checkpoint
from .rank import Ranking


def plot_ranking(
    ranking: Ranking, path: str | os.PathLike[str], truth: Mapping[str, float] | None = None, label: str = "accuracy"
) -> None:
    """Scores with their intervals, best first; with given accuracies also score against accuracy, with τ of both orders.

    Raises:
        ImportError: no matplotlib. ValueError: nothing was scored. OSError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise ImportError("rank: matplotlib must be installed for pictures; pip install 'zipfast[plots]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in ranking.rows if row.error is None]
    if not rows:
        raise ValueError("rank: at least one candidate must have a score for a picture, got none")
    values = [row.scores[ranking.metric] for row in rows]
    spans = [row.intervals.get(ranking.metric, (v, v)) for row, v in zip(rows, values)]
    errors = [
        [max(0.0, v - low) for v, (low, _) in zip(values, spans)],
        [max(0.0, high - v) for v, (_, high) in zip(values, spans)],
    ]
    panels = 2 if truth else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(6 * panels, 1.5 + 0.3 * len(rows)), layout="constrained", squeeze=False
    )
    left: Any = axes[0][0]
    places = list(range(len(rows)))
    left.errorbar(values, places, xerr=errors, fmt="o", capsize=3)
    left.set_yticks(places, [row.name for row in rows], fontsize=8)
    left.invert_yaxis()
    left.set_xlabel(ranking.metric)
    left.grid(axis="x", alpha=0.3)
    if truth:
        right: Any = axes[0][1]
        known = [(row.name, row.scores[ranking.metric]) for row in rows if row.name in truth]
        right.scatter([score for _, score in known], [truth[name] for name, _ in known])
        for name, score in known:
            right.annotate(name, (score, truth[name]), fontsize=6, xytext=(3, 3), textcoords="offset points")
        right.set_xlabel(ranking.metric)
        right.set_ylabel(label)
        right.set_title(f"weighted Kendall tau {ranking.agreement(truth)[ranking.metric]}", fontsize=9)
        right.grid(alpha=0.3)
    with checkpoint.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
