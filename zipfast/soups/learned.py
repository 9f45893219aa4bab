# SPDX-License-Identifier: Apache-2.0
"""Learned soups: mixing weights by gradient, with one model in memory and the others on disk.

For θ = Σ αᵢ θᵢ the chain rule gives ∂L/∂αᵢ = ⟨∇L(θ), θᵢ⟩. So a step is: blend the models into the live one, one forward and
backward pass through it, k inner products, an optimiser step on k numbers. No graph over k models is built, and no gradient
of k models is held.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..features import batch_inputs, batch_labels, device_of, output_tensor
from ..ops import multidot
from .ingredients import twins
from .mix import SHARD, blend_group, groups_of, layout_of, mix, read_group
from .recipes import Soup, _open, provenance


@dataclass(frozen=True)
class Step:
    """What one step saw: the loss before it, and the derivative of the loss by each mixing weight, float64 [groups, k]."""

    loss: float
    gradient: Tensor


class LearnedSoup:
    """Mixing weights α = softmax(a), one row for the model or one per group of tensors, and an inverse temperature β.

    Minimises the mean of loss(β·f(x; Σ αᵢ θᵢ), y) on held-out data by AdamW on a and β.

    Args:
        model: a module that the weights fit; it holds the current soup, and runs in eval mode.
        sources: k checkpoints (:func:`zipfast.states.open_state`); those on disk stay there.
        granularity: ``"model"``: one row; ``"tensor"``: one per tensor; or a mapping of regular expressions to the names of
            groups, the first match counts, the rest is one group more.
        lr: of AdamW, constant: 0.05 for rows per tensor, 0.1 for one row, as in the paper.
        temperature: learn β, too.
        include, exclude: as for :func:`zipfast.soups.layout_of`.
        loss: ``loss(logits, labels)``, a scalar.

    Example:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> right, wrong = torch.eye(2) * 4, -torch.eye(2) * 4
        >>> soup = LearnedSoup(net, [{"weight": right}, {"weight": wrong}])
        >>> _ = soup.fit([(torch.eye(2), torch.tensor([0, 1]))], epochs=20)
        >>> soup.alpha.argmax(1).tolist(), bool(soup.alpha[0, 0] > 0.8)
        ([0], True)

    Cost per step: two passes over the k models (bandwidth-bound), one forward and backward pass.

    Reference: Wortsman et al. 2022 (model soups, arXiv 2203.05482), §2 and App. I.
    """

    def __init__(
        self,
        model: nn.Module,
        sources: Sequence[Any],
        *,
        granularity: str | Mapping[str, str] = "model",
        lr: float | None = None,
        temperature: bool = True,
        include: str | None = None,
        exclude: str | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        name = "LearnedSoup"
        self.states = _open(sources)
        self.options: dict[str, Any] = {"include": include, "exclude": exclude}
        self.layout = layout_of(self.states, **self.options, name=name)
        self.model, self.loss = model, loss
        self.live = self._live(name)
        # What the model ties is one tensor here, also where the files hold it twice; what only the sources tie shares a row.
        first: dict[int, str] = {}
        owner = {key: first.setdefault(id(value), key) for key, value in self.live.items()}
        self.keys = list(first.values())
        own = [key for key in self.keys if key not in self.layout.ties]
        self.groups, self.row = _rows(own, granularity, name)
        for key in self.live:
            if key not in self.row:
                self.row[key] = self.row[owner[key] if owner[key] != key else self.layout.ties[key]]
        self.logits = torch.zeros(len(self.groups), len(self.states), dtype=torch.float64)
        self.beta = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=temperature)
        if lr is None:
            lr = 0.1 if len(self.groups) == 1 else 0.05
        learned = [self.logits, self.beta] if temperature else [self.logits]
        self.optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
        with torch.no_grad():  # what is not mixed is the first source's, in the model as in the file
            whole = model.state_dict(keep_vars=True)
            for key in self.layout.copied:
                if key in whole and whole[key].shape == self.layout.entries[key].shape:
                    whole[key].copy_(self.states[0].tensor(key))
        self.blend()

    @property
    def alpha(self) -> Tensor:
        """Mixing weights, float64 [groups, k]; each row adds up to 1."""
        return self.logits.softmax(1)

    @property
    def inverse_temperature(self) -> float:
        """β: logits of the soup times this are calibrated on the held-out data."""
        return float(self.beta.detach())

    def _live(self, name: str) -> dict[str, Tensor]:
        found = self.model.state_dict(keep_vars=True)
        problems = []
        for key in self.layout.blended:
            entry = self.layout.entries[key]
            if key not in found:
                problems.append(f"{key!r} is no part of the model")
            elif tuple(found[key].shape) != entry.shape:
                problems.append(f"{key!r} is {list(entry.shape)} and in the model {list(found[key].shape)}")
        if problems:
            raise ValueError(f"{name}: 'sources' must fit the model, got: " + "; ".join(problems[:5]))
        return {key: found[key] for key in self.layout.blended}

    @torch.no_grad()
    def blend(self) -> None:
        """Write the current soup into the model."""
        alpha = self.alpha
        for group in groups_of(self.keys, self.layout.entries, len(self.states)):
            weight = torch.stack([alpha[self.row[piece.key]] for piece in group], 1)
            out = []
            for piece in group:
                live = self.live[piece.key]
                here = live.data.device.type == "cpu" and live.data.is_contiguous()
                size = piece.stop - piece.start
                out.append(
                    live.data.view(-1)[piece.start : piece.stop] if here else torch.empty(size, dtype=live.dtype)
                )
            blend_group(self.states, group, weight, out, "LearnedSoup")
            for piece, values in zip(group, out):
                live = self.live[piece.key].data
                if live.device.type != "cpu" or not live.is_contiguous():
                    flat = live.reshape(-1)
                    flat[piece.start : piece.stop] = values.to(live.device)
                    live.copy_(flat.reshape(live.shape))

    @torch.no_grad()
    def _dots(self) -> Tensor:
        """∂L/∂α from the gradients in the model, float64 [groups, k]; buffers have none."""
        found = torch.zeros(len(self.groups), len(self.states), dtype=torch.float64)
        learned = [key for key in self.keys if self.live[key].grad is not None]
        for group in groups_of(learned, self.layout.entries, len(self.states)):
            gradient = []
            for piece in group:
                whole = self.live[piece.key].grad
                assert whole is not None
                gradient.append(whole.reshape(-1)[piece.start : piece.stop].cpu())
            dots = multidot(gradient, read_group(self.states, group))
            for j, piece in enumerate(group):
                found[self.row[piece.key]] += dots[:, j]
        return found

    def step(self, batch: Any) -> Step:
        """One step on a batch (inputs, labels).

        Raises:
            ValueError: no labels; a loss that is not finite.
        """
        labels = batch_labels(batch)
        if not isinstance(labels, Tensor):
            raise ValueError("LearnedSoup: 'batch' must hold labels beside the inputs, got none")
        device = device_of(self.model)
        args, kwargs = batch_inputs(batch, device)
        training = {module: module.training for module in self.model.modules()}
        frozen = [value for value in self.live.values() if isinstance(value, nn.Parameter) and not value.requires_grad]
        try:
            self.model.eval()
            for value in frozen:  # frozen for training, but part of the mix
                value.requires_grad_(True)
            self.model.zero_grad(set_to_none=True)
            output = output_tensor(self.model(*args, **kwargs))
            loss = self.loss(self.beta.to(output) * output, labels.to(device))
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"LearnedSoup: the loss must be finite, got {float(loss.detach())}")
            self.beta.grad = None
            loss.backward()
            dots = self._dots()
        finally:
            self.model.zero_grad(set_to_none=True)
            for value in frozen:
                value.requires_grad_(False)
            for module, was in training.items():
                module.training = was
        alpha = self.alpha
        self.logits.grad = alpha * (dots - (alpha * dots).sum(1, keepdim=True))  # through the softmax
        self.optimizer.step()
        self.blend()
        return Step(float(loss.detach()), dots)

    def fit(
        self, batches: Iterable[Any], *, epochs: int = 5, progress: Callable[[str, int], None] | None = None
    ) -> list[float]:
        """Several passes over held-out batches; returns the mean loss of each.

        Raises:
            ValueError: no batch.
        """
        history = []
        for epoch in range(epochs):
            losses = [self.step(batch).loss for batch in batches]
            if not losses:
                raise ValueError("LearnedSoup: 'batches' must hold at least one batch in every epoch, got none")
            history.append(sum(losses) / len(losses))
            if progress is not None:
                progress("epochs", epoch + 1)
        return history

    def soup(
        self,
        *,
        out: str | os.PathLike[str] | None = None,
        out_dtype: torch.dtype | None = None,
        shard_bytes: int = SHARD,
        metadata: Mapping[str, Any] | None = None,
    ) -> Soup:
        """The model as it is mixed now, kept or written as :func:`zipfast.soups.uniform_soup` does.

        Its `weights` are the mean over the groups; the file's metadata has all rows.
        """
        alpha = self.alpha.detach()
        layout = self.layout
        if out_dtype is not None:
            layout = layout_of(self.states, out_dtype=out_dtype, **self.options, name="LearnedSoup")
        weights = {key: alpha[self.row[key]] for key in self.layout.blended}
        column = alpha.mean(0)
        facts = {**(metadata or {}), **provenance("learned", self.states, column)}
        facts |= {"groups": list(self.groups), "alpha": alpha.tolist(), "beta": self.inverse_temperature}
        state = mix(
            self.states, weights, layout=layout, out=out, int_policy="first", shard_bytes=shard_bytes, metadata=facts,
            name="LearnedSoup",
        )  # fmt: skip
        path = None if out is None else os.fspath(out)
        notes = (*layout.notes, *twins(self.states, layout))
        return Soup("learned", tuple(column.tolist()), tuple(s.name for s in self.states), state, path, notes=notes)


def _rows(keys: Sequence[str], granularity: str | Mapping[str, str], name: str) -> tuple[list[str], dict[str, int]]:
    """The groups, and the row of each tensor."""
    if granularity == "model":
        return ["model"], dict.fromkeys(keys, 0)
    if granularity == "tensor":
        return list(keys), {key: i for i, key in enumerate(keys)}
    if not isinstance(granularity, Mapping):
        raise ValueError(f"{name}: 'granularity' must be model, tensor or a mapping, got {granularity!r}")
    of = {key: next((g for pattern, g in granularity.items() if re.search(pattern, key)), "rest") for key in keys}
    groups = list(dict.fromkeys(of.values()))
    return groups, {key: groups.index(group) for key, group in of.items()}
