# SPDX-License-Identifier: Apache-2.0
"""``zipfast rank``: which of these pre-trained models should be fine-tuned on this data?"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .. import checkpoint, distributed, sources
from ..ranking.candidates import load_candidate
from ..ranking.evidence import MODES
from ..ranking.rank import METRICS, Ranking, rank
from ..ranking.targets import TASKS
from . import common
from .zip import arguments

EPILOG = """\
models:   a Hugging Face folder or name · timm:NAME · package.module:factory[@checkpoint] · a checkpoint, with --factory
          · saved features (.npy, .npz, .safetensors) · any of these as NAME=SPEC
data:     a folder of images, one folder per class · an .npz (x, y) · package.module:function
workers:  torchrun --nproc-per-node 2 -m zipfast rank ...   shards the data, metrics of one pass only
examples:
  zipfast rank resnet-18/ vit-tiny/ timm:convnext_atto --data images/ --image-size 224 --out ranking/
  zipfast rank a.npz b.npz c.npz --metrics logme,hscore,knn --truth accuracies.csv
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="*", metavar="MODEL", help="candidates")
    model = parser.add_argument_group("models")
    model.add_argument("--factory", metavar="MODULE:NAME", help="what builds the models that checkpoints belong to")
    model.add_argument("--factory-args", type=arguments, metavar="JSON", help="its keyword arguments")
    model.add_argument("--layers", nargs="+", metavar="NAME", help="take these submodules' outputs, one row each")
    model.add_argument("--pool", default="auto", help="auto, mean, first, last, max (default: %(default)s)")
    common.add_data(parser)
    data = parser.add_argument_group("labels")
    data.add_argument("--task", choices=TASKS, default="classification", help="(default: %(default)s)")
    data.add_argument("--classes", type=int, metavar="K", help="number of classes, where data need not have the last")
    data.add_argument("--ignore-index", type=int, metavar="LABEL", help="leave out samples with this label")
    data.add_argument("--labels", metavar="FILE", help=".npy, for saved features without their own")
    how = parser.add_argument_group("scores")
    how.add_argument(
        "--metrics", type=common.names, default=["logme"], metavar="M,M", help=f"of {', '.join(METRICS)}; first sorts"
    )
    how.add_argument("--mode", choices=tuple(MODES), default="exact", help="formula of LogME (default: %(default)s)")
    how.add_argument(
        "--bootstrap", type=int, default=100, metavar="B", help="replicates; 0: none (default: %(default)s)"
    )
    how.add_argument("--shards", type=int, default=16, help="parts that are resampled (default: %(default)s)")
    how.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")
    how.add_argument(
        "--truth", metavar="FILE", help="accuracies by name (.csv, .json, .yaml): adds weighted Kendall tau"
    )
    job = parser.add_argument_group("job")
    job.add_argument(
        "--out", metavar="FOLDER", help="journal, ranking.json and ranking.csv; a killed run goes on there"
    )
    job.add_argument("--save-features", metavar="FOLDER", help="keep features and labels there")


def run(args: argparse.Namespace) -> int:
    """Do the command; 1 where no candidate could be scored."""
    with distributed.process_group() as (worker, world):
        if not args.models:
            raise ValueError("rank: 'models' must name at least one candidate, got none; see zipfast rank --help")
        device = common.use_device(args.device)
        data = None if args.data is None else common.load_data(args.data, args, (worker, world))
        truth = None if args.truth is None else read_truth(args.truth)
        labels = None if args.labels is None else _read_labels(args.labels)
        if args.plots is not None:
            Path(args.plots).mkdir(parents=True, exist_ok=True)
        result = common.provenance("rank", args, [])

        def load(spec: str) -> nn.Module:
            kind = sources.parse_spec(spec).kind
            if kind == "folder" or spec.startswith(("hf:", "timm:")):
                return load_candidate(spec)
            factory = args.factory if kind == "checkpoint" else None  # others say themselves what builds them
            return load_candidate(spec, factory=factory, factory_args=args.factory_args)

        read = {} if data is None else dict(data.description)  # and what else a score depends on, for the journal
        read |= {name: getattr(args, name) for name in ("labels", "factory", "factory_args") if getattr(args, name)}

        batches = common.share(args.batches, worker, world)
        totals = {"models": len(args.models), "batches": common.batches_of(data, batches), "bootstrap": args.bootstrap}
        with common.Progress(args.quiet, totals) as progress:
            ranking = rank(
                args.models,
                data,
                task=args.task,
                metrics=args.metrics,
                mode=args.mode,
                classes=args.classes,
                ignore_index=args.ignore_index,
                layers=args.layers,
                pool=args.pool,
                labels=labels,
                max_batches=batches,
                bootstrap=args.bootstrap,
                shards=args.shards,
                confidence=args.confidence,
                seed=args.seed,
                device=device,
                out=args.out,
                save_features=args.save_features,
                load=load,
                data_name=json.dumps(read, sort_keys=True) if read else "",
                progress=progress,
            )
        return _report(args, ranking, truth, result)


def _report(
    args: argparse.Namespace, ranking: Ranking, truth: Mapping[str, float] | None, result: dict[str, Any]
) -> int:
    scored = [row for row in ranking.rows if row.error is None]
    result |= {"ranking": ranking.to_dict()}
    text, wrong = str(ranking), None
    try:
        found = {} if truth is None or not scored else ranking.agreement(truth)
    except (ValueError, ImportError) as e:  # said at the end: the scores are worth more
        found, truth, wrong = {}, None, e
    if found:
        result["agreement"] = {name: _plain(vars(a)) for name, a in found.items()}
        text += f"\n\nweighted Kendall tau with {args.truth}, 95% over the models"
        text += "".join(f"\n  {name:<12} {a}" for name, a in found.items())
    if distributed.rank() == 0:
        if args.plots is not None and scored:
            from ..ranking.plots import plot_ranking

            plot_ranking(ranking, Path(args.plots) / "ranking.png", truth)
        if args.out is not None:
            common.write_json(Path(args.out) / "ranking.json", result)
            with checkpoint.atomic_write(Path(args.out) / "ranking.csv", "w") as file:
                file.write(_csv(ranking))
    common.emit(result, text, args.json)
    if wrong is not None:
        raise wrong
    return 0 if scored else 1


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _csv(ranking: Ranking) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ranking.metrics
    writer.writerow(
        ["model", *columns, "low", "high", "first", "samples", "features", "parameters", "seconds", "error"]
    )
    for row in ranking.rows:
        low, high = row.intervals.get(ranking.metric, ("", ""))
        scores = [row.scores.get(name, "") for name in columns]
        seconds = round(sum(row.seconds.values()), 3) if row.seconds else ""
        rest = [row.first if row.first is not None else "", row.samples, row.features, row.parameters or "", seconds]
        writer.writerow([row.name, *scores, low, high, *rest, row.error or ""])
    return text.getvalue()


def _read_labels(path: str) -> Any:
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"rank: no labels at {source}")
    try:
        return np.load(source, allow_pickle=False)
    except (ValueError, OSError, EOFError) as e:
        raise ValueError(f"rank: {source} must be a .npy of numbers, got {' '.join(str(e).split())[:100]}") from None


def read_truth(path: str) -> dict[str, float]:
    """Accuracies by name, from a JSON or YAML mapping, or a CSV of two columns with or without a header.

    Raises:
        FileNotFoundError, ValueError: no such file; one of another form.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"truth: no file at {source}")
    try:
        if source.suffix in (".yaml", ".yml"):
            pairs = list(common.read_yaml(str(source)).items())
        elif source.suffix == ".json":
            pairs = list(json.loads(source.read_text()).items())
        else:
            lines = [line for line in csv.reader(source.read_text().splitlines()) if line]
            pairs = [(line[0], line[1]) for line in lines]
            if pairs and not _is_number(pairs[0][1]):
                pairs = pairs[1:]
        found = {str(name).strip(): float(value) for name, value in pairs}
    except (ValueError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(
            f"truth: {source} must hold names and accuracies, got {' '.join(str(e).split())[:100]}"
        ) from None
    if not found:
        raise ValueError(f"truth: {source} must hold names and accuracies, got none")
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
