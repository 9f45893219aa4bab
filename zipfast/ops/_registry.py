# SPDX-License-Identifier: Apache-2.0
"""The frame that every op hangs in: schema, contract, reference, fake kernel, choice of backend.

``zipfast.ops.<op>(...)`` checks the contract once, for all backends, and goes to the dispatcher.  There the CPU and CUDA
libraries have registered their kernels; the reference is registered as ``CompositeExplicitAutograd`` and so serves every
device that has no kernel of its own.  Nobody dispatches again after that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import _loader
from ._paths import AUTO, Paths

NAMESPACE = "zipfast"
BACKENDS = ("torch", "cpu", "cuda", "emu")
OPS: dict[str, Op] = {}
"""Every operator, by name."""

_library = torch.library.Library(NAMESPACE, "DEF")  # module level: a Library that is collected takes its ops along
_emu_library: torch.library.Library | None = None
_forced: str | None = os.environ.get("ZIPFAST_BACKEND") or None
if _forced is not None and _forced not in BACKENDS:
    raise ValueError(f"ZIPFAST_BACKEND must be one of {', '.join(BACKENDS)}, got {_forced!r}")


class Op:
    """One operator; calling it runs contract, then kernel.  ``stem`` names its files in every room.

    ``host_only`` is None, or the reason why the op has no CUDA kernel: its CUDA rooms stay empty, and on CUDA tensors the
    reference serves.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        contract: Callable[..., Any],
        fake: Callable[..., Any],
        host_only: str | None,
        stem: str | None,
        paths: Paths | None,
    ) -> None:
        self.schema = schema
        self.name = schema.split("(")[0]
        self.stem = stem or self.name.rstrip("_")
        self.reference, self.contract, self.fake, self.host_only = reference, contract, fake, host_only
        self.paths = paths
        self.__name__, self.__doc__, self.__wrapped__ = self.name, reference.__doc__, reference
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)
        self.native = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self.arguments = len(self.native._schema.arguments)
        OPS[self.name] = self

    @torch.no_grad()  # no op has a gradient; without this the reference would keep every batch's graph alive
    def __call__(self, *args: Any) -> Any:
        if self.paths is None:
            self.contract(*args)
        else:
            if len(args) < self.arguments:
                args = (*args, AUTO)
            self.contract(*args[:-1])
            self.paths.check(self.name, args[-1])
            if _forced != "torch":
                args = (*args[:-1], self.paths.settle(self.name, args[-1], _device(args)))
        if _forced is None:
            return self.native(*args)
        if _forced == "torch":
            return self.reference(*args)
        if self.host_only is not None and _forced in ("cuda", "emu"):
            raise RuntimeError(f"{self.name}: there is no {_forced!r} kernel: {self.host_only}")
        if _forced == "emu":
            if not available("emu"):
                raise RuntimeError(f"{self.name}: backend 'emu' is not usable here: {why_not('emu')}")
            return getattr(torch.ops.zipfast_emu, self.name)(*args)
        for tensor in _tensors(args):
            if tensor.device.type != _forced:
                raise RuntimeError(
                    f"{self.name}: backend {_forced!r} is forced, but an argument is on {tensor.device}; "
                    f"move it with .to({_forced!r}) or lift the override"
                )
        if not self.has(_forced):
            raise RuntimeError(f"{self.name}: backend {_forced!r} is not usable here: {why_not(_forced)}")
        return self.native(*args)

    def has(self, backend: str) -> bool:
        """Whether a kernel of this backend is registered (for ``cuda`` also where there is no GPU)."""
        if backend == "torch":
            return True
        if backend == "emu":
            return available("emu") and _has_kernel(f"zipfast_emu::{self.name}", "CPU")
        return _loader.LOADED.get(backend, False) and _has_kernel(f"{NAMESPACE}::{self.name}", backend.upper())


def op(
    schema: str,
    *,
    contract: Callable[..., Any],
    fake: Callable[..., Any],
    host_only: str | None = None,
    stem: str | None = None,
    paths: Paths | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an operator; the decorated function is its reference.

    Args:
        schema: PyTorch schema, e.g. ``"double(Tensor x) -> Tensor"``; a name that ends in ``_`` writes its arguments.
        contract: called with the op's arguments; raises TypeError, ValueError or RuntimeError.
        fake: shape function for fake tensors (torch.compile, export).
        host_only: why there is no CUDA kernel, as the end of a sentence; None where there is one.  Such an op is named in
            ``ZIPFAST_HOST_OPS`` (CMakeLists.txt) and has no file in ``csrc/cuda``.
        stem: the op whose files it shares, as a gradient does; its name then begins with that stem.
        paths: the CUDA kernels there are for it, if several; the schema then ends in ``str path="auto"``, which the contract
            does not get.
    """
    return lambda reference: Op(schema, reference, contract, fake, host_only, stem, paths)


def _has_kernel(qualified: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


def _device(args: Any) -> torch.device:
    for tensor in _tensors(args):
        return tensor.device
    raise AssertionError("an op has tensors")


def available(backend: str) -> bool:
    """Whether a backend can run here: built, loadable and, for ``cuda``, with a GPU."""
    return why_not(backend) is None


def why_not(backend: str) -> str | None:
    """The reason why a backend cannot run here, or None if it can."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return None
    if backend == "emu":
        _define_emu()
    if not _loader.LOADED.get(backend, False):
        return _loader.ERRORS.get(backend, f"_{backend}.so is not loaded")
    if backend == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _define_emu() -> None:
    # The emulator is for tests: its schemas are defined, and its library loaded, at the first question after it.
    global _emu_library
    if _emu_library is None:
        _emu_library = torch.library.Library("zipfast_emu", "DEF")
        for operator in OPS.values():
            _emu_library.define(operator.schema)
        _loader.load("emu")


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force one implementation for the ops called inside.

    Args:
        name: ``"torch"`` (the reference, on any device), ``"cpu"``, ``"cuda"``, ``"emu"`` (the CUDA source, run on the
            host; tests only), or None for the automatic choice by device.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot run here; the message says why.

    Example:
        >>> import torch, zipfast
        >>> with zipfast.backend("torch"):
        ...     zipfast.ops.regroup([torch.eye(2)], torch.tensor([0, 1]), torch.tensor([0, 2]), None, 0)
        tensor([[1., 1.]])
    """
    global _forced
    if name is not None and (reason := why_not(name)):
        raise RuntimeError(f"backend {name!r} is not usable here: {reason}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
