# SPDX-License-Identifier: Apache-2.0
"""What mergekit's methods of zipfast do, without mergekit: settings, one tensor's average, and the passes over whole models.

mergekit merges tensor by tensor; which models go into a soup, or which features belong together, only whole models can tell.
So a pass over the whole models comes first (`choose_soup`, `match_models`), and leaves weights or groups of features: small
data, by which each tensor is then merged as mergekit hands it over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import sources
from ..features import batch_inputs, batch_labels, device_of, evaluating, output_tensor
from ..merging import merge
from ..merging.apply import apply_groups
from ..merging.assign import METHODS
from ..merging.match import Groups
from ..merging.plan import Plan
from ..ops import blend_
from ..ops.blend import FINITE
from ..soups.evaluator import Evaluator
from ..soups.mix import RUNNING, weights_of
from ..soups.recipes import Soup, greedy_soup
from ..states import foreign, open_state

KEY = "zipfast"  # of the YAML file's block with settings of whole models; mergekit reads over it
DATA = {"data": str, "batch_size": int, "samples": int, "length": int, "factory": str, "factory_args": dict}
GREEDY = {
    **DATA,
    "evaluate": str,
    "scores": list,
    "accept": str,
    "ties": str,
    "order": str,
    "seed": int,
    "journal": str,
}
ZIPIT = {
    **DATA, "method": str, "similarity": str, "mix": float, "alpha": (float, dict), "beta": (float, dict), "skip": list,
    "taps": str, "unknown": str,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {"zipfast_greedy_soup": GREEDY, "zipfast_zipit": ZIPIT}
LENGTH = 128  # tokens of a sample that is cut from a text


def check_settings(method: str, values: Any) -> dict[str, Any]:
    """The `zipfast` block of a config, each entry of its kind.

    Raises:
        ValueError: an entry that the method does not know, or of another kind.
    """
    known = SETTINGS.get(method, {})
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{method}: '{KEY}' must be a mapping, got {type(values).__name__}")
    if unknown := [name for name in values if name not in known]:
        have = f"one of {', '.join(known)}" if known else "left out"
        raise ValueError(f"{method}: what stands under '{KEY}' must be {have}, got {unknown[0]!r}")
    found = {}
    for name, value in values.items():
        kinds = known[name] if isinstance(known[name], tuple) else (known[name],)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kinds) or isinstance(value, bool):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{method}: '{name}' must be {wanted}, got {value!r}")
        found[name] = value
    return found


def check_checkpoint(method: str, path: str) -> None:
    """Refuse a file or folder with weights of another framework, or of an adapter, in one sentence.

    Raises:
        ValueError: names the file, what it belongs to, and what to do. FileNotFoundError: a path where nothing is.
    """
    place = Path(path).expanduser()
    if not place.exists() and (place.is_absolute() or path.startswith((".", "~")) or len(place.parts) > 2):
        raise FileNotFoundError(f"{method}: no model at {path}")  # a name on the hub is owner/name
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    names = [file.name for file in files]
    if any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) and "adapter" not in name for name in names):
        return
    if got := foreign(place):
        raise ValueError(f"{method}: models must be PyTorch checkpoints (.safetensors or .bin), got, in {path}, {got}")
    if "adapter_config.json" in names:
        raise ValueError(
            f"{method}: models must be whole checkpoints, got the adapter {path}; name it behind its base as base+adapter, "
            "or merge adapters by zipfast soup uniform"
        )


def blend_tensors(
    method: str,
    key: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    names: Sequence[str],
    normalize: bool = True,
) -> Tensor:
    """The weighted sum of one tensor of each model, in the dtype of the first; see :func:`zipfast.ops.blend_`.

    Raises:
        ValueError: weights that add up to 0; a value that is not finite, by model, tensor and place.
    """
    first = tensors[0]
    if not first.is_floating_point():
        raise TypeError(f"{method}: '{key}' must be of floating point, got {first.dtype}")
    column = weights_of(weights, len(tensors), normalize=normalize, name=f"{method}: {key}")
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    bad = torch.full((len(tensors) + 1, 1), FINITE, device=first.device)
    blend_([out], bad, [tensor.detach() for tensor in tensors], column[:, None].to(first.device))
    if bool((bad != FINITE).any()):
        i = int((bad != FINITE).nonzero()[0, 0])
        where = f"tensor {key!r} at flat index {int(bad[i, 0])}"
        if i == len(tensors):
            raise ValueError(
                f"{method}: the sum must fit into {out.dtype}, got an overflow in {where}; say dtype: float32"
            )
        raise ValueError(f"{method}: all values must be finite, got NaN or infinity in {names[i]}, {where}")
    return out


# ----------------------------------------------------------------------------------------------------------- whole models


@dataclass(frozen=True)
class Matching:
    """Which features of the models belong together; merges any tensor of theirs."""

    plan: Plan
    groups: Mapping[str, Groups]
    report: str

    def summary(self) -> str:
        """One line for the terminal."""
        means = [float(own.value.mean()) for own in self.groups.values() if own.value.numel()]
        mean = f", mean similarity {sum(means) / len(means):.3f}" if means else ""
        return f"features of {len(self.groups)} spaces matched, {len(self.plan.frozen)} left alone{mean}"

    def tensor(self, key: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One tensor of all models, merged (Stoica et al. 2024, eq. 4).

        Raises:
            ValueError: a tensor that the plan does not know, or of another shape; weights that are not positive.
        """
        names = {*self.plan.shapes, *(alias for own in self.plan.aliases.values() for alias in own)}
        if key not in names:
            raise ValueError(
                f"zipfast_zipit: tensor {key!r} must be a parameter of the model, but the plan has none of it"
            )
        states = [{key: tensor} for tensor in tensors]
        if any(not 0 < w < math.inf for w in weights):
            raise ValueError(
                f"zipfast_zipit: 'weight' must be positive for every model, got {list(weights)} for {key!r}"
            )
        equal = all(w == weights[0] for w in weights)
        return apply_groups(self.plan, self.groups, states, weights=None if equal else weights)[key]


def match_models(
    paths: Sequence[str],
    settings: Mapping[str, Any],
    *,
    device: str = "cpu",
    progress: Callable[[str, int], None] | None = None,
) -> Matching:
    """Run all models on the data and match their features (ZipIt!).

    Args:
        paths: two or more folders of one architecture, or files with `factory` in `settings`.
        settings: of :func:`check_settings`; `data` is needed.

    Raises:
        ValueError: no data; models whose graphs differ; batch norm, whose statistics a merge tensor by tensor cannot
            re-estimate; as :func:`zipfast.merge`.

    Cost: all models in memory, and as :func:`zipfast.merge`.
    """
    method = "zipfast_zipit"
    if "data" not in settings:
        raise ValueError(f"{method}: '{KEY}: data' must name the data that features are compared on, got none")
    if len(paths) < 2:
        raise ValueError(f"{method}: 'models' must be two or more, got {len(paths)}")
    if settings.get("method", "zip") not in METHODS:
        raise ValueError(f"{method}: 'method' must be one of {', '.join(METHODS)}, got {settings['method']!r}")
    batches = load_batches(method, settings, paths[0])
    models = [_load(path, settings).to(device) for path in paths]
    for model in models:
        config: Any = getattr(model, "config", None)
        if getattr(config, "use_cache", False):  # an export cannot return what is kept for generation
            config.use_cache = False
    statistics = [key for key in models[0].state_dict() if key.rsplit(".", 1)[-1] in RUNNING]
    if statistics:
        raise ValueError(
            f"{method}: models must be without batch norm, got {statistics[0]!r}: its statistics must be re-estimated after "
            "the merge; use zipfast zip"
        )
    args, kwargs = batch_inputs(batches.example(2) if hasattr(batches, "example") else batches[0], torch.device(device))
    how = {name: settings[name] for name in ZIPIT if name not in DATA and name in settings}
    merged = merge(models, args, batches, example_kwargs=kwargs, reestimate=False, progress=progress, **how)
    return Matching(merged.plan, merged.groups, merged.report())


def choose_soup(
    paths: Sequence[str],
    settings: Mapping[str, Any],
    *,
    device: str = "cpu",
    progress: Callable[[str, int], None] | None = None,
) -> Soup:
    """The greedy soup of checkpoints: which of them stay, by held-out data or a function of the user's.

    Args:
        paths: folders; or files, with `factory` in `settings`. With `evaluate` it can be left out: the function gets the
            state dict then, and else the module.
        settings: of :func:`check_settings`; either `data` or `evaluate` is needed.

    Returns:
        As :func:`zipfast.greedy_soup`.

    Raises:
        ValueError: neither or both; as :func:`zipfast.greedy_soup`.
    """
    method = "zipfast_greedy_soup"
    if ("data" in settings) == ("evaluate" in settings):
        seen = "both" if "data" in settings else "neither"
        raise ValueError(f"{method}: '{KEY}' must name either data or evaluate, got {seen}")
    whole = Path(paths[0]).is_dir() or "factory" in settings
    model = _load(paths[0], settings).to(device) if whole else None
    evaluate: Callable[[dict[str, Tensor]], float]
    if "evaluate" in settings:
        evaluate = _Named(sources.find_callable(method, settings["evaluate"], "evaluate"), model)
    elif model is None:
        raise ValueError(
            f"{method}: '{KEY}: factory' must say what {paths[0]} belongs to, as package.module:name, got none"
        )
    else:
        evaluate = _evaluator(method, model, load_batches(method, settings, paths[0]))
    how = {name: settings[name] for name in GREEDY if name not in DATA and name != "evaluate" and name in settings}
    return greedy_soup([open_state(path) for path in paths], evaluate, progress=progress, **how)


class _Named:
    """A function of the user's, called with the model that holds the weights; without one with the weights."""

    def __init__(self, function: Callable[..., Any], model: nn.Module | None) -> None:
        self.function, self.model = function, model
        self.loader = None if model is None else Evaluator(model, [])

    def __call__(self, state: dict[str, Tensor]) -> float:
        if self.loader is None or self.model is None:
            return float(self.function(state))
        self.loader.load(state)
        with evaluating(self.model), torch.no_grad():
            return float(self.function(self.model))


def _evaluator(method: str, model: nn.Module, batches: Any) -> Callable[[dict[str, Tensor]], float]:
    first = next(iter(batches), None)
    if first is None:
        raise ValueError(f"{method}: 'data' must hold at least one batch, got none")
    if isinstance(batch_labels(first), Tensor):
        return Evaluator(model, batches)
    if "input_ids" in batch_inputs(first)[1]:
        return TokenLoss(model, batches)
    raise ValueError(f"{method}: 'data' must hold labels, or the input_ids of a language model, got neither")


class TokenLoss:
    """``score(state)``: minus the mean loss, in nats, of the next token; higher is better.

    Args:
        model: of language, whose answer has logits [N, L, words]. batches: mappings with ``input_ids`` [N, L] and perhaps
            ``attention_mask``: a token that is masked is not asked for.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        self.model, self.batches, self.loader = model, batches, Evaluator(model, [])

    def __call__(self, state: Mapping[str, Tensor]) -> float:
        self.loader.load(state)
        total, count = 0.0, 0
        device = device_of(self.model)
        with evaluating(self.model), torch.no_grad():
            for batch in self.batches:
                _, kwargs = batch_inputs(batch, device)
                logits = output_tensor(self.model(**kwargs))[:, :-1]
                wanted = kwargs["input_ids"][:, 1:]
                if "attention_mask" in kwargs:
                    wanted = wanted.masked_fill(kwargs["attention_mask"][:, 1:] == 0, -100)
                total += float(F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum"))
                count += int((wanted != -100).sum())
        if not count:
            raise ValueError("zipfast_greedy_soup: 'data' must hold sequences of two tokens or more, got none")
        return -total / count


# -------------------------------------------------------------------------------------------------------------- data


def load_batches(method: str, settings: Mapping[str, Any], path: str) -> Any:
    """The data of a config: a text file, cut into tokens by the tokenizer in `path`, or what ``zipfast.sources`` reads."""
    spec = settings["data"]
    size, samples = settings.get("batch_size", 8), settings.get("samples")
    if spec.endswith(".txt"):
        return _read_text(method, Path(spec), path, settings.get("length", LENGTH), size, samples)
    if "length" in settings:
        raise ValueError(f"{method}: 'length' must be left out without a .txt file, got {settings['length']}")
    return sources.load_data(spec, batch_size=size, max_samples=samples)


def _read_text(
    method: str, text: Path, folder: str, length: int, batch_size: int, samples: int | None
) -> list[dict[str, Tensor]]:
    for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1), ("samples", samples, 1)):
        if value is not None and value < least:
            raise ValueError(f"{method}: '{name}' must be at least {least}, got {value}")
    if not text.is_file():
        raise FileNotFoundError(f"{method}: no text at {text}")
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise ImportError(f"{method}: transformers must be installed to read {text}; pip install transformers") from e
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # whatever a folder without a tokenizer makes transformers raise
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"{method}: {folder} must hold a tokenizer to read {text} with, got none ({first})") from e
    tokens = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"], dtype=torch.int64)
    rows = tokens[: len(tokens) // length * length].view(-1, length)[:samples]
    if not len(rows):
        raise ValueError(f"{method}: {text} must hold at least 'length' = {length} tokens, got {len(tokens)}")
    return [{"input_ids": part} for part in rows.split(batch_size)]


def _load(path: str, settings: Mapping[str, Any]) -> nn.Module:
    return sources.load_model(path, factory=settings.get("factory"), factory_args=settings.get("factory_args"))


def facts_of(method: str, paths: Sequence[str], settings: Mapping[str, Any], found: Soup | Matching) -> dict[str, Any]:
    """What the result was made by and of, for the file beside it."""
    from .._version import __version__

    facts = {"method": method, "models": list(paths), "settings": dict(settings), KEY: __version__}
    if isinstance(found, Soup):
        return facts | {"soup": json.loads(json.dumps(found.to_dict()))}
    return facts | {"plan": json.loads(found.plan.to_json()), "report": found.report.splitlines()}
