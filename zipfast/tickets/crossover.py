# SPDX-License-Identifier: Apache-2.0
"""From which density on is sparse faster than dense here? Measured once for each kind of shape, then remembered.

What was measured is kept in ``$XDG_CACHE_HOME/zipfast/crossover.json``; a folder that cannot be written costs another
measurement, nothing else.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .._version import __version__
from ..checkpoint import atomic_write
from ..ops._check import FLOATING, words
from ..ops._mask import pack
from ..ops.sparse_linear import NARROW

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)
PROBE_STEPS = 8
PROBE_ELEMENTS = 1 << 24  # of the dense weight that is timed: larger layers are timed by some of their rows
_known: dict[str, Crossover] = {}


@dataclass(frozen=True)
class Crossover:
    """What was measured: below ``density`` the sparse forward pass was faster than the dense one."""

    density: float
    dense_ms: float
    sparse_ms: dict[str, float]  # density -> time


def measure_crossover(
    out_features: int,
    in_features: int,
    batch: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    densities: Sequence[float] = DENSITIES,
    budget_s: float = 0.05,
) -> Crossover:
    """Time the dense forward pass against the sparse one at a few densities; nothing is remembered.

    Args:
        out_features, in_features, batch, dtype, device: the layer and how it is called.
        densities: ascending, in (0, 1].
        budget_s: seconds of timed calls, about; every call runs at least twice.

    Returns:
        the density at which the times, joined by straight lines, meet: 0 if dense always wins, 1 if sparse does.

    Raises:
        ValueError: shapes or densities out of range.
    """
    if min(out_features, in_features, batch) < 1:
        shape = [out_features, in_features, batch]
        raise ValueError(f"measure_crossover: 'out_features', 'in_features', 'batch' must be at least 1, got {shape}")
    if not densities or list(densities) != sorted(densities) or not 0 < densities[0] <= densities[-1] <= 1:
        raise ValueError(f"measure_crossover: 'densities' must ascend in (0, 1], got {list(densities)}")
    rows = max(1, min(out_features, PROBE_ELEMENTS // in_features))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, in_features, generator=generator).to(device, dtype)
    share = budget_s / (len(densities) + 1)
    with torch.no_grad():
        weight = torch.zeros(rows, in_features, dtype=dtype, device=device)
        dense = _time(lambda: F.linear(x, weight), share, x.device)
        times = {}
        for density in densities:
            layout = _regular(rows, in_features, density, generator, dtype, device)
            times[density] = _time(partial(ops.sparse_linear, *layout, x, None), share, x.device)
    found = _meet(dense, times)
    return Crossover(found, dense * 1e3, {str(d): t * 1e3 for d, t in times.items()})


def prefer_sparse(
    out_features: int,
    in_features: int,
    density: float,
    batch: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
) -> tuple[bool, str]:
    """Whether ``SparseLinear`` is faster than ``nn.Linear`` here, and why.

    Answers from a crossover measured once (``measure_crossover``) for each bucket of shapes (powers of 2), batch, dtype,
    number of threads and machine, kept in ``$XDG_CACHE_HOME/zipfast/crossover.json``.

    Returns:
        (decision, one sentence).

    Raises:
        ValueError: a shape below 1, a density outside [0, 1].
    """
    if min(out_features, in_features, batch) < 1:
        shape = [out_features, in_features, batch]
        raise ValueError(f"prefer_sparse: 'out_features', 'in_features', 'batch' must be at least 1, got {shape}")
    if not 0 <= density <= 1:
        raise ValueError(f"prefer_sparse: 'density' must be in [0, 1], got {density}")
    place = torch.device(device)
    if dtype not in FLOATING:
        return False, f"dense: sparse layers are {words(FLOATING)}, not {words([dtype])}"
    if place.type not in ("cpu", "cuda") or not ops.available(place.type):
        reason = ops.why_not(place.type) if place.type in ("cpu", "cuda") else "no kernels for it"
        return False, f"dense: sparse layers need compiled kernels, and there are none for {place.type}: {reason}"
    rows, columns, samples = _bucket(out_features), _bucket(in_features), min(_bucket(batch), 256)
    threads = torch.get_num_threads() if place.type == "cpu" else 0
    key = f"{rows}x{columns} b{samples} {words([dtype])} t{threads} {_where(place)}"
    limit = _remembered(key, lambda: measure_crossover(rows, columns, samples, dtype, device=device)).density
    sparse = density < limit
    said = "below" if sparse else "not below"
    name = f"{rows}x{columns}, batch {samples}, {words([dtype])}" + (f", {threads} threads" if threads else "")
    return (
        sparse,
        f"{'sparse' if sparse else 'dense'}: density {density:.3g} is {said} {limit:.3g}, measured for {name}",
    )


def mlp_crossover(model: nn.Module, *, batch: int = 64, dtype: torch.dtype = torch.float32) -> float:
    """The density below which :func:`zipfast.ops.mlp_steps_` is faster on survivors alone, for the largest layer of a model.

    Returns:
        what its ``sparse_below`` should be: 0 where sparse never pays, up to 1.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not layers or not ops.available("cpu"):
        return 0.0
    large = max(layers, key=lambda m: m.weight.numel())
    rows, columns = _bucket(large.out_features), _bucket(large.in_features)
    key = f"mlp {rows}x{columns} b{batch} {words([dtype])} t{torch.get_num_threads()} {_where(torch.device('cpu'))}"
    return _remembered(key, lambda: _measure_mlp(rows, columns, batch, dtype)).density


def _measure_mlp(rows: int, columns: int, batch: int, dtype: torch.dtype) -> Crossover:
    generator = torch.Generator().manual_seed(0)
    rows = max(1, min(rows, PROBE_ELEMENTS // columns))
    data = torch.randn(batch, columns, generator=generator, dtype=dtype)
    label = torch.randint(rows, (batch,), generator=generator)
    order = torch.arange(batch).expand(PROBE_STEPS, batch).contiguous()

    def timed(density: float, sparse_below: float) -> float:
        alive = torch.rand(rows, columns, generator=generator) < density
        weight, bias = (
            [torch.randn(rows, columns, generator=generator, dtype=dtype) * alive],
            [torch.zeros(rows, dtype=dtype)],
        )
        state = [[torch.zeros_like(t) for t in (*weight, *bias)] for _ in range(2)]
        rest = (data, label, order, torch.full((PROBE_STEPS,), 1e-3, dtype=torch.float64))
        mask = [pack(alive)]
        step = ("adam", 0.9, 0.999, 1e-8, 0.0, False, 0, sparse_below)
        return _time(lambda: ops.mlp_steps_(weight, bias, mask, *state, *rest, *step), 0.02, torch.device("cpu"))

    dense = timed(1.0, 0.0)
    times = {density: timed(density, 2.0) for density in DENSITIES}
    return Crossover(_meet(dense, times), dense * 1e3, {str(d): t * 1e3 for d, t in times.items()})


def _meet(dense: float, times: dict[float, float]) -> float:
    """The density at which times, joined by straight lines, reach the dense one."""
    before, at = 0.0, 0.0  # density and time of the sparse pass: nothing takes no time
    for density, t in times.items():
        if t >= dense:
            return 0.0 if before == 0.0 else before + (density - before) * (dense - at) / max(t - at, 1e-12)
        before, at = density, t
    return 1.0


def _remembered(key: str, measure: Callable[[], Crossover]) -> Crossover:
    if key not in _known:
        _known.update(_read())
    if key not in _known:
        _known[key] = measure()
        _write(key, _known[key])
    return _known[key]


def _where(place: torch.device) -> str:
    """The machine and the versions that a measurement holds for."""
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else _processor()
    return f"{name} {torch.__version__} {__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _bucket(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _regular(
    rows: int,
    columns: int,
    density: float,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: str | torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layout whose rows have the same length: cheap to make, as fast as a random mask."""
    each = max(1, round(columns * density))
    place = (torch.arange(each) + torch.rand(rows, each, generator=generator)) * (columns / each)
    column = place.long().clamp(max=columns - 1).flatten()
    narrow = (column - (column >> 15 << 16)).short() if columns <= NARROW else column.int()
    row_start = torch.arange(rows + 1, dtype=torch.int32) * each
    return row_start.to(device), narrow.to(device), torch.ones(len(column), dtype=dtype, device=device)


def _time(call: Callable[[], Any], share_s: float, device: torch.device) -> float:
    """The least of a few runs: neighbours only ever add time."""
    call()
    best, begin = float("inf"), time.perf_counter()
    for _ in range(50):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.perf_counter()
        best = min(best, end - start)
        if end - begin > share_s:
            break
    return best


def _path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zipfast" / "crossover.json"


def _read() -> dict[str, Crossover]:
    """What is remembered; a file that cannot be read is one that remembers nothing, as all of it can be measured again."""
    try:
        entries = json.loads(_path().read_text(encoding="utf-8"))
        return {
            str(key): Crossover(float(e["density"]), float(e["dense_ms"]), dict(e["sparse_ms"]))
            for key, e in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(key: str, found: Crossover) -> None:
    entries = {k: vars(c) for k, c in (_read() | {key: found}).items()}
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as f:
            json.dump(entries, f, indent=1)
    except OSError:  # a folder that cannot be written: it is measured again next time
        pass
