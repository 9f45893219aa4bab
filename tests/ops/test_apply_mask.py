# SPDX-License-Identifier: Apache-2.0
"""apply_mask_: bits are moved or cleared, so that everything here is compared bitwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from zipfast.ops import apply_mask_

F32, F64, F16, BF16 = DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 2053)  # 1024: a block of the emulator
LARGE = (65535, 65536, 65537, 3_000_001)  # 65536: a piece of the C++ kernel; the call is large enough to be streamed
TENSORS = 256  # of one CUDA launch
NAN, INF = torch.nan, torch.inf
ALL = torch.zeros(0, dtype=torch.uint8)


def noise(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def alive(*shape: int, seed: int, density: float = 0.5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9000 + seed)) < density


def pack(keep: Tensor) -> Tensor:
    """The layout, by numpy: lowest bit first, padded with zeros to 64 bytes."""
    bits = np.packbits(keep.reshape(-1).numpy(), bitorder="little")
    out = np.zeros((keep.numel() + 511) // 512 * 64, np.uint8)
    out[: len(bits)] = bits
    return torch.from_numpy(out)


def words(t: Tensor) -> Tensor:
    """The bits of a tensor's elements."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]
    return t.detach().cpu().contiguous().reshape(-1).view(kind)


def check(out: list[Tensor], keep: list[Tensor | None], source: list[Tensor], device: str) -> list[Tensor]:
    """One call against the definition, bit by bit; None: all alive."""
    held = [t.clone().to(device) for t in out]
    mask = [(ALL if k is None else pack(k)).to(device) for k in keep]
    given = [t.to(device) for t in source]
    assert apply_mask_(held, mask, given) is None
    for j, got in enumerate(held):
        want = words(source[j] if source else out[j])
        if keep[j] is not None:
            want = torch.where(keep[j].reshape(-1), want, 0)
        assert torch.equal(words(got), want), f"tensor {j}: {got.dtype} of {tuple(got.shape)}"
    return held


def test_table(backend: str, device: str) -> None:
    out = [torch.tensor([[1.0, -2.0, NAN], [INF, -0.0, 6.0]]), torch.tensor(7.0)]
    keep = [torch.tensor([[True, False, False], [False, False, True]]), torch.tensor(False)]
    assert pack(keep[0]).tolist() == [0b100001] + [0] * 63
    (matrix, scalar), source = check(out, keep, [], device), [torch.arange(6.0).reshape(2, 3) + 1, torch.tensor(9.0)]
    assert matrix.tolist() == [[1, 0, 0], [0, 0, 6]] and scalar.item() == 0
    assert not matrix.signbit().any() and not scalar.signbit()
    (matrix, scalar) = check(out, [keep[0], None], source, device)
    assert matrix.tolist() == [[1, 0, 0], [0, 0, 6]] and scalar.item() == 9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.97, 1.0])
def test_sizes(backend: str, device: str, dtype: torch.dtype, density: float) -> None:
    out = [noise(n, seed=n, dtype=dtype) for n in SIZES]
    keep: list[Tensor | None] = [alive(n, seed=n, density=density) for n in SIZES]
    check(out, keep, [], device)
    check(out, keep, [noise(n, seed=100 + n, dtype=dtype) for n in SIZES], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(fast_backend: str, device: str, dtype: torch.dtype) -> None:
    out = [noise(n, seed=n, dtype=dtype) for n in LARGE]
    keep: list[Tensor | None] = [alive(n, seed=n, density=0.3) for n in LARGE]
    check(out, keep, [], device)
    check(out, keep, [t.flip(0) for t in out], device)
    check(out, [None, *keep[1:]], out, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_keeps_its_bits(backend: str, device: str, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, NAN, INF, -INF, 1e-41, -1e-7], dtype=F64).to(dtype).repeat(20)
    keep: list[Tensor | None] = [torch.arange(140) % 3 == 0]
    check([values], keep, [], device)
    check([torch.ones(140, dtype=dtype)], keep, [values], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dead_and_living_groups(backend: str, device: str, dtype: torch.dtype) -> None:
    # of 2, 4 and 8 elements: bytes of the mask that are 0, full, half full and anything
    byte = torch.arange(256).repeat(5)[:, None] >> torch.arange(8) & 1
    keep: list[Tensor | None] = [byte.bool().reshape(-1)[: 10240 - 3]]
    value = noise(10240 - 3, seed=0, dtype=dtype)
    check([value], keep, [], device)
    check([torch.full_like(value, NAN)], keep, [value], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_unaligned_pieces(backend: str, device: str, dtype: torch.dtype, offset: int) -> None:
    n = 1100
    keep, value = alive(n, seed=2, density=0.8), noise(n, seed=1, dtype=dtype)
    for at, of in ((offset, 8), (8, offset), (offset, offset)):
        whole = torch.full((n + 16,), 5.0, dtype=dtype, device=device)
        source = torch.cat([value.new_zeros(of), value]).to(device)[of:]
        apply_mask_([whole[at : at + n]], [pack(keep).to(device)], [source])
        assert torch.equal(whole[at : at + n].cpu(), torch.where(keep, value, 0.0))
        assert whole[:at].eq(5).all() and whole[at + n :].eq(5).all()


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned(backend: str, device: str, offset: int) -> None:
    # a view that begins inside a 16-byte word, as the tensors of a flat buffer do
    base, source = torch.ones(300, device=device), noise(300, seed=1).to(device)
    keep = alive(200, seed=2)
    mask = torch.cat([torch.zeros(offset, dtype=torch.uint8), pack(keep)])[offset:].to(device)
    apply_mask_([base[offset : offset + 200]], [mask], [source[3:203]])
    want = torch.ones(300)
    want[offset : offset + 200] = torch.where(keep, source[3:203].cpu(), 0.0)
    assert torch.equal(base.cpu(), want)
    apply_mask_([base[offset : offset + 200]], [pack(~keep).to(device)], [])
    want[offset : offset + 200] = 0
    assert torch.equal(base.cpu(), want)


def test_strided_source(backend: str, device: str) -> None:
    source = noise(9, 40, seed=0).T
    check([torch.ones(40, 9)], [alive(40, 9, seed=1)], [source], device)
    check([torch.ones(4, 5)], [None], [torch.arange(5.0).expand(4, 5)], device)


@pytest.mark.parametrize("count", [TENSORS, TENSORS + 1, 600])
def test_more_than_one_launch(backend: str, device: str, count: int) -> None:
    sizes = [(0, 3, 97, 1, 40)[j % 5] for j in range(count)]
    out = [noise(n, seed=j, dtype=DTYPES[j % 4]) for j, n in enumerate(sizes)]
    check(out, [None if j % 7 == 3 else alive(n, seed=j) for j, n in enumerate(sizes)], [], device)


def test_no_masks(backend: str, device: str) -> None:
    out, source = [torch.ones(5, device=device)], [noise(5, seed=0).to(device)]
    apply_mask_(out, [], [])
    assert out[0].tolist() == [1.0] * 5
    apply_mask_(out, [], source)
    assert torch.equal(out[0], source[0])


def test_arguments_unchanged_and_idempotent(backend: str, device: str) -> None:
    source, mask = [noise(700, seed=0).to(device)], [pack(alive(700, seed=0)).to(device)]
    before = [t.clone() for t in (*source, *mask)]
    out = [torch.empty(700, device=device)]
    apply_mask_(out, mask, source)
    assert all(torch.equal(a, b) for a, b in zip(before, [*source, *mask]))
    once = out[0].clone()
    apply_mask_(out, mask, [])
    assert torch.equal(once, out[0])


def test_parameters_that_require_gradients(backend: str, device: str) -> None:
    weight = torch.nn.Parameter(torch.ones(40, device=device))
    apply_mask_([weight], [pack(alive(40, seed=0)).to(device)], [])
    assert weight.requires_grad and weight.grad_fn is None and weight.sum() < 40


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    sizes = (200_000, 5, 2_500_000)
    source = [noise(n, seed=n) for n in sizes]
    for n in (1, 2, 3):
        threads(n)
        check([torch.ones(s) for s in sizes], [alive(s, seed=s) for s in sizes], source, "cpu")


A, B, M = torch.ones(2, 3), torch.ones(600), torch.zeros(64, dtype=torch.uint8)
N = torch.zeros(128, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "apply_mask_: 'out' must be a non-empty list of tensors, got Tensor", (A, [M], [])),
        (TypeError, r"'out\[1\]' must be a tensor, got int", ([A, 1], [M, N], [])),
        (TypeError, r"'out\[0\]' must be float32, .* or bfloat16, got int64", ([A.long()], [M], [])),
        (RuntimeError, r"'out\[1\]' must be on cpu as .*, got meta", ([A, B.to("meta")], [M, N], [])),
        (ValueError, r"'out\[0\]' must be contiguous, got strides \[1, 3\]", ([A.T], [M], [])),
        (TypeError, "'mask' must be a list of tensors, got Tensor", ([A], M, [])),
        (TypeError, r"'mask\[0\]' must be a tensor, got NoneType", ([A], [None], [])),
        (ValueError, "'mask' must hold one tensor for each of 2 in 'out', got 1", ([A, B], [M], [])),
        (TypeError, r"'mask\[0\]' must be uint8, got bool", ([A], [M.bool()], [])),
        (RuntimeError, r"'mask\[0\]' must be on cpu as .*, got meta", ([A], [M.to("meta")], [])),
        (ValueError, r"'mask\[1\]' must be \[64 ceil\(n / 512\)\] = \[128\], got \[64\]", ([A, B], [M, M], [])),
        (ValueError, r"'mask\[0\]' must be contiguous, got strides \[2\]", ([A], [N[::2]], [])),
        (TypeError, "'source' must be a list of tensors, got NoneType", ([A], [M], None)),
        (ValueError, "'source' must hold one tensor for each of 1 in 'out', got 2", ([A], [M], [A, A])),
        (TypeError, r"'source\[0\]' must be float32, got float64", ([A], [M], [A.double()])),
        (RuntimeError, r"'source\[0\]' must be on cpu as .*, got meta", ([A], [M], [A.to("meta")])),
        (ValueError, r"'source\[0\]' must be the shape of 'out' = \[2, 3\], got \[3, 2\]", ([A], [M], [A.T])),
    ],
)
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        apply_mask_(*args)
