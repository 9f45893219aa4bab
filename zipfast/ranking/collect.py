# SPDX-License-Identifier: Apache-2.0
"""The features of one model on some data, in memory: a model by name in, matrices and labels out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from .extract import Extractor, extract, load_candidate
from .targets import as_tensor


@dataclass(frozen=True, eq=False)
class Features:
    """What :func:`features_of` returns.

    layers: name -> float [N, D], on the CPU; the name is "" for the pre-logits. labels: [N] or [N, K], or None. how: what
    was taken, in words.
    """

    layers: dict[str, Tensor]
    labels: Tensor | None
    how: str

    @property
    def features(self) -> Tensor:
        """[N, D], of the only layer.

        Raises:
            ValueError: there are several.
        """
        if len(self.layers) > 1:
            raise ValueError(f"Features.features: there must be one layer, got {', '.join(self.layers)}; see .layers")
        return next(iter(self.layers.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write features and labels as .safetensors, which ``zipfast.rank`` and ``zipfast rank`` take for a model.

        Raises:
            ValueError: several layers, or another ending. OSError: the folder cannot be written.
        """
        labels = {} if self.labels is None else {"labels": self.labels}
        checkpoint.save(path, {"features": self.features, **labels}, {"how": self.how})


def features_of(
    model: str | nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    pool: str = "auto",
    device: str | torch.device | None = None,
    max_batches: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    factory: str | None = None,
    factory_args: Mapping[str, Any] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Features:
    """The features of a model on data: what a new linear head on it would see, or the outputs of named layers.

    Args:
        model: a module; or the name of one, as of :func:`zipfast.ranking.load_candidate`: a folder or name of Hugging Face
            ("google/vit-base-patch16-224"), "timm:resnet50", "package.module:factory", a checkpoint.
        batches: inputs, (inputs, labels), or mappings, perhaps with ``labels``.
        layers, pool: which and how, as of :class:`zipfast.ranking.Extractor`.
        device: where the model runs, if it is given by name; None: on the CPU. A module stays where it is.
        max_batches: read so many at most.
        revision, local_files_only, factory, factory_args: for a model by name, as of ``load_candidate``.
        progress: called with ("batches", done).

    Returns:
        :class:`Features`, for ``zipfast.logme``, ``zipfast.Basis`` and scikit-learn.

    Raises:
        ValueError: no batch; labels in some batches only; and as ``load_candidate`` and ``Extractor``.

    Cost: one forward pass per batch; all features are in memory, 4·N·D bytes. ``zipfast.rank`` and
    :class:`zipfast.FeatureStats` need only D².

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> found = features_of(net, [(torch.zeros(2, 4), torch.tensor([0, 1]))] * 2)
        >>> tuple(found.features.shape), found.labels.tolist(), found.how
        ((4, 8), [0, 1, 0, 1], "input of '2'")
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"features_of: 'max_batches' must be at least 1 or None, got {max_batches}")
    if isinstance(model, nn.Module):
        if revision or local_files_only or factory or factory_args or device is not None:
            raise ValueError("features_of: options for loading and 'device' must be left out with a module, got some")
        net = model
    else:
        options = {"revision": revision, "local_files_only": local_files_only}
        net = load_candidate(model, factory=factory, factory_args=factory_args, **options)  # type: ignore[arg-type]
        net = net.to(device or "cpu")
    extractor = Extractor(net, layers=layers, pool=pool)
    parts: dict[str, list[Tensor]] = {name: [] for name in extractor.names}
    labels: list[Tensor | None] = []
    for found, given in extract(extractor, islice(batches, max_batches), progress=progress):
        for name, x in found.items():
            parts[name].append(x.cpu())
        labels.append(None if given is None else as_tensor("features_of", "labels", given).cpu())
    if not labels:
        raise ValueError("features_of: 'batches' must hold at least one batch, got none")
    known = [y for y in labels if y is not None]
    if known and len(known) != len(labels):
        raise ValueError(f"features_of: all batches must have labels, or none, got {len(known)} of {len(labels)}")
    return Features(
        {name: torch.cat(x) for name, x in parts.items()}, torch.cat(known) if known else None, extractor.how
    )
