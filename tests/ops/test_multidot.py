# SPDX-License-Identifier: Apache-2.0
"""multidot: inner products in float64, held against exact sums."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import zipfast
from zipfast.ops import multidot

F32, F64, F16, BF16 = DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 511, 512, 513)  # 4, 8: 16 bytes; 32: the lanes of the C++ kernel
PIECES = (1023, 1024, 1025, 2053)  # 1024: a block of the emulator
LARGE = (16383, 16384, 16385, 65535, 65536, 65537)  # 16384: a piece of the C++ kernel; 4096: a CUDA block
# Error of a sum, divided by the sum of the magnitudes of its terms; worst seen 3.9e-15: test_strided, torch.
TOLERANCE = 2e-14


def noise(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def run(g: list[Tensor], x: list[Tensor], device: str) -> Tensor:
    got = multidot([t.to(device) for t in g], [t.to(device) for t in x])
    assert got.shape == (len(x) // len(g), len(g)) and got.dtype == F64
    assert got.device.type == device and got.is_contiguous()
    return got.cpu()


def terms(a: Tensor, b: Tensor) -> np.ndarray:
    return a.detach().cpu().double().numpy().reshape(-1) * b.detach().cpu().double().numpy().reshape(-1)


def check(g: list[Tensor], x: list[Tensor], device: str) -> Tensor:
    """One call against sums without rounding (``math.fsum``) of the float64 products."""
    got = run(g, x, device)
    for i, j in np.ndindex(got.shape):
        product = terms(g[j], x[i * len(g) + j])
        error, scale = abs(float(got[i, j]) - math.fsum(product)), float(np.abs(product).sum())
        assert error <= TOLERANCE * scale, f"model {i}, tensor {j}: {error / scale:.2e}"
    return got


def test_table(backend: str, device: str) -> None:
    g = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(2.0)]
    x = [torch.ones(2, 2), torch.tensor(5.0), torch.tensor([[0.0, 1.0], [-1.0, 0.5]]), torch.tensor(-1.0)]
    assert check(g, x, device).tolist() == [[10.0, 10.0], [1.0, -2.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_mixes(backend: str, device: str, dtype: torch.dtype) -> None:
    mixes = list(itertools.product(DTYPES, repeat=2))
    g = [noise(101, seed=j, dtype=dtype) for j in range(len(mixes))]
    check(g, [noise(101, seed=100 + 50 * i + j, dtype=mix[i]) for i in range(2) for j, mix in enumerate(mixes)], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 72])
def test_sizes(backend: str, device: str, dtype: torch.dtype, k: int) -> None:
    g = [noise(n, seed=n, dtype=dtype) for n in SIZES]
    x = [noise(n, seed=31 * i + n + 1, dtype=DTYPES[i % 4]) for i in range(k) for n in SIZES]
    got = check(g, x, device)
    assert got[:, 0].eq(0).all()
    for j in range(len(SIZES)) if k == 2 else ():  # alone as in a list
        assert torch.equal(run([g[j]], x[j :: len(SIZES)], device), got[:, j : j + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3, 34])  # 32 models fit between two barriers
def test_several_pieces(backend: str, device: str, dtype: torch.dtype, k: int) -> None:
    sizes = PIECES if k < 34 else PIECES[:2]
    g, x = [noise(n, seed=n, dtype=dtype) for n in sizes], [noise(n, seed=i + n) for i in range(k) for n in sizes]
    check(g, [t.to(dtype) for t in x], device)
    if k == 3:
        check(g, [t.to(DTYPES[i % 4]) for i, t in enumerate(x)], device)


def test_more_pieces_than_a_block_adds_at_once(backend: str, device: str) -> None:
    n = 1024 * 64 * 8 + 1024 * 65  # 64 threads of the emulator, eight pieces each
    g, x = torch.ones(n), torch.arange(n) % 1000
    few = torch.ones(1024)  # lies behind, as does the second model
    got = run([g, few], [x.float(), few, 1 + x.float(), few], device)
    assert got.tolist() == [[x.sum(), 1024], [x.sum() + n, 1024]]


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned(backend: str, device: str, dtype: torch.dtype | None, offset: int) -> None:
    # the same bits, wherever tensors lie: shapes alone decide who adds what
    kinds, n = [dtype or DTYPES[i % 4] for i in range(4)], 2100
    data = [noise(n, seed=i, dtype=kind).to(device) for i, kind in enumerate(kinds)]
    want = multidot(data[:1], data[1:])
    for moved in range(4):
        views = [torch.cat([t.new_zeros(offset), t])[offset:] if i == moved else t for i, t in enumerate(data)]
        assert views[moved].storage_offset() == offset
        got = multidot(views[:1], views[1:])
        if backend == "torch":  # whose dot product follows the alignment
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_sizes(fast_backend: str, device: str, dtype: torch.dtype) -> None:
    g = [noise(n, seed=n, dtype=dtype) for n in LARGE]
    check(g, [noise(n, seed=n + 1 + i, dtype=(F32, dtype)[i]) for i in range(2) for n in LARGE], device)


def test_shapes(backend: str, device: str) -> None:
    shapes = [(), (1,), (1, 1, 1), (2, 3, 5, 7), (0,), (3, 0, 2), (33, 3)]
    check([noise(*s, seed=9) for s in shapes], [noise(*s, seed=i) for i in range(3) for s in shapes], device)


@pytest.mark.parametrize(("k", "count"), [(2, 256), (2, 257), (3, 600), (6, 256), (7, 300), (72, 45)])
def test_more_than_one_launch(backend: str, device: str, k: int, count: int) -> None:
    sizes, pool = [(0, 3, 97, 1, 130)[j % 5] for j in range(count)], noise(5000, seed=0)
    x = [pool[11 * i + j : 11 * i + j + n] for i in range(k) for j, n in enumerate(sizes)]
    check([pool[-n:] if n else pool[:0] for n in sizes], x, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_position_counts_once(backend: str, device: str, dtype: torch.dtype) -> None:
    for n in (33, 97):
        x = [torch.eye(n, dtype=dtype)[i] for i in range(n)]
        g = torch.arange(1, n + 1).to(dtype)
        assert run([g], x, device)[:, 0].tolist() == g.tolist()


def test_exact_on_integers(fast_backend: str, device: str) -> None:
    # sums below 2^53 of whole numbers are exact, in whatever order: float32 sums would stop at 2^24
    for n in (97, 20_000, 65_537):
        g = torch.randint(-2047, 2048, (n,), generator=torch.Generator().manual_seed(n)).float()
        x = [g + 1, torch.ones(n), g.flip(0)]
        want = [int((g.long() * t.long()).sum()) for t in x]
        assert run([g], x, device)[:, 0].tolist() == want


@pytest.mark.parametrize("n", [97, 2000])
def test_adversarial(backend: str, device: str, n: int) -> None:
    cases = [
        (noise(n, seed=0) + 1e4, noise(n, seed=1) + 1e4),  # a large mean
        (torch.ones(n), noise(n, seed=1, dtype=F64) + 1e8),
        (noise(n, seed=0, dtype=F64) * 1e-150, noise(n, seed=1, dtype=F64) * 1e-150),
        (noise(n, seed=0, dtype=F64) * 1e150, noise(n, seed=1, dtype=F64) * 1e150),
        (noise(n, seed=0) * 1e-38, noise(n, seed=1) * 1e-44),  # subnormal; their products are none in float64
        (noise(n, seed=0) * 5e37, noise(n, seed=1) * 1e37),  # products beyond float32
        (torch.logspace(-30, 30, n), torch.logspace(30, -30, n) * noise(n, seed=1).sign()),
        (torch.full((n,), 65504.0, dtype=F16), torch.full((n,), 6e-8, dtype=F16)),
    ]
    a, b = noise(n, seed=0), noise(n, seed=1)
    cases.append((torch.cat([a, a]), torch.cat([b, -b])))  # all of it cancels
    cases.append((torch.cat([a, a, b]), torch.cat([b * 2**20, b * -(2**20), b])))
    for g, x in cases:
        check([g], [x, g], device)


def test_nothing_is_lost_beside_something_large(backend: str, device: str) -> None:
    g = torch.ones(600)
    x = torch.full((600,), 2.0**-20)
    x[0], x[599] = 2.0**24, -(2.0**24)
    assert run([g], [x], device).item() == 598 * 2.0**-20


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_own_sum(backend: str, device: str, value: float) -> None:
    g, x = [noise(97, seed=j) for j in range(3)], [noise(97, seed=9 + j) for j in range(6)]
    x[4][96] = value
    got = run(g, x, device)
    assert torch.isfinite(got).tolist() == [[True, True, True], [True, False, True]]
    g[0][3] = value
    assert torch.isfinite(run(g, x, device)).tolist() == [[False, True, True], [False, False, True]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided(backend: str, device: str, dtype: torch.dtype) -> None:
    base = noise(12, 10, 8, 6, seed=0, dtype=dtype)
    picks = [base[:6, ::2, 1:5, :3], base.transpose(0, 2)[:6, :5, :4, :3]]
    picks += [base.flip(0).permute(1, 3, 0, 2)[:6, :5, :4, 1:7:2], base[:1, :1, :4, :1].expand(6, 5, 4, 3)]
    picks += [base[0, 0, 0, 0].expand(6, 5, 4, 3), base[:6, :5, :4, :3].to(memory_format=torch.channels_last)]
    assert not any(p.is_contiguous() for p in picks)
    for g in picks:
        got = check([g], picks, device)
        if backend != "torch":  # whose dot product goes another way through a vector of stride 0
            assert torch.equal(got, run([g.contiguous()], [p.contiguous() for p in picks], device))


def test_same_tensors_on_both_sides(backend: str, device: str) -> None:
    g = [noise(130, seed=j) for j in range(3)]
    got = check(g, [*g, *g], device)
    assert torch.equal(got[0], got[1]) and got.gt(0).all()


def test_derivatives_by_the_weights_of_a_soup(backend: str, device: str) -> None:
    """d loss / d alpha of a linear model mixed from k, against autograd through the mixture."""
    k, shapes = 5, [(7, 12), (7,), (3, 7), (3,)]
    models = [[noise(*s, seed=10 * i + j, dtype=F64) for j, s in enumerate(shapes)] for i in range(k)]
    features, labels = noise(40, 12, seed=99, dtype=F64), torch.arange(40) % 3

    def loss(first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> Tensor:
        hidden = torch.tanh(features @ first.T + first_bias)
        return torch.nn.functional.cross_entropy(hidden @ second.T + second_bias, labels)

    alpha = torch.softmax(noise(k, len(shapes), seed=1, dtype=F64), 0)

    def mixed(alpha: Tensor) -> list[Tensor]:
        return [sum(alpha[i, j] * models[i][j] for i in range(k)) for j in range(len(shapes))]

    wanted = torch.func.grad(lambda a: loss(*mixed(a)))(alpha)
    gradient = torch.func.grad(lambda parts: loss(*parts))(tuple(mixed(alpha)))
    got = run(list(gradient), [t for m in models for t in m], device)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    one = torch.softmax(noise(k, seed=2, dtype=F64), 0)  # one weight per model: summed over the tensors
    wanted = torch.func.grad(lambda a: loss(*mixed(a[:, None].expand(-1, len(shapes)))))(one)
    gradient = torch.func.grad(lambda p: loss(*p))(tuple(mixed(one[:, None].expand(-1, len(shapes)))))
    got = run(list(gradient), [t for m in models for t in m], device).sum(1)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_order_of_the_list_changes_nothing(backend: str, device: str) -> None:
    sizes, order = [97, 0, 513, 1, 40], [3, 2, 0, 4, 1]
    g, x = [noise(n, seed=n) for n in sizes], [noise(n, seed=i + n) for i in range(3) for n in sizes]
    again = run([g[j] for j in order], [x[5 * i + j] for i in range(3) for j in order], device)
    assert torch.equal(again, run(g, x, device)[:, order])


def test_inputs_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    g = [noise(300 * j, seed=j, dtype=DTYPES[j]).to(device) for j in range(4)]
    x = [noise(300 * j, seed=i + j, dtype=DTYPES[(i + j) % 4]).to(device) for i in range(3) for j in range(4)]
    before = [t.clone() for t in (*g, *x)]
    first = multidot(g, x)
    assert torch.equal(multidot(g, x), first)
    assert all(torch.equal(a, b) for a, b in zip(before, (*g, *x), strict=True))


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    sizes = (200_000, 5, 70_000, 16_385)
    g, x = [noise(n, seed=n) for n in sizes], [noise(n, seed=n + 1 + i) for i in range(3) for n in sizes]
    results = []
    for n in (1, 2, 3, 4):
        threads(n)
        results.append(multidot(g, x))
    assert all(torch.equal(r, results[0]) for r in results)


def test_equal_for_every_emulator_schedule(emu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g, x = [noise(n, seed=n) for n in (300, 40)], [noise(n, seed=n + 1 + i) for i in range(3) for n in (300, 40)]
    want = multidot(g, x)
    for seed in range(4):
        monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
        assert torch.equal(multidot(g, x), want)


A, B = torch.ones(2, 3), torch.ones(4)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "multidot: 'g' must be a non-empty list of tensors, got Tensor", (A, [A])),
        (TypeError, "multidot: 'g' must be a non-empty list of tensors, got list", ([], [A])),
        (TypeError, "multidot: 'x' must be a non-empty list of tensors, got list", ([A], [])),
        (TypeError, r"'g\[1\]' must be a tensor, got int", ([A, 1], [A, B])),
        (TypeError, r"'x\[1\]' must be a tensor, got float", ([A, B], [A, 1.0])),
        (ValueError, "'x' must hold k tensors for each of 2 in 'g', got 3", ([A, B], [A, B, A])),
        (ValueError, "'x' must hold k tensors for each of 2 in 'g', got 1", ([A, B], [A])),
        (TypeError, r"'g\[1\]' must be float32, .* or bfloat16, got int64", ([A, B.long()], [A, B])),
        (TypeError, r"'x\[2\]' must be float32, .* or bfloat16, got bool", ([A, B], [A, B, A.bool(), B])),
        (RuntimeError, r"'g\[1\]' must be on cpu as the other arguments, got meta", ([A, B.to("meta")], [A, B])),
        (RuntimeError, r"'x\[0\]' must be on cpu as the other arguments, got meta", ([A, B], [A.to("meta"), B])),
        (
            ValueError,
            r"'x\[3\]' \(model 1, tensor 1\) must have the shape \[4\] of 'g', got \[2, 2\]",
            ([A, B], [A, B, A, B.reshape(2, 2)]),
        ),
    ],
)
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        multidot(*args)


def test_automatic_choice_serves_the_cpu() -> None:
    with zipfast.backend(None):
        assert multidot([A], [A, 2 * A]).tolist() == [[6.0], [12.0]]
