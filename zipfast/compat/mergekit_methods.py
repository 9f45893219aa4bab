# SPDX-License-Identifier: Apache-2.0
"""The merge methods that :mod:`zipfast.compat.mergekit` registers, written against mergekit 0.1.5's public interface.

`zipfast_linear` is complete in itself. The two others read what a pass over the whole models left in `FOUND`.
"""

# mergekit reads the annotations, whose names are known inside `methods` only: they must not be postponed.
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from .mergekit_recipes import Matching, blend_tensors

# By method: the weight of each model, by mergekit's reference to it; or (references in order, matching). mergekit's registry
# is one per process, and what runs its methods may be other threads: so is this.
FOUND: dict[str, Any] = {}


def _found(method: str) -> Any:
    if method not in FOUND:
        raise RuntimeError(
            f"{method}: whole models must be looked at before tensors are merged; run it by zipfast-mergekit-yaml, "
            "zipfast-mergekit-pytorch or zipfast.compat.mergekit.run_merge"
        )
    return FOUND[method]


@cache
def methods() -> tuple[Any, ...]:
    """The three methods, as mergekit's `register` takes them; the same objects in every call."""
    from mergekit.merge_methods import PerInput, TensorGroup, merge_method

    def key_of(group: TensorGroup) -> str:
        return group.metadata.name or "tensor"

    soups, zipit = "https://arxiv.org/abs/2203.05482", "https://arxiv.org/abs/2305.03053"

    @merge_method(name="zipfast_linear", pretty_name="Linear (zipfast)", reference_url=soups)
    def linear(group: TensorGroup, weight: PerInput[float], normalize: bool = True) -> torch.Tensor:
        """Weighted average, summed in float32; equal to mergekit's `linear` within rounding."""
        names, shares = [str(entry.id) for entry in group.entries], weight.values_for(group.entries)
        return blend_tensors("zipfast_linear", key_of(group), group.tensors, shares, names, normalize)

    @merge_method(name="zipfast_greedy_soup", pretty_name="Greedy soup (zipfast)", reference_url=soups)
    def greedy(group: TensorGroup) -> torch.Tensor:
        """The average of the models that the greedy recipe kept."""
        weights: Mapping[Any, float] = _found("zipfast_greedy_soup")
        inside = [entry for entry in group.entries if weights[entry.id]]
        # All models have the same tensors, or no soup would have been chosen.
        names, shares = [str(entry.id) for entry in inside], [weights[entry.id] for entry in inside]
        return blend_tensors("zipfast_greedy_soup", key_of(group), [entry.tensor for entry in inside], shares, names)

    @merge_method(name="zipfast_zipit", pretty_name="ZipIt! (zipfast)", reference_url=zipit)
    def zipped(group: TensorGroup, weight: PerInput[float] = 1.0) -> torch.Tensor:
        """Features matched by activations, merged; `weight` is a model's share in every average."""
        order, matching = _found("zipfast_zipit")
        assert isinstance(matching, Matching)
        entries = {entry.id: entry for entry in group.entries}
        if missing := [str(model) for model in order if model not in entries]:
            raise ValueError(
                f"zipfast_zipit: tensor {key_of(group)!r} must be in every model, got none in {missing[0]}"
            )
        own = [entries[model] for model in order]
        return matching.tensor(key_of(group), [entry.tensor for entry in own], weight.values_for(own))

    return linear, greedy, zipped
