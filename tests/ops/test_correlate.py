# SPDX-License-Identifier: Apache-2.0
"""correlate: correlations from sums, held against NumPy in float64; dead features, garbage, what is not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import zipfast
from zipfast.ops import correlate
from zipfast.ops.correlate import ALIVE, FINE

F64 = torch.float64
SIZES = (0, 1, 2, 31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 132, 191, 257)  # 64: a tile; n % 4: 16-byte accesses
# Error in float64; worst seen 3.3e-16: test_sizes, torch.  The sums of the samples are NumPy's, given to both.
TOLERANCE = 4e-15
Space = tuple[Tensor, Tensor, Tensor, int]


def space(rows: Tensor, shift: Tensor | float = 0.0) -> Space:
    """The sums of samples, [F, samples]; what lies below the diagonal of the co-moments is garbage."""
    rows = rows.double()
    own = torch.as_tensor(shift, dtype=F64).expand(len(rows)).clone()
    moved = rows - own[:, None]
    second = moved @ moved.T
    below = torch.ones_like(second).tril(-1).bool()
    return second.masked_fill(below, torch.nan), moved.sum(1), own, rows.shape[1]


def noise(features: int, samples: int = 40, seed: int = 0) -> Tensor:
    """Features that have to do with each other; every second one leans the other way."""
    x = torch.randn(features, samples, generator=torch.Generator().manual_seed(seed), dtype=F64)
    if features:
        x[1::2] -= 0.7 * x[:1]
    return x


def run(
    spaces: list[Space], device: str, *, wide: bool = True, pair_dead: bool = False
) -> tuple[list[Tensor], list[list[int]]]:
    comoment, total, shift, count = zip(*spaces)
    given = [[t.to(device) for t in part] for part in (comoment, total, shift)]
    found, status = correlate(*given, list(count), wide, pair_dead)
    assert status.shape == (len(spaces), 3) and status.dtype == torch.int64 and status.device.type == device
    for t, c in zip(found, comoment, strict=True):
        assert t.shape == c.shape and t.dtype == (F64 if wide else torch.float32) and t.device.type == device
        assert t.is_contiguous()
    return [t.cpu() for t in found], status.cpu().tolist()


def bits(t: Tensor) -> Tensor:
    return t.view({F64: torch.int64, torch.float32: torch.int32}[t.dtype])


def oracle(s: Space) -> np.ndarray:
    """Of features that are all alive."""
    comoment, total, _, count = (t.numpy() if isinstance(t, Tensor) else t for t in s)
    upper = np.triu(comoment)
    second = upper + np.triu(upper, 1).T
    mean = total / count
    covariance = second / count - np.outer(mean, mean)
    deviation = np.sqrt(np.diag(covariance))
    return covariance / np.outer(deviation, deviation)


def check(spaces: list[Space], device: str) -> None:
    """One call each in float64 and float32, against NumPy."""
    found, status = run(spaces, device)
    narrow, again = run(spaces, device, wide=False)
    assert status == again == [[FINE, len(s[1]), FINE] for s in spaces]
    for s, got, single in zip(spaces, found, narrow, strict=True):
        if not len(s[1]):
            continue
        assert np.abs(got.numpy() - oracle(s)).max() <= TOLERANCE
        assert torch.equal(single, got.float())
        assert torch.equal(bits(got), bits(got.T.contiguous())) and got.abs().max() <= 1
        assert got.diagonal().eq(1).all()


def test_table(backend: str, device: str) -> None:
    # Columns of (1, 2, 3, 4): itself, its negative, a constant, and a step.
    x = torch.tensor([[1.0, 2, 3, 4], [-1, -2, -3, -4], [5, 5, 5, 5], [0, 0, 1, 1]])
    step = 0.5 / math.sqrt(1.25 * 0.25)
    wanted = torch.tensor([[1, -1, 0, step], [-1, 1, 0, -step], [0, 0, 0, 0], [step, -step, 0, 1]], dtype=F64)
    for shift in (0.0, torch.tensor([2.0, -2, 5, 0.5], dtype=F64)):
        (got,), status = run([space(x, shift)], device)
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
        assert status == [[FINE, 3, FINE]]
        (narrow,), _ = run([space(x, shift)], device, wide=False)
        assert torch.equal(narrow, wanted.float())


def test_sizes(backend: str, device: str) -> None:
    check([space(noise(n, seed=n)) for n in SIZES], device)
    for n in SIZES[1:]:  # alone as in a list
        (alone,), _ = run([space(noise(n, seed=n))], device)
        assert torch.equal(alone, run([space(noise(3)), space(noise(n, seed=n))], device)[0][1])


def test_large(fast_backend: str, device: str) -> None:
    check([space(noise(1000)), space(noise(513, seed=1))], device)


def test_many_spaces(backend: str, device: str) -> None:
    """More than a launch takes, empty ones among them."""
    check([space(noise((3, 0, 5, 1)[i % 4], seed=i)) for i in range(150)], device)
    check([space(noise(0))] * 60, device)


def test_order_of_the_list_changes_nothing(backend: str, device: str) -> None:
    spaces = [space(noise(n, seed=n)) for n in (65, 3, 0, 132)]
    found, _ = run(spaces, device)
    turned, _ = run(spaces[::-1], device)
    assert all(torch.equal(a, b) for a, b in zip(found, turned[::-1], strict=True))


def test_shifts_and_means(backend: str, device: str) -> None:
    """Means up to 1000 deviations: taken away beforehand, and where they are not, to what float64 leaves of them."""
    x = noise(70) + torch.linspace(-1000, 1000, 70, dtype=F64)[:, None]
    exact = np.corrcoef(x.numpy())
    (shifted,), _ = run([space(x, x.mean(1).round())], device)
    assert np.abs(shifted.numpy() - exact).max() <= 1e-13
    (plain,), _ = run([space(x)], device)
    assert np.abs(plain.numpy() - exact).max() <= 1e-8


def test_alike_and_opposite(backend: str, device: str) -> None:
    x = noise(1).expand(66, -1) * torch.tensor([1.0, -2.0, 0.25]).repeat(22)[:, None]
    (got,), _ = run([space(x)], device, wide=False)
    sign = torch.tensor([1.0, -1.0, 1.0]).repeat(22)
    assert torch.equal(got, torch.outer(sign, sign))


@pytest.mark.parametrize("n", [40, 66, 132])
@pytest.mark.parametrize("wide", [True, False])
def test_dead_features(backend: str, device: str, n: int, wide: bool) -> None:
    x = noise(n)
    dead = {1: 0.0, 5: 0.0, 7: 3.7, 8: 3.7 * (1 + 2.0**-20), 30: 3.7 * (1 + 2.0**-16), n - 2: -3.7, n - 1: 0.0}
    for i, value in dead.items():
        x[i] = value
    x[12] = 1000 * (1 + 2.0**-20 * x[12].sign())  # varies by less than 2^-18 of the mean: rounding
    x[13] = 1000 * (1 + 2.0**-12 * x[13].sign())
    gone = torch.zeros(n, dtype=torch.bool)
    gone[[*dead, 12]] = True
    (got,), status = run([space(x)], device, wide=wide)
    assert status == [[FINE, n - 8, FINE]]
    assert bits(got)[gone].eq(0).all() and bits(got)[:, gone].eq(0).all()  # + 0
    assert np.abs(got[~gone][:, ~gone].numpy() - np.corrcoef(x[~gone].numpy())).max() <= (1e-9 if wide else 1e-7)
    (paired,), again = run([space(x)], device, wide=wide, pair_dead=True)
    assert again == status
    for i in range(n):
        for j in range(n):
            if i != j and gone[i] and gone[j]:
                a, b = float(x[i].mean()), float(x[j].mean())
                assert paired[i, j] == (abs(a - b) <= 2.0**-18 * max(abs(a), abs(b))), (i, j)
            else:
                assert paired[i, j] == got[i, j]
    assert paired[1, n - 1] == paired[7, 8] == 1 and paired[7, 30] == paired[7, n - 2] == 0


def test_all_dead(backend: str, device: str) -> None:
    for n in (1, 70):
        found, status = run([space(torch.full((n, 5), 2.0)), space(noise(2)[:, :1])], device)
        assert not found[0].any() and not found[1].any()
        assert [s[ALIVE] for s in status] == [0, 0]  # one sample does not vary


def put(s: Space, places: dict[tuple[int, int], float]) -> Space:
    comoment = s[0].clone()
    for place, value in places.items():
        comoment[place] = value
    return comoment, *s[1:]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [66, 132])
def test_pairs_that_are_not_finite(backend: str, device: str, n: int, value: float) -> None:
    good = space(noise(n))
    (want,), _ = run([good], device)
    for places in ([(3, 5)], [(62, 63), (62, 64), (63, 64)], [(2, n - 1), (0, n - 2)], [(n - 2, n - 1), (5, 65)]):
        broken = put(good, dict.fromkeys(places, value))
        found, status = run([good, broken, good], device)
        i, j = min(places)
        assert status == [[FINE, n, FINE], [FINE, n, i * n + j], [FINE, n, FINE]]
        for place in places:
            assert found[1][place].isnan() and found[1].T[place].isnan()
            found[1][place] = found[1].T[place] = want[place]
        assert torch.equal(found[1], want) and torch.equal(found[0], want)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite(backend: str, device: str, value: float) -> None:
    for n in (66, 132):
        for at in ([0], [n - 1, 64, 3], [63]):
            (got,), status = run([put(space(noise(n)), {(i, i): value for i in at})], device, pair_dead=True)
            assert status == [[min(at), n - len(at), FINE]]
            gone = torch.zeros(n, dtype=torch.bool)
            gone[at] = True
            assert got.diagonal().isnan().equal(gone)
            assert got.diagonal()[~gone].eq(1).all() and got[~gone][:, ~gone].isfinite().all()


def test_a_dead_feature_with_a_pair_that_is_not_finite(backend: str, device: str) -> None:
    x = noise(70)
    x[2] = x[66] = 1.0
    (got,), status = run([put(space(x), {(2, 66): torch.inf})], device, pair_dead=True)
    assert status == [[FINE, 68, 2 * 70 + 66]] and got[2, 66].isnan() and got[66, 2].isnan()


def test_equal_bits_on_every_compiled_backend() -> None:
    spaces = [space(noise(n, seed=n) + 3 * (n % 2)) for n in (1, 64, 66, 132, 257)]
    spaces[-1] = space(noise(257).index_fill(0, torch.tensor([0, 9, 200]), 1.0))
    built = [b for b in ("cpu", "emu", "cuda") if zipfast.available(b)]
    if len(built) < 2:
        pytest.skip("one compiled backend")
    for wide in (True, False):
        results = []
        for b in built:
            with zipfast.backend(b):
                results.append(run(spaces, "cuda" if b == "cuda" else "cpu", wide=wide, pair_dead=True))
        for found, status in results[1:]:
            assert status == results[0][1]
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, results[0][0], strict=True))


@pytest.mark.parametrize("n", [64, 68, 132])
def test_layouts(backend: str, device: str, n: int) -> None:
    """Strided sums, and co-moments that begin at an odd place: no 16-byte access is allowed there."""
    comoment, total, shift, count = space(noise(n))
    (want,), _ = run([(comoment, total, shift, count)], device, wide=False)
    holder = torch.zeros(n * n + 1, dtype=F64, device=device)
    odd = holder[1:].view(n, n).copy_(comoment)
    turned = comoment.T.contiguous().to(device).T
    twice = torch.stack([total, shift], 1).to(device)
    for square in (odd, turned):
        (got,), _ = correlate([square], [twice[:, 0]], [twice[:, 1]], [count], False, False)
        assert torch.equal(got.cpu(), want)


def test_inputs_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    comoment, total, shift, count = space(noise(132))
    given = [t.to(device) for t in (comoment, total, shift)]
    before = [t.clone() for t in given]
    first, _ = correlate(*([t] for t in given), [count], True, True)
    second, _ = correlate(*([t] for t in given), [count], True, True)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a.nan_to_num(nan=9.0), b.nan_to_num(nan=9.0)) for a, b in zip(before, given))


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    spaces = [put(space(noise(n, seed=n)), {(1, n - 1): torch.nan}) for n in (1100, 65, 257)]
    results = []
    for n in (1, 2, 3, 4):
        threads(n)
        results.append(run(spaces, "cpu", wide=False))
    for found, status in results:
        assert status == results[0][1]
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, results[0][0]))


def test_equal_for_every_emulator_schedule(emu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = [put(space(noise(n, seed=n)), {(1, 5): torch.nan, (3, n - 1): torch.inf}) for n in (68, 67)]
    want, wanted = run(spaces, "cpu", pair_dead=True)
    for seed in range(4):
        monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
        found, status = run(spaces, "cpu", pair_dead=True)
        assert status == wanted and all(torch.equal(bits(a), bits(b)) for a, b in zip(found, want, strict=True))


C, T = torch.eye(3, dtype=F64), torch.zeros(3, dtype=F64)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "correlate: 'comoment' must be a non-empty list of tensors, got Tensor", (C, [T], [T], [2])),
        (TypeError, "'comoment' must be a non-empty list of tensors, got list", ([], [], [], [])),
        (ValueError, r"'total' must have one entry per space \(1\), got 2", ([C], [T, T], [T], [2])),
        (ValueError, r"'shift' must have one entry per space \(1\), got Tensor", ([C], [T], T, [2])),
        (ValueError, r"'count' must have one entry per space \(2\), got 1", ([C, C], [T, T], [T, T], [2])),
        (TypeError, r"'comoment\[0\]' must be float64, got float32", ([C.float()], [T], [T], [2])),
        (TypeError, r"'total\[1\]' must be float64, got int64", ([C, C], [T, T.long()], [T, T], [2, 2])),
        (TypeError, r"'shift\[0\]' must be a tensor, got float", ([C], [T], [0.0], [2])),
        (ValueError, r"'comoment\[0\]' must be \[F, F\] = \[2, 2\], got \[3, 2\]", ([C[:, :2]], [T], [T], [2])),
        (ValueError, r"'comoment\[0\]' must be \[F, F\] = \[1, 1\], got \[\]", ([C[0, 0]], [T], [T], [2])),
        (ValueError, r"'total\[0\]' must be \[F\] = \[3\], got \[2\]", ([C], [T[:2]], [T], [2])),
        (ValueError, r"'shift\[0\]' must be \[F\] = \[3\], got \[3, 1\]", ([C], [T], [T[:, None]], [2])),
        (RuntimeError, r"'comoment\[1\]' must be on cpu as", ([C, C.to("meta")], [T, T], [T, T], [2, 2])),
        (RuntimeError, r"'shift\[0\]' must be on cpu as the other arguments, got meta", ([C], [T], [T.to("meta")], [2])),
        (ValueError, r"'count\[0\]' must be at least 1, got 0", ([C], [T], [T], [0])),
    ],
)  # fmt: skip
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        correlate(*args, False, False)


def test_automatic_choice_serves_the_cpu() -> None:
    with zipfast.backend(None):
        assert correlate([C], [T], [T], [3], False, False)[0][0].tolist() == C.tolist()
