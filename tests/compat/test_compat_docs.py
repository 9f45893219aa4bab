# SPDX-License-Identifier: Apache-2.0
"""docs/compat/zipit.md and logme.md: the code runs, and every call of the public codes has a row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from checkouts import imported

from zipfast.compat import logme, zipit

DOCS = Path(__file__).resolve().parents[2] / "docs" / "compat"
PAGES = {"zipit": (DOCS / "zipit.md").read_text("utf-8"), "logme": (DOCS / "logme.md").read_text("utf-8")}


def rows(page):
    """Calls in the first column -> what is said of them."""
    table = PAGES[page].split("## Every call")[1].split("\n\n")[1].splitlines()[2:]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    assert all(len(c) == 2 for c in cells)
    return {call: said for first, said in cells for call in re.findall(r"`(\w+(?:\.\w+)?)", first)}


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    assert blocks
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, f"docs/compat/{page}.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_every_row_says_same_or_why_not(page):
    for call, said in rows(page).items():
        assert re.match(r"same\b|as `\w+`|new:|not offered, because ", said), call


@pytest.mark.parametrize("page, module", [("zipit", zipit), ("logme", logme)])
def test_the_table_is_the_module(page, module):
    offered = {call.split(".")[0] for call, said in rows(page).items() if not said.startswith(("not offered", "new"))}
    attributes = {"fitted", "num_dim", "alphas", "betas", "ms"}
    assert offered - attributes == set(module.__all__) - {"install", "check"}
    assert not any(hasattr(module, call) for call, said in rows(page).items() if said.startswith("not offered"))


@pytest.mark.parametrize(
    "page, variable, files",
    [
        ("zipit", "ZIPFAST_ZIPIT", ["matching_functions", "metric_calculators"]),
        ("logme", "ZIPFAST_LOGME", ["LogME", "LEEP", "NCE"]),
    ],
)
def test_the_table_has_every_public_name(page, variable, files):
    if page == "logme":
        pytest.importorskip("numba")
    with imported(variable, files) as modules:
        for name, module in modules.items():
            public = {k for k, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__}
            assert public - set(rows(page)) == set(), name
