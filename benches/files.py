# SPDX-License-Identifier: Apache-2.0
"""Where results lie and what a file of them holds; without torch, so that a report costs no import of it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1


def results_folder() -> Path:
    return Path(os.environ.get("RESULTS") or ROOT / "benches" / "results")


def commit() -> str:
    if os.environ.get("ZIPFAST_COMMIT"):
        return os.environ["ZIPFAST_COMMIT"]
    if not (ROOT / ".git").exists():  # whatever checkout this tree may lie in is another's
        return "unknown"
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10)
        status = ["git", "status", "--porcelain", "--", "csrc", "zipfast"]
        changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return "unknown" if asked.returncode else asked.stdout.strip() + ("+changes" if changed else "")


def write_json(path: Path, document: Any) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as f:
            json.dump(document, f, indent=1, allow_nan=False)
            f.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would make a committed file unreadable for others
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


MACHINE = {"device", "cpu", "cores", "gpu", "torch", "python", "commit", "threads", "date"}
ROW = {"op", "case", "device", "threads", "backend", "ours", "peers", "percent_of_ceiling", "bound", "extra"}


def validate(document: Any) -> None:
    """Raises ValueError, naming the place, where a results file is not as the report reads it."""

    def need(where: str, value: Any, keys: set[str]) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, got {type(value).__name__}")
        if missing := sorted(keys - value.keys()):
            raise ValueError(f"{where} lacks {', '.join(missing)}")

    def number(where: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{where} must be a finite number, got {value!r}")

    need("results", document, {"schema", "op", "machine", "ceilings", "rows"})
    if document["schema"] != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {document['schema']!r}")
    need("machine", document["machine"], MACHINE)
    for i, ceiling in enumerate(document["ceilings"]):
        need(f"ceilings[{i}]", ceiling, {"name", "value", "unit", "threads"})
        number(f"ceilings[{i}].value", ceiling["value"])
    for i, row in enumerate(document["rows"]):
        need(f"rows[{i}]", row, ROW)
        if row["op"] != document["op"]:
            raise ValueError(f"rows[{i}].op must be {document['op']!r}, got {row['op']!r}")
        for place, t in (("ours", row["ours"]), *row["peers"].items()):
            keys = {"ms", "iqr_ms", "runs"} | (set() if place == "ours" else {"ratio", "ratio_q1", "ratio_q3"})
            need(f"rows[{i}].{place}", t, keys)
            for key in sorted(keys):
                number(f"rows[{i}].{place}.{key}", t[key])
