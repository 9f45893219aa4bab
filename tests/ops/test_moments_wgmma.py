# SPDX-License-Identifier: Apache-2.0
"""moments_ by its path for many features, forced by name: on the emulator, and where it runs.

The emulator takes small constants for "wgmma" (csrc/cuda/moments_packed.h): 2 MB of operands a slab, two clusters, sums of
six groups.  300 features and 700 samples are two slabs there, of whole and split pairs of tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_moments import NO_BAD_VALUE, Space, check, planted, run, same_bits, space

import zipfast

PATHS = ("wgmma",)
NARROW = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["emu", "cuda"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    why_not = zipfast.ops.why_not(request.param)
    if why_not is not None:
        pytest.skip(f"backend {request.param!r}: {why_not}")
    if request.param == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("path 'wgmma' needs compute capability 9.0")
    with zipfast.backend(request.param):
        yield "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def shifted(s: Space, which: str) -> Space:
    """``s`` with no shift, one on every third feature, or one on all."""
    features = len(s.features) * s.features[0].shape[s.axis]
    shift = torch.arange(features).double() % 7 / 4 - 1
    if which == "some":
        shift[torch.arange(features) % 3 > 0] = 0
    return s._replace(shift=None if which == "none" else shift)


@pytest.mark.parametrize("which", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_layouts(device: str, path: str, dtype: torch.dtype, which: str, tolerance) -> None:
    for shape, axis, models in (
        ((70, 50), 1, 2),  # tokens
        ((3, 25, 33), 2, 3),
        ((3, 20, 5, 5), 1, 2),  # images, number by number
        ((3, 20, 6, 6), 1, 2),  # four at a time
        ((2, 40, 8, 16), 1, 1),  # eight
        ((40, 300), 0, 1),  # features first: one image
    ):
        s = shifted(space(shape, axis, models, dtype, device=device, seed=len(shape) + models), which)
        check(run([s], path=path)[0], s, tolerance)


@pytest.mark.parametrize("features", [1, 100, 127, 128, 129, 257, 300])
def test_features(device: str, path: str, features: int, tolerance) -> None:
    dtype = NARROW[features % 3]
    s = shifted(space((90, features), 1, 1, dtype, device=device, relu=True), "none" if features % 2 else "all")
    (r,) = run([s], below=torch.nan, path=path)
    check(r, s, tolerance)
    assert r.comoment.tril(-1).isnan().sum() == features * (features - 1) // 2  # nothing written below the diagonal


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 63, 64, 65, 255, 256, 257, 700])
def test_samples(device: str, path: str, samples: int, tolerance) -> None:
    for dtype, shape in (
        (torch.float32, (samples, 33)),
        (torch.float16, (1, 33, samples)),
        (torch.bfloat16, (samples, 33, 1, 1)),
        (torch.float32, (1, 33, samples)),
    ):
        s = space(shape, 1, 1, dtype, device=device, shift=samples % 2 == 0)
        check(run([s], path=path)[0], s, tolerance)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_slabs_and_parts(device: str, path: str, dtype: torch.dtype, tolerance) -> None:
    for shape, axis, models in (((700, 150), 1, 2), ((1800, 129), 1, 1), ((1800, 20), 1, 2)):
        s = space(shape, axis, models, dtype, device=device, shift=models == 2)
        first = run([s], path=path)[0]
        check(first, s, tolerance)
        assert same_bits(first, run([s], path=path)[0])


def test_many_positive_samples_are_not_biased(device: str, path: str, tolerance) -> None:
    # what tensor cores cut off always has the same sign here; only sums of few samples hide it
    x = torch.rand(1, 3, 3000, generator=torch.Generator().manual_seed(0)) + 0.5
    for dtype in NARROW:
        s = Space([x.to(dtype).to(device)], 1)
        check(run([s], path=path)[0], s, tolerance)


@pytest.mark.parametrize("layout", ["tokens", "images"])
def test_nasty_channels(device: str, path: str, layout: str, tolerance) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(600, 12, generator=g)
    x[:, 0] = 0
    x[:, 1] = 1.25
    x[:, 2] += 1e4
    x[:, 3] *= 1e-12
    x[:, 4] = 0
    x[300, 4] = 1e3  # one spike: nothing in the other groups
    x[:, 5] *= torch.logspace(-15, 6, 600)
    x[:, 6] *= 1e12
    x[:256, 7] *= 1e-6
    x[:, 8] = x[:, 9] + 1e-3 * x[:, 8]
    shift = torch.zeros(12, dtype=torch.float64)
    shift[1], shift[2] = 1.25, 9984.0
    x = x.reshape(6, 100, 12).transpose(1, 2).reshape(6, 12, 10, 10) if layout == "images" else x
    s = Space([x.to(device)], 1, shift)
    (r,) = run([s], path=path)
    check(r, s, tolerance)
    whole = r.upper() + r.upper().T
    assert not whole[0].any() and not whole[1].any() and r.total[0] == 0 and r.total[1] == 0


def test_exact_where_float32_is_exact(device: str, path: str) -> None:
    for dtype in NARROW:
        s = space((600, 70), 1, 2, device=device, shift=dtype != torch.float16)
        s = s._replace(features=[(x * 4).round().to(dtype) for x in s.features])
        (r,), x = run([s], path=path), torch.from_numpy(s.centred())
        assert torch.equal(r.upper(), torch.triu(x @ x.T)) and torch.equal(r.total.cpu(), x.sum(1))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("shape", "axis"), [((600, 6), 1), ((5, 6, 11, 11), 1), ((3, 6, 8, 8), 1), ((6, 520), 0)])
def test_bad(device: str, path: str, shape, axis: int, dtype: torch.dtype) -> None:
    inf, nan, size = torch.inf, torch.nan, 6
    for places, want in (
        ([(0, 120, 3, nan)], [120 * size + 3, NO_BAD_VALUE]),
        ([(1, 150, 0, -inf), (0, 190, 5, nan), (1, 20, 5, inf)], [190 * size + 5, 20 * size + 5]),
        ([(0, 7, 5, inf), (0, 7, 1, -inf), (0, 8, 0, nan)], [7 * size + 1, NO_BAD_VALUE]),
    ):
        s = planted(shape, axis, places, dtype=dtype, device=device)
        (r,) = run([s._replace(seen=10)], path=path)
        assert r.bad.tolist() == [w if w == NO_BAD_VALUE else w + 10 * size for w in want]
        spoilt = torch.zeros(2 * size, dtype=torch.bool)
        for model, _, feature, _ in places:
            spoilt[model * size + feature] = True
        whole = (r.upper() + torch.triu(r.upper(), 1).T).isfinite()
        assert whole[~spoilt][:, ~spoilt].all() and not whole[spoilt].any()
        assert torch.equal(r.total.cpu().isfinite(), ~spoilt)


def mixed(device: str) -> list[Space]:
    return [
        space((600, 70), 1, 2, torch.float32, device=device, seed=1),
        space((5, 70, 4, 4), 1, 2, torch.float16, device=device, seed=2, shift=True),
        space((300, 20), 1, 2, torch.float16, device=device, seed=3),
        space((3, 4, 17), 2, 2, torch.bfloat16, device=device, seed=4),
        space((0, 6), 1, 2, torch.bfloat16, device=device, seed=5),
        space((9, 8, 7, 7), 1, 2, torch.bfloat16, device=device, seed=6, relu=True),
    ]


def test_spaces_in_one_call_equal_separate_calls(device: str, path: str) -> None:
    spaces = mixed(device)
    for together, s in zip(run(spaces, path=path), spaces, strict=True):
        assert same_bits(together, run([s], path=path)[0])
    many = [space((30, 1 + k % 5), 1, 3, device=device, seed=k) for k in range(17)]
    for together, s in zip(run(many, path=path), many, strict=True):
        assert same_bits(together, run([s], path=path)[0])


def test_equal_for_every_emulator_schedule(emu_backend: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces, results = mixed("cpu"), []
    for seed in range(3):
        monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
        results.append(run(spaces, path=path))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_misaligned(device: str, path: str) -> None:
    for dtype in NARROW:
        wide = torch.randn(1 + 3 * 10 * 64, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
        view = wide[1:].view(3, 10, 8, 8)
        assert same_bits(run([Space([view], 1)], path=path)[0], run([Space([view.clone()], 1)], path=path)[0])


def test_two_calls_add_up(device: str, path: str, tolerance) -> None:
    whole = space((500, 150), 1, 1, device=device, shift=True)
    first, second = (whole._replace(features=[x]) for x in whole.features[0].split([300, 200]))
    check(run([second], into=run([first], path=path), path=path)[0], whole, tolerance)


def test_float64_is_refused(device: str, path: str) -> None:
    spaces = [space((5, 3), 1, 1, device=device), space((5, 3), 1, 1, torch.float64, device=device)]
    with pytest.raises(
        RuntimeError, match=rf"moments_: path '{path}' takes features of float32, float16 or bfloat16, got"
    ):
        run(spaces, path=path)
