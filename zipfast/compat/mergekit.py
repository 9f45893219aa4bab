# SPDX-License-Identifier: Apache-2.0
"""mergekit with the methods of zipfast: ``zipfast_linear``, ``zipfast_greedy_soup`` and ``zipfast_zipit``.

mergekit has no plugins: its commands know the methods that are registered in their process. The console scripts
``zipfast-mergekit-yaml`` and ``zipfast-mergekit-pytorch`` register these and then run mergekit's own commands, with its own
flags; `register` and `run_merge` do the same from Python. Reading, tokenizers, dtypes, shards and the model card are
mergekit's. Supported: mergekit 0.1.5 (what 0.1.4 calls a method is another thing).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..commands.common import read_yaml
from ..states import INDEXES, SINGLES, open_state
from . import mergekit_recipes as recipes
from .mergekit_recipes import KEY, SETTINGS

SUPPORTED = ("0.1.5",)
FACTS = "zipfast.json"  # in the result's folder: which models a soup took, how features were matched
ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def check_version() -> str:
    """mergekit's version, if it is one that these methods are written for.

    Raises:
        ImportError: there is none, or another one; with the pip command.
    """
    wanted = f"mergekit {' or '.join(SUPPORTED)}"
    command = "pip install 'zipfast[mergekit]'"
    try:
        version = importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"mergekit: {wanted} must be installed, got none; {command}") from None
    if version.split("+")[0] not in SUPPORTED:
        raise ImportError(f"mergekit: {wanted} must be installed, got {version}; {command}")
    return version


def register() -> tuple[str, ...]:
    """Make the methods known to mergekit in this process; their names.

    Raises:
        ImportError: no mergekit, or an unsupported one. ValueError: a method of one of the names is there already; then
            none is registered.
    """
    check_version()
    from mergekit.merge_methods import register as add
    from mergekit.merge_methods import registered_methods

    from .mergekit_methods import methods

    there = {method.spec.name for method in registered_methods()}
    names = tuple(method.spec.name for method in methods())
    if twice := [name for name in names if name in there]:
        raise ValueError(f"register: {twice[0]!r} must be registered once, but mergekit has it already; call it once")
    for method in methods():
        add(method)
    return names


def run_merge(
    config: Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Any = None,
) -> None:
    """mergekit's ``run_merge``, with the pass over the whole models that a greedy soup or ZipIt! needs.

    Args:
        config: the mapping of a mergekit YAML, or the file; its block ``zipfast`` holds the settings of the whole models.
        out: the folder to write.
        options: ``mergekit.options.MergeOptions``.

    Raises:
        ImportError: no mergekit, or an unsupported one. ValueError: settings, models or data that do not fit; a folder that
            was not there before is not left behind.
    """
    check_version()
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge as merge
    from mergekit.options import MergeOptions

    _ready()
    options = options or MergeOptions()
    source = None
    if not isinstance(config, Mapping):
        path = os.fspath(config)
        config, source = read_yaml(path), Path(path).read_text(encoding="utf-8")
    with _whole(config, os.fspath(out), options):
        text = source or yaml.safe_dump(dict(config))
        merge(MergeConfiguration.model_validate(config), os.fspath(out), options=options, config_source=text)


def yaml_main(argv: Sequence[str] | None = None) -> int:
    """``zipfast-mergekit-yaml``: ``mergekit-yaml`` with the methods of zipfast."""
    return _script("zipfast-mergekit-yaml", "mergekit.scripts.run_yaml", "config_file", argv)


def pytorch_main(argv: Sequence[str] | None = None) -> int:
    """``zipfast-mergekit-pytorch``: ``mergekit-pytorch`` with the methods of zipfast."""
    return _script("zipfast-mergekit-pytorch", "mergekit.scripts.merge_raw_pytorch", "config_path", argv)


# ------------------------------------------------------------------------------------------------------------------ inside


def _script(name: str, module: str, argument: str, argv: Sequence[str] | None) -> int:
    """mergekit's own command under another name: what it parses and does, between our passes."""
    try:
        check_version()
        import click

        stock = importlib.import_module(module).main
        _ready()
    except ERRORS as e:
        print(f"{name}: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    from mergekit.options import MergeOptions

    def run(**given: Any) -> None:
        options = MergeOptions(**{key: given[key] for key in MergeOptions.model_fields if key in given})
        try:
            config = read_yaml(given[argument])
            with _whole(config, given["out_path"], options, raw=argument == "config_path"):
                stock.callback(**given)
        except ERRORS as e:
            if options.verbosity:
                raise
            raise click.ClickException(f"{' '.join(str(e).split())} (-v shows where)") from e

    about = f"{stock.help or 'Run a merge.'}\n\nmergekit's own command, with the methods {', '.join(_names())} besides."
    command = type(stock)(name=name, params=stock.params, callback=run, help=about)
    command.main(args=None if argv is None else list(argv), prog_name=name, standalone_mode=True)
    return 0


def _names() -> list[str]:
    from .mergekit_methods import methods

    return [method.spec.name for method in methods()]


def _ready() -> None:
    """Register, unless these very methods are there."""
    from mergekit.merge_methods import registered_methods

    from .mergekit_methods import methods

    if not all(any(method is own for method in registered_methods()) for own in methods()):
        register()


@contextmanager
def _whole(config: Mapping[str, Any], out: str, options: Any, raw: bool = False) -> Iterator[None]:
    """The pass over the whole models before mergekit's own work, the facts beside the result after it.

    A folder that mergekit made is deleted if it fails before the weights are whole: a part of them is of no use.
    """
    from .mergekit_methods import FOUND

    method = str(config.get("merge_method"))
    settings = recipes.check_settings(method, config.get(KEY))
    fresh = not Path(out).exists()
    facts: dict[str, Any] = {}
    try:
        if method.startswith("zipfast_"):
            facts = _look(method, config, settings, options, raw)
        yield
        if method.startswith("zipfast_") and not raw and (lost := _lost(config, out, options)):
            if fresh:
                shutil.rmtree(out, ignore_errors=True)
            raise ValueError(
                f"{method}: models must be of an architecture whose tensors mergekit finds all, but it left out {lost}; use "
                "zipfast zip or zipfast soup"
            )
        if facts:
            with checkpoint.atomic_write(Path(out) / FACTS, "w") as file:
                json.dump(facts, file, indent=1)
    except BaseException:
        if fresh and not any((Path(out) / name).exists() for name in (*SINGLES, *INDEXES)):
            shutil.rmtree(out, ignore_errors=True)
        raise
    finally:
        FOUND.clear()


def _look(method: str, config: Mapping[str, Any], settings: dict[str, Any], options: Any, raw: bool) -> dict[str, Any]:
    """Look at the whole models where the method needs it; what the result will be made of."""
    from .mergekit_methods import FOUND

    models, base = _references(config, raw)
    for model in models:
        recipes.check_checkpoint(method, model.model.path)
    if method not in SETTINGS:
        return {}
    if other := [name for name in ("slices", "modules") if config.get(name)]:
        raise ValueError(f"{method}: the config must list 'models', as whole models are compared, got {other[0]!r}")
    if config.get("tokenizer") or config.get("tokenizer_source") == "union":
        raise ValueError(f"{method}: models must share a tokenizer, got one to be built; leave 'tokenizer' out")
    if base is not None and base not in models:
        raise ValueError(f"{method}: 'base_model' must be one of the models, got {base}; list it, if it takes part")
    paths = [model.model.path if raw else _folder(model, options) for model in models]
    for path in paths:
        recipes.check_checkpoint(method, path)
    device, names = options.device or "cpu", [str(model) for model in models]
    found: Any
    if method == "zipfast_zipit":
        found = recipes.match_models(paths, settings, device=device)
        FOUND[method], told = (tuple(models), found), [found.summary()]
    else:
        found = recipes.choose_soup(paths, settings, device=device)
        FOUND[method] = dict(zip(models, found.weights))
        told = [f"{'+' if step.accepted else ' '} {step.score:10.4f}  {names[step.model]}" for step in found.tried]
    if not options.quiet:
        print(*told, sep="\n", file=sys.stderr)
    return recipes.facts_of(method, names, settings, found)


def _lost(config: Mapping[str, Any], out: str, options: Any) -> str | None:
    """A weight of a layer that mergekit, which guesses the layers of models that it does not know, has not written.

    It does so for names in files that are not those in memory, as ViT has them in transformers 5, and reports success.
    """
    models, _ = _references(config, raw=False)
    if config.get("slices") or config.get("modules") or not models:
        return None
    wanted, got = open_state(_folder(models[0], options)).entries, open_state(out).entries
    lost = [key for key in wanted if key not in got and re.search(r"\.\d+\..*\.weight$", key)]
    return f"{lost[0]!r} and {len(lost) - 1} more weights of layers" if lost else None


def _references(config: Mapping[str, Any], raw: bool) -> tuple[list[Any], Any]:
    """mergekit's references to the models of a config, in order, and to its base."""
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.scripts.merge_raw_pytorch import RawPyTorchMergeConfig

    if raw:
        flat = RawPyTorchMergeConfig.model_validate(config)

        def file(path: str) -> Any:
            return ModelReference.model_validate({"model": {"path": path}})

        return [file(one.model) for one in flat.models], None if flat.base_model is None else file(flat.base_model)
    whole = MergeConfiguration.model_validate(config)
    if whole.models:
        return [one.model for one in whole.models], whole.base_model
    return whole.referenced_models(), whole.base_model


def _folder(model: Any, options: Any) -> str:
    """Where a reference lies, fetched and with its adapter merged as mergekit itself would do it."""
    whole = model.merged(
        cache_dir=options.lora_merge_cache,
        trust_remote_code=options.trust_remote_code,
        lora_merge_dtype=options.lora_merge_dtype,
    )
    return str(whole.local_path(cache_dir=options.transformers_cache))
