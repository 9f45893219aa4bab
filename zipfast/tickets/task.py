# SPDX-License-Identifier: Apache-2.0
"""What an experiment trains: a network, data in an order that can be repeated, an optimiser, a schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..features import batch_inputs, batch_parts, device_of, evaluating, output_tensor


def seed_of(*parts: Any) -> int:
    """One seed from several names and numbers, the same on any machine."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:7], "little")


class Batches:
    """Labelled tensors in batches: shuffled by seed and epoch, so that any iteration's batch can be had at once.

    Args:
        data: float [N, ...]. labels: int64 [N].
        size: samples in a batch; the last one of an epoch may be shorter.

    Raises:
        ValueError: no sample, a size below 1, other lengths.

    Example:
        >>> batches = Batches(torch.arange(5.0)[:, None], torch.arange(5), 2)
        >>> [labels.tolist() for _, labels in batches], batches.order(2, 4, seed=0).shape
        ([[0, 1], [2, 3], [4]], torch.Size([2, 2]))
    """

    def __init__(self, data: Tensor, labels: Tensor, size: int) -> None:
        if size < 1 or not len(data) or len(data) != len(labels):
            raise ValueError(
                f"Batches: there must be samples, as many labels, and a size of 1 or more, got {len(data)}, {len(labels)} "
                f"and {size}"
            )
        self.data, self.labels, self.size = data, labels, size
        self.epoch = (-1, -1, torch.empty(0, dtype=torch.int64))  # seed, number, order

    def __len__(self) -> int:
        return -(-len(self.data) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of it once, in order: for evaluation."""
        for start in range(0, len(self.data), self.size):
            yield self.data[start : start + self.size], self.labels[start : start + self.size]

    def order(self, start: int, stop: int, seed: int) -> Tensor:
        """int64 [stop - start, size]: which samples iterations take; -1 where a batch is shorter."""
        rows, at = [], start
        while at < stop:
            epoch, batch = divmod(at, len(self))
            if self.epoch[:2] != (seed, epoch):
                generator = torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))
                shuffled = torch.randperm(len(self.data), generator=generator)
                short = len(self) * self.size - len(self.data)
                self.epoch = (seed, epoch, F.pad(shuffled, (0, short), value=-1).view(-1, self.size))
            end = min(stop, (epoch + 1) * len(self))
            rows.append(self.epoch[2][batch : batch + end - at])
            at = end
        return torch.cat(rows) if rows else torch.empty(0, self.size, dtype=torch.int64)

    def stream(self, start: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches from an iteration on, without end."""
        while True:
            rows = self.order(start, start + 1, seed)[0]
            rows = rows[rows >= 0]
            yield self.data[rows], self.labels[rows]
            start += 1


def stream(loader: Iterable[Any], start: int, seed: int, ready: Callable[[], None] = lambda: None) -> Iterator[Any]:
    """Batches of any loader from an iteration on, without end: each epoch under its own seed of torch's generator.

    `ready` is called before the first batch is read, after those that an epoch has before it. What a loader draws from other
    generators (NumPy's, Python's, those of worker processes) is its own affair.

    Raises:
        ValueError: an epoch without a batch.
    """
    if isinstance(loader, Batches):
        ready()
        yield from loader.stream(start, seed)
        return
    epoch = done = 0
    try:
        per_epoch = len(loader)  # type: ignore[arg-type]
        epoch, done = start // max(1, per_epoch), start // max(1, per_epoch) * per_epoch
    except TypeError:
        pass  # an iterable without a length is read from its beginning
    while True:
        for owner in (loader, getattr(loader, "sampler", None)):
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)  # type: ignore[union-attr]
        own = seed_of(seed, "epoch", epoch) % (1 << 63)
        torch.manual_seed(own)
        for owner in (loader, getattr(loader, "sampler", None)):
            if isinstance(getattr(owner, "generator", None), torch.Generator):
                owner.generator.manual_seed(own)  # type: ignore[union-attr]
        before = done
        for batch in loader:
            done += 1
            if done > start:
                yield batch
            elif done == start:
                ready()
        if done == before:
            raise ValueError("lottery: 'train' must give batches again in each epoch, got an epoch of none")
        epoch += 1


@dataclass(frozen=True)
class Task:
    """How one network is trained, once.

    Attributes:
        build: a fresh network; called under torch's generator seeded for the replicate.
        train: :class:`Batches`, or any loader that can be read again for each epoch (`set_epoch` is called where it has it).
        validation, test: labelled batches; early stopping is decided on the first, accuracy reported on the second.
        iterations: T, batches of one training.
        optimizer: parameters -> torch optimiser, fresh for each training.
        schedule: iteration (from 0) -> factor of the learning rates; None: constant.
        loss: (output, labels) -> mean loss.
        clip_norm: gradients are clipped to this norm.
        device: where to train; None: where `build` puts the network.

    Raises:
        ValueError: no iterations, or an iterator as loader.
    """

    build: Callable[[], nn.Module]
    train: Iterable[Any]
    validation: Iterable[Any]
    test: Iterable[Any]
    iterations: int
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = torch.optim.Adam
    schedule: Callable[[int], float] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    clip_norm: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"Task: 'iterations' must be at least 1, got {self.iterations}")
        for name in ("train", "validation", "test"):
            loader = getattr(self, name)
            if iter(loader) is loader:
                raise ValueError(
                    f"Task: '{name}' must be readable more than once, got an iterator; pass a list or loader"
                )

    def network(self, seed: int) -> nn.Module:
        """A network of this seed; torch's generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
        return model if self.device is None else model.to(self.device)

    def factor(self, iteration: int) -> float:
        """Of the learning rates.

        Raises:
            ValueError: the schedule gives something else than a number of 0 or more.
        """
        found = 1.0 if self.schedule is None else float(self.schedule(iteration))
        if not 0 <= found < float("inf"):
            raise ValueError(f"Task: 'schedule' must give numbers of 0 or more, got {found} for iteration {iteration}")
        return found


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Tensor, Tensor], Tensor],
    forward: Callable[..., Any] | None = None,
) -> tuple[float, float]:
    """Mean loss and accuracy in per cent over labelled batches, in evaluation mode; the mode is put back.

    Labels may stand at each position of a sample; negative ones (`ignore_index`) do not count in the accuracy. `forward`
    computes what the model would, faster, where the data lies; it knows no modes.

    Raises:
        ValueError: no sample, or batches without labels.
    """
    device = None if forward is not None else device_of(model)
    total, right, samples, places = 0.0, 0, 0, 0
    with evaluating(model) if forward is None else nullcontext(), torch.no_grad():
        for batch in batches:
            inputs, labels = batch_parts(batch)
            if not isinstance(labels, Tensor):
                raise ValueError("measure: batches must hold labels beside the inputs, got none")
            args, kwargs = batch_inputs(inputs, device)
            output = output_tensor((forward or model)(*args, **kwargs))
            labels = labels.to(output.device)
            total += float(loss(output, labels)) * len(labels)
            right += int((output.argmax(-1) == labels).sum())
            samples += len(labels)
            places += int((labels >= 0).sum())
    if not samples:
        raise ValueError("measure: there must be at least one sample, got none")
    return total / samples, 100 * right / max(1, places)
