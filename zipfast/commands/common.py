# SPDX-License-Identifier: Apache-2.0
"""What every command does alike: options from flags or a YAML file, data options, progress, results with provenance.

A command's options may stand in a YAML file (``--config``), under the names of the flags; a flag given on the command line
wins. Each result says what it was made of: versions, options, and the hash of every input.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .. import checkpoint, distributed
from .._version import __version__


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options that every command has."""
    group = parser.add_argument_group("general")
    group.add_argument("--config", metavar="FILE", help="YAML file with options under the names of the flags")
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("--plots", metavar="FOLDER", help="write pictures there")
    group.add_argument("--quiet", action="store_true", help="no progress")
    group.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Options that say which data is read and how."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="SPEC", help="a folder of images, an .npz, or package.module:function")
    group.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    group.add_argument("--batches", type=int, metavar="N", help="read so many batches at most, in each pass")
    group.add_argument("--samples", type=int, metavar="N", help="use the first N samples only")
    group.add_argument("--image-size", type=int, metavar="PIXELS", help="resize and crop images")
    group.add_argument("--mean", type=numbers, metavar="M,M,M", help="of the images' channels")
    group.add_argument("--std", type=numbers, metavar="S,S,S", help="of the images' channels")
    group.add_argument("--grayscale", action="store_true", help="read images with one channel")


def load_data(spec: str, args: argparse.Namespace, shard: tuple[int, int] = (0, 1)) -> Any:
    """The batches that a spec and the data options name."""
    from .. import sources

    data = sources.load_data(
        spec,
        batch_size=args.batch_size,
        image_size=args.image_size,
        mean=args.mean,
        std=args.std,
        grayscale=args.grayscale,
        max_samples=args.samples,
        shard=shard,
    )
    options = ("batch_size", "image_size", "mean", "std", "grayscale", "samples")
    data.description = {"spec": spec, **{name: getattr(args, name) for name in options}}
    return data


def use_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ValueError: there is no such kind. RuntimeError: it cannot be used here.
    """
    try:
        found = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: must be cpu or cuda, got {name!r}") from None
    if found.type != "cuda":
        return found
    if not torch.cuda.is_available():
        raise RuntimeError(f"device: {name!r} cannot be used, as torch sees no GPU here; see zipfast info")
    return found if found.index is not None else torch.device("cuda", torch.cuda.current_device())


def batches_of(data: Any, most: int | None) -> int | None:
    """How many batches a pass over the data has, `most` at most; None where nothing says it."""
    try:
        known = len(data)
    except TypeError:  # a Python loader without a length
        return most
    return known if most is None else min(known, most)


def share(most: int | None, rank: int, world: int) -> int | None:
    """How many batches a worker reads of the first `most`, of which it has every world-th from its rank on."""
    if most is None or world == 1:
        return most
    if most < world:
        raise ValueError(f"batches: must be at least 1 for each of {world} workers, got {most}")
    return len(range(rank, most, world))


def numbers(text: str | Sequence[Any]) -> list[float]:
    """'1,2.5' as [1.0, 2.5]; a YAML file may hold the list."""
    try:
        return [float(part) for part in (text.split(",") if isinstance(text, str) else text)]
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"must be numbers with commas between them, got {text!r}") from None


def names(text: str | Sequence[str]) -> list[str]:
    """'logme,knn' as a list; a YAML file may hold the list."""
    if isinstance(text, str):
        return [part.strip() for part in text.split(",") if part.strip()]
    if not isinstance(text, Sequence) or not all(isinstance(part, str) for part in text):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return list(text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The options from a YAML file, if one is named, with those of the command line on top.

    Raises:
        ValueError: the file has a key that is no option, or is no mapping. FileNotFoundError, ImportError: no file, no
            PyYAML.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    config = early.parse_known_args(list(argv))[0].config
    if config is not None:
        translate = parser.get_default("_translate")  # a command may read the files of other tools
        values = translate(read_yaml(config)) if translate else read_yaml(config)
        actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
        lists: dict[str, Any] = {}
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in actions:
                near = get_close_matches(name, actions, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(actions))}"
                raise ValueError(f"config: {config} must hold options of this command, got {key!r}{hint}")
            if value is None:  # "out:" with nothing behind it
                continue
            try:
                value = _option(actions[name], value)
            except (argparse.ArgumentTypeError, ValueError, TypeError) as e:
                raise ValueError(f"config: '{key}' in {config} {e}") from None
            if isinstance(actions[name], argparse._AppendAction):
                lists[name] = value  # as a default, flags would be appended to it
            else:
                actions[name].default = value
        parser.set_defaults(**{key: action.default for key, action in actions.items()})
        args = parser.parse_args(list(argv))
        for name, value in lists.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        return args
    return parser.parse_args(list(argv))


def _option(action: argparse.Action, value: Any) -> Any:
    """A value of a YAML file as the flag would give it; an error says what it must be."""
    if isinstance(action.nargs, str) or isinstance(action, argparse._AppendAction):
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items):
            raise ValueError(f"must be a text or a list of texts, got {value!r}")
        return items
    if action.type in (int, float) and isinstance(value, str):
        with suppress(ValueError):  # YAML takes 1e-3 for a text
            value = action.type(value)
    kinds: dict[Any, tuple[Any, str]] = {None: (str, "a text"), int: (int, "a whole number"), float: (Real, "a number")}
    kind, wanted = (bool, "true or false") if action.nargs == 0 else kinds.get(action.type, (None, ""))
    if kind is None and callable(action.type):
        value = action.type(value)
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"must be {wanted}, got {value!r}")
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"must be one of {', '.join(action.choices)}, got {value!r}")
    return value


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file's mapping, read safely."""
    try:
        import yaml
    except ImportError as e:
        raise ImportError("config: PyYAML must be installed to read YAML; pip install 'zipfast[cli]'") from e
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"config: no file at {source}")
    try:
        values = yaml.safe_load(source.read_text())
    except yaml.YAMLError as e:
        raise ValueError(f"config: {source} must be YAML ({' '.join(str(e).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"config: {source} must hold a mapping of options, got {type(values).__name__}")
    return values


def provenance(command: str, args: argparse.Namespace, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a result was made by and of."""
    options = {key: value for key, value in vars(args).items() if key != "command" and not key.startswith("_")}
    return {
        "command": command,
        "options": options,
        "inputs": [dict(item) for item in inputs],
        "zipfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "workers": distributed.world_size(),
    }


def emit(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a result, on the first worker only."""
    if distributed.rank() == 0:
        print(json.dumps(result, indent=1) if as_json else text)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result whole or not at all."""
    with checkpoint.atomic_write(path, "w") as file:
        json.dump(result, file, indent=1)


class Progress:
    """Progress on stderr, by tqdm where it is installed: called with (stage, done)."""

    def __init__(self, quiet: bool, totals: Mapping[str, int | None] | None = None) -> None:
        self.quiet, self.totals = quiet or distributed.rank() > 0, dict(totals or {})
        self.stage: str | None = None
        self.bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, stage: str, done: int) -> None:
        if self.quiet:
            return
        if stage != self.stage:
            self._close()
            self.stage, total = stage, self.totals.get(stage)
            try:
                from tqdm import tqdm

                # None: a bar is for a terminal; in a log, errors and warnings stand alone
                self.bar = tqdm(total=total, desc=stage, unit="batch", leave=False, disable=None)
            except ImportError:
                self.bar = None
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif done % 10 == 0:
            print(f"{stage}: {done}/{self.totals.get(stage) or '?'}", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None
