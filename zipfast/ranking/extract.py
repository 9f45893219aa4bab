# SPDX-License-Identifier: Apache-2.0
"""Features of a pre-trained model: what a new linear head on it would see, one vector per sample.

Three routes to the pre-logits, told apart by what the model is and answers, never by its class:

- timm: ``forward_head(forward_features(x), pre_logits=True)``;
- a model that ends in a linear layer (or 1x1 convolution): what enters that layer. It is known by its output, which *is*
  the answer or shares its memory; or, if the answer is a copy (softmax, one token picked, pooled maps), by its name
  (:data:`HEADS`) and width. A head that works on every token is run with its input beside its output, so that the
  model's own code picks or averages both;
- no head: of a Hugging Face record ``pooler_output``, or ``last_hidden_state`` if the pooler has a linear layer (often in
  no checkpoint, hence random); of anything else, the answer.

Or the outputs of named layers. Law: for features that needed no pooling, ``head(features) == logits``. Cost: one forward
pass per batch (two for the first batch of a head per token), in eval mode, without gradients; no hook stays.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..features import batch_inputs, batch_labels, device_of, evaluating, output_tensor
from ..optional import WINDOWS, UnsupportedVersion, check_version
from ..sources import CHECKPOINTS, load_model

POOLS = ("auto", "mean", "first", "last", "max", "channels_first", "channels_last")
#: a layer whose path has one of these parts may be the head of an answer that is a copy
HEADS = frozenset({"classifier", "classification_head", "score", "fc", "head", "heads"})
_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")  # their first axis is N
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LATEST = 8  # calls that are kept while the head is not known: it is among the last layers
_POOLINGS = (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d)
_Raw: TypeAlias = tuple[Tensor, str, bool]  # before pooling; what it is; whether it is rank 3 with channels second
_Layers: TypeAlias = Sequence[str] | None
_Progress: TypeAlias = Callable[[str, int], None] | None


class _Call(NamedTuple):
    """One call of a layer; that the tensors are kept keeps their memory from being used again."""

    name: str
    module: nn.Module
    input: Tensor
    output: Tensor
    version: int  # of the output: whoever writes there raises it


class Extractor:
    """A model seen as a feature extractor.

    Args:
        model: any module. Floating inputs take the dtype of its first floating parameter, and all its device; an entry
            ``labels`` of a batch that is a mapping is left out, as no loss is wanted.
        layers: dotted paths as in ``named_modules()``: their outputs are taken instead of the pre-logits (the last call
            counts; of a record or tuple, what :func:`zipfast.features.output_tensor` finds).
        pool: how more axes become [N, D]; [N, D] stays as it is.
            - "auto": the mean over positions of maps: rank 4 and more, as [N, C, H, W], and rank 3 that has as many
              channels as the 1-d convolution or batch norm it comes from, as [N, C, L]. Else rank 3 is tokens [N, T, D]:
              the first if a parameter's or buffer's name has "cls_token"; the last of a causal decoder (the config says
              is_decoder, or an architecture that ends in CausalLM, or an attention layer says is_causal; not of an
              encoder with a decoder); else the mean.
            - "mean", "max": over positions or tokens. "first", "last": that token.
            - "channels_first", "channels_last": the mean over all axes but the second, or but the last, at any rank;
              torchvision's Swin has maps [N, H, W, C], which nothing tells from [N, C, H, W].
            A batch's ``attention_mask`` [N, T], if as long as the tokens, says which of them count, padded left or right.

    Attributes:
        names: [""] for the pre-logits, or the layers. how: after a call, what was taken, in words.
        logits: the class logits [N, C] of the last call where a head was found, else None.

    A call takes a batch, as :func:`zipfast.features.batch_inputs` reads it, and returns name -> [N, D], detached, on the
    model's device; float32, or float64 if the model has it.

    Raises:
        TypeError: no module; no floating tensor. ValueError: wrong layers or pool, or a layer that is not called; rows
        that are not the batch's; logits of no known head; a token asked of a map. RuntimeError: the head is gone.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> extractor = Extractor(net)
        >>> features = extractor(torch.ones(2, 1, 2, 2))[""]
        >>> tuple(features.shape), extractor.how, torch.equal(net[3](features), extractor.logits)
        ((2, 8), "input of '3'", True)
    """

    def __init__(self, model: nn.Module, *, layers: _Layers = None, pool: str = "auto") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"extract: 'model' must be a torch module, got {type(model).__name__}")
        if pool not in POOLS:
            raise ValueError(f"extract: 'pool' must be one of {', '.join(POOLS)}, got {pool!r}")
        modules = {name: module for name, module in model.named_modules() if name}
        wrong = [layers] if isinstance(layers, str) else [name for name in layers or () if name not in modules]
        if layers is not None and (wrong or not layers):
            some = ", ".join(list(modules)[:3] + list(modules)[-3:])
            raise ValueError(f"extract: 'layers' must be a list of submodules (as {some}), got {(wrong or layers)[:1]}")
        self.model, self.pool = model, pool
        self.names = [""] if layers is None else list(dict.fromkeys(layers))
        self.how = ""
        self.logits: Tensor | None = None
        self._layers = None if layers is None else {modules[name]: name for name in self.names}
        self._watched = {module: name for name, module in model.named_modules() if _may_be_head(module)}
        self._state = "unknown"  # or "head" or "picked": then the head alone is watched; nothing is if there is none
        self._tokens = _token_rule(model)

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        args, kwargs, rows = self._inputs(batch)
        self.logits = None
        with torch.inference_mode(False), torch.no_grad(), evaluating(self.model):
            if self._layers is not None:
                return self._outputs(self._layers, rows, args, kwargs)
            raw = self._timm(args, kwargs) if _is_timm(self.model) else self._pre_logits(args, kwargs)
            found, self.how = self._pooled(raw, rows, kwargs)
        if self.logits is not None:
            self.logits = self.logits.to(found.dtype).detach() if self.logits.ndim == 2 else None
        return {"": found}

    def _inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], int]:
        """Arguments of the model, and how many samples they hold."""
        args, kwargs = batch_inputs(batch, device_of(self.model))
        dtype = next((p.dtype for p in self.model.parameters() if p.dtype in _FLOATS), None)

        def cast(value: Any) -> Any:
            return value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value

        args, kwargs = tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items() if key != "labels"}
        given = [*args, *(kwargs.get(name) for name in _INPUTS), *kwargs.values()]
        sizes = [value.shape[0] for value in given if isinstance(value, Tensor) and value.ndim]
        if not sizes:
            raise ValueError("extract: each batch must hold a tensor with an axis of samples, got none")
        return args, kwargs, sizes[0]

    def _outputs(self, layers: Mapping[nn.Module, str], rows: int, args: Any, kwargs: Any) -> dict[str, Tensor]:
        found: dict[str, tuple[Tensor, str]] = {}

        def keep(name: str, module: nn.Module, given: Any, output: Any) -> None:
            try:
                value = output_tensor(output)
            except TypeError as e:
                raise TypeError(f"extract: 'layers' must return tensors, got none from {name!r}: {e}") from e
            raw = value, f"output of {name!r}", _is_map(module, value)
            x, how = self._pooled(raw, rows, kwargs)
            found[name] = (x.clone(), how)  # now: the next layer may write there

        with _hooked(layers, keep):
            self.model(*args, **kwargs)
        if unseen := [name for name in self.names if name not in found]:
            raise ValueError(f"extract: 'layers' must be called by the model, got {unseen[0]!r}, which is not")
        self.how = "; ".join(found[name][1] for name in self.names)
        return {name: found[name][0] for name in self.names}

    def _timm(self, args: Any, kwargs: Any) -> _Raw:
        model: Any = self.model
        maps = model.forward_features(*args, **kwargs)
        value = output_tensor(model.forward_head(maps, pre_logits=True))
        self.logits = None if getattr(model, "num_classes", None) == 0 else output_tensor(model.forward_head(maps))
        return value, "forward_head(pre_logits=True) of timm", False

    def _pre_logits(self, args: Any, kwargs: Any) -> _Raw:
        if self._state == "picked":
            return self._picked(args, kwargs)
        calls: deque[_Call] = deque(maxlen=_LATEST)

        def keep(name: str, module: nn.Module, given: Any, output: Any) -> None:
            calls.appendleft(_Call(name, module, given, output, output._version))

        with _hooked(self._watched, keep):
            output = self.model(*args, **kwargs)
        bare = _field(output, "logits") is None and _field(output, "last_hidden_state") is not None
        answer = output_tensor(output)
        head = None if bare else _head_of(calls, answer)
        if head is None:
            if self._state == "head":
                raise RuntimeError("extract: 'model' must answer as it did before, got no logits of its head")
            self._watched = {}
            return self._headless(output, answer)
        self._state, self._watched = "head", {head.module: head.name}
        same, linear = head.output.numel() == answer.numel(), isinstance(head.module, nn.Linear)
        if linear and not same and head.output.ndim > answer.ndim and self.pool == "auto":
            return self._picked(args, kwargs)
        self.logits = head.output.reshape(answer.shape) if same else answer
        return head.input, f"input of {head.name!r}" if head.name else "input of the model", not linear

    def _headless(self, output: Any, answer: Tensor) -> _Raw:
        if isinstance(_field(output, "logits"), Tensor):
            seen = f"a {type(self.model).__name__}, whose logits come from no linear layer that is known as its head"
            raise ValueError(f"extract: 'layers' must be given, got {seen}")
        if _field(output, "last_hidden_state") is None:
            return answer, "output", _is_map(self.model, answer)
        pooled = _field(output, "pooler_output")
        poolers = [module for name, module in self.model.named_modules() if name.split(".")[-1] == "pooler"]
        learned = any(isinstance(module, nn.Linear) for pooler in poolers for module in pooler.modules())
        if isinstance(pooled, Tensor) and not learned:
            return pooled, "pooler_output", False
        return answer, "last_hidden_state", False

    def _picked(self, args: Any, kwargs: Any) -> _Raw:
        """What the model's code makes of the head's input: it is made to do to it what it does to the head's output."""
        ((head, name),) = self._watched.items()
        width = int(head.weight.shape[1])
        model = f"{type(self.model).__name__}, where {name!r} works per position"
        try:
            with _hooked(self._watched, lambda name, module, given, output: torch.cat([output, given], -1)):
                answer = output_tensor(self.model(*args, **kwargs))
            logits, value = answer[..., :-width], answer[..., -width:]
            if self._state != "picked":  # the law; sums over other shapes round otherwise
                bound = (0.05 if value.itemsize < 4 else 1e-3) * float(logits.abs().max())
                torch.testing.assert_close(head(value), logits, rtol=0, atol=bound, equal_nan=True)
        except (RuntimeError, AssertionError) as e:  # its code counts on the number of classes, or does more
            if isinstance(e, torch.OutOfMemoryError):
                raise
            raise ValueError(f"extract: 'pool' must be given for {model}, got logits that are no pick or mean") from e
        self._state, self.logits = "picked", logits
        return value, f"input of {name!r}, at the positions of the logits", False

    def _pooled(self, raw: _Raw, rows: int, kwargs: Mapping[str, Any]) -> tuple[Tensor, str]:
        """[N, D], and what it is."""
        (x, what, is_map), pool, mask = raw, self.pool, kwargs.get("attention_mask")
        if not x.is_floating_point():
            raise TypeError(f"extract: 'layers' must return floating tensors, got {x.dtype} as {what}")
        if x.ndim < 2 or x.shape[0] != rows:
            seen = f"{list(x.shape)} for {rows} samples as {what}"
            raise ValueError(f"extract: features must have a row per sample, got {seen}; give other 'layers'")
        x = x.detach().float() if x.itemsize < 4 else x.detach()
        if x.ndim == 2:
            return x, what
        if pool.startswith("channels") or x.ndim > 3 or is_map:
            if pool in ("first", "last"):
                raise ValueError(f"extract: 'pool' must be auto, mean or max for maps, got {pool!r} for the {what}")
            x = x.flatten(1, -2) if pool == "channels_last" else x.flatten(2).transpose(1, 2)
            kind = "max" if pool == "max" else "mean"
            return _reduced(x, kind, None), f"{what}, {kind} over {x.shape[1]} positions"
        kind, note = self._tokens if pool == "auto" else pool, ""
        keep = mask != 0 if isinstance(mask, Tensor) and mask.shape == x.shape[:2] else None
        if mask is not None:
            note = " (the attention mask has another shape)" if keep is None else " that the attention mask keeps"
        how = f"{kind} over the tokens" if kind in ("mean", "max") else f"{kind} token"
        return _reduced(x, kind, keep), f"{what}, {how}{note}"


def extract(
    model: nn.Module | Extractor,
    batches: Iterable[Any],
    *,
    layers: _Layers = None,
    pool: str = "auto",
    progress: _Progress = None,
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """Stream the features of a model over batches; arguments and errors as of :class:`Extractor`, or one that is made.

    Returns:
        Pairs of name -> features [N, D], and the batch's labels: its second item, or its entry ``labels``, or None.
        After each batch ``progress("batches", done)`` is called.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> data = [(torch.zeros(2, 4), torch.tensor([0, 1]))]
        >>> [(tuple(found["0"].shape), y.tolist()) for found, y in extract(net, data, layers=["0"])]
        [((2, 8), [0, 1])]
    """
    # Made here, so that arguments are refused at once.
    extractor = model if isinstance(model, Extractor) else Extractor(model, layers=layers, pool=pool)

    def one(numbered: tuple[int, Any]) -> tuple[dict[str, Tensor], Any]:
        number, batch = numbered
        found = extractor(batch)
        if progress is not None:
            progress("batches", number + 1)
        return found, batch.get("labels") if isinstance(batch, Mapping) else batch_labels(batch)

    return map(one, enumerate(batches))


def load_candidate(
    spec: str,
    *,
    factory: str | None = None,
    factory_args: Mapping[str, Any] | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """The pre-trained model that a spec names, in eval mode, on the CPU.

    Args:
        spec: - ``hf:NAME``, or a bare ``owner/name`` that is no local path: its config and safetensors from the Hugging
                Face hub (or its cache), and no code of the repository, read as a folder; ``hf:FOLDER`` is a folder here.
              - ``timm:NAME``: ``timm.create_model``, with its pre-trained weights and its classes.
              - all else, and every local path: as :func:`zipfast.sources.load_model`.
        factory, factory_args: for that.
        revision: branch, tag or commit, of a name on the hub.
        local_files_only: of such a name: only what is in the cache; nothing is fetched.

    Raises:
        ImportError: no transformers or timm, or an unsupported version (supported: transformers >= 4.40, < 6; timm >= 0.9,
        < 2). ValueError: the library cannot load it (no such name, no network); an option that is not for such a spec.

    Example:
        >>> load_candidate("zipfast.zoo:mlp", factory_args={"in_features": 4, "hidden": [], "out_features": 2})[1]
        Linear(in_features=4, out_features=2, bias=True)
    """
    kind, name = spec.split(":", 1) if spec.startswith(("hf:", "timm:")) else ("", spec)
    local = Path(name).expanduser().exists()
    local = local or not (kind or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)) or name.endswith(CHECKPOINTS)
    asked = {"revision": revision} if revision is not None else {}
    options = asked | ({"local_files_only": True} if local_files_only else {})
    if options and (local or kind == "timm"):
        instead = "write timm:NAME@REVISION, or set HF_HUB_OFFLINE=1" if kind == "timm" else "it is read from the disk"
        raise ValueError(f"load_candidate: '{next(iter(options))}' must be left out for {spec!r}: {instead}")
    if kind == "timm":
        return _load(spec, "timm", "timm torchvision", lambda timm: timm.create_model(name, pretrained=True))
    if local:
        return load_model(name, factory=factory, factory_args=factory_args)
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    return _load(
        spec,
        "huggingface_hub",
        "transformers",
        lambda hub: load_model(hub.snapshot_download(name, allow_patterns=patterns, **options)),
    )


def _load(spec: str, library: str, packages: str, load: Callable[[Any], nn.Module]) -> nn.Module:
    try:
        module = importlib.import_module(library)
        if library in WINDOWS:
            check_version(module, library, "load_candidate", "torchvision" if library == "timm" else "")
        return load(module).to("cpu").eval()
    except UnsupportedVersion:
        raise
    except Exception as e:  # libraries and networks fail in many ways
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        if isinstance(e, ImportError):
            raise ImportError(f"load_candidate: {library} must be installed, got {why}; pip install {packages}") from e
        raise ValueError(f"load_candidate: 'spec' must be a path or what {library} loads, got {spec!r} ({why})") from e


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _is_timm(model: Any) -> bool:
    features, head = getattr(model, "forward_features", None), getattr(model, "forward_head", None)
    return callable(features) and callable(head) and "pre_logits" in inspect.signature(head).parameters


def _may_be_head(module: nn.Module) -> bool:
    pointwise = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear) or pointwise


def _head_of(calls: Iterable[_Call], answer: Tensor) -> _Call | None:
    """The head among calls, the latest first: its output, unwritten since, is the answer or a view, or by name."""
    for call in calls:
        same = call.output.untyped_storage().data_ptr() == answer.untyped_storage().data_ptr()
        if same and call.output._version == call.version:
            return call
    for call in calls:
        axis = -1 if isinstance(call.module, nn.Linear) else 1
        if answer.ndim > 1 and call.output.shape[axis] == answer.shape[axis] and HEADS & {*call.name.split(".")}:
            return call
    return None


def _is_map(module: nn.Module, x: Tensor) -> bool:
    """Whether x of rank 3 is [N, C, L]: its second axis is as long as the last 1-d convolution or norm has channels."""
    for part in reversed(list(module.modules())):
        if isinstance(part, (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d)):
            return x.ndim == 3 and x.shape[1] == getattr(part, "out_channels", getattr(part, "num_features", None))
        if any(True for _ in part.parameters(recurse=False)):
            return False
    return isinstance(module, _POOLINGS)


def _token_rule(model: nn.Module) -> str:
    if any("cls_token" in name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named):
        return "first"
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "mean"
    written = [type(model).__name__, *(getattr(config, "architectures", None) or [])]
    causal = getattr(config, "is_decoder", False) is True or any(str(name).endswith("CausalLM") for name in written)
    return "last" if causal or any(getattr(m, "is_causal", False) is True for m in model.modules()) else "mean"


def _reduced(x: Tensor, kind: str, keep: Tensor | None) -> Tensor:
    """[N, P, D] -> [N, D] over the positions that ``keep`` [N, P] marks, whatever the others hold."""
    if keep is None:
        pick = {"first": lambda: x[:, 0], "last": lambda: x[:, -1], "max": lambda: x.amax(1), "mean": lambda: x.mean(1)}
        return pick[kind]()
    keep = keep.to(x.device)
    if not bool(keep.any(1).all()):
        raise ValueError("extract: 'attention_mask' must keep a token of every sample, got a row of zeros")
    if kind in ("mean", "max"):
        x = x.masked_fill(~keep[:, :, None], 0 if kind == "mean" else float("-inf"))
        return x.amax(1) if kind == "max" else x.sum(1) / keep.sum(1, keepdim=True)
    order = torch.arange(1, x.shape[1] + 1, device=x.device)
    at = (keep * (order if kind == "last" else order.flip(0))).argmax(1)
    return x[torch.arange(len(x), device=x.device), at]


@contextmanager
def _hooked(modules: Mapping[nn.Module, str], see: Callable[[str, nn.Module, Any, Any], Any]) -> Iterator[None]:
    """``see(name, module, first input, output)`` after every call; what it returns, if anything, is the output."""

    def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        return see(modules[module], module, args[0] if args else next(iter(kwargs.values()), None), output)

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
