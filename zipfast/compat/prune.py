# SPDX-License-Identifier: Apache-2.0
"""Drop-in for ``torch.nn.utils.prune``: the same calls and masks, on parameters that stay what they are.

``import zipfast.compat.prune as prune`` in place of ``import torch.nn.utils.prune as prune``. A pruned ``weight`` remains
the module's parameter ``weight``: state dicts are plain, ``deepcopy`` and pickle work, shared weights stay shared, the
optimiser keeps its tensor. The mask is one bit a weight beside it, whatever the number of rounds; what is dead is exactly 0
when it is read, and the forward pass is that of the plain layer. :mod:`zipfast.compat._kept` says where masks act;
docs/compat/prune.md lists every call.

Where torch leaves the order of equal scores open, the lowest (tensor, flat index) goes first. NaN among the scores is
refused. What is dead has no value to come back to: ``weight_orig`` is ``weight``.

Reference: LeCun et al. 1989 (Optimal Brain Damage) for pruning and training on; Paganini & Forde 2020 (arXiv 2004.13770) for
the interface.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..states import open_state
from ..tickets.masks import Masks
from ._kept import METADATA, check_bits, check_parameter, current, kept_of, packed, pairs_of, settle_all
from ._pruning import (
    BasePruningMethod,
    CustomFromMask,
    Identity,
    L1Unstructured,
    LnStructured,
    PruningContainer,
    RandomStructured,
    RandomUnstructured,
    choose,
    hook_of,
    install,
    named,
    prior_bits,
    scores_of,
)
from ._pruning import (  # methods of one's own call these by the names that torch has for them
    _compute_norm as _compute_norm,
)
from ._pruning import _compute_nparams_toprune as _compute_nparams_toprune
from ._pruning import _validate_pruning_amount as _validate_pruning_amount
from ._pruning import _validate_pruning_amount_init as _validate_pruning_amount_init
from ._pruning import _validate_pruning_dim as _validate_pruning_dim
from ._pruning import _validate_structured_pruning as _validate_structured_pruning

Module = TypeVar("Module", bound=nn.Module)
__all__ = [
    "BasePruningMethod", "CustomFromMask", "Identity", "L1Unstructured", "LnStructured", "PruningContainer",
    "RandomStructured", "RandomUnstructured", "apply_masks", "custom_from_mask", "from_torch", "global_unstructured",
    "identity", "is_pruned", "l1_unstructured", "ln_structured", "masks", "random_structured", "random_unstructured",
    "refresh", "remove",
]  # fmt: skip


def identity(module: Module, name: str) -> Module:
    """Put a mask of ones on a parameter, or leave the one that is there; returns the module."""
    Identity.apply(module, name)
    return module


def random_unstructured(module: Module, name: str, amount: float) -> Module:
    """Prune `amount` of the survivors (a fraction, or an `int`: so many) at random; returns the module.

    Raises:
        TypeError, ValueError: an amount that is no number, out of range, or more than there are; for what all functions
        raise see `BasePruningMethod.apply`.
    """
    RandomUnstructured.apply(module, name, amount=amount)
    return module


def l1_unstructured(module: Module, name: str, amount: float, importance_scores: Tensor | None = None) -> Module:
    """Prune the `amount` of survivors with the smallest magnitude, of the parameter or of `importance_scores`.

    Example:
        >>> layer = l1_unstructured(nn.Linear(10, 4), "weight", amount=0.3)
        >>> int(layer.weight_mask.sum()), int((layer.weight == 0).sum()), list(layer.state_dict())
        (28, 12, ['weight', 'bias'])

    Raises:
        As `random_unstructured`; ValueError: NaN among the scores of survivors.
    """
    L1Unstructured.apply(module, name, amount=amount, importance_scores=importance_scores)
    return module


def random_structured(module: Module, name: str, amount: float, dim: int) -> Module:
    """Prune `amount` of the channels along `dim` at random.

    Raises:
        As `random_unstructured`; ValueError: a parameter of fewer than two dimensions. IndexError: it has no such `dim`.
    """
    RandomStructured.apply(module, name, amount=amount, dim=dim)
    return module


def ln_structured(
    module: Module, name: str, amount: float, n: Any, dim: int, importance_scores: Tensor | None = None
) -> Module:
    """Prune the `amount` of channels along `dim` with the smallest norm (`n`: what ``torch.norm`` takes as ``p``).

    Raises:
        As `random_structured`; ValueError: a norm that is NaN.
    """
    LnStructured.apply(module, name, amount, n, dim, importance_scores=importance_scores)
    return module


def custom_from_mask(module: Module, name: str, mask: Tensor) -> Module:
    """Prune what a mask of 0 and 1 says, besides what is pruned already.

    Raises:
        TypeError, ValueError: no tensor; another shape; other values.
    """
    CustomFromMask.apply(module, name, mask)
    return module


def global_unstructured(
    parameters: Iterable[tuple[nn.Module, str]],
    pruning_method: Any,
    importance_scores: Mapping[tuple[nn.Module, str], Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Prune over many parameters at once: all survivors are ranked together.

    Args:
        parameters: pairs of a module and a name; one that several layers share counts once.
        pruning_method: an "unstructured" one, with `kwargs` (``amount=...``) for its constructor.
        importance_scores: for some pairs, what is ranked in the parameter's place.

    Raises:
        TypeError: `parameters` or `importance_scores` of another kind, or a method that is not unstructured. AssertionError:
        scores of another shape. ValueError: no parameter, parameters on several devices, NaN.

    Cost: for L1Unstructured one :func:`zipfast.ops.threshold` over all of them, and no copies.
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(
            f"global_unstructured: 'parameters' must be pairs (module, name), got {type(parameters).__name__}"
        )
    if importance_scores is not None and not isinstance(importance_scores, dict):
        kind = type(importance_scores).__name__
        raise TypeError(f"global_unstructured: 'importance_scores' must be a dict by (module, name), got {kind}")
    pairs = []
    for pair in parameters:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], nn.Module)):
            raise TypeError(
                f"global_unstructured: 'parameters' must hold pairs (module, name), got {type(pair).__name__}"
            )
        pairs.append((pair[0], pair[1], check_parameter(pair[0], pair[1], "global_unstructured")))
    method = pruning_method(**kwargs)
    method._tensor_name = "temp"
    if getattr(method, "PRUNING_TYPE", None) != "unstructured":
        seen = getattr(method, "PRUNING_TYPE", None)
        raise TypeError(f"global_unstructured: 'pruning_method' must be of PRUNING_TYPE 'unstructured', got {seen!r}")
    if not pairs:
        raise ValueError("global_unstructured: 'parameters' must hold a pair (module, name), got none")
    if len(devices := {p.device for _, _, p in pairs}) > 1:
        seen = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"global_unstructured: 'parameters' must be on one device, got {seen}")
    once = list({id(p): (module, name, p) for module, name, p in reversed(pairs)}.values())[::-1]
    given = importance_scores or {}
    scores = [scores_of(p, given.get((module, name)), name) for module, name, p in once]
    found = choose(method, scores, [prior_bits(module, name, p) for module, name, p in once], once[0][2].dtype, True)
    by_id = {id(p): bits for (_, _, p), bits in zip(once, found)}
    for module, name, p in pairs:
        install(module, name, p, named(CustomFromMask(None), name), by_id[id(p)])


def remove(module: Module, name: str) -> Module:
    """Leave a parameter pruned for good, without a mask; returns the module.

    Raises:
        ValueError: it is not pruned.
    """
    hook = hook_of(module, name)
    if hook is None:
        own = ", ".join(kept_of(module)) or "nothing"
        raise ValueError(f"remove: 'name' must be pruned in {type(module).__name__} ({own} is), got {name!r}")
    hook.remove(module)
    return module


def is_pruned(module: nn.Module) -> bool:
    """Whether anything in a module, or in those within it, is pruned (by this module)."""
    return any(kept_of(m) for m in module.modules())


def refresh(module: nn.Module) -> None:
    """Mask all pruned parameters now: after they were written through ``.data``, which leaves no trace."""
    for m in module.modules():
        settle_all(pairs_of(m))


def masks(source: nn.Module | Mapping[str, Tensor]) -> Masks:
    """The masks of everything that is pruned, as :class:`zipfast.tickets.Masks`: to count, compare and save.

    Args:
        source: a module; or the state dict of one, which carries them in its metadata (through ``copy.deepcopy`` and
            ``torch.save``, but not through other formats); of the tensors that it still holds.

    Raises:
        ValueError: nothing is pruned, or the metadata are damaged.
    """
    bits: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    if not isinstance(source, nn.Module):
        for prefix, about in getattr(source, "_metadata", {}).items():
            saved = about.get(METADATA, {})
            if not isinstance(saved, Mapping):
                raise ValueError(f"masks: the metadata of 'source' must hold masks by name, got {type(saved).__name__}")
            for name, own in saved.items():
                full = f"{prefix}.{name}" if prefix else name
                if full not in source:
                    continue  # taken out of the state, as heads are before fine-tuning
                shapes[full] = tuple(source[full].shape)
                bits[full] = check_bits(own, shapes[full], f"masks: the mask of {full!r}")
    else:
        seen = set[int]()
        for prefix, m in source.named_modules():
            for name, kept in kept_of(m).items():
                parameter = m._parameters[name]
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    full = f"{prefix}.{name}" if prefix else name
                    bits[full], shapes[full] = current(parameter, kept).bits.cpu(), tuple(kept.shape)
    if not bits:
        raise ValueError("masks: 'source' must be pruned, got one that is not")
    return Masks(bits, shapes, {"rule": "prune"})


def apply_masks(module: Module, masks: Masks) -> Module:
    """Prune what masks say, besides what is pruned already: to go on where they were saved.

    Raises:
        ValueError: masks of another network.
    """
    for name in masks.check(module, "apply_masks"):
        prefix, _, own = name.rpartition(".")
        m = module.get_submodule(prefix)
        parameter = check_parameter(m, own, "apply_masks")
        bits = masks.bits[name].to(parameter.device)
        prior = prior_bits(m, own, parameter)
        install(m, own, parameter, named(CustomFromMask(None), own), bits if prior is None else bits & prior)
    return module


def from_torch(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Masks]:
    """A state dict that torch.nn.utils.prune left (``weight_orig``, ``weight_mask``), as a plain one and masks.

    Args:
        source: the state dict, or a file of it; code in it is never run.

    Returns:
        (state, masks): what an unpruned network loads, with 0 where it is dead; the masks.

    Raises:
        ValueError: no ``_orig`` with its ``_mask``, or a mask of something else than 0 and 1; FileNotFoundError.
    """
    state = open_state(source).load()
    names = [key[:-5] for key in state if key.endswith("_orig") and f"{key[:-5]}_mask" in state]
    if not names:
        raise ValueError("from_torch: 'source' must hold pairs such as weight_orig and weight_mask, got none")
    dense = {name: state[f"{name}_mask"] for name in names}
    for name, mask in dense.items():
        packed(mask, state[f"{name}_orig"].shape, f"from_torch: '{name}_mask'")
    found = Masks.from_dense(dense)
    plain = {}
    for key, value in state.items():
        if key.endswith("_orig") and key[:-5] in dense:
            plain[key[:-5]] = value.clone()
        elif not (key.endswith("_mask") and key[:-5] in dense):
            plain[key] = value
    found.apply_(plain)
    return plain, found
