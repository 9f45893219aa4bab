# SPDX-License-Identifier: Apache-2.0
"""Folders that ``from_pretrained`` of transformers loads: weights beside the files that say what they are.

A folder of Hugging Face holds weights and, beside them, companions: the configuration, and what prepares the model's
input (tokenizer, image processor). Whatever zipfast makes of such models gets the companions of the first. This module
copies files and reads JSON; it neither imports transformers nor takes Python files along.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .states import INDEXES, PICKLES, SINGLES

CONFIG = "config.json"
#: what stands beside the weights: all else in a folder (training state, code, a model card of another model) stays there
COMPANIONS = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.spm", "*.bpe", "*.model", "sentencepiece*",
    "chat_template.*", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "feature_extractor_config.json",
)  # fmt: skip
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", *INDEXES)
PROVENANCE = "zipfast.json"
SPEAKERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
DTYPE_ENTRIES = ("dtype", "torch_dtype")  # of transformers 5 and 4


def companions(folder: str | os.PathLike[str]) -> list[Path]:
    """The files beside the weights in a folder, config.json first; none where there is no config.json."""
    root = Path(folder)
    if not (root / CONFIG).is_file():
        return []
    found = {file: None for pattern in COMPANIONS for file in sorted(root.glob(pattern)) if file.is_file()}
    return list(found)


def folder_of(name: str | os.PathLike[str]) -> Path | None:
    """The folder of Hugging Face that a checkpoint is, or is the weights of; None for any other."""
    path = Path(name)
    root = path if path.is_dir() else path.parent if path.name in (*SINGLES, *INDEXES) else None
    return root if root is not None and (root / CONFIG).is_file() else None


def ties_words(name: str | os.PathLike[str]) -> bool:
    """Whether the folder of a checkpoint is of a language model whose output layer is its table of words."""
    root = folder_of(name)
    if root is None:
        return False
    try:
        known = dict(json.loads((root / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # whoever needs it says so
        return False
    speaks = any(str(one).endswith(SPEAKERS) for one in known.get("architectures") or ())
    return speaks and bool(known.get("tie_word_embeddings", True))  # transformers 4 leaves its default out


def copy_companions(
    source: str | os.PathLike[str], target: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> list[str]:
    """Copy the files beside the weights into another folder, each whole or not at all.

    Args:
        dtype: of the weights in `target`, where it is not that of the source: config.json names it, as ``from_pretrained``
            loads in that dtype.

    Returns:
        The names copied.

    Raises:
        ValueError: a config.json that is no JSON object. OSError: files.
    """
    if Path(source).resolve() == Path(target).resolve():
        return []
    names = []
    for file in companions(source):
        data = file.read_bytes()
        if file.name == CONFIG and dtype is not None:
            data = _with_dtype(file, data, dtype)
        with checkpoint.atomic_write(Path(target) / file.name) as out:
            out.write(data)
        names.append(file.name)
    return names


def _with_dtype(file: Path, data: bytes, dtype: torch.dtype) -> bytes:
    try:
        entries = dict(json.loads(data))
    except (ValueError, TypeError) as e:
        raise ValueError(f"save_pretrained: {file} cannot be read as a JSON object ({e})") from None
    named = [name for name in DTYPE_ENTRIES if name in entries] or [DTYPE_ENTRIES[0]]
    entries |= dict.fromkeys(named, str(dtype).removeprefix("torch."))
    return (json.dumps(entries, indent=2, sort_keys=True) + "\n").encode()


def write_config(model: Any, target: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """The configuration of a model of transformers, as its own ``save_pretrained`` writes it beside weights.

    Args:
        dtype: as of :func:`copy_companions`; None: the model's.
    """
    with tempfile.TemporaryDirectory(prefix=".config.", dir=target) as temporary:
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        for part in (config, getattr(model, "generation_config", None)):
            if part is not None:
                part.save_pretrained(temporary)
        copy_companions(temporary, target, dtype or getattr(model, "dtype", None))


def is_pretrained(model: Any) -> bool:
    """Whether a module is a model of transformers, or like one: it has a configuration and writes itself."""
    return callable(getattr(model, "save_pretrained", None)) and hasattr(model, "config")


def wants_folder(path: str | os.PathLike[str], model: Any) -> bool:
    """Whether a result goes into a folder by its path: neither .safetensors nor a pickle, of a model of transformers."""
    return is_pretrained(model) and Path(path).suffix not in (".safetensors", *PICKLES)


def renamed(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights under the names of a model's own parameters, where they have those of its files.

    transformers 5 gives some architectures (ViT among them) other names in memory than in the files that it reads and
    writes. Its own ``from_pretrained`` translates; None where it finds weights missing, left over or of another shape.

    Cost: the model is built and filled once.
    """
    with torch.random.fork_rng([]), redirect_stderr(io.StringIO()):  # progress bars
        try:
            own, found = type(model).from_pretrained(
                None,
                config=copy.deepcopy(model.config),
                state_dict=dict(state),
                dtype=model.dtype,
                output_loading_info=True,
            )
        except RuntimeError:  # shapes that do not fit
            return None
    if any(found.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")):
        return None
    result: dict[str, Tensor] = own.state_dict()
    return result


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    processor: Any = None,
    max_shard_size: int | str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a model of transformers as a folder that ``from_pretrained`` loads, with what prepares its input.

    Args:
        model: a ``PreTrainedModel``, or anything with its ``config`` and ``save_pretrained``.
        folder: made if need be. Weights of another model in it are replaced; nothing is, if writing fails.
        source: a folder whose tokenizer and processor files are copied; None: that which the model was loaded from, if it is
            local.
        processor: a tokenizer, image processor or the like, saved instead of `source`'s.
        max_shard_size: of a weight file, as transformers takes it ("1GB", or bytes); None: its own choice.
        facts: where the weights come from, kept as zipfast.json.

    Returns:
        The names of the files written.

    Raises:
        TypeError: no such model. FileNotFoundError: `source` has no config.json. OSError: the folder cannot be written.

    Cost: the weights are written once, as safetensors.
    """
    if not is_pretrained(model):
        kind = type(model).__name__
        raise TypeError(
            f"save_pretrained: 'model' must be a model of transformers, got a {kind}; save others with save or torch.save"
        )
    if source is not None and not (Path(source) / CONFIG).is_file():
        raise FileNotFoundError(f"save_pretrained: 'source' must be a folder with {CONFIG}, got {source}")
    origin = source or getattr(model.config, "_name_or_path", None) or getattr(model, "name_or_path", None)

    def write(target: Path) -> None:
        options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        with redirect_stderr(io.StringIO()):  # progress bars
            model.save_pretrained(target, **options)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(target)
        elif origin and Path(origin).is_dir():
            for file in companions(origin):
                if not (target / file.name).exists():  # the model's own config stands
                    shutil.copyfile(file, target / file.name)
        if facts is not None:
            text = json.dumps(dict(facts), indent=1, sort_keys=True, default=str)
            (target / PROVENANCE).write_text(text + "\n", encoding="utf-8")

    return publish(folder, write)


def publish(folder: str | os.PathLike[str], write: Callable[[Path], None]) -> list[str]:
    """Let `write` fill a temporary folder, then put its files in place of those of the same names, and of all weights.

    A folder that is not there appears at once. In one that is, files are renamed one after the other, weights and then their
    index last; a failure before that leaves it as it was.

    Raises:
        OSError: it is a file, or cannot be written.
    """
    target = Path(folder).expanduser()
    checkpoint.check_folder(target)
    if not target.exists():
        with checkpoint.atomic_folder(target) as temporary:
            write(temporary)
            names = sorted(file.name for file in temporary.iterdir())
        return names
    with tempfile.TemporaryDirectory(prefix=".pretrained.", dir=target) as name:
        write(Path(name))
        files = sorted(Path(name).iterdir(), key=_last)
        for file in files:
            checkpoint.sync(file)
        for (
            pattern
        ) in WEIGHTS:  # a reader takes whichever index or file it looks for first: none of another model may stay
            for old in target.glob(pattern):
                old.unlink()
        for file in files:
            if file.is_dir():  # as some processors keep their templates
                shutil.rmtree(target / file.name, ignore_errors=True)
            os.replace(file, target / file.name)
    return sorted(file.name for file in files)


def _last(file: Path) -> tuple[int, str]:
    """The order of renaming."""
    index = file.name in INDEXES
    weights = file.suffix in (".safetensors", ".bin")
    return (2 if index else 1 if weights else 0, file.name)
