# SPDX-License-Identifier: Apache-2.0
"""Several processes: sums of mergeable statistics over `torch.distributed`, and nothing else.

Statistics with one shift are plain sums, so that one all-reduce gives every worker the statistics of all data. Without a
process group every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .merging.moments import Moments


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process, 0 to world_size - 1."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started, if it did, and leave them at the end; gives (rank, world size).

    NCCL where each process has a GPU of its own, else gloo.
    """
    started = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus > local:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if gpus > local else "gloo")
    try:
        yield rank(), world_size()
    finally:
        if started:
            dist.destroy_process_group()


def device() -> torch.device:
    """Where tensors to exchange must be: this process's GPU for NCCL, else the CPU."""
    if world_size() > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather(fact: Any) -> list[Any]:
    """One small Python object of every process, by rank."""
    if world_size() == 1:
        return [fact]
    facts: list[Any] = [None] * world_size()
    dist.all_gather_object(facts, fact)
    return facts


def broadcast(tensor: Tensor, root: int = 0) -> Tensor:
    """The values of rank `root`, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, root)
    return tensor


def least_(tensor: Tensor) -> Tensor:
    """The least over all workers, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor


def sum_(tensor: Tensor) -> Tensor:
    """The sum over all workers, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def share_shifts(moments: Sequence[Moments], stacked: Sequence[int]) -> None:
    """Give every worker's moments the shifts of rank 0; `stacked` are their numbers of features.

    A worker without data has chosen none; rank 0 must have some, which the partition of batches sees to.
    """
    if not moments:  # nothing to merge
        return
    device = next((m.device for m in moments if m.device is not None), torch.device("cpu"))
    if world_size() > 1 and dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    own = [m.shift if m.shift is not None else torch.zeros(n, dtype=torch.float64) for m, n in zip(moments, stacked)]
    flat = broadcast(torch.cat([shift.to(device) for shift in own]))
    for m, shift in zip(moments, flat.split(list(stacked))):
        m.start(shift.clone())


def sum_moments(moments: Sequence[Moments], batches: int) -> int:
    """Replace every worker's moments by those of all data; returns the number of batches of all workers."""
    if world_size() == 1 or not moments:
        return batches
    device = next(m.device for m in moments if m.device is not None)
    counts = torch.tensor([batches, *(m.count for m in moments)], dtype=torch.int64, device=device)
    sum_(counts)
    for m, count in zip(moments, counts[1:].tolist()):
        m.count = count
        for tensor in m.sums():
            sum_(tensor)
        dist.all_reduce(m.status(), op=dist.ReduceOp.MIN)
    return int(counts[0])
