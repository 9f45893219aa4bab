# SPDX-License-Identifier: Apache-2.0
"""What the public lottery-ticket framework open_lth (github.com/facebookresearch/open_lth at 2ce732f) leaves in its folders.

Its layout: ``<root>/lottery_<hash>/replicate_<r>/level_<n>/<experiment>/`` with ``mask.pth`` (int32 tensors of 0 and 1 by
name), ``sparsity_report.json``, ``model_ep<e>_it<i>.pth`` (state dicts) and ``logger`` (lines "name,iteration,value"). All
of it is read without running code from it; the masks become :class:`zipfast.tickets.Masks`, 1 bit a weight in place of 32.

:func:`prune` is its pruning step, defects included, for masks that must be those it would have made; for new work use
:meth:`zipfast.tickets.Masks.prune`, which drops exactly as many as asked.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..ops import threshold
from ..ops._mask import pack, unpack
from ..ops.threshold import FINITE
from ..tickets.masks import Masks

MASK, REPORT, LOGGER = "mask.pth", "sparsity_report.json", "logger"
_MODEL = re.compile(r"model_ep(\d+)_it(\d+)\.pth")
_LEVEL = re.compile(r"level_(\d+)")


@dataclass(frozen=True)
class Level:
    """One level of an experiment: the folder with its mask.

    Attributes:
        number: 0 is the dense network.
        folder: where `mask.pth` lies.
        steps: (epoch, iteration within it) of the models that were saved, first to last.
    """

    number: int
    folder: Path
    steps: tuple[tuple[int, int], ...]

    def masks(self) -> Masks:
        """Its masks, see :func:`read_masks`."""
        return read_masks(self.folder)

    def state(self, step: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The weights at a step (default: the last), with what is dead set to 0; a plain state dict.

        Raises:
            ValueError: no model of that step; a file that is damaged, or of another network than the masks.
        """
        chosen = step if step is not None else self.steps[-1] if self.steps else None
        if chosen is None or chosen not in self.steps:
            there = ", ".join(f"{ep, it}" for ep, it in self.steps) or "none"
            wanted = "a model of its end" if step is None else f"a model of step {step}"
            raise ValueError(f"Level.state: {self.folder} must hold {wanted}, got models of {there}")
        found = checkpoint.load(self.folder / f"model_ep{chosen[0]}_it{chosen[1]}.pth")
        found = {name: value.clone() for name, value in found.items()}
        self.masks().apply_(found)
        return found

    def start(self) -> dict[str, Tensor]:
        """The weights that its training began with: what survivors were rewound to."""
        if not self.steps:
            raise ValueError(f"Level.start: {self.folder} must hold a model of its start, got none")
        return self.state(self.steps[0])

    def log(self) -> dict[str, list[tuple[int, float]]]:
        """What was measured: name ("test_accuracy", "test_loss" ...) -> (iteration, value); see :func:`read_log`."""
        return read_log(self.folder / LOGGER)


def read_masks(source: str | os.PathLike[str]) -> Masks:
    """Masks from a `mask.pth`, or from the folder of a level.

    Args:
        source: the file; the folder that holds it; or ``level_<n>``, whose experiment ``main`` is taken.

    Returns:
        Masks, with the level in their facts where the path tells it.

    Raises:
        FileNotFoundError: none there. ValueError: damaged, code in the file (it is not run), values other than 0 and 1, or
        another number of survivors than the sparsity report beside it says.

    Example:
        >>> import tempfile
        >>> level = Path(tempfile.mkdtemp()) / "level_2" / "main"
        >>> _ = write_masks(Masks.from_dense({"fc.weight": torch.tensor([[1, 0], [1, 1]])}), level)
        >>> found = read_masks(level.parent)
        >>> found.density, found.facts["level"]
        (0.75, 2)
    """
    path = Path(source)
    if path.is_dir():
        places = [path / MASK, path / "main" / MASK]
        path = next((p for p in places if p.is_file()), places[0])
    if not path.is_file():
        raise FileNotFoundError(f"read_masks: {source} must be a {MASK} of open_lth, or hold one, got none")
    dense = checkpoint.load(path)
    for name, mask in dense.items():
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"read_masks: {path} must hold masks of 0 and 1, got other values in {name!r}")
    if not dense:
        raise ValueError(f"read_masks: {path} must hold a mask, got none")
    bits = {name: pack((mask != 0).reshape(-1)) for name, mask in dense.items()}
    facts: dict[str, object] = {"rule": "open_lth"}
    if (number := _level_of(path)) is not None:
        facts["level"] = number
    found = Masks(bits, {name: tuple(mask.shape) for name, mask in dense.items()}, facts)
    _check_report(path.with_name(REPORT), found)
    return found


def write_masks(masks: Masks, folder: str | os.PathLike[str]) -> Path:
    """`mask.pth` and `sparsity_report.json` as open_lth writes and reads them; the folder is made where it is not there.

    Returns:
        The path of the mask.

    Raises:
        OSError: the folder cannot be written.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with checkpoint.atomic_write(place / MASK) as file:
        torch.save({name: mask.int() for name, mask in masks.dense().items()}, file)
    report = {"total": float(sum(masks.sizes.values())), "unpruned": float(sum(masks.alive.values()))}
    with checkpoint.atomic_write(place / REPORT, "w") as file:
        json.dump(report, file, indent=4)
    return place / MASK


def levels(folder: str | os.PathLike[str], experiment: str = "main") -> list[Level]:
    """The levels of a run that have a mask, in order.

    Args:
        folder: ``replicate_<r>``, or a ``lottery_<hash>`` that holds one replicate only.
        experiment: ``main``, or the name of a branch.

    Raises:
        FileNotFoundError: no such folder. ValueError: several replicates, or no level.
    """
    place = Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"levels: no folder at {place}")
    replicates = sorted(p for p in place.glob("replicate_*") if p.is_dir())
    if len(replicates) > 1:
        names = ", ".join(p.name for p in replicates)
        raise ValueError(f"levels: 'folder' must be one replicate, got {place} with {names}; name one of them")
    found = []
    for path in (replicates[0] if replicates else place).iterdir():
        number, own = _LEVEL.fullmatch(path.name), path / experiment
        if number is not None and (own / MASK).is_file():
            models = [_MODEL.fullmatch(file.name) for file in own.iterdir()]
            steps = sorted((int(m[1]), int(m[2])) for m in models if m is not None)
            found.append(Level(int(number[1]), own, tuple(steps)))
    if not found:
        raise ValueError(f"levels: {place} must hold level_0/{experiment}/{MASK} and so on, got none")
    return sorted(found, key=lambda level: level.number)


def read_log(path: str | os.PathLike[str]) -> dict[str, list[tuple[int, float]]]:
    """A `logger` file: name -> (iteration, value) in the order of iterations.

    Raises:
        FileNotFoundError: no such file. ValueError: a line of another form.
    """
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            name, iteration, value = line.split(",")
            found.setdefault(name, {})[int(iteration)] = float(value)
        except ValueError:
            raise ValueError(
                f"read_log: line {number} of {path} must be 'name,iteration,value', got {line[:60]!r}"
            ) from None
    return {name: sorted(values.items()) for name, values in found.items()}


def export(level: Level, out: str | os.PathLike[str], *, start: bool = False) -> tuple[Path, Path]:
    """A level as ``zipfast ticket export`` writes one: a plain state dict, and its masks beside it.

    Args:
        out: ends in .safetensors; the masks go to ``<name>.masks.safetensors``.
        start: the weights that its training began with; else those of its end.

    Returns:
        (path of the state, path of the masks).

    Raises:
        ValueError, OSError: as `Level.state`, and :func:`zipfast.checkpoint.save`.
    """
    path = Path(out)
    checkpoint.check_writable(path)
    masks, state = level.masks(), level.start() if start else level.state()
    step = level.steps[0 if start else -1]
    beside = path.with_name(f"{path.stem}.masks.safetensors")
    masks.save(beside)
    about = {"kind": "ticket", "level": level.number, "epoch": step[0], "iteration": step[1], "density": masks.density}
    checkpoint.save(path, state, {**about, "masks": beside.name, "source": "open_lth"})
    return path, beside


def prune(
    masks: Masks,
    trained_model: nn.Module | Mapping[str, Tensor],
    pruning_fraction: float = 0.2,
    pruning_layers_to_ignore: str | None = None,
) -> Masks:
    """Its strategy ``sparse_global``, to the mask.

    The number to drop is k = ceil(fraction · survivors of all tensors, those ignored too). All survivors that are not above
    the magnitude of place k (from 0), among those not ignored, go: k + 1 of them, and all that are equal to the last one.

    Args:
        masks: so far; ``Masks.ones(model)`` at first.
        trained_model: what has the weights of the masks, by name.
        pruning_fraction: in [0, 1).
        pruning_layers_to_ignore: names with commas between them, as its option takes them.

    Raises:
        ValueError: a fraction out of range; a name that has no mask (there, it is silently not ignored); NaN; no survivor of
        place k, as with a fraction of 1 (there: IndexError).

    Reference: Frankle et al. 2020 (Linear mode connectivity and the lottery ticket hypothesis, arXiv 1912.05671), whose code
    it is.
    """
    weights = masks.check(trained_model, "open_lth.prune")
    if not 0 <= pruning_fraction <= 1:
        raise ValueError(f"open_lth.prune: 'pruning_fraction' must be in [0, 1], got {pruning_fraction}")
    ignored = pruning_layers_to_ignore.split(",") if pruning_layers_to_ignore else []
    if unknown := [name for name in ignored if name not in masks.bits]:
        there = ", ".join(list(masks)[:6])
        raise ValueError(f"open_lth.prune: 'pruning_layers_to_ignore' must name masks ({there}), got {unknown[0]!r}")
    names = [name for name in masks if name not in ignored]
    alive = masks.alive
    count, ranked = math.ceil(pruning_fraction * sum(alive.values())), sum(alive[name] for name in names)
    if count >= ranked:
        raise ValueError(
            f"open_lth.prune: 'pruning_fraction' must leave a survivor to compare with, got {pruning_fraction}: {count} of "
            f"the {ranked} that may go; use Masks.prune"
        )
    tensors = [weights[name].detach() for name in names]
    before = [masks.bits[name].to(t.device) for name, t in zip(names, tensors)]
    kept, status = threshold(tensors, before, [count + 1], [0] * len(names))
    for name, place in zip(names, status[: len(names)].tolist()):
        if place != FINITE:
            raise ValueError(f"open_lth.prune: weights must be numbers, got NaN in {name!r} at flat index {place}")
    alive_before, alive_after = ([unpack(b, t.shape) for b, t in zip(bits, tensors)] for bits in (before, kept))
    gone = [t.abs()[old & ~new] for t, old, new in zip(tensors, alive_before, alive_after)]
    last = max(t.max() for t in gone if t.numel())
    bits = [pack((new & (t.abs() > last)).reshape(-1)).cpu() for t, new in zip(tensors, alive_after)]
    facts = {"rule": "open_lth", "level": int(masks.facts.get("level", 0)) + 1, "parent": masks.hash()}
    return Masks({**masks.bits, **dict(zip(names, bits))}, masks.shapes, facts)


def _level_of(path: Path) -> int | None:
    for part in reversed(path.absolute().parts):
        if number := _LEVEL.fullmatch(part):
            return int(number[1])
    return None


def _check_report(path: Path, masks: Masks) -> None:
    if not path.is_file():
        return
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        total, alive = int(report["total"]), int(report["unpruned"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(
            f"read_masks: {path} is damaged ({type(e).__name__}: {e}); delete it to read the mask alone"
        ) from None
    # open_lth sums in float32 at level 0: beyond 2^24 weights its report is rounded
    own = (sum(masks.sizes.values()), sum(masks.alive.values()))
    if any(abs(a - b) > 1e-6 * b for a, b in zip((total, alive), own)):
        raise ValueError(
            f"read_masks: the mask beside {path} must have the {alive} survivors of {total} that it tells, got {own[1]} of "
            f"{own[0]}"
        )
