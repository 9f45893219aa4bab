# SPDX-License-Identifier: Apache-2.0
"""gram: inner products of differences in float64, held against exact sums of the rounded differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import zipfast
from zipfast.ops import gram

F32, F64, F16, BF16 = DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 3, 4, 5, 31, 32, 33, 255, 256, 257, 511, 512, 513)  # 4: 16 bytes; 256: a block of C++, a tile of CUDA
PIECES = (1023, 1024, 1025, 2053)  # 1024: a block of the emulator
LARGE = (65535, 65536, 65537)  # 65536: a piece of the C++ kernel; 4096, of a CUDA block, divides it
# Error of a sum, divided by the norms of its two rows; worst seen 9.9e-15: test_large_sizes, torch, 65537 elements.
TOLERANCE = 4e-14


def noise(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def run(x: list[Tensor], k: int, base: list[Tensor], device: str) -> Tensor:
    got = gram([t.to(device) for t in x], k, [t.to(device) for t in base])
    assert got.shape == (len(x) // k, k, k) and got.dtype == F64
    assert got.device.type == device and got.is_contiguous()
    return got.cpu()


def differences(own: list[Tensor], base: list[Tensor]) -> np.ndarray:
    """[k, elements]: x - base rounded once, to float32 or, where an input is float64, to float64."""
    kind = np.float64 if any(t.dtype == F64 for t in (*own, *base)) else np.float32
    rows = np.stack([t.detach().cpu().double().numpy().reshape(-1).astype(kind) for t in own])
    if base:
        rows = rows - base[0].detach().cpu().double().numpy().reshape(-1).astype(kind)
    return rows.astype(np.float64)


def check(x: list[Tensor], k: int, base: list[Tensor], device: str, exact: bool = True) -> Tensor:
    """One call against sums without rounding (``math.fsum``; without ``exact``, numpy's); symmetric to the bit."""
    got = run(x, k, base, device)
    assert torch.equal(got, got.mT)
    for j in range(len(got)):
        rows = differences(x[j :: len(got)], base[j : j + 1])
        norm = np.sqrt((rows * rows).sum(1))
        wanted = rows @ rows.T
        if exact:
            for a, b in itertools.combinations_with_replacement(range(k), 2):
                wanted[a, b] = wanted[b, a] = math.fsum(rows[a] * rows[b])
        error = np.abs(got[j].numpy() - wanted)
        assert (error <= TOLERANCE * np.outer(norm, norm)).all(), f"tensor {j}: {error.max():.2e}"
    return got


def test_table(backend: str, device: str) -> None:
    x = [torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor(3.0), torch.tensor([[1.0, 2.0], [-1.0, 5.0]])]
    x.append(torch.tensor(-1.0))
    assert check(x, 2, [], device).tolist() == [[[5.0, -1.0], [-1.0, 31.0]], [[9.0, -3.0], [-3.0, 1.0]]]
    base = [torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor(1.0)]
    assert check(x, 2, base, device).tolist() == [[[3.0, -7.0], [-7.0, 21.0]], [[4.0, -4.0], [-4.0, 4.0]]]


def test_norms_cosines_and_distances(backend: str, device: str) -> None:
    """Vectors at known angles, spread over two tensors: what users sum the result for."""
    base = [noise(2, 40, seed=0), noise(60, seed=1)]
    angle = torch.tensor([0.0, 90.0, 60.0, 180.0, 45.0], dtype=F64).deg2rad()
    length = torch.tensor([1.0, 2.0, 0.5, 3.0, 4.0], dtype=F64)
    frame = torch.linalg.qr(noise(140, 2, seed=2, dtype=F64)).Q.T
    vectors = length[:, None] * (torch.stack([angle.cos(), angle.sin()], 1) @ frame)
    x = [part for v in vectors for part in (base[0] + v[:80].reshape(2, 40), base[1] + v[80:])]
    total = check(x, 5, base, device).sum(0)
    norm = total.diagonal().sqrt()
    torch.testing.assert_close(norm, length, rtol=1e-12, atol=1e-12)
    cosine = total / torch.outer(norm, norm)
    torch.testing.assert_close(cosine, (angle[:, None] - angle).cos(), rtol=1e-12, atol=1e-12)
    distance = total.diagonal()[:, None] + total.diagonal() - 2 * total
    wanted = torch.cdist(vectors, vectors).square()
    torch.testing.assert_close(distance, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_dtype_mixes(backend: str, device: str, dtype: torch.dtype | None) -> None:
    mixes = list(itertools.product(DTYPES, repeat=2))
    x = [noise(101, seed=50 * i + j, dtype=mix[i % 2]) for i in range(3) for j, mix in enumerate(mixes)]
    base = [noise(101, seed=1000 + j, dtype=dtype) for j in range(len(mixes))] if dtype else []
    check(x, 3, base, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_sizes(backend: str, device: str, dtype: torch.dtype, k: int) -> None:
    x = [noise(n, seed=31 * i + n, dtype=(dtype, F32)[i % 2]) for i in range(k) for n in SIZES]
    base = [noise(n, seed=n + 7, dtype=dtype) for n in SIZES]
    for own in (base, []):
        got = check(x, k, own, device)
        assert got[0].eq(0).all()
        for j in range(len(SIZES)) if k == 2 else ():  # alone as in a list
            assert torch.equal(run(x[j :: len(SIZES)], k, own[j : j + 1], device)[0], got[j])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_sizes(fast_backend: str, device: str, dtype: torch.dtype) -> None:
    x = [noise(n, seed=i, dtype=(dtype, F32)[i % 2]) for i in range(3) for n in LARGE]
    check(x, 3, [noise(n, seed=n, dtype=dtype) for n in LARGE], device, exact=False)


@pytest.mark.parametrize("k", [3, 4, 7, 8, 9, 71, 72, 73, 79, 80, 81])
def test_many_models(backend: str, device: str, k: int) -> None:
    x = [noise(n, seed=i + n) for i in range(k) for n in (70, 0, 1)]
    got = check(x, k, [noise(n, seed=n) for n in (70, 0, 1)], device, exact=False)
    assert torch.linalg.eigvalsh(got[0]).min() > -1e-12 * got[0].trace()


@pytest.mark.parametrize("backend", ["emu", "cuda"], indirect=True)
@pytest.mark.parametrize("path", ["plain", "tensor"])
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("k", [1, 3, 8, 9, 16, 17, 32, 33, 70])  # 8, 16, 32: of the operands of a tensor core
def test_paths(backend: str, device: str, dtype: torch.dtype | None, k: int, path: str) -> None:
    sizes = (1, 15, 16, 17, 70, 1025) if k < 4 else (33, 150) if k < 17 else (1, 37)
    x = [noise(n, seed=i + n, dtype=dtype or DTYPES[i % 4]) for i in range(k) for n in sizes]
    for base in ([], [noise(n, seed=n, dtype=dtype or F32) for n in sizes]):
        got = gram([t.to(device) for t in x], k, [t.to(device) for t in base], path).cpu()
        with zipfast.backend("torch"):
            want = gram(x, k, base)
        norm = want.diagonal(dim1=1, dim2=2).sqrt()
        assert torch.equal(got, got.mT)
        assert ((got - want).abs() <= TOLERANCE * norm[:, :, None] * norm[:, None]).all()


@pytest.mark.parametrize("backend", ["emu", "cuda"], indirect=True)
@pytest.mark.parametrize("path", ["plain", "tensor"])
def test_paths_are_exact_on_integers(backend: str, device: str, path: str) -> None:
    for k, n in ((2, 1100), (13, 200), (40, 50)):
        whole = torch.randint(-2047, 2048, (k, n), generator=torch.Generator().manual_seed(n))
        x = [t.to(device) for t in whole.float()]
        assert torch.equal(gram(x, k, [], path)[0].cpu(), (whole @ whole.T).double())
        moved = whole - whole[1]
        assert torch.equal(gram(x, k, x[1:2], path)[0].cpu(), (moved @ moved.T).double())


@pytest.mark.parametrize("backend", ["emu", "cuda"], indirect=True)
def test_proof_of_the_path_of_tensor_cores(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gram.paths.prove(torch.device(device)) is None
    with zipfast.backend("torch"):  # whose results do not depend on the path: made to
        monkeypatch.setattr(gram, "reference", lambda x, k, base, path: torch.zeros(1) + (path == "tensor"))
        assert gram.paths.prove(torch.device("cpu")) == "path 'tensor' differs for 5 models"


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_misaligned(backend: str, device: str, offset: int) -> None:
    # the same bits, wherever tensors lie: shapes alone decide who adds what
    for dtype in (*DTYPES, None):
        data = [noise(700, seed=i, dtype=dtype or DTYPES[i % 4]).to(device) for i in range(4)]
        want = gram(data[:3], 3, data[3:])
        for moved in range(4):
            views = [torch.cat([t.new_zeros(offset), t])[offset:] if i == moved else t for i, t in enumerate(data)]
            got = gram(views[:3], 3, views[3:])
            if backend == "torch":
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(got, want)


def test_more_pieces_than_a_warp_adds_at_once(backend: str, device: str) -> None:
    n = 1024 * 32 * 8 + 1024 * 33 if backend != "torch" else 1000  # 32 lanes, eight pieces each
    x = torch.arange(n) % 1000
    few = torch.ones(1024)  # lies behind, as do the other pairs
    got = run([x.float(), few, 1 + x.float(), few], 2, [], device)
    square, mixed = (x * x).sum().item(), (x * (x + 1)).sum().item()
    assert got[0].tolist() == [[square, mixed], [mixed, ((x + 1) * (x + 1)).sum().item()]]
    assert got[1].tolist() == [[1024, 1024], [1024, 1024]]


def test_several_pieces(backend: str, device: str) -> None:
    for k, dtype in ((2, F32), (5, BF16)):
        x = [noise(n, seed=i + n, dtype=dtype) for i in range(k) for n in PIECES]
        check(x, k, [noise(n, seed=n) for n in PIECES], device, exact=False)


def test_most_models(backend: str, device: str) -> None:
    x = [noise(45, seed=i, dtype=DTYPES[i % 4]) for i in range(256)]
    check(x, 256, [], device, exact=False)
    check(x, 256, [noise(45, seed=1000)], device, exact=False)


@pytest.mark.parametrize(("k", "count"), [(2, 256), (2, 257), (7, 300), (72, 45), (256, 7)])
def test_more_than_one_launch(backend: str, device: str, k: int, count: int) -> None:
    sizes, pool = [(0, 3, 97, 1, 20)[j % 5] for j in range(count)], noise(5000, seed=0)
    x = [pool[11 * i + j : 11 * i + j + n] for i in range(k) for j, n in enumerate(sizes)]
    check(x, k, [pool[-n:] if n else pool[:0] for n in sizes] if k < 10 else [], device, exact=False)


def test_shapes(backend: str, device: str) -> None:
    shapes = [(), (1,), (1, 1, 1), (2, 3, 5, 7), (0,), (3, 0, 2), (33, 3)]
    x = [noise(*s, seed=i) for i in range(3) for s in shapes]
    check(x, 3, [noise(*s, seed=9) for s in shapes], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_position_counts_once(backend: str, device: str, dtype: torch.dtype) -> None:
    for n in (33, 97):
        got = run([torch.eye(n, dtype=dtype)[i] * (i + 1) for i in range(n)], n, [], device)
        assert torch.equal(got[0], torch.arange(1, n + 1).double().square().diag())


def test_exact_on_integers(fast_backend: str, device: str) -> None:
    # sums below 2^53 of whole numbers are exact, in whatever order: float32 sums would stop at 2^24
    for n in (97, 20_000, 65_537):
        whole = torch.randint(-2047, 2048, (3, n), generator=torch.Generator().manual_seed(n))
        assert torch.equal(run(list(whole.float()), 3, [], device)[0], (whole @ whole.T).double())
        moved = whole - whole[0]
        assert torch.equal(run(list(whole.float()), 3, [whole[0].float()], device)[0], (moved @ moved.T).double())


@pytest.mark.parametrize("n", [97, 700])
def test_adversarial(backend: str, device: str, n: int) -> None:
    a, b, c = (noise(n, seed=i) for i in range(3))
    check([a + 1e4, b + 1e4, c - 1e4], 3, [], device)  # a large mean
    check([a + 1e4, b + 1e4, c + 1e4], 3, [torch.full((n,), 1e4)], device)  # which the base takes away
    check([a + 1e-4 * b, a - 1e-4 * c, a], 3, [a], device)  # differences far below the values
    check([a.bfloat16(), (a + 0.01 * b).bfloat16(), c.half()], 3, [a], device)
    check([a * 1e-44, b * 5e37, c], 3, [], device)
    check([a * 1e-44, b * 1e-38, c * 1e-42], 3, [c * 1e-43], device)  # subnormal, differences too
    check([a.double() * 1e-150, b.double() * 1e150, c], 3, [], device)
    check([torch.cat([a, a]), torch.cat([b, -b]), torch.cat([c, c])], 3, [], device)  # all of it cancels
    got = check([a.double() + 1e-12, a.double(), a], 3, [a], device)  # a float64 input: differences in float64
    torch.testing.assert_close(got[0, 0, 0].item(), n * 1e-24, rtol=1e-3, atol=0)
    assert got[0, 1:].eq(0).all()


def test_differences_are_rounded_to_float32(backend: str, device: str) -> None:
    one, least = torch.ones(40), torch.full((40,), 2.0**-30)
    assert run([one], 1, [least], device).item() == 40.0
    assert run([one.double()], 1, [least], device).item() == 40 * (1 - 2.0**-30) ** 2
    assert run([one.half()], 1, [least.bfloat16()], device).item() == 40.0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_own_rows(backend: str, device: str, value: float) -> None:
    x = [noise(97, seed=j) for j in range(10)]  # 5 models of 2 tensors
    x[4][96] = value  # model 2, tensor 0
    got = run(x, 5, [], device)
    clean = torch.tensor([True, True, False, True, True])
    assert torch.equal(got[0].isfinite(), clean[:, None] & clean) and got[1].isfinite().all()
    assert not run(x, 5, [x[4], x[1]], device)[0].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided(backend: str, device: str, dtype: torch.dtype) -> None:
    base = noise(12, 10, 8, 6, seed=0, dtype=dtype)
    picks = [base[:6, ::2, 1:5, :3], base.transpose(0, 2)[:6, :5, :4, :3]]
    picks += [base.flip(0).permute(1, 3, 0, 2)[:6, :5, :4, 1:7:2], base[:1, :1, :4, :1].expand(6, 5, 4, 3)]
    picks += [base[0, 0, 0, 0].expand(6, 5, 4, 3), base[:6, :5, :4, :3].to(memory_format=torch.channels_last)]
    assert not any(p.is_contiguous() for p in picks)
    for own in ([], picks[1:2], picks[4:5]):
        want = run([p.contiguous() for p in picks], 6, [p.contiguous() for p in own], device)
        assert torch.equal(check(picks, 6, own, device), want)


def test_order_of_the_list_changes_nothing(backend: str, device: str) -> None:
    sizes, order = [97, 0, 513, 1, 40], [3, 2, 0, 4, 1]
    x, base = [noise(n, seed=i + n) for i in range(3) for n in sizes], [noise(n, seed=n + 9) for n in sizes]
    again = run([x[5 * i + j] for i in range(3) for j in order], 3, [base[j] for j in order], device)
    assert torch.equal(again, run(x, 3, base, device)[order])


def test_inputs_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    x = [noise(300 * j, seed=i + j, dtype=DTYPES[(i + j) % 4]).to(device) for i in range(3) for j in range(4)]
    base = [noise(300 * j, seed=j, dtype=DTYPES[j]).to(device) for j in range(4)]
    before = [t.clone() for t in (*x, *base)]
    first = gram(x, 3, base)
    assert torch.equal(gram(x, 3, base), first)
    assert all(torch.equal(a, b) for a, b in zip(before, (*x, *base), strict=True))


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    sizes = (200_000, 5, 70_000)
    x, base = [noise(n, seed=n + i) for i in range(5) for n in sizes], [noise(n, seed=n + 9) for n in sizes]
    results = []
    for n in (1, 2, 3, 4):
        threads(n)
        results.append(gram(x, 5, base))
    assert all(torch.equal(r, results[0]) for r in results)


def test_equal_for_every_emulator_schedule(emu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = [noise(n, seed=n + i) for i in range(7) for n in (300, 40)]
    want = gram(x, 7, x[:2])
    for seed in range(4):
        monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
        assert torch.equal(gram(x, 7, x[:2]), want)


A, B = torch.ones(2, 3), torch.ones(4)
RANGE = r"'models' must be in \[1, 256\] and divide the"


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "gram: 'x' must be a non-empty list of tensors, got Tensor", (A, 1, [])),
        (TypeError, "gram: 'x' must be a non-empty list of tensors, got list", ([], 1, [])),
        (TypeError, r"'x\[1\]' must be a tensor, got int", ([A, 1], 1, [])),
        (ValueError, RANGE + " 2 tensors of 'x', got 0", ([A, B], 0, [])),
        (ValueError, RANGE + " 2 tensors of 'x', got -1", ([A, B], -1, [])),
        (ValueError, RANGE + " 3 tensors of 'x', got 2", ([A, B, A], 2, [])),
        (ValueError, RANGE + " 257 tensors of 'x', got 257", ([B] * 257, 257, [])),
        (ValueError, "'base' must be empty or hold 2 tensors, got 1", ([A, B], 1, [A])),
        (TypeError, r"'x\[1\]' must be float32, .* or bfloat16, got int64", ([A, B.long()], 1, [])),
        (TypeError, r"'base\[0\]' must be float32, .* or bfloat16, got bool", ([A, A], 2, [A.bool()])),
        (TypeError, r"'base\[1\]' must be a tensor, got int", ([A, B], 1, [A, 1])),
        (RuntimeError, r"'x\[1\]' must be on cpu as the other arguments, got meta", ([A, A.to("meta")], 2, [])),
        (RuntimeError, r"'base\[0\]' must be on cpu as the other arguments, got meta", ([A, A], 2, [A.to("meta")])),
        (ValueError, r"'x\[3\]' must have the shape \[4\] of model 0, got \[2, 3\]", ([A, B, A, A], 2, [])),
        (ValueError, r"'base\[0\]' must have the shape \[2, 3\] of model 0, got \[3, 2\]", ([A, B], 1, [A.T, B])),
    ],
)
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        gram(*args)


def test_automatic_choice_serves_the_cpu() -> None:
    with zipfast.backend(None):
        assert gram([A, 2 * A], 2, [A]).tolist() == [[[0.0, 0.0], [0.0, 6.0]]]
