# SPDX-License-Identifier: Apache-2.0
"""``zipfast zip``: merge models from the command line, or show what could be merged."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import checkpoint, distributed, merging, sources
from ..evaluate import accuracy
from ..merging.assign import METHODS
from ..merging.sweep import plot_sweep, sweep
from . import common

EPILOG = """\
models:   a Hugging Face folder · package.module:factory@checkpoint · a checkpoint, with --factory
data:     a folder of images · an .npz (x, y or the model's keyword arguments) · package.module:function
workers:  torchrun --nproc-per-node 2 -m zipfast zip ...   shards the data and gives the same plan
examples:
  zipfast zip a.safetensors b.safetensors --factory zipfast.zoo:resnet --data train.npz --out merged.safetensors
  zipfast zip model-a/ model-b/ --data images/ --image-size 224 --stop encoder.stages.2 --out merged/
  zipfast zip model-a/ --cuts
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="*", metavar="MODEL", help="two or more; one for --plan-only, --cuts, --verify")
    model = parser.add_argument_group("models")
    model.add_argument("--factory", metavar="MODULE:NAME", help="what builds the models that checkpoints belong to")
    model.add_argument(
        "--factory-args", type=arguments, metavar="JSON", help="its keyword arguments, or a list, one for each model"
    )
    model.add_argument("--input-shape", type=shape, metavar="3x224x224", help="of one sample, where no data says it")
    common.add_data(parser)
    job = parser.add_argument_group("job")
    job.add_argument("--out", metavar="PATH", help="write there: .safetensors, or a folder for several heads")
    job.add_argument("--plan-only", action="store_true", help="print the feature spaces and stop")
    job.add_argument("--cuts", action="store_true", help="print the valid cuts and stop")
    job.add_argument("--verify", action="store_true", help="check on the first model what the plan promises, and stop")
    job.add_argument(
        "--evaluate", action="append", metavar="[HEAD=]SPEC", help="accuracy on labelled data (repeatable)"
    )
    job.add_argument("--sweep", action="store_true", help="merge for each alpha and beta below; needs --evaluate")
    job.add_argument("--alphas", type=common.numbers, default=[0.1, 0.3, 0.5, 1.0], metavar="A,A", help="for --sweep")
    job.add_argument("--betas", type=common.numbers, default=[0.0, 0.125, 0.5, 1.0], metavar="B,B", help="for --sweep")
    how = parser.add_argument_group("matching")
    how.add_argument("--method", choices=(*METHODS, "ensemble"), default="zip", help="(default: %(default)s)")
    how.add_argument("--similarity", choices=("activations", "weights", "mix"), default="activations")
    how.add_argument(
        "--mix", type=float, default=0.5, help="share of weights for --similarity mix (default: %(default)s)"
    )
    how.add_argument("--alpha", type=per_space, default=1.0, metavar="A or NAME=A,...", help="(default: 1)")
    how.add_argument("--beta", type=per_space, default=1.0, metavar="B or NAME=B,...", help="(default: 1)")
    how.add_argument("--weights", type=common.numbers, metavar="W,W", help="shares of the models in every average")
    how.add_argument(
        "--skip", nargs="+", default=[], metavar="SPACE", help="spaces (or patterns) to average as they are"
    )
    how.add_argument("--start", metavar="CUT", help="merge behind this module or node only")
    how.add_argument("--stop", metavar="CUT", help="merge up to this module or node only")
    how.add_argument(
        "--taps", choices=("last", "all"), default="last", help="places that are read (default: %(default)s)"
    )
    how.add_argument("--compat", action="store_true", help="the public code's matching rules")
    how.add_argument("--stale", action="store_true", help="keep batch-norm statistics as merged (for comparison)")
    how.add_argument("--repair", action="store_true", help="REPAIR layers without batch norm")
    how.add_argument("--unknown", choices=("error", "freeze"), default="error", help="ops without a rule")
    how.add_argument("--statistics", metavar="FILE", help=".safetensors to keep the statistics in, and to resume from")


def arguments(text: str) -> dict[str, Any] | list[dict[str, Any]]:
    """A JSON object, or a list of them."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text!r} ({e})") from None
    if not all(isinstance(item, dict) for item in (value if isinstance(value, list) else [value])):
        raise argparse.ArgumentTypeError(f"must be a JSON object, or a list with one for each model, got {text!r}")
    return value


def shape(text: str) -> tuple[int, ...]:
    """'3x224x224' as (3, 224, 224)."""
    try:
        return tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be sizes with an x between them, got {text!r}") from None


def per_space(text: str) -> float | dict[str, float]:
    """'0.3', or '*.conv1=0.5,fc=1' as a mapping."""
    try:
        if "=" not in text:
            return float(text)
        return {name.strip(): float(value) for name, _, value in (part.rpartition("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a number, or NAME=NUMBER with commas between, got {text!r}"
        ) from None


def run(args: argparse.Namespace) -> int:
    """Do the command."""
    with distributed.process_group() as (rank, world):
        if args.out is not None and not (args.plan_only or args.cuts or args.verify or args.sweep):
            (checkpoint.check_writable if str(args.out).endswith(".safetensors") else checkpoint.check_folder)(args.out)
        if args.plots is not None:
            Path(args.plots).mkdir(parents=True, exist_ok=True)
        look = args.plan_only or args.cuts or args.verify
        if len(args.models) < (1 if look else 2):
            raise ValueError(
                f"zip: 'models' must name {'a model' if look else 'two models or more'}, got {len(args.models)}; "
                "see zipfast zip --help"
            )
        device = (
            torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device(args.device)
        )
        wanted = args.models[:1] if look else args.models
        own = _arguments_of(args)
        models = [
            sources.load_model(spec, factory=args.factory, factory_args=given).to(device)
            for spec, given in zip(wanted, own)
        ]
        data = None if args.data is None else common.load_data(args.data, args, (rank, world))
        inputs, keywords = _example(args, models[0], data)
        inputs, keywords = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, (inputs, keywords))
        if look:
            return _look(args, models[0], inputs, keywords, data)
        if data is None:
            raise ValueError("zip: 'data' must name the data that features are compared on, got none; use --data SPEC")
        tests = [_labelled(spec, args) for spec in args.evaluate or []]
        origin = [
            sources.describe(spec, model, factory=args.factory, factory_args=given)
            for spec, model, given in zip(args.models, models, own)
        ]
        result = common.provenance("zip", args, origin)
        if args.sweep:
            return _sweep(args, models, inputs, keywords, data, tests, result)
        return _merge(args, models, inputs, keywords, data, tests, result)


def _arguments_of(args: argparse.Namespace) -> list[dict[str, Any] | None]:
    """The factory's arguments for each model."""
    given = args.factory_args
    if isinstance(given, list):
        if len(given) != len(args.models):
            raise ValueError(
                f"zip: 'factory-args' must be one object, or a list of one for each of {len(args.models)} models, "
                f"got a list of {len(given)}"
            )
        return given
    return [given] * len(args.models)


def _labelled(spec: str, args: argparse.Namespace) -> tuple[int | None, Any]:
    head, equals, rest = spec.partition("=")
    named = equals == "=" and head.isdigit()
    return (int(head) if named else None), common.load_data(rest if named else spec, args)


def _example(args: argparse.Namespace, model: nn.Module, data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs for the export: of the data, of the shape given, or of what a Hugging Face config says."""
    if data is not None:
        example = data.example(2)
        return ((), dict(example)) if isinstance(example, Mapping) else ((example,), {})
    if args.input_shape is not None:
        return (torch.zeros(2, *args.input_shape),), {}
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if main == "pixel_values" and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", 224)
        size = (size, size) if isinstance(size, int) else tuple(size)
        return (), {main: torch.zeros(2, config.num_channels, *size)}
    if main == "input_ids" and hasattr(config, "vocab_size"):
        return (), {main: torch.arange(32).reshape(2, 16) % config.vocab_size}
    raise ValueError("zip: 'data' must show what the model reads, got none; use --data SPEC or --input-shape 3x224x224")


def _look(args: argparse.Namespace, model: nn.Module, inputs: Any, keywords: Any, data: Any) -> int:
    graph = merging.find_spaces(model, inputs, keywords, unknown=args.unknown)
    if args.verify:
        from ..merging.verify import verify

        batches = [keywords or inputs] if data is None else data
        checked = verify(model, inputs, batches, example_kwargs=keywords, unknown=args.unknown)
        common.emit(asdict(checked) | {"ok": checked.ok}, str(checked), args.json)
        return 0 if checked.ok else 1
    valid = merging.cuts(graph)
    if args.cuts:
        rows = [vars(cut) | {"shape": list(cut.shape)} for cut in valid]
        lines = [f"{'node':<32} {'module':<40} {'shape':<20} {'parameters before':>18}"]
        lines += [
            f"{c.node:<32} {c.module or '(model)':<40} {'x'.join(map(str, c.shape[1:])):<20} {100 * c.share:>17.1f}%"
            for c in valid
        ]
        common.emit({"cuts": rows}, "\n".join(lines), args.json)
        return 0
    if args.start or args.stop:
        start = merging.resolve_cut(graph, args.start, "start") if args.start else None
        stop = merging.resolve_cut(graph, args.stop, "stop") if args.stop else None
        graph = merging.part_of(graph, start=start, stop=stop)
    common.emit(json.loads(graph.plan.to_json()), str(graph.plan), args.json)
    return 0


def _merge(
    args: argparse.Namespace,
    models: Sequence[nn.Module],
    inputs: Any,
    keywords: Any,
    data: Any,
    tests: Sequence[tuple[int | None, Any]],
    result: dict[str, Any],
) -> int:
    batches = min(len(data), args.batches or len(data))
    totals = dict.fromkeys(("moments", "repair", "batch norm"), batches)
    with common.Progress(args.quiet, totals) as progress:
        merged = merging.merge(
            models,
            inputs,
            data,
            example_kwargs=keywords,
            method=args.method,
            similarity=args.similarity,
            mix=args.mix,
            alpha=args.alpha,
            beta=args.beta,
            weights=args.weights,
            skip=args.skip,
            start=args.start,
            stop=args.stop,
            taps=args.taps,
            compat=args.compat,
            reestimate=not args.stale,
            repair=args.repair,
            max_batches=args.batches,
            unknown=args.unknown,
            statistics=args.statistics,
            progress=progress,
        )
    result["options"]["start"], result["options"]["stop"] = merged.options["start"], merged.options["stop"]
    result["seconds"] = dict(merged.seconds)
    result["spaces"] = {
        name: {
            "features": g.size,
            "in_model_merges": g.in_model_merges,
            "mean_similarity": float(g.value.mean()) if g.value.numel() else None,
            "lifted": g.lifted,
        }
        for name, g in merged.groups.items()
    }
    result["frozen"] = {space.name: list(space.frozen) for space in merged.plan.frozen}
    if isinstance(merged.module, merging.MultiHead):
        result["cost"] = merged.module.report(*inputs, **keywords)
    if tests:
        result["accuracy"] = {
            spec: accuracy(merged.module, batches, head=head) for spec, (head, batches) in zip(args.evaluate, tests)
        }
    if args.plots is not None and distributed.rank() == 0:
        _plot(merged, Path(args.plots) / "zip.png")
    if args.out is not None and distributed.rank() == 0:
        own = {"factory": args.factory, "factory_args": _arguments_of(args)[0] or {}} if args.factory else {}
        merged.save(args.out, {"provenance": result, **own})
        result["out"] = str(args.out)
    common.emit(result, _text(merged, result), args.json)
    return 0


def _text(merged: merging.Merged, result: Mapping[str, Any]) -> str:
    lines = [merged.report()]
    if "cost" in result:
        c = result["cost"]
        lines.append(
            f"parameters {c['parameters']:,} of the ensemble's {c['ensemble_parameters']:,} "
            f"({100 * c['parameters'] / c['ensemble_parameters']:.0f}%), "
            f"FLOPs {100 * c['flops'] / max(1, c['ensemble_flops']):.0f}% of the ensemble's"
        )
    lines += [f"accuracy on {spec}: {value:.1f}%" for spec, value in result.get("accuracy", {}).items()]
    if "out" in result:
        lines.append(f"written to {result['out']}")
    return "\n".join(lines)


def _sweep(
    args: argparse.Namespace,
    models: Sequence[nn.Module],
    inputs: Any,
    keywords: Any,
    data: Any,
    tests: Sequence[tuple[int | None, Any]],
    result: dict[str, Any],
) -> int:
    if not tests:
        raise ValueError("zip: 'evaluate' must name labelled data for a sweep, got none; use --evaluate SPEC")

    def score(module: nn.Module) -> float:
        return sum(accuracy(module, batches, head=head) for head, batches in tests) / len(tests)

    totals = {"moments": min(len(data), args.batches or len(data)), "sweep": len(args.alphas) * len(args.betas)}
    with common.Progress(args.quiet, totals) as progress:
        points = sweep(
            models,
            inputs,
            data,
            score,
            alphas=args.alphas,
            betas=args.betas,
            example_kwargs=keywords,
            start=args.start,
            stop=args.stop,
            max_batches=args.batches,
            progress=progress,
        )
    result["sweep"] = [vars(point) for point in points]
    if args.plots is not None and distributed.rank() == 0:
        plot_sweep(points, Path(args.plots) / "sweep.png", "accuracy, %")
    if args.out is not None and distributed.rank() == 0:
        common.write_json(Path(args.out), result)
    lines = [f"{'alpha':>6} {'beta':>6} {'accuracy':>9} {'in-model':>9} {'lifted':>7}"]
    lines += [f"{p.alpha:>6g} {p.beta:>6g} {p.score:>8.1f}% {100 * p.in_model:>8.0f}% {p.lifted:>7}" for p in points]
    common.emit(result, "\n".join(lines), args.json)
    return 0


def _plot(merged: merging.Merged, path: Path) -> None:
    """Per space how similar merged features are, and how many merges lie inside a model."""
    try:
        import matplotlib
    except ImportError as e:
        raise ImportError("zip: matplotlib must be installed for --plots; pip install 'zipfast[plots]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(merged.groups)
    inside = [sum(g.in_model_merges) / max(1, g.models * g.size - g.keep) for g in merged.groups.values()]
    similar = [float(g.value.mean()) if g.value.numel() else 0.0 for g in merged.groups.values()]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.25 * len(names)), layout="constrained")
    where = range(len(names))
    axes.barh([i - 0.2 for i in where], similar, 0.4, label="mean similarity of merged features")
    axes.barh([i + 0.2 for i in where], inside, 0.4, label="part of merges inside a model")
    axes.set_yticks(list(where), names, fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    with checkpoint.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)
    plt.close(figure)
