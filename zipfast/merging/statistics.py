# SPDX-License-Identifier: Apache-2.0
"""The statistics of all feature spaces of M models: one pass over the data, additive over batches and workers.

Only these sums are ever communicated or saved; memory does not grow with the data. Each place where a space is read has
`Moments` of its own, and the correlations of several places are combined as those of concatenated standardised samples:
a feature that is dead at one place still has its correlations at the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from .. import checkpoint, distributed
from ..features import batch_inputs, device_of
from .graph import Graph
from .moments import Moments, correlate_all, update_all
from .plan import Plan, Space
from .taps import Tapped, features

Taps = Literal["last", "all"]
Progress = Callable[[str, int], None]
FORMAT = "zipfast.space-moments/1"


class SpaceMoments(Mapping[str, "tuple[Moments, ...]"]):
    """By space name the moments at each of its taps.

    Args:
        plan: of the models.
        models: M.
        taps: ``"last"``, the paper's choice: the input of the last consumer; ``"all"``: also every further place, at the
            cost of as many more products and matrices.
        skip: names of spaces to leave out.

    Laws: as :class:`Moments`: ``merge`` and batches commute, to 1e-12 from one shift (``like``).
    """

    def __init__(self, plan: Plan, models: int, *, taps: Taps = "last", skip: Sequence[str] = ()) -> None:
        if taps not in ("last", "all"):
            raise ValueError(f"SpaceMoments: 'taps' must be 'last' or 'all', got {taps!r}")
        self.plan, self.models, self.taps = plan, models, taps
        self.batches = 0
        self.origin: dict[str, Any] = {}  # what they are of, for whoever loads them; kept in the file
        # Whole blocks are compared by what lies inside them, so that a space with children is not read itself.
        self.spaces = tuple(s for s in plan.mergeable if s.name not in skip and not plan.children(s.name))
        self._moments = {
            space.name: tuple(Moments(models, name=space.name) for _ in self.taps_of(space)) for space in self.spaces
        }

    def taps_of(self, space: Space) -> tuple[Any, ...]:
        """The taps of a space that are read here."""
        return (*space.taps, *space.extra) if self.taps == "all" else space.taps

    def __getitem__(self, name: str) -> tuple[Moments, ...]:
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def flat(self) -> list[Moments]:
        """All moments in a fixed order."""
        return [moments for own in self._moments.values() for moments in own]

    def like(self) -> SpaceMoments:
        """Empty statistics with the same shifts, for another worker."""
        return self._map(lambda own: own.like(), 0)

    def merge(self, other: SpaceMoments) -> SpaceMoments:
        """The statistics of both.

        Raises:
            ValueError: they are of other spaces, taps or numbers of models.
        """
        mine, theirs = ({name: len(own) for name, own in s.items()} for s in (self, other))
        if (mine, self.models) != (theirs, other.models):
            raise ValueError(
                f"SpaceMoments.merge: 'other' must have the same spaces, taps and models, got {len(theirs)} spaces of "
                f"{other.models} models and {len(mine)} of {self.models}"
            )
        added = self._map(lambda own: own, self.batches + other.batches)
        added._moments = {
            name: tuple(a.merge(b) for a, b in zip(own, other[name])) for name, own in self._moments.items()
        }
        return added

    def _map(self, change: Callable[[Moments], Moments], batches: int) -> SpaceMoments:
        new = object.__new__(SpaceMoments)
        new.plan, new.models, new.taps, new.spaces, new.batches = (
            self.plan,
            self.models,
            self.taps,
            self.spaces,
            batches,
        )
        new.origin = dict(self.origin)
        new._moments = {name: tuple(map(change, own)) for name, own in self._moments.items()}
        return new

    def correlation(self, name: str, *, pair_dead: bool = False) -> Tensor:
        """Correlations of the stacked features of a space, float32 [F, F], F = M·total, over all its taps.

        Raises:
            ValueError: no or one sample; features that are not finite, or none that varies at any tap.
        """
        own = self._moments[name]
        if len(own) == 1:
            return own[0].correlation(pair_dead=pair_dead)
        total, alive = None, None
        for moments in own:
            if not bool(moments.alive().any()):
                continue
            part = moments.correlation(dtype=torch.float64)
            count = (part.diagonal() > 0).double()
            total = part if total is None else total + part
            alive = count if alive is None else alive + count
        if total is None or alive is None:
            return own[0].correlation(pair_dead=pair_dead)  # its error says what is wrong
        scale = torch.where(alive > 0, alive, 1.0).rsqrt()
        total = (total * torch.outer(scale, scale)).float().clamp(-1, 1)
        dead = (alive == 0).nonzero()[:, 0]
        if pair_dead and dead.numel():
            first = next(moments for moments in own if bool(moments.alive().any()))
            total[dead[:, None], dead] = first.correlation(pair_dead=True)[dead[:, None], dead]
        return total

    def correlations(self, *, pair_dead: bool = False) -> dict[str, Tensor]:
        """By space name; see `correlation`."""
        single = [name for name, own in self._moments.items() if len(own) == 1]
        found = dict(zip(single, correlate_all([self[name][0] for name in single], pair_dead=pair_dead)))
        return {name: found[name] if name in found else self.correlation(name, pair_dead=pair_dead) for name in self}

    def all_reduce(self) -> SpaceMoments:
        """The statistics of all workers of the default process group, in place; every worker must call it.

        They must start from one shift, as `gather_moments` sees to.
        """
        self.batches = distributed.sum_moments(self.flat(), self.batches)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as safetensors, whole or not at all."""
        tensors, counts = {}, {}
        for name, own in self._moments.items():
            for i, moments in enumerate(own):
                state = moments.state_dict()
                counts[f"{name}/{i}"] = state["count"]
                for key, value in state.items():
                    if isinstance(value, Tensor):
                        tensors[f"{name}/{i}/{key}"] = value
        header = {
            "format": FORMAT,
            "models": self.models,
            "taps": self.taps,
            "batches": self.batches,
            "counts": counts,
            "origin": self.origin,
            "plan": self.plan.to_json(),
        }
        checkpoint.save(path, tensors, header)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> SpaceMoments:
        """Read what `save` wrote.

        Raises:
            ValueError: another file, or a damaged one.
        """
        header, tensors = checkpoint.read_metadata(path), checkpoint.load(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"SpaceMoments.load: {path} must hold statistics ({FORMAT}), got {header.get('format')!r}")
        stats = SpaceMoments(Plan.from_json(header["plan"]), header["models"], taps=header["taps"])
        known = {place.rpartition("/")[0] for place in header["counts"]}
        stats.spaces = tuple(space for space in stats.spaces if space.name in known)
        stats.batches, stats.origin = header["batches"], header["origin"]
        stats._moments = {
            space.name: tuple(
                Moments.from_state_dict(
                    {
                        "format": "zipfast.moments/1",
                        "models": stats.models,
                        "name": space.name,
                        "count": header["counts"][f"{space.name}/{i}"],
                        **_under(tensors, f"{space.name}/{i}/"),
                    }
                )
                for i in range(len(stats.taps_of(space)))
            )
            for space in stats.spaces
        }
        return stats


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def gather_moments(
    graph: Graph,
    states: Sequence[Mapping[str, Tensor]],
    data: Iterable[Any],
    *,
    taps: Taps = "last",
    skip: Sequence[str] = (),
    max_batches: int | None = None,
    resume: SpaceMoments | None = None,
    origin: Mapping[str, Any] | None = None,
    checkpoint_to: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
    progress: Progress | None = None,
) -> SpaceMoments:
    """One pass over the data: the moments of every mergeable space, all spaces in one kernel call per batch.

    In a process group (:mod:`torch.distributed`) each worker passes its own share of the batches; the shift is that of
    rank 0, and all workers return the sums of all.

    Args:
        graph: of a model, or of a part of it, beyond which nothing is run.
        states: M state dicts.
        data: batches, as :func:`zipfast.features.batch_inputs` reads them.
        taps: see :class:`SpaceMoments`.
        skip: names of spaces that are not read.
        max_batches: read so many batches at most.
        resume: statistics of the first ``resume.batches`` batches of the same data; those are not read again (one process
            only).
        origin: kept in the statistics, see :class:`SpaceMoments`.
        checkpoint_to: save the statistics there every `checkpoint_every` batches and at the end (one process only).
        progress: called with ("moments", batches done).

    Raises:
        ValueError: no batch; features that are not finite (model, space and first index are named); `resume` does not
            fit.

    Cost: M forward passes per batch, and F²/2 multiply-adds per sample and tap, F = M·D.
    """
    stats = SpaceMoments(graph.plan, len(states), taps=taps, skip=skip)
    if resume is not None:
        if distributed.world_size() > 1:
            raise ValueError("gather_moments: 'resume' must be None in a process group: each worker would add it")
        if list(resume) != list(stats) or (resume.models, resume.taps) != (stats.models, stats.taps):
            raise ValueError(
                "gather_moments: 'resume' must hold statistics of the same spaces, taps and models; delete the file to "
                "start over"
            )
        stats = resume
    stats.origin = dict(origin or stats.origin)
    device = device_of(states[0])
    program = Tapped(graph, extra=taps == "all")
    group, done = distributed.world_size() > 1, stats.batches
    started = resume is not None
    for batch in islice(data, done, max_batches):
        args, kwargs = batch_inputs(batch, device)
        if device.type == "cpu" and (started or not group):
            for node, found in program.together(states, *args, **kwargs):
                _add(_items(stats, [{node: value} for value in found], node))
        else:  # a GPU takes all spaces in one launch; the first batch of several workers waits for the shifts
            items = _items(stats, [program.values(state, *args, **kwargs) for state in states])
            if group and not started:
                for moments, tensors, axis in items:
                    moments.prepare(*tensors, axis=axis)
                distributed.share_shifts(stats.flat(), _stacked(stats))
            _add(items)
            del items  # before the next batch's features are made: one batch's are held at a time
        started = True
        stats.batches += 1
        if progress is not None:
            progress("moments", stats.batches)
        if checkpoint_to is not None and not group and stats.batches % checkpoint_every == 0:
            stats.save(checkpoint_to)
    if group:
        if not started:  # more workers than batches
            distributed.share_shifts(stats.flat(), _stacked(stats))
        stats.all_reduce()
    if not stats.batches:
        raise ValueError("merge: 'data' must hold at least one batch, got none")
    if checkpoint_to is not None and distributed.rank() == 0:
        stats.save(checkpoint_to)
    return stats


_Item = tuple[Moments, list[Tensor], int]


def _items(stats: SpaceMoments, values: Sequence[Mapping[str, Tensor]], node: str | None = None) -> list[_Item]:
    """What to add: for each tap (at one node) its moments, the features of all models, and their axis."""
    items = []
    for space in stats.spaces:
        for moments, tap in zip(stats[space.name], stats.taps_of(space)):
            if node in (None, tap.node):
                read = [features(value[tap.node], tap) for value in values]
                items.append((moments, [tensor for tensor, _ in read], read[0][1]))
    return items


def _add(items: Sequence[_Item]) -> None:
    if items:
        update_all([m for m, _, _ in items], [t for _, t, _ in items], [a for _, _, a in items])


def _stacked(stats: SpaceMoments) -> list[int]:
    """F of each of `stats.flat()`."""
    return [stats.models * space.total for space in stats.spaces for _ in stats.taps_of(space)]
