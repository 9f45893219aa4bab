# SPDX-License-Identifier: Apache-2.0
"""How ``make check`` reads ptxas and what it refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import kernels
from kernels import Row, Used

LOG = """\
[3/9] Building CUDA object a.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7zipfast4cuda17apply_mask_kernelENS0_8ApplyJobE' for 'sm_80'
ptxas info    : Function properties for _ZN7zipfast4cuda17apply_mask_kernelENS0_8ApplyJobE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 19088 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 36.157 ms
ptxas info    : Compiling entry function '_ZN7zipfast4cuda12_GLOBAL__N_111tile_kernelIfLi4EEEvNS0_3JobE' for 'sm_90a'
ptxas info    : Function properties for _ZN7zipfast4cuda12_GLOBAL__N_111tile_kernelIfLi4EEEvNS0_3JobE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 16640 bytes smem
"""
MASK = Used("apply_mask_kernel", "_ZN7zipfast4cuda17apply_mask_kernelENS0_8ApplyJobE", "sm_80", 32, 0, 0, 0)
TILE = Used("tile_kernel", "_ZN7zipfast4cuda12_GLOBAL__N_111tile_kernelIfLi4EEEvNS0_3JobE", "sm_90a", 168, 8, 16, 16640)
ROWS = (Row("apply_mask_*", 256, 4),)


def test_log_is_read() -> None:
    assert kernels.read(LOG) == [MASK, TILE]
    assert kernels.kernel_of("_Z12loose_kernelPf") == "loose_kernel"
    with pytest.raises(ValueError, match="not known here"):
        kernels.read("Compiling entry function '_Z1kv' for 'sm_80'\nUsed many registers")


def test_rows_say_what_a_thread_may_take() -> None:
    assert Row("x", 256, 2).registers == 128 and Row("x", 256, 3).registers == 80 and Row("x", 128, 1).registers == 255
    assert Row("x", 256, 2).shared == 82 * 1024 - 1024


def test_what_fits_is_printed_and_passes() -> None:
    assert kernels.problems([MASK], ROWS) == []
    assert kernels.table([MASK, replace(MASK, registers=40)], ROWS) == [
        "apply_mask_kernel (sm_80, 2 forms): 40 of 64 registers, 0 bytes spilled, 0 of stack, "
        "0 of 40960 of static shared memory"
    ]


@pytest.mark.parametrize(
    ("used", "sentence"),
    [
        (replace(MASK, registers=65), "must use at most 64 registers for 4 blocks of 256 threads, got 65"),
        (replace(MASK, shared=50_000), "must use at most 40960 bytes of shared memory"),
        (replace(MASK, spilled=4), "must not spill, got 4 bytes"),
        (replace(MASK, stack=8), "must have a stack frame of at most 0 bytes, got 8"),
    ],
)
def test_too_much_is_refused(used: Used, sentence: str) -> None:
    found = kernels.problems([MASK, used], ROWS)
    assert len(found) == 1 and sentence in found[0] and "apply_mask_kernel for sm_80" in found[0]


def test_a_kernel_without_a_row_is_named_once() -> None:
    found = kernels.problems([MASK, TILE, TILE], ROWS)
    assert found == ["kernel tile_kernel has no row in tests/check/kernels.py: threads of a block, blocks at once"]


def test_rows_that_fit_nothing_are_named() -> None:
    rows = (*ROWS, Row("gone_*", 256, 1))
    assert kernels.problems([MASK], rows) == ["the row of 'gone_*' in tests/check/kernels.py fits no kernel"]
    hidden = (Row("apply_*", 256, 2), *ROWS)  # a row behind a wider one never counts
    assert kernels.problems([MASK], hidden) == ["the row of 'apply_mask_*' in tests/check/kernels.py fits no kernel"]


def test_forms_of_a_template_may_have_rows_of_their_own() -> None:
    rows = (Row("tile_*", 128, 2, stack=8, why="a reason", form="IfLi4E"), Row("tile_*", 512, 1))
    other = replace(TILE, symbol=TILE.symbol.replace("IfLi4E", "IdLi2E"), registers=100, stack=0, spilled=0)
    lines = kernels.table([TILE, other], rows)
    assert ["168 of 255 registers" in lines[1], "100 of 128 registers" in lines[0]] == [True, True]
    assert kernels.problems([replace(TILE, spilled=0), other], rows) == []


def test_a_stack_frame_needs_a_reason() -> None:
    rows = (Row("apply_mask_*", 256, 4, stack=16),)
    used = replace(MASK, stack=16)
    assert kernels.problems([used], rows) == ["the row of 'apply_mask_*' must say why it tolerates a stack frame"]
    assert kernels.problems([used], (replace(rows[0], why="an index that is not known"),)) == []


def test_an_empty_log_is_no_success() -> None:
    assert kernels.problems([], ROWS) == ["ptxas reported no kernel"]
