# SPDX-License-Identifier: Apache-2.0
"""The pages of docs/integrations: code that runs, in the order of the page; links to files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGES = Path(__file__).resolve().parents[2] / "docs" / "integrations"
NEEDS = {"transformers": "transformers", "sklearn": "sklearn", "timm": "torch"}  # what their blocks import


def blocks(page: str, tags: str) -> str:
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"```(?:{tags})\n(.*?)```", text, re.DOTALL))


def run(page: str, tags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(NEEDS[page])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = blocks(page, tags)
    assert code.count("\n") > 10
    exec(compile(code, f"docs/integrations/{page}.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", list(NEEDS))
def test_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(page, "python", tmp_path, monkeypatch)


def test_code_with_a_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed, which transformers' Trainer needs")
    run("transformers", "python|py", tmp_path, monkeypatch)


@pytest.mark.parametrize("page", list(NEEDS))
def test_links_and_extras(page: str) -> None:
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (PAGES / link).exists(), link
    extra = re.search(r"pip install 'zipfast\[(\w+)\]'", text)
    assert extra and f"\n{extra[1]} = [" in (PAGES.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
