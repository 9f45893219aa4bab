# SPDX-License-Identifier: Apache-2.0
"""threshold: exactly k of smallest magnitude, ties by the lowest index: everything here is compared bitwise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from zipfast.ops import threshold
from zipfast.ops.threshold import FINITE

F32, F64, F16, BF16 = DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = (0, 1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1100)  # 512: what a warp of the emulator does; a block, two
EDGES = (7, 8, 9, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025)  # of eight, of a warp's step, of a block
INF, NAN = torch.inf, torch.nan


def noise(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def rounded(n: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    """Eight magnitudes, both signs."""
    levels = torch.randint(-8, 9, (n,), generator=torch.Generator().manual_seed(seed))
    return (levels / 8).to(dtype)


def coin(n: int, seed: int, alive: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).random(n) < alive


def packed(alive: np.ndarray) -> Tensor:
    """The format, from its words: bit i is byte i >> 3, bit i & 7, zeros up to 64·ceil(n / 512) bytes."""
    whole = np.zeros(512 * -(-alive.size // 512), bool)
    whole[: alive.size] = alive
    return torch.from_numpy(np.packbits(whole, bitorder="little"))


def unpacked(mask: Tensor, n: int) -> np.ndarray:
    bits = np.unpackbits(mask.cpu().numpy(), bitorder="little").astype(bool)
    assert mask.dtype == torch.uint8 and mask.shape == (64 * -(-n // 512),) and not bits[n:].any()
    return bits[:n]


def definition(
    score: list[Tensor], alive: list[np.ndarray], drop: list[int], group: list[int]
) -> tuple[list[np.ndarray], list[int]]:
    """The docstring, with numpy: rank the survivors of a group in one stable sort."""
    flat = [t.detach().cpu().reshape(-1).double().numpy() for t in score]
    kept = [a.copy() for a in alive]
    wrong = [np.isnan(f) & a for f, a in zip(flat, alive)]
    status = [int(w.argmax()) if w.any() else FINITE for w in wrong]
    for g, k in enumerate(drop):
        place = [(j, i) for j in range(len(score)) if group[j] == g for i in np.flatnonzero(alive[j])]
        value = np.array([abs(flat[j][i]) for j, i in place])
        for at in np.argsort(value, kind="stable")[:k]:
            kept[place[at][0]][place[at][1]] = False
        status.append(len(place))
    return kept, status


def run(
    score: list[Tensor], alive: list[np.ndarray] | None, drop: list[int], group: list[int], device: str
) -> tuple[list[np.ndarray], list[int]]:
    mask = [] if alive is None else [packed(a).to(device) for a in alive]
    kept, status = threshold([t.to(device) for t in score], mask, drop, group)
    assert status.shape == (len(score) + len(drop),) and status.dtype == torch.int64
    return [unpacked(k, t.numel()) for k, t in zip(kept, score, strict=True)], status.tolist()


def check(
    score: list[Tensor], alive: list[np.ndarray] | None, drop: list[int], group: list[int], device: str
) -> list[np.ndarray]:
    """One call against the definition."""
    kept, status = run(score, alive, drop, group, device)
    everything = [np.ones(t.numel(), bool) for t in score]
    want, wanted = definition(score, everything if alive is None else alive, drop, group)
    for j, (a, b) in enumerate(zip(kept, want)):
        assert np.array_equal(a, b), f"tensor {j}: {score[j].dtype} of {tuple(score[j].shape)}"
    assert status == wanted
    return kept


def test_table(backend: str, device: str) -> None:
    score = [torch.tensor([[3.0, -1.0], [1.0, -2.0]]), torch.tensor(-1.0), torch.tensor([0.5, -0.0, 0.0], dtype=F16)]
    rows = {
        0: ([1, 1, 1, 1], [1], [1, 1, 1]),
        1: ([1, 0, 1, 1], [1], [1, 0, 1]),  # of three ones the first, of two zeros the first
        2: ([1, 0, 0, 1], [1], [1, 0, 0]),
        3: ([1, 0, 0, 1], [0], [0, 0, 0]),
        4: ([1, 0, 0, 0], [0], [0, 0, 0]),
        5: ([0, 0, 0, 0], [0], [0, 0, 0]),
        9: ([0, 0, 0, 0], [0], [0, 0, 0]),
    }
    for k, want in rows.items():
        kept, status = run(score, None, [k, k], [0, 0, 1], device)
        assert tuple(k.astype(int).tolist() for k in kept) == want
        assert status == [FINITE, FINITE, FINITE, 5, 3]
    # the dead are not ranked, whatever they score
    alive = [np.array([1, 0, 1, 1], bool), np.array([1], bool), np.array([0, 1, 1], bool)]
    kept, status = run(score, alive, [1, 1], [0, 0, 1], device)
    assert [k.astype(int).tolist() for k in kept] == [[1, 0, 0, 1], [1], [0, 0, 1]]
    assert status[3:] == [4, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(backend: str, device: str, dtype: torch.dtype) -> None:
    score = [noise(n, seed=n, dtype=dtype) for n in SIZES]
    total = sum(SIZES)
    for k in (0, 1, total // 5, total - 1, total):
        check(score, None, [k], [0] * len(SIZES), device)
    drop = [n // 3 for n in SIZES]
    check(score, None, drop, list(range(len(SIZES))), device)  # each its own group
    check(score, [coin(n, n) for n in SIZES], drop, list(range(len(SIZES)))[::-1], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(backend: str, device: str, dtype: torch.dtype) -> None:
    score = [rounded(n, seed=n, dtype=dtype) for n in (70, 0, 700, 33, 1)]
    alive = [coin(t.numel(), 5 + j, 0.7) for j, t in enumerate(score)]
    for k in (1, 50, 99, 400, 803):
        check(score, None, [k, 3], [0, 0, 0, 1, 0], device)
        check(score, alive, [k], [0] * 5, device)
    same = [torch.full((n,), -0.25, dtype=dtype) for n in (600, 40)]
    kept = check(same, None, [599], [0, 0], device)
    assert np.flatnonzero(kept[0]).tolist() == [599] and kept[1].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_subnormals_and_infinities(backend: str, device: str, dtype: torch.dtype) -> None:
    least = {F32: 2.0**-149, F64: 2.0**-1074, F16: 2.0**-24, BF16: 2.0**-133}[dtype]
    info = torch.finfo(dtype)
    values = [0.0, least, 2 * least, 3 * least, info.smallest_normal / 2, info.smallest_normal, info.eps, 1.0, info.max]
    values = [v * s for v, s in itertools.product([*values, INF], (1, -1))]
    score = torch.tensor(values, dtype=dtype)[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    for k in range(len(values) + 1):
        check([score], None, [k], [0], device)


def test_float64_differs_below_float32(backend: str, device: str) -> None:
    base = 1 + torch.randperm(300, generator=torch.Generator().manual_seed(0)).double() * 2.0**-50
    assert base.float().unique().numel() == 1
    check([base[:120], -base[120:]], None, [77], [0, 0], device)
    check([base * 2.0**-1060], None, [150], [0], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan(backend: str, device: str, dtype: torch.dtype) -> None:
    score = [noise(n, seed=n, dtype=dtype) for n in (100, 600)]
    score[0][[7, 9]], score[1][[3, 570]] = NAN, NAN
    alive = [np.ones(100, bool), coin(600, 0)]
    alive[1][3], alive[1][570] = False, True
    check(score, None, [30], [0, 0], device)
    _, status = run(score, alive, [30], [0, 0], device)
    assert status[:2] == [7, 570]
    for k in (30, int(alive[1].sum()) + 98, int(alive[1].sum()) + 99, 700):  # NaN ranks last, the first of them first
        check(score, alive, [k], [0, 0], device)
    dead = [~t.isnan().numpy() for t in score]  # a dead NaN is nobody's
    check(score, dead, [50], [0, 0], device)
    assert run(score, dead, [50], [0, 0], device)[1][:2] == [FINITE, FINITE]
    # NaN of any payload and sign are one value
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16}[score[0].element_size()]
    odd = score[0].clone()
    odd.view(word)[9] = -1
    check([odd], None, [99], [0], device)


def test_drop_beyond_the_survivors(backend: str, device: str) -> None:
    score = [noise(40, seed=0), noise(50, seed=1), noise(0, 3, seed=2)]
    alive = [coin(40, 3), np.zeros(50, bool), np.zeros(0, bool)]
    kept = check(score, alive, [41, 1, 7, 0], [0, 1, 2], device)  # the last group has no tensors
    assert not any(k.any() for k in kept)
    check(score, alive, [2**62, 2**62, 0, 1], [3, 0, 0], device)


def test_rounds_nest(backend: str, device: str) -> None:
    score = [noise(n, seed=n) for n in (300, 513, 20)]
    alive = [np.ones(t.numel(), bool) for t in score]
    for _ in range(8):
        left = sum(int(a.sum()) for a in alive)
        kept = check(score, alive, [left // 5], [0] * 3, device)
        assert sum(int(k.sum()) for k in kept) == left - left // 5
        assert not any((k & ~a).any() for k, a in zip(kept, alive))
        alive = kept
    once = check(score, None, [833 - left + left // 5], [0] * 3, device)
    assert all(np.array_equal(a, b) for a, b in zip(once, alive))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_scores_and_masks(backend: str, device: str, dtype: torch.dtype) -> None:
    base = noise(9, 10, 8, seed=0, dtype=dtype)
    score = [base.permute(2, 0, 1)[:5, ::2], base[:, :3].flip(2).transpose(0, 2), base[0, 0, 0].expand(7, 3)]
    check(score, None, [200, 3], [0, 0, 1], device)
    alive = packed(coin(720, 1)).to(device)
    wide = torch.stack([alive, ~alive], 1)  # every other byte
    kept, _ = threshold([base.to(device)], [wide[:, 0]], [100], [0])
    want, _ = threshold([base.to(device)], [alive], [100], [0])
    assert torch.equal(kept[0], want[0])


def test_padding_of_the_mask_is_not_looked_at(backend: str, device: str) -> None:
    full = torch.full((64,), 255, dtype=torch.uint8, device=device)
    kept, status = threshold([noise(33, seed=0).to(device)], [full], [3], [0])
    assert unpacked(kept[0], 33).sum() == 30 and status.tolist() == [FINITE, 33]


def test_random(backend: str, device: str) -> None:
    rng = np.random.default_rng(0)
    for trial in range(30 if backend != "emu" else 10):
        count, groups = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        group = rng.integers(0, groups, count).tolist()
        kind = [DTYPES[d] for d in rng.integers(0, 4, groups)]
        sizes = rng.integers(0, 700, count).tolist()
        make = (noise, rounded)[trial % 2]
        score = [make(n, seed=trial + j, dtype=kind[group[j]]) for j, n in enumerate(sizes)]
        alive = None if trial % 3 == 0 else [coin(n, j, rng.random()) for j, n in enumerate(sizes)]
        check(score, alive, rng.integers(0, 900, groups).tolist(), group, device)


def test_many_tensors(backend: str, device: str) -> None:
    count = 800  # more than a CUDA launch takes, twice
    score = [noise((5, 0, 17, 64)[j % 4], seed=j) for j in range(count)]
    check(score, None, [3000, 40, 0], [j % 3 for j in range(count)], device)


def test_many_groups(backend: str, device: str) -> None:
    count = 300  # more than a CUDA launch takes
    score = [noise((0, 3, 11)[j % 3], seed=j, dtype=DTYPES[j % 4]) for j in range(count)]
    check(score, None, [j % 7 for j in range(count)], list(range(count))[::-1], device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned(backend: str, device: str, dtype: torch.dtype) -> None:
    """Views that begin in the middle of 16 bytes, beside the same numbers at their beginning."""
    base = [noise(n + 3, seed=n, dtype=dtype).to(device) for n in EDGES]
    alive = [coin(n, n, 0.8) for n in EDGES]
    shifted = [torch.cat([m.new_zeros(1), m])[1:].to(device) for m in map(packed, alive)]
    for first in (1, 3):
        score = [t[first:][:n] for t, n in zip(base, EDGES)]
        assert all(t.data_ptr() % 16 and m.data_ptr() % 2 for t, m in zip(score, shifted))
        want = check([t.clone() for t in score], alive, [900, 300], [j % 2 for j in range(len(EDGES))], device)
        kept, _ = threshold(score, shifted, [900, 300], [j % 2 for j in range(len(EDGES))])
        for k, w, n in zip(kept, want, EDGES):
            assert np.array_equal(unpacked(k, n), w)


def drawn(n: int, backend: str) -> np.ndarray:
    """Where the CUDA kernels look before they choose a bracket: here a test may lie to them."""
    sample = 64 * 4 if backend == "emu" else 1024 * 16
    i = np.arange(sample, dtype=np.uint64)
    off = i * 2654435769 % 2**32
    return (i * n // sample + (off * (n // sample) >> 32)).astype(np.int64) if n > sample else i[:n].astype(np.int64)


def wide(n: int, backend: str) -> dict[str, Tensor]:
    """Many pieces: candidates kept aside, too many of them, brackets that miss on either side."""
    plain = noise(n, seed=0)
    look = torch.from_numpy(drawn(n, backend))
    low, high = plain.clone(), plain.clone()
    low[look] *= 1e-6
    high[look] = 100 + high[look].abs()
    bulk = plain.clone()
    bulk[n // 5 : n // 3] = 0.25  # pieces that are all threshold
    short = plain.clone()
    short[: n // 2] = plain[: n // 2] * 2.0**-10  # one half has no candidates
    twins = plain[torch.arange(n) // 3]  # every key thrice: few ties in many pieces
    return {
        "plain": plain,
        "rounded": rounded(n, seed=1),
        "equal": torch.full((n,), -0.5),
        "sample too low": low,
        "sample too high": high,
        "bulk": bulk,
        "short": short,
        "twins": twins,
        "sorted": plain.abs().sort().values,
    }


@pytest.mark.parametrize("name", sorted(wide(600, "emu")))
def test_brackets(backend: str, device: str, name: str) -> None:
    n = 5000 if backend in ("emu", "torch") else 300_000
    whole = wide(n, backend)[name]
    alive = coin(n, 3, 0.6)
    for dtype, share in ((F32, 0.2), (F32, 0.21), (F64, 0.2), (F16, 0.25), (BF16, 0.7)):
        t = whole.to(dtype)
        value = t.double().abs().numpy()
        k = int(n * share)
        for mask in (None, alive):
            left = np.flatnonzero(alive) if mask is not None else np.arange(n)
            want = np.zeros(n, bool)
            want[left] = True
            want[left[np.argsort(value[left], kind="stable")[:k]]] = False
            cut = n // 3 + 1
            pieces = None if mask is None else [mask[:cut], mask[cut:]]
            kept, status = run([t[:cut], t[cut:]], pieces, [k], [0, 0], device)
            assert np.array_equal(np.concatenate(kept), want), (dtype, share, mask is None)
            assert status == [FINITE, FINITE, left.size]


def test_brackets_of_several_groups(backend: str, device: str) -> None:
    """Groups of every dtype that meet within a block, one of them with a bracket that misses."""
    n = 1800
    data = wide(n, backend)
    kinds = ("plain", "sample too high", "twins", "rounded", "bulk", "short")
    score = [data[k].to(DTYPES[j % 4]) for j, k in enumerate(kinds)]
    alive = [coin(n, j, 0.9) for j in range(len(kinds))]
    drop = [n // 5, n // 4, n // 3, n // 2, 0, 2 * n]
    check(score, None, drop, list(range(6)), device)
    check(score, alive, drop, [5, 4, 3, 2, 1, 0], device)


def sampled() -> dict[str, Tensor]:
    """Large enough that the C++ kernel samples: what it may meet."""
    n = 150_000
    plain = noise(n, seed=0)
    periodic = plain.clone()
    periodic[::2] *= 1e-3
    bulk = plain.clone()
    bulk[20_000:90_000] = 0.5  # a piece that is all threshold
    return {
        "plain": plain,
        "rounded": rounded(n, seed=1),
        "equal": torch.full((n,), 0.5),
        "sorted": plain.abs().sort().values,
        "periodic": periodic,
        "bulk": bulk,
        "mostly zero": torch.where(plain.abs() > 2, plain, 0.0),
        "few distinct": (plain * 20).round() / 20,
        "one outlier": torch.cat([torch.full((n - 1,), 1e-30), torch.tensor([1e30])]),
    }


@pytest.mark.parametrize("name", sorted(sampled()))
def test_large(fast_backend: str, device: str, name: str) -> None:
    whole = sampled()[name]
    for dtype, k in ((F32, 30_000), (F32, 149_000), (F64, 75_000), (F16, 30_000), (BF16, 120_001)):
        t = whole.to(dtype)
        value = t.double().abs().numpy()
        want = np.ones(t.numel(), bool)
        want[np.argsort(value, kind="stable")[:k]] = False
        kept, _ = run([t[:70_001], t[70_001:]], None, [k], [0, 0], device)
        assert np.array_equal(np.concatenate(kept), want)
        alive = coin(t.numel(), 3, 0.3)
        left = np.flatnonzero(alive)
        want = alive.copy()
        want[left[np.argsort(value[left], kind="stable")[: k // 4]]] = False
        kept, status = run([t], [alive], [k // 4], [0], device)
        assert np.array_equal(kept[0], want) and status == [FINITE, left.size]


def test_large_with_few_survivors(fast_backend: str, device: str) -> None:
    t = noise(200_000, seed=0)
    for share in (0.0, 1e-4, 0.003, 0.02):
        alive = coin(t.numel(), 1, share)
        left = np.flatnonzero(alive)
        want = alive.copy()
        want[left[np.argsort(t.abs().numpy()[left], kind="stable")[: left.size // 3]]] = False
        assert np.array_equal(run([t], [alive], [left.size // 3], [0], device)[0][0], want)
    alive = np.zeros(t.numel(), bool)
    alive[:20_000] = True  # all in one place
    want = alive.copy()
    want[np.argsort(t.abs().numpy()[:20_000], kind="stable")[:7_000]] = False
    assert np.array_equal(run([t], [alive], [7_000], [0], device)[0][0], want)


def test_inputs_unchanged_and_two_runs_equal(backend: str, device: str) -> None:
    score = [noise(600, seed=0).to(device), rounded(700, seed=1).to(device)]
    mask = [packed(coin(t.numel(), j)).to(device) for j, t in enumerate(score)]
    before = [t.clone() for t in (*score, *mask)]
    (a, s), (b, t) = (threshold(score, mask, [200, 100], [1, 0]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip([*a, s, *before], [*b, t, *score, *mask], strict=True))


def test_equal_for_every_thread_count(cpu_backend: str, threads) -> None:
    data = sampled()
    score = [data["plain"], data["rounded"], data["equal"], data["plain"].half(), data["bulk"]]
    results = []
    for n in (1, 2, 3, 4):
        threads(n)
        results.append(threshold(score, [], [200_000, 40_000], [0, 0, 0, 1, 0]))
    for kept, status in results[1:]:
        assert torch.equal(status, results[0][1]) and all(map(torch.equal, kept, results[0][0]))


A, B, MASK = torch.ones(2, 3), torch.ones(4), torch.ones(64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "match", "args"),
    [
        (TypeError, "threshold: 'score' must be a non-empty list of tensors, got Tensor", (A, [], [1], [0])),
        (TypeError, "threshold: 'score' must be a non-empty list of tensors, got list", ([], [], [1], [])),
        (TypeError, r"'score\[1\]' must be a tensor, got int", ([A, 1], [], [1], [0, 0])),
        (TypeError, r"'score\[0\]' must be float32, .* or bfloat16, got int64", ([A.long()], [], [1], [0])),
        (RuntimeError, r"'score\[1\]' must be on cpu as .*, got meta", ([A, B.to("meta")], [], [1], [0, 0])),
        (ValueError, "'mask' must be empty or hold one .* of 2 in 'score', got 1", ([A, B], [MASK], [1], [0, 0])),
        (ValueError, "'mask' must be empty or hold one .* of 1 in 'score', got Tensor", ([A], MASK, [1], [0])),
        (TypeError, r"'mask\[0\]' must be uint8, got bool", ([A], [MASK.bool()], [1], [0])),
        (RuntimeError, r"'mask\[0\]' must be on cpu as .*, got meta", ([A], [MASK.to("meta")], [1], [0])),
        (ValueError, r"'mask\[0\]' must be 64·ceil\(n / 512\) bytes = \[64\], got \[3\]", ([A], [MASK[:3]], [1], [0])),
        (ValueError, "'drop' must hold one number for each group, got none", ([A], [], [], [0])),
        (ValueError, r"'drop\[1\]' must be 0 or more, got -1", ([A], [], [0, -1], [0])),
        (ValueError, "'group' must hold one number for each of 2 in 'score', got 1", ([A, B], [], [1], [0])),
        (ValueError, r"'group\[1\]' must be one of the 1 groups of 'drop', got 1", ([A, B], [], [1], [0, 1])),
        (ValueError, r"'group\[0\]' must be one of the 1 groups of 'drop', got -1", ([A], [], [1], [-1])),
        (TypeError, r"'score\[1\]' must be float32 as the .* group 0, got float64", ([A, B.double()], [], [1], [0, 0])),
    ],
)
def test_errors(error: type, match: str, args: tuple) -> None:
    with pytest.raises(error, match=match):
        threshold(*args)
