# SPDX-License-Identifier: Apache-2.0
"""What is finished of a ranking, line by line in a file, so that a killed run goes on with the next candidate."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import checkpoint, distributed
from .candidates import Source

FORMAT = "zipfast.ranking/1"


@dataclass(frozen=True)
class Ranked:
    """One candidate's result.

    Attributes:
        name, origin: what it is called, and what it was.
        how: which features were taken.
        scores: by metric, higher is better. intervals: (low, high) where one can be had in one pass.
        first: the part of the bootstrap replicates in which it is the best by the main metric; None without.
        samples, features: N and D; parameters: of the model, or None.
        seconds: "extract" (loading, forward passes, statistics) and "score" (with the bootstrap).
        notes: what the scores should be read with. error: why there are none.
        replicates: of the main metric, the same draws for every candidate.
    """

    name: str
    origin: str
    how: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    first: float | None = None
    samples: int = 0
    features: int = 0
    parameters: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str | None = None
    replicates: tuple[float, ...] = ()


class Journal:
    """Finished candidates, one JSON line each, in a folder; the first line says of which options.

    Rule: a line counts if it is whole. The line that a kill cut off is written again.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> None:
        self.path = None if folder is None else Path(folder) / "journal.jsonl"
        self.done: dict[tuple[str, str, str], list[Ranked]] = {}
        if self.path is None:
            return
        header = {"format": FORMAT, "options": json.loads(json.dumps(options)), "workers": distributed.world_size()}
        lines: list[str] = []
        if distributed.rank() == 0:
            checkpoint.check_folder(self.path.parent)
            self.path.parent.mkdir(exist_ok=True)
            lines = self._read(header)
        for line in distributed.gather(lines)[0]:  # all processes skip the same candidates
            entry = json.loads(line)
            self.done[entry["name"], entry["origin"], entry["stamp"]] = [_row(r) for r in entry["rows"]]

    def _read(self, header: Mapping[str, Any]) -> list[str]:
        assert self.path is not None
        text = self.path.read_text() if self.path.is_file() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()
        try:
            found = json.loads(lines[0]) if lines else header
            known = [json.loads(line).keys() >= {"name", "origin", "stamp", "rows"} for line in lines[1:]]
        except (ValueError, AttributeError):
            known = [False]
        if not all(known) or not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"rank: {self.path} must be a journal of this version, got another file; remove it")
        if found != header:
            old, new = found.get("options", {}), header["options"]
            differ = [key for key in new if old.get(key) != new[key]]
            other = "workers" if found.get("workers") != header["workers"] or not differ else differ[0]
            raise ValueError(
                f"rank: 'out' must be a folder for these options, got one with another '{other}' "
                f"({old.get(other, found.get(other))!r}, now {new.get(other, header.get(other))!r}); "
                f"choose another folder or remove {self.path}"
            )
        whole = "".join(line + "\n" for line in lines) or json.dumps(header) + "\n"
        if whole != text:
            with checkpoint.atomic_write(self.path, "w") as file:
                file.write(whole)
        return lines[1:]

    def rows_of(self, source: Source) -> list[Ranked] | None:
        """The rows of a candidate that is finished. Arrays in memory have no lasting name: they are scored again."""
        return None if source.origin == "arrays" else self.done.get((source.name, source.origin, source.stamp))

    def add(self, source: Source, rows: Sequence[Ranked]) -> None:
        """Failed candidates are left out, to be tried again."""
        if self.path is None or distributed.rank() > 0 or any(row.error is not None for row in rows):
            return
        with open(self.path, "a") as file:
            entry = {"name": source.name, "origin": source.origin, "stamp": source.stamp}
            file.write(json.dumps({**entry, "rows": [asdict(r) for r in rows]}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _row(plain: Mapping[str, Any]) -> Ranked:
    intervals = {name: (low, high) for name, (low, high) in plain["intervals"].items()}
    lists = {"notes": tuple(plain["notes"]), "replicates": tuple(plain["replicates"])}
    return Ranked(**{**plain, "intervals": intervals, **lists})
