# SPDX-License-Identifier: Apache-2.0
"""``zipfast soup``: one better model from many fine-tuned ones, or the reason why not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint, distributed, sources
from ..features import batch_inputs, batch_labels, device_of, evaluating, output_tensor
from ..soups import (
    LearnedSoup,
    accuracy_of,
    advantages,
    ece,
    greedy_ensemble,
    greedy_soup,
    layout_of,
    logit_ensemble,
    mix,
    plane,
    uniform_soup,
    wise_ft,
)
from ..soups.adapters import Adapter
from ..soups.diagnosis import diagnose
from ..soups.evaluator import Evaluator
from ..soups.ingredients import gather
from ..soups.mix import BUFFERS, SHARD, weights_of
from ..soups.recipes import Soup
from ..states import State, open_state
from . import common
from .zip import arguments

ACTIONS = ("uniform", "greedy", "learned", "wise", "ensemble", "geometry", "check")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
MERGEKIT = {"merge_method", "models", "parameters", "dtype", "out_dtype", "base_model"}

EPILOG = """\
actions:  uniform   the (weighted) average                  greedy    add the best first, keep what helps
          learned   mixing weights by gradient              wise      from --base to one model, for each --alphas
          ensemble  accuracy of averaged logits             geometry  norms, angles, distances, and what they mean
          check     what would be read and written, and what does not fit; reads headers only
models:   .safetensors, .pt, .pth, .bin, or Hugging Face folders. What is evaluated is built from the first folder, or by
          --factory. For uniform and greedy also folders with LoRA adapters of PEFT: the result is an adapter, or with --base
          the whole model.
examples:
  zipfast soup uniform run-*/model.safetensors --out soup.safetensors
  zipfast soup greedy run-1/ run-2/ run-3/ --data held-out/ --image-size 224 --out soup/ --journal soup.jsonl
  zipfast soup uniform adapter-a/ adapter-b/ --out adapter/
  zipfast soup uniform --config mergekit.yml --out soup/          (merge_method: linear)
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.set_defaults(_translate=from_mergekit)
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="ingredients")
    model = parser.add_argument_group("models")
    model.add_argument(
        "--base", metavar="MODEL", help="the start that all were fine-tuned from; of adapters, to merge into"
    )
    model.add_argument("--factory", metavar="MODULE:NAME", help="what builds the model that checkpoints belong to")
    model.add_argument("--factory-args", type=arguments, metavar="JSON", help="its keyword arguments")
    model.add_argument("--include", metavar="REGEX", help="mix only tensors with a match")
    model.add_argument(
        "--exclude", metavar="REGEX", help="take tensors with a match from the first model (a frozen head)"
    )
    common.add_data(parser)
    parser.add_argument(
        "--test", action="append", metavar="SPEC", help="accuracy on further labelled data (repeatable)"
    )
    how = parser.add_argument_group("recipe")
    how.add_argument("--weights", type=common.numbers, metavar="W,W", help="for uniform; default: all alike")
    how.add_argument("--keep-scale", action="store_true", help="do not divide the weights by their sum")
    how.add_argument("--separate", action="store_true", help="of adapters, for uniform: average A and B on their own")
    how.add_argument("--alphas", type=common.numbers, default=[0.25, 0.5, 0.75], metavar="A,A", help="for wise")
    how.add_argument("--accept", choices=("gt", "ge"), default="gt", help="for greedy: must rise, or must not fall")
    how.add_argument("--order", choices=("score", "random"), default="score", help="for greedy (default: %(default)s)")
    how.add_argument("--scores", type=common.numbers, metavar="S,S", help="held-out scores of the models, if known")
    how.add_argument("--seed", type=int, default=0, help="of --order random (default: %(default)s)")
    how.add_argument("--granularity", choices=("model", "tensor"), default="model", help="for learned")
    how.add_argument("--lr", type=float, help="for learned (default: 0.1, per tensor 0.05)")
    how.add_argument("--epochs", type=int, default=5, help="for learned (default: %(default)s)")
    how.add_argument(
        "--recalibrate", metavar="SPEC", help="data to re-estimate batch norm on, for scores and in the file"
    )
    job = parser.add_argument_group("job")
    job.add_argument("--out", metavar="PATH", help=".safetensors, or a folder for shards with an index")
    job.add_argument("--out-dtype", choices=tuple(DTYPES), help="where models differ, or another is wanted")
    job.add_argument(
        "--int-policy", choices=("equal", "first", "max", "sum"), default="equal", help="for whole numbers"
    )
    job.add_argument("--shard-bytes", type=int, default=SHARD, help="of a file in a folder (default: %(default)s)")
    job.add_argument("--journal", metavar="FILE", help=".jsonl of what was evaluated; a killed run goes on from it")
    job.add_argument("--dry-run", action="store_true", help="say what would be read and written, and stop")


def from_mergekit(values: dict[str, Any]) -> dict[str, Any]:
    """Options from a mergekit YAML with ``merge_method: linear`` or ``zipfast_linear``; other files as they are.

    Raises:
        ValueError: another method, or parts of the format that a weighted sum has no place for.
    """
    if "merge_method" not in values:
        return values
    if values["merge_method"] not in ("linear", "zipfast_linear"):
        raise ValueError(
            f"config: 'merge_method' must be linear here, got {values['merge_method']!r}; zipfast-mergekit-yaml has others"
        )
    if extra := sorted(set(values) - MERGEKIT):
        raise ValueError(f"config: a linear merge can have {', '.join(sorted(MERGEKIT))}, got {extra[0]!r}")
    top = values.get("parameters") or {}
    try:
        names = [str(item["model"]) for item in values["models"]]
        weights = [
            float((item.get("parameters") or {}).get("weight", top.get("weight", 1.0))) for item in values["models"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(
            f"config: 'models' must be a list of model and parameters with one weight, got {e!r}"
        ) from None
    found: dict[str, Any] = {"models": names, "weights": weights}
    if not top.get("normalize", True):
        found["keep_scale"] = True
    dtype = values.get("out_dtype") or values.get("dtype")
    if dtype is not None:
        found["out_dtype"] = str(dtype)
    return found


def run(args: argparse.Namespace) -> int:
    """Do the command; 1 where a check found problems."""
    if distributed.world_size() > 1:
        raise ValueError("soup: one process is enough, got several")
    if not args.models:
        raise ValueError("soup: 'models' must name at least one model, got none; see zipfast soup --help")
    if args.action == "wise" and (args.base is None or len(args.models) != 1):
        raise ValueError(f"soup: wise needs --base and one model, got {len(args.models)} and base {args.base!r}")
    states = [open_state(spec) for spec in args.models]
    base = None if args.base is None else open_state(args.base)
    args._adapters = any(isinstance(state, Adapter) for state in states)
    if args._adapters and args.action not in ("uniform", "greedy", "check"):
        raise ValueError(
            f"soup: adapters are for uniform and greedy, got them for {args.action}; merge them into --base first"
        )
    if args.action == "check" or args.dry_run:
        return _check(args, states, base)
    if args.plots is not None:
        Path(args.plots).mkdir(parents=True, exist_ok=True)
    result = common.provenance("soup", args, [{"spec": state.name} for state in states])
    with common.Progress(args.quiet, {"soup": len(states), "models": len(states), "epochs": args.epochs}) as progress:
        text = ACT[args.action](args, states, base, result, progress)
    common.emit(result, text, args.json)
    return 0


# ------------------------------------------------------------------------------------------------------------- actions


def _check(args: argparse.Namespace, states: Sequence[State], base: State | None) -> int:
    if args._adapters:
        return _check_adapters(args, states, base)
    every = [*states, *([base] if base is not None else [])]
    layout = layout_of(every, **_choice(args), name="soup")
    read = sum(entry.nbytes for state in every for entry in state.entries.values())
    result = {
        "models": [state.name for state in states],
        "mixed": len(layout.blended),
        "copied": list(layout.copied),
        "ties": layout.ties,
        "read_bytes": read,
        "write_bytes": layout.nbytes,
        "buffer_bytes": BUFFERS,
        "notes": list(layout.notes),
    }
    lines = [
        f"{len(states)} models fit together: {len(layout.blended)} tensors are mixed, {len(layout.copied)} copied",
        f"read {read / 1e6:,.1f} MB once, write {layout.nbytes / 1e6:,.1f} MB, in {BUFFERS >> 20} MB of buffers",
        *layout.notes,
    ]
    common.emit(result, "\n".join(lines), args.json)
    return 0


def _check_adapters(args: argparse.Namespace, states: Sequence[State], base: State | None) -> int:
    column = weights_of(args.weights, len(states), normalize=not args.keep_scale, name="soup")
    kitchen = gather(
        states, base=base, separate=args.separate, weighted=column, **_choice(args), out=args.out, name="soup"
    )
    ranks: dict[str, int] = {}
    for state in states:
        for module, pair in state.pairs.items() if isinstance(state, Adapter) else ():
            ranks[module] = ranks.get(module, 0) + state.entries[pair.a].shape[0]
    result = {"models": [state.name for state in states], "ranks": ranks, "notes": list(kitchen.notes)}
    into = "" if base is None else f", merged into {base.name}"
    text = f"{len(states)} adapters fit together: {len(ranks)} modules, rank {max(ranks.values())} at most{into}"
    common.emit(result, "\n".join([text, *kitchen.notes]), args.json)
    return 0


def _choice(args: argparse.Namespace) -> dict[str, Any]:
    dtype = None if args.out_dtype is None else DTYPES[args.out_dtype]
    return {"include": args.include, "exclude": args.exclude, "out_dtype": dtype}


def _uniform(args: argparse.Namespace, states: Sequence[State], base: Any, result: dict[str, Any], _: Any) -> str:
    evaluators = _evaluators(args, states)
    soup = uniform_soup(
        states, weights=args.weights, normalize=not args.keep_scale, out=args.out, int_policy=args.int_policy,
        shard_bytes=args.shard_bytes, metadata={"provenance": result}, base=base if args._adapters else None,
        separate=args.separate, **_choice(args),
    )  # fmt: skip
    return _told(args, soup, evaluators, result)


def _greedy(args: argparse.Namespace, states: Sequence[State], base: Any, result: dict[str, Any], progress: Any) -> str:
    evaluators = _evaluators(args, states, needed="greedy")
    soup = greedy_soup(
        states, evaluators["held-out"], scores=args.scores, accept=args.accept, order=args.order, seed=args.seed,
        journal=args.journal, out=args.out, int_policy=args.int_policy, progress=progress,
        base=base if args._adapters else None, **_choice(args),
    )  # fmt: skip
    if args.plots is not None:
        from ..soups.plots import plot_greedy

        plot_greedy(soup, Path(args.plots) / "greedy.png")
    steps = [f"  {'+' if t.accepted else ' '} {t.score:7.2f}  {t.name}" for t in soup.tried]
    return "\n".join(
        [
            "held-out score of the soup with each model, + where it stayed:",
            *steps,
            _told(args, soup, evaluators, result),
        ]
    )


def _learned(
    args: argparse.Namespace, states: Sequence[State], base: Any, result: dict[str, Any], progress: Any
) -> str:
    evaluators = _evaluators(args, states, needed="learned")
    held_out = evaluators["held-out"]
    learned = LearnedSoup(
        held_out.model, states, granularity=args.granularity, lr=args.lr, include=args.include, exclude=args.exclude
    )
    result["losses"] = learned.fit(held_out.batches, epochs=args.epochs, progress=progress)
    dtype = None if args.out_dtype is None else DTYPES[args.out_dtype]
    facts = {"provenance": result}
    soup = learned.soup(out=args.out, out_dtype=dtype, shard_bytes=args.shard_bytes, metadata=facts)
    return _told(args, soup, evaluators, result)


def _wise(args: argparse.Namespace, states: Sequence[State], base: Any, result: dict[str, Any], progress: Any) -> str:
    evaluators = _evaluators(args, [*states, base], needed="wise")
    rows = []
    for number, (alpha, state) in enumerate(
        wise_ft(base, states[0], args.alphas, int_policy="first", **_choice(args)), 1
    ):
        rows.append({"alpha": alpha, **{name: evaluator(state) for name, evaluator in evaluators.items()}})
        progress("soup", number)
    result["curve"] = rows
    best = max(rows, key=lambda row: row["held-out"])
    if args.out is not None:
        layout = layout_of([base, *states], **_choice(args), name="soup")
        weight = torch.tensor([1 - best["alpha"], best["alpha"]], dtype=torch.float64)
        mix([base, *states], weight, layout=layout, out=args.out, int_policy="first", metadata={"provenance": result})
    if args.plots is not None:
        from ..soups.plots import plot_curve

        plot_curve(args.alphas, [row["held-out"] for row in rows], Path(args.plots) / "wise.png")
    lines = [" ".join(f"{key} {value:8.3f}" for key, value in row.items()) for row in rows]
    return "\n".join(
        [*lines, f"best on held-out data: alpha {best['alpha']:g}", *([f"written to {args.out}"] if args.out else [])]
    )


def _ensemble(
    args: argparse.Namespace, states: Sequence[State], base: Any, result: dict[str, Any], progress: Any
) -> str:
    evaluators = _evaluators(args, states, needed="ensemble")
    lines = []
    for name, evaluator in evaluators.items():
        logits, labels = [], Tensor()
        for number, state in enumerate(states, 1):
            evaluator.load(state.load())
            one, labels = _logits(evaluator)
            logits.append(one)
            progress("models", number)
        stack = torch.stack(logits)
        mean, greedy = logit_ensemble(stack), greedy_ensemble(stack, labels, accept=args.accept)
        bins = min(15, len(labels))
        result[name] = {
            "ensemble": accuracy_of(mean, labels), "ensemble_ece": ece(mean, labels, bins=bins),
            "greedy_ensemble": greedy.accuracy, "members": list(greedy.members),
            "single": [accuracy_of(one, labels) for one in stack],
        }  # fmt: skip
        r = result[name]
        lines.append(
            f"{name}: ensemble {r['ensemble']:.2f}% (ECE {r['ensemble_ece']:.3f}), greedy {r['greedy_ensemble']:.2f}% of "
            f"{len(greedy.members)}, best single {max(r['single']):.2f}%"
        )
    return "\n".join(lines)


def _geometry(
    args: argparse.Namespace, states: Sequence[State], base: Any, result: dict[str, Any], progress: Any
) -> str:
    evaluators = _evaluators(args, states)
    found = diagnose(states, base=base, evaluate=evaluators.get("held-out"), exclude=args.exclude)
    result["problems"], result["notes"] = list(found.problems), list(found.notes)
    if found.geometry is not None:
        g = found.geometry
        result["geometry"] = {name: getattr(g, name).tolist() for name in ("norms", "cosines", "distances")}
    result["barriers"] = [vars(barrier) for barrier in found.barriers]
    lines, held_out = [str(found)], evaluators.get("held-out")
    if found.geometry is None or held_out is None:
        return "\n".join(lines)
    if base is not None and len(states) > 1:
        gained = advantages(states, base, held_out, exclude=args.exclude)
        result["advantages"] = [vars(one) for one in gained]
        lines.append("angle of two models, and what their average gains over the mean of both:")
        lines += [
            f"  {a.angle:5.1f} degrees {a.advantage:+7.2f}  {states[a.first].name}, {states[a.second].name}"
            for a in gained
        ]
    if args.plots is not None and found.barriers:
        from ..soups.plots import plot_curve, plot_plane

        first = found.barriers[0]
        plot_curve(first.alphas, first.scores, Path(args.plots) / "line.png")
        if base is not None and len(states) > 1:
            seen = plane(base, states[0], states[1], held_out, size=9, progress=progress)
            result["plane"] = {
                "x": list(seen.x),
                "y": list(seen.y),
                "scores": seen.scores.tolist(),
                "points": list(seen.points),
            }
            plot_plane(seen, Path(args.plots) / "plane.png")
    return "\n".join(lines)


ACT: dict[str, Callable[..., str]] = {
    "uniform": _uniform,
    "greedy": _greedy,
    "learned": _learned,
    "wise": _wise,
    "ensemble": _ensemble,
    "geometry": _geometry,
}


# ---------------------------------------------------------------------------------------------------------- evaluation


def _evaluators(args: argparse.Namespace, states: Sequence[State], needed: str = "") -> dict[str, Evaluator]:
    """By name: the held-out data, and each --test."""
    specs = ({"held-out": args.data} if args.data is not None else {}) | {spec: spec for spec in args.test or []}
    if needed and args.data is None:
        raise ValueError(f"soup: 'data' must name held-out data for {needed}, got none; use --data SPEC")
    if not specs:
        return {}
    if args._adapters and args.base is None:
        raise ValueError(
            "soup: 'base' must name the model of the adapters, to evaluate them in, got none; use --base MODEL"
        )
    model = _model(args)
    again = None if args.recalibrate is None else common.load_data(args.recalibrate, args)
    return {name: Evaluator(model, common.load_data(spec, args), recalibrate=again) for name, spec in specs.items()}


def _model(args: argparse.Namespace) -> nn.Module:
    """A module that the weights fit."""
    spec = args.base if args._adapters else args.models[0]
    if not Path(spec).is_dir() and args.factory is not None:
        spec = args.factory
    return sources.load_model(spec, factory_args=args.factory_args).to(common.use_device(args.device))


def _logits(evaluator: Evaluator) -> tuple[Tensor, Tensor]:
    found, labels = [], []
    model = evaluator.model
    with evaluating(model), torch.no_grad():
        for batch in evaluator.batches:
            args, kwargs = batch_inputs(batch, device_of(model))
            found.append(output_tensor(model(*args, **kwargs)).cpu())
            labels.append(batch_labels(batch))
    if not labels or not isinstance(labels[0], Tensor):
        raise ValueError("soup: data must hold labels beside the inputs, got none")
    return torch.cat(found), torch.cat(labels)


def _told(args: argparse.Namespace, soup: Soup, evaluators: Mapping[str, Evaluator], result: dict[str, Any]) -> str:
    """The result's facts, and accuracies of the soup."""
    result["soup"] = json.loads(json.dumps(soup.to_dict(), default=str))
    lines = [f"{soup.recipe} soup of {len(soup.ingredients)} of {len(soup.names)} models"]
    lines += [f"  {weight:7.4f}  {name}" for weight, name in zip(soup.weights, soup.names) if weight]
    if evaluators:
        state = soup.state if soup.path is None else open_state(soup.path).load()
        assert state is not None
        if args.recalibrate is not None and soup.path is not None:  # the file gets the statistics that were evaluated
            facts = json.loads(open_state(soup.path).metadata[checkpoint.METADATA_KEY]) | {
                "recalibrated": args.recalibrate
            }
            states = [open_state(next(iter(evaluators.values())).recalibrated(state))]
            one = torch.ones(1, dtype=torch.float64)
            mix(states, one, layout=layout_of(states), out=soup.path, shard_bytes=args.shard_bytes, metadata=facts)
        result["accuracy"] = {name: evaluator(state) for name, evaluator in evaluators.items()}
        lines += [f"accuracy on {name}: {value:.2f}%" for name, value in result["accuracy"].items()]
    if soup.path is not None:
        lines.append(f"written to {soup.path}")
    return "\n".join([*lines, *(f"note: {note}" for note in soup.notes)])
