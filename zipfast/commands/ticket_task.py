# SPDX-License-Identifier: Apache-2.0
"""What ``zipfast ticket`` trains: the options of a run, settled, and the task that they make."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import sources
from ..features import batch_inputs, batch_labels, evaluating, output_tensor
from ..tickets import (
    PRESETS,
    Batches,
    Masks,
    Preset,
    Task,
    rate_for,
    why_not_mlp,
)
from ..tickets.settings import refuse
from . import common

READ = 256  # samples read at once
EVALUATED = 1000  # samples in a batch of validation and test
SPLIT_SEED = 0  # of the samples that --validation-size takes, and of the digits
DIGITS = (700, 1000, 1797)  # where the digits' training, validation and test samples end
BUILT_BY = ("network", "factory", "factory_args")  # settings that an experiment cannot see in the network itself
READ_BY = ("data", "validation", "validation_size", "test", "samples", "image_size", "mean", "std", "grayscale")
RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3}


@dataclass(frozen=True)
class Job:
    """A task, the options that it is made of, and a network to look at."""

    task: Task
    options: dict[str, Any]
    model: nn.Module
    classes: int

    @property
    def parts(self) -> dict[str, Batches]:
        return {name: getattr(self.task, name) for name in ("train", "validation", "test")}


def settled(args: argparse.Namespace) -> dict[str, Any]:
    """The options that make the task, with what the preset says where nothing was given."""
    if (args.network is None) == (args.factory is None):
        got = "none" if args.network is None else "both"
        raise ValueError(f"ticket: there must be --network PRESET or --factory MODULE:NAME, got {got}")
    if args.factory_args is not None and (args.factory is None or not isinstance(args.factory_args, dict)):
        raise ValueError("ticket: 'factory_args' must be one JSON object, with --factory")
    preset = _preset(args.network)
    optimizer = args.optimizer or (preset.optimizer if preset else "adam")
    same = preset if preset is not None and preset.optimizer == optimizer else None
    iterations = args.iterations if args.iterations is not None else preset and preset.iterations
    if iterations is None:
        raise ValueError("ticket: 'iterations' must be given where there is no preset, got none; use --iterations T")
    milestones = args.milestones if args.milestones is not None else list(preset.milestones) if preset else []
    found = {name: getattr(args, name) for name in BUILT_BY} | {name: getattr(args, name) for name in READ_BY}
    found |= {
        "iterations": iterations,
        "batch_size": _first(args.batch_size, preset and preset.batch_size, 64),
        "optimizer": optimizer,
        "lr": _first(args.lr, same and same.lr, RATES[optimizer]),
        "momentum": _first(args.momentum, same and same.momentum, 0.9) if optimizer == "sgd" else 0.0,
        "weight_decay": _first(args.weight_decay, same and same.weight_decay, 0.0),
        "warmup": _first(args.warmup, preset and preset.warmup, 0),
        "milestones": milestones,
        "gamma": preset.gamma if preset is not None and args.milestones is None else 0.1,
    }
    if args.momentum and optimizer != "sgd":
        raise ValueError(f"ticket: 'momentum' must be left out for {optimizer}, got {args.momentum}")
    if found["warmup"] < 0 or any(m < 0 for m in milestones):
        raise ValueError(f"ticket: 'warmup' and 'milestones' must be 0 or more, got {found['warmup']} and {milestones}")
    return found


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _preset(name: str | None) -> Preset | None:
    if name is not None and name not in PRESETS:
        raise ValueError(f"ticket: 'network' must be one of {', '.join(PRESETS)}, got {name!r}")
    return None if name is None else PRESETS[name]


def job_of(options: dict[str, Any], device: str) -> Job:
    """Read the data, and make the task of these options."""
    place = common.use_device(device)
    parts = _parts(options)
    shape, classes = parts["train"][0].shape[1:], 1 + max(int(labels.max()) for _, labels in parts.values())
    for name, (data, labels) in parts.items():
        if data.shape[1:] != shape:
            raise ValueError(
                f"ticket: {name} data must be {list(shape)} as those to train on, got {list(data.shape[1:])}"
            )
        if data.is_floating_point() and not bool(data.isfinite().all()):
            raise ValueError(f"ticket: {name} data must be finite, got NaN or infinity in sample {_first_bad(data)}")
        if int(labels.min()) < 0:
            raise ValueError(f"ticket: {name} labels must be 0 or more, got {int(labels.min())}")
    build = _builder(options, shape, classes)
    sizes = {"train": options["batch_size"], "validation": EVALUATED, "test": EVALUATED}
    batches = {name: Batches(x.to(place), y.to(place), sizes[name]) for name, (x, y) in parts.items()}
    rates = replace(
        PRESETS["lenet-300-100"],
        warmup=options["warmup"],
        milestones=tuple(options["milestones"]),
        gamma=options["gamma"],
    )
    task = Task(
        build, batches["train"], batches["validation"], batches["test"], options["iterations"],
        partial(_optimizer, options), rates.schedule if options["warmup"] or options["milestones"] else None,
        device=str(place),
    )  # fmt: skip
    model = task.network(0)
    with evaluating(model), torch.no_grad():
        try:
            output = output_tensor(model(batches["test"].data[:2]))
        except RuntimeError as e:
            raise ValueError(f"ticket: the network must take data of shape {list(shape)}, got: {e}") from None
    if output.ndim != 2 or output.shape[1] < classes:
        raise ValueError(f"ticket: the network must give [N, {classes}] logits or more, got {list(output.shape)}")
    return Job(task, options, model, classes)


def _first_bad(data: Tensor) -> int:
    return int((~data.isfinite()).flatten(1).any(1).nonzero()[0])


def _optimizer(options: dict[str, Any], parameters: Any) -> torch.optim.Optimizer:
    lr, decay = options["lr"], options["weight_decay"]
    if options["optimizer"] == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=options["momentum"], weight_decay=decay)
    kind = torch.optim.Adam if options["optimizer"] == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=decay)


def _builder(options: dict[str, Any], shape: Sequence[int], classes: int) -> Callable[[], nn.Module]:
    preset = _preset(options["network"])
    if preset is None:
        return partial(sources.load_model, options["factory"], factory_args=options["factory_args"])
    if len(shape) == 1 and preset.name == "lenet-300-100":
        shape = (1, 1, *shape)
    if len(shape) != 3:
        raise ValueError(f"ticket: {preset.name} takes images [N, C, H, W], got data of shape {['N', *shape]}")
    return partial(preset.build, in_channels=shape[0], out_features=classes, image_size=tuple(shape[1:]))


def _parts(options: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Samples and labels to train on, to validate and to test."""
    spec, test, validation, size = (options[name] for name in ("data", "test", "validation", "validation_size"))
    if spec is None:
        raise ValueError("ticket: 'data' must name what to train on, got none; use --data SPEC, or --data digits")
    if spec == "digits":
        if given := [name for name in READ_BY[1:] if options[name] not in (None, False)]:
            raise ValueError(f"ticket: '{given[0]}' must be left out with the digits, which have all parts")
        return _digits()
    if test is None:
        raise ValueError("ticket: 'test' must name labelled data to report accuracies on, got none; use --test SPEC")
    if (validation is None) == (size is None):
        got = "none" if size is None else "both"
        raise ValueError(f"ticket: there must be --validation SPEC or --validation-size N, got {got}")
    data, labels = _read(spec, options)
    if validation is not None:
        return {
            "train": (data, labels),
            "validation": _read(validation, options),
            "test": _read(test, options),
        }
    if not 1 <= size < len(data):
        raise ValueError(f"ticket: 'validation_size' must be in [1, {len(data)}), got {size}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(SPLIT_SEED))
    kept, taken = order[size:].sort().values, order[:size].sort().values
    return {
        "train": (data[kept], labels[kept]),
        "validation": (data[taken], labels[taken]),
        "test": _read(test, options),
    }


def _digits() -> dict[str, tuple[Tensor, Tensor]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise ImportError("ticket: scikit-learn must be installed for digits; pip install 'zipfast[demo]'") from e
    found = load_digits()
    order = torch.randperm(DIGITS[-1], generator=torch.Generator().manual_seed(SPLIT_SEED))
    x = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(found.target, dtype=torch.int64)[order]
    starts = (0, *DIGITS[:-1])
    return {n: (x[a:b], y[a:b]) for n, a, b in zip(("train", "validation", "test"), starts, DIGITS)}


def _read(spec: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """All samples of a spec, and their labels."""
    data, labels = [], []
    for batch in common.load_data(spec, argparse.Namespace(**{**options, "batch_size": READ})):
        args, _ = batch_inputs(batch)
        target = batch_labels(batch)
        if len(args) != 1 or not isinstance(target, Tensor):
            raise ValueError(f"ticket: {spec} must hold one input and labels, got {'no labels' if args else 'several'}")
        if target.ndim != 1 or target.is_floating_point():
            raise ValueError(
                f"ticket: labels of {spec} must be whole numbers [N], got {target.dtype} {list(target.shape)}"
            )
        data.append(args[0].detach().cpu())
        labels.append(target.detach().cpu().long())
    if not data:
        raise ValueError(f"ticket: {spec} must hold samples, got none")
    return torch.cat(data), torch.cat(labels)


def plan_of(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """The arguments of an experiment."""
    masks = Masks.ones(job.model, only=args.only, ignore=args.ignore)
    preset = _preset(job.options["network"])
    if sum(given is not None for given in (args.rate, args.rates, args.density)) > 1:
        raise ValueError("ticket: only one of --rate, --rates and --density can be given, got several")
    rates: Any = args.rates if args.rates is not None else args.rate
    if isinstance(rates, list) or (isinstance(rates, dict) and not all(_is_number(v) for v in rates.values())):
        raise ValueError(f"ticket: 'rates' must be one JSON object of numbers, got {json.dumps(rates)}")
    if preset is not None and rates is None:
        rates = {p: rate for p, rate in preset.rates if any(re.fullmatch(p, name) for name in masks)}
    if args.density is not None:
        rate = rate_for(args.density, args.levels)
        rates = dict.fromkeys(rates, rate) if isinstance(rates, dict) else {".*": rate}
    if isinstance(rates, dict) and args.output_factor is not None:
        raise ValueError("ticket: 'output_factor' must come with --rate, got rates by layer")
    if "@" in (args.factory or "") and "reinit" in args.controls:
        raise ValueError("ticket: control 'reinit' needs a factory that draws weights, got one with a checkpoint")
    reason = why_not_mlp(job.task, job.model, args.mode)
    if args.trainer == "mlp" and reason is not None:
        raise ValueError(f"ticket: trainer 'mlp' cannot be used: {reason}")
    seeds = args.seeds or [0]
    refuse(
        job.task,
        args.levels,
        args.rewind,
        args.controls,
        args.control_levels,
        seeds,
        args.every,
        args.mode,
        args.trainer,
    )
    return {
        "levels": args.levels, "rates": 0.2 if rates is None else rates,
        "scope": args.scope or (preset.scope if preset else "layer"), "output": args.output_factor,
        "rewind": args.rewind, "controls": args.controls, "control_levels": args.control_levels,
        "seeds": seeds, "every": args.every, "mode": args.mode, "trainer": args.trainer,
        "only": args.only, "ignore": args.ignore, "checkpoint_seconds": args.checkpoint_seconds,
    }  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------------ run and check
