# SPDX-License-Identifier: Apache-2.0
"""Models and data from the short texts that the command line and YAML files use.

What a spec names in Python is imported and called, for it is the user's own word. A file is never a reason to run code:
checkpoints are read as plain tensors, arrays without pickle, a Hugging Face class comes from the installed transformers,
and a factory that stands in a file's metadata is called unasked only if it is one of ``zipfast.zoo``. Images are decoded
batch by batch: memory does not grow with their number. Order and shards depend on the spec and the arguments alone.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import checkpoint
from .features import batch_inputs
from .optional import check_version
from .states import foreign

CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_FACTORY = re.compile(r"([A-Za-z_][\w.]*:[A-Za-z_][\w.]*)(?:@(.+))?")
# What chooses code from elsewhere in a config.json; without it transformers takes its own.
_FOREIGN = re.compile(r"_?(attn|experts)_implementation(_internal)?|auto_map|fusion_config|trust_remote_code")


@dataclass(frozen=True)
class Spec:
    """A model spec, taken apart: its form, and what stands before and after the ``@``."""

    text: str
    kind: Literal["folder", "factory", "checkpoint"]
    factory: str | None = None
    path: str | None = None


def parse_spec(spec: str) -> Spec:
    """Take a model spec apart by its letters alone; what is no factory and does not end like a checkpoint is a folder.

    Example:
        >>> parse_spec("zipfast.zoo:resnet@a.pt")
        Spec(text='zipfast.zoo:resnet@a.pt', kind='factory', factory='zipfast.zoo:resnet', path='a.pt')
    """
    text = os.fspath(spec)
    if found := _FACTORY.fullmatch(text):
        return Spec(text, "factory", found[1], found[2] and os.path.expanduser(found[2]))
    return Spec(text, "checkpoint" if text.endswith(CHECKPOINTS) else "folder", None, os.path.expanduser(text))


def load_model(spec: str, *, factory: str | None = None, factory_args: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that a spec names, in eval mode, on the CPU.

    Args:
        spec: - a folder with config.json: the class of transformers that it names first under ``architectures``, with
                its safetensors, or else .bin, in the dtype stored. Tensors that the class has no use for are left.
              - ``package.module:factory``: what it returns. The current directory is searched too, while importing.
              - ``package.module:factory@checkpoint``: the same with the weights of a .safetensors, .pt, .pth or .bin.
              - a checkpoint: its factory is ``factory``, or the one in the metadata if that is of ``zipfast.zoo``.
        factory: ``package.module:factory``, for a checkpoint.
        factory_args: its keyword arguments; without them those in the file's metadata serve, if it names that factory.

    Returns:
        The module, in its own dtype. Loading is strict, but tied tensors may be in the file once, and a ``module.``
        before all names is dropped.

    Raises:
        FileNotFoundError: nothing at the path. ImportError: no such module, or no transformers. TypeError: arguments do
        not fit the factory, or it gives no module. ValueError: no factory; a file that does not fit (factory and tensors
        are named) or that cannot be read without running code.

    Cost: one call of the factory and one reading of the file.

    Example:
        >>> load_model("zipfast.zoo:mlp", factory_args={"in_features": 4, "hidden": [8], "out_features": 2})[1]
        Linear(in_features=4, out_features=8, bias=True)
    """
    parsed, name, args = _resolve(spec, factory, factory_args)
    module = find_callable("load_model", name)(**args) if name else _load_folder(Path(str(parsed.path)))
    if not isinstance(module, nn.Module):
        raise TypeError(f"load_model: {name} must return a torch.nn.Module, got {type(module).__name__}")
    if name and parsed.path:
        _load_weights(module, checkpoint.load(parsed.path), parsed.path, name)
    return module.to("cpu").eval()


def describe(
    spec: str,
    model: nn.Module | None = None,
    *,
    factory: str | None = None,
    factory_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Where a model comes from, for the metadata of what is made of it; arguments and errors as in :func:`load_model`,
    whose result can be given as ``model``; without it, it is loaded.

    Returns:
        ``spec``; ``factory`` and ``factory_args`` as used (``transformers:Class`` for a folder); ``checkpoint``, the
        file or folder, or None; ``state_hash`` of the weights, by :func:`zipfast.checkpoint.state_hash`.

    Example:
        >>> facts = describe("zipfast.zoo:mlp", factory_args={"hidden": [8]})
        >>> facts["factory"], facts["factory_args"], facts["checkpoint"], len(facts["state_hash"])
        ('zipfast.zoo:mlp', {'hidden': [8]}, None, 64)
    """
    parsed, name, args = _resolve(spec, factory, factory_args)
    model = load_model(spec, factory=factory, factory_args=factory_args) if model is None else model
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    used = {"factory": name or f"transformers:{type(model).__name__}", "factory_args": args}
    return {"spec": parsed.text, **used, "checkpoint": parsed.path, "state_hash": checkpoint.state_hash(tensors)}


class Batches:
    """Batches that can be read again and again, from :func:`load_data`: pairs ``(inputs, labels)`` of a tensor, or a dict
    of tensors, and a tensor or None; those of a Python function as they come. ``len`` counts the batches of this shard;
    ``classes`` are the names behind the labels, or None."""

    def __init__(self, rows: Any, read: Any, size: int, shard: tuple[int, int], classes: Any = None) -> None:
        self._rows, self._read, self._size, self._shard = rows, read, size, shard  # without read, rows are batches
        self.classes: tuple[str, ...] | None = classes and tuple(classes)
        self.description: dict[str, Any] = {}  # of whoever asked for the data, for the provenance of results

    def __len__(self) -> int:
        return len(range(self._shard[0], -(-len(self._rows) // (self._size if self._read else 1)), self._shard[1]))

    def __iter__(self) -> Iterator[Any]:
        if self._read is None:
            yield from islice(self._rows, self._shard[0], None, self._shard[1])
            return
        for start in range(self._shard[0] * self._size, len(self._rows), self._shard[1] * self._size):
            yield self._read(self._rows[start : start + self._size])

    def example(self, n: int = 2) -> Any:
        """The first ``n`` inputs, or all if there are fewer, whatever the shard: a tensor or a dict of tensors; TypeError
        if there is no batch, or one that neither is nor starts with a tensor or a mapping."""
        if n < 1:
            raise ValueError(f"example: 'n' must be at least 1, got {n}")
        head = self._read(self._rows[:n]) if self._read else next(iter(self._rows), None)
        args, kwargs = batch_inputs(head)
        return args[0][:n] if args else {k: v[:n] if isinstance(v, Tensor) and v.ndim else v for k, v in kwargs.items()}


def load_data(
    spec: str,
    *,
    batch_size: int = 32,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    grayscale: bool = False,
    max_samples: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """The data that a spec names, as :class:`Batches`.

    Args:
        spec: - a folder with a folder of images per class, numbered by name, or with images and no labels. The classes
                are spread evenly: every batch and every ``max_samples`` holds them in proportion. Images become RGB
                without alpha, float32 in [0, 1], [N, C, H, W]; EXIF rotation is ignored. Needs Pillow.
              - an .npz: ``x``, ``inputs`` or ``images`` is the input, or else all arrays but the labels are keyword
                arguments of the model; ``y`` or ``labels`` are the labels. Floats become float32 and integers int64;
                uint8 inputs of 3 axes or more are pixels and become float32 in [0, 1]. Axes stay in place.
              - ``package.module:function``: the batches that it returns, as they are, whatever ``batch_size``; for
                shards they must come in the same order in every process.
        batch_size, max_samples: samples per batch, of which the last may have fewer; use so many samples, the first.
        image_size: pixels of the centre square that is cut out, after the shorter side is resized to it (bilinear,
            antialiased), for a folder; without it all images must have one size.
        mean, std: of images, per channel: (x - mean) / std.
        grayscale: one channel, for a folder.
        shard: (rank, world): batches rank, rank + world, ...; there may be none.

    Raises:
        FileNotFoundError: nothing at the path. ImportError: no such module, or no Pillow. TypeError: batches that can be
        read once. ValueError: an empty folder, bad arrays, options that do not fit; on reading, a bad image, by name.

    Cost: images: one batch in memory, decoded in every pass. An .npz is held in memory. Deterministic.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/a.npz", x=np.zeros((5, 3)), y=np.arange(5))
        ...     data = load_data(f"{folder}/a.npz", batch_size=2)
        >>> len(data), [tuple(inputs.shape) for inputs, labels in data]
        (3, [(2, 3), (2, 3), (1, 3)])
    """
    text, path = os.fspath(spec), Path(spec).expanduser()
    calls = _FACTORY.fullmatch(text) is not None and "@" not in text and not path.is_dir()
    counts = {"batch_size": batch_size, "image_size": image_size, "max_samples": max_samples}
    if bad := [option for option, value in counts.items() if value is not None and value < 1]:
        raise ValueError(f"load_data: '{bad[0]}' must be at least 1, got {counts[bad[0]]}")
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"load_data: 'shard' must be (rank, world) with 0 <= rank < world, got {tuple(shard)}")
    unfit: dict[str, Any] = {} if path.is_dir() else {"image_size": image_size, "grayscale": grayscale or None}
    unfit |= {"mean": mean, "std": std, "max_samples": max_samples} if calls else {}
    if bad := [option for option, value in unfit.items() if value is not None]:
        raise ValueError(f"load_data: '{bad[0]}' must be left out for {text!r}, got {unfit[bad[0]]!r}")
    if path.is_dir():
        files, classes = _list_images(path)
        read = _image_reader(files[0][0], image_size, "L" if grayscale else "RGB", mean, std)
        return Batches(files[:max_samples], read, batch_size, shard, classes)
    if calls:
        found = find_callable("load_data", text)()
        if isinstance(found, (Iterator, Tensor, Mapping, str)) or not isinstance(found, Iterable):
            kind = type(found).__name__
            raise TypeError(f"load_data: {text} must return batches to read repeatedly (list, DataLoader), got {kind}")
        return Batches(found, None, batch_size, shard)
    if not path.exists():
        raise FileNotFoundError(f"load_data: no file or folder at {path}")
    if path.suffix != ".npz":
        raise ValueError(f"load_data: 'spec' must be a folder, an .npz or package.module:function, got {text!r}")
    return Batches(*_array_reader(path, max_samples, mean, std), batch_size, shard)


def _line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def find_callable(op: str, name: str, what: str = "factory") -> Callable[..., Any]:
    """What stands behind ``package.module:name``; the name may have dots. The current directory is searched too.

    Args:
        op: who asks, and what: for which option, for messages. name: the user's own word, never that of a file.

    Raises:
        ValueError: another form. ImportError: no such module. TypeError: nothing of that name that can be called.

    Example:
        >>> find_callable("load_model", "zipfast.zoo:mlp").__name__
        'mlp'
    """
    if (found := _FACTORY.fullmatch(name)) is None or found[2]:
        kind = "factory" if what == "factory" else "function"
        raise ValueError(f"{op}: {what!r} must be package.module:{kind}, got {name!r}")
    module, attribute = name.split(":")
    sys.path.insert(0, here := os.getcwd())  # as `python -m` does
    try:
        target: Any = importlib.import_module(module)
    except ImportError as e:
        raise ImportError(f"{op}: {module!r} must be a module that can be imported, got: {_line(e)}") from e
    finally:
        sys.path[:] = [entry for entry in sys.path if entry is not here]  # what it was, and what the module made of it
    for part in attribute.split("."):
        target = getattr(target, part, None)
    if not callable(target):
        raise TypeError(f"{op}: {attribute!r} must be a function or class in {module!r}, got {type(target).__name__}")
    function: Callable[..., Any] = target
    return function


def _resolve(spec: str, factory: str | None, args: Mapping[str, Any] | None) -> tuple[Spec, str | None, dict[str, Any]]:
    """The spec, the factory to call (none for a folder) and its arguments."""
    parsed = parse_spec(spec)
    if args is not None and not isinstance(args, Mapping):
        raise TypeError(f"load_model: 'factory_args' must be a mapping, got {type(args).__name__}")
    if (factory and parsed.kind != "checkpoint") or (args and parsed.kind == "folder"):
        extra = "factory" if factory else "factory_args"
        raise ValueError(f"load_model: '{extra}' must be left out for {parsed.text!r}, got {factory or args!r}")
    if parsed.kind == "folder":
        return parsed, None, {}
    if parsed.path and not os.path.isfile(parsed.path):
        raise FileNotFoundError(f"load_model: no checkpoint at {parsed.path}")
    known = checkpoint.read_metadata(parsed.path) if parsed.path and parsed.path.endswith(".safetensors") else {}
    written, name = str(known.get("factory") or ""), parsed.factory or factory
    # No dots in a file's word: "zipfast.zoo:torch.hub.load" would run anything.
    if name is None and not re.fullmatch(r"zipfast\.zoo:\w+", written):
        seen = f"None (the file names {written!r}: if you trust it, pass it)" if written else "None"
        raise ValueError(f"load_model: 'factory' must be package.module:factory for {parsed.path}, got {seen}")
    name = name or written
    return parsed, name, dict(known.get("factory_args") or {} if args is None and name == written else args or {})


def _load_weights(module: nn.Module, state: dict[str, Tensor], path: str, name: str) -> None:
    own = module.state_dict(keep_vars=True)
    bare = {key.removeprefix("module."): value for key, value in state.items()}
    # DataParallel writes "module." before all names; but a module may have a child of that name, so the names decide.
    if all(key.startswith("module.") for key in state) and len(bare.keys() & own) > len(state.keys() & own):
        state = bare
    plain = {k: v for k, v in own.items() if isinstance(v, Tensor) and not is_lazy(v) and v.layout == torch.strided}
    ties: dict[Any, list[str]] = {}
    for key, value in plain.items():
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        ties.setdefault(place if value.numel() and not value.is_meta else key, []).append(key)
    for names in ties.values():
        given = [key for key in names if key in state]
        for key in given[1:]:
            if not torch.equal(state[key], state[given[0]]):  # torch would keep the last without a word
                raise ValueError(f"load_model: {path} must hold one value for {given[0]!r} and {key!r}, got two")
        state.update({key: state[given[0]] for key in names if given and key not in state})
    shapes = [(k, v.shape, state[k].shape) for k, v in plain.items() if k in state and v.shape != state[k].shape]
    try:  # torch compares the names: modules may translate those of older files
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as e:
        _check_fit(path, name, [k for k in own if k not in state], [k for k in state if k not in own], shapes)
        raise ValueError(f"load_model: {path} cannot be loaded into {name} ({_line(e)})") from e
    _check_fit(path, name, missing, unexpected)


def _check_fit(
    path: Any, name: str, missing: Sequence[Any], unexpected: Sequence[Any] = (), shapes: Sequence[Any] = ()
) -> None:
    """Raise the one sentence on tensors that do not fit; ``shapes``: (name, wanted, got)."""
    wrong = [f"{list(got)} instead of {list(wanted)} for {key!r}" for key, wanted, got in shapes[:1]]
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        wrong += [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"] if keys else []
    if wrong:
        raise ValueError(f"load_model: {path} must hold the tensors of {name}, got {' and '.join(wrong)}")


def _read_json(path: Path) -> dict[str, Any]:
    """Without the entries that choose foreign code, at any depth."""
    try:
        text = path.read_text(encoding="utf-8")
        return dict(json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if not _FOREIGN.fullmatch(k)}))
    except (ValueError, TypeError) as e:
        raise ValueError(f"load_model: {path} cannot be read as a JSON object ({_line(e)})") from e


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, files = folder / f"{name}.index.json", [name]
        if not (folder / name).is_file():
            shards = dict(_read_json(index).get("weight_map", {})).values() if index.is_file() else ()
            files = sorted({Path(file).name for file in shards})  # an index cannot point outside the folder
        if files:
            return {key: tensor for file in files for key, tensor in checkpoint.load(folder / file).items()}
    other = foreign(folder)
    also = f", but {other}" if other else ""
    raise FileNotFoundError(
        f"load_model: no model.safetensors or pytorch_model.bin, nor shards of them, in {folder}{also}"
    )


def _load_folder(folder: Path) -> nn.Module:
    path = folder / "config.json"
    if not folder.exists():
        raise FileNotFoundError(f"load_model: no folder at {folder}; only local files are read")
    if not path.is_file():
        raise ValueError(f"load_model: 'spec' must be a folder with config.json, a file or module:name, got {folder}")
    entries = _read_json(path)
    names = entries.get("architectures")
    try:
        hf: Any = importlib.import_module("transformers")
    except ImportError as e:
        raise ImportError(f"load_model: transformers must be installed for {folder}; pip install transformers") from e
    check_version(hf, "transformers", "load_model")
    cls: Any = getattr(hf, str(names[0]), None) if isinstance(names, list) and names else None
    if hf.PreTrainedModel not in getattr(cls, "__mro__", ()):
        raise ValueError(f"load_model: {path} must name a model of transformers in 'architectures', got {names!r}")
    if "quantization_config" in entries:
        raise ValueError(f"load_model: {folder} must hold plain weights, got quantized ones")
    # Tensors go in, not the folder: there, transformers would look for adapters and for kinds of files that run code.
    # But it loads them, as it knows the names that its older versions wrote.
    options = {"state_dict": _read_tensors(folder), "local_files_only": True, "output_loading_info": True}
    options |= {"torch_dtype": "auto"} if hf.__version__.startswith("4.") else {}  # the default since 5
    try:
        config = cls.config_class.from_dict(entries)
        if hasattr(config, "use_pretrained_backbone"):
            config.use_pretrained_backbone = False  # it would be fetched, only to be overwritten
        with redirect_stderr(io.StringIO()):  # progress bars
            module, info = cls.from_pretrained(None, config=config, ignore_mismatched_sizes=True, **options)
    except Exception as e:
        raise ValueError(f"load_model: {folder} cannot be loaded as {cls.__name__} ({_line(e)})") from e
    shapes = [(key, wanted, got) for key, got, wanted in sorted(info["mismatched_keys"])]
    _check_fit(folder, cls.__name__, sorted(info["missing_keys"]), (), shapes)
    module.config._name_or_path = str(folder)  # as from_pretrained of a folder has it: where its tokenizer is
    loaded: nn.Module = module
    return loaded


def _list_images(root: Path) -> tuple[list[tuple[Path, int | None]], list[str] | None]:
    """Files with labels in the order of use, and the names of the classes."""
    dirs = [root, *sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != ".")]  # a dot marks leftovers
    flat, *members = (sorted(p for p in d.iterdir() if p.suffix.lower() in IMAGES and p.name[0] != ".") for d in dirs)
    if bool(flat) == any(members):
        raise ValueError(f"load_data: {root} must hold images or a folder per class, got {'both' if flat else 'none'}")
    if flat:
        return [(file, None) for file in flat], None
    # Batches of one class would have statistics that are not those of the data: file i of n goes to the place
    # (i + 1/2) / n of the whole. An empty folder keeps its number, so that parts of one data set agree.
    order = sorted(((i + 0.5) / len(m), label, file) for label, m in enumerate(members) for i, file in enumerate(m))
    return [(file, label) for _, label, file in order], [d.name for d in dirs[1:]]


def _normalizer(mean: Any, std: Any, channels: int) -> Callable[[Tensor], Tensor]:
    """x -> (x - mean) / std, for x [N, C, H, W]."""
    numbers = [[0.0] * channels if mean is None else mean, [1.0] * channels if std is None else std]
    for option, given in zip(("mean", "std"), numbers):
        if len(given) != channels or (option == "std" and min(given) <= 0):
            raise ValueError(f"load_data: '{option}' must hold {channels} numbers (std: above 0), got {list(given)}")
    shift, scale = torch.tensor(numbers, dtype=torch.float32)[:, :, None, None]
    return lambda x: (x - shift) / scale


def _image_reader(first: Path, size: int | None, mode: str, mean: Any, std: Any) -> Callable[[Any], Any]:
    """What decodes a list of (file, label); without a size all must have that of the first file."""
    try:
        from PIL import Image
    except ImportError as e:
        raise ImportError("load_data: Pillow must be installed for images; pip install 'zipfast[images]'") from e
    normalize = _normalizer(mean, std, len(mode))

    def decode(file: Path) -> Any:  # a PIL image
        try:
            with Image.open(file) as opened:
                if opened.mode[0] in "IF":
                    raise ValueError("more than 8 bits per channel")  # converting would clip them
                image = opened.convert(mode)
        except Exception as e:  # Pillow raises many kinds
            raise ValueError(f"load_data: {file} cannot be read as an image ({_line(e)})") from e
        if common and image.size != common:
            raise ValueError(f"load_data: 'image_size' must be given for {common} in {first}, {image.size} in {file}")
        if not size:
            return image
        wide, high = (int(size * side / min(image.size)) for side in image.size)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        return image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))

    def read(rows: list[tuple[Path, int | None]]) -> tuple[Tensor, Tensor | None]:
        pixels = torch.stack([torch.from_numpy(np.array(decode(file))) for file, _ in rows])  # [N, H, W] or + [C]
        x = pixels.reshape(*pixels.shape[:3], -1).permute(0, 3, 1, 2).contiguous() / 255
        return normalize(x), None if rows[0][1] is None else torch.tensor([label for _, label in rows])

    common: tuple[int, int] | None = None
    common = None if size else decode(first).size
    return read


def _array_reader(path: Path, most: int | None, mean: Any, std: Any) -> tuple[range, Callable[[range], Any]]:
    """The rows of an .npz, and what reads a range of them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in file.files}
    except Exception as e:  # damaged files raise many kinds
        raise ValueError(f"load_data: {path} cannot be read as plain arrays ({_line(e)})") from e
    rows = {name: len(a) if a.ndim and a.dtype.kind in "biuf" else str(a.dtype) for name, a in arrays.items()}
    if len(set(rows.values())) != 1 or not all(isinstance(n, int) and n for n in rows.values()):
        raise ValueError(f"load_data: {path} must hold numbers, in arrays with the same number of rows, got {rows}")
    labels = [name for name in ("y", "labels") if name in arrays]
    alone = [name for name in ("x", "inputs", "images") if name in arrays]
    inputs = [name for name in arrays if name not in labels]
    if not inputs or len(labels) > 1 or (alone and len(inputs) > 1):
        raise ValueError(f"load_data: {path} must hold x (or keyword arguments) and perhaps y, got {', '.join(arrays)}")
    pixels = {n for n in inputs if arrays[n].ndim > 2 and arrays[n].dtype == np.uint8}  # they stay small until read
    kinds: dict[str, Any] = {"f": np.float32, "b": np.bool_}
    for n, a in arrays.items():
        arrays[n] = a[:most].astype(np.uint8 if n in pixels else kinds.get(a.dtype.kind, np.int64), order="C")
    first = arrays[inputs[0]]
    normalize: Callable[[Tensor], Tensor] = nn.Identity()
    if mean is not None or std is not None:
        if not alone or first.ndim != 4 or first.dtype not in (np.uint8, np.float32):
            raise ValueError(f"load_data: 'mean' and 'std' must be left out without images [N, C, H, W], got {path}")
        normalize = _normalizer(mean, std, first.shape[1])

    def read(part: range) -> tuple[Any, Tensor | None]:
        found = {n: torch.tensor(a[part.start : part.stop]) for n, a in arrays.items()}
        found |= {n: found[n] / 255 for n in pixels}
        target = found.pop(labels[0]) if labels else None
        return normalize(found[alone[0]]) if alone else found, target

    return range(len(first)), read
