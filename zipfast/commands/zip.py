# SPDX-License-Identifier: Apache-2.0
"""``zipfast zip``: merge models from the command line, or show what could be merged."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from .. import checkpoint, distributed, merging, sources
from ..evaluate import accuracy
from ..merging.assign import METHODS
from ..merging.common import common_graph
from ..merging.sweep import plot_sweep, sweep
from ..pretrained import wants_folder
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
    job.add_argument(
        "--out",
        metavar="PATH",
        help="write there: .safetensors, a folder (several heads, transformers), .json for --sweep",
    )
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


def arguments(text: Any) -> dict[str, Any] | list[dict[str, Any]]:
    """A JSON object, or a list of them; a YAML file may hold them as they are."""
    try:
        value: dict[str, Any] | list[dict[str, Any]] = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as e:
        raise argparse.ArgumentTypeError(f"must be JSON, got {text!r} ({e})") from None
    if not all(isinstance(item, dict) for item in (value if isinstance(value, list) else [value])):
        raise argparse.ArgumentTypeError(f"must be a JSON object, or a list with one for each model, got {text!r}")
    return value


def shape(text: str | Sequence[int]) -> tuple[int, ...]:
    """'3x224x224' as (3, 224, 224); a YAML file may hold the list."""
    try:
        return tuple(int(part) for part in (text.lower().split("x") if isinstance(text, str) else text))
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"must be sizes with an x between them, got {text!r}") from None


def per_space(text: str | float | Mapping[str, float]) -> float | dict[str, float]:
    """'0.3', or '*.conv1=0.5,fc=1' as a mapping; a YAML file may hold the mapping."""
    try:
        if isinstance(text, Mapping):
            return {str(name): float(value) for name, value in text.items()}
        if not isinstance(text, str) or "=" not in text:
            return float(text)
        return {name.strip(): float(value) for name, _, value in (part.rpartition("=") for part in text.split(","))}
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"must be a number, or NAME=NUMBER with commas between, got {text!r}"
        ) from None


def run(args: argparse.Namespace) -> int:
    """Do the command."""
    with distributed.process_group() as (rank, world):
        look = args.plan_only or args.cuts or args.verify
        if len(args.models) < (1 if look else 2):
            raise ValueError(
                f"zip: 'models' must name {'a model' if look else 'two models or more'}, got {len(args.models)}; "
                "see zipfast zip --help"
            )
        if args.data is None and not look:
            raise ValueError("zip: 'data' must name the data that features are compared on, got none; use --data SPEC")
        device = common.use_device(args.device)
        wanted = args.models[:1] if look else args.models
        own = _arguments_of(args)
        models = [
            sources.load_model(spec, factory=args.factory, factory_args=given).to(device)
            for spec, given in zip(wanted, own)
        ]
        data = None if args.data is None else common.load_data(args.data, args, (rank, world))
        inputs, keywords = _example(args, models[0], data)
        inputs, keywords = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, (inputs, keywords))
        _check_fit(
            "data" if args.input_shape is None or data is not None else "input-shape", models[0], inputs, keywords
        )
        if data is None or look:
            return _look(args, models[0], inputs, keywords, data)
        _check_out(args, models, inputs, keywords)
        tests = [_labelled(spec, args) for spec in args.evaluate or []]
        for _, batches in tests:
            some = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, _first(batches))
            _check_fit("evaluate", models[0], *some)
        if args.plots is not None:
            Path(args.plots).mkdir(parents=True, exist_ok=True)
        origin = [
            sources.describe(spec, model, factory=args.factory, factory_args=given)
            for spec, model, given in zip(args.models, models, own)
        ]
        result = common.provenance("zip", args, origin)
        args.batches = common.share(args.batches, rank, world)
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
        return _first(data)
    if args.input_shape is not None:
        return (torch.zeros(2, *args.input_shape),), {}
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if main == "pixel_values" and hasattr(config, "num_channels"):
        size = getattr(config, "image_size", 224)
        size = (size, size) if isinstance(size, int) else tuple(size)
        return (), {main: torch.zeros(2, config.num_channels, *size)}
    if main == "input_ids" and hasattr(config, "vocab_size"):
        size = min(16, getattr(config, "max_position_embeddings", 16))
        return (), {main: torch.arange(2 * size).reshape(2, size) % config.vocab_size}
    raise ValueError("zip: 'data' must show what the model reads, got none; use --data SPEC or --input-shape 3x224x224")


def _first(data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first two inputs of a data source, as arguments of a forward call."""
    if common.batches_of(data, None) == 0 and distributed.world_size() == 1:
        raise ValueError("zip: 'data' must hold at least one batch, got none")
    example = data.example(2)
    return ((), dict(example)) if isinstance(example, Mapping) else ((example,), {})


def _check_out(
    args: argparse.Namespace, models: Sequence[nn.Module], inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Refuse, before the work, an ``--out`` that the result could not be written to."""
    if args.out is None:
        return
    named = args.out.endswith(".safetensors")
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in models]
    heads = args.method != "ensemble" and bool(args.start or args.stop or any(s != shapes[0] for s in shapes[1:]))
    if args.sweep:
        if not args.out.endswith(".json"):
            raise ValueError(f"zip: 'out' must end in .json for a sweep, got {args.out!r}")
        if Path(args.out).is_dir():
            raise OSError(f"cannot write {args.out}: it is a folder; give a file name")
        checkpoint.check_writable(Path(args.out).with_suffix(".safetensors"))  # the same folder
    elif heads and named:
        common_graph(models, inputs, keywords, unknown=args.unknown, start=args.start, stop=args.stop)  # is it one?
        raise ValueError(f"zip: 'out' must be a folder for a network with several heads, got {args.out!r}")
    elif heads or (args.method != "ensemble" and wants_folder(args.out, models[0])):
        checkpoint.check_folder(args.out)
    elif not named:
        raise ValueError(f"zip: 'out' must end in .safetensors for a whole model, got {args.out!r}")
    else:
        checkpoint.check_writable(args.out)


def _check_fit(option: str, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Run the model once, so that inputs which it cannot take are refused in one sentence: what, wanted, got.

    Raises:
        ValueError: a convolution, linear layer, norm or table that refused them is named; else it says what the model's
            own code said.
    """
    last: list[Any] = ["", model, ()]  # the module that was entered last, and with what

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, given: Any) -> None:
            last[:] = name, module, given

        return hook

    hooks = [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as e:  # whatever the model's own code raises
        shown = [("", value) for value in args] + [(f"{name} ", value) for name, value in kwargs.items()]
        got = [f"{name}{list(value.shape[1:])}" for name, value in shown if isinstance(value, Tensor)]
        why = _refusal(*last) or _first_line(e)
        raise ValueError(
            f"zip: '{option}' must give samples that {type(model).__name__} takes, got {', '.join(got)}: {why}"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()


def _refusal(name: str, module: nn.Module, given: Sequence[Any]) -> str | None:
    """What a layer wanted and got, as half a sentence; None if that was not what was wrong."""
    x = given[0] if given and isinstance(given[0], Tensor) and given[0].dim() > 1 else None
    who = f"{name!r} ({type(module).__name__}) wants"
    if x is None:
        return None
    if isinstance(module, _ConvNd) and x.shape[1] != module.in_channels:
        return f"{who} {module.in_channels} channels, got {x.shape[1]}"
    if isinstance(module, nn.Linear) and x.shape[-1] != module.in_features:
        return f"{who} {module.in_features} features, got {x.shape[-1]}"
    if isinstance(module, _NormBase) and x.shape[1] != module.num_features:
        return f"{who} {module.num_features} channels, got {x.shape[1]}"
    if isinstance(module, nn.Embedding) and not 0 <= int(x.min()) <= int(x.max()) < module.num_embeddings:
        return f"{who} indices in [0, {module.num_embeddings}), got {int(x.min())} to {int(x.max())}"
    return None


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(" .")


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
    totals = dict.fromkeys(("moments", "repair", "batch norm"), common.batches_of(data, args.batches))
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
    result["options"] |= {name: merged.options.get(name) for name in ("start", "stop")}  # as graph nodes
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
        merged.save(args.out, {"provenance": result, **_maker(args, merged, result)})
        result["out"] = str(args.out)
    common.emit(result, _text(merged, result), args.json)
    return 0


def _maker(args: argparse.Namespace, merged: merging.Merged, result: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the model that the result's weights belong to, so that the file can be loaded by itself."""
    whole = args.method != "ensemble" and not isinstance(merged.module, merging.MultiHead)
    if not whole or sources.parse_spec(args.models[0]).kind == "folder":
        return {}
    return {name: result["inputs"][0][name] for name in ("factory", "factory_args")}


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

    fixed = {"method": "zip", "similarity": "activations", "alpha": 1.0, "beta": 1.0, "statistics": None}
    for name, usual in fixed.items():
        if getattr(args, name) != usual:
            raise ValueError(f"zip: '{name}' must be left out for a sweep, got {getattr(args, name)!r}")

    def score(module: nn.Module) -> float:
        return sum(accuracy(module, batches, head=head) for head, batches in tests) / len(tests)

    totals = {"moments": common.batches_of(data, args.batches), "sweep": len(args.alphas) * len(args.betas)}
    with common.Progress(args.quiet, totals) as progress:
        points = sweep(
            models,
            inputs,
            data,
            score,
            alphas=args.alphas,
            betas=args.betas,
            example_kwargs=keywords,
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
