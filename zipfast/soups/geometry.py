# SPDX-License-Identifier: Apache-2.0
"""How models lie to each other in weight space, and how the error runs between them.

One streamed pass gives the Gram matrix of the differences from a base; norms, cosines, distances and the coordinates of a
plane all follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import gram
from ..states import open_state
from .mix import groups_of, layout_of, mix, read_group
from .recipes import Evaluate, _open


@dataclass(frozen=True)
class Geometry:
    """Inner products of task vectors θᵢ - base, and what follows.

    Attributes:
        names: of the models. gram: float64 [k, k]. per_tensor: by name, where asked for.
        based: whether a base was given; else vectors are the weights themselves.
    """

    names: tuple[str, ...]
    gram: Tensor
    based: bool
    per_tensor: dict[str, Tensor]

    @property
    def norms(self) -> Tensor:
        """‖θᵢ - base‖, float64 [k]."""
        return self.gram.diagonal().clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """Of the angles between task vectors, float64 [k, k]; 0 for a vector of length 0."""
        norms = self.norms
        scale = torch.outer(norms, norms)
        return torch.where(scale > 0, self.gram / scale, 0.0).clamp(-1, 1)

    @property
    def distances(self) -> Tensor:
        """‖θᵢ - θⱼ‖, float64 [k, k]."""
        own = self.gram.diagonal()
        return (own[:, None] + own[None, :] - 2 * self.gram).clamp(min=0).sqrt()

    def distance_of(self, weights: Sequence[float] | Tensor) -> Tensor:
        """Distance of the soup with these weights from each model, float64 [k]."""
        w = torch.as_tensor(weights, dtype=torch.float64)
        if w.shape != (self.gram.shape[0],):
            raise ValueError(f"distance_of: 'weights' must be {self.gram.shape[0]} numbers, got shape {list(w.shape)}")
        difference = w - torch.eye(len(w), dtype=torch.float64)
        return torch.einsum("ja,ab,jb->j", difference, self.gram, difference).clamp(min=0).sqrt()

    def __str__(self) -> str:
        wide = max(5, *(len(name) for name in self.names))
        lines = [f"{'model':<{wide}} {'norm':>10}  cosines"]
        for name, norm, row in zip(self.names, self.norms.tolist(), self.cosines.tolist()):
            lines.append(f"{name:<{wide}} {norm:>10.4g}  " + " ".join(f"{value:>6.3f}" for value in row))
        return "\n".join(lines)


def geometry(
    sources: Sequence[Any], base: Any = None, *, per_tensor: bool = False, exclude: str | None = None
) -> Geometry:
    """Norms, angles and distances of k models, from one pass over their weights.

    Args:
        sources: k checkpoints (:func:`zipfast.states.open_state`), up to 256.
        base: the pre-trained start; None: angles are between the weights themselves.
        per_tensor: keep the Gram matrix of each tensor, too.
        exclude: a regular expression; tensors with a match (a head of other shape) are left out.

    Raises:
        ValueError: models that do not fit together.

    Cost: every byte read once, k²/2 multiply-adds per number; 16 MB of buffers.

    Example:
        >>> found = geometry([{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])}])
        >>> found.norms.tolist(), found.cosines[0, 1].item(), found.distances[0, 1].item()
        ([3.0, 4.0], 0.0, 5.0)

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §4, angles between solutions.
    """
    states = _open(sources)
    start = [] if base is None else [open_state(base, "base")]
    layout = layout_of([*states, *start], exclude=exclude, out_dtype=torch.float64, name="geometry")
    keys = [key for key in layout.blended if key not in layout.ties]
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    found: dict[str, Tensor] = {}
    for group in groups_of(keys, layout.entries, len(states) + len(start)):
        origin = read_group(start, group) if start else []
        parts = gram(read_group(states, group), len(states), origin)
        for piece, part in zip(group, parts):
            total += part
            if per_tensor:
                found[piece.key] = found.get(piece.key, 0) + part
    return Geometry(tuple(s.name for s in states), total, base is not None, found)


@dataclass(frozen=True)
class Barrier:
    """Scores along the line between two models.

    Attributes:
        alphas, scores: (1 - α)·a + α·b scored at each α.
        height: how far the score falls below the mean of both ends, at the worst α; 0 or more.
        fall: the same below the straight line between the ends, which differs where they do (Entezari et al. 2022).
        advantage: score at the middle less the mean of both ends (interpolation advantage).
    """

    alphas: tuple[float, ...]
    scores: tuple[float, ...]
    height: float
    fall: float
    advantage: float


def barrier(a: Any, b: Any, evaluate: Evaluate, *, points: int = 11, **options: Any) -> Barrier:
    """The score between two models: is there a barrier?

    Args:
        a, b: checkpoints.
        evaluate: state dict -> score, higher is better (accuracy, not error).
        points: odd, 3 or more; both ends and the middle are among them.
        options: include, exclude, out_dtype, as for :func:`zipfast.soups.layout_of`.

    Reference: Frankle et al. 2020 (arXiv 1912.05671), §3 (instability analysis), with accuracy for error.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"barrier: 'points' must be odd and at least 3, got {points}")
    states = _open([a, b])
    layout = layout_of(states, name="barrier", **options)
    alphas = [i / (points - 1) for i in range(points)]
    scores = []
    for alpha in alphas:
        weight = torch.tensor([1 - alpha, alpha], dtype=torch.float64)
        state = mix(states, weight, layout=layout, int_policy="first", name="barrier")
        assert state is not None
        scores.append(float(evaluate(state)))
    ends = (scores[0] + scores[-1]) / 2
    fall = max((1 - alpha) * scores[0] + alpha * scores[-1] - score for alpha, score in zip(alphas, scores))
    height = max(0.0, ends - min(scores))
    return Barrier(tuple(alphas), tuple(scores), height, max(0.0, fall), scores[points // 2] - ends)


@dataclass(frozen=True)
class Advantage:
    """Of the middle of two models over the mean of both, with the angle between their task vectors, in degrees."""

    first: int
    second: int
    angle: float
    advantage: float


def advantages(sources: Sequence[Any], base: Any, evaluate: Evaluate, *, exclude: str | None = None) -> list[Advantage]:
    """Does averaging two models pay, and does it pay more the wider the angle between them?

    Args:
        sources: k checkpoints. base: their start. exclude: as for :func:`geometry`.
        evaluate: state dict -> score, higher is better.

    Returns:
        One per pair.

    Cost: k + k·(k - 1)/2 evaluations.

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §4, Fig. 3.
    """
    states = _open(sources)
    angles = geometry(states, base, exclude=exclude).cosines.acos().rad2deg()
    layout = layout_of(states, exclude=exclude, name="advantages")
    alone = [float(evaluate(state.load())) for state in states]
    half = torch.full((2,), 0.5, dtype=torch.float64)
    found = []
    for i in range(len(states)):
        for j in range(i + 1, len(states)):
            middle = mix([states[i], states[j]], half, layout=layout, int_policy="first", name="advantages")
            assert middle is not None
            gain = float(evaluate(middle)) - (alone[i] + alone[j]) / 2
            found.append(Advantage(i, j, float(angles[i, j]), gain))
    return found


@dataclass(frozen=True)
class Plane:
    """Scores on the plane through three models.

    Attributes:
        x, y: coordinates of the grid, in units of weight distance; the base is at (0, 0).
        scores: float64 [len(y), len(x)].
        points: where base, one and two lie.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    scores: Tensor
    points: tuple[tuple[float, float], ...]


def plane(
    base: Any, one: Any, two: Any, evaluate: Evaluate, *, size: int = 11, margin: float = 0.2,
    progress: Callable[[str, int], None] | None = None, **options: Any,
) -> Plane:  # fmt: skip
    """Scores on a grid of the plane through a start and two models fine-tuned from it.

    With τ = θ - base, û₁ = τ₁/‖τ₁‖ and û₂ the part of τ₂ across it, a point (x, y) is a three-way blend whose weights follow
    from the Gram matrix.

    Args:
        base, one, two: checkpoints.
        evaluate: state dict -> score.
        size: points along a side. margin: how far the grid goes beyond the models, in parts of their extent.
        progress: called with ("plane", points done).
        options: include, exclude, out_dtype, as for :func:`zipfast.soups.layout_of`.

    Raises:
        ValueError: the three lie on a line.

    Cost: size² evaluations.

    Reference: Garipov et al. 2018 (arXiv 1802.10026), App. A.1; Wortsman et al. 2022, Fig. 2.
    """
    if size < 2:
        raise ValueError(f"plane: 'size' must be at least 2, got {size}")
    states = _open([base, one, two])
    layout = layout_of(states, name="plane", **options)
    found = geometry(states[1:], states[0], exclude=options.get("exclude")).gram
    first = float(found[0, 0].clamp(min=0).sqrt())
    along = float(found[0, 1]) / first if first else 0.0
    height = float((found[1, 1] - along**2).clamp(min=0).sqrt())
    if not first or height <= 1e-6 * float(found[1, 1].sqrt()):
        raise ValueError("plane: the three models must not lie on a line, got models that do")
    points = ((0.0, 0.0), (first, 0.0), (along, height))
    axes = []
    for axis in (0, 1):
        low, high = min(p[axis] for p in points), max(p[axis] for p in points)
        room = margin * (high - low)
        axes.append(torch.linspace(low - room, high + room, size, dtype=torch.float64).tolist())
    scores = torch.empty(size, size, dtype=torch.float64)
    for i, y in enumerate(axes[1]):
        for j, x in enumerate(axes[0]):
            second = y / height
            weight = (x - along * second) / first
            column = torch.tensor([1 - weight - second, weight, second], dtype=torch.float64)
            state = mix(states, column, layout=layout, int_policy="first", name="plane")
            assert state is not None
            scores[i, j] = float(evaluate(state))
            if progress is not None:
                progress("plane", i * size + j + 1)
    return Plane(tuple(axes[0]), tuple(axes[1]), scores, points)


def soup_minus_ensemble(
    soup_losses: Tensor, alphas: Tensor, logits: Tensor, difference: Tensor, alpha: float, beta: float = 1.0
) -> float:
    """The analytic approximation of L_soup(α) - L_ens(α) for two models.

    .. math:: \\tfrac12 α(1-α) \\left( -\\frac{d^2 L_{soup}}{dα^2} + β^2 E_x Var_{Y \\sim softmax(β f)}[Δf_Y(x)] \\right)

    Args:
        soup_losses, alphas: the soup's loss at evenly spaced α, three or more, of which one is `alpha`, not at an end.
        logits: f(x; θ_α), [N, C]. difference: f(x; θ₂) - f(x; θ₁), [N, C].
        alpha, beta: where; β calibrates the soup.

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §5, eq. 1.
    """
    place = int((alphas - alpha).abs().argmin())
    if not 0 < place < len(alphas) - 1 or abs(float(alphas[place]) - alpha) > 1e-6:
        raise ValueError(f"soup_minus_ensemble: 'alpha' must be one of the inner 'alphas', got {alpha}")
    step = float(alphas[1] - alphas[0])
    losses = soup_losses.double()
    second = float(losses[place - 1] - 2 * losses[place] + losses[place + 1]) / step**2
    chance = (beta * logits.double()).softmax(1)
    mean = (chance * difference).sum(1, keepdim=True)
    variance = float((chance * (difference.double() - mean) ** 2).sum(1).mean())
    return 0.5 * alpha * (1 - alpha) * (-second + beta**2 * variance)
