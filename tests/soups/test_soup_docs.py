# SPDX-License-Identifier: Apache-2.0
"""The code in docs/soups.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "soups.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block: str) -> None:
    exec(compile(block, "docs/soups.md", "exec"), {})


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 2
