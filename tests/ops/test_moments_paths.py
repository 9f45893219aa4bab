# SPDX-License-Identifier: Apache-2.0
"""The paths of moments_: what the tensor-core ones could get wrong that the generic one cannot.

`test_moments.py` runs all of its tests on every path; here are the errors of split numbers and of sums that are cut off,
and what each path refuses.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import forced
from test_moments import Space, check, correlation, nasty

from zipfast.ops import OPS, moments_
from zipfast.ops.moments import NO_BAD_VALUE, SMALL, _compare, _prove

PATHS = OPS["moments_"].paths.names[1:]
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["emu", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param) as name:
        yield name


def sums(space: Space, path: str, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    features = len(space.features) * space.features[0].shape[space.axis]
    comoment = torch.zeros(features, features, dtype=torch.float64, device=device)
    total = torch.zeros(features, dtype=torch.float64, device=device)
    bad = torch.full((len(space.features),), NO_BAD_VALUE, device=device)
    shift = torch.zeros_like(total) if space.shift is None else space.shift.to(device)
    features_on = [x.to(device) for x in space.features]
    moments_([comoment], [total], [bad], features_on, [shift], [space.axis], [space.seen], path)
    return torch.triu(comoment).cpu(), total.cpu(), bad.cpu()


@pytest.mark.parametrize("layout", ["tokens", "images"])
@pytest.mark.parametrize("path", PATHS)
def test_correlation_of_nasty_channels(backend: str, device: str, path: str, layout: str, tolerance) -> None:
    samples = 1600
    x = torch.stack([nasty(samples, 0), nasty(samples, 10)])
    mean, std = x.mean(1).reshape(-1), x.std(1).reshape(-1)
    shift = torch.where(mean.abs() > 2 * std, mean.bfloat16().double(), 0.0)
    if layout == "images":
        features, axis = [v.reshape(16, 100, 24).transpose(1, 2).reshape(16, 24, 10, 10) for v in x], 1
    else:
        features, axis = list(x), 1
    space = Space(features, axis, shift)
    comoment, total, _ = sums(space, path, device)
    exact = space.stacked()
    centred = exact - exact.mean(1, keepdims=True)
    variance, got = correlation(comoment.numpy(), total.numpy(), samples)
    true_variance, want = correlation(centred @ centred.T, np.zeros(48), samples)
    assert (variance[true_variance > 1e-6 * samples] > 0).all()
    torch.testing.assert_close(got, want, **tolerance("moments_", "correlation", torch.float32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_long_sums_are_not_cut_off(backend: str, device: str, path: str, dtype: torch.dtype, tolerance) -> None:
    """Positive numbers only: what tensor cores cut off would add up to 2e-5 over these samples."""
    x = torch.rand(2, 4, 60, 50, generator=torch.Generator().manual_seed(3)).to(dtype)
    space = Space([x + 1], 1)
    exact = space.stacked()
    upper = np.triu_indices(4)
    relative = sums(space, path, device)[0].numpy()[upper] / (exact @ exact.T)[upper] - 1
    assert np.abs(relative).max() < 5e-7


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1.0, 1e4, 1e12])
def test_scales_far_apart(backend: str, device: str, path: str, scale: float, tolerance) -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(300, 5, generator=g)
    x[:, 1] *= scale
    x[:, 2] = 0
    x[17, 2] = scale  # one spike, and nothing else
    x[:, 3] = torch.where(torch.rand(300, generator=g) < 0.02, 1e3 * scale, scale) * x[:, 3]
    space = Space([x], 1)
    comoment = sums(space, path, device)[0]
    exact = space.stacked()
    square = np.sqrt((exact**2).sum(1))
    outer = square[:, None] * square[None, :]
    torch.testing.assert_close(
        comoment.numpy() / outer, np.triu(exact @ exact.T) / outer, **tolerance("moments_", "comoment", torch.float32)
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("moved", ["none", "one", "all"])
def test_halves_with_and_without_a_shift(
    backend: str, device: str, path: str, dtype: torch.dtype, moved: str, tolerance
) -> None:
    g = torch.Generator().manual_seed(2)
    x = [torch.randn(2, 40, 9, 9, generator=g).to(dtype) for _ in range(2)]
    shift = torch.zeros(80, dtype=torch.float64)
    if moved != "none":
        shift[77 if moved == "one" else slice(None)] = 1.75
    space = Space(x, 1, shift)

    class Result:
        def __init__(self, comoment: torch.Tensor, total: torch.Tensor, bad: torch.Tensor) -> None:
            self.comoment, self.total, self.bad = comoment, total, bad

        def upper(self) -> torch.Tensor:
            return self.comoment

    check(Result(*sums(space, path, device)), space, tolerance)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 39, 80), (2, 17, 35)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bad_values_are_found(backend: str, device: str, path: str, place, value: float, dtype: torch.dtype) -> None:
    x = [torch.randn(3, 40, 9, 9).to(dtype) for _ in range(2)]
    image, feature, position = place
    x[1][image, feature, position // 9, position % 9] = value
    _, _, bad = sums(Space(x, 1, seen=1000), path, device)
    assert bad.tolist() == [NO_BAD_VALUE, (1000 + image * 81 + position) * 40 + feature]


@pytest.mark.parametrize("path", PATHS)
def test_float64_is_refused(backend: str, device: str, path: str) -> None:
    x = torch.zeros(4, 2, dtype=torch.float64)
    match = f"moments_: path '{path}' takes features of float32, float16 or bfloat16, got float64"
    with pytest.raises(RuntimeError, match=match):
        sums(Space([x], 1), path, device)


def test_the_proof_compares(backend: str, device: str) -> None:
    where = torch.device(device)
    native = OPS["moments_"].native if backend == "cuda" else torch.ops.zipfast_emu.moments_
    assert _compare(where, native, PATHS, SMALL) is None

    def off(comoment, *rest):
        native(comoment, *rest)
        if rest[-1] != "generic":
            comoment[0][0, 0] *= 1 + 1e-4

    assert (
        _compare(where, off, PATHS, SMALL)
        == f"path '{PATHS[0]}' is off by 1e-04 of a feature's scale for torch.float32"
    )
    if backend == "cuda":
        assert _prove(where) is None
