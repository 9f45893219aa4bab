# SPDX-License-Identifier: Apache-2.0
"""Geometry of models: dense numpy, barriers and planes of known shape, soup and ensemble by brute force, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zipfast.soups import barrier, geometry, plane, soup_minus_ensemble

F64 = torch.float64
SHAPES = {"a.weight": (7, 5), "a.bias": (7,), "scale": (), "none": (0, 3), "head": (3, 7)}


def state(seed: int, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found = {key: torch.randn(shape, generator=draw, dtype=F64).to(dtype) for key, shape in SHAPES.items()}
    return {**found, "steps": torch.tensor(seed)}


def dense(states: list[dict[str, Tensor]], base: dict[str, Tensor] | None = None, keys: Any = SHAPES) -> np.ndarray:
    rows = [np.concatenate([one[key].double().numpy().reshape(-1) for key in keys]) for one in states]
    return np.stack(rows) - (0 if base is None else dense([base], keys=keys)[0])


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("exclude", [None, "^head"])
def test_against_numpy(based: bool, exclude: str | None) -> None:
    states, base = [state(i) for i in range(4)], state(9) if based else None
    found = geometry(states, base, per_tensor=True, exclude=exclude)
    keys = [key for key in SHAPES if exclude is None or key != "head"]
    x = dense(states, base, keys)
    norms = np.linalg.norm(x, axis=1)
    assert found.based is based and len(found.names) == 4
    np.testing.assert_allclose(found.gram, x @ x.T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.norms, norms, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.cosines, x @ x.T / np.outer(norms, norms), rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.distances, np.linalg.norm(x[:, None] - x[None], axis=2), rtol=0, atol=1e-12)
    assert set(found.per_tensor) == set(keys)
    torch.testing.assert_close(sum(found.per_tensor.values()), found.gram, rtol=0, atol=1e-12)
    for key in keys:
        part = dense(states, base, [key])
        np.testing.assert_allclose(found.per_tensor[key], part @ part.T, rtol=0, atol=1e-12)
    assert len(str(found).splitlines()) == 5 and not geometry(states, base).per_tensor


@pytest.mark.parametrize("seed", range(3))
def test_distance_of(seed: int) -> None:
    states, base = [state(i) for i in range(4)], state(9)
    weights = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=F64)  # negative ones, too
    x = dense(states, base)
    wanted = np.linalg.norm(weights.numpy() @ x - x, axis=1)
    np.testing.assert_allclose(geometry(states, base).distance_of(weights), wanted, rtol=0, atol=1e-12)
    plain = weights / weights.sum()  # of sum 1: the base does not matter
    x = dense(states)
    wanted = np.linalg.norm(plain.numpy() @ x - x, axis=1)
    for found in (geometry(states, base), geometry(states)):
        np.testing.assert_allclose(found.distance_of(plain.tolist()), wanted, rtol=1e-12, atol=1e-12)


def test_no_difference_from_the_base() -> None:
    found = geometry([state(1), state(2)], state(1))
    assert found.norms[0] == 0 and found.cosines.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert found.distances.diagonal().tolist() == [0.0, 0.0]


def test_mixed_dtypes() -> None:
    states = [state(1, torch.bfloat16), state(2, torch.float32), state(3, torch.float16)]
    x = dense(states, state(4))
    np.testing.assert_allclose(geometry(states, state(4)).gram, x @ x.T, rtol=0, atol=1e-12)
    base = state(4, torch.float32)
    x = dense(states, base)  # differences in float32
    np.testing.assert_allclose(geometry(states, base).gram, x @ x.T, rtol=0, atol=1e-5)


def at(place: float) -> dict[str, Tensor]:
    return {"w": torch.tensor([place, 1.0], dtype=F64)}


def test_barrier_of_a_basin() -> None:
    found = barrier(at(-1), at(1), lambda s: 10 - float(s["w"][0]) ** 2, points=5)
    assert found.alphas == (0.0, 0.25, 0.5, 0.75, 1.0) and found.scores == (9.0, 9.75, 10.0, 9.75, 9.0)
    assert (found.height, found.fall, found.advantage) == (0.0, 0.0, 1.0)


def test_barrier_of_two_valleys() -> None:
    def score(s: dict[str, Tensor]) -> float:
        return 3 - (float(s["w"][0]) ** 2 - 1) ** 2  # 3 at both ends, 2 between

    found = barrier(at(-1), at(1), score)
    assert len(found.scores) == 11 and found.height == pytest.approx(1) and found.advantage == pytest.approx(-1)
    assert found.fall == pytest.approx(1)


def test_barrier_between_unequal_ends() -> None:
    found = barrier(at(0), at(4), lambda s: float(s["w"][0]), points=3)  # a straight line: no fall, but below the mean
    assert (found.scores, found.height, found.fall, found.advantage) == ((0.0, 2.0, 4.0), 2.0, 0.0, 0.0)


def test_barrier_options() -> None:
    a, b = {**at(0), "head": torch.ones(2)}, {**at(1), "head": torch.zeros(3)}
    seen: list[dict[str, Tensor]] = []
    barrier(a, b, lambda s: seen.append(s) or 0.0, points=3, exclude="head")
    assert [s["w"][0].item() for s in seen] == [0.0, 0.5, 1.0]
    assert all(torch.equal(s["head"], torch.ones(2)) for s in seen)


def test_plane_finds_the_models() -> None:
    models = [state(i) for i in range(3)]
    x = dense(models)
    for own in range(3):

        def score(s: dict[str, Tensor], own: int = own) -> float:
            return float(np.linalg.norm(dense([s])[0] - x[own]))

        found = plane(*models, score, size=7, margin=0.3)
        corner = found.points[own]
        wanted = [[np.hypot(u - corner[0], v - corner[1]) for u in found.x] for v in found.y]  # lengths are kept
        np.testing.assert_allclose(found.scores, wanted, rtol=0, atol=1e-12)
    assert found.points[0] == (0.0, 0.0) and found.points[1][1] == 0.0
    assert found.points[1][0] == pytest.approx(float(np.linalg.norm(x[1] - x[0])))


def test_plane_at_the_points() -> None:
    base, one, two = ({"w": torch.tensor(v, dtype=F64)} for v in ([1.0, 1.0], [5.0, 1.0], [1.0, 3.0]))
    seen: list[list[float]] = []
    steps: list[int] = []
    found = plane(
        base,
        one,
        two,
        lambda s: seen.append(s["w"].tolist()) or 0.0,
        size=2,
        margin=0.0,
        progress=lambda _, n: steps.append(n),
    )
    assert found.points == ((0.0, 0.0), (4.0, 0.0), (0.0, 2.0)) and found.x == (0.0, 4.0) and found.y == (0.0, 2.0)
    assert seen == [[1.0, 1.0], [5.0, 1.0], [1.0, 3.0], [5.0, 3.0]] and steps == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("sign", [1, -1])
def test_soup_minus_ensemble(sign: int, alpha: float, dtype: torch.dtype) -> None:
    """Two close models with a hidden layer: terms of third order in their distance are left out, half a per cent.

    Labels are where the logits curve upwards (the soup, below the chord, is worse) or downwards (it is better).
    """
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=F64)

    x, one = noise(500, 5), [noise(8, 5), noise(3, 8)]
    two = [w + 0.05 * noise(*w.shape) for w in one]

    def logits(place: float) -> Tensor:
        inner, outer = (torch.lerp(a, b, place) for a, b in zip(one, two))
        return (x @ inner.T).tanh() @ outer.T

    labels = (sign * (logits(0) + logits(1) - 2 * logits(0.5))).argmax(1)
    alphas = torch.linspace(0, 1, 11, dtype=dtype)
    losses = torch.stack([F.cross_entropy(logits(a), labels) for a in torch.linspace(0, 1, 11, dtype=F64).tolist()])
    got = soup_minus_ensemble(losses, alphas, logits(alpha), logits(1) - logits(0), alpha)
    ensemble = F.cross_entropy((1 - alpha) * logits(0) + alpha * logits(1), labels)
    wanted = float(F.cross_entropy(logits(alpha), labels) - ensemble)
    assert sign * wanted > 0 and sign * got > 0
    assert got == pytest.approx(wanted, rel=0.02)  # worst seen: 0.0055


def test_soup_minus_ensemble_table() -> None:
    """Logits -+d/2 at chance 1/2: the variance is d²/4; losses of curvature 2c."""
    alphas = torch.tensor([0.0, 0.5, 1.0])
    logits, difference = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    for curve, beta, wanted in ((0.0, 1.0, 1 / 8), (1.0, 1.0, -1 / 8), (0.0, 2.0, 4 / 8)):
        got = soup_minus_ensemble(curve * alphas**2, alphas, logits, difference, 0.5, beta)
        assert got == pytest.approx(wanted, abs=1e-12)


def nothing(_: Any) -> float:
    return 0.0


def approximation(alpha: float) -> float:
    return soup_minus_ensemble(torch.zeros(5), torch.linspace(0, 1, 5), torch.zeros(1, 2), torch.zeros(1, 2), alpha)


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "weights": (lambda: geometry([at(0), at(1)]).distance_of([1.0]), r"distance_of: 'weights' must be 2 numbers"),
    "none": (lambda: geometry([]), "geometry: at least one model is needed"),
    "tensors": (lambda: geometry([at(0), {"v": torch.ones(2)}]), "must have the same tensors, got: .* lacks w"),
    "base": (lambda: geometry([at(0)], {"w": torch.ones(3)}), r"'w' is \[2\] in model 0 and \[3\] in base"),
    "pattern": (lambda: geometry([at(0)], exclude="^x$"), "'exclude' .* matches no tensor"),
    "few": (lambda: barrier(at(0), at(1), nothing, points=1), "'points' must be odd and at least 3, got 1"),
    "even": (lambda: barrier(at(0), at(1), nothing, points=4), "'points' must be odd and at least 3, got 4"),
    "line": (lambda: plane(at(0), at(1), at(2), nothing), "the three models must not lie on a line"),
    "start": (lambda: plane(at(0), at(0), at(2), nothing), "the three models must not lie on a line"),
    "size": (lambda: plane(at(0), at(1), at(2), nothing, size=1), "'size' must be at least 2, got 1"),
    "end": (lambda: approximation(1.0), "'alpha' must be one of the inner 'alphas', got 1.0"),
    "between": (lambda: approximation(0.3), "'alpha' must be one of the inner 'alphas', got 0.3"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()
