# SPDX-License-Identifier: Apache-2.0
r"""PEFT's LoRA adapters as ingredients: their exact average as an adapter of summed rank, or merged into the base.

An adapter changes a weight by :math:`\Delta_i = s_i B_i A_i`, s = alpha / r (alpha / √r with rsLoRA). Averaging A and B on
their own gives :math:`(\sum w_i B_i)(\sum w_i A_i)`, which has all the products of one adapter's B with another's A: not the
average of the changes. That is

.. math:: \sum_i w_i \Delta_i = [w_1 s_1 B_1, ..., w_k s_k B_k] \; [A_1; ...; A_k]

to the rounding of the first factor, with the rank :math:`\sum r_i` (Hu et al. 2021, arXiv 2106.09685, §4.1, for the form).
Files are PEFT's: ``adapter_config.json`` beside ``adapter_model.safetensors``; PEFT itself is not needed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..pretrained import ties_words
from ..states import INDEXES, SINGLES, State, open_state

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
PARTS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_B.bias": "bias", ".lora_embedding_A": "a", ".lora_embedding_B": "b",
}  # fmt: skip
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ) move a part of it into the adapter.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Entries of a config that do not change what the factors mean, whatever they say.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type", "inference_mode",
    "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r", "lora_alpha",
    "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "lora_bias", "modules_to_save",
    "init_lora_weights", "eva_config", "runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size",
}  # fmt: skip
REASONS = {
    "use_dora": "DoRA divides by the norm of the changed weight: the average of such changes is no low-rank change",
    "target_parameters": "parameters of experts are three-dimensional, and are not read here",
}
WORDS = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|shared|embed_in|lm_head|embed_out)\.weight$")
HEADS = ("lm_head.weight", "embed_out.weight", "decoder.weight")
SHOWN = 5  # problems that a message names
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Pair:
    """Where the factors of one module are: keys of A [r, in, ...], B [out, r, ...] and of B's bias; and their scale."""

    a: str
    b: str
    bias: str | None
    scale: float
    embedding: bool


def is_adapter(source: Any) -> bool:
    """Whether a source is a PEFT adapter: a folder with its config and no whole model, or an :class:`Adapter`."""
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source).expanduser()
        return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in (*SINGLES, *INDEXES))
    return isinstance(source, Adapter)


class Adapter(State):
    """A folder of PEFT with a LoRA adapter, its tensors under the file's names.

    Attributes:
        config: of PEFT. pairs: by module (a path in the base model). whole: keys of tensors that stand for themselves:
            trained biases, and the modules in ``modules_to_save``.

    Raises:
        FileNotFoundError: no config or no weights. ValueError: no LoRA, or of a kind whose average is no LoRA (why is said);
            a file that is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser()
        place = self.folder / CONFIG
        if not place.is_file():
            raise FileNotFoundError(f"adapter: no {CONFIG} in {self.folder}")
        try:
            self.config = dict(json.loads(place.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as e:
            raise ValueError(f"adapter: {place} must hold a JSON object ({e})") from None
        _check_kind(str(self.folder), self.config)
        files = [self.folder / name for name in WEIGHTS if (self.folder / name).is_file()]
        if not files:
            raise FileNotFoundError(f"adapter: {self.folder} must hold {' or '.join(WEIGHTS)}, got neither")
        self.inner = open_state(files[0])
        super().__init__(str(self.folder), self.inner.entries)
        self.metadata, self.notes = dict(self.inner.metadata), list(self.inner.notes)
        self.pairs, self.whole = self._sort()

    def read(self, key: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
        return self.inner.read(key, start, stop, into)

    def close(self) -> None:
        self.inner.close()

    def _sort(self) -> tuple[dict[str, Pair], tuple[str, ...]]:
        found: dict[str, dict[str, str]] = {}
        whole = []
        for key in self.entries:
            end = next((end for end in PARTS if key.endswith(end)), None)
            if end is not None:
                found.setdefault(key.removesuffix(end), {})[PARTS[end]] = key
            elif ".lora_" in key:
                raise ValueError(f"adapter: {self.folder} must hold plain LoRA factors, got {key!r}")
            else:
                whole.append(key)
        pairs = {}
        for stem, keys in found.items():
            module = stem.removeprefix(PREFIX)
            if "a" not in keys or "b" not in keys:
                raise ValueError(f"adapter: {self.folder} is damaged: module {module!r} must have lora_A and lora_B")
            rank, own = self._rank(module), (self.entries[keys["a"]].shape, self.entries[keys["b"]].shape)
            if min(len(own[0]), len(own[1])) < 2 or own[0][0] != rank or own[1][1] != rank:
                raise ValueError(
                    f"adapter: {self.folder} is damaged: the factors of {module!r} must have rank {rank}, as {CONFIG} says, "
                    f"got shapes {list(own[0])} and {list(own[1])}"
                )
            alpha = float(_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8)))
            scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
            embedding = "lora_embedding_A" in keys["a"]
            pairs[module] = Pair(keys["a"], keys["b"], keys.get("bias"), scale, embedding)
        if not pairs:
            raise ValueError(f"adapter: {self.folder} must hold LoRA factors, got none")
        return pairs, tuple(whole)

    def _rank(self, module: str) -> int:
        rank = _pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8))
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"adapter: 'r' in {self.folder / CONFIG} must be a whole number above 0, got {rank!r}")
        return rank

    def factor(self, key: str) -> Tensor:
        """One tensor, as it is in the file.

        Raises:
            ValueError: a value that is not finite, by file, tensor and place.
        """
        value = self.tensor(key)
        wrong = (~torch.isfinite(value)).flatten()
        if bool(wrong.any()):
            raise ValueError(
                f"adapter: all values must be finite, got NaN or infinity in {self.folder}, tensor {key!r} at flat index "
                f"{int(wrong.to(torch.uint8).argmax())}"
            )
        return value


def _check_kind(name: str, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"adapter: {name} must be a LoRA adapter, got peft_type {config.get('peft_type')!r}")
    if config.get("init_lora_weights", True) not in INITS:
        raise ValueError(
            f"adapter: {name} must leave its base as it is, got init_lora_weights {config['init_lora_weights']!r}; save it "
            "with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    for key, value in config.items():
        if value and key not in HARMLESS and not (key == "loftq_config" and config.get("init_lora_weights") != "loftq"):
            why = REASONS.get(key, "what it makes of the factors is not known here")
            raise ValueError(f"adapter: {name} must be a plain LoRA, got {key} = {value!r}: {why}")


def _pattern(patterns: Any, module: str, otherwise: Any) -> Any:
    """PEFT's lookup: the first pattern that matches the end of the path, from a dot on."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


# ------------------------------------------------------------------------------------------------------------- together


def check_adapters(
    adapters: Sequence[Adapter], *, based: bool, normalized: bool, out_dtype: torch.dtype | None, name: str
) -> list[str]:
    """Whether adapters can be averaged, from the headers alone; notes for the user.

    Args:
        based: the base's weights are there. normalized: the weights add up to 1.

    Raises:
        ValueError: modules of other shapes, tensors that only some have, dtypes, other bases: all of them.
    """
    first, problems = adapters[0], list[str]()
    for other in adapters[1:]:
        for module in (m for m in first.pairs if m in other.pairs):
            one, two = first.pairs[module], other.pairs[module]
            shapes = [
                (who.entries[pair.a].shape[1:], who.entries[pair.b].shape[:1])
                for who, pair in ((first, one), (other, two))
            ]
            if shapes[0] != shapes[1] or one.embedding != two.embedding:
                problems.append(
                    f"{module!r} maps {[*shapes[0][0]]} to {[*shapes[0][1]]} in {first.name}, {[*shapes[1][0]]} to "
                    f"{[*shapes[1][1]]} in {other.name}"
                )
        bases = [str(who.config.get("base_model_name_or_path") or "") for who in (first, other)]
        if bases[0].rstrip("/") != bases[1].rstrip("/") and not based:
            problems.append(f"{first.name} is of the base {bases[0]!r}, {other.name} of {bases[1]!r}: say base")
        if bool(first.config.get("fan_in_fan_out")) != bool(other.config.get("fan_in_fan_out")):
            problems.append(f"fan_in_fan_out differs in {other.name}")
    keys = list(dict.fromkeys(key for adapter in adapters for key in adapter.whole))
    for key in keys:
        having = [adapter for adapter in adapters if key in adapter.whole]
        if len(having) < len(adapters) and not based:
            lacks = next(adapter for adapter in adapters if key not in adapter.whole)
            problems.append(f"{key!r} is in {having[0].name}, not in {lacks.name}: say base, whose value it then has")
        if len({adapter.entries[key].shape for adapter in having}) > 1:
            problems.append(f"{key!r} has several shapes")
    if keys and not normalized:
        problems.append(f"{keys[0]!r} is no change but a tensor of its own: weights must add up to 1 then")
    kinds = {str(entry.dtype).removeprefix("torch.") for adapter in adapters for entry in adapter.entries.values()}
    if len(kinds) > 1 and out_dtype is None and not based:
        problems.append(f"dtypes differ ({', '.join(sorted(kinds))}): say out_dtype")
    if problems:
        unique = list(dict.fromkeys(problems))
        more = f" and {len(unique) - SHOWN} more" if len(unique) > SHOWN else ""
        raise ValueError(f"{name}: the adapters must fit together, got: {'; '.join(unique[:SHOWN])}{more}")
    return [note for adapter in adapters for note in adapter.notes]


@dataclass(frozen=True)
class Factors:
    """A change of one module: B [out, R, ...] times A [R, in, ...], and of its bias."""

    a: Tensor
    b: Tensor
    bias: Tensor | None
    embedding: bool


def combine(adapters: Sequence[Adapter], column: Tensor, dtype: torch.dtype | None = None) -> dict[str, Factors]:
    """The weighted sum of all changes, by module; column float64 [k]. A module that an adapter lacks, it does not change."""
    found = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.pairs):
        parts: list[tuple[Tensor, Tensor]] = []
        bias: Tensor | None = None
        embedding = False
        for adapter, weight in zip(adapters, column.tolist()):
            if weight == 0 or module not in adapter.pairs:
                continue
            pair = adapter.pairs[module]
            a, b = adapter.factor(pair.a), adapter.factor(pair.b)
            kind, embedding = dtype or a.dtype, pair.embedding
            wide = torch.float64 if kind == torch.float64 else torch.float32
            parts.append((a.to(kind), (b.to(wide) * (weight * pair.scale)).to(kind)))
            if pair.bias is not None:
                own = adapter.factor(pair.bias).to(wide) * (weight * pair.scale)
                bias = own if bias is None else bias + own
        if parts:
            a, b = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], 1)
            found[module] = Factors(a, b, None if bias is None else bias.to(a.dtype), embedding)
    return found


def whole_tensors(
    adapters: Sequence[Adapter], column: Tensor, base: State | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The weighted sums of the tensors that stand for themselves, by key; where an adapter has none, it is the base's."""
    found = {}
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.whole):
        total: Tensor | None = None
        kind = dtype
        for adapter, weight in zip(adapters, column.tolist()):
            if weight == 0:
                continue
            value = adapter.factor(key) if key in adapter.whole else _of_base(base, key)
            kind = kind or value.dtype
            own = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32) * weight
            total = own if total is None else total + own
        if total is not None:
            found[key] = total.to(kind)
    return found


def base_key(key: str) -> str:
    """The name in the base of a tensor that stands for itself."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _of_base(base: State | None, key: str) -> Tensor:
    assert base is not None and base_key(key) in base.entries  # check_adapters and Adapted have looked
    return base.tensor(base_key(key))


def concatenated(
    adapters: Sequence[Adapter], column: Tensor, out_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The exact weighted sum as an adapter: (tensors under PEFT's names, config). The scale is 1, so that alpha = r."""
    factors = combine(adapters, column, out_dtype)
    with_bias = any(found.bias is not None for found in factors.values())
    tensors = {}
    for module, found in factors.items():
        ends = (".lora_embedding_A", ".lora_embedding_B") if found.embedding else (".lora_A.weight", ".lora_B.weight")
        tensors[f"{PREFIX}{module}{ends[0]}"], tensors[f"{PREFIX}{module}{ends[1]}"] = found.a, found.b
        if with_bias and not found.embedding:
            zero = found.b.new_zeros(found.b.shape[0])
            tensors[f"{PREFIX}{module}.lora_B.bias"] = zero if found.bias is None else found.bias
    tensors |= whole_tensors(adapters, column, dtype=out_dtype)
    ranks = {module: found.a.shape[0] for module, found in factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    unusual = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
    config = dict(adapters[0].config)
    config |= {
        "r": usual, "lora_alpha": usual, "rank_pattern": unusual, "alpha_pattern": dict(unusual), "use_rslora": False,
        "init_lora_weights": True, "inference_mode": True, "lora_bias": with_bias,
    }  # fmt: skip
    if len({json.dumps([_sorted(adapter.config.get(key)) for key in PLACES]) for adapter in adapters}) > 1:
        config |= {key: None for key in PLACES} | {"target_modules": sorted(factors)}
    config.pop("eva_config", None)
    return tensors, config


def _sorted(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def separated(
    adapters: Sequence[Adapter], column: Tensor, out_dtype: torch.dtype | None = None, *, name: str
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """A averaged with A and B with B: the rank stays, and the result is the average only where all A (or all B) are equal.

    Returns:
        (tensors, config, note): the note says how far the result is from the exact average.

    Raises:
        ValueError: other modules, ranks or scales.
    """
    first = adapters[0]
    for other in adapters[1:]:
        for module in dict.fromkeys([*first.pairs, *other.pairs]):
            seen = [
                None if pair is None else (who.entries[pair.a].shape[0], pair.scale)
                for who, pair in ((who, who.pairs.get(module)) for who in (first, other))
            ]
            if seen[0] != seen[1]:
                raise ValueError(
                    f"{name}: 'separate' must be left out for adapters of other ranks, scales or modules, got {module!r} in "
                    f"{first.name} and {other.name}"
                )
    tensors, off, norm = {}, 0.0, 0.0
    for module, pair in first.pairs.items():
        mean: dict[str, Tensor] = {}
        for key in (pair.a, pair.b, pair.bias):
            if key is not None:
                own = [adapter.factor(key).double() * w for adapter, w in zip(adapters, column.tolist())]
                mean[key] = torch.stack(own).sum(0)
                tensors[key] = mean[key].to(out_dtype or first.entries[key].dtype)
        exact = combine(adapters, column, torch.float64).get(module)
        if exact is not None:
            a, b = exact.a.flatten(1), exact.b.flatten(1)
            wide_a = torch.cat([a, mean[pair.a].flatten(1)])
            wide_b = torch.cat([b, -pair.scale * mean[pair.b].flatten(1)], 1)
            off, norm = off + _square(wide_a, wide_b), norm + _square(a, b)
    tensors |= whole_tensors(adapters, column, dtype=out_dtype)
    share = math.sqrt(max(0.0, off) / norm) if norm else 0.0
    exactly = "exact, as all A or all B are equal" if share < 1e-6 else f"{100 * share:.1f}% away from it"
    return tensors, dict(first.config), f"A and B were averaged separately, not the changes: the result is {exactly}"


def _square(a: Tensor, b: Tensor) -> float:
    """‖B A‖² by two small Gram matrices."""
    return float(((b.T @ b) * (a @ a.T)).sum())


# ------------------------------------------------------------------------------------------------------------------ base


class Adapted(State):
    """A base with changes added, piece by piece: each weight is formed in float32 and rounded once to the base's dtype.

    Args:
        base: a checkpoint. adapters: of it. column: float64 [k], their weights.

    Raises:
        ValueError: a module that the base has not, or of another shape: all of them; a change of the table of words, or of
        the output layer, in a base where they are one.
    """

    def __init__(self, base: State, adapters: Sequence[Adapter], column: Tensor, *, name: str = "adapted") -> None:
        super().__init__(f"{base.name} with {', '.join(adapter.name for adapter in adapters)}", base.entries)
        self.base, self.ties, self.metadata, self.notes = base, dict(base.ties), dict(base.metadata), list(base.notes)
        self.changes: dict[str, tuple[Tensor, Tensor]] = {}
        self.values: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        _check_words(base, adapters, name)
        problems = []
        fan = bool(adapters[0].config.get("fan_in_fan_out"))
        every = dict.fromkeys(base_key(key) for adapter in adapters for key in adapter.whole)
        if lacking := [key for key in every if key not in base.entries]:
            raise ValueError(
                f"{name}: the base must have what the adapters change, but {base.name} lacks {lacking[0]!r}"
            )
        wide = torch.float64 if any(e.dtype == torch.float64 for e in base.entries.values()) else torch.float32
        for module, found in combine(adapters, column, wide).items():
            key = f"{module}.weight"
            if key not in base.entries:
                problems.append(f"{base.name} lacks {key!r}")
                continue
            pair = _oriented(base.entries[key].shape, found, fan)
            if pair is None:
                shapes = f"{list(found.b.shape)} and {list(found.a.shape)}"
                problems.append(f"{key!r} is {list(base.entries[key].shape)}, which factors {shapes} do not fit")
                continue
            kind = torch.float64 if base.entries[key].dtype == torch.float64 else torch.float32
            self.changes[key] = pair[0].to(kind), pair[1].to(kind)
            if found.bias is not None:
                if f"{module}.bias" not in base.entries:
                    problems.append(f"{base.name} lacks '{module}.bias', which lora_bias changes")
                self.biases[f"{module}.bias"] = found.bias
        for key, value in whole_tensors(adapters, column, base, wide).items():
            if tuple(value.shape) != base.entries[base_key(key)].shape:
                shape = list(base.entries[base_key(key)].shape)
                problems.append(f"{base_key(key)!r} is {shape}, and {list(value.shape)} in an adapter")
            self.values[base_key(key)] = value
        if problems:
            raise ValueError(f"{name}: the base must have what the adapters change, but " + "; ".join(problems))
        touched = {*self.changes, *self.values, *self.biases}
        self.ties = {a: b for a, b in self.ties.items() if not {a, b} & touched}

    def read(self, key: str, start: int = 0, stop: int | None = None, into: Tensor | None = None) -> Tensor:
        entry = self.entries[key]
        stop = entry.numel if stop is None else min(stop, entry.numel)
        if key not in self.changes and key not in self.values and key not in self.biases:
            return self.base.read(key, start, stop, into)
        kind = torch.float64 if entry.dtype == torch.float64 else torch.float32
        source = self.values[key].reshape(-1)[start:stop] if key in self.values else self.base.read(key, start, stop)
        total = source.to(kind)
        if key in self.changes and stop > start:
            b, a = self.changes[key]
            top, width = start // a.shape[1], a.shape[1]
            rows = b[top : -(-stop // width)] @ a
            total = total + rows.reshape(-1)[start - top * width : stop - top * width]
        if key in self.biases:
            total = total + self.biases[key].to(kind).reshape(-1)[start:stop]
        result = total.to(entry.dtype)
        return result if into is None else into.view(-1)[: stop - start].copy_(result)

    def close(self) -> None:
        self.base.close()


def _check_words(base: State, adapters: Sequence[Adapter], name: str) -> None:
    """PEFT changes one of two tied layers, or both apart; merged, they would be loaded as one again."""
    if not ties_words(base.name) or any(key.endswith(HEADS) and key not in base.ties for key in base.entries):
        return
    for adapter in adapters:
        keys = [f"{module}.weight" for module in adapter.pairs]
        keys += [base_key(key) for key in adapter.whole if ".base_layer." not in key]
        if key := next((key for key in keys if WORDS.search(key)), None):
            raise ValueError(
                f"{name}: the base must keep its output layer apart from its table of words (tie_word_embeddings) where an "
                f"adapter changes one of them, but {adapter.name} changes {key!r} and {base.name} ties them; soup the "
                "adapters without base"
            )


def _oriented(shape: tuple[int, ...], found: Factors, fan: bool) -> tuple[Tensor, Tensor] | None:
    """(left [rows, R], right [R, columns]) whose product is the change, laid out as the weight; None if it does not fit."""
    a, b = found.a.flatten(1), found.b.flatten(1)
    if b.shape[1] != a.shape[0]:
        return None
    plain, turned = (b.shape[0], *found.a.shape[1:]), (*found.a.shape[1:], b.shape[0])
    if found.embedding or (shape == turned and (fan or shape != plain)):
        return (a.T.contiguous(), b.T.contiguous()) if shape == turned else None
    return (b, a) if shape == plain else None


def write_adapter(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """A folder that PEFT's ``from_pretrained`` loads: whole where it is new; else weights first, config last.

    Raises:
        OSError: it cannot be written.
    """
    checkpoint.check_folder(folder)

    def fill(place: Path) -> None:
        checkpoint.save(place / WEIGHTS[0], tensors, metadata)
        with checkpoint.atomic_write(place / CONFIG, "w") as file:
            json.dump(dict(config), file, indent=2, sort_keys=True)

    if Path(folder).exists():
        fill(Path(folder))
        return
    with checkpoint.atomic_folder(folder) as place:
        fill(place)
