# SPDX-License-Identifier: Apache-2.0
"""Parameters that stay masked through training without being replaced: the machinery of :mod:`zipfast.compat.prune`.

A masked parameter keeps its name, its place in the module and in the optimiser, and its state dict entry. One
:class:`Kept` holds its packed mask (1 bit a weight) and acts where something could bring dead weights back:

1. the gradient: a hook of the tensor gives it with dead entries 0, so norms, clipping and `torch.autograd.grad` see what
   training of ``weight_orig * weight_mask`` would;
2. each step of any ``torch.optim.Optimizer``: one pass over all masked parameters of that optimiser, which undoes momentum
   from before pruning. One hook for the process, there only while something is pruned;
3. loading and saving a state dict, ``train()`` and ``eval()``, and the first forward pass after one of them or after
   pruning;
4. any other forward pass before which the parameter was written (its version counter, its memory or the object itself
   changed): a plain look, no pass over the weights.

State dicts are plain; their metadata, which torch.save keeps and other modules ignore, carry the bits.

Writing happens beside the version counter: what is dead is 0 in every pass anyway, so no backward pass loses its tensors.
A new mask counts in it: a backward pass through weights from before would be wrong, and autograd says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops._check import FLOATING
from ..ops._mask import mask_bytes, pack, popcount, unpack
from ..tickets.masks import apply_bits_

KEPT: dict[int, Kept] = {}  # id of a guarded parameter -> its mask; `guard_of` looks whether it still is that one
_after_step: Any = None  # the handle of the hook after optimisers' steps
METADATA = "zipfast_masks"  # in a state dict's metadata, per module
# (id of a class, names) -> the class of its pruned instances, which holds on to the first: neither outlives its use
_CLASSES: weakref.WeakValueDictionary[tuple[int, tuple[str, ...]], type] = weakref.WeakValueDictionary()


class Kept:
    """The mask of one parameter, and where it acts. A deep copy or pickle is that of mask and name alone."""

    def __init__(self, name: str, shape: torch.Size, bits: Tensor) -> None:
        self.name, self.shape, self.bits = name, shape, bits
        self._clear()
        self.new = True

    def _clear(self) -> None:
        self.settled = self.new = False
        self.seen: tuple[Any, ...] = ()
        self.handle: Any = None
        self.owner: weakref.ref[Tensor] | None = None
        self.near: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "shape": self.shape, "bits": self.bits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def on(self, device: torch.device) -> Tensor:
        """The bits where a weight lies: moved once."""
        if self.bits.device == device:
            return self.bits
        if device not in self.near:
            self.near[device] = self.bits.to(device)
        return self.near[device]

    def set(self, bits: Tensor) -> None:
        """Another mask from now on."""
        self.bits, self.near, self.settled, self.new = bits, {}, False, True

    def check_shape(self, parameter: Tensor) -> None:
        if parameter.shape != self.shape:
            raise ValueError(
                f"prune: {self.name!r} must keep the shape {list(self.shape)} of its mask, got {list(parameter.shape)}; "
                "call remove before a layer is resized"
            )

    def dense(self, like: Tensor) -> Tensor:
        """0 and 1 in the dtype, and on the device, of a weight."""
        return unpack(self.on(like.device), self.shape).to(like.dtype)

    def adopt(self, parameter: nn.Parameter) -> None:
        """Guard this parameter: its gradient, and the steps of whatever optimises it."""
        if guard_of(parameter) is not self:
            self.check_shape(parameter)
            self.release()
            other = guard_of(parameter)
            if other is not None:
                other.release()
            place = id(parameter)
            self.owner, self.settled = weakref.ref(parameter, lambda _: _forget(place)), False
            KEPT[place] = self
            _watch_optimizers()
        if parameter.requires_grad and self.handle is None:
            self.handle = parameter.register_hook(self.mask_gradient)

    def release(self) -> None:
        """Let go of the parameter that is guarded, if one is."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        parameter = self.owner() if self.owner is not None else None
        if parameter is not None and guard_of(parameter) is self:
            del KEPT[id(parameter)]
        self.owner = None
        _watch_optimizers()

    def mask_gradient(self, grad: Tensor) -> Tensor:
        if grad.requires_grad or grad.is_sparse:  # of a double backward: masked in a way that has a gradient itself
            return grad * self.dense(grad)
        result = torch.empty_like(grad, memory_format=torch.contiguous_format)
        apply_bits_([result], [self.on(grad.device)], [grad])
        return result

    def settle(self, parameter: Tensor) -> None:
        """Mask the weights now."""
        self.check_shape(parameter)
        apply_bits_([parameter.data], [self.on(parameter.device)])
        self.note(parameter)

    def note(self, parameter: Tensor) -> None:
        """The weights were masked just now."""
        if self.new and not parameter.is_inference() and popcount(self.bits) < parameter.numel():
            increment_version(parameter)
        if torch.is_autocast_cache_enabled():
            torch.clear_autocast_cache()  # it may hold the weights from before, in 16 bits
        self.settled, self.new, self.seen = True, False, _state(parameter)

    def before_forward(self, module: nn.Module) -> None:
        """Mask the weights if they may have been written since they last were."""
        if torch.compiler.is_compiling():
            return  # what compiled code reads was masked after the last step; see docs/compat/prune.md
        parameter = module._parameters.get(self.name)
        if parameter is None:
            replica = module.__dict__.get(self.name)
            if isinstance(replica, Tensor):  # of nn.DataParallel: a copy of the weights, made for this pass
                apply_bits_([replica.data], [self.on(replica.device)])
            return
        if not isinstance(parameter, nn.Parameter):
            return  # a tensor that torch.func.functional_call put there: its owner's
        other = guard_of(parameter)
        if other is not self or (self.handle is None and parameter.requires_grad):
            if other is not None and other is not self:  # shared with a layer whose mask is newer
                return
            self.adopt(parameter)
        if not self.settled or self.seen != _state(parameter):
            self.settle(parameter)


def guard_of(parameter: Tensor) -> Kept | None:
    """The mask that guards a parameter; of one that several layers share, the one that was set last."""
    kept = KEPT.get(id(parameter))
    return kept if kept is not None and kept.owner is not None and kept.owner() is parameter else None


def _forget(place: int) -> None:
    kept = KEPT.get(place)
    if kept is not None and (kept.owner is None or kept.owner() is None):
        del KEPT[place]
        _watch_optimizers()


def _state(parameter: Tensor) -> tuple[Any, ...]:
    version = 0 if parameter.is_inference() else parameter._version
    return id(parameter), version, parameter.data_ptr()


def _watch_optimizers() -> None:
    global _after_step
    if KEPT and _after_step is None:
        _after_step = register_optimizer_step_post_hook(_mask_after_step)
    elif not KEPT and _after_step is not None:
        _after_step.remove()
        _after_step = None


def _mask_after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    found = [(p, guard_of(p)) for group in optimizer.param_groups for p in group["params"]]
    settle_all([(p, kept) for p, kept in found if kept is not None])


def settle_all(pairs: Iterable[tuple[Tensor, Kept]]) -> None:
    """Mask many parameters: one pass for each device."""
    by_device: dict[torch.device, list[tuple[Tensor, Kept]]] = {}
    for parameter, kept in pairs:
        kept.check_shape(parameter)
        by_device.setdefault(parameter.device, []).append((parameter, kept))
    for device, group in by_device.items():
        apply_bits_([p.data for p, _ in group], [kept.on(device) for _, kept in group])
        for parameter, kept in group:
            kept.note(parameter)


# ------------------------------------------------------------------------------------------------------- pruned modules


class Pruned:
    """What a pruned layer has besides its class: ``<name>_mask`` and ``<name>_orig``, plain state dicts, masked on time.

    Mixed into the class of the instance, as torch's parametrizations do it; the name of the class stays, and pickles are
    read back through :func:`_rebuild`.
    """

    _unpruned: type
    _pruned_names: tuple[str, ...]

    def train(self, mode: bool = True) -> Any:
        result = super().train(mode)  # type: ignore[misc]
        self._settle_twice()
        return result

    def _settle_twice(self) -> None:
        """Mask now, and once more before the next forward pass: scripts rewind weights about here."""
        adopt_all(self)
        pairs = pairs_of(self)
        settle_all(pairs)
        for _, kept in pairs:
            kept.settled = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        settle_all(pairs_of(self))
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:  # beside the tensors, where other modules do not look: masks travel with torch.save
            metadata.setdefault(prefix[:-1], {})[METADATA] = {
                name: current(p, kept).bits.cpu()
                for name, kept in kept_of(self).items()
                if (p := _own(self, name)) is not None
            }

    def _load_from_state_dict(
        self,
        state: dict[str, Any],
        prefix: str,
        meta: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: list[str],
    ) -> None:
        """A plain state, with the masks that were saved with it, or one of torch's (``weight_orig``, ``weight_mask``)."""
        saved = meta.get(METADATA, {}) if isinstance(meta, Mapping) else {}
        for name, kept in kept_of(self).items():
            parameter = _own(self, name)
            mask, orig = state.pop(f"{prefix}{name}_mask", None), state.pop(f"{prefix}{name}_orig", None)
            if orig is not None:
                state[prefix + name] = orig
            what = f"load_state_dict: the mask of '{prefix}{name}'"
            try:
                if mask is not None:
                    bits = packed(mask, kept.shape, what)
                elif name in saved:
                    bits = check_bits(saved[name], kept.shape, what)
                else:
                    continue
            except (TypeError, ValueError) as e:
                errors.append(str(e))
                continue
            (kept if parameter is None else current(parameter, kept)).set(bits)
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)  # type: ignore[misc]
        self._settle_twice()

    def __reduce_ex__(self, protocol: Any) -> Any:
        for name, kept in kept_of(
            self
        ).items():  # of weights that are shared, each layer takes along the mask that counts
            if (parameter := _own(self, name)) is not None:
                kept.bits = current(parameter, kept).bits
        parts: Any = super().__reduce_ex__(protocol)
        _, _, *rest = parts
        return _rebuild, (self._unpruned, self._pruned_names), *rest

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        adopt_all(self)


def _own(module: Any, name: str) -> nn.Parameter | None:
    parameter = module._parameters.get(name)
    return parameter if isinstance(parameter, nn.Parameter) else None


def _rebuild(base: Any, names: tuple[str, ...]) -> Any:
    module = base.__new__(base)
    module.__class__ = _pruned_class(base, names)
    return module


def _pruned_class(base: type, names: tuple[str, ...]) -> type:
    found = _CLASSES.get((id(base), names))
    if found is None:
        body: dict[str, Any] = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        for name in names:
            body[f"{name}_mask"], body[f"{name}_orig"] = _mask_property(name), _orig_property(name)
        found = type(base.__name__, (Pruned, base), {**body, "_unpruned": base, "_pruned_names": names})
        _CLASSES[id(base), names] = found
    return found


def _mask_property(name: str) -> property:
    def get(self: Any) -> Tensor:
        parameter = self._parameters[name]
        return current(parameter, kept_of(self)[name]).dense(parameter)

    def set(self: Any, mask: Tensor) -> None:
        kept = current(self._parameters[name], kept_of(self)[name])
        kept.set(packed(mask, kept.shape, f"{name}_mask"))
        settle_all(pairs_of(self))

    return property(get, set, doc=f"0 and 1 for each entry of `{name}`: a copy; assign to it to change the mask.")


def _orig_property(name: str) -> property:
    def get(self: Any) -> Tensor:
        parameter = self._parameters[name]
        current(parameter, kept_of(self)[name]).settled = False  # whoever asks for it may write to it
        result: Tensor = parameter
        return result

    return property(get, doc=f"The parameter `{name}` itself.")


def kept_of(module: nn.Module | Pruned) -> dict[str, Kept]:
    """The masks of one module's own parameters, by name."""
    hooks: Mapping[int, Any] = module.__dict__.get("_forward_pre_hooks", {})
    found = (getattr(hook, "_kept", None) for hook in hooks.values())
    return {kept.name: kept for kept in found if isinstance(kept, Kept)}


def pairs_of(module: Any) -> list[tuple[Tensor, Kept]]:
    """The parameters of one module that are pruned, each with the mask that counts."""
    found = [(_own(module, name), kept) for name, kept in kept_of(module).items()]
    return [(p, current(p, kept)) for p, kept in found if p is not None]


def adopt_all(module: Any) -> None:
    """Guard the parameters of one module now: some are read without its forward pass, or from compiled code."""
    for name, kept in kept_of(module).items():
        if (parameter := _own(module, name)) is not None:
            current(parameter, kept).adopt(parameter)


def current(parameter: Tensor, own: Kept) -> Kept:
    """The mask that counts: the one that guards the parameter, before that of this layer."""
    return guard_of(parameter) or own


def dress(module: nn.Module) -> None:
    """Give a module the class that fits what is pruned in it: its own where nothing is."""
    names = tuple(kept_of(module))
    own = type(module)
    if isinstance(module, Pruned) and own is not _CLASSES.get((id(module._unpruned), module._pruned_names)):
        return  # somebody changed the class once more, parametrizations for instance: theirs to undo
    base = module._unpruned if isinstance(module, Pruned) else own
    module.__class__ = _pruned_class(base, names) if names else base


def check_parameter(module: nn.Module, name: str, who: str) -> nn.Parameter:
    """The parameter to prune.

    Raises:
        AttributeError: the module has nothing of this name. TypeError: it is no parameter, or not of a dtype that masks are
            for.
    """
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{who}: 'module' must be a plain module, got a scripted {kind}; prune before torch.jit.script")
    parameter = module._parameters.get(name)
    if parameter is None:
        if not hasattr(module, name):
            own = ", ".join(n for n, p in module._parameters.items() if p is not None) or "none"
            raise AttributeError(f"{who}: 'name' must be a parameter of {kind} ({own}), got {name!r}")
        seen = "a buffer" if name in module._buffers else type(getattr(module, name)).__name__
        hint = "; undo torch.nn.utils.prune, weight norm or a parametrization first" if seen == "Tensor" else ""
        raise TypeError(f"{who}: {name!r} of {kind} must be a parameter, got {seen}{hint}")
    if parameter.dtype not in FLOATING or type(parameter.data) is not Tensor:
        seen = f"{type(parameter.data).__name__} of {parameter.dtype}"
        raise TypeError(f"{who}: {name!r} of {kind} must be a plain floating-point tensor, got {seen}")
    return parameter


def packed(mask: Any, shape: torch.Size, what: str) -> Tensor:
    """The bits of a mask of 0 and 1.

    Raises:
        TypeError: not a tensor. ValueError: another shape, or other values.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(mask).__name__}")
    if mask.shape != shape:
        raise ValueError(f"{what} must have the shape {list(shape)} of the parameter, got {list(mask.shape)}")
    alive = mask.detach() != 0
    if not bool((alive == mask).all()):
        raise ValueError(f"{what} must hold 0 and 1 only")
    return pack(alive)


def check_bits(bits: Any, shape: Sequence[int], what: str) -> Tensor:
    """The packed mask of a tensor of this shape, as it was read.

    Raises:
        ValueError: something else, or bits behind the last weight.
    """
    size = prod(shape)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.shape != (mask_bytes(size),):
        seen = f"{bits.dtype} {list(bits.shape)}" if isinstance(bits, Tensor) else type(bits).__name__
        raise ValueError(f"{what} must be the packed bits of {list(shape)}, got {seen}")
    if not torch.equal(pack(unpack(bits, (size,))), bits):
        raise ValueError(
            f"{what} must be the packed bits of {list(shape)}, got some behind the last of its {size} weights"
        )
    return bits
