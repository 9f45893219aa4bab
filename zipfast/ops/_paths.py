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

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

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
            if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
                return self.names[0]  # a comparison reads results, which may not happen here; asked again next time
            self._proven[device] = False  # the proof calls the op
            problem = self.prove(device)
            self._proven[device] = problem is None
            if problem is not None:
                warnings.warn(
                    f"{op}: on {device} path {self.names[0]!r} is used for everything, as {problem}; please report this",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return path if self._proven[device] else self.names[0]
