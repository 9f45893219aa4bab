# SPDX-License-Identifier: Apache-2.0
"""Which entries go: the classes of :mod:`zipfast.compat.prune`, and how a mask is chosen and put on a parameter.

Masks are chosen on what is left, as torch does it: an unstructured method sees the survivors (flat), a structured one the
channels that have any. Magnitudes are ranked by :func:`zipfast.ops.threshold` on packed masks; methods of one's own get, and
return, dense masks for the moment of their call.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from ..ops import threshold
from ..ops._check import FLOATING
from ..ops._mask import pack, popcount, unpack
from ..ops.threshold import FINITE
from ._kept import Kept, check_parameter, current, dress, guard_of, kept_of, packed


class BasePruningMethod(ABC):
    """What decides which entries go; the base of methods of one's own.

    A subclass sets ``PRUNING_TYPE`` ("unstructured": `compute_mask` gets the survivors, flat; "structured": the channels
    along ``self.dim`` that have any; "global": everything) and defines `compute_mask`, as with torch. Masks must be of 0
    and 1, and what was pruned before stays so.

    Example:
        >>> class EveryOther(BasePruningMethod):
        ...     PRUNING_TYPE = "unstructured"
        ...     def compute_mask(self, t, default_mask):
        ...         mask = default_mask.clone()
        ...         mask.view(-1)[::2] = 0
        ...         return mask
        >>> layer = nn.Linear(4, 1)
        >>> _ = EveryOther.apply(layer, "weight")
        >>> layer.weight_mask.tolist()
        [[0.0, 1.0, 0.0, 1.0]]
    """

    PRUNING_TYPE: str
    _tensor_name: str
    _kept: Kept

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        """The hook before each forward pass."""
        kept = getattr(self, "_kept", None)
        if kept is not None:  # else an earlier hook of this very pass has pruned again, or called `remove`
            kept.before_forward(module)

    @abstractmethod
    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask, within `default_mask`, for scores `t`, both of one shape."""

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The masked tensor of a module that this method pruned, with a gradient."""
        if getattr(self, "_kept", None) is None:
            raise AssertionError(
                f"apply_mask: {type(module).__name__} must be pruned by this method, got one that is not"
            )
        parameter = check_parameter(module, self._tensor_name, "apply_mask")
        return parameter * current(parameter, self._kept).dense(parameter)

    @classmethod
    def apply(
        cls, module: nn.Module, name: str, *args: Any, importance_scores: Tensor | None = None, **kwargs: Any
    ) -> BasePruningMethod:
        """Prune a parameter, on top of what is pruned already. Nothing is changed where an error is raised.

        Args:
            module, name: the parameter; it is masked in place.
            args, kwargs: for the constructor.
            importance_scores: of the parameter's shape, ranked in its place.

        Returns:
            The hook: this method, or a `PruningContainer` of all that were applied.

        Raises:
            AttributeError, TypeError: no such parameter. AssertionError: scores of another shape. What the constructor and
            `compute_mask` raise. ValueError: a mask of something else than 0 and 1, or NaN among scores.
        """
        parameter = check_parameter(module, name, "prune")
        method = cls(*args, **kwargs)
        method._tensor_name = name
        score = scores_of(parameter, importance_scores, name)
        prior = prior_bits(module, name, parameter)
        return install(module, name, parameter, method, choose(method, [score], [prior], parameter.dtype)[0])

    def prune(self, t: Tensor, default_mask: Tensor | None = None, importance_scores: Tensor | None = None) -> Tensor:
        """`t` with what this method prunes set to 0, as a new tensor."""
        score = scores_of(t, importance_scores, "t")
        return t * self.compute_mask(score, default_mask=torch.ones_like(t) if default_mask is None else default_mask)

    def remove(self, module: nn.Module) -> None:
        """Leave the parameter pruned, and free: nothing masks it any more."""
        if getattr(self, "_kept", None) is None:
            raise AssertionError(f"remove: {type(module).__name__} must be pruned by this method, got one that is not")
        parameter = check_parameter(module, self._tensor_name, "remove")
        kept = current(parameter, self._kept)
        kept.settle(parameter)
        self._kept.release()  # not that of another layer which shares the parameter
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is self]:
            del module._forward_pre_hooks[key]
        del self._kept
        dress(module)


class PruningContainer(BasePruningMethod):
    """What was applied to one parameter, in order; `compute_mask` is that of the last, on what the mask has left."""

    def __init__(self, *args: BasePruningMethod) -> None:
        self._pruning_methods: tuple[BasePruningMethod, ...] = ()
        if args:
            self._tensor_name = args[0]._tensor_name
        for method in args:
            self.add_pruning_method(method)

    def add_pruning_method(self, method: Any) -> None:
        if not isinstance(method, BasePruningMethod):
            raise TypeError(
                f"add_pruning_method: 'method' must be a BasePruningMethod of this module, got {type(method).__name__}"
            )
        own = getattr(self, "_tensor_name", method._tensor_name)
        if own != method._tensor_name:
            raise ValueError(f"add_pruning_method: 'method' must act on {own!r}, got one for {method._tensor_name!r}")
        self._tensor_name = own
        self._pruning_methods += (method,)

    def __len__(self) -> int:
        return len(self._pruning_methods)

    def __iter__(self) -> Iterator[BasePruningMethod]:
        return iter(self._pruning_methods)

    def __getitem__(self, index: int) -> BasePruningMethod:
        return self._pruning_methods[index]

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return _combine(self._pruning_methods[-1], t, default_mask)


class Identity(BasePruningMethod):
    """Nothing is pruned; the mask is there."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask


class RandomUnstructured(BasePruningMethod):
    """Survivors at random: the `amount` largest of ``torch.rand_like``, so those that torch drops with the same seed."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        count = _count(self.amount, t.nelement())
        if not count:
            return default_mask.clone(memory_format=torch.contiguous_format)
        return default_mask * _without_lowest(1 - torch.rand_like(t), count).to(default_mask.dtype)


class L1Unstructured(BasePruningMethod):
    """Survivors of smallest magnitude."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        return default_mask * _without_lowest(t, _count(self.amount, t.nelement())).to(default_mask.dtype)

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, importance_scores: Tensor | None = None
    ) -> BasePruningMethod:
        return super().apply(module, name, amount=amount, importance_scores=importance_scores)


class RandomStructured(BasePruningMethod):
    """Channels along `dim` at random: the lowest of ``torch.rand`` on the CPU, as torch draws them."""

    PRUNING_TYPE = "structured"

    def __init__(self, amount: float, dim: int = -1) -> None:
        _validate_pruning_amount_init(amount)
        self.amount, self.dim = amount, dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        count = _channels(self.amount, t, self.dim)
        if not count:
            return default_mask
        return _without_channels(torch.rand(t.shape[self.dim]).to(t.device), count, t, default_mask, self.dim)


class LnStructured(BasePruningMethod):
    """Channels along `dim` of smallest ``torch.norm(p=n)``."""

    PRUNING_TYPE = "structured"

    def __init__(self, amount: float, n: Any, dim: int = -1) -> None:
        _validate_pruning_amount_init(amount)
        self.amount, self.n, self.dim = amount, n, dim

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        count = _channels(self.amount, t, self.dim)
        if not count:
            return default_mask
        return _without_channels(_compute_norm(t, self.n, self.dim), count, t, default_mask, self.dim)

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: float, n: Any, dim: int, importance_scores: Tensor | None = None
    ) -> BasePruningMethod:
        return super().apply(module, name, amount=amount, n=n, dim=dim, importance_scores=importance_scores)


class CustomFromMask(BasePruningMethod):
    """A mask that is there already. Once applied, `mask` is None: it is part of the parameter's."""

    PRUNING_TYPE = "global"

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        bits = packed(self.mask, default_mask.shape, "custom_from_mask: 'mask'")
        return default_mask * unpack(bits, default_mask.shape).to(default_mask)


# ---------------------------------------------------------------------------------------------- from scores to parameters


def hook_of(module: nn.Module, name: str) -> BasePruningMethod | None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook
    return None


def named(method: Any, name: str) -> Any:
    method._tensor_name = name
    return method


def scores_of(t: Tensor, given: Tensor | None, name: str) -> Tensor:
    if t.is_meta:
        raise RuntimeError(f"prune: {name!r} must have values, got one on the device meta; load them first")
    if given is None:
        return t.detach()
    if given.shape != t.shape:
        raise AssertionError(
            f"prune: 'importance_scores' must have the shape {list(t.shape)} of {name!r}, got {list(given.shape)}"
        )
    return given.detach().to(t.device)


def prior_bits(module: nn.Module, name: str, parameter: nn.Parameter) -> Tensor | None:
    """The bits so far, with the parameter masked by them; None where it is not pruned."""
    own = kept_of(module).get(name)
    kept = guard_of(parameter) or own
    if kept is None:
        return None
    kept.settle(parameter)
    return kept.on(parameter.device)


def install(
    module: nn.Module, name: str, parameter: nn.Parameter, method: BasePruningMethod, bits: Tensor
) -> BasePruningMethod:
    if isinstance(method, CustomFromMask):
        method.mask = None
    old = hook_of(module, name)
    hook: BasePruningMethod = method
    if old is None:
        hook._kept = Kept(name, parameter.shape, bits)
        module.register_forward_pre_hook(hook)
    else:
        kept = old._kept
        if isinstance(old, PruningContainer):
            hook = old
        else:
            hook = PruningContainer(old)
            del old._kept
            for key in [key for key, own in module._forward_pre_hooks.items() if own is old]:
                module._forward_pre_hooks[key] = hook
        hook.add_pruning_method(method)
        hook._kept = kept
        kept.set(bits)
    dress(module)
    hook._kept.adopt(parameter)
    hook._kept.settle(parameter)
    hook._kept.settled = False  # once more before the next pass: scripts rewind weights after pruning
    return hook


def choose(
    method: Any, scores: list[Tensor], prior: list[Tensor | None], dtype: torch.dtype, together: bool = False
) -> list[Tensor]:
    """The new bits of each tensor: ranked together, or the one there is; `dtype` is that of dense masks."""
    if type(method) in (L1Unstructured, torch_prune.L1Unstructured):
        wide = scores[0].dtype
        for t in scores[1:]:
            wide = torch.promote_types(wide, t.dtype)
        ranked = [t.to(wide if wide in FLOATING else torch.float64) for t in scores]
        bits = [] if all(b is None for b in prior) else _all_bits(scores, prior)
        alive = sum(map(popcount, bits)) if bits else sum(t.numel() for t in scores)
        return _threshold(ranked, bits, _count(method.amount, alive))
    first = all(b is None for b in prior)
    default = [
        torch.ones_like(t, dtype=dtype) if b is None else unpack(b, t.shape).to(dtype) for t, b in zip(scores, prior)
    ]
    score, mask = scores[0], default[0]
    if together:
        score, mask = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (scores, default))
    found = method.compute_mask(score, default_mask=mask) if first and not together else _combine(method, score, mask)
    what = f"prune: the mask of {type(method).__name__}"
    if isinstance(found, Tensor) and found.shape != score.shape:
        raise ValueError(f"{what} must have the shape {list(score.shape)} of the scores, got {list(found.shape)}")
    packed(found, score.shape, what)
    parts = found.split([t.numel() for t in scores]) if together else [found]
    new = [pack((part != 0).reshape(-1)) for part in parts]
    return [bits if b is None else bits & b for bits, b in zip(new, prior)]


def _all_bits(scores: list[Tensor], prior: list[Tensor | None]) -> list[Tensor]:
    return [
        pack(torch.ones(t.numel(), dtype=torch.bool, device=t.device)) if b is None else b
        for t, b in zip(scores, prior)
    ]


def _combine(method: Any, t: Tensor, mask: Tensor) -> Tensor:
    """The mask of a method that sees only what is left: survivors, channels with survivors, or everything."""
    kind = getattr(method, "PRUNING_TYPE", None)
    where: Any
    if kind == "unstructured":
        where = mask == 1
    elif kind == "structured":
        if not hasattr(method, "dim"):
            raise AttributeError(f"prune: {type(method).__name__} must have the attribute 'dim', as it is structured")
        _validate_pruning_dim(t, method.dim)
        dim = method.dim % t.dim()
        others = [d for d in range(t.dim()) if d != dim]
        where = tuple(slice(None) if d != dim else mask.sum(others) != 0 for d in range(t.dim()))
    elif kind == "global":
        where = ...
    else:
        raise ValueError(
            f"prune: PRUNING_TYPE of {type(method).__name__} must be 'unstructured', 'structured' or 'global', got {kind!r}"
        )
    new = mask.to(t.dtype, copy=True)
    new[where] = method.compute_mask(t[where], default_mask=mask[where]).to(new.dtype)
    return new


def _threshold(scores: list[Tensor], bits: list[Tensor], count: int) -> list[Tensor]:
    """The bits without the `count` lowest magnitudes."""
    kept, status = threshold(scores, bits, [count], [0] * len(scores))
    for j, place in enumerate(status[: len(scores)].tolist()):
        if place != FINITE:
            where = f" of tensor {j}" if len(scores) > 1 else ""
            raise ValueError(f"prune: scores must be numbers, got NaN at flat index {place}{where}")
    result: list[Tensor] = kept
    return result


def _without_lowest(score: Tensor, count: int) -> Tensor:
    ranked = score.detach() if score.dtype in FLOATING else score.detach().double()
    return unpack(_threshold([ranked], [], count)[0], score.shape)


def _channels(amount: float, t: Tensor, dim: int) -> int:
    _validate_structured_pruning(t)
    _validate_pruning_dim(t, dim)
    return _count(amount, t.shape[dim])


def _without_channels(score: Tensor, count: int, t: Tensor, default_mask: Tensor, dim: int) -> Tensor:
    shape = [1] * t.dim()
    shape[dim] = -1
    return default_mask.to(t.dtype) * _without_lowest(score, count).reshape(shape).to(t.dtype)


# Methods of one's own call these by their names in torch.


def _count(amount: float, size: int) -> int:
    count = _compute_nparams_toprune(amount, size)
    _validate_pruning_amount(count, size)
    return count


def _validate_pruning_amount_init(amount: Any) -> None:
    if not isinstance(amount, numbers.Real):
        raise TypeError(f"prune: 'amount' must be a number, got {type(amount).__name__}")
    whole = isinstance(amount, numbers.Integral)
    if not 0 <= float(amount) <= (math.inf if whole else 1):
        raise ValueError(f"prune: 'amount' must be a fraction in [0, 1], or an int of 0 or more, got {amount}")


def _validate_pruning_amount(amount: Any, tensor_size: int) -> None:
    if isinstance(amount, numbers.Integral) and int(amount) > tensor_size:
        raise ValueError(f"prune: 'amount' must be at most the {tensor_size} that are left, got {amount}")


def _validate_structured_pruning(t: Tensor) -> None:
    if t.dim() < 2:
        raise ValueError(f"prune: a tensor must have channels (two dimensions or more), got {list(t.shape)}")


def _validate_pruning_dim(t: Tensor, dim: int) -> None:
    if not -t.dim() <= dim < t.dim():
        raise IndexError(f"prune: 'dim' must be a dimension of a tensor of shape {list(t.shape)}, got {dim}")


def _compute_nparams_toprune(amount: Any, tensor_size: int) -> int:
    return int(amount) if isinstance(amount, numbers.Integral) else round(float(amount) * tensor_size)


def _compute_norm(t: Tensor, n: Any, dim: int) -> Tensor:
    result: Tensor = torch.norm(t, p=n, dim=[d for d in range(t.dim()) if d != dim % t.dim()])
    return result
