# SPDX-License-Identifier: Apache-2.0
"""The merge methods that :mod:`zipfast.compat.mergekit` registers, written against mergekit 0.1.5's public interface.

`zipfast_linear` is complete in itself. The two others read what a pass over the whole models left in `FOUND`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mergekit.merge_methods import PerInput, TensorGroup, merge_method

from .mergekit_recipes import Matching, blend_tensors

# By method: (weight of each model, by mergekit's reference to it) or (references in order, matching). mergekit's registry is
# one per process, and what runs its methods may be other threads: so is this.
FOUND: dict[str, Any] = {}


def _found(method: str, group: TensorGroup) -> Any:
    if method not in FOUND:
        raise RuntimeError(
            f"{method}: whole models must be looked at before tensors are merged; run it by zipfast-mergekit-yaml, "
            "zipfast-mergekit-pytorch or zipfast.compat.mergekit.run_merge"
        )
    return FOUND[method]


def _key(group: TensorGroup) -> str:
    return group.metadata.name or "tensor"


@merge_method(
    name="zipfast_linear", pretty_name="Linear (zipfast)", reference_url="https://arxiv.org/abs/2203.05482"
)  # fmt: skip
def zipfast_linear(group: TensorGroup, weight: PerInput[float], normalize: bool = True) -> torch.Tensor:
    """Weighted average, summed in float32; equal to mergekit's `linear` within rounding."""
    names = [str(entry.id) for entry in group.entries]
    return blend_tensors(
        "zipfast_linear", _key(group), group.tensors, weight.values_for(group.entries), names, normalize
    )


@merge_method(
    name="zipfast_greedy_soup", pretty_name="Greedy soup (zipfast)", reference_url="https://arxiv.org/abs/2203.05482"
)  # fmt: skip
def zipfast_greedy_soup(group: TensorGroup) -> torch.Tensor:
    """The average of the models that the greedy recipe kept."""
    weights: Mapping[Any, float] = _found("zipfast_greedy_soup", group)
    inside = [entry for entry in group.entries if weights[entry.id]]
    if not inside:
        raise ValueError(f"zipfast_greedy_soup: tensor {_key(group)!r} must be in a model of the soup, got none")
    names = [str(entry.id) for entry in inside]
    tensors, shares = [entry.tensor for entry in inside], [weights[entry.id] for entry in inside]
    return blend_tensors("zipfast_greedy_soup", _key(group), tensors, shares, names)


@merge_method(
    name="zipfast_zipit", pretty_name="ZipIt! (zipfast)", reference_url="https://arxiv.org/abs/2305.03053"
)  # fmt: skip
def zipfast_zipit(group: TensorGroup, weight: PerInput[float] = 1.0) -> torch.Tensor:  # type: ignore[assignment]
    """Features matched by activations, merged; `weight` is a model's share in every average."""
    order, matching = _found("zipfast_zipit", group)
    entries = {entry.id: entry for entry in group.entries}
    if missing := [str(model) for model in order if model not in entries]:
        raise ValueError(f"zipfast_zipit: tensor {_key(group)!r} must be in every model, got none in {missing[0]}")
    own = [entries[model] for model in order]
    assert isinstance(matching, Matching)
    return matching.tensor(_key(group), [entry.tensor for entry in own], weight.values_for(own))


METHODS = (zipfast_linear, zipfast_greedy_soup, zipfast_zipit)
