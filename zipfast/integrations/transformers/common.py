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
from ...pretrained import is_pretrained, renamed
from ...states import INDEXES, SINGLES, open_state

OLDEST = "4.57"  # whose events these are, and whose checkpoints torch >= 2.10 resumes
optional("transformers", "zipfast.integrations.transformers", least=OLDEST)

from transformers import TrainerCallback  # noqa: E402

__all__ = ["TrainerCallback", "check_resumed", "checkpoint_folder", "recall", "remember", "undisturbed"]


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


def not_loaded(model: nn.Module, folder: Path) -> str | None:
    """A tensor of the model that is not that of a checkpoint, where the checkpoint has other names for it.

    The Trainer fills a model by the names in the file. Where transformers gives tensors others in memory (5.x does for ViT),
    it only warns of missing keys, and goes on from weights that are not the checkpoint's.

    Cost: a look at the names; where they differ, the checkpoint is read once.
    """
    if not is_pretrained(model) or not any((folder / name).is_file() for name in (*SINGLES, *INDEXES)):
        return None
    own, kept = model.state_dict(), open_state(folder)
    if all(key in own for key in kept.entries):
        return None
    wanted = renamed(model, kept.load()) or {}
    return next((key for key, value in wanted.items() if not torch.equal(value.to(own[key]), own[key])), None)


def check_resumed(who: str, args: Any, state: Any, model: nn.Module) -> None:
    """Refuse to go on from a checkpoint whose weights the Trainer has not loaded."""
    if not state.global_step:
        return
    folder = checkpoint_folder(args, state)
    if key := not_loaded(model, folder):
        raise ValueError(
            f"{who}: the model must hold the weights of {folder}, got another {key!r}: the Trainer does not load weights "
            f"whose names in memory are not those of the file; give it {type(model).__name__}.from_pretrained of that folder"
        )


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
