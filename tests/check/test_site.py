# SPDX-License-Identifier: Apache-2.0
"""What `check docs` says of a site with something wrong, and that the site's hooks turn links and names as they should."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import site_check  # noqa: E402

REFERENCE = "".join(f'<h2 id="{name}">' for name in site_check.names())
LISTED = "".join(f"<code>zipfast.{n}</code>" for n in site_check.exported(ROOT / "zipfast" / "__init__.py"))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site that has all it must have."""
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "index.html").write_text(LISTED)
    (tmp_path / "api" / "rooms.html").write_text(REFERENCE)
    (tmp_path / "index.html").write_text(
        '<script src="assets/a.js"></script><a href="https://arxiv.org/abs/1">paper</a>'
    )
    return tmp_path


def test_nothing_wrong(site: Path) -> None:
    assert site_check.problems(site) == []


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("p.html", '<script src="https://cdn.example/x.js">', 'p.html fetches src="https://cdn.example/x.js"'),
        ("p.html", '<img alt="a" src="//cdn.example/x.png">', 'p.html fetches src="//cdn.example/x.png"'),
        (
            "p.html",
            '<link rel="stylesheet" href="https://fonts.example/css">',
            'fetches href="https://fonts.example/css"',
        ),
        ("p.css", "a { src: url(https://fonts.example/f.woff2) }", "p.css fetches url(https://fonts.example/f.woff2)"),
        ("p.html", "<p>Sum. .. math:: x</p>", "p.html shows markup of a docstring"),
        ("api/rooms.html", REFERENCE.replace('"zipfast.ops.gram"', ""), "the reference lacks zipfast.ops.gram"),
        ("api/index.html", LISTED.replace("zipfast.merge<", "<"), "api/index.md lacks zipfast.merge"),
    ],
)
def test_what_is_wrong_is_said(site: Path, name: str, text: str, problem: str) -> None:
    (site / name).write_text(text)
    (said,) = site_check.problems(site)
    assert said.endswith(problem)


def load(name: str, *needed: str) -> ModuleType:
    for package in needed:
        pytest.importorskip(package, reason=f"no {package}: pip install 'zipfast[docs]'")
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "_site" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "source", "page", "turned"),
    [
        ("[a](docs/merging.md#options)", "README.md", "index.md", "[a](merging.md#options)"),
        ("[a](CONTRIBUTING.md)", "README.md", "index.md", "[a](contributing.md)"),
        ("[a](../examples/rank_models.py)", "docs/ranking.md", "ranking.md", "[a](examples/index.md#rank_modelspy)"),
        ("[ZipIt!](../docs/zipit-results.md)", "examples/README.md", "examples/index.md", "[ZipIt!](../zipit-results.md)"),
        ("[a](rank_models.py)", "examples/README.md", "examples/index.md", "[a](index.md#rank_modelspy)"),
        ("[a](../../README.md)", "docs/compat/zipit.md", "compat/zipit.md", "[a](../index.md)"),
        ("[a](https://arxiv.org) [b](#here)", "README.md", "index.md", "[a](https://arxiv.org) [b](#here)"),
        ("[a](no.txt)", "docs/merging.md", "merging.md", "[a](no.txt)"),
    ],
)  # fmt: skip
def test_links_are_turned(text: str, source: str, page: str, turned: str) -> None:
    assert load("hooks", "mkdocs").turned(text, source, page) == turned


def test_docstrings_are_read_as_the_parser_expects() -> None:
    read = load("docstrings", "griffe", "latex2mathml").read_as_here
    assert (
        read("Args:\n    a, b: two\n        lines.\n")
        == "Args:\n    a: two\n        lines.\n    b: two\n        lines.\n"
    )
    said = read("Raises:\n    TypeError: no (x: y). KeyError, OSError: this\n    and that.\n\nEnd")
    assert (
        said == "Raises:\n    TypeError: no (x: y).\n    KeyError: this and that.\n    OSError: this and that.\n\nEnd"
    )
    assert read("Example:\n    >>> 1\n    1") == "Examples:\n    >>> 1\n    1"
    assert read(">>> 1\n1\n\nEnd") == "```pycon\n>>> 1\n1\n```\n\nEnd"
    assert read("Args: x.\nEnd") == "\n**Args:** x.\nEnd"
    assert "<math" in read(".. math:: a_i = \\sum\n    b\n\nEnd") and read(".. math:: a\n\nEnd").endswith("</p>\n\nEnd")
