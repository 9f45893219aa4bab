# SPDX-License-Identifier: Apache-2.0
"""The ops as functions of tensors that change: what the tests on a GPU run on streams, in graphs, by path, on devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import zipfast
from zipfast.ops._mask import pack
from zipfast.ops.sparse_linear import pack_weight, transpose_layout

NO_BAD_VALUE = torch.iinfo(torch.int64).max


def need_gpu() -> None:
    reason = zipfast.ops.why_not("cuda")
    if reason is not None:
        pytest.skip(f"backend cuda is not usable here: {reason}")


@dataclass(frozen=True)
class Case:
    """An op as a function of the tensors that change; everything else is fixed and on the GPU beforehand."""

    name: str
    ops: tuple[str, ...]
    inputs: Callable[[int], list[Tensor]]  # seed -> CPU tensors
    call: Callable[[list[Tensor]], list[Tensor]]
    exact: bool = True
    rounding: tuple[float, float] = (1e-5, 1e-2)  # relative, absolute: products in float32, the reference in float64

    def check(self, ours: list[Tensor], wanted: list[Tensor]) -> None:
        for a, b in zip(ours, wanted, strict=True):
            if self.exact:
                assert torch.equal(a.cpu(), b.cpu())
            else:
                relative, absolute = self.rounding
                torch.testing.assert_close(a.cpu(), b.cpu(), rtol=relative, atol=absolute)

    def reference(self, inputs: list[Tensor]) -> list[Tensor]:
        with zipfast.backend("torch"):
            return self.call(inputs)


def moments_inputs(channels: int, side: int, dtype: torch.dtype) -> Callable[[int], list[Tensor]]:
    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = (8, channels, side, side)
        return [torch.relu(torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)]

    return make


def moments(features: list[Tensor]) -> list[Tensor]:
    size, device = 2 * features[0].shape[1], features[0].device
    comoment = torch.zeros(size, size, dtype=torch.float64, device=device)
    total, shift = (torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2))
    bad = torch.full((2,), NO_BAD_VALUE, device=device)
    zipfast.ops.moments_([comoment], [total], [bad], features, [shift], [1], [0])
    return [torch.triu(comoment), total, bad]


def correlated(features: list[Tensor]) -> list[Tensor]:
    """Several spaces; a dead feature in each."""
    rows = [x.double().movedim(1, 0).flatten(1) for x in features]
    rows = [(8 * x).round() for x in rows]  # whole numbers: sums without rounding, in whatever order
    for x in rows:
        x[0] = 3.0
    shift = [torch.zeros_like(x[:, 0]) for x in rows]
    sums = [x @ x.T for x in rows], [x.sum(1) for x in rows], shift, [x.shape[1] for x in rows]
    found, status = zipfast.ops.correlate(*sums, False, True)
    return [*found, status]


def similarity(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sims = []
    for size in (130, 256):
        x = torch.relu(torch.randn(size, 32, generator=generator) @ torch.randn(32, 400, generator=generator))
        upper = torch.triu(torch.corrcoef(x), 1)
        sims.append(upper + upper.T)
    return sims


def matching(compat: bool) -> Callable[[list[Tensor]], list[Tensor]]:
    def call(sims: list[Tensor]) -> list[Tensor]:
        return list(zipfast.ops.zip_match(sims, 2, [t.shape[0] // 2 for t in sims], [8] * len(sims), 0.3, compat))

    return call


def regroup_inputs(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(48, 32, 3, 3, generator=generator) for _ in range(2)]
    return [*weights, torch.randperm(96, generator=generator), torch.arange(0, 97, 2), torch.full((48,), 2.0).double()]


def regrouped(inputs: list[Tensor]) -> list[Tensor]:
    first, second, order, start, divisor = inputs
    return [zipfast.ops.regroup([first, second], order, start, divisor, 0)]


def spectrum(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    diagonal = 300 * torch.rand(70, generator=generator, dtype=torch.float64) + 1
    z = diagonal.sqrt()[:, None] * torch.randn(70, 40, generator=generator, dtype=torch.float64)
    return [
        diagonal,
        0.4 * torch.rand(69, generator=generator, dtype=torch.float64),
        z,
        (z * z / diagonal[:, None]).sum(0) + 200,
    ]


def evidence(mode: int, tridiagonal: bool) -> Callable[[list[Tensor]], list[Tensor]]:
    def call(inputs: list[Tensor]) -> list[Tensor]:
        diagonal, off, z, square = inputs
        offs = [off] if tridiagonal else []
        exact = mode == 2
        options = (mode, 1e-10 if exact else 1e-3, 100 if exact else 11, 0.0 if exact else 1e-5, 1e-10, True)
        value, _, mean = zipfast.ops.evidence([diagonal], offs, [z], [square], [500], [70], *options)
        return [value, mean]

    return call


SOUP = [4096, 33, 20_000, 1]  # sizes of the tensors of one model


def soup(models: int, dtype: torch.dtype) -> Callable[[int], list[Tensor]]:
    def make(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(n, generator=generator).to(dtype) for _ in range(models) for n in SOUP]

    return make


def blended(x: list[Tensor]) -> list[Tensor]:
    """Weights that carry some sums beyond float16: the first place of each tensor is a result, too."""
    models, device = len(x) // len(SOUP), x[0].device
    out = [torch.empty(n, dtype=torch.float16, device=device) for n in SOUP]
    bad = torch.full((models + 1, len(SOUP)), NO_BAD_VALUE, device=device)
    zipfast.ops.blend_(out, bad, x, torch.full((models, len(SOUP)), 3e4, dtype=torch.float64, device=device))
    return [*out, bad]


def running(x: list[Tensor]) -> list[Tensor]:
    """In place: the sum is its own first input, in several calls that must follow one another."""
    total, count = [t.clone() for t in x[: len(SOUP)]], len(SOUP)
    bad = torch.full((3, count), NO_BAD_VALUE, device=x[0].device)
    weight = torch.full((2, count), 0.75, dtype=torch.float64, device=x[0].device)
    for at in range(count, len(x), count):
        zipfast.ops.blend_(total, bad, [*total, *x[at : at + count]], weight)
    return [*total, bad]


def dots(x: list[Tensor]) -> list[Tensor]:
    return [zipfast.ops.multidot(x[: len(SOUP)], x)]


def grams(x: list[Tensor]) -> list[Tensor]:
    return [zipfast.ops.gram(x, len(x) // len(SOUP), []), zipfast.ops.gram(x, len(x) // len(SOUP), x[: len(SOUP)])]


def masked_inputs(seed: int) -> list[Tensor]:
    """Weights, two states, gradients, and packed masks of a third."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(n, generator=generator) for _ in range(4) for n in SOUP]
    return [*values, *(pack(torch.rand(n, generator=generator) < 0.3) for n in SOUP)]


def stepped(x: list[Tensor]) -> list[Tensor]:
    count = len(SOUP)
    param, first, second, grad, mask = (x[i : i + count] for i in range(0, 5 * count, count))
    param, first, second = ([t.clone() for t in part] for part in (param, first, second))
    second = [t.square() for t in second]
    options = (3, 0.01, 0.1, 0.0, 0.0, False, 0.9, 0.999, 1e-8, False)
    zipfast.ops.masked_step_(param, first, second, grad, mask, "adamw", *options)
    return [*param, *first, *second]


def rewound(x: list[Tensor]) -> list[Tensor]:
    count = len(SOUP)
    out = [torch.empty_like(t) for t in x[:count]]
    zipfast.ops.apply_mask_(out, x[4 * count :], x[:count])
    return out


def thresholded(x: list[Tensor]) -> list[Tensor]:
    count = len(SOUP)
    kept, status = zipfast.ops.threshold(x[:count], x[4 * count :], [1500, 20], [0, 1, 0, 1])
    return [*kept, status]


def sparse_inputs(samples: int) -> Callable[[int], list[Tensor]]:
    """One structure for all seeds, as a captured graph has it; other values."""

    def make(seed: int) -> list[Tensor]:
        alive = torch.rand(300, 500, generator=torch.Generator().manual_seed(99)) < 0.1
        generator = torch.Generator().manual_seed(seed)
        row_start, column, value = pack_weight(torch.randn(300, 500, generator=generator), pack(alive))
        given = [torch.randn(samples, n, generator=generator) for n in (500, 300)]
        return [row_start, column, value, *given, *transpose_layout(row_start, column, 500)]

    return make


def sparse(x: list[Tensor]) -> list[Tensor]:
    row_start, column, value, given, grad, *transposed = x
    forward = zipfast.ops.sparse_linear(row_start, column, value, given, None)
    by_input = zipfast.ops.sparse_linear_input(row_start, column, value, transposed, grad, 500)
    return [forward, by_input, zipfast.ops.sparse_linear_weight(row_start, column, grad, given)]


SPARSE = ("sparse_linear", "sparse_linear_input", "sparse_linear_weight")
CASES = [
    Case("moments, few features", ("moments_",), moments_inputs(32, 16, torch.float32), moments, exact=False),
    Case("moments, many features", ("moments_",), moments_inputs(320, 7, torch.float32), moments, exact=False),
    Case("moments, float16", ("moments_",), moments_inputs(64, 14, torch.float16), moments, exact=False),
    Case("moments, float16, tiles", ("moments_",), moments_inputs(512, 14, torch.float16), moments, exact=False),
    Case(
        "correlate", ("correlate",), moments_inputs(130, 6, torch.float32), correlated, exact=False, rounding=(0, 2e-7)
    ),
    Case("zip_match, compat", ("zip_match",), similarity, matching(True)),
    Case("zip_match, strict", ("zip_match",), similarity, matching(False)),
    Case("regroup", ("regroup",), regroup_inputs, regrouped),
    Case("evidence, reference", ("evidence",), spectrum, evidence(0, False), exact=False, rounding=(1e-9, 1e-12)),
    Case(
        "evidence, exact, tridiagonal", ("evidence",), spectrum, evidence(2, True), exact=False, rounding=(1e-7, 1e-10)
    ),
    Case("blend", ("blend_",), soup(8, torch.float32), blended),
    Case("blend, in place", ("blend_",), soup(5, torch.bfloat16), running),
    Case("multidot", ("multidot",), soup(16, torch.float32), dots, exact=False, rounding=(1e-11, 1e-9)),
    Case("gram", ("gram",), soup(9, torch.float16), grams, exact=False, rounding=(1e-11, 1e-9)),
    Case("threshold", ("threshold",), masked_inputs, thresholded),
    Case("apply_mask", ("apply_mask_",), masked_inputs, rewound),
    Case("masked_step", ("masked_step_",), masked_inputs, stepped, exact=False, rounding=(1e-5, 1e-6)),
    Case("sparse_linear", SPARSE, sparse_inputs(24), sparse, exact=False, rounding=(1e-4, 1e-4)),
    Case("sparse_linear, few samples", SPARSE, sparse_inputs(8), sparse, exact=False, rounding=(1e-4, 1e-4)),
]
