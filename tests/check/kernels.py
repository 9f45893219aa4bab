# SPDX-License-Identifier: Apache-2.0
"""What each CUDA kernel may take of a multiprocessor, and whether ptxas kept to it; ``make check`` asks for every build.

A row says how many threads a block of the kernel has and how many blocks are meant to be resident at once; registers and
static shared memory must leave room for them.  Spills are never tolerated, a stack frame only where the row says why.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

REGISTERS = 65536  # of a multiprocessor, 8.0 to 9.0; a thread can have 255
SHARED = 164 << 10  # bytes of a multiprocessor of 8.0; 9.0 has more
RESERVED = 1 << 10  # bytes of shared memory that the system takes for each block


@dataclass(frozen=True)
class Row:
    """``kernel``: a name, or a pattern of names as a shell would write it; ``form``: what the symbol must have in it, where
    the forms of a template differ in their blocks, e.g. "ILb1E" for ``<true>``.  The first row that fits counts."""

    kernel: str
    threads: int
    blocks: int
    form: str = ""
    stack: int = 0  # bytes of a stack frame that are tolerated
    why: str = ""  # the reason for a stack frame

    @property
    def registers(self) -> int:
        """A thread's share: registers are handed out in eights."""
        return min(255, REGISTERS // (self.threads * self.blocks) // 8 * 8)

    @property
    def shared(self) -> int:
        return SHARED // self.blocks - RESERVED


ROWS = (
    Row("apply_mask_*", 256, 4),
    Row("blend_*", 256, 3),
    Row("correlate_*", 256, 3),
    Row("evidence_solve_kernel", 128, 3, form="ILb1E"),  # tridiagonal
    Row("evidence_*", 512, 1),
    Row("gram_tensor_kernel", 256, 1),
    Row("gram_*", 256, 2),
    Row("masked_step_*", 256, 3),
    Row("moments_mma_kernel", 128, 3),
    Row("moments_wgmma_kernel", 288, 1),
    Row("moments_*", 256, 2),
    Row("multidot_*", 256, 2),
    Row("regroup_*", 256, 2),
    Row("sparse_linear_staged_kernel", 512, 1),
    Row("sparse_linear_*", 256, 2),
    Row("threshold_collect_kernel", 256, 4),
    Row("threshold_finish_kernel", 512, 1),
    Row("threshold_*", 1024, 1),
    Row("zip_match_*", 512, 1),
)


@dataclass(frozen=True)
class Used:
    """One form of a kernel, as ptxas made it for one architecture."""

    kernel: str
    symbol: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int


def kernel_of(symbol: str) -> str:
    """The function's own name in a mangled one: the last of the counted names before arguments or template arguments."""
    at, name = re.match(r"_ZN?", symbol).end() if symbol.startswith("_Z") else 0, symbol
    while m := re.compile(r"(\d+)").match(symbol, at):
        at = m.end() + int(m[1])
        name = symbol[m.end() : at]
    return name


def read(log: str) -> list[Used]:
    """Every entry function in the output of ``ptxas -v``."""
    found = []
    for part in re.split(r"(?=Compiling entry function ')", log)[1:]:
        head = re.match(r"Compiling entry function '(\S+)' for '(\w+)'", part)
        # of the kernel and of functions that it calls, where some were not inlined
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers.*", part)
        if head is None or not frames or used is None:
            raise ValueError(f"ptxas speaks in a form that is not known here: {part[:300]!r}")
        shared = re.search(r"(\d+) bytes smem", used[0])
        stack, spilled = max(int(f[0]) for f in frames), sum(int(f[1]) + int(f[2]) for f in frames)
        static = int(shared[1]) if shared else 0
        found.append(Used(kernel_of(head[1]), head[1], head[2], int(used[1]), stack, spilled, static))
    return found


def row_of(used: Used, rows: Iterable[Row]) -> Row | None:
    return next((r for r in rows if fnmatch.fnmatchcase(used.kernel, r.kernel) and r.form in used.symbol), None)


def table(used: list[Used], rows: tuple[Row, ...] = ROWS) -> list[str]:
    """A line for each kernel, architecture and row: the most that any of its forms takes, beside what it may."""
    groups: dict[tuple[str, str, Row | None], list[Used]] = {}
    for u in sorted(used, key=lambda u: (u.kernel, u.architecture, u.symbol)):
        groups.setdefault((u.kernel, u.architecture, row_of(u, rows)), []).append(u)
    lines = []
    for (kernel, architecture, row), forms in groups.items():
        limits = (f" of {row.registers}", f" of {row.shared}") if row else ("", "")
        many = f", {len(forms)} forms" if len(forms) > 1 else ""
        lines.append(
            f"{kernel} ({architecture}{many}): {max(u.registers for u in forms)}{limits[0]} registers, "
            f"{max(u.spilled for u in forms)} bytes spilled, {max(u.stack for u in forms)} of stack, "
            f"{max(u.shared for u in forms)}{limits[1]} of static shared memory"
        )
    return lines


def problems(used: list[Used], rows: tuple[Row, ...] = ROWS) -> list[str]:
    """A sentence for each thing that is not as the rows say."""
    found = [] if used else ["ptxas reported no kernel"]
    fitting = set()
    for u in used:
        row = row_of(u, rows)
        if row is None:
            sentence = f"kernel {u.kernel} has no row in tests/check/kernels.py: threads of a block, blocks at once"
            found += [] if sentence in found else [sentence]
            continue
        fitting.add(row)
        here = f"{u.kernel} for {u.architecture} ({u.symbol})"
        meant = f"for {row.blocks} blocks of {row.threads} threads"
        if u.registers > row.registers:
            found.append(f"{here} must use at most {row.registers} registers {meant}, got {u.registers}")
        if u.shared > row.shared:
            found.append(f"{here} must use at most {row.shared} bytes of shared memory {meant}, got {u.shared}")
        if u.spilled:
            found.append(f"{here} must not spill, got {u.spilled} bytes")
        if u.stack > row.stack:
            found.append(f"{here} must have a stack frame of at most {row.stack} bytes, got {u.stack}")
    for row in rows:
        if used and row not in fitting:
            found.append(f"the row of {row.kernel!r} in tests/check/kernels.py fits no kernel")
        if row.stack and not row.why:
            found.append(f"the row of {row.kernel!r} must say why it tolerates a stack frame")
    return found
