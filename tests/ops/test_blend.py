# SPDX-License-Identifier: Apache-2.0
"""blend_: weighted sums over models, rounded term by term: everything here is compared bitwise, NaN payloads aside."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from zipfast.ops import blend_
from zipfast.ops.blend import FINITE

F32, F64, F16, BF16 = DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 511, 512, 513)  # 4, 8: 16 bytes; 512: a block of the C++ kernel
PIECES = (1023, 1024, 1025, 2053)  # 1024: a block of the emulator
LARGE = (65535, 65536, 65537)  # 65536: a piece of the C++ kernel; 4096, of a CUDA block, divides it
TENSORS, POINTERS = 256, 1536  # of one CUDA launch
INF, NAN = torch.inf, torch.nan


def noise(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def weights(k: int, count: int, seed: int = 0) -> Tensor:
    return noise(k, count, seed=1000 + seed, dtype=F64)


def run(dtypes: list[torch.dtype], x: list[Tensor], weight: Tensor, device: str) -> tuple[list[Tensor], Tensor]:
    """(out, bad) of a call on fresh outputs, full of what must not remain; back on the CPU."""
    out = [torch.full(t.shape, 77.0, dtype=d, device=device) for t, d in zip(x, dtypes)]
    bad = torch.full((len(x) // len(dtypes) + 1, len(dtypes)), FINITE, device=device)
    assert blend_(out, bad, [t.to(device) for t in x], weight.to(device)) is None
    return [t.cpu() for t in out], bad.cpu()


def definition(dtype: torch.dtype, x: list[Tensor], weight: list[float]) -> tuple[Tensor, list[int]]:
    """The docstring for one tensor: a loop of rounded products; what is not finite, input by input, and last the sum."""
    kind = np.float64 if F64 in (dtype, *(t.dtype for t in x)) else np.float32
    rows = [t.detach().cpu().double().numpy().astype(kind) for t in x]
    with np.errstate(all="ignore"):
        total = rows[0] * kind(weight[0])
        for row, w in zip(rows[1:], weight[1:]):
            total = total + row * kind(w)
    out = torch.from_numpy(np.asarray(total, kind)).to(dtype)
    finite = [np.isfinite(row).reshape(-1) for row in rows]
    overflow = np.logical_and.reduce(finite) & ~out.isfinite().reshape(-1).numpy()
    wrong = [~f for f in finite] + [overflow]
    return out, [int(w.argmax()) if w.any() else FINITE for w in wrong]


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Equal to the bit; which NaN it is differs between machines."""
    assert got.shape == want.shape and got.dtype == want.dtype
    got, want = got.cpu().reshape(-1), want.cpu().reshape(-1)
    nan, word = want.isnan(), {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    return torch.equal(got.isnan(), nan) and torch.equal(got[~nan].view(word), want[~nan].view(word))


def check(dtypes: list[torch.dtype], x: list[Tensor], weight: Tensor, device: str) -> tuple[list[Tensor], Tensor]:
    """One call against the definition, tensor by tensor."""
    out, bad = run(dtypes, x, weight, device)
    for j, dtype in enumerate(dtypes):
        want, wrong = definition(dtype, x[j :: len(dtypes)], weight[:, j].tolist())
        assert same_bits(out[j], want), f"tensor {j}: {dtype} of {tuple(want.shape)}"
        assert bad[:, j].tolist() == wrong, f"bad of tensor {j}"
    return out, bad


def test_table(backend: str, device: str) -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    x = [a, torch.tensor(8.0), b, torch.tensor(2.0)]
    weight = torch.tensor([[0.5, 1.0], [0.25, -1.5]], dtype=F64)  # per model and tensor
    (matrix, scalar), bad = check([F32, F16], x, weight, device)
    assert matrix.tolist() == [[3.0, 6.0], [9.0, 12.0]]
    assert scalar.item() == 5.0 and scalar.dtype == F16
    assert bad.tolist() == [[FINITE, FINITE]] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_mixes(backend: str, device: str, dtype: torch.dtype) -> None:
    mixes = list(itertools.product(DTYPES, repeat=3))
    x = [noise(99, seed=7 * j + i, dtype=mix[i]) for i in range(3) for j, mix in enumerate(mixes)]
    check([dtype] * len(mixes), x, weights(3, len(mixes)), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 72])
def test_sizes(backend: str, device: str, dtype: torch.dtype, k: int) -> None:
    x = [noise(n, seed=31 * i + n, dtype=dtype) for i in range(k) for n in SIZES]
    check([dtype] * len(SIZES), x, weights(k, len(SIZES)), device)
    for j in range(len(SIZES)) if k == 2 else ():
        check([dtype], x[j :: len(SIZES)], weights(k, 1), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 4, 5, 9])
def test_several_pieces(backend: str, device: str, dtype: torch.dtype, k: int) -> None:
    x = [noise(n, seed=31 * i + n, dtype=dtype) for i in range(k) for n in PIECES]
    x[2][1024], x[3][2050] = NAN, INF  # behind whole groups, and in a ragged one
    check([dtype] * 4, x, weights(k, 4), device)
    check([F64 if dtype == F32 else F32] * 4, [*x[:-4], *(t.to(BF16) for t in x[-4:])], weights(k, 4), device)


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_misaligned(backend: str, device: str, dtype: torch.dtype | None, offset: int) -> None:
    # views that begin inside a 16-byte word, as the tensors of a flat buffer do; None: dtypes mixed.  Beside them lies
    # what must not be touched.
    n, k = 1100, 5
    kinds = [dtype or DTYPES[i % 4] for i in range(k)]
    data = [noise(n, seed=i, dtype=kind) for i, kind in enumerate(kinds)]
    data[3][n - 1] = NAN
    weight = weights(k, 1)
    want, wrong = definition(kinds[0], data, weight[:, 0].tolist())
    for moved in (0, k - 1, k):  # one input, the last one, or the output alone
        x = [torch.full((n + 16,), 5.0, dtype=d, device=device)[(o := offset * (i == moved)) : o + n]
             for i, d in enumerate(kinds)]  # fmt: skip
        for view, value in zip(x, data):
            view.copy_(value)
        whole = torch.full((n + 16,), 7.0, dtype=kinds[0], device=device)
        at = offset if moved == k else 8
        bad = torch.full((k + 1, 1), FINITE, device=device)
        blend_([whole[at : at + n]], bad, x, weight.to(device))
        assert same_bits(whole[at : at + n], want) and bad[:, 0].tolist() == wrong
        assert whole[:at].eq(7).all() and whole[at + n :].eq(7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_sizes(fast_backend: str, device: str, dtype: torch.dtype) -> None:
    x = [noise(n, seed=i, dtype=dtype if i else F32) for i in range(3) for n in LARGE]
    x[4][65535], x[8][65536] = NAN, INF  # the last piece, and the last element of all
    check([dtype] * 3, x, weights(3, 3), device)


@pytest.mark.parametrize(("k", "count"), [(2, TENSORS), (2, TENSORS + 1), (3, 600), (6, TENSORS), (7, 300), (72, 45)])
def test_more_than_one_launch(backend: str, device: str, k: int, count: int) -> None:
    sizes = [(0, 3, 97, 1, 200)[j % 5] for j in range(count)]
    pool = noise(5000, seed=0)
    x = [pool[11 * i + j : 11 * i + j + n] for i in range(k) for j, n in enumerate(sizes)]
    x[-2] = torch.full_like(x[-2], NAN)
    check([(F32, BF16)[j % 7 == 3] for j in range(count)], x, weights(k, count), device)


def test_more_models_than_a_launch_holds(backend: str, device: str) -> None:
    check([F32], [noise(5, seed=i) for i in range(POINTERS)], weights(POINTERS, 1), device)
    args = [F32], [torch.ones(2)] * (POINTERS + 1), weights(POINTERS + 1, 1), device
    if backend in ("emu", "cuda"):
        with pytest.raises(RuntimeError, match="blend_: at most 1536 models, got 1537"):
            run(*args)
    else:
        check(*args)


def test_products_are_rounded_before_they_are_added(backend: str, device: str) -> None:
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24 rounds to 1 + 2^-11: a fused multiply-add would leave 2^-24
    a, b = 1 + 2.0**-12, 1 + 2.0**-11
    for dtype, n in itertools.product((F32, BF16), (1, 40)):
        out, _ = check(
            [dtype], [torch.full((n,), b), torch.full((n,), a)], torch.tensor([[-1.0], [a]]).double(), device
        )
        assert out[0].tolist() == [0.0] * n
    # models are added in order, and a weight is rounded to float32 before it multiplies
    big = [torch.tensor([2.0**24]), torch.tensor([1.0]), torch.tensor([-(2.0**24)])]
    one = torch.ones(3, 1, dtype=F64)
    assert check([F32], big, one, device)[0][0].item() == 0.0
    assert check([F32], [big[0], big[2], big[1]], one, device)[0][0].item() == 1.0
    assert check([F64], big, one, device)[0][0].item() == 1.0
    third = torch.tensor([[1 / 3]], dtype=F64)
    for dtype, want in ((F32, float(np.float32(1 / 3))), (F64, 1 / 3)):
        assert check([dtype], [torch.ones(1)], third, device)[0][0].item() == want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(backend: str, device: str, dtype: torch.dtype) -> None:
    x = [noise(50, seed=i, dtype=dtype) for i in range(6)]
    x[1][7], x[4][9] = INF, NAN
    # zeros do not hide what is not finite; weights beyond float32 overflow it, those below vanish
    for w in ([0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1], [-1, -0.5, -0.0, 2, -3, 0], [1e300, 1, -1e300, 1e-300, 1, 1]):
        check([dtype, F32], x, torch.tensor(w, dtype=F64).reshape(3, 2), device)
    for strided in (weights(2, 3).T, weights(3, 1).expand(3, 2)):
        check([dtype] * 2, x, strided, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_output_is_its_own_input(backend: str, device: str, dtype: torch.dtype, place: int) -> None:
    sizes = (0, 1, 97, 513, 1500)
    x = [noise(n, seed=5 * i + n, dtype=dtype) for i in range(3) for n in sizes]
    for i, at, value in ((0, 700, NAN), (1, 512, INF), (2, 0, -INF), (place, 1400, NAN), (place, 3, INF)):
        x[i * 5 + 4][at] = value
    x[place * 5 + 2][3] = torch.finfo(dtype).max
    weight = weights(3, 5)
    weight[place, 2] = 3.0  # that one overflows, whichever way the others point
    held = [t.clone().to(device) for t in x]
    out = held[place * 5 : place * 5 + 5]
    bad = torch.full((4, 5), FINITE, device=device)
    blend_(out, bad, held, weight.to(device))
    for j in range(5):
        want, wrong = definition(dtype, x[j::5], weight[:, j].tolist())
        assert same_bits(out[j], want) and bad[:, j].tolist() == wrong
    assert bad[3, 2] == 3


def test_running_sum_is_one_call(backend: str, device: str) -> None:
    x = [noise(n, seed=i + n, dtype=(F32, F16, BF16)[i % 3]) for i in range(9) for n in (97, 600)]
    weight = weights(9, 2)
    whole, _ = run([F32] * 2, x, weight, device)
    x, weight = [t.to(device) for t in x], weight.to(device)
    total = [torch.empty(n, device=device) for n in (97, 600)]
    blend_(total, torch.full((2, 2), FINITE, device=device), x[:2], weight[:1])
    for i in range(1, 9, 2):
        own = torch.cat([torch.ones(1, 2, dtype=F64, device=device), weight[i : i + 2]])
        blend_(total, torch.full((4, 2), FINITE, device=device), [*total, *x[2 * i : 2 * i + 4]], own)
    assert all(same_bits(a, b) for a, b in zip(total, whole))


def test_running_sum_compiles() -> None:
    a, b, weight = noise(40, seed=0), noise(40, seed=1), weights(2, 1)
    own, bad = a.clone(), torch.full((3, 1), FINITE)
    torch._dynamo.reset()
    torch.compile(lambda a, bad, b: blend_([a], bad, [a, b], weight), fullgraph=True, backend="aot_eager")(own, bad, b)
    assert same_bits(own, definition(F32, [a, b], weight[:, 0].tolist())[0]) and (bad == FINITE).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(backend: str, device: str, dtype: torch.dtype) -> None:
    base = noise(12, 10, 8, 6, seed=0, dtype=dtype)
    picks = [base[:6, ::2, 1:5, :3], base.transpose(0, 2)[:6, :5, :4, :3]]
    picks += [base.flip(0).permute(1, 3, 0, 2)[:6, :5, :4, 1:7:2], base[:1, :1, :4, :1].expand(6, 5, 4, 3)]
    picks += [base[0, 0, 0, 0].expand(6, 5, 4, 3), base[:6, :5, :4, :3].to(memory_format=torch.channels_last)]
    assert not any(p.is_contiguous() for p in picks)
    check([dtype, F32], picks, weights(3, 2), device)
    picks[1][2, 3, 1, 0] = NAN  # the index is that of the tensor as it reads, not as it lies
    _, bad = check([dtype, F32], picks, weights(3, 2), device)
    assert bad[0, 1] == ((2 * 5 + 3) * 4 + 1) * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 33, 97, 513, 1100])
def test_what_is_not_finite(backend: str, device: str, dtype: torch.dtype, size: int) -> None:
    rng = np.random.default_rng(size)
    for trial in range(12):
        x = [noise(size, seed=i, dtype=(dtype, F32)[i % 2]) for i in range(3)]
        for _ in range(rng.integers(0, 5)):
            x[rng.integers(0, 3)][rng.integers(0, size)] = (NAN, INF, -INF)[rng.integers(0, 3)]
        if trial % 2:
            x[trial % 3][size // 2] = torch.finfo(x[trial % 3].dtype).max
        check([(F32, dtype)[trial % 3 == 0]], x, weights(3, 1, seed=trial), device)
    x = [torch.full((size,), INF, dtype=dtype), torch.full((size,), -INF), torch.zeros(size)]
    out, bad = check([dtype], x, torch.ones(3, 1, dtype=F64), device)
    assert out[0].isnan().all() and bad[:, 0].tolist() == [0, 0, FINITE, FINITE]


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_overflow(backend: str, device: str, dtype: torch.dtype) -> None:
    high = float(torch.finfo(dtype).max)
    a, b = torch.zeros(900, dtype=F64), torch.zeros(900, dtype=F64)
    a[[100, 600]] = b[[100, 600]] = high
    weight = torch.ones(2, 1, dtype=F64)
    for kind in (dtype, F64):
        out, bad = check([dtype], [a.to(kind), b.to(kind)], weight, device)
        assert out[0][100] == out[0][600] == INF and bad[:, 0].tolist() == [FINITE, FINITE, 100]
    _, bad = check([dtype], [a.to(dtype), -b.to(dtype)], weight, device)
    assert (bad == FINITE).all()
    if dtype == F16:  # wider outputs hold it
        assert (check([F32], [a.to(dtype), b.to(dtype)], weight, device)[1] == FINITE).all()
    # an element whose own input is not finite is that input's, and hides no other
    a, b = a.to(dtype), b.to(dtype)
    a[3], b[100] = NAN, INF
    assert check([dtype], [a, b], weight, device)[1][:, 0].tolist() == [3, 100, 600]
    b[600] = NAN
    assert check([dtype], [a, b], weight, device)[1][:, 0].tolist() == [3, 100, FINITE]


def test_bad_is_only_lowered(backend: str, device: str) -> None:
    x = [torch.zeros(700, device=device) for _ in range(4)]
    x[0][600] = x[2][40] = x[3][7] = INF
    x[1][5] = x[3][5] = 3e38
    bad = torch.tensor([[3, FINITE], [50, 7], [2, 6]], device=device)
    out = [torch.empty(700, device=device) for _ in range(2)]
    weight = torch.ones(2, 2, dtype=F64, device=device)
    blend_(out, bad, x, weight)
    assert bad.tolist() == [[3, FINITE], [40, 7], [2, 5]]
    blend_(out, bad, [torch.zeros_like(t) for t in x], weight)  # clean data raises nothing back
    assert bad.tolist() == [[3, FINITE], [40, 7], [2, 5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_subnormals(backend: str, device: str, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal * 0.5
    least = {F32: 2.0**-149, F64: 2.0**-1074, F16: 2.0**-24, BF16: 2.0**-133}[dtype]
    values = [0.0, -0.0, tiny, -tiny, least, -least, 3 * least, 1.0, -1.0, 2 * tiny]
    x = [torch.tensor(v, dtype=dtype) for v in zip(*itertools.product(values, repeat=2))]
    for w in ([1, 1], [-1, 1], [0.5, 0.5], [0, 1], [-0.0, 1], [-0.0, -0.0], [0.25, -0.75]):
        check([dtype, F32], [x[0], x[0], x[1], x[1]], torch.tensor(w, dtype=F64)[:, None].expand(2, 2), device)
    alone, _ = check([dtype], [torch.tensor([-0.0, 0.0], dtype=dtype)], torch.ones(1, 1, dtype=F64), device)
    assert alone[0].signbit().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_every_half_value(fast_backend: str, device: str, dtype: torch.dtype) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    out, _ = check([dtype], [x], torch.ones(1, 1, dtype=F64), device)
    nan = x.isnan()
    assert torch.equal(out[0].isnan(), nan) and torch.equal(out[0][~nan], x[~nan])
    # half way between neighbours: ties go to even, and beyond the largest to infinity
    check([dtype], [x, x.roll(-1)], torch.full((2, 1), 0.5, dtype=F64), device)
    check([dtype], [x, x.roll(-1)], torch.tensor([[1.5], [-0.5]], dtype=F64), device)


def test_random(backend: str, device: str) -> None:
    rng = np.random.default_rng(0)
    for trial in range(40):
        k, count = int(rng.integers(1, 6)), int(rng.integers(1, 6))
        shapes = [tuple(rng.integers(0, 9, rng.integers(0, 4))) for _ in range(count)]
        mix = [DTYPES[d] for d in rng.integers(0, 4, (k + 1) * count)]
        scale = 10.0 ** rng.integers(-3, 4)
        x = [noise(*shapes[j % count], seed=trial + j, dtype=F64).mul(scale).to(d) for j, d in enumerate(mix[count:])]
        weight, order = weights(k, count, seed=trial), rng.permutation(count)
        out, _ = check(mix[:count], x, weight, device)
        turned = [x[i * count + j] for i in range(k) for j in order]
        again, _ = run([mix[j] for j in order], turned, weight[:, order], device)
        assert all(same_bits(a, out[j]) for a, j in zip(again, order))  # the order of the list changes nothing


def test_inputs_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    x = [noise(33 * (j + 1), seed=j, dtype=DTYPES[(i + j) % 4]).to(device) for i in range(4) for j in range(3)]
    weight = weights(4, 3).to(device)
    before = [t.clone() for t in (*x, weight)]
    first, again = (run([F32, F16, F64], x, weight, device)[0] for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip([*first, *before], [*again, *x, weight], strict=True))


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    x = [noise(n, seed=i, dtype=(F32, BF16)[i % 2]) for i in range(3) for n in (200_000, 5, 70_000)]
    for at in (199_999, 66_000, 131_072):
        x[3][at] = NAN
    x[6][[150_000, 70_000]] = 3e38
    results = []
    for n in (1, 2, 3, 4):
        threads(n)
        results.append(run([F32] * 3, x, 2 * torch.ones(3, 3, dtype=F64), "cpu"))
    assert results[0][1][:, 0].tolist() == [FINITE, 66_000, FINITE, 70_000]
    for out, bad in results[1:]:
        assert torch.equal(bad, results[0][1]) and all(same_bits(a, b) for a, b in zip(out, results[0][0]))


A, B, W = torch.ones(2, 3), torch.ones(4), torch.ones(2, 2, dtype=F64)
OUT, X, BENT, BAD = [A, B], [A, B, A, B], [A, B, A.T, B], torch.full((3, 2), FINITE)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "blend_: 'out' must be a non-empty list of tensors, got Tensor", (A, BAD, [A], W)),
        (TypeError, "blend_: 'x' must be a non-empty list of tensors, got list", ([A], BAD, [], W)),
        (TypeError, r"'out\[1\]' must be a tensor, got int", ([A, 1], BAD, X, W)),
        (TypeError, r"'x\[1\]' must be a tensor, got NoneType", (OUT, BAD, [A, None], W)),
        (ValueError, "'x' must hold k tensors for each of 2 in 'out', got 3", (OUT, BAD, X[:3], W)),
        (TypeError, r"'out\[0\]' must be float32, .* or bfloat16, got int64", ([A.long(), B], BAD, X, W)),
        (TypeError, r"'x\[3\]' must be float32, .* or bfloat16, got complex64", (OUT, BAD, [*X[:3], B.cfloat()], W)),
        (RuntimeError, r"'out\[1\]' must be on cpu as .*, got meta", ([A, B.to("meta")], BAD, X, W)),
        (RuntimeError, r"'x\[3\]' must be on cpu as .*, got meta", (OUT, BAD, [*X[:3], B.to("meta")], W)),
        (ValueError, r"'out\[0\]' must be contiguous, got strides \[1, 2\]", ([A.T.contiguous().T, B], BAD, X, W)),
        (ValueError, r"'out\[1\]' must be contiguous, got strides \[0\]", ([A, B[:1].expand(4)], BAD, X, W)),
        (ValueError, r"'x\[2\]' \(model 1, tensor 0\) .* \[2, 3\] of 'out', got \[3, 2\]", (OUT, BAD, BENT, W)),
        (TypeError, "'weight' must be float64, got float32", (OUT, BAD, X, W.float())),
        (TypeError, "'weight' must be a tensor, got list", (OUT, BAD, X, [1, 1])),
        (RuntimeError, "'weight' must be on cpu as .*, got meta", (OUT, BAD, X, W.to("meta"))),
        (ValueError, r"'weight' must be \[k, tensors\] = \[1, 2\], got \[2, 2\]", (OUT, BAD, [A, B], W)),
        (TypeError, "'bad' must be int64, got float32", (OUT, BAD.float(), X, W)),
        (RuntimeError, "'bad' must be on cpu as .*, got meta", (OUT, BAD.to("meta"), X, W)),
        (ValueError, r"'bad' must be \[k \+ 1, tensors\] = \[3, 2\], got \[2, 2\]", (OUT, BAD[:2], X, W)),
        (ValueError, r"'bad' must be contiguous, got strides \[1, 3\]", (OUT, BAD.T.contiguous().T, X, W)),
    ],
)
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        blend_(*args)
