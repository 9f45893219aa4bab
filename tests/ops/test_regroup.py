# SPDX-License-Identifier: Apache-2.0
"""regroup: sums of members along an axis, in float64, in the order given: everything here is compared bitwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import zipfast
from zipfast.ops import regroup

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 31, 32, 33)


def ints(*values: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def doubles(*values: float, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def case(models: int, size: int, groups: int, seed: int, device: str = "cpu") -> tuple:
    """A random grouping of models·size features; the last group stays empty if there are at least two."""
    g = torch.Generator().manual_seed(seed)
    features = models * size
    label = torch.randint(0, max(groups - 1, 1), (features,), generator=g)
    order = torch.randperm(features, generator=g)
    order = order[label[order].sort(stable=True).indices]
    count = torch.bincount(label, minlength=groups) if features else torch.zeros(groups, dtype=torch.int64)
    start = torch.cat([ints(0), count.cumsum(0)])
    return order.to(device), start.to(device), count.clamp(min=1).double().to(device)


def definition(
    x: list, order: torch.Tensor, start: torch.Tensor, divisor: torch.Tensor | None, axis: int
) -> np.ndarray:
    """The docstring, member by member, in float64."""
    arrays = [np.moveaxis(t.detach().cpu().double().numpy(), axis, 0) for t in x]
    size = arrays[0].shape[0]
    out = np.zeros((len(start) - 1, *arrays[0].shape[1:]))
    for g in range(len(start) - 1):
        for p in range(int(start[g]), int(start[g + 1])):
            f = int(order[p])
            out[g] = out[g] + arrays[f // size][f % size]
        if divisor is not None:
            out[g] = out[g] / float(divisor[g])
    return np.moveaxis(out, 0, axis)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    return torch.equal(got.cpu().contiguous().view(word), want.cpu().contiguous().view(word))


def test_table(backend: str, device: str) -> None:
    w = [torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device), torch.tensor([[5.0, 6.0], [7.0, 8.0]], device=device)]
    order, start = ints(0, 2, 1, 3, device=device), ints(0, 2, 4, device=device)
    # merge rows: (row 0 of both) / 2, (row 1 of both) / 2
    got = regroup(w, order, start, doubles(2, 2, device=device), 0)
    assert got.tolist() == [[3.0, 4.0], [5.0, 6.0]]
    # merge columns, as sums
    assert regroup(w, order, start, None, 1).tolist() == [[6.0, 8.0], [10.0, 12.0]]
    # unmerge: one model, groups of one member and of two
    assert regroup(w[:1], ints(1, 0, 1, device=device), ints(0, 1, 3, device=device), None, 0).tolist() == [
        [3, 4],
        [4, 6],
    ]
    # a member may serve several groups, a group may be empty, the divisor is the caller's
    got = regroup(
        w, ints(3, 3, 0, device=device), ints(0, 1, 1, 3, device=device), doubles(4, 9, 0.5, device=device), 0
    )
    assert got.tolist() == [[1.75, 2.0], [0.0, 0.0], [16.0, 20.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_every_dtype_and_axis(backend: str, device: str, dtype: torch.dtype, models: int) -> None:
    g = torch.Generator().manual_seed(models)
    for shape in ((7,), (5, 6), (3, 5, 4), (2, 5, 3, 3)):
        x = [torch.randn(shape, generator=g).to(dtype).to(device) for _ in range(models)]
        for axis in range(len(shape)):
            order, start, divisor = case(models, shape[axis], 4, seed=axis, device=device)
            for d in (None, divisor):
                got = regroup(x, order, start, d, axis)
                assert got.device.type == device and got.is_contiguous()
                assert same_bits(got, regroup.reference(x, order, start, d, axis))
                # double -> float -> storage type is what torch's own conversion does, too
                assert same_bits(got, torch.from_numpy(definition(x, order, start, d, axis)).to(dtype))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inner", SIZES)
def test_sizes(backend: str, device: str, size: int, inner: int) -> None:
    for groups in (1, 2, 33):
        order, start, divisor = case(2, size, groups, seed=size, device=device)
        x = [torch.randn(2, size, inner, device=device) for _ in range(2)]
        got = regroup(x, order, start, divisor, 1)
        assert got.shape == (2, groups, inner)
        assert same_bits(got, torch.from_numpy(definition(x, order, start, divisor, 1)).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [2, 4, 8, 12, 24])
def test_wide_rows(backend: str, device: str, dtype: torch.dtype, inner: int) -> None:
    # 16 bytes at a time where `inner` is a multiple of them, unless a tensor begins inside of such a word; sizes on both
    # sides of 1000, from which on the emulator's indices have 64 bits
    for size, outer in ((5, 2), (40, 3)):
        order, start, divisor = case(2, size, 7, seed=inner, device=device)
        drawn = torch.randn(2, outer, size, inner, generator=torch.Generator().manual_seed(inner)).to(dtype)
        x = [t.clone() for t in drawn]
        want = torch.from_numpy(definition(x, order, start, divisor, 1)).to(dtype)
        assert same_bits(regroup([t.to(device) for t in x], order, start, divisor, 1), want)
        for moved in range(2):
            flat = [torch.cat([t.new_zeros(int(i == moved)), t.flatten()]).to(device) for i, t in enumerate(x)]
            views = [t[int(i == moved) :].view(outer, size, inner) for i, t in enumerate(flat)]
            assert same_bits(regroup(views, order, start, divisor, 1), want)


@pytest.mark.parametrize("size", [0, 3])
def test_no_groups(backend: str, device: str, size: int) -> None:
    x = [torch.randn(2, size, 4, device=device)]
    got = regroup(x, ints(device=device), ints(0, device=device), doubles(device=device), 1)
    assert got.shape == (2, 0, 4)


def test_no_outer_rows(backend: str, device: str) -> None:
    x = [torch.randn(0, 4, 3, device=device)]
    assert regroup(x, ints(0, 1, device=device), ints(0, 2, device=device), None, 1).shape == (0, 1, 3)


def test_empty_group_is_zero(backend: str, device: str) -> None:
    x = [torch.full((3, 2), torch.nan, device=device)]
    got = regroup(x, ints(1, device=device), ints(0, 0, 1, 1, device=device), doubles(1, 1, 3, device=device), 0)
    assert got[0].tolist() == got[2].tolist() == [0.0, 0.0]
    assert got[1].isnan().all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather_and_permutation(backend: str, device: str, axis: int) -> None:
    x = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0)).to(device)
    index = torch.randperm(x.shape[axis], generator=torch.Generator().manual_seed(1)).to(device)
    for order in (index, index[:3], index.repeat(3)):
        got = regroup([x], order, torch.arange(len(order) + 1, device=device), None, axis)
        assert same_bits(got, x.index_select(axis, order))


def test_unmerge_after_merge_gives_back_what_was_equal(backend: str, device: str) -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).to(device)
    order, start = ints(0, 4, 1, 5, 2, 6, 3, 7, device=device), ints(0, 2, 4, 6, 8, device=device)
    divisor = doubles(2, 2, 2, 2, device=device)
    assert same_bits(regroup([x, x], order, start, divisor, 0), x)


def test_strided(backend: str, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(12, 10, 8, generator=g).to(device)
    order, start, divisor = case(2, 5, 4, seed=3, device=device)
    wide = torch.stack([order, order], 1)[:, 0], torch.stack([start, start], 1)[:, 0]
    for pick in (
        lambda t: t[:6, ::2, 1:5],
        lambda t: t.transpose(0, 2)[:, :5],
        lambda t: t.flip(0).permute(1, 0, 2)[:, 3:8],
        lambda t: t[:1, :1, :4].expand(3, 5, 4),
    ):
        x = [pick(base), pick(base * 2)]
        want = regroup([t.contiguous() for t in x], order, start, divisor, 1)
        assert same_bits(regroup(x, *wide, torch.stack([divisor, divisor], 1)[:, 1], 1), want)


def test_channels_last(backend: str, device: str) -> None:
    x = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    order, start, divisor = case(1, 5, 3, seed=3, device=device)
    want = regroup([x], order, start, divisor, 1)
    assert same_bits(regroup([x.to(memory_format=torch.channels_last)], order, start, divisor, 1), want)


def test_special_values(backend: str, device: str) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([1e-45, -1e-45, 3.4e38, 3.4e38, inf, -inf, nan, -0.0], device=device)
    start = ints(0, 2, 4, 6, 8, 9, device=device)
    got = regroup([x], ints(0, 1, 2, 3, 4, 5, 6, 0, 0, device=device), start, doubles(1, 2, 1, 1, 1, device=device), 0)
    assert got[0] == 0 and got[1] == x[2] and got[2].isnan() and got[3].isnan() and got[4] == x[0]
    for dtype, tiny, huge in ((torch.float16, 6e-8, 65504.0), (torch.bfloat16, 1e-40, 3.38e38)):
        x = torch.tensor([tiny, huge, huge], dtype=dtype, device=device)
        got = regroup([x, x], ints(0, 3, 1, 2, 1, 2, device=device), ints(0, 2, 4, 6, device=device), None, 0)
        assert got.tolist() == [2 * float(x[0]), torch.inf, torch.inf]
        half = doubles(2, 2, 2, device=device)
        got = regroup([x, x], ints(0, 3, 1, 2, 1, 2, device=device), ints(0, 2, 4, 6, device=device), half, 0)
        assert got.tolist() == x.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign_of_zero(backend: str, device: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-0.0, -0.0, -0.0, 0.0, 1.0], dtype=dtype, device=device)
    order, start = ints(0, 0, 1, 0, 1, 2, 0, 3, device=device), ints(0, 1, 3, 6, 8, 8, device=device)
    for divisor in (None, doubles(1, 2, 3, 2, 1, device=device)):
        want = regroup.reference([x], order, start, divisor, 0)
        assert same_bits(regroup([x], order, start, divisor, 0), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_survives(fast_backend: str, device: str, dtype: torch.dtype) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    got = regroup([x], torch.arange(1 << 16, device=device), torch.arange((1 << 16) + 1, device=device), None, 0)
    nan = x.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan], x[~nan])


def test_sums_in_the_order_given(backend: str, device: str) -> None:
    x = torch.tensor([1e16, 1.0, -1e16], dtype=torch.float64, device=device)
    start = ints(0, 3, 6, device=device)
    assert regroup([x], ints(0, 1, 2, 0, 2, 1, device=device), start, None, 0).tolist() == [0.0, 1.0]


def test_sums_wider_than_the_dtype(backend: str, device: str) -> None:
    x = torch.tensor([2048.0, 1.0, 1.0], dtype=torch.float16, device=device)
    assert regroup([x], ints(0, 1, 2, device=device), ints(0, 3, device=device), None, 0).tolist() == [2050.0]


@pytest.mark.parametrize("order", [[0, 4], [0, -1], [0, 1 << 40], [0, -(1 << 40)]])
def test_index_out_of_range(backend: str, device: str, order: list[int]) -> None:
    x = [torch.ones(2, 3, device=device), torch.ones(2, 3, device=device)]
    args = (x, ints(1, *order, 2, device=device), ints(0, 1, 3, 4, device=device), None, 0)
    if backend in ("emu", "cuda"):  # no host read: only that group is lost
        got = regroup(*args)
        assert got[1].isnan().all()
        assert got[0].tolist() == got[2].tolist() == [1.0, 1.0, 1.0]
    else:
        with pytest.raises(RuntimeError, match=r"'order' must be in \[0, 4\)" if backend == "cpu" else None):
            regroup(*args)


@pytest.mark.parametrize(
    ("start", "match"), [((1, 2), "from 0 to 2"), ((0, 1), "from 0 to 2"), ((0, 2, 1, 2), "ascend")]
)
def test_malformed_start(cpu_backend: str, start: tuple, match: str) -> None:
    with pytest.raises(RuntimeError, match=f"regroup: 'start' must .*{match}"):
        regroup([torch.ones(3)], ints(0, 1), ints(*start), None, 0)


def test_inputs_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    x = [torch.randn(4, 33, 5, device=device) for _ in range(3)]
    order, start, divisor = case(3, 33, 20, seed=0, device=device)
    before = [t.clone() for t in (*x, order, start, divisor)]
    first = regroup(x, order, start, divisor, 1)
    assert same_bits(regroup(x, order, start, divisor, 1), first)
    assert all(torch.equal(a, b) for a, b in zip(before, (*x, order, start, divisor), strict=True))
    assert all(first.data_ptr() != t.data_ptr() for t in x)


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    x = [torch.randn(64, 256, 9) for _ in range(2)]
    order, start, divisor = case(2, 256, 256, seed=0)
    results = []
    for n in (1, 2, 3, 4):
        threads(n)
        results.append(regroup(x, order, start, divisor, 1))
    assert all(same_bits(r, results[0]) for r in results)
    assert same_bits(results[0], regroup.reference(x, order, start, divisor, 1))


def test_equal_for_every_emulator_schedule(emu_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = [torch.randn(3, 33, 4) for _ in range(2)]
    order, start, divisor = case(2, 33, 40, seed=0)
    want = regroup.reference(x, order, start, divisor, 1)
    for seed in range(4):
        monkeypatch.setenv("CUDA_EMU_SEED", str(seed))
        assert same_bits(regroup(x, order, start, divisor, 1), want)


def test_random(backend: str, device: str) -> None:
    rng = np.random.default_rng(0)
    for trial in range(30):
        models, dtype = int(rng.integers(1, 5)), DTYPES[trial % 4]
        shape = [int(v) for v in rng.integers(1, 7, size=int(rng.integers(1, 5)))]
        axis = int(rng.integers(0, len(shape)))
        members, groups = int(rng.integers(0, 40)), int(rng.integers(1, 12))
        order = torch.from_numpy(rng.integers(0, models * shape[axis], members)).to(device)
        cuts = np.sort(rng.integers(0, members + 1, groups - 1))
        start = torch.from_numpy(np.concatenate([[0], cuts, [members]])).to(device)
        divisor = torch.from_numpy(rng.uniform(0.5, 4, groups)).to(device) if trial % 3 else None
        x = [torch.from_numpy(rng.standard_normal(shape)).to(dtype).to(device) for _ in range(models)]
        want = torch.from_numpy(definition(x, order, start, divisor, axis)).to(dtype)
        assert same_bits(regroup(x, order, start, divisor, axis), want), trial


X, ORDER, START, DIVISOR = torch.ones(2, 3), ints(0, 1), ints(0, 1, 2), doubles(1, 1)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "regroup: 'x' must be a non-empty list of tensors, got Tensor", (X, ORDER, START, None, 0)),
        (TypeError, "regroup: 'x' must be a non-empty list of tensors, got list", ([], ORDER, START, None, 0)),
        (TypeError, r"regroup: 'x\[1\]' must be a tensor, got int", ([X, 1], ORDER, START, None, 0)),
        (
            TypeError,
            "'x' must be float32, float64, float16 or bfloat16, got int64",
            ([X.long()], ORDER, START, None, 0),
        ),
        (
            TypeError,
            r"'x\[1\]' must be float32 as the first one, got float64",
            ([X, X.double()], ORDER, START, None, 0),
        ),
        (
            RuntimeError,
            r"'x\[1\]' must be on cpu as the other arguments, got meta",
            ([X, X.to("meta")], ORDER, START, None, 0),
        ),
        (
            ValueError,
            r"'x\[1\]' must have the shape of x\[0\], \[2, 3\], got \[3, 2\]",
            ([X, X.T], ORDER, START, None, 0),
        ),
        (ValueError, r"'axis' must be in \[0, 2\), got 2", ([X], ORDER, START, None, 2)),
        (ValueError, r"'axis' must be in \[0, 2\), got -1", ([X], ORDER, START, None, -1)),
        (ValueError, r"'axis' must be in \[0, 0\), got 0", ([torch.tensor(1.0)], ORDER, START, None, 0)),
        (TypeError, "'order' must be int64, got int32", ([X], ORDER.int(), START, None, 0)),
        (TypeError, "'start' must be int64, got float32", ([X], ORDER, START.float(), None, 0)),
        (
            RuntimeError,
            "'order' must be on cpu as the other arguments, got meta",
            ([X], ORDER.to("meta"), START, None, 0),
        ),
        (
            RuntimeError,
            "'start' must be on cpu as the other arguments, got meta",
            ([X], ORDER, START.to("meta"), None, 0),
        ),
        (ValueError, r"'order' must have one axis, got shape \[1, 2\]", ([X], ORDER[None], START, None, 0)),
        (ValueError, r"'start' must have one axis, got shape \[\]", ([X], ORDER, START[0], None, 0)),
        (ValueError, r"'start' must be \[groups \+ 1\], got an empty tensor", ([X], ORDER, START[:0], None, 0)),
        (TypeError, "'divisor' must be float64, got float32", ([X], ORDER, START, DIVISOR.float(), 0)),
        (
            RuntimeError,
            "'divisor' must be on cpu as the other arguments, got meta",
            ([X], ORDER, START, DIVISOR.to("meta"), 0),
        ),
        (ValueError, r"'divisor' must be \[groups\] = \[2\], got \[1\]", ([X], ORDER, START, DIVISOR[:1], 0)),
    ],
)
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        regroup(*args)


def test_automatic_choice_serves_the_cpu() -> None:
    with zipfast.backend(None):
        assert regroup([X], ORDER, START, None, 0).tolist() == X.tolist()
