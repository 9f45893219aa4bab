# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does not check of the site that it built: nothing from elsewhere, and every public name in the reference.

Run as a script, it prints the packages that build the site (the extra ``docs`` of pyproject.toml).
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("merging", "ranking", "soups", "tickets", "ops", "compat")
MODULES = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers", "latex2mathml")
# What a browser fetches by itself; a link that a reader may follow is no such thing.
FETCHED = re.compile(
    r"<(?:script|img|iframe|source|video|audio)[^>]*\bsrc=\"(?:https?:)?//[^\"]*\"|<link[^>]*>", re.IGNORECASE
)
FOREIGN = re.compile(r"(?:href|src)=\"(?:https?:)?//[^\"]*\"")
FOREIGN_STYLE = re.compile(r"@import[^;]*//[^;]*;|url\(\s*['\"]?(?:https?:)?//[^)]*\)")


def missing() -> str | None:
    """The first package that is not there, by its module."""
    return next((name for name in MODULES if find_spec(name) is None), None)


def requirements() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(r"^docs = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]


def exported(path: Path) -> list[str]:
    """``__all__`` of a module, which is not imported."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "__all__":
            return ast.literal_eval(statement.value)
    raise ValueError(f"{path} has no __all__")


def names() -> list[str]:
    """Every name that the reference must describe."""
    return [f"zipfast.{r}.{n}" for r in ROOMS for n in exported(ROOT / "zipfast" / r / "__init__.py")]


def problems(place: Path) -> list[str]:
    """What is wrong with the site in ``place``, a line each."""
    wrong, described = [], set()
    for page in sorted(place.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        described.update(re.findall(r"<h\d id=\"(zipfast[^\"]*)\"", text))
        for tag in FETCHED.findall(text):
            if (found := FOREIGN.search(tag)) and "canonical" not in tag:
                wrong.append(f"{page.relative_to(place)} fetches {found[0]}")
        if "autorefs-broken" in text or re.search(r"<(?:p|li|dd)>[^<]*\.\. \w+::", text):
            wrong.append(f"{page.relative_to(place)} shows markup of a docstring")
    for sheet in sorted(place.rglob("*.css")):
        wrong += [
            f"{sheet.relative_to(place)} fetches {f}" for f in FOREIGN_STYLE.findall(sheet.read_text(encoding="utf-8"))
        ]
    wrong += [f"the reference lacks {name}" for name in names() if name not in described]
    index = place / "api" / "index.html"
    listed = index.read_text(encoding="utf-8") if index.exists() else ""
    for name in exported(ROOT / "zipfast" / "__init__.py"):
        if not name.startswith("_") and f">zipfast.{name}</code>" not in listed:
            wrong.append(f"api/index.md lacks zipfast.{name}")
    return wrong


if __name__ == "__main__":
    print(*(f"'{r}'" if " " in r else r for r in requirements()))
