# SPDX-License-Identifier: Apache-2.0
"""What an experiment found: one record per training, medians and spread per level, tickets against controls."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from torch import Tensor

from .. import checkpoint
from .masks import Masks

KINDS = ("ticket", "reinit", "random", "oneshot")  # in the order of tables


@dataclass(frozen=True)
class Training:
    """One training of an experiment.

    Attributes:
        kind: ``"ticket"``, ``"reinit"``, ``"random"`` or ``"oneshot"``. seed, level: of it.
        density: P_m, of all prunable weights; densities: per layer.
        early: iteration of least validation loss; early_loss: that loss; early_validation, early_test: accuracies there.
        end: the last iteration; end_loss, end_validation, end_test: there.
        seconds: of its iterations, without evaluations. trainer: what ran it.

    Accuracies are in per cent.
    """

    kind: str
    seed: int
    level: int
    density: float
    densities: dict[str, float]
    early: int
    early_loss: float
    early_validation: float
    early_test: float
    end: int
    end_loss: float
    end_validation: float
    end_test: float
    seconds: float
    trainer: str


@dataclass(frozen=True)
class Row:
    """All seeds of a kind at a level: medians, and the standard error of the mean of the accuracy at the end."""

    kind: str
    level: int
    density: float
    seeds: int
    early: float
    early_test: float
    end_test: float
    error: float
    seconds: float


@dataclass(frozen=True)
class Lottery:
    """A finished or unfinished experiment, read from its folder."""

    folder: Path
    settings: dict[str, Any]
    trainings: tuple[Training, ...]

    @classmethod
    def load(cls, folder: str | Path) -> Lottery:
        """Read what is there.

        Raises:
            FileNotFoundError: no experiment there. ValueError: a damaged result, or damaged settings.
        """
        place = Path(folder)
        if not (place / "settings.json").is_file():
            raise FileNotFoundError(f"Lottery.load: no experiment at {place}; it must hold settings.json")
        found = []
        for path in sorted(place.glob("seed-*/*/level-*/result.json")):
            try:
                found.append(_training(json.loads(path.read_text())))
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(
                    f"Lottery.load: {path} must be the result of a training, got a damaged file ({e})"
                ) from None
        try:
            settings = dict(json.loads((place / "settings.json").read_text()).items())
        except (ValueError, AttributeError) as e:
            where = place / "settings.json"
            raise ValueError(
                f"Lottery.load: {where} must be the settings of an experiment, got a damaged file ({e})"
            ) from None
        return cls(place, settings, tuple(sorted(found, key=lambda t: (KINDS.index(t.kind), t.seed, t.level))))

    def place(self, level: int, *, seed: int = 0, kind: str = "ticket") -> Path:
        """The folder of a training.

        Raises:
            FileNotFoundError: it was not run.
        """
        folder = self.folder / f"seed-{seed}" / kind / f"level-{level:02d}"
        if not folder.is_dir():
            raise FileNotFoundError(f"Lottery: no level {level} of {kind}, seed {seed}, in {self.folder}")
        return folder

    def masks(self, level: int, *, seed: int = 0, kind: str = "ticket") -> Masks:
        """Of a training."""
        return Masks.load(self.place(level, seed=seed, kind=kind) / "masks.safetensors")

    def state(self, level: int, *, seed: int = 0, kind: str = "ticket") -> dict[str, Tensor]:
        """The weights that a training ended with."""
        return checkpoint.load(self.place(level, seed=seed, kind=kind) / "model.safetensors")

    def start(self, *, seed: int = 0) -> dict[str, Tensor]:
        """The weights that tickets are put back to: θ_k, or θ₀ without rewinding."""
        name = "rewind" if self.settings["rewind"] else "start"
        return checkpoint.load(self.folder / f"seed-{seed}" / f"{name}.safetensors")

    def curve(self, level: int, *, seed: int = 0, kind: str = "ticket") -> list[dict[str, float]]:
        """iteration, loss, accuracy, test of each evaluation; NaN where the test was not looked at."""
        result = json.loads((self.place(level, seed=seed, kind=kind) / "result.json").read_text())
        curve: list[dict[str, float]] = result["curve"]
        return curve

    def rows(self) -> list[Row]:
        """Kinds and levels, over seeds."""
        groups: dict[tuple[str, int], list[Training]] = {}
        for t in self.trainings:
            groups.setdefault((t.kind, t.level), []).append(t)
        return [
            Row(
                kind, level, fmean(t.density for t in group), len(group), median(t.early for t in group),
                median(t.early_test for t in group), median(t.end_test for t in group),
                _error([t.end_test for t in group]), median(t.seconds for t in group),
            )
            for (kind, level), group in groups.items()
        ]  # fmt: skip

    def paired(
        self,
        level: int,
        other: str,
        value: Callable[[Training], float] = lambda t: t.end_test,
        *,
        other_level: int | None = None,
    ) -> dict[int, float]:
        """Seed -> ticket minus another kind's training, at a level; for ``other="ticket"`` with another level (0: dense)."""
        at = level if other_level is None else other_level
        mine = {t.seed: value(t) for t in self.trainings if t.kind == "ticket" and t.level == level}
        theirs = {t.seed: value(t) for t in self.trainings if t.kind == other and t.level == at}
        return {seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs}

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not a number is null."""
        plain: dict[str, Any] = {
            "settings": self.settings,
            "rows": [vars(row) for row in self.rows()],
            "trainings": [vars(t) for t in self.trainings],
        }
        finite: dict[str, Any] = _finite(plain)
        return finite

    def table(self) -> str:
        """Markdown: one line per level, kinds side by side."""
        rows = {(r.kind, r.level): r for r in self.rows()}
        kinds = list(dict.fromkeys(kind for kind, _ in rows))
        lines = [
            "| level | P_m % | " + " | ".join(f"{kind} % | early stop" for kind in kinds) + " | s |",
            "|---|---|" + "---|---|" * len(kinds) + "---|",
        ]
        for level in sorted({level for _, level in rows}):
            cells = []
            for kind in kinds:
                row = rows.get((kind, level))
                cells += ["", ""] if row is None else [f"{row.end_test:.2f}{_spread(row.error)}", f"{row.early:.0f}"]
            first = next(rows[kind, level] for kind in kinds if (kind, level) in rows)
            lines.append(f"| {level} | {100 * first.density:.2f} | " + " | ".join(cells) + f" | {first.seconds:.1f} |")
        return "\n".join(lines)


def _training(plain: Mapping[str, Any]) -> Training:
    """What a result says, each value of its kind.

    Raises:
        KeyError, TypeError, ValueError: it does not.
    """
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "dict[str, float]": dict}
    for field in fields(Training):
        if not isinstance(plain[field.name], kinds[str(field.type)]):
            raise TypeError(f"{field.name} is {plain[field.name]!r}")
    if plain["kind"] not in KINDS:
        raise ValueError(f"kind is {plain['kind']!r}")
    return Training(**{field.name: plain[field.name] for field in fields(Training)})


def _error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")


def _spread(error: float) -> str:
    return "" if math.isnan(error) else f" ± {error:.2f}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
