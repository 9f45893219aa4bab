# SPDX-License-Identifier: Apache-2.0
"""What makes an experiment: arguments, checked before anything is written, and the settings.json of its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..features import batch_parts
from .masks import Masks, Rates
from .networks import prunable
from .optim import MODES
from .results import KINDS
from .task import Batches, Task
from .trainers import TRAINERS, wants_closure

CONTROLS = KINDS[1:]
GROWS = ("levels", "seeds", "controls", "control_levels")  # settings that a later run may add to


def refuse(
    task: Task,
    levels: int,
    rewind: int,
    controls: Sequence[str],
    control_levels: Sequence[int] | None,
    seeds: Sequence[int],
    every: int,
    mode: str,
    trainer: str,
) -> list[int]:
    """Raise ValueError for arguments of :func:`zipfast.lottery` that no experiment can have; the levels of the controls."""
    for control in controls:
        if control not in CONTROLS:
            raise ValueError(f"lottery: 'controls' must be of {', '.join(CONTROLS)}, got {control!r}")
    if levels < 0 or not seeds:
        raise ValueError(f"lottery: 'levels' must be 0 or more and there must be a seed, got {levels} and {len(seeds)}")
    if not 0 <= rewind < task.iterations:
        raise ValueError(f"lottery: 'rewind' must be in [0, {task.iterations}), got {rewind}")
    if trainer not in TRAINERS:
        raise ValueError(f"lottery: 'trainer' must be one of {', '.join(TRAINERS)}, got {trainer!r}")
    if mode not in MODES or every < 1:
        raise ValueError(
            f"lottery: 'mode' must be one of {', '.join(MODES)} and 'every' 1 or more, got {mode!r}, {every}"
        )
    wanted = range(1, levels + 1) if control_levels is None else control_levels
    if any(not 1 <= level <= levels for level in wanted):
        raise ValueError(f"lottery: 'control_levels' must be in [1, {levels}], got {list(wanted)}")
    return list(wanted)


def rates_by_name(model: nn.Module, masks: Masks, rates: Rates, scope: str, output: float | None) -> dict[str, float]:
    if isinstance(rates, Mapping):
        if output is not None:
            raise ValueError("lottery: 'output' must be None where 'rates' names layers; name the last one, too")
        return masks.rates(rates)
    factor = output if output is not None else (0.5 if scope == "layer" else 0.0)
    if not 0 <= factor * rates <= 1:
        raise ValueError(f"lottery: 'output' times the rate must be in [0, 1], got {factor} times {rates}")
    found, last = masks.rates(rates), list(prunable(model))[-1:]
    if len(found) > 1 and last and last[0] in found:
        found[last[0]] *= factor
    return found


def about(task: Task, model: nn.Module) -> dict[str, Any]:
    """What can be told of a task, to notice that a folder is of another one.

    Raises:
        ValueError: a network that is not the same for the same seed, or is the same object each time; an optimiser that
            wants a closure.
    """
    first, second = task.network(0), task.network(0)
    hashes = [checkpoint.state_hash(m.state_dict()) for m in (first, second)]
    if first is second or hashes[0] != hashes[1]:
        raise ValueError("Task: 'build' must make a new network at each call, with the same weights for the same seed")
    with torch.random.fork_rng(devices=[]):
        optimizer = task.optimizer([p for p in model.parameters() if p.requires_grad])
    if wants_closure(optimizer):
        raise ValueError(f"Task: 'optimizer' must step without a closure, got {type(optimizer).__name__}")
    schedule = [task.factor(i) for i in range(0, task.iterations, max(1, task.iterations // 1000))]
    chosen = prunable(model)
    found = {
        "network": {name: list(value.shape) for name, value in model.state_dict().items()},
        "modules": f"{type(model).__name__} {_hash(str(model))}",
        "weights of seed 0": hashes[0][:16],
        "not pruned": [n for n, p in model.named_parameters() if p.dim() > 1 and n not in chosen],
        "optimizer": {"name": type(optimizer).__name__, "groups": [_plain(group) for group in optimizer.param_groups]},
        "schedule": _hash(json.dumps(schedule)),
        "loss": _loss(task.loss), "clip_norm": task.clip_norm,
    }  # fmt: skip
    for name in ("train", "validation", "test"):
        found[name] = _loader(getattr(task, name), first_batch=name != "train")
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def check_seeds(task: Task, seeds: Sequence[int]) -> None:
    """That seeds draw different weights; said before anything is trained.

    Raises:
        ValueError: `build` gives the same weights whatever the seed.
    """
    one, two = (checkpoint.state_hash(task.network(seed).state_dict()) for seed in seeds[:2])
    if one == two:
        raise ValueError("Task: 'build' must draw its weights under torch's seed, got the same for two seeds")


def check_task(task: Task, settings: Mapping[str, Any], folder: Path, who: str) -> None:
    """That an experiment's settings are of this task.

    Raises:
        ValueError: they are not; what differs.
    """
    now = about(task, task.network(0))
    differ = [name for name in now if settings.get(name) != now[name]]
    if differ:
        shown = "; ".join(f"{n} was {short(settings.get(n))}, is {short(now[n])}" for n in differ)
        raise ValueError(f"{who}: the task must be that of {folder}, got another one ({shown})")


def _loss(loss: Any) -> str:
    """A function's name, or a module's with its plain attributes."""
    if not isinstance(loss, nn.Module):
        return str(getattr(loss, "__qualname__", repr(loss)))
    plain = {k: v for k, v in vars(loss).items() if not k.startswith("_") and isinstance(v, (int, float, str))}
    return f"{type(loss).__name__} {json.dumps(plain, sort_keys=True)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group, and the sizes of its parameters."""
    found = {k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in group.items()}
    plain = {k: v for k, v in found.items() if isinstance(v, (int, float, str, bool, tuple)) or v is None}
    return {**plain, "parameters": [p.numel() for p in group["params"]]}


def _loader(loader: Any, *, first_batch: bool) -> str:
    """What can be told of a loader without reading it; of one that is only evaluated on, its first labels, too."""
    if isinstance(loader, Batches):
        return checkpoint.state_hash({"data": loader.data, "labels": loader.labels})[:16] + f" by {loader.size}"
    facts = [type(loader).__name__]
    owners: tuple[tuple[str, Any], ...] = (("batches", loader), ("samples", getattr(loader, "dataset", None)))
    for what, owner in owners:
        try:
            facts.append(f"{len(owner)} {what}")
        except TypeError:
            continue  # without a length
    facts.append(f"by {getattr(loader, 'batch_size', None)}")
    labels = batch_parts(next(iter(loader), None))[1] if first_batch else None
    if isinstance(labels, Tensor):
        facts.append(checkpoint.state_hash({"labels": labels})[:16])
    return ", ".join(facts)


def kept(folder: Path, settings: dict[str, Any], sparse_below: Callable[[], float]) -> dict[str, Any]:
    """The settings of a folder: these, once; afterwards these must be those.

    The crossover from dense to sparse is measured once per experiment: a run that goes on elsewhere gives the same bits.
    """
    path = folder / "settings.json"
    checkpoint.check_folder(folder)
    folder.mkdir(exist_ok=True)
    if path.is_file():
        try:
            old = json.loads(path.read_text())
        except ValueError as e:
            raise ValueError(
                f"lottery: {path} must be the settings of an experiment, got a damaged file ({e})"
            ) from None
        differ = [k for k in settings if k not in GROWS and old.get(k) != settings[k]]
        if differ:
            shown = "; ".join(f"{k} was {short(old.get(k))}, is {short(settings[k])}" for k in differ)
            raise ValueError(
                f"lottery: {folder} must be of these settings, got another experiment ({shown}); choose another 'out'"
            )
        settings = {**old, **_grown(old, settings)}
    elif any(not re.fullmatch(r"\.settings\.json\..*\.tmp", file.name) for file in folder.iterdir()):
        raise ValueError(f"lottery: {folder} must be empty or an experiment's folder, got other files")
    else:
        settings = {**settings, "sparse_below": sparse_below()}
    with checkpoint.atomic_write(path, "w") as file:
        json.dump(settings, file, indent=1)
    return settings


def _grown(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """All that any run asked for."""
    found: dict[str, Any] = {"levels": max(old["levels"], new["levels"])}
    for name in GROWS[1:]:
        found[name] = list(dict.fromkeys([*old[name], *new[name]]))
    return {**found, "control_levels": sorted(found["control_levels"])}


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
