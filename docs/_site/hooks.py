# SPDX-License-Identifier: Apache-2.0
"""What the site has beside the pages in docs: texts that have their place elsewhere, links from names to the reference.

README.md, CONTRIBUTING.md, CHANGELOG.md and examples/README.md (the scripts below it) are pages as they stand, with their
links turned to where the page lies. Wherever a page names `zipfast.something` that the reference has, that is a link.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# path in the tree -> page of the site
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples/index.md",
}
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
HIDDEN = re.compile(r"<!-- (?:setup|needs:).*?-->\n*", re.DOTALL)  # for tests/test_docs.py
MODULES = re.compile(r"<!-- modules: zipfast\.(\w+), filled in when the site is built -->")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):<code>~?([^<]*)</code>")
SKIP = re.compile(r"<(pre|a|autoref|h[1-6])\b.*?</\1>", re.DOTALL)
NAME = re.compile(r"<code>(zipfast(?:\.\w+)+)((?:\([^<]*\))?)</code>")
NAMES = "<!-- names: zipfast.__all__, filled in when the site is built -->"


def public() -> dict[str, str]:
    """What `import zipfast` gives -> where the reference has it; from the source, as nothing is imported here."""
    tree = ast.parse((ROOT / "zipfast" / "__init__.py").read_text(encoding="utf-8"))
    found = {}
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.level == 1:
            room = f".{statement.module}" if statement.module else ""
            found |= {a.name: f"zipfast{room}.{a.name}" for a in statement.names if a.name[0] != "_"}
    return found


PUBLIC = public()


def page_of(path: str) -> str | None:
    """The page, and where on it, that a file of the tree has on the site; None if it has none."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/")
    if path.startswith("examples/") and path.endswith(".py"):
        return f"examples/index.md#{posixpath.basename(path).replace('.', '')}"
    return None


def turned(text: str, source: str, page: str) -> str:
    """A text whose links are relative to `source`, a file of the tree, with links as `page` needs them."""

    def turn(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        target = page_of(path)
        if target is None:
            return found[0]  # mkdocs says what is wrong with it
        name, _, anchor = target.partition("#")
        link = posixpath.relpath(name, posixpath.dirname(page) or ".")
        return f"]({link}{'#' + anchor if anchor else found[2] or ''})"

    return LINK.sub(turn, text)


def on_files(files: Files, config: Any) -> Files:
    for source, page in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source == "examples/README.md":
            for script in sorted((ROOT / "examples").glob("*.py")):
                text += f"\n## {script.name}\n\n```python\n{script.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, page, content=turned(text, source, page)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    markdown = MODULES.sub(_modules, HIDDEN.sub("", markdown))
    if NAMES in markdown:
        by_room: dict[str, list[str]] = {}
        for name, place in PUBLIC.items():
            by_room.setdefault(place.rpartition(".")[0], []).append(f"`zipfast.{name}`")
        rows = [f"| `{room}` | {', '.join(sorted(names))} |" for room, names in by_room.items()]
        markdown = markdown.replace(NAMES, "\n".join(["| of | names |", "|---|---|", *rows]))
    if page.file.generated_by:
        return markdown
    return turned(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    html = ROLE.sub(_role, html)
    parts, end = [], 0
    for skipped in SKIP.finditer(html):
        parts += [_linked(html[end : skipped.start()]), skipped[0]]
        end = skipped.end()
    return "".join([*parts, _linked(html[end:])])


def _modules(found: re.Match[str]) -> str:
    """A section for each module of a package that holds modules."""
    modules = sorted(p.stem for p in (ROOT / "zipfast" / found[1]).iterdir() if p.stem[0] not in "_.")
    full = [f"zipfast.{found[1]}.{module}" for module in modules]
    return "\n\n".join(f"## {m} {{ #{m} }}\n\n::: {m}\n    options:\n      heading_level: 3" for m in full)


def _role(found: re.Match[str]) -> str:
    """A name in a docstring: a full one is linked with all others; a short one here, where it is public."""
    name, _, rest = found[1].partition(".")
    if name not in PUBLIC:
        return f"<code>{found[1]}</code>"
    place = ".".join(filter(None, [PUBLIC[name], rest]))
    return f'<autoref identifier="{place}" optional><code>{found[1]}</code></autoref>'


def _linked(html: str) -> str:
    return NAME.sub(_reference, html)


def _reference(found: re.Match[str]) -> str:
    name, *rest = found[1].removeprefix("zipfast.").split(".")
    place = ".".join([PUBLIC.get(name, f"zipfast.{name}"), *rest])
    return f'<autoref identifier="{place}" optional><code>{found[1]}{found[2]}</code></autoref>'
