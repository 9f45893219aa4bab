# SPDX-License-Identifier: Apache-2.0
"""Lottery-ticket experiments: train, prune, rewind, again (Frankle & Carbin 2019; Frankle et al. 2020), with their controls.

Each training is a folder that appears whole: out/seed-S/KIND/level-LL with model.safetensors (θ_T), masks.safetensors and
result.json. A killed run goes on from the last one, and inside it from its last checkpoint; a finished run does nothing.

    ticket    level 0 is the dense network; level L prunes the network of level L - 1 and rewinds it to θ_k
    reinit    the ticket's masks, other initial weights
    random    as many survivors in each layer, elsewhere, from θ_k
    oneshot   the dense network pruned to the level's density at once, from θ_k
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from .. import checkpoint
from .crossover import mlp_crossover
from .masks import Masks, Rates
from .results import Lottery, Training
from .settings import GROWS, about, check_seeds, kept, rates_by_name, refuse
from .task import Batches, Task, seed_of
from .trainers import why_not_mlp
from .training import Trained, train

State: TypeAlias = dict[str, torch.Tensor]
Make: TypeAlias = Callable[[], tuple[State, Masks, int]]  # initial state, masks, the iteration it stands at
MASKS, MODEL, RESULT = "masks.safetensors", "model.safetensors", "result.json"


@dataclass(frozen=True)
class _Run:
    """All that the trainings of an experiment share."""

    task: Task
    out: Path
    rates: dict[str, float]
    scope: str
    rewind: int
    every: int
    mode: str
    trainer: str
    sparse_below: float
    ones: Masks
    checkpoint_seconds: float
    identity: str
    progress: Callable[[str, int, int, int], None] | None


def lottery(
    task: Task,
    *,
    out: str | Path,
    levels: int = 20,
    rates: Rates = 0.2,
    scope: str = "layer",
    output: float | None = None,
    rewind: int = 0,
    controls: Sequence[str] = (),
    control_levels: Sequence[int] | None = None,
    seeds: Sequence[int] = (0,),
    every: int = 100,
    mode: str = "grad",
    trainer: str = "auto",
    only: str | None = None,
    ignore: str | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Callable[[str, int, int, int], None] | None = None,
) -> Lottery:
    """Find lottery tickets by iterative magnitude pruning, and compare them with their controls.

    Args:
        task: network, data, optimiser.
        out: folder of the experiment; made where it is not there, gone on with where it is.
        levels: rounds of pruning; level 0 is the dense network.
        rates: fraction of the survivors that goes in each round, one for all layers or by name or regular expression over
            whole names; a layer of rate 0, or without one, is never pruned and does not count in the density;
            :func:`zipfast.tickets.rate_for` gives that of a final density (with `output` 1).
        scope: ``"layer"``: of each layer; ``"global"``: of all layers of one rate together.
        output: factor of the rate of the last layer, where `rates` is one number; by default 0.5 for ``"layer"`` (as LeNet
            and Conv-2/4/6 in the paper), 0 for ``"global"`` (as its ResNet-18 and VGG-19).
        rewind: k; survivors go back to their weights after k iterations of the dense training (biases, norms and their
            statistics too), and the schedule and the data go on from there, with a fresh optimiser.
        controls: any of ``"reinit"``, ``"random"``, ``"oneshot"``.
        control_levels: their levels; None: all from 1 on.
        seeds: replicates: initial weights and order of the data.
        every: iterations between looks at the validation data.
        mode: where masks act, see :class:`zipfast.tickets.MaskedOptimizer`; ``"forward"`` is open_lth's.
        trainer: see :func:`zipfast.tickets.train`.
        only, ignore: regular expressions over the names of the weights to prune.
        checkpoint_seconds: between checkpoints within a training.
        progress: called with (kind, seed, level, iteration).

    Returns:
        :class:`Lottery`, read from the folder.

    Raises:
        ValueError: a folder of other settings (says which differ); a checkpoint that is damaged; what :class:`Masks` and
            :class:`Task` refuse. OSError: the folder cannot be written.

    Cost: levels + 1 trainings per seed, and one per control and level; the ``mlp`` trainer's fall with the density.

    Reference: Frankle & Carbin 2019 (lottery tickets, arXiv 1803.03635), §1-4; Frankle et al. 2020 (arXiv 1912.05671), §3.
    """
    folder, seeds = Path(out), [int(seed) for seed in seeds]
    wanted = refuse(task, levels, rewind, controls, control_levels, seeds, every, mode, trainer)
    model = task.network(seeds[0])
    masks = Masks.ones(model, only=only, ignore=ignore)
    found = {name: rate for name, rate in rates_by_name(model, masks, rates, scope, output).items() if rate > 0}
    if not found:
        raise ValueError("lottery: a rate must be above 0 for one layer at least, got 0 for all")
    masks = Masks({n: masks.bits[n] for n in found}, {n: masks.shapes[n] for n in found}, masks.facts)
    masks.prune(model, found, scope=scope)  # whatever it refuses is said now, and not after the first training
    settings = {
        "iterations": task.iterations, "rates": found, "scope": scope, "rewind": rewind, "every": every, "mode": mode,
        "trainer": trainer, **about(task, model), "levels": levels, "seeds": list(seeds), "controls": list(controls),
        "control_levels": wanted,
    }  # fmt: skip
    if len(seeds) > 1 or "reinit" in controls:
        check_seeds(task, [*seeds, -1])
    reason = why_not_mlp(task, model, mode)
    if trainer == "mlp" and reason is not None:
        raise ValueError(f"lottery: trainer 'mlp' cannot be used: {reason}")
    sparse = reason is None and trainer != "torch"
    size = task.train.size if isinstance(task.train, Batches) else 1
    settings = kept(folder, settings, lambda: mlp_crossover(model, batch=size) if sparse else 0.0)
    identity = hashlib.sha256(
        json.dumps({k: v for k, v in settings.items() if k not in GROWS}, sort_keys=True).encode()
    ).hexdigest()[:16]
    run = _Run(
        task, folder, found, scope, rewind, every, mode, trainer, settings["sparse_below"], masks,
        checkpoint_seconds, identity, progress,
    )  # fmt: skip
    for seed in seeds:
        _replicate(run, seed, levels, controls, wanted)
    return Lottery.load(folder)


def _replicate(run: _Run, seed: int, levels: int, controls: Sequence[str], control_levels: list[int]) -> None:
    """All trainings of one seed: the tickets from dense to sparse, then the controls."""
    place = run.out / f"seed-{seed}"
    place.mkdir(exist_ok=True)
    start = _start(run, seed)
    ladder = [_level(run, seed, "ticket", 0, lambda: (start, run.ones, 0))]
    rewound = start if run.rewind == 0 else _read(place / "rewind.safetensors")
    for level in range(1, levels + 1):
        make: Make = partial(_ticket, run, rewound, ladder[-1])
        ladder.append(_level(run, seed, "ticket", level, make))
        if not _read(ladder[-1] / MASKS, run).within(_read(ladder[-2] / MASKS, run)):
            raise ValueError(
                f"lottery: {ladder[-1]} must be within the level before, got other masks; delete it and run again"
            )
    for control in controls:
        for level in control_levels:
            make = partial(_control, run, seed, control, level, rewound, ladder[level], ladder[0])
            _level(run, seed, control, level, make)


def _ticket(run: _Run, rewound: State, before: Path) -> tuple[State, Masks, int]:
    """The masks after one more round, by the weights that the level before ended with."""
    try:
        masks = _read(before / MASKS, run).prune(_read(before / MODEL), run.rates, scope=run.scope)
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith("lottery") else f"lottery: {before / MODEL}: {e}") from None
    return rewound, masks, run.rewind


def _control(
    run: _Run, seed: int, control: str, level: int, rewound: State, ticket: Path, dense: Path
) -> tuple[State, Masks, int]:
    masks = _read(ticket / MASKS, run)
    if control == "reinit":
        return dict(run.task.network(seed_of(seed, "reinit", level) % (1 << 63)).state_dict()), masks, 0
    if control == "random":
        return rewound, masks.shuffled(seed_of(seed, "random", level)), run.rewind
    return rewound, _oneshot(run, dense, masks), run.rewind


def _start(run: _Run, seed: int) -> State:
    """θ₀, from its file once there is one."""
    path = run.out / f"seed-{seed}" / "start.safetensors"
    if path.exists():
        started: State = _read(path)
        return started
    state = {name: value.detach().clone() for name, value in run.task.network(seed).state_dict().items()}
    checkpoint.save(path, state, {"identity": run.identity, "seed": seed})
    return state


def _oneshot(run: _Run, dense: Path, ticket: Masks) -> Masks:
    """The dense network pruned at once, to as many survivors as the ticket has: of each layer, or of each pool of layers."""
    masks, weights = _read(dense / MASKS, run), _read(dense / MODEL)
    sizes, alive = masks.sizes, ticket.alive
    pools, _ = masks.pools(run.rates, run.scope)
    bits = dict(masks.bits)
    for pool in pools:
        part = Masks({n: masks.bits[n] for n in pool}, {n: masks.shapes[n] for n in pool})
        drop = sum(sizes[n] - alive[n] for n in pool)
        bits |= part.prune({n: weights[n] for n in pool}, drop).bits
    return Masks(bits, masks.shapes, {"rule": "oneshot", "scope": run.scope, "level": ticket.facts.get("level")})


def _level(run: _Run, seed: int, kind: str, level: int, make: Make) -> Path:
    """One training, unless its folder is there; the folder."""
    place = run.out / f"seed-{seed}" / kind
    folder = place / f"level-{level:02d}"
    unfinished = place / f"level-{level:02d}.partial.safetensors"
    identity = f"{run.identity}/{seed}/{kind}/{level}"
    if folder.exists():
        unfinished.unlink(missing_ok=True)  # of a run that was killed just after it had finished the level
        _check_level(folder, identity)
        return folder
    place.mkdir(exist_ok=True)
    for left in place.glob(f".{folder.name}.*.tmp"):  # of a run that was killed while it wrote
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    state, masks, first = make()
    model = run.task.network(seed)
    masks.rewind_(model, state)

    def keep(_: int, network: nn.Module) -> None:
        checkpoint.save(
            run.out / f"seed-{seed}" / "rewind.safetensors", network.state_dict(), {"iteration": run.rewind}
        )

    tell = run.progress
    done = train(
        run.task, model, masks, seed=seed, start=first, every=run.every, mode=run.mode, trainer=run.trainer,
        sparse_below=run.sparse_below, partial=unfinished, checkpoint_seconds=run.checkpoint_seconds,
        identity=f"{identity}/{masks.hash()[:16]}",
        keep=keep, keep_at=run.rewind if kind == "ticket" and level == 0 and run.rewind else None,
        progress=None if tell is None else partial(tell, kind, seed, level),
    )  # fmt: skip
    masks.apply_(model)  # in mode "forward" what is dead has moved
    result = {"identity": identity, **_result(kind, seed, level, masks, done)}
    with checkpoint.atomic_folder(folder) as temporary:
        checkpoint.save(temporary / MODEL, model.state_dict(), {"identity": run.identity})
        masks.save(temporary / MASKS)
        (temporary / RESULT).write_text(json.dumps({**result, "curve": [vars(p) for p in done.curve]}, indent=1))
    unfinished.unlink(missing_ok=True)
    return folder


def _check_level(folder: Path, identity: str) -> None:
    """That a level's folder is of this experiment, and whole."""
    try:
        found = json.loads((folder / RESULT).read_text())["identity"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ValueError(f"lottery: {folder} is damaged ({type(e).__name__}: {e}); delete it and run again") from None
    if found != identity:
        raise ValueError(f"lottery: {folder} is a level of another experiment, seed or kind; delete it and run again")


def _read(path: Path, run: _Run | None = None) -> Any:
    """A state dict, or with `run` masks of its network, from a level's folder; what is damaged is named with its cure."""
    try:
        if run is None:
            return checkpoint.load(path)
        masks = Masks.load(path)
        masks.within(run.ones)
        return masks
    except (ValueError, FileNotFoundError) as e:
        reason = str(e).split(";")[0].removeprefix("load: ")
        place = path.parent if path.parent.name.startswith("level-") else path.parent.parent / path.parent.name
        raise ValueError(f"lottery: {path} cannot be used ({reason}); delete {place} and run again") from None


def _result(kind: str, seed: int, level: int, masks: Masks, done: Trained) -> dict[str, Any]:
    early, end = done.early, done.end
    return vars(
        Training(
            kind, seed, level, masks.density, masks.densities, early.iteration, early.loss, early.accuracy, early.test,
            end.iteration, end.loss, end.accuracy, end.test, done.seconds, done.trainer,
        )
    )  # fmt: skip
