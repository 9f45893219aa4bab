# SPDX-License-Identifier: Apache-2.0
"""What the callbacks share: the library, a memory that travels with checkpoints, and not to disturb the training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...features import device_of, evaluating
from ...optional import optional

OLDEST = "4.57"  # whose events these are, and whose checkpoints torch >= 2.10 resumes
optional("transformers", "zipfast.integrations.transformers", least=OLDEST)

from transformers import TrainerCallback  # noqa: E402

__all__ = ["TrainerCallback", "checkpoint_folder", "recall", "remember", "undisturbed"]


def remember(state: Any, key: str, facts: dict[str, Any]) -> None:
    """Keep plain facts in the trainer's state: they are in trainer_state.json of every checkpoint from now on.

    transformers' own way, a callback that it makes anew from JSON arguments, cannot hold a loader or a function.
    """
    state.stateful_callbacks[f"zipfast.{key}"] = facts


def recall(state: Any, key: str) -> dict[str, Any] | None:
    """What the checkpoint that this run goes on from remembers; None in a new run."""
    found = (state.stateful_callbacks or {}).get(f"zipfast.{key}")
    return found if isinstance(found, dict) else None


def checkpoint_folder(args: Any, state: Any) -> Path:
    """Where the trainer keeps the checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards modes and random states are what they were, as loaders draw from those."""
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices), evaluating(model), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
