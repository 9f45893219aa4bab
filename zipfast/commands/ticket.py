# SPDX-License-Identifier: Apache-2.0
"""``zipfast ticket``: find lottery tickets, compare them with their controls, look at them, hand one out."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any

from .. import checkpoint, distributed
from ..tickets import (
    PRESETS,
    Lottery,
    Masks,
    connectivity,
    ladder,
    lottery,
    why_not_mlp,
)
from ..tickets.experiment import MASKS
from ..tickets.optim import MODES
from ..tickets.results import KINDS
from ..tickets.settings import CONTROLS, check_task, rates_by_name, short
from ..tickets.task import seed_of
from ..tickets.trainers import TRAINERS
from . import common
from .ticket_task import BUILT_BY, RATES, READ_BY, Job, job_of, plan_of, settled
from .zip import arguments

ACTIONS = ("run", "show", "lines", "overlap", "export", "check")
COMMAND = "command.json"  # in an experiment's folder: what its networks and data are built from

EPILOG = """\
actions:  run      an experiment: train, prune, rewind, again; gone on with where --out holds one
          check    what run would train and write, and by which trainer; nothing is trained
          show     FOLDER: results so far                 lines    FOLDER: linear mode connectivity
          overlap  FOLDER: of the masks of the seeds      export   FOLDER: one ticket as a plain state dict
data:     digits (scikit-learn's: 700 to train, 300 to validate, 797 to test) · a folder of images · an .npz ·
          package.module:function; read once, kept in memory
examples:
  zipfast ticket run --network lenet-300-100 --data digits --iterations 2500 --out digits/ --controls reinit,random
  zipfast ticket show digits/ --plots pictures/
  zipfast ticket export digits/ --level 7 --out ticket.safetensors
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("folder", nargs="*", metavar="FOLDER", help="of an experiment; for run and check it is --out")
    model = parser.add_argument_group("network")
    model.add_argument("--network", metavar="PRESET", help=", ".join(PRESETS))
    model.add_argument("--factory", metavar="MODULE:NAME", help="what builds a network of your own")
    model.add_argument("--factory-args", type=arguments, metavar="JSON", help="its keyword arguments")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="SPEC", help="to train on; or digits, with all three parts")
    data.add_argument("--validation", metavar="SPEC", help="what early stopping is decided on")
    data.add_argument("--validation-size", type=int, metavar="N", help="or so many samples taken from --data")
    data.add_argument("--test", metavar="SPEC", help="what accuracies are reported on")
    data.add_argument("--samples", type=int, metavar="N", help="use the first N samples of each only")
    data.add_argument("--image-size", type=int, metavar="PIXELS", help="resize and crop images")
    data.add_argument("--mean", type=common.numbers, metavar="M,M,M", help="of the images' channels")
    data.add_argument("--std", type=common.numbers, metavar="S,S,S", help="of the images' channels")
    data.add_argument("--grayscale", action="store_true", help="read images with one channel")
    train = parser.add_argument_group("training (default: what the preset says)")
    train.add_argument("--iterations", type=int, metavar="T", help="batches of one training")
    train.add_argument("--batch-size", type=int, metavar="N", help="(without a preset: 64)")
    train.add_argument("--optimizer", choices=tuple(RATES), help="(without a preset: adam)")
    train.add_argument("--lr", type=float, help="(without a preset: sgd 0.1, adam and adamw 0.001)")
    train.add_argument("--momentum", type=float, help="of sgd (without a preset: 0.9)")
    train.add_argument("--weight-decay", type=float, help="(without a preset: 0)")
    train.add_argument("--warmup", type=int, metavar="N", help="iterations in which the rate rises from 0")
    train.add_argument("--milestones", type=integers, metavar="N,N", help="iterations that divide the rate by 10")
    prune = parser.add_argument_group("pruning")
    prune.add_argument("--levels", type=int, default=20, help="rounds (default: %(default)s)")
    prune.add_argument("--rate", type=float, help="fraction of the survivors per round (without a preset: 0.2)")
    prune.add_argument("--output-factor", type=float, metavar="F", help="of the rate of the last layer")
    prune.add_argument("--density", type=float, metavar="D", help="instead: what shall be left after the last level")
    prune.add_argument("--rates", type=arguments, metavar="JSON", help="instead: {regular expression: rate}")
    prune.add_argument("--scope", choices=("layer", "global"), help="what is ranked together (without a preset: layer)")
    prune.add_argument("--rewind", type=int, default=0, metavar="K", help="to iteration K (default: %(default)s)")
    prune.add_argument("--only", metavar="REGEX", help="prune only weights with a match")
    prune.add_argument("--ignore", metavar="REGEX", help="prune no weight with a match")
    prune.add_argument("--mode", choices=MODES, default="grad", help="where the mask acts (default: %(default)s)")
    job = parser.add_argument_group("experiment")
    job.add_argument("--out", metavar="PATH", help="folder of the experiment; for export the .safetensors")
    job.add_argument("--controls", type=names, default=[], metavar="C,C", help=f"any of {', '.join(CONTROLS)}")
    job.add_argument("--control-levels", type=integers, metavar="N,N", help="their levels (default: all)")
    job.add_argument("--seeds", type=integers, metavar="N,N", help="replicates (default: 0; later all there are)")
    job.add_argument(
        "--every", type=int, default=100, metavar="N", help="iterations between looks at the validation data"
    )
    job.add_argument("--trainer", choices=TRAINERS, default="auto", help="(default: %(default)s)")
    job.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, help="between two of them (default: %(default)s)"
    )
    job.add_argument("--dry-run", action="store_true", help="as check")
    look = parser.add_argument_group("lines, overlap, export")
    look.add_argument(
        "--level", type=integers, metavar="N,N", help="which (default: lines 0 and the last; overlap all)"
    )
    look.add_argument("--kinds", type=names, default=["ticket"], metavar="K,K", help=f"any of {', '.join(KINDS)}")
    look.add_argument("--points", type=int, default=31, help="of a line, odd (default: %(default)s)")
    look.add_argument("--recalibrate", action="store_true", help="re-estimate batch norm at each point of a line")
    look.add_argument("--start", action="store_true", help="export the weights that the ticket starts from")


def integers(text: Any) -> list[int]:
    """'0,1' as [0, 1]; a YAML file may hold the list, or one."""
    try:
        items = text.split(",") if isinstance(text, str) else text if isinstance(text, list) else [text]
        return [int(str(item)) for item in items]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, got {text!r}") from None


def names(text: Any) -> list[str]:
    """'a,b' as ['a', 'b']; a YAML file may hold the list."""
    items = text.split(",") if isinstance(text, str) else text
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return items


def run(args: argparse.Namespace) -> int:
    """Do the command."""
    if distributed.world_size() > 1:
        raise ValueError("ticket: one process is enough, got several")
    trains = args.action in ("run", "check")
    if len(args.folder) != (0 if trains else 1):
        wanted = f"no FOLDER with {args.action}: name it by --out" if trains else f"one FOLDER with {args.action}"
        raise ValueError(f"ticket: there must be {wanted}, got {len(args.folder)}")
    if trains:
        return _check(args) if args.action == "check" or args.dry_run else _run(args)
    for kind in args.kinds:
        if kind not in KINDS:
            raise ValueError(f"ticket: 'kinds' must be of {', '.join(KINDS)}, got {kind!r}")
    found = Lottery.load(args.folder[0])
    if not found.trainings:
        raise ValueError(f"ticket: {found.folder} must hold a finished level, got none; run it again to go on")
    if args.plots is not None:
        checkpoint.check_folder(args.plots)
    result = common.provenance("ticket", args, [{"folder": str(found.folder)}])
    text = ACT[args.action](args, found, result)
    common.emit(result, text, args.json)
    return 0


# ----------------------------------------------------------------------------------------------------------------- run


def _run(args: argparse.Namespace) -> int:
    if args.out is None:
        raise ValueError("ticket: 'out' must name the experiment's folder, got none; use --out FOLDER")
    if args.plots is not None:
        checkpoint.check_folder(args.plots)
    folder = Path(args.out)
    job = job_of(settled(args), args.device)
    plan = plan_of(args, job)
    stored = _storable(job.options)
    _same_origin(folder, stored)
    result = common.provenance("ticket", args, _inputs(job))
    kinds = ("ticket", *args.controls)
    totals = {
        _stage(kind, seed, level): job.task.iterations
        for kind in kinds for seed in plan["seeds"] for level in range(plan["levels"] + 1)
    }  # fmt: skip
    with common.Progress(args.quiet, totals) as progress:
        told = _Teller(folder / COMMAND, {"format": 1, "options": stored}, progress)
        found = lottery(job.task, out=folder, progress=told, **plan)
    told.keep()
    common.emit(*_told(args, found, result), args.json)
    return 0


class _Teller:
    """Progress of an experiment; the first call, when its folder has been accepted, writes what `lines` needs."""

    def __init__(self, path: Path, content: dict[str, Any], progress: common.Progress) -> None:
        self.path, self.content, self.progress, self.kept = path, content, progress, False

    def __call__(self, kind: str, seed: int, level: int, iteration: int) -> None:
        self.keep()
        self.progress(_stage(kind, seed, level), iteration)

    def keep(self) -> None:
        if not self.kept and not self.path.exists():
            common.write_json(self.path, self.content)
        self.kept = True


def _stage(kind: str, seed: int, level: int) -> str:
    return f"seed {seed} {kind} {level}"


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    """Options with whole paths: an experiment can be looked at from any folder."""
    found = dict(options)
    for name in ("data", "validation", "test"):
        if found[name] not in (None, "digits") and Path(found[name]).expanduser().exists():
            found[name] = os.path.abspath(Path(found[name]).expanduser())
    return found


def _stored(folder: Path) -> dict[str, Any]:
    path = folder / COMMAND
    if not path.is_file():
        raise FileNotFoundError(f"ticket: no {path}; only experiments of `zipfast ticket run` can be trained again")
    try:
        return dict(json.loads(path.read_text())["options"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"ticket: {path} must hold the options of a run, got a damaged file ({e})") from None


def _same_origin(folder: Path, options: dict[str, Any]) -> None:
    """Refuse a folder whose networks were built by something else; all other settings the experiment compares itself."""
    if (folder / COMMAND).is_file():
        old = _stored(folder)
        for name in BUILT_BY:
            if old.get(name) != options[name]:
                was, now = short(old.get(name)), short(options[name])
                raise ValueError(f"ticket: {folder} is of another {name} (was {was}, is {now}); choose another --out")


def _inputs(job: Job) -> list[dict[str, Any]]:
    return [
        {
            "part": name,
            "samples": len(part.data),
            "hash": checkpoint.state_hash({"data": part.data, "labels": part.labels}),
        }
        for name, part in job.parts.items()
    ]


def _check(args: argparse.Namespace) -> int:
    job = job_of(settled(args), args.device)
    plan, options = plan_of(args, job), job.options
    masks = Masks.ones(job.model, only=plan["only"], ignore=plan["ignore"])
    rates = {
        n: rate
        for n, rate in rates_by_name(job.model, masks, plan["rates"], plan["scope"], plan["output"]).items()
        if rate > 0
    }
    if not rates:
        raise ValueError("ticket: a rate must be above 0 for one layer at least, got 0 for all")
    bits = sum(masks.bits[name].numel() for name in rates)
    weights = sum(masks.sizes[name] for name in rates)
    levels = plan["levels"]
    controls = levels if plan["control_levels"] is None else len(plan["control_levels"])
    total = len(plan["seeds"]) * (levels + 1 + len(plan["controls"]) * controls)
    there = 0
    if args.out and (Path(args.out) / "settings.json").is_file():
        found = Lottery.load(args.out)
        _same_origin(found.folder, _storable(options))
        check_task(job.task, found.settings, found.folder, "ticket")
        there = len(found.trainings)
    reason = why_not_mlp(job.task, job.model, plan["mode"])
    trainer = "torch" if plan["trainer"] == "torch" or reason is not None else "mlp"
    why = (
        "asked for" if plan["trainer"] != "auto" else reason or "a perceptron on the CPU: iterations cost what survives"
    )
    size = sum(value.nbytes for value in job.model.state_dict().values())
    memory = sum(part.data.nbytes + part.labels.nbytes for part in job.parts.values())
    result = {
        "options": options, "trainings": total, "there": there, "trainer": trainer, "why": why, "rates": rates,
        "scope": plan["scope"], "densities": [ladder(job.model, rates, level) / 100 for level in range(levels + 1)],
        "weights": weights, "mask_bytes": bits, "data_bytes": memory,
        "write_bytes": total * (size + bits) + len(plan["seeds"]) * size * (2 if plan["rewind"] else 1),
        "samples": {name: len(part.data) for name, part in job.parts.items()}, "classes": job.classes, "notes": [],
    }  # fmt: skip
    late = [m for m in options["milestones"] if m >= options["iterations"]]
    if late or options["warmup"] >= options["iterations"]:
        result["notes"].append(
            f"note: the schedule (warm-up {options['warmup']}, milestones {options['milestones']}) goes beyond the "
            f"{options['iterations']} iterations; give --warmup and --milestones"
        )
    shape = list(job.parts["train"].data.shape[1:])
    counts = ", ".join(f"{count} {name}" for name, count in result["samples"].items())
    rule = f"{options['optimizer']}, rate {options['lr']:g}, batches of {options['batch_size']}"
    lines = [
        f"network   {options['network'] or options['factory']}: {weights} weights to prune in {len(rates)} tensors, "
        f"{plan['scope']}",
        f"data      {counts} samples of {shape}, {job.classes} classes: {memory / 1e6:.1f} MB in memory",
        f"training  {rule}, {options['iterations']} iterations, by the trainer {trainer} ({why})",
        f"masks     {bits / 1e3:.1f} kB, one bit a weight",
        f"would run {total} trainings, of which {there} are there, and write {result['write_bytes'] / 1e6:.1f} MB",
        *result["notes"],
        "",
        "| level | P_m % |",
        "|---|---|",
        *(f"| {level} | {100 * density:.2f} |" for level, density in enumerate(result["densities"])),
    ]
    common.emit(result, "\n".join(lines), args.json)
    return 0


# -------------------------------------------------------------------------------------------------- what was found


def _told(args: argparse.Namespace, found: Lottery, result: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Results as a record and as text, with pictures."""
    settings = found.settings
    total = len(settings["seeds"]) * (
        settings["levels"] + 1 + len(settings["controls"]) * len(settings["control_levels"])
    )
    done = [t for t in found.trainings if t.seed in settings["seeds"]]
    result |= {**found.to_dict(), "winning": _winning(found), "folder": str(found.folder)}
    lines = [found.table()]
    if len(done) < total:
        lines.append(f"{len(done)} of {total} trainings are done; the same `zipfast ticket run` goes on")
    if won := result["winning"]:
        lines.append(
            f"winning ticket: level {won['level']}, {100 * won['density']:.2f} % of the weights: {won['test']:.2f} % on the "
            f"test data, dense {won['dense_test']:.2f} %; early stop at {won['early']:.0f}, dense {won['dense_early']:.0f}"
        )
    if args.plots is not None:
        from ..tickets.plots import plot_layers, plot_levels

        Path(args.plots).mkdir(parents=True, exist_ok=True)
        plot_levels(found, Path(args.plots) / "levels.png")
        plot_layers(found, Path(args.plots) / "layers.png", seed=found.trainings[0].seed)
    return result, "\n".join(lines)


def _winning(found: Lottery) -> dict[str, Any] | None:
    """The sparsest level whose median validation accuracy at the end is the dense network's or better, over its seeds."""
    levels: dict[int, dict[int, Any]] = {}
    for t in found.trainings:
        if t.kind == "ticket":
            levels.setdefault(t.level, {})[t.seed] = t
    if 0 not in levels:
        return None
    whole = {n: own for n, own in levels.items() if own.keys() <= levels[0].keys()}
    best = [
        n
        for n, own in whole.items()
        if n and median(t.end_validation for t in own.values()) >= median(levels[0][s].end_validation for s in own)
    ]
    if not best:
        return None
    mine = list(levels[max(best)].values())
    dense = [levels[0][t.seed] for t in mine]
    return {
        "level": max(best), "density": fmean(t.density for t in mine),
        "test": median(t.end_test for t in mine), "dense_test": median(t.end_test for t in dense),
        "early": median(t.early for t in mine), "dense_early": median(t.early for t in dense),
    }  # fmt: skip


def _show(args: argparse.Namespace, found: Lottery, result: dict[str, Any]) -> str:
    return _told(args, found, result)[1]


def _chosen(args: argparse.Namespace, found: Lottery) -> list[int]:
    """The seeds that were asked for, or all there are."""
    there = sorted({t.seed for t in found.trainings})
    if lacking := [seed for seed in args.seeds or [] if seed not in there]:
        raise ValueError(f"ticket: 'seeds' must be of those in {found.folder} ({there}), got {lacking[0]}")
    return args.seeds or there


def _again(args: argparse.Namespace, found: Lottery) -> Job:
    """The task of an experiment, from what its run stored; options of the data may be given anew, where they moved."""
    options = _stored(found.folder)
    options |= {n: v for n in READ_BY if (v := getattr(args, n)) not in (None, False)}
    job = job_of(options, args.device)
    check_task(job.task, found.settings, found.folder, "ticket")
    return job


def _lines(args: argparse.Namespace, found: Lottery, result: dict[str, Any]) -> str:
    if args.points < 3 or args.points % 2 == 0:
        raise ValueError(f"ticket: 'points' must be odd and at least 3, got {args.points}")
    last = max(t.level for t in found.trainings)
    levels, seeds = args.level or sorted({0, last}), _chosen(args, found)
    wanted = [(kind, level, seed) for kind in args.kinds for level in levels for seed in seeds]
    for kind, level, seed in wanted:  # what was not run is said before anything is trained
        found.place(level, seed=seed, kind=kind)
    job = _again(args, found)
    lines = []
    with common.Progress(args.quiet, {"lines": len(wanted)}) as progress:
        for number, (kind, level, seed) in enumerate(wanted, 1):
            lines.append(
                connectivity(
                    job.task, found, level, seed=seed, kind=kind, points=args.points, recalibrate=args.recalibrate
                )
            )
            progress("lines", number)
    result["lines"] = [{**vars(line), "barrier": vars(line.barrier), "stable": line.stable} for line in lines]
    if args.plots is not None:
        from ..tickets.plots import plot_lines

        Path(args.plots).mkdir(parents=True, exist_ok=True)
        plot_lines(lines, Path(args.plots) / "lines.png")
    text = ["| kind | level | P_m % | seed | copies % | barrier | stable |", "|---|---|---|---|---|---|---|"]
    text += [
        f"| {line.kind} | {line.level} | {100 * line.density:.2f} | {line.seed} | {line.accuracies[0]:.2f}, "
        f"{line.accuracies[1]:.2f} | {line.barrier.height:.2f} | {'yes' if line.stable else 'no'} |"
        for line in lines
    ]
    return "\n".join(text)


def _overlap(args: argparse.Namespace, found: Lottery, result: dict[str, Any]) -> str:
    seeds = _chosen(args, found)
    if len(seeds) < 2:
        raise ValueError(f"ticket: overlap needs two seeds or more, got {len(seeds)}; run with --seeds 0,1")
    rows = []
    for kind in args.kinds:
        common_levels = set.intersection(
            *({t.level for t in found.trainings if t.kind == kind and t.seed == seed} for seed in seeds)
        )
        for level in args.level or sorted(common_levels):
            masks = [found.masks(level, seed=seed, kind=kind) for seed in seeds]
            pairs = list(combinations(masks, 2))
            rows.append(
                {
                    "kind": kind,
                    "level": level,
                    "density": fmean(m.density for m in masks),
                    "overlap": fmean(a.overlap(b) for a, b in pairs),
                    "chance": fmean(_chance(a, b) for a, b in pairs),
                    "pairs": [a.overlap(b) for a, b in pairs],
                }
            )
            if args.plots is not None and kind == "ticket":
                from ..tickets.plots import plot_overlap

                Path(args.plots).mkdir(parents=True, exist_ok=True)
                plot_overlap(found, level, Path(args.plots) / f"overlap-{level:02d}.png")
    result["seeds"], result["overlap"] = seeds, rows
    text = ["| kind | level | P_m % | overlap | by chance |", "|---|---|---|---|---|"]
    text += [
        f"| {r['kind']} | {r['level']} | {100 * r['density']:.2f} | {r['overlap']:.3f} | {r['chance']:.3f} |"
        for r in rows
    ]
    return "\n".join(text)


def _chance(one: Masks, two: Masks) -> float:
    """Expected size of the intersection over that of the union, were survivors anywhere in their layers."""
    both = {name: one.alive[name] * two.alive[name] / max(1, size) for name, size in one.sizes.items()}
    either = sum(one.alive[name] + two.alive[name] - both[name] for name in both)
    return sum(both.values()) / either if either else 1.0


def _export(args: argparse.Namespace, found: Lottery, result: dict[str, Any]) -> str:
    seed, kind = _chosen(args, found)[0], args.kinds[0]
    if args.level is None or len(args.level) != 1 or len(args.kinds) != 1:
        raise ValueError("ticket: export takes one level of one kind, got none or several; use --level N")
    if args.out is None:
        raise ValueError("ticket: 'out' must name a .safetensors file, got none; use --out FILE")
    checkpoint.check_writable(args.out)
    level, path = args.level[0], Path(args.out)
    masks, at = found.masks(level, seed=seed, kind=kind), found.settings["iterations"]
    if not args.start:
        state = found.state(level, seed=seed, kind=kind)
    elif kind == "reinit":
        state, at = dict(_again(args, found).task.network(seed_of(seed, "reinit", level) % (1 << 63)).state_dict()), 0
    else:
        state, at = found.start(seed=seed), found.settings["rewind"]
    masks.apply_(state)
    beside = path.with_name(f"{path.stem}.{MASKS}")
    about = {"kind": kind, "seed": seed, "level": level, "iteration": at, "density": masks.density}
    result["ticket"] = {**about, "state": str(path), "masks": str(beside), "masks_hash": masks.hash()}
    masks.save(beside)
    checkpoint.save(path, state, {**about, "masks": beside.name, "provenance": json.loads(json.dumps(result))})
    return (
        f"written to {path}: {kind} of level {level}, seed {seed}, at iteration {at}, {100 * masks.density:.2f} % of the "
        f"prunable weights alive; its masks to {beside}"
    )


ACT: dict[str, Callable[[argparse.Namespace, Lottery, dict[str, Any]], str]] = {
    "show": _show,
    "lines": _lines,
    "overlap": _overlap,
    "export": _export,
}
