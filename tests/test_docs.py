# SPDX-License-Identifier: Apache-2.0
"""What the pages show is so: their code runs, their commands parse, their names exist, the papers' functions are there.

A page is every .md file under docs, README.md, CONTRIBUTING.md and examples/README.md, found here, not listed. What a block
is for follows from its language:

python              executed, from the top of the page to its end, in one namespace, in an empty folder, under a fixed seed
py                  Python that needs what no test can have (downloads, hardware): compiled, not executed
sh                  ``zipfast`` commands that are executed, in their order with the code, in the same folder
anything else       shown only; but every ``zipfast`` command in it is parsed, so that no option in it has gone

What a page takes for granted (the user's model, files) comes before its code: in ``<!-- setup ... -->`` comments of the
page, or for README.md from SETUP in docs_setup.py. ``<!-- needs: a, b -->`` names packages without which it is skipped.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import random
import re
import shlex
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from docs_setup import NUMBERS, OPTIONS, SETUP

import zipfast
import zipfast.commands
from zipfast import cli

ROOT = Path(__file__).resolve().parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8") for path in [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
}
FENCE = re.compile(r"^([ \t]*)(```+|~~~+)[ \t]*([\w-]*)[^\n]*\n(.*?)^\1\2[ \t]*$", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(r"<!-- setup.*?\n(.*?)-->", re.DOTALL)
NEEDS = re.compile(r"<!-- needs: (.*?) -->")
COMMAND = re.compile(r"^\s*(?:\$ )?(?:\w+=\S+ )*(?:[\w.-]+ .*?-m )?(zipfast (?!-).*)$")


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of its first line, in the page


def blocks(text: str) -> list[Block]:
    found = [Block("python", m[1], text.count("\n", 0, m.start(1)) + 1) for m in HIDDEN.finditer(text)]
    shown = HIDDEN.sub(lambda m: "\n" * m[0].count("\n"), text)
    for m in FENCE.finditer(shown):
        found.append(Block(m[3], textwrap.dedent(m[4]), shown.count("\n", 0, m.start(4)) + 1))
    return found  # what is hidden comes first


def commands(block: Block) -> Iterator[tuple[int, list[str]]]:
    """The ``zipfast`` commands of a block, without ``zipfast``, each with its line in the page."""
    lines = re.sub(r"\\\n", "\0", block.code).split("\n")  # a command may go on in the next line
    line = block.line
    for text in lines:
        if found := COMMAND.match(text.replace("\0", " ")):
            yield line, shlex.split(found[1], comments=True)[1:]
        line += 1 + text.count("\0")


# A language that is not known here would be forgotten.
LANGUAGES = {"python", "py", "sh", "console", "text", "", "yaml", "toml", "json", "diff", "cpp", "bibtex"}
RUN = [name for name, text in PAGES.items() if any(b.language in ("python", "sh") for b in blocks(text))]
PARSED = [
    pytest.param(argv, id=f"{name}:{line}")
    for name, text in PAGES.items()
    for block in blocks(text)
    if block.language not in ("python", "sh")
    for line, argv in commands(block)
]


def test_blocks_and_commands_are_found() -> None:
    text = '<!-- setup: yours\nx = 1\n-->\n- a\n\n  ```python title="t"\n  y = x\n  ```\n\n'
    text += "```console\n$ A=1 zipfast rank a \\\n  b # c\n```\n"
    found = blocks(text)
    assert [(b.language, b.code, b.line) for b in found[:2]] == [("python", "x = 1\n", 2), ("python", "y = x\n", 7)]
    assert list(commands(found[2])) == [(11, ["rank", "a", "b"])]
    (torchrun,) = commands(Block("", "torchrun --nproc-per-node 2 -m zipfast zip a b\nzipfast --help\n", 1))
    assert torchrun == (1, ["zip", "a", "b"])
    assert len(RUN) >= 5 and len(PARSED) >= 8 and {*SETUP, *NUMBERS, *OPTIONS} <= set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_languages_say_what_is_executed(name: str) -> None:
    assert {block.language for block in blocks(PAGES[name])} <= LANGUAGES
    for block in blocks(PAGES[name]):
        if block.language == "py":
            compile("\n" * (block.line - 1) + block.code, str(ROOT / name), "exec")
        assert block.language != "" or not re.search(r"^(import|from) \w+", block.code, re.MULTILINE), (
            f"{name}:{block.line}"
        )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to be in, a cache of its own, seeds; what a page may change for the whole process is put back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, dtype, grad = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)


@pytest.mark.parametrize("name", RUN)
def test_code_of_page_runs(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGES[name]
    for shown, instead in NUMBERS.get(name, {}).items():
        assert shown in text, f"docs_setup.py: {name} has no {shown!r}"
        text = text.replace(shown, instead)
    for package in (p.strip() for found in NEEDS.findall(text) for p in found.split(",")):
        pytest.importorskip(package, reason=f"{name} needs {package}")
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(SETUP.get(name, ""), f"the setup of {name}", "exec"), names)
    for block in blocks(text):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / name), "exec"), names)  # errors name the line
        elif block.language == "sh":
            found = list(commands(block))
            assert len(found) == len([line for line in block.code.splitlines() if line.strip()]), (
                "zipfast commands only"
            )
            for line, argv in found:
                more = next((m for start, m in OPTIONS.get(name, {}).items() if " ".join(argv).startswith(start)), [])
                assert (cli.main([*argv, *more]), capsys.readouterr().err) == (0, ""), f"{name}:{line}"


@pytest.mark.parametrize("argv", PARSED)
def test_command_parses(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    def take(args: object) -> int:
        parsed.append(args)
        return 0

    for module in pkgutil.iter_modules(zipfast.commands.__path__):
        commands = importlib.import_module(f"zipfast.commands.{module.name}")
        if hasattr(commands, "run"):
            monkeypatch.setattr(commands, "run", take)
    for function, value in vars(cli).copy().items():
        if inspect.isfunction(value) and list(inspect.signature(value).parameters) == ["args"]:
            monkeypatch.setattr(cli, function, take)
    assert cli.main(argv) == 0 and len(parsed) == 1


@cache
def help_of(command: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0, command
    return shown.getvalue()


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if re.search(r"`zipfast \w", text)])
def test_commands_in_the_text_have_what_they_name(name: str) -> None:
    for command, rest in re.findall(r"`zipfast (\w+)([^`]*)`", FENCE.sub("", PAGES[name])):
        options = re.findall(r"(?<!\S)--[\w-]+", rest)
        words = re.findall(r"^ ([a-z]+)(?= |$)", rest)  # a sub-command
        for part in options + words:
            assert re.search(rf"(?<![\w-]){re.escape(part)}(?![\w-])", help_of(command)), (
                f"zipfast {command} has no {part}"
            )


def found(name: str) -> object:
    """What a dotted name means, as after ``import zipfast``; a module that must be imported by name counts."""
    parts = name.split(".")
    value: object = zipfast
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(value, part) and inspect.ismodule(value):
            importlib.import_module(".".join(parts[:i]))
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if "`zipfast." in text])
def test_names_exist(name: str) -> None:
    for dotted in set(re.findall(r"`(zipfast(?:\.\w+)+)", PAGES[name])):
        if not re.fullmatch(r"zipfast\.(json|ya?ml|toml)", dotted):  # files
            found(dotted)


def test_citation_is_of_this_version_and_of_papers_that_are_used() -> None:
    yaml = pytest.importorskip("yaml")
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert about["version"] == zipfast.__version__ and len(about["references"]) == 4
    for paper in about["references"]:
        title, number = (
            paper["title"].split(":")[0].split("!")[0],
            paper["identifiers"][0]["value"].removeprefix("arXiv:"),
        )
        row = next(line for line in PAGES["docs/papers.md"].splitlines() if number in line)
        assert (
            title in row and f" {paper['year']}" in row and row.startswith(f"| {paper['authors'][0]['family-names']} ")
        )


def test_every_function_of_the_papers_exists() -> None:
    rows = [
        line.split("|")[1:-1] for line in PAGES["docs/papers.md"].splitlines() if re.match(r"\| (?!paper|---)", line)
    ]
    assert len(rows) >= 40
    for row in rows:
        names = re.findall(r"`([^`]*)`", row[2])
        assert names, f"docs/papers.md: no function for {row[:2]}"
        for name in names:
            dotted = re.match(r"zipfast(?:\.\w+)+", name)
            assert dotted, f"docs/papers.md: {name} must be a full name, as it is found and linked by it"
            value = found(dotted[0])
            for option in re.findall(r"(\w+)=", name[dotted.end() :]):
                assert option in inspect.signature(value).parameters, f"{dotted[0]} has no argument {option}"  # type: ignore[arg-type]
