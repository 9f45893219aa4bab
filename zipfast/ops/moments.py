# SPDX-License-Identifier: Apache-2.0
"""``moments_``: streaming sums and co-moments of the features of M models, for many spaces at once.

The class that users meet is :class:`zipfast.Moments`; this is the operator below it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._paths import Paths
from ._registry import op

NAME = "moments_"
NO_BAD_VALUE = torch.iinfo(torch.int64).max
PROOF_TOLERANCE = 1e-5


def _contract(
    comoment: list[Tensor],
    total: list[Tensor],
    bad: list[Tensor],
    features: list[Tensor],
    shift: list[Tensor],
    axis: list[int],
    seen: list[int],
) -> None:
    check.check_tensors(NAME, "comoment", comoment)
    spaces = len(comoment)
    for name, value in (("total", total), ("bad", bad), ("shift", shift), ("axis", axis), ("seen", seen)):
        if len(value) != spaces:
            raise ValueError(f"{NAME}: '{name}' must have one entry per space ({spaces}), got {len(value)}")
    check.check_tensors(NAME, "features", features)
    if len(features) % spaces:
        raise ValueError(f"{NAME}: 'features' must hold M tensors for each of {spaces} spaces, got {len(features)}")
    models = len(features) // spaces
    if models > check.MAX_TENSORS:
        raise ValueError(f"{NAME}: 'features' must be of at most {check.MAX_TENSORS} models, got {models}")
    device = features[0].device
    for s in range(spaces):
        own = features[s * models : (s + 1) * models]
        check.check_dtype(NAME, f"features[{s * models}]", own[0], check.FLOATING)
        check.check_same(NAME, "features", own, s * models)
        check.check_device(NAME, "features", own[0], device)
        if not 0 <= axis[s] < own[0].dim():
            raise ValueError(f"{NAME}: 'axis[{s}]' must be in [0, {own[0].dim()}), got {axis[s]}")
        for m, x in enumerate(own):
            if x.shape != own[0].shape:
                raise ValueError(
                    f"{NAME}: features of space {s} must have one shape in all models, "
                    f"got {list(own[0].shape)} in model 0 and {list(x.shape)} in model {m}"
                )
        stacked = models * own[0].shape[axis[s]]
        for name, t, shape, letters, dtype in (
            (f"comoment[{s}]", comoment[s], (stacked, stacked), "[F, F]", torch.float64),
            (f"total[{s}]", total[s], (stacked,), "[F]", torch.float64),
            (f"bad[{s}]", bad[s], (models,), "[M]", torch.int64),
            (f"shift[{s}]", shift[s], (stacked,), "[F]", torch.float64),
        ):
            check.check_dtype(NAME, name, t, (dtype,))
            check.check_shape(NAME, name, t, shape, letters)
            check.check_device(NAME, name, t, device)
            if t is not shift[s] and not t.is_contiguous():
                raise ValueError(f"{NAME}: '{name}' must be contiguous, as it is written in place")


# What a proof runs over: images and tokens, of few features and, on a GPU, of as many as a path for many is taken for.
SMALL = (((3, 70, 10, 10), 1), ((300, 70), 1))
LARGE = (((3, 70, 10, 10), 1), ((1100, 260), 1))


def _prove(device: torch.device) -> str | None:
    """Whether what "auto" takes on this device agrees with the generic path there."""
    return _compare(device, moments_.native, ("auto",), LARGE)


def _compare(device: torch.device, call: Callable[..., None], paths: tuple[str, ...], shapes: Any) -> str | None:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    # Without a shift, numbers of 16 bits are multiplied as they are.
    for (shape, axis), dtype, moved in itertools.product(shapes, dtypes, (0.0, 1.5)):
        drawn = (torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32) for _ in range(2))
        x = [v.to(dtype).to(device) for v in drawn]
        size, samples = 2 * shape[axis], x[0].numel() // shape[axis]
        shift = torch.zeros(size, dtype=torch.float64, device=device)
        shift[3] = moved
        found: dict[str, Tensor] = {}
        for path in ("generic", *paths):
            comoment = torch.zeros(size, size, dtype=torch.float64, device=device)
            total = torch.zeros(size, dtype=torch.float64, device=device)
            bad = torch.full((2,), NO_BAD_VALUE, device=device)
            call([comoment], [total], [bad], x, [shift], [axis], [0], path)
            found[path] = torch.cat([torch.triu(comoment), total[None]]) / samples
        for path in paths:
            error = float((found[path] - found["generic"]).abs().nan_to_num(torch.inf).max())
            if error > PROOF_TOLERANCE:
                return f"path '{path}' is off by {error:.0e} of a feature's scale for {dtype}"
    return None


def _fake(
    comoment: Any, total: Any, bad: Any, features: Any, shift: Any, axis: Any, seen: Any, path: str = "auto"
) -> None:
    return None


@op(
    "moments_(Tensor(a!)[] comoment, Tensor(b!)[] total, Tensor(c!)[] bad, Tensor[] features, Tensor[] shift, "
    'int[] axis, int[] seen, str path="auto") -> ()',
    contract=_contract,
    fake=_fake,
    paths=Paths(("generic", "mma", "wgmma"), _prove),
)
def moments_(
    comoment: list[Tensor],
    total: list[Tensor],
    bad: list[Tensor],
    features: list[Tensor],
    shift: list[Tensor],
    axis: list[int],
    seen: list[int],
    path: str = "auto",
) -> None:
    r"""Add one batch to the running moments of every space.

    With the features of all M models stacked (F = M·D) and a fixed shift c per feature,

    .. math:: total \mathrel{+}= \sum_s (x_s - c), \qquad comoment \mathrel{+}= \sum_s (x_s - c)(x_s - c)^T

    (upper triangle; what lies below the diagonal is neither read nor defined).  Features are read where they lie: nothing
    is concatenated, permuted or cast beforehand.

    Args:
        comoment: per space, float64 [F, F], written in place.
        total: per space, float64 [F], written in place.
        bad: per space, int64 [M], lowered to ``(seen + sample)·D + feature`` at the first NaN or infinity of a model
            (``NO_BAD_VALUE``: none).  Values are noted, not refused: refusing needs a host read, which belongs to the
            caller (:class:`zipfast.Moments`).
        features: space-major list, M per space, all of one shape: any shape with D entries along ``axis``.  float32,
            float64, float16, bfloat16.  A sample is one position of the other axes.
        shift: per space, float64 [F], each value exact in float32.
        axis: per space, the feature axis (1 for NCHW, the last for tokens), not negative.
        seen: per space, samples added before this batch; only places ``bad``.
        path: which CUDA kernel serves all spaces (see ``docs/kernels.md``): ``"generic"``; ``"mma"``, tensor cores, compute
            capability 8.0 and newer; ``"wgmma"``, those of 9.0, many features; both not for float64.  ``"auto"``: by device,
            dtype and shape, space by space.

    Raises:
        TypeError, ValueError, RuntimeError: dtype, shape, device.

    Cost and determinism: S·F²/2 multiply-adds, inputs read once, no copy of the features (path ``"wgmma"``: packed in 2
    bytes a value, 4 where they are split).  Products of float32, float16 and bfloat16 inputs run in float32 over at most
    256 samples, then in float64 (on tensor cores: in float32 that rounds over at most 16384; sums of features: at most 16
    in float32); float64 inputs run in float64 throughout.  The work is cut by shape alone: equal bits for every thread
    count, whatever ``torch.set_float32_matmul_precision`` and ``allow_tf32`` say.

    Reference: Stoica et al. 2024, §4.1 and App. B (correlations of activations); shifted sums: Chan, Golub and LeVeque
    1983, §2.
    """
    models = len(features) // len(comoment)
    for s in range(len(comoment)):
        own = features[s * models : (s + 1) * models]
        shape = own[0].shape
        samples = math.prod(shape[: axis[s]] + shape[axis[s] + 1 :])
        rows = [x.movedim(axis[s], 0).reshape(shape[axis[s]], samples).double() for x in own]
        for m, x in enumerate(rows):
            bad[s][m] = torch.minimum(bad[s][m], _first_bad(x, seen[s]))
        centred = torch.cat(rows) - shift[s][:, None]
        total[s] += centred.sum(1)
        comoment[s] += torch.triu(centred @ centred.T)


def _first_bad(x: Tensor, seen: int) -> Tensor:
    """``(seen + sample)·D + feature`` of the first value of [D, samples] that is not finite, sample by sample."""
    size, samples = x.shape
    place = (torch.arange(samples, device=x.device)[None, :] + seen) * size + torch.arange(size, device=x.device)[
        :, None
    ]
    none = torch.full((), NO_BAD_VALUE, dtype=torch.int64, device=x.device)
    if math.prod(x.shape) == 0:
        return none
    return torch.where(torch.isfinite(x), none, place).min()
