# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it writes, and one sentence for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import zipfast
from zipfast import cli, demo


def test_info_names_every_backend_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert zipfast.__version__ in text
    for name in ("torch", "cpu", "cuda", "emu"):
        reason = zipfast.ops.why_not(name)
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert (reason or "usable") in line


def test_info_as_json_and_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zipfast", "info", "--json"], capture_output=True, text=True, check=True
    )
    data = json.loads(done.stdout)
    assert data["zipfast"] == zipfast.__version__
    assert data["backends"]["torch"] == "usable"


def test_unknown_command_is_refused() -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(["zap"])
    assert e.value.code == 2


def test_demo_refuses_an_unwritable_folder_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "below")]) == 1
    assert "zipfast demo:" in capsys.readouterr().err


def test_a_short_demo_writes_model_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = demo.run(tmp_path, epochs=1)
    text = capsys.readouterr().out
    for row in result["accuracy"]:
        assert row in text
    assert "torch reference" in text
    assert json.loads((tmp_path / "demo.json").read_text())["accuracy"] == result["accuracy"]
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    metadata = zipfast.checkpoint.read_metadata(tmp_path / "merged.safetensors")
    assert metadata["options"]["method"] == "zip" and len(metadata["options"]["inputs"]) == 2
    zipfast.Plan.from_json(metadata["plan"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.json", "demo.png", "merged.safetensors"]
