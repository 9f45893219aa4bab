# SPDX-License-Identifier: Apache-2.0
"""More elements than 32 bits count (``-m large``, on a GPU), held against sums that are known beforehand.

Values are constant but for a few places, mostly at the end, and small enough for every sum to be exact: an index that
wraps around shows as a wrong number, and no second copy in float64 is needed.  The same checks run small on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gpu_cases
import pytest
import torch
from torch import Tensor

import zipfast
from zipfast import ops
from zipfast.ops._mask import mask_bytes

ELEMENTS = 2**31 + 4099  # odd: no vector width divides it
SMALL = 5003
NO_BAD_VALUE = torch.iinfo(torch.int64).max
HALF = torch.float16


@dataclass(frozen=True)
class Case:
    name: str
    check: Callable[[str, int], None]  # device, elements of the largest tensor
    gigabytes: int  # that ELEMENTS of them take on the device, what the check itself needs included


def moments_of(x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    size, device = x.shape[axis], x.device
    comoment = torch.zeros(size, size, dtype=torch.float64, device=device)
    total, shift = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))
    bad = torch.full((1,), NO_BAD_VALUE, device=device)
    ops.moments_([comoment], [total], [bad], [x], [shift], [axis], [0])
    return torch.triu(comoment), total, bad


def moments(shape: Callable[[int], tuple[int, ...]]) -> Callable[[str, int], None]:
    def check(device: str, n: int) -> None:
        channels = 32
        x = torch.empty(shape(n), dtype=HALF, device=device)
        assert x.numel() >= n and x.shape[1] == channels
        value = torch.arange(channels, device=device) % 4 / 4 + 0.25
        x[:] = value.to(HALF).view(-1, *[1] * (x.dim() - 2))
        x[-1] *= 2
        own = x[0, 0].numel()  # positions of one sample
        samples, last = x.shape[0] * own, own
        comoment, total, bad = moments_of(x, 1)
        v = value.double()
        assert torch.equal(total, v * (samples - last + 2 * last))
        assert torch.equal(comoment, torch.triu(torch.outer(v, v)) * (samples - last + 4 * last))
        assert int(bad) == NO_BAD_VALUE
        x.view(-1)[-1] = torch.nan
        assert int(moments_of(x, 1)[2]) == samples * channels - 1

    return check


def ones_in(mask: Tensor) -> int:
    return sum(int(((mask >> b) & 1).sum()) for b in range(8))


def bit(mask: Tensor, place: int) -> int:
    return int(mask[place >> 3]) >> (place & 7) & 1


def threshold(device: str, n: int) -> None:
    score = torch.full((n,), 2.0, dtype=HALF, device=device)
    small = [*range(5), *range(n // 2, n // 2 + 7), *range(n - 4, n - 1)]
    score[small] = -1.0
    score[-1] = torch.nan  # the largest of all
    (kept,), status = ops.threshold([score], [], [len(small) + 4], [0])
    assert status.tolist() == [n - 1, n]
    gone = [*small, *range(5, 9)]  # and of equal ones the first
    assert ones_in(kept) == n - len(gone) and not any(bit(kept, i) for i in gone)
    (rest,), status = ops.threshold([score], [kept], [n - len(gone) - 3], [0])
    assert status.tolist() == [n - 1, n - len(gone)]
    assert ones_in(rest) == 3 and all(bit(rest, i) for i in (n - 6, n - 5, n - 1))


def blend(device: str, n: int) -> None:
    out = torch.empty(n, dtype=HALF, device=device)
    first, second = (torch.full((n,), v, dtype=HALF, device=device) for v in (1.0, 4.0))
    first[n // 2 :] = 2.0
    second[-1] = torch.inf
    bad = torch.full((3, 1), NO_BAD_VALUE, device=device)
    weight = torch.tensor([[0.5], [0.25]], dtype=torch.float64, device=device)
    ops.blend_([out], bad, [first, second], weight)
    assert bool((out[: n // 2] == 1.5).all()) and bool((out[n // 2 : -1] == 2.0).all())
    assert float(out[-1]) == torch.inf and bad.view(-1).tolist() == [NO_BAD_VALUE, n - 1, NO_BAD_VALUE]


def apply_mask(device: str, n: int) -> None:
    out = torch.full((n,), 3.0, dtype=HALF, device=device)
    mask = torch.full((mask_bytes(n),), 0xAA, dtype=torch.uint8, device=device)
    ops.apply_mask_([out], [mask], [])
    assert bool((out[0::2] == 0).all()) and bool((out[1::2] == 3).all())
    source = torch.full((n,), 5.0, dtype=HALF, device=device)
    mask[-64:] = 0x55
    ops.apply_mask_([out], [mask], [source])
    turn = (len(mask) - 64) * 8
    assert bool((out[0:turn:2] == 0).all()) and bool((out[1:turn:2] == 5).all())
    assert bool((out[turn::2] == 5).all()) and bool((out[turn + 1 :: 2] == 0).all())


def multidot(device: str, n: int) -> None:
    g, x, y = (torch.full((n,), v, dtype=HALF, device=device) for v in (1.0, 0.5, 2.0))
    x[n // 2 :] = 0.25
    y[-1] = 7.0
    found = ops.multidot([g], [x, y])
    assert found.view(-1).tolist() == [0.5 * (n // 2) + 0.25 * (n - n // 2), 2.0 * (n - 1) + 7.0]


def regroup(axis: int) -> Callable[[str, int], None]:
    def check(device: str, n: int) -> None:
        inner = n // 3 + 1
        x = torch.empty((3, inner) if axis == 0 else (inner, 3), dtype=HALF, device=device)
        rows = x if axis == 0 else x.T
        rows[:] = torch.arange(1, 4, device=device)[:, None]
        rows[:, -1] *= 10
        order, start = torch.tensor([2, 0, 1], device=device), torch.arange(4, device=device)
        out = ops.regroup([x], order, start, None, axis)
        found = out if axis == 0 else out.T
        for row, value in zip(found, (3, 1, 2), strict=True):
            assert bool((row[:-1] == value).all()) and float(row[-1]) == 10 * value

    return check


CASES = [
    Case("moments, NCHW", moments(lambda n: (n // (32 * 49) + 1, 32, 7, 7)), 6),
    Case("moments, tokens", moments(lambda n: (n // 32 + 1, 32)), 6),
    Case("threshold", threshold, 8),
    Case("blend", blend, 16),
    Case("apply_mask", apply_mask, 12),
    Case("multidot", multidot, 14),
    Case("regroup, axis 0", regroup(0), 11),
    Case("regroup, axis 1", regroup(1), 11),
]


@pytest.fixture(params=CASES, ids=lambda c: c.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def _emptied() -> Iterator[None]:
    gpu_cases.need_gpu()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.usefixtures("_emptied")
def test_large(case: Case) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < case.gigabytes * 10**9:
        pytest.skip(f"{case.gigabytes} GB of GPU memory are needed, {free / 1e9:.1f} are free")
    with zipfast.backend("cuda"):
        case.check("cuda", ELEMENTS)
    used = torch.cuda.max_memory_allocated()
    assert used <= case.gigabytes * 10**9, f"the case needs {used / 1e9:.1f} GB, its row says {case.gigabytes}"


def test_the_same_small(case: Case, backend: str, device: str) -> None:
    case.check(device, SMALL)
