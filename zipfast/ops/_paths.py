# SPDX-License-Identifier: Apache-2.0
"""Paths: several CUDA kernels of one op that compute the same, one that runs everywhere and others for what a GPU has.

An op with paths ends its schema in ``str path="auto"``.  ``"auto"`` leaves the choice to the glue, where a named predicate
looks at the device and the shapes; a name forces that path, and is refused where it cannot run.  The first path runs on
every device.  The torch reference and the C++ kernel ignore the argument.

Instructions of one generation of GPUs cannot be tried by everyone who builds this.  Before ``"auto"`` may take such a path
on a device, ``prove`` compares it there with the first one on a small problem; where they differ, a warning says so once,
and ``"auto"`` means the first path from then on.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

AUTO = "auto"


@dataclass(frozen=True)
class Paths:
    """The paths of one op.

    ``names``: the first runs on every device.  ``prove``: device -> None, or what went wrong with another one there; None
    where all paths use nothing but what every GPU has.
    """

    names: tuple[str, ...]
    prove: Callable[[torch.device], str | None] | None = None
    _proven: dict[torch.device, bool] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.RLock)
    _asking: list[torch.device] = field(default_factory=list)

    def check(self, op: str, path: object) -> None:
        if not isinstance(path, str):
            raise TypeError(f"{op}: 'path' must be a string, got {type(path).__name__}")
        if path != AUTO and path not in self.names:
            raise ValueError(f"{op}: 'path' must be one of {', '.join((AUTO, *self.names))}, got {path!r}")

    def settle(self, op: str, path: str, device: torch.device) -> str:
        """What the glue gets on a device for the path that was asked for."""
        if device.type != "cuda" or path != AUTO or self.prove is None:
            return path
        if device not in self._proven:
            # A comparison reads results, which may not happen here: while something is traced, or on fake tensors.
            if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
                return self.names[0]
            with self._lock:  # another thread waits, and then takes the same path
                if device not in self._proven and not self._prove_now(op, device):
                    return self.names[0]
        return path if self._proven[device] else self.names[0]

    def _prove_now(self, op: str, device: torch.device) -> bool:
        """Whether it could be asked: not while a graph is captured, nor by what the proof itself calls."""
        if self._asking:
            return False
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return False  # asked again next time: call an op once before it is captured
        self._asking.append(device)
        try:
            problem = self.prove(device) if self.prove is not None else None
        finally:
            self._asking.clear()
        self._proven[device] = problem is None
        if problem is not None:
            warnings.warn(
                f"{op}: on {device} path {self.names[0]!r} is used for everything, as {problem}; please report this",
                RuntimeWarning,
                stacklevel=4,
            )
        return True
