# SPDX-License-Identifier: Apache-2.0
"""The tables in docs/ranking.md and docs/logme-results.md are what the commands print; tests/test_docs.py runs the code."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "benches") not in sys.path:
    sys.path.insert(0, str(ROOT / "benches"))

import logme_modes  # noqa: E402
import logme_page  # noqa: E402

GUIDE = (ROOT / "docs" / "ranking.md").read_text(encoding="utf-8")


def test_table_of_modes_is_what_the_command_prints() -> None:
    shown = GUIDE.split(logme_modes.BEGIN)[1].split(logme_modes.END)[0].strip().splitlines()
    found = logme_modes.table().splitlines()
    assert [line.split("|")[1] for line in shown] == [line.split("|")[1] for line in found]
    for a, b in zip(shown[2:], found[2:]):
        values = [[float(cell) for cell in line.split("|")[2:5]] for line in (a, b)]
        assert values[0] == pytest.approx(values[1], abs=2e-3), a  # the last digit is LAPACK's


def test_exact_is_the_same_on_equal_information() -> None:
    rows = {line.split("|")[1].strip(): line.split("|")[4] for line in logme_modes.table().splitlines()[2:]}
    assert (
        len({rows[name] for name in ("N = 100, D = 200", "... padded with 200 columns of 0", "... every column twice")})
        == 1
    )
    same = (
        "N = 1000, D = 64",
        "... features times 100",
        "... features times 1e-12",
        "... labels 1 to 5: class 0 is empty",
    )
    assert len({rows[name] for name in same}) == 1


def test_results_page_is_what_was_measured() -> None:
    document = json.loads((ROOT / "benches" / "results" / "logme_tables.json").read_text())
    assert logme_page.PAGE.read_text(encoding="utf-8") == logme_page.text(document)
    assert len(document["sets"]) == 4 and all(len(s["rows"]) >= 12 for s in document["sets"])


def test_every_metric_is_in_the_table() -> None:
    from zipfast.ranking.rank import METRICS

    named = re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)
    assert set(METRICS) <= set(named)
