# SPDX-License-Identifier: Apache-2.0
"""Each example runs, prints its table with numbers that can be, keeps what it says, and is short; guides link to them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import zipfast

ROOT = Path(__file__).resolve().parents[1]
# script -> the guide that links to it; rows of its table; what --out leaves
EXAMPLES = {
    "merge_two_networks": ("merging", ["ZipIt!, whole", "ensemble of both"], ["whole.safetensors", "two-heads"]),
    "rank_models": ("ranking", ["ResNet-8", "ResNet-8, not trained"], []),
    "soup_of_checkpoints": (
        "soups",
        ["best run", "uniform soup of all eight"],
        ["run-7.safetensors", "soup.safetensors"],
    ),
    "lottery_ticket": ("tickets", ["| 8 | 10.00 |", "a tenth of the weights minus a random mask"], ["settings.json"]),
}


def test_all_are_known_short_and_linked() -> None:
    scripts = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    assert set(scripts) == set(EXAMPLES)
    about = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for name, path in scripts.items():
        text = path.read_text(encoding="utf-8")
        guide = (ROOT / "docs" / f"{EXAMPLES[name][0]}.md").read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80, name
        assert f"({name}.py)" in about and f"(../examples/{name}.py)" in guide
        assert all(option in text for option in ('"--quick"', '"--seed"', '"--out"')), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    pytest.importorskip("scipy", reason="permutations and Kendall's tau are SciPy's")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", [name, "--quick", "--seed", "3", "--out", str(tmp_path / "out")])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    _, rows, left = EXAMPLES[name]
    for row in rows:
        (line,) = [line for line in shown.splitlines() if line.startswith(row) and re.search(r"\d", line)][:1]
        numbers = [float(n) for n in re.findall(r"(?<![\w.])[-+]?\d+\.\d+", line.removeprefix(row))]
        assert numbers and all(-100 <= n <= 100 for n in numbers), line
    for file in left:
        assert (tmp_path / "out" / file).exists()
    if name == "merge_two_networks":
        assert zipfast.MultiHead.load(tmp_path / "out" / "two-heads")(torch.rand(2, 1, 16, 16))[1].shape == (2, 10)
