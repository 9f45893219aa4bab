# SPDX-License-Identifier: Apache-2.0
"""Each op once on a GPU, small, by every path it has, held against the reference: what compute-sanitizer runs over.

``--backend emu`` does the same on the emulator, so that a mistake in this file shows where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peers import by_reference
from torch import Tensor

import zipfast
from zipfast.ops import OPS
from zipfast.ops._mask import pack
from zipfast.ops._paths import AUTO, Paths
from zipfast.ops._registry import Op
from zipfast.ops.sparse_linear import pack_weight, transpose_layout

DONE = "touched every op"
NOT_SEEN = torch.iinfo(torch.int64).max
Run = Callable[[str], list[Tensor]]  # device -> results, on the CPU


@dataclass(frozen=True)
class Case:
    ops: tuple[str, ...]
    run: Run
    rtol: float = 0.0
    atol: float = 0.0


# ---------------------------------------------------------------------------------------------------------------- paths


class Forced(Paths):
    """One path for every call, whatever the caller asks for."""

    def settle(self, op: str, path: str, device: torch.device) -> str:
        return self.names[0]


@contextlib.contextmanager
def forced(op: Op, path: str) -> Iterator[None]:
    before = op.paths
    op.paths = Forced((path,))
    try:
        yield
    finally:
        op.paths = before


def refusal(op: Op, error: Exception) -> str | None:
    """The sentence with which an op says that a path cannot run here; None where the error is another one."""
    said = re.search(rf"{op.name}: .*", str(error))  # behind the place in the C++ source
    return said[0] if isinstance(error, RuntimeError) and said and "path" in said[0] else None


def ways(case: Case) -> Iterator[tuple[Op | None, str]]:
    """As the op chooses, then each path of each op by name."""
    yield None, AUTO
    for name in case.ops:
        op = OPS[name]
        if op.paths is not None:
            yield from ((op, path) for path in op.paths.names)


def touch(backend: str = "cuda") -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    for case in cases():
        wanted = by_reference(lambda case=case: case.run("cpu"))()
        for op, path in ways(case):
            try:
                with zipfast.backend(backend), forced(op, path) if op else contextlib.nullcontext():
                    found = case.run(device)
            except RuntimeError as e:
                if op is None or refusal(op, e) is None:
                    raise
                print(f"{op.name}, path {path!r}, not run: {refusal(op, e)}")
                continue
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(
                    ours,
                    theirs,
                    rtol=case.rtol,
                    atol=case.atol,
                    equal_nan=True,
                    msg=lambda text, case=case, path=path: f"{case.ops[0]}, path {path!r}: {text}",
                )
    missing = sorted(
        OPS[n].name for n in OPS if OPS[n].host_only is None and n not in {o for c in cases() for o in c.ops}
    )
    if missing:
        raise SystemExit(f"touch.py has no case of {', '.join(missing)}")
    print(DONE)


# ---------------------------------------------------------------------------------------------------------------- cases


def cases() -> list[Case]:
    return [*merging(), *ranking(), *soups(), *tickets()]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def merging() -> list[Case]:
    g = seeded()

    def moments(dtype: torch.dtype) -> Run:
        x = [torch.randn(3, 20, 5, 5, generator=g).to(dtype) for _ in range(2)]

        def run(device: str) -> list[Tensor]:
            f = 2 * x[0].shape[1]
            comoment = torch.zeros(f, f, dtype=torch.float64, device=device)
            total, shift = (torch.zeros(f, dtype=torch.float64, device=device) for _ in range(2))
            bad = torch.full((2,), NOT_SEEN, device=device)
            zipfast.ops.moments_([comoment], [total], [bad], [t.to(device) for t in x], [shift], [1], [0])
            return [torch.triu(comoment.cpu()), total.cpu(), bad.cpu()]

        return run

    rows = [torch.randn(n, 50, generator=g).double().index_fill_(0, torch.tensor([1]), 3.0) for n in (132, 67)]
    sums = ([x @ x.T for x in rows], [x.sum(1) for x in rows], [torch.zeros(len(x)).double() for x in rows])

    def correlate(device: str) -> list[Tensor]:
        found, status = zipfast.ops.correlate(*([t.to(device) for t in part] for part in sums), [50, 50], False, True)
        return [t.cpu() for t in (*found, status)]

    sim = torch.corrcoef(torch.randn(66, 200, generator=g))
    sim = torch.triu(sim) + torch.triu(sim, 1).T

    def zip_match(compat: bool) -> Run:
        def run(device: str) -> list[Tensor]:
            return [t.cpu() for t in zipfast.ops.zip_match([sim.to(device)], 2, [33], [4], 0.3, compat)]

        return run

    w = [torch.randn(3, 20, 5, 5, generator=g) for _ in range(2)]
    order, start = torch.randperm(40, generator=g), torch.arange(0, 41, 2)
    divisor = torch.full((20,), 2.0, dtype=torch.float64)

    def regroup(device: str) -> list[Tensor]:
        index = (order.to(device), start.to(device), divisor.to(device))
        return [zipfast.ops.regroup([t.to(device) for t in w], *index, 1).cpu()]

    return [
        *(Case(("moments_",), moments(t), 1e-4, 1e-3) for t in (torch.float32, torch.float16, torch.float64)),
        Case(("correlate",), correlate, 0, 2e-7),
        *(Case(("zip_match",), zip_match(compat)) for compat in (True, False)),
        Case(("regroup",), regroup, 1e-6, 1e-6),
    ]


def ranking() -> list[Case]:
    g = seeded()
    sigma = torch.rand(40, generator=g, dtype=torch.float64) + 1
    z = torch.randn(40, 35, generator=g, dtype=torch.float64)
    square, off = (z * z).sum(0) + 9, 0.1 * sigma[1:]

    def evidence(mode: int, tridiagonal: bool) -> Run:
        tolerance, rounds = (1e-10, 100) if mode == 2 else (1e-3, 11)

        def run(device: str) -> list[Tensor]:
            offs = [off.to(device)] if tridiagonal else []
            given = ([sigma.to(device)], offs, [z.to(device)], [square.to(device)])
            value, _, mean = zipfast.ops.evidence(*given, [60], [40], mode, tolerance, rounds, 1e-5, 1e-10, True)
            return [value.cpu(), mean.cpu()]

        return run

    return [Case(("evidence",), evidence(m, t), 1e-6, 1e-9) for m in (0, 2) for t in (False, True)]


def soups() -> list[Case]:
    """Tensors of several blocks, and lists of several launches."""
    g = seeded()
    models, sizes = 7, [20_000, 8192, 0, 1, 100] + [33] * 300
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    x = [torch.randn(n, generator=g).to(kinds[(i + n) % 4]) for i in range(models) for n in sizes]
    broken = [x[0].clone(), *x[1:]]
    broken[0][9000] = torch.nan
    weight = torch.randn(models, len(sizes), generator=g, dtype=torch.float64)

    def blend(device: str) -> list[Tensor]:
        out = [torch.empty(n, dtype=(torch.float32, torch.bfloat16)[n % 2], device=device) for n in sizes]
        bad = torch.full((models + 1, len(sizes)), NOT_SEEN, device=device)
        zipfast.ops.blend_(out, bad, [t.to(device) for t in broken], weight.to(device))
        return [t.cpu() for t in (*out, bad)]

    def multidot(device: str) -> list[Tensor]:
        there = [t.to(device) for t in x]
        return [zipfast.ops.multidot(there[: len(sizes)], there).cpu()]

    def gram(device: str) -> list[Tensor]:
        there = [t.to(device) for t in x]
        return [zipfast.ops.gram(there, models, there[: len(sizes)]).cpu()]

    return [Case(("blend_",), blend), Case(("multidot",), multidot, 1e-9, 1e-9), Case(("gram",), gram, 1e-9, 1e-9)]


def tickets() -> list[Case]:
    g = seeded()
    sizes = [20_000, 8192, 0, 1, 100] + [33] * 500
    x = [[torch.randn(n, generator=g) for n in sizes] for _ in range(4)]
    masks = [pack(torch.rand(n, generator=g) < 0.4) for n in sizes]

    def masked(device: str) -> list[Tensor]:
        param, first, second, grad = ([t.to(device, copy=True) for t in part] for part in x)
        mask = [m.to(device) for m in masks]
        kept, status = zipfast.ops.threshold(param, mask, [900, 4000], [i % 2 for i in range(len(sizes))])
        zipfast.ops.apply_mask_(first, kept, [])
        second = [t.square() for t in second]
        zipfast.ops.masked_step_(
            param, first, second, grad, kept, "adam", 2, 0.1, 0.0, 0.0, 0.0, False, 0.9, 0.99, 1e-8, False
        )
        return [t.cpu() for t in (*kept, status, *param, *first, *second)]

    weight = torch.randn(70, 130, generator=g)
    layout = pack_weight(weight, pack(torch.rand(70, 130, generator=g) < 0.2))
    transposed = list(transpose_layout(layout[0], layout[1], 130))

    def sparse(batch: int) -> Run:
        given, grad = (torch.randn(batch, n, generator=g) for n in (130, 70))

        def run(device: str) -> list[Tensor]:
            row_start, column, value, *back = (t.to(device) for t in (*layout, *transposed))
            x, dy = given.to(device), grad.to(device)
            return [
                zipfast.ops.sparse_linear(row_start, column, value, x, None).cpu(),
                zipfast.ops.sparse_linear_input(row_start, column, value, back, dy, 130).cpu(),
                zipfast.ops.sparse_linear_weight(row_start, column, dy, x).cpu(),
            ]

        return run

    names = ("sparse_linear", "sparse_linear_input", "sparse_linear_weight")
    return [
        Case(("threshold", "apply_mask_", "masked_step_"), masked, 1e-5, 1e-6),
        *(Case(names, sparse(batch), 1e-4, 1e-4) for batch in (1, 5, 40)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("cuda", "emu"), default="cuda")
    touch(parser.parse_args().backend)


if __name__ == "__main__":
    main()
