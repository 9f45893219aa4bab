# SPDX-License-Identifier: Apache-2.0
"""moments_: shifted sums and co-moments, against a float64 oracle, and bitwise wherever bits are promised."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import forced

import zipfast
from zipfast.ops import moments_
from zipfast.ops.moments import NO_BAD_VALUE

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


PATHS = ("mma",)  # "wgmma", which is for many features, has test_moments_wgmma.py
_path = "auto"


@pytest.fixture(params=["torch", "cpu", "emu", "cuda", *(f"{b}-{path}" for b in ("emu", "cuda") for path in PATHS)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation in turn, and every path of the CUDA kernels."""
    global _path
    name, _, path = request.param.partition("-")
    with forced(name):
        _path = path or "auto"
        yield name
        _path = "auto"


class Space(NamedTuple):
    features: list[torch.Tensor]  # one per model
    axis: int
    shift: torch.Tensor | None = None
    seen: int = 0

    def stacked(self) -> np.ndarray:
        """[F, samples] in float64, the samples in their order."""
        rows = [np.moveaxis(x.detach().cpu().double().numpy(), self.axis, 0) for x in self.features]
        return np.concatenate([r.reshape(r.shape[0], int(np.prod(r.shape[1:]))) for r in rows])

    def centred(self) -> np.ndarray:
        shift = np.zeros(len(self.stacked())) if self.shift is None else self.shift.cpu().numpy()
        return self.stacked() - shift[:, None]


class Result(NamedTuple):
    comoment: torch.Tensor
    total: torch.Tensor
    bad: torch.Tensor

    def upper(self) -> torch.Tensor:
        return torch.triu(self.comoment).cpu()


def run(
    spaces: Sequence[Space], into: Sequence[Result] | None = None, below: float = 0.0, path: str | None = None
) -> list[Result]:
    """moments_ of all spaces in one call; ``below`` fills the lower triangles beforehand."""
    models = len(spaces[0].features)
    device = spaces[0].features[0].device
    shift, results = [], list(into or [])
    for s in spaces:
        features = models * s.features[0].shape[s.axis]
        shift.append(torch.zeros(features).double().to(device) if s.shift is None else s.shift.to(device))
        if into is None:
            comoment = torch.tril(torch.full((features, features), below, dtype=torch.float64, device=device), -1)
            total = torch.zeros(features, dtype=torch.float64, device=device)
            results.append(Result(comoment, total, torch.full((models,), NO_BAD_VALUE, device=device)))
    assert (
        moments_(
            [r.comoment for r in results],
            [r.total for r in results],
            [r.bad for r in results],
            [x for s in spaces for x in s.features],
            shift,
            [s.axis for s in spaces],
            [s.seen for s in spaces],
            "auto" if path is None and any(s.features[0].dtype == torch.float64 for s in spaces) else path or _path,
        )
        is None
    )
    return results


def same_bits(a: Result, b: Result) -> bool:
    pairs = ((a.upper(), b.upper()), (a.total, b.total), (a.bad, b.bad))
    return all(torch.equal(x.cpu().view(torch.int64), y.cpu().view(torch.int64)) for x, y in pairs)


def check(result: Result, space: Space, tolerance) -> None:
    """Total and co-moment agree with float64, each on its own scale."""
    x, dtype = space.centred(), space.features[0].dtype
    if x.size == 0:
        assert not result.upper().any() and not result.total.any()
        return
    square = (x * x).sum(1)
    square[square == 0] = 1
    scale = np.sqrt(square[:, None] * square[None, :])
    got = result.upper().numpy() / scale
    torch.testing.assert_close(got, np.triu(x @ x.T) / scale, **tolerance("moments_", "comoment", dtype))
    scale = np.sqrt(square * x.shape[1])
    got = result.total.cpu().numpy() / scale
    torch.testing.assert_close(got, x.sum(1) / scale, **tolerance("moments_", "total", dtype))
    assert result.bad.tolist() == [NO_BAD_VALUE] * len(space.features)


def space(shape: Sequence[int], axis: int, models: int = 2, dtype: torch.dtype = torch.float32, **how) -> Space:
    """Random features; ``device``, ``seed``, ``relu``, ``shift`` (bool)."""
    g = torch.Generator().manual_seed(how.get("seed", 0))
    x = [torch.randn(tuple(shape), generator=g) for _ in range(models)]
    if how.get("relu"):
        x = [v.relu() for v in x]
    x = [v.to(dtype).to(how.get("device", "cpu")) for v in x]
    shift = None
    if how.get("shift"):
        shift = torch.randint(-8, 8, (models * shape[axis],), generator=g).double() / 4
    return Space(x, axis, shift)


def layouts() -> Iterator[tuple[tuple[int, ...], int]]:
    yield (5, 8), 1  # (N, D)
    yield (3, 4, 9), 2  # tokens
    yield (3, 9, 11), 1  # 1-d convolution
    yield (4, 6, 1, 1), 1  # a pooled image
    yield (3, 5, 7, 7), 1
    yield (2, 17, 4, 4), 1  # rows that can be read in whole vectors
    yield (2, 3, 5, 2), 3  # NHWC
    yield (6, 4), 0  # features first
    yield (9,), 0  # one sample
    yield (1, 33), 1


def test_table(backend: str, device: str) -> None:
    # two models of two features, three samples: rows of x - c are (1, 2, 3), (0, 1, 0), (-1, -1, -1), (2, 0, -2)
    a = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 1.0]], device=device)
    b = torch.tensor([[-1.0, 2.0], [-1.0, 0.0], [-1.0, -2.0]], device=device)
    shift = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    (r,) = run([Space([a, b], 1, shift)])
    assert r.total.tolist() == [6.0, 1.0, -3.0, 0.0]
    assert r.upper().tolist() == [
        [14.0, 2.0, -6.0, -4.0],
        [0.0, 1.0, -1.0, 0.0],
        [0.0, 0.0, 3.0, 0.0],
        [0.0, 0.0, 0.0, 8.0],
    ]
    assert r.bad.tolist() == [NO_BAD_VALUE] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_layouts(backend: str, device: str, models: int, dtype: torch.dtype, tolerance) -> None:
    for k, (shape, axis) in enumerate(layouts()):
        s = space(shape, axis, models, dtype, device=device, seed=k, shift=k % 2)
        check(run([s])[0], s, tolerance)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 63, 64, 65])
def test_sizes(backend: str, device: str, size: int, tolerance) -> None:
    for shape, axis in (((6, size), 1), ((2, size, 3, 3), 1), ((2, size, 4), 1)):
        s = space(shape, axis, 1, device=device, shift=True)
        check(run([s])[0], s, tolerance)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 4, 4), (3, 5, 0, 4), (3, 0)])
def test_no_samples(backend: str, device: str, shape: tuple[int, ...]) -> None:
    (r,) = run([Space([torch.zeros(shape, device=device)] * 2, 1)])
    assert not r.comoment.any() and not r.total.any() and r.bad.tolist() == [NO_BAD_VALUE] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis", "models"),
    [
        ((8, 16, 40, 40), 1, 2),  # pieces of one image
        ((300, 16, 7, 7), 1, 2),  # several images a panel, rows of odd length
        ((5, 8, 32, 32), 1, 3),  # panels of just 1024 samples
        ((5000, 12), 1, 2),
        ((3, 1025, 24), 2, 1),
        ((2, 7, 4100), 1, 2),
        ((2500, 20, 1, 1), 1, 2),
    ],
)
def test_many_samples(fast_backend: str, device: str, shape, axis: int, models: int, dtype, tolerance) -> None:
    for relu in (False, True):
        s = space(shape, axis, models, dtype, device=device, relu=relu, shift=not relu)
        check(run([s])[0], s, tolerance)


@pytest.mark.parametrize(("models", "size"), [(1, 383), (1, 384), (1, 385), (2, 192), (2, 193), (3, 129), (2, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_few_and_many_features(fast_backend: str, device: str, models: int, size: int, dtype, tolerance) -> None:
    for shape, axis in (((70, size), 1), ((3, size, 5, 5), 1), ((2, size, 6, 200), 1)):
        if dtype != torch.float32 and shape[-1] == 200:
            continue
        s = space(shape, axis, models, dtype, device=device, shift=True)
        check(run([s])[0], s, tolerance)


@pytest.mark.parametrize(("shape", "axis"), [((2100, 3), 1), ((1, 3, 4100), 1)])
def test_samples_in_several_parts(backend: str, device: str, shape, axis: int, tolerance) -> None:
    # more than 2048 samples are split over blocks on a GPU, more than 1024 over panels on a CPU
    s = space(shape, axis, 2, device=device, shift=True)
    check(run([s])[0], s, tolerance)


def test_several_tiles_of_features(backend: str, device: str, tolerance) -> None:
    s = space((20, 70), 1, 2, device=device)  # F = 140: three tiles of 64
    check(run([s])[0], s, tolerance)


def test_strided(backend: str, device: str) -> None:
    x = torch.randn(6, 10, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    for pick in (
        lambda t: t[:, ::2],
        lambda t: t[::2, 1:6, ::3],
        lambda t: t.transpose(0, 1),
        lambda t: t[:1, :, :1].expand(4, 10, 3, 8),
        lambda t: t.to(memory_format=torch.channels_last),
    ):
        view = [pick(x), pick(-x * x)]
        whole = [v.contiguous() for v in view]
        assert same_bits(run([Space(view, 1)])[0], run([Space(whole, 1)])[0])


def test_strided_shift(backend: str, device: str) -> None:
    s = space((7, 5), 1, device=device, shift=True)
    wide = torch.stack([s.shift, -s.shift], 1)[:, 0]
    assert same_bits(run([s._replace(shift=wide)])[0], run([s])[0])


def mixed_spaces(device: str) -> list[Space]:
    spaces = [
        space((5, 8), 1, 2, torch.float32, device=device, seed=1),
        space((3, 33, 4, 4), 1, 2, torch.float16, device=device, seed=2, shift=True),
        space((3, 4, 17), 2, 2, torch.bfloat16, device=device, seed=3),
        space((0, 6), 1, 2, torch.bfloat16, device=device, seed=4),
        space((2, 5, 6), 1, 2, torch.float64, device=device, seed=5, shift=True),
        space((4, 3, 2), 0, 2, torch.float32, device=device, seed=6, relu=True),
        space((9, 0), 1, 2, torch.float32, device=device, seed=7),
        space((2300, 2), 1, 2, torch.float32, device=device, seed=8),
    ]
    return [s for s in spaces if _path == "auto" or s.features[0].dtype != torch.float64]


def test_spaces_in_one_call_equal_separate_calls(backend: str, device: str) -> None:
    spaces = mixed_spaces(device)
    for together, alone in zip(run(spaces), [run([s])[0] for s in spaces], strict=True):
        assert same_bits(together, alone)


def test_more_spaces_than_one_launch_holds(backend: str, device: str) -> None:
    spaces = [space((3, 1 + k % 5), 1, 3, device=device, seed=k) for k in range(40)]
    for together, s in zip(run(spaces), spaces, strict=True):
        assert same_bits(together, run([s])[0])


def test_two_calls_add_up(backend: str, device: str, tolerance) -> None:
    whole = space((40, 6, 3, 3), 1, 2, device=device, shift=True)
    first = whole._replace(features=[x[:15] for x in whole.features])
    second = whole._replace(features=[x[15:] for x in whole.features])
    check(run([second], into=run([first]))[0], whole, tolerance)
    # what a call adds does not depend on what is there: integers add exactly
    exact = [s._replace(features=[(x * 8).round() for x in s.features]) for s in (first, second)]
    one, two, both = run([exact[0]])[0], run([exact[1]])[0], run([exact[1]], into=run([exact[0]]))[0]
    assert torch.equal(one.upper() + two.upper(), both.upper())
    assert torch.equal(one.total + two.total, both.total)


def test_below_the_diagonal_nothing_is_read(backend: str, device: str, tolerance) -> None:
    for shape in ((5, 9, 3, 3), (20, 70), (2100, 5)):
        s = space(shape, 1, 2, device=device)
        (clean,), (poisoned,) = run([s]), run([s], below=torch.nan)
        assert torch.isfinite(poisoned.upper()).all()
        assert same_bits(clean, poisoned)


def test_below_the_diagonal_nothing_is_read_where_features_are_many(fast_backend: str, device: str) -> None:
    s = space((9, 200), 1, 2, device=device)
    assert same_bits(run([s])[0], run([s], below=torch.nan)[0])


def test_inputs_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    spaces = mixed_spaces(device)
    before = [x.clone() for s in spaces for x in (*s.features, s.shift) if x is not None]
    first, second = run(spaces), run(spaces)
    after = [x for s in spaces for x in (*s.features, s.shift) if x is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def thread_spaces() -> list[Space]:
    return [
        space((40, 16, 14, 14), 1, 2),
        space((3000, 50), 1, 2, torch.float16),
        space((8, 100, 7, 7), 1, 2, torch.bfloat16, shift=True),
        space((130, 200), 1, 2),
        space((4, 250, 20, 20), 1, 2, relu=True),
        space((64, 200), 1, 2, torch.float64),
    ]


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    spaces, results = thread_spaces(), []
    for n in (1, 2, 3, 4):
        threads(n)
        results.append(run(spaces))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_equal_for_every_emulator_schedule(emu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces, results = mixed_spaces("cpu"), []
    for seed in range(4):
        monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
        results.append(run(spaces))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def loose_precision() -> Iterator[None]:
    """Everything that PyTorch offers to make float32 products coarser."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def as_usual(fast_backend: str, device: str) -> list[Result]:
    return run([s._replace(features=[x.to(device) for x in s.features]) for s in thread_spaces()[:4]])


def test_equal_under_loose_precision(fast_backend: str, device: str, as_usual, loose_precision: None) -> None:
    spaces = [s._replace(features=[x.to(device) for x in s.features]) for s in thread_spaces()[:4]]
    assert all(same_bits(a, b) for a, b in zip(as_usual, run(spaces), strict=True))


def nasty(samples: int, seed: int) -> torch.Tensor:
    """Channels with mean/std from 10 to 1000, dead, constant, rare and near-duplicate ones; [samples, 24]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 24, generator=g)
    x[:, 12:18] = x[:, 12:18].relu()
    for k, mean in enumerate((10.0, -30.0, 100.0, -300.0, 1000.0, 700.0)):
        x[:, k] += mean
    x[:, 6] = 0  # dead
    x[:, 7] = 0.1  # constant
    x[:, 8] = 1234.5  # constant and large
    x[:, 9] *= (torch.rand(samples, generator=g) < 0.01) * 300  # rare and strong
    x[:, 10] = x[:, 11] + 1e-3 * x[:, 10]  # near-duplicate
    return x


def correlation(comoment: np.ndarray, total: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Variance times samples, and correlations (0 where a channel does not vary)."""
    covariance = np.triu(comoment) + np.triu(comoment, 1).T - np.outer(total, total) / samples
    variance = np.diag(covariance).copy()
    safe = np.where(variance > 1e-6 * samples, variance, np.inf)
    return variance, covariance / np.sqrt(safe[:, None] * safe[None, :])


@pytest.mark.parametrize("layout", ["tokens", "images"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_correlation_of_nasty_channels(fast_backend: str, device: str, seed: int, layout: str, tolerance) -> None:
    x = torch.stack([nasty(12800, seed), nasty(12800, seed + 10)])
    mean = x[:, :400].mean(1).reshape(-1)
    bfloat = mean.bfloat16().double()  # few mantissa bits: exact in float32, and so is x - shift for constant channels
    shift = torch.where(mean.abs() > 2 * x[:, :400].std(1).reshape(-1), bfloat, 0.0)
    if layout == "images":
        features, axis = [v.reshape(128, 100, 24).transpose(1, 2).reshape(128, 24, 10, 10) for v in x], 1
    else:
        features, axis = list(x), 1
    s = Space([v.to(device) for v in features], axis, shift)
    (r,) = run([s])
    exact = s.stacked()
    centred = exact - exact.mean(1, keepdims=True)
    variance, got = correlation(r.upper().numpy(), r.total.cpu().numpy(), 12800)
    true_variance, want = correlation(centred @ centred.T, np.zeros(48), 12800)
    # a constant channel's variance is what rounding leaves of S (c - shift)^2: never below that by sign
    moving = true_variance > 1e-6 * 12800
    assert moving.sum() == 42
    assert (variance[moving] > 0).all()
    assert (variance[~moving] >= -1e-7 * np.diag(r.upper().numpy())[~moving]).all()
    torch.testing.assert_close(got, want, **tolerance("moments_", "correlation", torch.float32))


def test_dead_channels_are_exactly_zero(backend: str, device: str) -> None:
    x = torch.randn(50, 6, device=device)
    x[:, 2] = 0
    x[:, 4] = 0.75  # equal to its shift
    shift = torch.tensor([0, 0, 0, 0, 0.75, 0], dtype=torch.float64)
    (r,) = run([Space([x], 1, shift)])
    whole = r.upper() + r.upper().T
    assert not whole[2].any() and not whole[4].any() and r.total[2] == 0 and r.total[4] == 0


def planted(shape: tuple[int, ...], axis: int, places: list[tuple[int, int, int, float]], **how) -> Space:
    """Random features of two models with values planted at (model, sample, feature)."""
    s = space(shape, axis, 2, **how)
    features = []
    for m, x in enumerate(s.features):
        rows = x.movedim(axis, -1).clone(memory_format=torch.contiguous_format)
        flat = rows.view(-1, x.shape[axis])
        for model, sample, feature, value in places:
            if model == m:
                flat[sample, feature] = value
        features.append(rows.movedim(-1, axis).contiguous())
    return s._replace(features=features)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"), [((40, 6), 1), ((5, 6, 3, 3), 1), ((4, 9, 6), 2), ((6, 6, 6), 1), ((6, 40), 0)]
)
def test_bad_is_the_first_bad_value(backend: str, device: str, shape, axis: int, dtype: torch.dtype) -> None:
    inf, nan, size = torch.inf, torch.nan, 6
    for places, want in (
        ([(0, 20, 3, nan)], [20 * size + 3, None]),
        ([(1, 20, 3, inf)], [None, 20 * size + 3]),
        ([(1, 0, 0, -inf), (0, 35, 5, nan)], [35 * size + 5, 0]),
        ([(0, 7, 5, inf), (0, 7, 1, -inf), (0, 8, 0, nan)], [7 * size + 1, None]),
        ([(0, 30, 0, nan), (0, 4, 5, inf), (0, 4, 4, inf)], [4 * size + 4, None]),
        ([(0, 3, 2, inf), (0, 9, 2, -inf), (1, 9, 2, -inf), (1, 3, 2, inf)], [3 * size + 2] * 2),
    ):
        s = planted(shape, axis, places, dtype=dtype, device=device)
        (r,) = run([s])
        assert r.bad.tolist() == [NO_BAD_VALUE if w is None else w for w in want]


def test_bad_counts_the_samples_seen_and_never_rises(backend: str, device: str) -> None:
    s = planted((10, 4), 1, [(0, 3, 2, torch.nan)], device=device)
    (r,) = run([s._replace(seen=100)])
    assert r.bad.tolist() == [(100 + 3) * 4 + 2, NO_BAD_VALUE]
    (r,) = run([s._replace(seen=200)], into=[r])
    assert r.bad.tolist() == [(100 + 3) * 4 + 2, NO_BAD_VALUE]
    (r,) = run([s._replace(seen=1)], into=[r])
    assert r.bad.tolist() == [(1 + 3) * 4 + 2, NO_BAD_VALUE]


def test_bad_spoils_its_own_features_only(backend: str, device: str) -> None:
    s = planted((40, 4), 1, [(0, 3, 2, torch.nan)], device=device)
    (r,) = run([s])
    whole = r.upper() + r.upper().T
    finite = torch.ones(8, dtype=torch.bool)
    finite[2] = False
    assert torch.isfinite(whole[finite][:, finite]).all() and torch.isfinite(r.total.cpu()[finite]).all()
    assert not torch.isfinite(whole[2]).any() and not torch.isfinite(r.total.cpu()[2])


def test_bad_in_a_later_space_and_panel(fast_backend: str, device: str) -> None:
    good = space((50, 5), 1, 2, device=device)
    places = [(0, 4999, 3, torch.inf), (0, 2999, 7, torch.nan), (1, 4000, 0, torch.nan)]
    for shape, axis in (((5000, 8), 1), ((5, 8, 1000), 1), ((50, 8, 10, 10), 1)):
        _, r = run([good, planted(shape, axis, places, device=device)])
        assert r.bad.tolist() == [2999 * 8 + 7, 4000 * 8]
    r = run([planted((300, 250), 1, [(1, 299, 249, torch.nan), (1, 7, 249, torch.nan)], device=device)])[0]
    assert r.bad.tolist() == [NO_BAD_VALUE, 7 * 250 + 249]


def test_largest_finite_values_are_not_bad(backend: str, device: str) -> None:
    for dtype in DTYPES:
        x = torch.full((5, 3), torch.finfo(dtype).max, dtype=dtype, device=device)
        (r,) = run([Space([x], 1)])
        assert r.bad.tolist() == [NO_BAD_VALUE]


def test_finite_values_are_not_bad_whatever_the_shift(backend: str, device: str) -> None:
    x = torch.full((5, 3), 3e38, device=device)
    (r,) = run([Space([x], 1, torch.tensor([-3e38, 0, 0]).double())])
    assert r.bad.tolist() == [NO_BAD_VALUE]


def test_extreme_half_values(backend: str, device: str, tolerance) -> None:
    for dtype, small, large in ((torch.float16, 6e-8, 65504.0), (torch.bfloat16, 1e-20, 1e18)):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).sign()
        x = (x * torch.tensor([small, large, 1.0, small * 3])).to(dtype).to(device)
        s = Space([x], 1)
        check(run([s])[0], s, tolerance)
    # every subnormal float16 number, each with its exact square
    x = torch.arange(1, 1024, dtype=torch.int32).to(torch.int16).view(torch.float16).to(device)
    (r,) = run([Space([x.reshape(1023, 1)], 1)])
    assert r.total.item() == float(x.double().sum())


def test_exact_where_float32_is_exact(backend: str, device: str) -> None:
    for dtype in DTYPES:
        s = space((4, 9, 5, 5), 1, 2, torch.float32, device=device, shift=True)
        s = s._replace(features=[(x * 4).round().to(dtype) for x in s.features])
        (r,), x = run([s]), s.centred()
        assert torch.equal(r.upper(), torch.from_numpy(np.triu(x @ x.T)))
        assert torch.equal(r.total.cpu(), torch.from_numpy(x.sum(1)))


def test_random(fast_backend: str, device: str, tolerance) -> None:
    rng = np.random.default_rng(0)
    for trial in range(40):
        shape = [int(v) for v in rng.integers(1, 12, size=int(rng.integers(1, 5)))]
        axis, models = int(rng.integers(0, len(shape))), int(rng.integers(1, 5))
        shape[axis] = int(rng.integers(1, 70))
        s = space(shape, axis, models, DTYPES[trial % 4], device=device, seed=trial, shift=trial % 2)
        check(run([s])[0], s, tolerance)


def good() -> dict[str, list]:
    return {
        "comoment": [torch.zeros(4, 4).double(), torch.zeros(6, 6).double()],
        "total": [torch.zeros(4).double(), torch.zeros(6).double()],
        "bad": [torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)],
        "features": [torch.zeros(5, 2), torch.zeros(5, 2), torch.zeros(5, 3, 2), torch.zeros(5, 3, 2)],
        "shift": [torch.zeros(4).double(), torch.zeros(6).double()],
        "axis": [1, 1],
        "seen": [0, 0],
    }


def changed(name: str, at: int | None, value: object) -> dict[str, list]:
    args = good()
    if at is None:
        args[name] = value
    else:
        args[name][at] = value
    return args


X, META = torch.zeros(5, 2), torch.device("meta")


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (
            TypeError,
            "moments_: 'comoment' must be a non-empty list of tensors, got list",
            changed("comoment", None, []),
        ),
        (TypeError, r"moments_: 'comoment\[1\]' must be a tensor, got NoneType", changed("comoment", 1, None)),
        (TypeError, "'features' must be a non-empty list of tensors, got Tensor", changed("features", None, X)),
        *[
            (ValueError, rf"'{name}' must have one entry per space \(2\), got 1", changed(name, None, good()[name][:1]))
            for name in ("total", "bad", "shift", "axis", "seen")
        ],
        (ValueError, "'features' must hold M tensors for each of 2 spaces, got 3", changed("features", None, [X] * 3)),
        (
            TypeError,
            r"'features\[0\]' must be float32, float64, float16 or bfloat16, got int64",
            changed("features", 0, X.long()),
        ),
        (
            TypeError,
            r"'features\[2\]' must be float32, float64, float16 or bfloat16, got bool",
            changed("features", 2, torch.zeros(5, 3, 2).bool()),
        ),
        (
            TypeError,
            r"'features\[1\]' must be float32 as the first one, got float64",
            changed("features", 1, X.double()),
        ),
        (RuntimeError, "must be on cpu as the other arguments, got meta", changed("features", 1, X.to(META))),
        (
            RuntimeError,
            "'features' must be on cpu as the other arguments, got meta",
            changed("features", None, [X, X, X.to(META), X.to(META)]),
        ),
        (ValueError, r"'axis\[0\]' must be in \[0, 2\), got 2", changed("axis", 0, 2)),
        (ValueError, r"'axis\[1\]' must be in \[0, 3\), got -1", changed("axis", 1, -1)),
        (
            ValueError,
            r"features of space 1 must have one shape in all models, got \[5, 3, 2\] .*and \[5, 3, 3\] in model 1",
            changed("features", 3, torch.zeros(5, 3, 3)),
        ),
        (TypeError, r"'comoment\[0\]' must be float64, got float32", changed("comoment", 0, torch.zeros(4, 4))),
        (
            ValueError,
            r"'comoment\[1\]' must be \[F, F\] = \[6, 6\], got \[4, 4\]",
            changed("comoment", 1, torch.zeros(4, 4).double()),
        ),
        (TypeError, r"'total\[0\]' must be float64, got float16", changed("total", 0, torch.zeros(4).half())),
        (ValueError, r"'total\[1\]' must be \[F\] = \[6\], got \[5\]", changed("total", 1, torch.zeros(5).double())),
        (TypeError, r"'bad\[0\]' must be int64, got int32", changed("bad", 0, torch.zeros(2, dtype=torch.int32))),
        (
            ValueError,
            r"'bad\[1\]' must be \[M\] = \[2\], got \[3\]",
            changed("bad", 1, torch.zeros(3, dtype=torch.int64)),
        ),
        (TypeError, r"'shift\[1\]' must be float64, got float32", changed("shift", 1, torch.zeros(6))),
        (ValueError, r"'shift\[0\]' must be \[F\] = \[4\], got \[\]", changed("shift", 0, torch.zeros(()).double())),
        *[
            (RuntimeError, rf"'{name}\[0\]' must be on cpu .*, got meta", changed(name, 0, good()[name][0].to(META)))
            for name in ("comoment", "total", "bad", "shift")
        ],
        (
            ValueError,
            r"'comoment\[0\]' must be contiguous, as it is written in place",
            changed("comoment", 0, torch.zeros(4, 8).double()[:, ::2]),
        ),
        (ValueError, r"'total\[0\]' must be contiguous", changed("total", 0, torch.zeros(8).double()[::2])),
        (ValueError, r"'bad\[1\]' must be contiguous", changed("bad", 1, torch.zeros(4, dtype=torch.int64)[::2])),
    ],
)
def test_errors(error: type, match: str, args: dict[str, list]) -> None:
    with pytest.raises(error, match=match):
        moments_(*args.values())


def test_good_arguments_pass() -> None:
    assert moments_(*good().values()) is None


def test_shift_may_be_any_view() -> None:
    args = changed(
        "shift", 0, torch.zeros(8).double()[::2]
    )  # read only: unlike the accumulators it need not be contiguous
    with zipfast.backend(None):
        moments_(*args.values())
    assert list(itertools.chain(*(t.flatten().tolist() for t in args["total"]))) == [0.0] * 10
