# SPDX-License-Identifier: Apache-2.0
"""Why a soup cannot work, or whether it can: said before or after it failed, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..states import State, open_state
from .geometry import Barrier, Geometry, barrier, geometry
from .ingredients import twins
from .mix import groups_of, layout_of
from .recipes import Evaluate, _open

# Fine-tunes of one start hardly leave it: cosines of their weights stay above .9 (docs/soup-results.md has some), those of
# networks trained from different starts are near 0 but for batch norm and biases, which all begin alike.
RELATED = 0.7
WORTH_SAYING = 1.0  # points of accuracy


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
        problems: reasons for which a soup will not work or did not; empty: none was found.
        notes: what else a user should know.
        geometry: None where the models do not fit together.
        barriers: from the first model to each other one, where a score was given.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    geometry: Geometry | None
    barriers: tuple[Barrier, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [f"- {text}" for text in self.problems] or ["no reason against a soup was found"]
        lines += [f"  note: {text}" for text in self.notes]
        return "\n".join(lines + ([str(self.geometry)] if self.geometry is not None else []))


def diagnose(
    sources: Sequence[Any],
    *,
    base: Any = None,
    evaluate: Evaluate | None = None,
    exclude: str | None = None,
    points: int = 5,
) -> Diagnosis:
    """Look for what stands against a soup: other architectures, a model with NaN, different starts, a barrier.

    Args:
        sources: k checkpoints. base: their start, if there is one.
        evaluate: state dict -> score in per cent, higher is better; then the line from the first model to each other one is
            evaluated at `points` places.
        exclude: a regular expression of tensors to leave out (heads).

    Cost: three passes over the weights; (k - 1)·points evaluations.

    Example:
        >>> print(diagnose([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, float("nan")])}]).problems[0])
        model 1 has NaN or infinity in 'w' at flat index 1; leave it out
    """
    states = _open(sources)
    start = [] if base is None else [open_state(base, "base")]
    try:
        layout = layout_of([*states, *start], exclude=exclude, out_dtype=torch.float64, name="diagnose")
    except ValueError as e:
        reason = str(e).removeprefix("diagnose: ")
        return Diagnosis((f"the models are of different architectures: {reason}",), (), None)
    problems = [text for state in [*states, *start] if (text := _broken(state, layout.blended)) is not None]
    notes = [*layout.notes, *twins(states, layout)]
    if problems:
        return Diagnosis(tuple(problems), tuple(notes), None)
    raw = geometry(states, exclude=exclude)
    found = geometry(states, base, exclude=exclude) if start else raw
    weights = raw.cosines
    for i in range(1, len(states)):
        if float(weights[0, i]) < RELATED:
            problems.append(
                f"{states[i].name} and {states[0].name} look trained from different starts: the cosine of their weights is "
                f"{float(weights[0, i]):.2f}; average matched features instead (zipfast.merge)"
            )
    barriers: list[Barrier] = []
    if evaluate is not None:
        for state in states[1:]:
            between = barrier(states[0], state, evaluate, points=points, exclude=exclude)
            barriers.append(between)
            if between.fall > WORTH_SAYING:
                worst = max(range(points), key=lambda i: _below(between, i))
                problems.append(
                    f"a barrier of {between.fall:.1f} points lies between {states[0].name} and {state.name}: "
                    f"{between.scores[worst]:.1f} at {between.alphas[worst]:.2f} of the way, {between.scores[0]:.1f} and "
                    f"{between.scores[-1]:.1f} at the ends; leave one out, or fine-tune with a lower learning rate"
                )
    return Diagnosis(tuple(problems), tuple(notes), found, tuple(barriers))


def _below(between: Barrier, i: int) -> float:
    """How far the score lies below the straight line between the ends."""
    alpha = between.alphas[i]
    return (1 - alpha) * between.scores[0] + alpha * between.scores[-1] - between.scores[i]


def _broken(state: State, keys: Sequence[str]) -> str | None:
    """Where a model is not finite."""
    for group in groups_of(keys, state.entries, 1):
        for piece in group:
            values: Tensor = state.read(piece.key, piece.start, piece.stop)
            wrong = ~torch.isfinite(values)
            if bool(wrong.any()):
                at = piece.start + int(wrong.to(torch.uint8).argmax())
                return f"{state.name} has NaN or infinity in {piece.key!r} at flat index {at}; leave it out"
    return None
