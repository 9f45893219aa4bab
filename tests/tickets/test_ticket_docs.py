# SPDX-License-Identifier: Apache-2.0
"""The messages in docs/tickets.md are what is said; tests/test_docs.py runs its code and its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from zipfast import checkpoint, cli
from zipfast.tickets import PRESETS, Masks

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "tickets.md").read_text(encoding="utf-8")
RUN = re.findall(r"^zipfast ticket run .* --out digits$", GUIDE, re.MULTILINE)
MESSAGES = re.findall(r"^\| `(.*?)` \| (.*) \|$", GUIDE[GUIDE.index("## Bad input") :], re.MULTILINE)
SHORT = ["--iterations", "30", "--every", "15", "--seeds", "0", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory):
    """Where everything runs: the messages are about an experiment there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.chdir(tmp_path_factory.mktemp("guide"))
        yield
    torch.set_num_threads(before)


def command(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    argv = shlex.split(line)
    assert argv[:2] == ["zipfast", "ticket"]
    status = cli.main(argv[1:] + (SHORT if argv[2] == "run" and "new" not in argv else ["--quiet"]))
    return status, capsys.readouterr().err


@pytest.fixture
def digits(capsys: pytest.CaptureFixture[str]) -> None:
    """The experiment of the guide's first commands, also where a test runs alone."""
    if not Path("digits").exists():
        assert command(RUN[0], capsys) == (0, "")


@pytest.mark.parametrize(("what", "message"), MESSAGES, ids=range(len(MESSAGES)))
def test_messages(digits: None, what: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if what.startswith("zipfast"):
        assert command(what, capsys) == (1, f"zipfast ticket: {message}\n")
        return
    net, nan = nn.Linear(4, 2), torch.zeros(2, 4)
    nan[1, 1] = torch.nan
    Path("half.safetensors").write_bytes(b"\x40" + bytes(7) + b"{")  # the first bytes of a file
    names = {"net": net, "nan": nan, "masks": Masks.ones(net), "Masks": Masks, "nn": nn, "checkpoint": checkpoint}
    with pytest.raises(ValueError) as error:
        eval(what, names)
    assert str(error.value) == message


def test_there_are_messages_and_every_preset_is_known() -> None:
    assert len(RUN) == 1 and len(MESSAGES) >= 8
    assert set(re.findall(r"--network (\S+)", GUIDE)) <= set(PRESETS)
